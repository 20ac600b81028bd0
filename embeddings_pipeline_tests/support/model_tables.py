"""A collection with a model table full of made-up vectors, without a source or an encoder."""

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.table import TableDestination

FINGERPRINT = "0123456789ab"


def make_collection(database: Database, *, dimension: int = 32, storage: str = "halfvec") -> TableDestination:
    """The collection `things`, current and empty."""
    table = TableDestination("things", FINGERPRINT, dimension, storage)  # type: ignore[arg-type]
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO embeddings.collection (name, fingerprint, definition_hash) VALUES ('things', %s, '')",
            [FINGERPRINT],
        )
        table.tables.create(connection)
        table.create(connection)
        table.show(connection)
    return table


def add_vectors(
    database: Database, table: TableDestination, vectors: NDArray, *, name: str = "base", first_id: int = 1
) -> None:
    """A commit: the vectors (n, dimension) get the text ids from `first_id` on, and the version is raised."""
    ids = np.arange(first_id, first_id + len(vectors))
    with database.connect() as connection:
        columns = {
            "text_id": ids,
            "vector_name": np.full(len(ids), name.encode()),
            "content_hash": np.zeros((len(ids), 16), np.uint8),
            "embedding": vectors,
        }
        copy_in(connection, table.identifier, columns, storage=table.storage)
        raise_version(connection)


def remove_vectors(database: Database, table: TableDestination, ids: list[int]) -> None:
    with database.connect() as connection:
        connection.execute(sql.SQL("DELETE FROM {} WHERE text_id = ANY(%s)").format(table.identifier), [ids])
        raise_version(connection)


def raise_version(connection) -> None:
    connection.execute("UPDATE embeddings.collection SET version = version + 1 WHERE name = 'things'")


def unit_vectors(n: int, dimension: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Random vectors (n, dimension) of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((n, dimension), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
