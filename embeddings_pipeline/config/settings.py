"""Deployment facts, from the environment or a `.env` file: where the database, the lake and the state are."""

import os
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

PACKAGE_DEFS = Path(__file__).parents[1] / "defs"


def project_root() -> Path:
    """The folder of `dagster.yaml`: `DAGSTER_HOME`, else the nearest one above the current folder or this package."""
    if home := os.environ.get("DAGSTER_HOME"):
        return Path(home).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "dagster.yaml").is_file():
            return folder
    return here


def in_project(path: Path) -> Path:
    """The path; a relative one is below the project's root, wherever a command happens to be started."""
    return (project_root() / path.expanduser()).resolve()


class Settings(BaseSettings):
    """Read once at the edge (command line, Dagster resource) and passed on; see the README's table."""

    model_config = SettingsConfigDict(env_file_encoding="utf-8", extra="ignore", frozen=True)

    database_url: str | None = None
    embedding_profile: str | None = None
    embedding_model: str | None = None
    embedding_dimensions: int | None = None
    embedding_device: str | None = None
    embedding_batch_size: int | None = None
    embedding_provider: str | None = None
    openai_api_key: SecretStr | None = None
    openai_base_url: str | None = None
    lake_uri: str | None = None
    alert_webhook_url: SecretStr | None = None
    embeddings_state_dir: Path | None = None
    embeddings_defs_dir: Path | None = None

    @property
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


def load_settings() -> Settings:
    """Settings from the environment, then from `.env` in the project's root; empty values count as unset.

    The folders in it are absolute, and stay what they are if the program changes its folder.
    """
    settings = Settings(_env_file=project_root() / ".env", _env_ignore_empty=True)  # type: ignore[call-arg]
    absolute: dict[str, Path | str] = {"embeddings_state_dir": settings.state_dir}
    if settings.lake_uri and "://" not in settings.lake_uri:
        absolute["lake_uri"] = str(in_project(Path(settings.lake_uri)))
    return settings.model_copy(update=absolute)
