"""FAISS indexes of a collection, made from its model table and published as generations.

manifest = build(database, table, state_dir / "faiss")
opened = open_index(state_dir / "faiss", "items")
scores, ids = opened.search("base", queries, k=10)

On disk, below `<folder>/<collection>/`: `<generation>/` with `manifest.json` and, a vector name, `<name>.faiss` and
`<name>.ids.npy` (text ids in the order of the index); `CURRENT`, which names the generation that counts; `.lock`, held
while one is published. A generation never changes: readers need no lock.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.errors import DatabaseError, VectorIndexError
from embeddings_pipeline.store.copy_binary import copy_blocks
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination

FORMAT = 1  # of manifest.json and the files that it names
KEPT_GENERATIONS = 3
EXACT_BELOW = 200_000  # vectors of one name; from here on a search of all of them takes more than 10 ms
RECALL_AT = 10
LEAST_RECALL = 0.95
WANTED_RECALL = 0.98  # what a new index is tuned for: another sample may come out lower
RECALL_SAMPLES = 256
POINTS_PER_LIST = 64  # k-means needs 39 or more (faiss.ClusteringParameters.min_points_per_centroid)
ROWS_AT_A_TIME = 65_536
TIE = 2.0**-10  # scores that differ by less may stand in either order: float16 has 11 significant bits
SAME = 1e-5  # what sums of float32 differ by when they are added in another order
REMEDY = "run `embeddings-pipeline sync` to build it again"

_BUILDING = ".building-"


@dataclass(frozen=True)
class VectorFiles:
    """What a generation holds of one vector name."""

    vectors: int
    index_type: str  # in FAISS's words: `SQfp16`, `Flat`, `IVF447,SQfp16` and the lists that a search visits
    exact: bool
    recall_at_10: float  # against an exact search, on a sample of the vectors
    bytes: int
    files: dict[str, str]  # file name → SHA-256


@dataclass(frozen=True)
class Manifest:
    """What a generation was made from. `checksum` covers all the rest, and through `vectors` every file."""

    collection: str
    generation: str
    fingerprint: str
    epoch: str
    version: int
    dimension: int
    storage: str
    vectors: dict[str, VectorFiles]
    built_at: str  # ISO 8601, UTC
    seconds: float
    checksum: str = ""

    @property
    def count(self) -> int:
        """Vectors of all names."""
        return sum(each.vectors for each in self.vectors.values())

    @property
    def recall_at_10(self) -> float:
        """The lowest of all vector names."""
        return min((each.recall_at_10 for each in self.vectors.values()), default=1.0)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.vectors.values())


@dataclass(frozen=True)
class Parity:
    """How a generation compares with its model table. Unless `comparable`, nothing else was looked at."""

    comparable: bool  # the generation is of the collection's fingerprint, epoch and version
    in_index: int = 0
    in_table: int = 0
    missing_in_index: int = 0
    not_in_table: int = 0
    sampled: int = 0
    differing: int = 0  # samples whose nearest ten are not the exact ones, ties aside; an exact index has none
    recall_at_10: float = 1.0
    score_error: float = 0.0  # the largest difference between a returned score and the exact cosine
    exact: bool = True

    @property
    def ok(self) -> bool:
        """Same ids, and the recall that the kind of index promises."""
        same = self.comparable and not self.missing_in_index and not self.not_in_table
        found = not self.differing if self.exact else self.recall_at_10 >= LEAST_RECALL
        return same and found and self.score_error <= TIE


@dataclass(frozen=True)
class _State:
    fingerprint: str | None
    epoch: str
    version: int

    def has(self, manifest: Manifest) -> bool:
        """Whether the manifest is of this or an earlier version of what is there now."""
        same = (manifest.fingerprint, manifest.epoch) == (self.fingerprint, self.epoch)
        return same and manifest.version <= self.version


# ── Building ────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(database: Database, table: Destination, folder: Path) -> Manifest:
    """Index every vector of the current model table and publish it as a generation below `folder`.

    The vectors and the version are of one snapshot. Returns the generation that is current afterwards: the new one, or
    the one that another process published meanwhile from a newer version. Whatever fails, and wherever the process is
    killed, the former generation stays current.

    Raises VectorIndexError where the folder cannot be written, the disk is full or `table` is not the current model's.
    """
    began = time.perf_counter()
    parent = folder / table.collection
    try:
        with _build_folder(parent) as target:
            with _snapshot(database, table) as connection:
                state = _state(connection, table.collection)
                if state.fingerprint != table.fingerprint:
                    raise VectorIndexError(
                        f"FAISS index of {table.collection!r}: model {table.fingerprint} is not the current one, "
                        f"which is {state.fingerprint}; {REMEDY}"
                    )
                vectors = {
                    name: _write_vectors(connection, table, name, rows, target)
                    for name, rows in _counts(connection, table).items()
                }
            manifest = Manifest(
                collection=table.collection,
                generation="",
                fingerprint=table.fingerprint,
                epoch=state.epoch,
                version=state.version,
                dimension=table.dimension,
                storage=table.storage,
                vectors=vectors,
                built_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(time.perf_counter() - began, 3),
            )
            return _publish(database, table, parent, target, manifest)
    except OSError as error:
        raise VectorIndexError(
            f"FAISS index of {table.collection!r} cannot be written to {parent}: {error.strerror or error}; the former "
            "generation stays. Make room there or correct its rights, then run `embeddings-pipeline sync`"
        ) from error


@contextmanager
def _snapshot(database: Database, table: Destination) -> Iterator[psycopg.Connection]:
    try:
        with database.connect() as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            yield connection
    except psycopg.errors.UndefinedTable as error:
        raise VectorIndexError(
            f"FAISS index of {table.collection!r}: there is no table embeddings.{table.name}; {REMEDY}"
        ) from error
    except psycopg.Error as error:
        raise DatabaseError(f"FAISS index of {table.collection!r}: {' '.join(str(error).split())}") from error


def _state(connection: psycopg.Connection, collection: str) -> _State:
    row = connection.execute(
        "SELECT fingerprint, epoch, version FROM embeddings.collection WHERE name = %s", [collection]
    ).fetchone()
    if row is None:
        raise VectorIndexError(f"FAISS index of {collection!r}: the database has no such collection; {REMEDY}")
    return _State(row[0], str(row[1]), row[2])


def _counts(connection: psycopg.Connection, table: Destination) -> dict[str, int]:
    query = sql.SQL("SELECT vector_name, count(*) FROM {} GROUP BY 1 ORDER BY 1").format(table.identifier)
    return dict(connection.execute(query).fetchall())


def _blocks(connection: psycopg.Connection, table: Destination, name: str) -> Iterator[tuple[NDArray, NDArray]]:
    """Blocks of text ids (b,) int64 and vectors (b, dimension), float16 or float32 as they are stored."""
    query = sql.SQL("SELECT text_id, embedding FROM {} WHERE vector_name = {}").format(
        table.identifier, sql.Literal(name)
    )
    columns = {"text_id": "bigint", "embedding": table.storage}
    for block in copy_blocks(connection, query, columns, dimension=table.dimension):  # type: ignore[arg-type]
        yield block["text_id"], block["embedding"]


def _write_vectors(
    connection: psycopg.Connection, table: Destination, name: str, rows: int, target: Path
) -> VectorFiles:
    ids = np.empty(rows, np.int64)
    vectors = np.empty((rows, table.dimension), np.float16 if table.storage == "halfvec" else np.float32)
    filled = 0
    for block_ids, block in _blocks(connection, table, name):
        ids[filled : filled + len(block_ids)] = block_ids
        vectors[filled : filled + len(block_ids)] = _unit(block)
        filled += len(block_ids)
    index, index_type, exact, recall = _index(vectors)
    files, size = {}, 0
    for file, write in (
        (f"{name}.faiss", functools.partial(_write_index, index)),
        (f"{name}.ids.npy", lambda to: np.save(to, ids)),
    ):
        with (target / file).open("xb") as opened:
            writer = _HashingWriter(opened)
            write(writer)
            opened.flush()
            os.fsync(opened.fileno())
        files[file] = writer.hash.hexdigest()
        size += writer.bytes
    return VectorFiles(rows, index_type, exact, recall, size, files)


def _unit(vectors: NDArray) -> NDArray:
    """The vectors (n, d) at length 1; those that are, but for their float16 rounding, bit for bit as they came."""
    wide = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    if not len(lengths) or np.abs(lengths - 1).max() <= TIE:
        return vectors
    return (wide / np.where(lengths > 0, lengths, 1)[:, None]).astype(vectors.dtype)


def _index(vectors: NDArray) -> tuple[Any, str, bool, float]:
    """(index, its type, whether it is exact, recall@10) over unit vectors (n, d), float16 or float32.

    float16 vectors are kept as they are, so that the scores are exact, in half the memory and, as memory is what a
    search waits for, several times faster than as float32.
    """
    import faiss

    rows, dimension = vectors.shape
    index: Any
    if rows < EXACT_BELOW and vectors.dtype == np.float32:
        index = faiss.IndexFlatIP(dimension)
        index.add(vectors)
        return index, "Flat", True, 1.0
    half = faiss.ScalarQuantizer.QT_fp16
    if rows < EXACT_BELOW:
        index = faiss.IndexScalarQuantizer(dimension, half, faiss.METRIC_INNER_PRODUCT)
        if rows:
            faiss.copy_array_to_vector(vectors.view(np.uint8).reshape(-1), index.codes)
        index.ntotal = rows
        return index, "SQfp16", True, 1.0

    random = np.random.default_rng(rows)
    lists = round(rows**0.5)
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dimension), dimension, lists, half, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.spherical, index.cp.niter, index.cp.seed = True, 8, 1
    index.train(vectors[np.sort(random.choice(rows, POINTS_PER_LIST * lists, replace=False))].astype(np.float32))
    for start in range(0, rows, ROWS_AT_A_TIME):
        index.add(vectors[start : start + ROWS_AT_A_TIME].astype(np.float32, copy=False))
    recall = _tune(index, vectors, np.sort(random.choice(rows, RECALL_SAMPLES, replace=False)))
    return index, f"IVF{lists},SQfp16,nprobe={index.nprobe}", bool(index.nprobe == lists), recall


def _tune(index: Any, vectors: NDArray, samples: NDArray) -> float:
    """Double the lists that a search visits until recall@10 is what is wanted; all of them are an exact search."""
    queries = vectors[samples].astype(np.float32)
    tenth = _exact_tenth(vectors, queries, samples)
    index.nprobe = 8
    while True:
        scores, labels = index.search(queries, RECALL_AT + 1)
        found = ((scores >= tenth[:, None] - SAME) & (labels != samples[:, None])).sum(axis=1)
        recall = float(np.minimum(found, RECALL_AT).mean() / RECALL_AT)
        if recall >= WANTED_RECALL or index.nprobe >= index.nlist:
            return round(recall, 4)
        index.nprobe = min(2 * index.nprobe, index.nlist)


def _exact_tenth(vectors: NDArray, queries: NDArray, own: NDArray) -> NDArray:
    """The tenth best score (q,) of each query against all vectors but its own, row `own`."""
    best = np.full((len(queries), RECALL_AT), -np.inf, np.float32)
    for start in range(0, len(vectors), ROWS_AT_A_TIME):
        scores = queries @ vectors[start : start + ROWS_AT_A_TIME].astype(np.float32, copy=False).T
        here = np.flatnonzero((own >= start) & (own < start + scores.shape[1]))
        scores[here, own[here] - start] = -np.inf
        best = np.partition(np.concatenate([best, scores], axis=1), -RECALL_AT, axis=1)[:, -RECALL_AT:]
    return best.min(axis=1)


class _HashingWriter:
    """A file that knows the SHA-256 of what was written."""

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


def _write_index(index: Any, writer: _HashingWriter) -> None:
    # FAISS's own file writer loses the error where the disk is full at the last, buffered, write.
    import faiss

    try:
        faiss.write_index(index, faiss.PyCallbackIOWriter(writer.write, 1 << 20))  # type: ignore[attr-defined]
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise


# ── Publishing ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _publishing(parent: Path) -> Iterator[None]:
    """Held for moments, by one process at a time; the kernel lets go of it when the process dies."""
    with (parent / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _build_folder(parent: Path) -> Iterator[Path]:
    """A folder to write a generation into, locked while this process lives; removed unless it was published."""
    _make_folder(parent)
    target = parent / f"{_BUILDING}{secrets.token_hex(4)}"
    with _publishing(parent):
        _sweep_builds(parent)
        target.mkdir()
        handle = os.open(target, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)
        os.close(handle)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _publish(database: Database, table: Destination, parent: Path, target: Path, manifest: Manifest) -> Manifest:
    with _publishing(parent):
        published = _current_or_none(parent)
        if published is not None:
            with _snapshot(database, table) as connection:
                now = _state(connection, manifest.collection)
            if (now.has(published), published.version) > (now.has(manifest), manifest.version):
                return published
        number = max((int(name[:6]) for name in _generations(parent)), default=0) + 1
        manifest = replace(manifest, generation=f"{number:06d}-{target.name.removeprefix(_BUILDING)}")
        manifest = replace(manifest, checksum=_checksum(asdict(manifest)))
        _write_durably(target / "manifest.json", json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2))
        _sync_folder(target)
        target.rename(parent / manifest.generation)
        _sync_folder(parent)
        pointer = parent / ".CURRENT.new"
        _write_durably(pointer, manifest.generation + "\n")
        pointer.replace(parent / "CURRENT")
        _sync_folder(parent)
        for older in _generations(parent)[:-KEPT_GENERATIONS]:
            shutil.rmtree(parent / older, ignore_errors=True)
    return manifest


def _generations(parent: Path) -> list[str]:
    """The generations that are there, oldest first."""
    return sorted(path.name for path in parent.iterdir() if re.fullmatch(r"\d{6}-[0-9a-f]{8}", path.name))


def _sweep_builds(parent: Path) -> None:
    """Remove what killed builds left: the folders that no living process has locked."""
    for leftover in parent.glob(f"{_BUILDING}*"):
        handle = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass  # being built at this moment
        finally:
            os.close(handle)


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


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key not in ("checksum", "format")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_manifest(folder: Path, collection: str) -> Manifest | None:
    """The current generation's manifest, or None where nothing was published yet. Does not import FAISS.

    Raises VectorIndexError where the manifest is missing or damaged.
    """
    parent = folder / collection
    before = None
    while True:
        generation = _read_current(parent)
        if generation is None:
            return None
        try:
            return _read_manifest(parent / generation)
        except VectorIndexError:
            if generation == before:  # else it was swept between the two reads
                raise
            before = generation


def is_current(manifest: Manifest | None, fingerprint: str | None, epoch: UUID | str, version: int) -> bool:
    """Whether the generation holds exactly what the collection's current model table holds."""
    return manifest is not None and (manifest.fingerprint, manifest.epoch, manifest.version) == (
        fingerprint,
        str(epoch),
        version,
    )


def open_index(folder: Path, collection: str) -> "OpenedIndex":
    """The current generation, its checksums verified: the first time in a process; later calls return the same one.

    Raises VectorIndexError, naming the file, where one is missing or damaged.
    """
    before = None
    while True:
        manifest = read_manifest(folder, collection)
        if manifest is None:
            raise VectorIndexError(f"collection {collection!r} has no FAISS index in {folder / collection}; {REMEDY}")
        try:
            return _open(folder / collection / manifest.generation, manifest.checksum)
        except VectorIndexError:
            if manifest.generation == before:
                raise
            before = manifest.generation


def _read_current(parent: Path) -> str | None:
    path = parent / "CURRENT"
    try:
        generation = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise VectorIndexError(f"{path} cannot be read: {error}; {REMEDY}") from error
    if not re.fullmatch(r"\d{6}-[0-9a-f]{8}", generation):
        raise VectorIndexError(f"{path} is damaged: it names no generation; {REMEDY}")
    return generation


def _read_manifest(generation: Path) -> Manifest:
    path = generation / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise VectorIndexError(f"{path} is of another version of embeddings-pipeline; {REMEDY}")
        if content["checksum"] != _checksum(content):
            raise VectorIndexError(f"{path} is damaged: its checksum differs; {REMEDY}")
        vectors = {name: VectorFiles(**each) for name, each in content.pop("vectors").items()}
        return Manifest(vectors=vectors, **content)
    except OSError as error:
        raise VectorIndexError(f"{path} cannot be read: {error.strerror}; {REMEDY}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VectorIndexError(f"{path} is damaged: it is no manifest; {REMEDY}") from error


def _current_or_none(parent: Path) -> Manifest | None:
    """The current manifest; None too where it is damaged, since anything is better."""
    try:
        generation = _read_current(parent)
        return _read_manifest(parent / generation) if generation else None
    except VectorIndexError:
        return None


class OpenedIndex:
    """A generation, read-only, its vectors mapped into memory; several threads may search it at once."""

    def __init__(self, manifest: Manifest, parts: dict[str, tuple[Any, NDArray[np.int64]]]) -> None:
        self.manifest = manifest
        self._parts = parts

    def search(self, vector_name: str, queries: NDArray, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` nearest texts of each query (n, dimension): cosines (n, k) float32, best first, and text ids (n, k).

        Where there are fewer than `k`, the rest has the id -1 and the score -inf. ValueError where the queries have
        another dimension.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dimension or k < 1:
            raise ValueError(
                f"queries {queries.shape} and k={k}: need (n, {self.manifest.dimension}) and k of at least 1"
            )
        found_scores = np.full((len(queries), k), -np.inf, np.float32)
        found_ids = np.full((len(queries), k), -1, np.int64)
        index, ids = self._parts.get(vector_name, (None, np.empty(0, np.int64)))
        if len(queries) and len(ids):
            scores, rows = index.search(_unit(queries), min(k, len(ids)))
            hit = rows >= 0
            found_scores[:, : rows.shape[1]][hit] = scores[hit]
            found_ids[:, : rows.shape[1]][hit] = ids[rows[hit]]
        return found_scores, found_ids

    def ids(self, vector_name: str) -> NDArray[np.int64]:
        """The text ids (n,) of a vector name, in no order; none where there is no such name."""
        return self._parts.get(vector_name, (None, np.empty(0, np.int64)))[1]


@functools.lru_cache(maxsize=8)
def _open(generation: Path, checksum: str) -> OpenedIndex:
    import faiss

    manifest = _read_manifest(generation)
    if manifest.checksum != checksum:
        raise VectorIndexError(f"{generation / 'manifest.json'} changed while it was read; {REMEDY}")
    parts: dict[str, tuple[Any, NDArray[np.int64]]] = {}
    for name, described in manifest.vectors.items():
        for file, expected in described.files.items():
            _verify(generation / file, expected)
        mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)  # vectors stay in the page cache, shared by all processes
        path = generation / f"{name}.faiss"
        try:
            index = faiss.read_index(str(path), mapped)
        except RuntimeError as error:
            raise VectorIndexError(f"{path} cannot be read by this FAISS ({faiss.__version__}); {REMEDY}") from error
        parts[name] = (index, np.load(generation / f"{name}.ids.npy", mmap_mode="r"))
    return OpenedIndex(manifest, parts)


def _verify(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VectorIndexError(f"{path} cannot be read: {error.strerror}; {REMEDY}") from error
    if actual != expected:
        raise VectorIndexError(f"{path} is damaged: its checksum differs from the manifest's; {REMEDY}")


# ── Comparing with the table ────────────────────────────────────────────────────────────────────────────────────────


def check_parity(database: Database, table: Destination, opened: OpenedIndex, samples: int = 50) -> Parity:
    """Compare the ids of index and table, and the results of `samples` searches a vector name with exact ones.

    Reads the whole table once, in one snapshot, whatever its size in constant memory (but for the ids). The searches
    are for vectors of the table itself.
    """
    manifest = opened.manifest
    with _snapshot(database, table) as connection:
        state = _state(connection, table.collection)
        ours = manifest.fingerprint == table.fingerprint
        if not ours or not is_current(manifest, state.fingerprint, state.epoch, state.version):
            return Parity(comparable=False)
        names = sorted({*_counts(connection, table), *manifest.vectors})
        return _sum([_compare(connection, table, opened, name, samples) for name in names])


def _compare(
    connection: psycopg.Connection, table: Destination, opened: OpenedIndex, name: str, samples: int
) -> Parity:
    indexed = np.asarray(opened.ids(name))
    chosen = np.random.default_rng().choice(indexed, min(samples, len(indexed)), replace=False)
    query = sql.SQL("SELECT embedding::real[] FROM {} WHERE text_id = ANY(%s)").format(table.identifier)
    drawn = [row[0] for row in connection.execute(query, [chosen.tolist()])]
    queries = _unit(np.array(drawn, np.float32).reshape(len(drawn), table.dimension))
    scores, ids = opened.search(name, queries, RECALL_AT)

    best = np.full((len(queries), RECALL_AT), -np.inf, np.float32)
    best_ids = np.full((len(queries), RECALL_AT), -1, np.int64)
    true_scores = np.full(ids.shape, np.nan, np.float32)  # of the ids that the index found
    table_ids = []
    for block_ids, block in _blocks(connection, table, name):
        table_ids.append(block_ids)
        block_scores = queries @ _unit(block.astype(np.float32)).T
        all_scores = np.concatenate([best, block_scores], axis=1)
        all_ids = np.concatenate([best_ids, np.broadcast_to(block_ids, block_scores.shape)], axis=1)
        order = np.argpartition(all_scores, -RECALL_AT, axis=1)[:, -RECALL_AT:]
        best, best_ids = np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_ids, order, 1)
        by_id = np.argsort(block_ids)
        place = np.searchsorted(block_ids, ids, sorter=by_id).clip(max=max(len(block_ids) - 1, 0))
        if len(block_ids):
            here = block_ids[by_id[place]] == ids
            query_of = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
            true_scores[here] = block_scores[query_of[here], by_id[place][here]]

    stored = np.concatenate(table_ids)
    tenth = best.min(axis=1, keepdims=True, initial=np.inf)
    real = best_ids >= 0
    clear = real & (best > tenth + TIE)
    missed = [set(want[sure]) - set(got) for want, sure, got in zip(best_ids, clear, ids, strict=True)]
    exact = name not in opened.manifest.vectors or opened.manifest.vectors[name].exact
    found = ((ids >= 0) & (true_scores >= tenth - (TIE if exact else SAME))).sum()
    errors = np.abs(scores - true_scores)[(ids >= 0) & ~np.isnan(true_scores)]
    return Parity(
        comparable=True,
        in_index=len(indexed),
        in_table=len(stored),
        missing_in_index=len(np.setdiff1d(stored, indexed)),
        not_in_table=len(np.setdiff1d(indexed, stored)),
        sampled=len(queries),
        differing=sum(map(bool, missed)),
        recall_at_10=float(found / real.sum()) if real.any() else 1.0,
        score_error=float(errors.max(initial=0)),
        exact=exact,
    )


def _sum(parts: Sequence[Parity]) -> Parity:
    sampled = sum(part.sampled for part in parts)
    return Parity(
        comparable=True,
        in_index=sum(part.in_index for part in parts),
        in_table=sum(part.in_table for part in parts),
        missing_in_index=sum(part.missing_in_index for part in parts),
        not_in_table=sum(part.not_in_table for part in parts),
        sampled=sampled,
        differing=sum(part.differing for part in parts),
        recall_at_10=min((part.recall_at_10 for part in parts), default=1.0),
        score_error=max((part.score_error for part in parts), default=0.0),
        exact=all(part.exact for part in parts),
    )
