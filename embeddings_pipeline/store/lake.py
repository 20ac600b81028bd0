"""The lake: Parquet files, one a batch, asset and run, in a folder or an object store. Files are never overwritten."""

import contextlib
import logging
import re
import tempfile
import threading
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import batch_key
from embeddings_pipeline.config.settings import Settings, in_project, revealed
from embeddings_pipeline.errors import LakeError
from embeddings_pipeline.store.models import Identity
from embeddings_pipeline.store.source_rows import HASH

log = logging.getLogger(__name__)

KEPT_BYTES = 64 << 20  # of files that were written last, in memory
SWEEP_AFTER_SECONDS = 24 * 3600  # a run that reads an older file is long dead

REPEATED = ("vector_name", "fingerprint")  # columns of few different values
DATABASE, EPOCH = b"database", b"epoch"  # in the metadata of a file: what it is of
DEFINITION_HASH = b"definition_hash"  # in the metadata of a raw_items or item_texts file: what it was made for
FAILED_ITEMS = b"failed_items"  # there too: items that are not among the rows, as `pipeline.failed` writes them
ITEM_TEXTS = pa.schema(
    [
        ("item_key", pa.string()),
        ("row_hash", HASH),
        ("payload", pa.string()),
        ("vector_name", pa.string()),
        ("chunk", pa.int64()),
        ("text", pa.string()),
        ("content_hash", HASH),
        ("blank", pa.bool_()),
    ]
)


def embeddings_schema(dimension: int, storage: str) -> pa.Schema:
    """One row a text that has a vector; `encoded`: by this run. float16 if the table holds halfvec."""
    element = pa.float16() if storage == "halfvec" else pa.float32()
    return pa.schema(
        [
            ("item_key", pa.string()),
            ("vector_name", pa.string()),
            ("chunk", pa.int64()),
            ("content_hash", HASH),
            ("fingerprint", pa.string()),
            ("encoded", pa.bool_()),
            ("embedding", pa.list_(element, dimension)),
        ]
    )


def vectors_to_arrow(vectors: NDArray, schema: pa.Schema) -> pa.Array:
    """(n, d) floats as a fixed-size list column of the schema's element type, without a Python object a number."""
    kind = schema.field("embedding").type
    values = np.ascontiguousarray(vectors, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), kind.list_size)


def vectors_from_arrow(column: pa.ChunkedArray) -> NDArray:
    """The (n, d) array of a fixed-size list column, in its element type."""
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks else pa.array([], column.type)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


ELEMENT = b"element"  # in the metadata of a column of vectors: the type of their numbers


def _with_bytes(table: pa.Table) -> pa.Table:
    """The table with each vector as its bytes: Parquet writes, and reads, every number of a list by itself."""
    for place, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type):
            values = np.ascontiguousarray(vectors_from_arrow(table.column(place)))
            kind = pa.binary(values.itemsize * field.type.list_size)
            column = pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
            element = {ELEMENT: str(values.dtype).encode()}
            table = table.set_column(place, pa.field(field.name, kind, metadata=element), column)
    return table


def _with_vectors(table: pa.Table) -> pa.Table:
    """What `_with_bytes` was given."""
    for place, field in enumerate(table.schema):
        if element := (field.metadata or {}).get(ELEMENT):
            values = np.frombuffer(b"".join(_bytes_of(chunk) for chunk in table.column(place).chunks), element.decode())
            kind = pa.list_(pa.from_numpy_dtype(values.dtype), field.type.byte_width // values.itemsize)
            column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)
            table = table.set_column(place, pa.field(field.name, kind), column)
    return table


def _bytes_of(chunk: pa.FixedSizeBinaryArray) -> memoryview:
    width = chunk.type.byte_width
    return memoryview(chunk.buffers()[1])[chunk.offset * width : (chunk.offset + len(chunk)) * width]


