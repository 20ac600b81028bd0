"""Vectors by content hash, as columns: those that are there already for a batch's texts, and what goes to the lake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store import lake as files
from embeddings_pipeline.store.copy_binary import copy_out
from embeddings_pipeline.store.source_rows import HASH
from embeddings_pipeline.store.vector_range import why_not


@dataclass(frozen=True)
class Vectors:
    """Vectors of texts by content hash; of a hash that comes twice, the first counts."""

    hashes: pa.Array  # (n,) of 16 bytes
    matrix: NDArray  # (n, dimension)

    def __len__(self) -> int:
        return len(self.hashes)

    def places(self, hashes: pa.ChunkedArray) -> NDArray[np.int64]:
        """Where the vector of each of these content hashes is in `matrix`; -1 for those that have none."""
        places: NDArray[np.int64] = pc.index_in(hashes, value_set=self.hashes).fill_null(-1).to_numpy().astype(np.int64)
        return places

    def has(self, hashes: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which of these content hashes have a vector."""
        return self.places(hashes) >= 0

    def chosen(self, rows: NDArray) -> "Vectors":
        """Some of them, by a mask or by their places."""
        return Vectors(self.hashes.filter(rows) if rows.dtype == bool else self.hashes.take(rows), self.matrix[rows])


def no_vectors(dimension: int) -> Vectors:
    """None at all."""
    return Vectors(hash_array([]), np.zeros((0, dimension), np.float16))


def joined(parts: Sequence[Vectors], dimension: int) -> Vectors:
    """Those of several; the first part that has one counts."""
    filled = [part for part in parts if len(part)]
    if len(filled) < 2:
        return filled[0] if filled else no_vectors(dimension)
    return Vectors(pa.concat_arrays([part.hashes for part in filled]), np.concatenate([part.matrix for part in filled]))


def hash_array(digests: Sequence[bytes]) -> pa.Array:
    """Content hashes as a column."""
    return pa.array(digests, HASH)


def vectors_there(collection: Collection, batch: int, *, committed: bool = True) -> Vectors:
    """What is committed (`committed`), and what a run of this batch encoded before it was killed."""
    table = collection.model.destination
    parts = []
    if committed:
        query = table.statement("embed/vectors_of_batch", batch=sql.Literal(batch))
        with collection.database.session() as connection:
            if table.is_made(connection):
                kinds = {"content_hash": "bytea16", "embedding": table.storage}
                stored = copy_out(connection, query, kinds, dimension=table.dimension)  # type: ignore[arg-type]
                parts.append(Vectors(_hashes_of(stored["content_hash"]), stored["embedding"]))
    # A vector is its model's and its text's, whatever database it was made for.
    newest = collection.lake.newest(collection.folder("embeddings"), batch, of_any_database=True)
    if newest and newest[1].num_rows and newest[1]["embedding"].type.list_size == table.dimension:
        hashes = newest[1]["content_hash"].combine_chunks()
        parts.append(Vectors(hashes, files.vectors_from_arrow(newest[1]["embedding"])))
    return _usable(joined(parts, table.dimension), table.storage)


def _hashes_of(digests: NDArray) -> pa.Array:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(digests).view(np.uint8))]
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(digests), buffers)


def _usable(vectors: Vectors, storage: Literal["halfvec", "vector"]) -> Vectors:
    """Without vectors that cannot be kept, such as an earlier version may have written."""
    unusable = why_not(vectors.matrix, storage)
    if not unusable:
        return vectors
    usable = np.ones(len(vectors), bool)
    usable[list(unusable)] = False
    return vectors.chosen(usable)


def vectors_adopted(collection: Collection, texts: pa.Table) -> Vectors:
    """What the user's own column had before we came, of items that are never committed.

    Those are the declared profile's; nothing is taken if another is the current one.
    """
    table = collection.model.destination
    if texts.num_rows and collection.adopts:
        keys, row_hashes = texts["item_key"].to_pylist(), texts["row_hash"].to_pylist()
        with collection.database.session() as connection:
            if table.is_made(connection):
                places, matrix = table.adopted_vectors(connection, keys, row_hashes)
                return Vectors(texts["content_hash"].take(places).combine_chunks(), matrix)
    return no_vectors(table.dimension)


def embeddings_table(collection: Collection, texts: pa.Table, encoded: Vectors, have: Vectors) -> pa.Table:
    """One row for each text that has a vector, one that this run encoded or else one that was there, as the lake keeps
    it.
    """
    table = collection.model.destination
    schema = files.embeddings_schema(table.dimension, table.storage)
    vectors = joined([encoded, have], table.dimension)
    places = vectors.places(texts["content_hash"])
    kept = texts.filter(places >= 0)
    columns = [
        kept["item_key"],
        kept["vector_name"],
        kept["chunk"],
        kept["content_hash"],
        pa.repeat(table.fingerprint, kept.num_rows),
        pa.array(encoded.has(kept["content_hash"])),
        files.vectors_to_arrow(vectors.matrix[places[places >= 0]], schema),
    ]
    return pa.table(columns, schema=schema)
