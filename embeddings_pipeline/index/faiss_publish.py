"""Publishing a generation: written into a folder of its own, durable, and current from one rename on.

Whatever fails, and wherever the process is killed, the generation that was current stays current.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from embeddings_pipeline.index.faiss_read import FORMAT, Manifest, checksum_of, current_or_none
from embeddings_pipeline.index.standing import Standing

KEPT_GENERATIONS = 3

BUILD_LOCK = "lock"  # in a folder that is being built

_BUILDING = ".building-"


def publish(parent: Path, folder: Path, manifest: Manifest, standing_now: Callable[[Manifest], Standing]) -> Manifest:
    """Make what `folder` holds the current generation, as the manifest describes it. Returns the current manifest.

    That is another one if a process that read a newer version of the table was faster. What is foreign to the database
    is replaced, whatever its version. OSError if the disk refuses.
    """
    with _publishing(parent):
        published = current_or_none(parent)
        if published is not None:
            of_database, mine = (standing_now(each) is not Standing.FOREIGN for each in (published, manifest))
            if (of_database, published.version) > (mine, manifest.version):
                return published
        number = max((int(name[:6]) for name in _generations(parent)), default=0) + 1
        manifest = replace(manifest, generation=f"{number:06d}-{folder.name.removeprefix(_BUILDING)}")
        manifest = replace(manifest, checksum=checksum_of(asdict(manifest)))
        _write_durably(folder / "manifest.json", json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2))
        (folder / BUILD_LOCK).unlink()  # nobody sweeps it now, since we are publishing
        _sync_folder(folder)
        folder.rename(parent / manifest.generation)
        _sync_folder(parent)
        pointer = parent / ".CURRENT.new"
        _write_durably(pointer, manifest.generation + "\n")
        pointer.replace(parent / "CURRENT")
        _sync_folder(parent)
        for older in _generations(parent)[:-KEPT_GENERATIONS]:
            shutil.rmtree(parent / older, ignore_errors=True)
    return manifest


def publish_files(parent: Path, file: Path, name: str, manifest: str, is_newer: Callable[[], bool]) -> None:
    """Move a file that was built into the folder, and have the manifest `name` say so; the former ones of its kind go.
    Nothing is done unless `is_newer` says so, once nobody else publishes. OSError if the disk refuses.
    """
    with _publishing(parent):
        if not is_newer():
            return
        kind = file.name.partition("-")[0]
        former = [path for path in parent.glob(f"{kind}-*{file.suffix}") if path.is_file()]
        file.rename(parent / file.name)
        _sync_folder(parent)
        pointer = parent / f".{name}.new"
        _write_durably(pointer, manifest + "\n")
        pointer.replace(parent / name)
        _sync_folder(parent)
        for path in former:
            path.unlink(missing_ok=True)


def write_file(path: Path, write: Callable[["HashingWriter"], Any]) -> tuple[str, int]:
    """Write a new file durably; its SHA-256 in hexadecimal, and its bytes."""
    with path.open("xb") as opened:
        writer = HashingWriter(opened)
        write(writer)
        opened.flush()
        os.fsync(opened.fileno())
    return writer.hash.hexdigest(), writer.bytes


@contextmanager
def build_folder(parent: Path) -> Iterator[Path]:
    """A folder to write a generation into, locked while this process lives; removed unless it was published."""
    _make_folder(parent)
    folder = parent / f"{_BUILDING}{secrets.token_hex(4)}"
    with _publishing(parent):
        _sweep_builds(parent)
        folder.mkdir()
        handle = _open_lock(folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(handle)  # first: NFS keeps an open file's folder from being removed
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _publishing(parent: Path) -> Iterator[None]:
    """Held for moments, by one process at a time; the kernel lets go of it when the process dies."""
    with FileLock(parent / ".lock", poll_interval=0.01):
        yield


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _generations(parent: Path) -> list[str]:
    """The generations that are there, oldest first."""
    return sorted(path.name for path in parent.iterdir() if re.fullmatch(r"\d{6}-[0-9a-f]{8}", path.name))


def _sweep_builds(parent: Path) -> None:
    """Remove what killed builds left: the folders that no living process has locked."""
    for leftover in parent.glob(f"{_BUILDING}*"):
        handle = _open_lock(leftover)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # being built at this moment
        finally:
            os.close(handle)
        shutil.rmtree(leftover, ignore_errors=True)


def _open_lock(folder: Path) -> int:
    """A file to lock: NFS gives an exclusive lock only to who has it open for writing, which no folder can be."""
    return os.open(folder / BUILD_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingWriter:
    """A file that knows the SHA-256 of what was written."""

    closed = False  # pyarrow asks for this, and where it stands

    def __init__(self, file: Any) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """It is flushed once, at its end."""
