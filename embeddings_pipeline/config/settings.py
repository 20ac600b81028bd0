"""Deployment facts, from the environment or a `.env` file: where the database, the lake and the state are."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from embeddings_pipeline.config.paths import expanded
from embeddings_pipeline.errors import ConfigurationError

KEEP_DAYS = 30
CACHE_DAYS = 30
PACKAGE_DEFS = Path(__file__).parents[1] / "defs"


def project_root() -> Path:
    """The folder of `dagster.yaml`: `DAGSTER_HOME`, else the nearest one above the current folder or this package.

    ConfigurationError if DAGSTER_HOME is no folder, or a relative path: Dagster refuses that.
    """
    if home := os.environ.get("DAGSTER_HOME"):
        return _checked_home(home)
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "dagster.yaml").is_file():
            return folder
    return here


def in_project(path: Path) -> Path:
    """The path; a relative one is below the project's root, wherever a command happens to be started."""
    return (project_root() / expanded(path)).resolve()


def _checked_home(home: str) -> Path:
    remedy = "name the folder of dagster.yaml, or unset it in that folder"
    if not (path := expanded(home)).is_absolute():
        raise ConfigurationError(f"DAGSTER_HOME is {home!r}, which is no absolute path: {remedy}")
    if not path.is_dir():
        raise ConfigurationError(f"DAGSTER_HOME is {home!r}, where no folder is: {remedy}")
    return path.resolve()


def _hidden(value: SecretStr | str | None) -> SecretStr | None:
    return SecretStr(value) if isinstance(value, str) else value


# An address may hold a password: no `print`, dump or traceback shows it. Who needs it asks `revealed`.
Secret = Annotated[SecretStr | str | None, AfterValidator(_hidden)]


def revealed(secret: SecretStr | str | None) -> str | None:
    """What a secret is, for whoever needs it itself."""
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret


SECRETS = (
    "database_url",
    "openai_api_key",
    "openai_base_url",
    "lake_uri",
    "alert_webhook_url",
    "embedding_cache_url",
    "serve_api_key",
)


class Settings(BaseSettings):
    """Read once at the edge (command line, Dagster resource) and passed on; see the README's table."""

    model_config = SettingsConfigDict(env_file_encoding="utf-8", extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: Secret = None
    embedding_profile: str | None = None
    embedding_model: str | None = None
    embedding_dimensions: int | None = None
    embedding_device: str | None = None
    embedding_batch_size: int | None = None
    embedding_threads: int | None = Field(default=None, ge=1, le=4096)
    embedding_provider: str | None = None
    embedding_enabled: bool | None = None
    embedding_requests_per_minute: int | None = Field(default=None, ge=0)
    embedding_tokens_per_minute: int | None = Field(default=None, ge=0)
    embedding_attempts: int | None = Field(default=None, ge=1)
    openai_api_key: Secret = None
    openai_base_url: Secret = None
    lake_uri: Secret = None
    alert_webhook_url: Secret = None
    embeddings_state_dir: Path | None = None
    embeddings_defs_dir: Path | None = None
    embeddings_keep_days: int | None = Field(default=None, ge=0)
    embedding_cache_url: Secret = None
    serve_api_key: Secret = None
    embedding_cache_days: int | None = Field(default=None, ge=0, le=36_500)
    enable_reranker: bool | None = None
    rerank_model: str | None = None
    rerank_top_k: int | None = Field(default=None, ge=1, le=1000)
    return_top_k: int | None = Field(default=None, ge=1, le=1000)
    rerank_batch_size: int | None = Field(default=None, ge=1, le=10_000)
    rerank_milliseconds: int | None = Field(default=None, ge=0)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which checks nothing; a secret among the new values is hidden too."""
        secrets = {name: _hidden(value) for name, value in (update or {}).items() if name in SECRETS}
        copied = super().model_copy(update={**(update or {}), **secrets}, deep=deep)
        copied.__dict__.pop("state_dir", None)
        return copied

    @cached_property  # a search asks for it often, and links are followed
    def state_dir(self) -> Path:
        """Where everything is written: EMBEDDINGS_STATE_DIR, relative to the project's root, else `.state` there."""
        return in_project(self.embeddings_state_dir or Path(".state"))

    @property
    def defs_dir(self) -> Path:
        """Where the `defs.yaml` files are: EMBEDDINGS_DEFS_DIR, relative to the project's root, else this package's.

        A Dagster project that has this package installed names its own folder here (`src/my_project/defs`), so that
        the command line sees the collections that the project's definitions load.
        """
        if self.embeddings_defs_dir is None:
            return PACKAGE_DEFS
        return in_project(self.embeddings_defs_dir)

    @property
    def keep_days(self) -> int:
        """How many days Dagster's runs are kept, with their events and log files; 0: for ever."""
        return KEEP_DAYS if self.embeddings_keep_days is None else self.embeddings_keep_days

    @property
    def cache_days(self) -> int:
        """How many days the embedding cache keeps an answer; 0: for ever."""
        return CACHE_DAYS if self.embedding_cache_days is None else self.embedding_cache_days


def environment_value(name: str) -> str | None:
    """A variable that a definition names: from the environment, else from `.env` in the project's root."""
    return os.environ.get(name) or dotenv_values(project_root() / ".env").get(name) or None


def load_settings() -> Settings:
    """Settings from the environment, then from `.env` in the project's root; empty values count as unset.

    The folders in it are absolute, and stay what they are if the program changes its folder. ConfigurationError,
    naming the variable, if one cannot be read.
    """
    file = project_root() / ".env"
    try:
        settings = Settings(_env_file=file, _env_ignore_empty=True)  # type: ignore[call-arg]
    except ValidationError as error:
        [first, *_] = error.errors()
        name = "_".join(map(str, first["loc"])).upper()
        raise ConfigurationError(f"{name} cannot be {first['input']!r}: {first['msg']}; correct it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}): write it as UTF-8 text, or remove it") from error
    absolute: dict[str, Path | str] = {"embeddings_state_dir": settings.state_dir}
    if (lake := revealed(settings.lake_uri)) and "://" not in lake:
        absolute["lake_uri"] = str(in_project(Path(lake)))
    return settings.model_copy(update=absolute)
