"""Profiles: which model makes the vectors, and what the environment may change about it.

Nothing here imports torch: commands that only compare fingerprints start at once.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from embeddings_pipeline.config.fields import Headers, Number, Text, YesOrNo, variable_name, whole_number
from embeddings_pipeline.config.mistakes import explain
from embeddings_pipeline.config.paths import expanded
from embeddings_pipeline.errors import ProfileError, did_you_mean

if TYPE_CHECKING:
    from embeddings_pipeline.config.settings import Settings

logger = logging.getLogger(__name__)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_Count = Annotated[int, whole_number(1, 1_000_000_000)]
_Variable = Annotated[str, AfterValidator(variable_name)]
_Rate = Annotated[int, whole_number(0, 1_000_000_000)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProfileSettings:
    """A choice of model, without a name. `fingerprint` says which of these settings change vectors."""

    provider: Literal["local", "openai", "python"] = Field(
        description="local: sentence-transformers; openai: an embeddings API; python: a class of your own."
    )
    model: Text = Field(
        description="A folder or a Hugging Face name (local), a model's name (openai), `package.module:Class` (python)."
    )
    dimensions: _Count = Field(
        description="Length of each vector. More than the model's own are refused; of fewer, the first so many are "
        "taken, at unit length, which suits models that were trained for it."
    )
    max_length: _Count | None = Field(
        default=None, description="Tokens read of a text, prompt included. Left out: what the model's files say."
    )
    normalize: YesOrNo = Field(default=True, description="Make vectors unit length; false leaves them as they come.")
    query_prompt: str | None = Field(
        default=None, description='Put before each query. Left out: what the model\'s files say; `""`: nothing.'
    )
    document_prompt: str | None = Field(
        default=None, description='Put before each text. Left out: what the model\'s files say; `""`: nothing.'
    )
    similarity: Literal["cosine"] | None = Field(
        default=None,
        description="cosine: search by it, though the model's files name another measure. Left out: such a model is "
        "refused.",
    )
    bidirectional: YesOrNo = Field(
        default=False, description="A decoder (Qwen2) whose tokens see what follows them, as it was trained to embed."
    )
    revision: Text | None = Field(
        default=None, description="A Hugging Face revision (local); any text that tells two versions apart (others)."
    )
    trust_remote_code: YesOrNo = Field(default=False, description="Run Python code that comes with the weights.")
    device: Text | None = Field(default=None, description="cpu, cuda or mps. Left out: a GPU if there is one.")
    weights: Literal["int8"] | None = Field(
        default=None,
        description="int8: the weights in 8 bits, on a processor: faster without bfloat16, and slightly other vectors.",
    )
    batch_size: _Count | None = Field(
        default=None,
        description="Most texts in one pass, or in one request (openai). Left out: by device or model.",
    )
    tokens_per_batch: _Count | None = Field(
        default=None,
        description="Most tokens in one pass, padding included, or in one request (openai). Left out: by device, or by "
        "model.",
    )
    gpu_precision: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="On a GPU; a CPU takes bfloat16 where it is fast."
    )
    cache: YesOrNo | None = Field(
        default=None, description="Keep vectors in the embedding cache. Left out: if the provider takes money for them."
    )
    price: Number | None = Field(
        default=None,
        description="US dollars for a million tokens. Left out: what the table of prices says of the model.",
    )

    url: Text | None = Field(
        default=None,
        description="openai: the address of a server that speaks its protocol (http://host:8080/v1); `${NAME}` is a "
        "variable of the environment. Left out: `OPENAI_BASE_URL`, else OpenAI's own.",
    )
    key_variable: _Variable | None = Field(
        default=None,
        description="openai: the name of the environment's variable that holds the key. Left out: `OPENAI_API_KEY`, "
        "and none where the profile has a `url:`.",
    )
    headers: Headers = Field(
        default=(), description="openai: more headers of each request; `${NAME}` is a variable of the environment."
    )
    query_model: Text | None = Field(
        default=None, description="openai: another model of the same space that encodes queries."
    )
    send_dimensions: YesOrNo = Field(
        default=False,
        description="openai: ask the server for `dimensions`, for a model that can shorten its vectors. It is asked of "
        "OpenAI's own models whenever they have to.",
    )
    truncate: YesOrNo = Field(
        default=False,
        description="openai: cut texts that are longer than the model reads; otherwise they go to quarantine.",
    )
    requests_per_minute: _Rate | None = Field(
        default=None, description="openai: 0 for no limit. Left out: `EMBEDDING_REQUESTS_PER_MINUTE`, else 500."
    )
    tokens_per_minute: _Rate | None = Field(
        default=None, description="openai: 0 for no limit. Left out: `EMBEDDING_TOKENS_PER_MINUTE`, else none."
    )
    timeout_seconds: _Count = Field(default=120, description="openai: how long an answer may take.")

    def __post_init__(self) -> None:
        if self.price is not None and self.price < 0:
            raise ValueError("`price:` is a number of dollars, 0 or more")
        if self.weights and self.provider != "local":
            raise ValueError(f"`weights: {self.weights}` is for provider local")
        if self.weights and self.device not in (None, "cpu"):
            raise ValueError(f"`weights: {self.weights}` runs on a processor, not on {self.device}: set it to cpu")
        if self.cache is None:
            object.__setattr__(self, "cache", self.provider == "openai")
        if self.provider != "local":  # no files that could say more
            object.__setattr__(self, "query_prompt", self.query_prompt or "")
            object.__setattr__(self, "document_prompt", self.document_prompt or "")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Profile(ProfileSettings):
    """A named choice of model."""

    name: Text = Field(description="What `profile switch` and searches call it.")


BUILT_IN: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="minilm", provider="local", model=MINILM, dimensions=384, max_length=256),
        # Prompt and CLS pooling as published in its model card; the pooling comes with the weights' modules.json.
        Profile(
            name="speed",
            provider="local",
            model="BAAI/bge-small-en-v1.5",
            dimensions=384,
            max_length=512,
            query_prompt="Represent this sentence for searching relevant passages: ",
        ),
        # The model reads 32k tokens; 8192 is what its model card uses, and bounds the memory of one text.
        # Its files bring code written for transformers 4; `bidirectional` gives the same attention without it.
        # float16 is too narrow for it: https://github.com/embeddings-benchmark/mteb/pull/4935
        Profile(
            name="quality",
            provider="local",
            model="Alibaba-NLP/gte-Qwen2-1.5B-instruct",
            dimensions=1536,
            max_length=8192,
            query_prompt=(
                "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
            ),
            bidirectional=True,
            gpu_precision="bfloat16",
        ),
        Profile(
            name="openai",
            provider="openai",
            model="text-embedding-3-small",
            dimensions=1536,
            max_length=8191,
        ),
    )
}


def resolve_profile(declared: str | Profile | Mapping[str, Any] | None, settings: "Settings") -> Profile:
    """The profile of a collection: `profile:` of its `defs.yaml`, else `EMBEDDING_PROFILE`, else `minilm`.

    `declared` is the name of a built-in profile, a profile, or a mapping with the fields of one. What the environment
    changes:

    | setting | if `defs.yaml` declares a profile | if it leaves it open |
    |---|---|---|
    | EMBEDDING_DEVICE, EMBEDDING_BATCH_SIZE | applied: they change no vector | applied |
    | EMBEDDING_MODEL | applied only as "its weights are here", see below | applied |
    | EMBEDDING_PROVIDER, EMBEDDING_DIMENSIONS | not applied | applied |

    "Its weights are here": a local folder that is named like the declared model (`/models/bge-small-en-v1.5` for
    `BAAI/bge-small-en-v1.5`, or that model's folder in a Hugging Face cache). The name is asked for because one
    environment serves several collections, and a folder meant for one must not become the model of another. If nothing
    is declared any folder is taken; max_length and what the profile says of prompts stay, so a model that wants others
    is a mapping in `defs.yaml`.

    Raises ProfileError for an unknown name, an unknown or missing key, or a value of the wrong kind.
    """
    if declared is None:
        profile = _from_environment(settings)
    else:
        profile = _with_weights_at(
            _built_in(declared) if isinstance(declared, str) else _own(declared), settings.embedding_model
        )
    return _changed(
        profile,
        device=settings.embedding_device or profile.device,
        batch_size=profile.batch_size if settings.embedding_batch_size is None else settings.embedding_batch_size,
    )


def _built_in(name: str) -> Profile:
    if profile := BUILT_IN.get(name):
        return profile
    known = ", ".join(BUILT_IN)
    raise ProfileError(f"There is no profile {name!r}: the built-in ones are {known}{did_you_mean(name, BUILT_IN)}")


def _own(declared: Profile | Mapping[str, Any]) -> Profile:
    if isinstance(declared, Profile):
        return declared
    try:
        return TypeAdapter(Profile).validate_python(dict(declared))
    except ValidationError as error:
        raise _explained(declared.get("name"), error) from error


def _changed(profile: Profile, **settings: Any) -> Profile:
    try:
        return replace(profile, **settings)
    except ValidationError as error:
        raise _explained(profile.name, error) from error


def _explained(name: object, error: ValidationError) -> ProfileError:
    where, words = explain(error, Profile)
    return ProfileError(f"Profile {name or '(without a name)'}: {'.'.join(map(str, where))}: {words}")


def _from_environment(settings: "Settings") -> Profile:
    provider = settings.embedding_provider
    base = _built_in(settings.embedding_profile or ("openai" if provider == "openai" else "minilm"))
    if provider and provider != base.provider and not settings.embedding_model:
        raise ProfileError(
            f"EMBEDDING_PROVIDER={provider} needs EMBEDDING_MODEL, because profile {base.name} is of provider "
            f"{base.provider}"
        )
    return _changed(
        base,
        provider=provider or base.provider,
        model=settings.embedding_model or base.model,
        dimensions=base.dimensions if settings.embedding_dimensions is None else settings.embedding_dimensions,
        cache=base.cache if provider in (None, base.provider) else None,
    )


def _with_weights_at(profile: Profile, model: str | None) -> Profile:
    """The profile with a folder for its model, where `model` (EMBEDDING_MODEL) is a folder that is named like it."""
    if not model or profile.provider != "local" or not (folder := expanded(model)).is_dir():
        return profile
    wanted = {profile.model.rsplit("/", 1)[-1].lower(), "models--" + profile.model.replace("/", "--").lower()}
    if wanted & {part.lower() for part in _own_names(folder.resolve())}:
        return replace(profile, model=str(folder))
    logger.warning(
        "EMBEDDING_MODEL=%s is not used for profile %s, which defs.yaml declares: the folder is not named %s",
        model,
        profile.name,
        profile.model.rsplit("/", 1)[-1],
    )
    return profile


def _own_names(folder: Path) -> list[str]:
    """The folder's name, and the model's in a Hugging Face cache (`models--x--y/snapshots/<commit>`)."""
    in_cache = folder.parent.name == "snapshots"
    return [folder.name, *([folder.parents[1].name] if in_cache else [])]
