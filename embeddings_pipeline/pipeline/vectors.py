"""Vectors that are there already for a batch's texts, and the table in which a run's vectors go to the lake."""

from collections.abc import Container, Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store import lake as files
from embeddings_pipeline.store.copy_binary import copy_out
from embeddings_pipeline.store.vector_range import why_not


def vectors_there(collection: Collection, batch: int, *, committed: bool = True) -> dict[bytes, NDArray]:
    """Content hash → vector: what a run of this batch encoded before it was killed, and (`committed`) what is
    committed.
    """
    by_hash: dict[bytes, NDArray] = {}
    # A vector is its model's and its text's, whatever database it was made for.
    newest = collection.lake.newest(collection.folder("embeddings"), batch, of_any_database=True)
    if (
        newest
        and newest[1].num_rows
        and newest[1]["embedding"].type.list_size == collection.model.destination.dimension
    ):
        vectors = files.vectors_from_arrow(newest[1]["embedding"])
        by_hash.update(zip(newest[1]["content_hash"].to_pylist(), vectors, strict=True))
    table = collection.model.destination
    if not committed:
        return _usable(by_hash, table.storage)
    query = table.statement("embed/vectors_of_batch", batch=sql.Literal(batch))
    with collection.database.connect(autocommit=True) as connection:
        if not table.is_made(connection):
            return by_hash
        stored = copy_out(
            connection, query, {"content_hash": "bytea16", "embedding": table.storage}, dimension=table.dimension
        )
    by_hash.update(zip((digest.tobytes() for digest in stored["content_hash"]), stored["embedding"], strict=True))
    return _usable(by_hash, table.storage)


def _usable(vectors: dict[bytes, NDArray], storage: Literal["halfvec", "vector"]) -> dict[bytes, NDArray]:
    """Without vectors that cannot be kept, such as an earlier version may have written."""
    digests = list(vectors)
    unusable = why_not(np.stack(list(vectors.values())), storage) if vectors else {}
    for row in unusable:
        del vectors[digests[row]]
    return vectors


def vectors_adopted(collection: Collection, texts: pa.Table) -> dict[bytes, NDArray]:
    """Content hash → vector: what the user's own column had before we came, of items that are never committed.

    Those are the declared profile's; nothing is taken if another is the current one.
    """
    table = collection.model.destination
    if not texts.num_rows or not collection.adopts:
        return {}
    keys, row_hashes = texts["item_key"].to_pylist(), texts["row_hash"].to_pylist()
    with collection.database.connect(autocommit=True) as connection:
        if not table.is_made(connection):
            return {}
        vectors = table.adopted_vectors(connection, keys, row_hashes)
    hashes = texts["content_hash"].to_pylist()
    return {hashes[place]: vector for place, vector in vectors.items()}


def embeddings_table(
    collection: Collection, texts: pa.Table, vectors: Mapping[bytes, NDArray], encoded: Container[bytes]
) -> pa.Table:
    """One row for each text that has a vector, as the lake keeps it. `encoded`: the hashes that this run encoded."""
    table = collection.model.destination
    schema = files.embeddings_schema(table.dimension, table.storage)
    hashes = texts["content_hash"].to_pylist()
    rows = [n for n, digest in enumerate(hashes) if digest in vectors]
    digests = [hashes[n] for n in rows]
    kept = texts.take(pa.array(rows, pa.int64()))
    matrix = np.stack([vectors[digest] for digest in digests]) if rows else np.zeros((0, table.dimension), np.float32)
    columns = [
        kept["item_key"],
        kept["vector_name"],
        kept["chunk"],
        kept["content_hash"],
        pa.array([table.fingerprint] * len(rows), pa.string()),
        pa.array([digest in encoded for digest in digests], pa.bool_()),
        files.vectors_to_arrow(matrix, schema),
    ]
    return pa.table(columns, schema=schema)