class _Written:
    """The files that this process wrote last, for the step that reads them next."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int, int | None], pa.Table] = {}
        self._bytes = 0
        self._mutex = threading.Lock()

    def keep(self, file: pafs.FileInfo, table: pa.Table) -> None:
        """A file as it is after it was written; the oldest ones are forgotten."""
        with self._mutex:
            self._tables[file.path, file.size, file.mtime_ns] = table
            self._bytes += table.nbytes
            while self._bytes > KEPT_BYTES:
                self._bytes -= self._tables.pop(next(iter(self._tables))).nbytes

    def get(self, file: pafs.FileInfo) -> pa.Table | None:
        """What is in a file; None if it is another than was written, or was forgotten."""
        with self._mutex:
            return self._tables.get((file.path, file.size, file.mtime_ns))


_written = _Written()


@dataclass(frozen=True)
class Lake:
    """`<root>/<collection>/<asset>[/<fingerprint>]/<batch>/<run>.parquet`.

    Each file says in its metadata which database it is of (`identity`): two of them may share a lake.
    """

    filesystem: pafs.FileSystem
    root: str
    identity: Identity | None = None

    def write(self, table: pa.Table, folder: str, batch: int, run: str) -> str:
        """Write one file; its path. A second try of the same run gets a name of its own."""
        directory = f"{self.root}/{folder}/{batch_key(batch)}"
        path = f"{directory}/{run}.parquet"
        if self.identity is not None:
            of = {DATABASE: self.identity.database.encode(), EPOCH: self.identity.epoch.encode()}
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **of})
        try:
            self.filesystem.create_dir(directory, recursive=True)
            tries = 1
            while self.filesystem.get_file_info(path).type != pafs.FileType.NotFound:
                tries += 1
                path = f"{directory}/{run}-{tries}.parquet"
            # A dictionary of what hardly repeats costs three times the writing, and room; vectors are not made smaller.
            packed = {name: "none" if name == "embedding" else "zstd" for name in table.column_names}
            repeated = [name for name in REPEATED if name in table.column_names]
            with self.filesystem.open_output_stream(path) as file:
                pq.write_table(
                    _with_bytes(table), file, compression=packed, use_dictionary=repeated, write_statistics=False
                )
            _written.keep(self.filesystem.get_file_info(path), table)
        except OSError as error:
            with contextlib.suppress(OSError):  # room for others; readers would pass over it anyway
                self.filesystem.delete_file(path)
            raise LakeError(
                f"the lake cannot be written at {path}: {_reason(error)}; make room or allow writing, then sync again"
            ) from error
        return path

    def check_writable(self) -> None:
        """LakeError if nothing can be written into a folder, before a batch is begun and counts as one that failed."""
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            return  # who may write what is not known there before it is tried
        try:
            self.filesystem.create_dir(self.root, recursive=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise LakeError(
                f"the lake cannot be written at {self.root}: {_reason(error)}; make room or allow writing"
            ) from error

    def _read(self, path: str) -> pa.Table:
        with pq.ParquetFile(path, filesystem=self.filesystem) as file:
            return _with_vectors(file.read(use_threads=False))

    def sweep(self, folder: str, batch: int, keep: str) -> None:
        """Remove the batch's files that nobody needs: more than a day old, neither the newest nor the one named.

        Another database's stay. Where nothing may be deleted, as under an object lock, all stay, and a warning says so.
        """
        directory = f"{self.root}/{folder}/{batch_key(batch)}"
        try:
            files = self.filesystem.get_file_info(pafs.FileSelector(directory, allow_not_found=True))
            files = sorted((file for file in files if file.is_file), key=lambda file: file.mtime_ns or 0)
            for file in files[:-1]:
                # Far off either way: its clock may have been ahead.
                old = file.mtime_ns and abs(time.time_ns() - file.mtime_ns) > SWEEP_AFTER_SECONDS * 10**9
                if old and file.base_name != keep and not self._is_foreign(file.path):
                    with contextlib.suppress(FileNotFoundError):  # another run swept it
                        self.filesystem.delete_file(file.path)
        except OSError as error:
            _warn_of_leftovers(self.root, _reason(error))

    def forget(self, folder: str, batch: int, run: str, kept: Container[str]) -> None:
        """Remove what a run wrote of a batch, but for files of these names. What may not be deleted stays."""
        directory = f"{self.root}/{folder}/{batch_key(batch)}"
        try:
            for file in self.filesystem.get_file_info(pafs.FileSelector(directory, allow_not_found=True)):
                if file.base_name.startswith(run) and file.base_name not in kept:
                    with contextlib.suppress(FileNotFoundError):  # somebody swept it
                        self.filesystem.delete_file(file.path)
        except OSError as error:
            _warn_of_leftovers(self.root, _reason(error))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder of the lake and all that is in it; where that is not allowed, a warning names it."""
        try:
            self.filesystem.delete_dir(folder)
        except OSError as error:
            log.warning("warning: the lake's folder %s stays, delete it yourself: %s", folder, _reason(error))

    def _is_foreign(self, path: str) -> bool:
        """Whether a file says that it is of another database; one that is damaged says nothing."""
        try:
            metadata = pq.read_schema(path, filesystem=self.filesystem).metadata
        except (pa.ArrowInvalid, FileNotFoundError):
            return False
        return self._foreign(metadata)

    def _foreign(self, metadata: dict[bytes, bytes] | None) -> bool:
        database = (metadata or {}).get(DATABASE)
        return self.identity is not None and database not in (None, self.identity.database.encode())

    def content_hashes(self, folder: str, batch: int, file: str) -> set[bytes] | None:
        """The content hashes in one file of a batch; None if it is gone or damaged."""
        path = f"{self.root}/{folder}/{batch_key(batch)}/{file}"
        try:
            column = pq.read_table(path, filesystem=self.filesystem, columns=["content_hash"])["content_hash"]
        except (pa.ArrowInvalid, FileNotFoundError):
            return None
        except OSError as error:
            raise LakeError(f"the lake cannot be read at {path}: {_reason(error)}; check LAKE_URI") from error
        return set(column.to_pylist())

    def newest_hashes(self, folder: str, batch: int) -> set[bytes]:
        """The content hashes in the batch's newest complete file; none without any."""
        newest = self.newest(folder, batch)
        return set(newest[1]["content_hash"].to_pylist()) if newest else set()

    def newest(
        self, folder: str, batch: int, run: str | None = None, *, of_any_database: bool = False
    ) -> tuple[str, pa.Table] | None:
        """Path and content of the batch's newest complete file, of this run if it wrote one; None without any.

        A file that a killed run left unfinished has no footer and is passed over; so is another database's, unless
        there is no other and `of_any_database` takes it.
        """
        foreign: tuple[str, pa.Table] | None = None
        directory = f"{self.root}/{folder}/{batch_key(batch)}"
        try:
            files = self.filesystem.get_file_info(pafs.FileSelector(directory, allow_not_found=True))
        except OSError as error:
            raise LakeError(f"the lake cannot be read at {directory}: {_reason(error)}; check LAKE_URI") from error
        files = [file for file in files if file.is_file and file.path.endswith(".parquet")]
        mine = [file for file in files if run and file.base_name.startswith(run)]
        for file in sorted(mine or files, key=lambda file: (file.mtime_ns or 0, file.path), reverse=True):
            try:
                table = _written.get(file) or self._read(file.path)
                if not self._foreign(table.schema.metadata):
                    return file.path, table
                foreign = foreign or (file.path, table)
            except (pa.ArrowInvalid, FileNotFoundError):
                continue
            except OSError as error:
                raise LakeError(f"the lake cannot be read at {file.path}: {_reason(error)}; check LAKE_URI") from error
        return foreign if of_any_database else None


