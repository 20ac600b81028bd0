"""FAISS indexes of a collection, made from its model table and published as a generation.

manifest = build(database, table, state_dir / "faiss")
"""

import functools
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.forks import compute
from embeddings_pipeline.index.bm25_build import write_words
from embeddings_pipeline.index.exact import SAME, nearest, unit
from embeddings_pipeline.index.faiss_delta import newest_text, texts_lacking
from embeddings_pipeline.index.faiss_publish import HashingWriter, build_folder, publish, write_file
from embeddings_pipeline.index.faiss_read import Manifest, VectorFiles
from embeddings_pipeline.index.items_file import write_items
from embeddings_pipeline.index.snapshot import (
    current_version,
    snapshot,
    vector_blocks,
    vector_counts,
)
from embeddings_pipeline.index.standing import Standing, standing
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination

EXACT_BELOW = 200_000  # vectors of one name; from here on a search of all of them takes more than 10 ms
RECALL_AT = 10
LEAST_RECALL = 0.95
WANTED_RECALL = 0.98  # what a new index is tuned for: another sample may come out lower
RECALL_SAMPLES = 256
POINTS_PER_LIST = 64  # k-means needs 39 or more (faiss.ClusteringParameters.min_points_per_centroid)
ROWS_AT_A_TIME = 65_536


def build(database: Database, table: Destination, folder: Path, words: WordsDefinition | None = None) -> Manifest:
    """Index every vector of the current model table and publish it as a generation below `folder`; with `words`, the
    words of their texts as well.

    The vectors and the version are of one snapshot. Returns the generation that is current afterwards: the new one, or
    the one that another process published meanwhile from a newer version. Whatever fails, and wherever the process is
    killed, the generation before stays current.

    Raises VectorIndexError if the folder cannot be written, the disk is full or `table` is not the current model's.
    """
    parent = folder / table.collection
    try:
        with build_folder(parent) as building:
            manifest = _write_generation(database, table, building, newest_text(database, table), words)
            failpoint("faiss.publish")
            return publish(parent, building, manifest, functools.partial(_standing_now, database, table))
    except OSError as error:
        raise VectorIndexError(
            f"FAISS index of {table.collection!r} cannot be written to {parent}: {error.strerror or error}; the "
            "generation before stays current. Make room there or correct its rights, then run "
            "`embeddings-pipeline sync`"
        ) from error


def _write_generation(
    database: Database, table: Destination, folder: Path, newest: int, words: WordsDefinition | None
) -> Manifest:
    """The files of every vector name, in `folder`; their manifest, which has no number yet. newest: `newest_text`."""
    began = time.perf_counter()
    with snapshot(database, table) as connection:
        now = current_version(connection, table, "FAISS index")
        failpoint("faiss.snapshot")
        counts = vector_counts(connection, table)
        lacking = texts_lacking(connection, table, newest)
        vectors = {name: _write_vectors(connection, table, name, rows, folder) for name, rows in counts.items()}
        lexical = write_words(connection, table, list(counts), words, folder) if words else None
        items = write_items(connection, table, folder)
    return Manifest(
        collection=table.collection,
        generation="",
        fingerprint=table.fingerprint,
        database=now.database,
        epoch=now.epoch,
        version=now.version,
        stamp=now.stamp,
        dimension=table.dimension,
        storage=table.storage,
        vectors=vectors,
        newest_text=newest,
        lacking=lacking,
        built_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        seconds=round(time.perf_counter() - began, 3),
        words=lexical,
        items=items,
    )


def _standing_now(database: Database, table: Destination, manifest: Manifest) -> Standing:
    with snapshot(database, table) as connection:
        return standing(connection, table.collection, manifest)


def _write_vectors(
    connection: psycopg.Connection, table: Destination, name: str, rows: int, folder: Path
) -> VectorFiles:
    ids = np.empty(rows, np.int64)
    vectors = np.empty((rows, table.dimension), np.float16 if table.storage == "halfvec" else np.float32)
    filled = 0
    for block_ids, block in vector_blocks(connection, table, name):
        ids[filled : filled + len(block_ids)] = block_ids
        vectors[filled : filled + len(block_ids)] = unit(block)
        filled += len(block_ids)
    index, index_type, exact, recall = compute(_index, vectors)
    writers: dict[str, Callable[[HashingWriter], Any]] = {
        f"{name}.faiss": functools.partial(_write_index, index),
        f"{name}.ids.npy": lambda file: np.save(file, ids),
    }
    written = {file: write_file(folder / file, write) for file, write in writers.items()}
    digests = {file: digest for file, (digest, _) in written.items()}
    return VectorFiles(rows, index_type, exact, recall, sum(size for _, size in written.values()), digests)


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
    tenth = nearest(queries, _blocks_of(vectors), RECALL_AT, own=samples)[0][:, -1]
    index.nprobe = 8
    while True:
        scores, labels = index.search(queries, RECALL_AT + 1)
        found = ((scores >= tenth[:, None] - SAME) & (labels != samples[:, None])).sum(axis=1)
        recall = float(np.minimum(found, RECALL_AT).mean() / RECALL_AT)
        if recall >= WANTED_RECALL or index.nprobe >= index.nlist:
            return round(recall, 4)
        index.nprobe = min(2 * index.nprobe, index.nlist)


def _blocks_of(vectors: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    """Row numbers (b,) and rows (b, d)."""
    for start in range(0, len(vectors), ROWS_AT_A_TIME):
        block = vectors[start : start + ROWS_AT_A_TIME]
        yield np.arange(start, start + len(block)), block


def _write_index(index: Any, writer: HashingWriter) -> None:
    # FAISS's own file writer loses the error if the disk is full at the last, buffered, write.
    import faiss

    try:
        faiss.write_index(index, faiss.PyCallbackIOWriter(writer.write, 1 << 20))  # type: ignore[attr-defined]
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise
