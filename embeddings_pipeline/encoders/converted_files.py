"""The files of models made ready for OpenVINO, each whole or as if it were not there; and where one is made."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embeddings_pipeline.encoders.openvino import GRAPH, TOKENIZER, Readiness

FORMAT = 1  # raised if what is made here changes
MANIFEST = "manifest.json"
WORKSHOP, IN_USE = "embeddings-encoder-", "in use"


def write_manifest(folder: Path, weights: str, readiness: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a folder with a converted model holds."""
    manifest = {
        "format": FORMAT,
        "openvino": version("openvino"),
        "weights": weights,
        "readiness": readiness,
        "files": _digests(folder),
    }
    write_sealed(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted model; None if it is not there, damaged, or of another version."""
    try:
        manifest = read_sealed(folder / MANIFEST)
        made_by = (manifest["format"], manifest["openvino"])
        whole = made_by == (FORMAT, version("openvino")) and manifest["files"] == _digests(folder)
        Readiness(**manifest["readiness"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if whole else None


def write_sealed(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a digest of itself. OSError if the disk refuses."""
    file.write_text(json.dumps({**content, "seal": _seal(content)}, indent=1), "utf-8")


def read_sealed(file: Path) -> dict[str, Any]:
    """What was written. OSError, ValueError or TypeError if it cannot be read, or a part of it is another by now."""
    content = dict(json.loads(file.read_text("utf-8")))
    if content.pop("seal", None) != _seal(content):
        raise ValueError(f"{file} is damaged")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in (GRAPH, str(Path(GRAPH).with_suffix(".bin")), TOKENIZER):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder for temporary files, removed at the end. What killed processes have left of theirs goes first."""
    for other in Path(tempfile.gettempdir()).glob(f"{WORKSHOP}*"):
        _sweep(other)
    folder, handle = _new_folder()
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> tuple[Path, int]:
    """A folder, and the lock that says that its process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=WORKSHOP))
        handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if (folder / IN_USE).exists():
            return folder, handle
        os.close(handle)  # taken for a killed one's before it was locked


def _sweep(folder: Path) -> None:
    try:
        if folder.lstat().st_uid != os.getuid():
            return
        handle = os.open(folder / IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it is made, or removed, at this moment
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(handle)