def open_lake(settings: Settings) -> Lake:
    """The lake at LAKE_URI, a folder (relative to the project's root) or anything that `pyarrow.fs` opens; else the
    folder `lake` in the state folder.
    """
    uri = revealed(settings.lake_uri)
    if not uri:
        return Lake(pafs.LocalFileSystem(), (settings.state_dir / "lake").as_posix())
    try:
        if "://" not in uri:
            return Lake(pafs.LocalFileSystem(), in_project(Path(uri)).as_posix())
        filesystem, root = pafs.FileSystem.from_uri(uri)
        if not root.strip("/"):
            raise OSError("it names no bucket or folder")
    except (pa.ArrowInvalid, OSError) as error:
        shown = re.sub("//[^/]*@", "//…@", uri)  # there may be a secret
        told = _reason(error).replace(uri, shown)
        raise LakeError(f"LAKE_URI {shown!r} cannot be opened: {told}; use a folder or s3://bucket/path") from None
    return Lake(filesystem, root.rstrip("/"))


_told_of_leftovers: set[str] = set()  # once a process and lake, and not for each batch


def _warn_of_leftovers(root: str, reason: str) -> None:
    if root not in _told_of_leftovers:
        _told_of_leftovers.add(root)
        log.warning("warning: old files of the lake %s stay, since they cannot be deleted: %s", root, reason)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
