"""A model table read in one snapshot: the version that it is of, how many vectors it has, and the vectors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.errors import DatabaseError, VectorIndexError
from embeddings_pipeline.store.copy_binary import copy_blocks
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.sql import load_sql

BUILD_AGAIN = "run `embeddings-pipeline sync` to build it again"


@dataclass(frozen=True)
class TableVersion:
    """Which content of a model table a snapshot has: vectors of this model, as they were after that many changes.

    The count comes again if the database goes back; the stamp, a random value, does not.
    """

    fingerprint: str | None
    database: str
    epoch: str
    version: int
    stamp: str


@contextmanager
def snapshot(database: Database, table: Destination) -> Iterator[psycopg.Connection]:
    """A connection whose statements all see the same moment. VectorIndexError if the table is gone."""
    try:
        with database.connect() as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            yield connection
    except psycopg.errors.UndefinedTable as error:
        raise VectorIndexError(
            f"FAISS index of {table.collection!r}: there is no table embeddings.{table.name}; {BUILD_AGAIN}"
        ) from error
    except psycopg.Error as error:
        raise DatabaseError(f"FAISS index of {table.collection!r}: {' '.join(str(error).split())}") from error


def table_version(connection: psycopg.Connection, collection: str) -> TableVersion:
    """The collection's current model and what names its content. VectorIndexError if there is no such collection."""
    try:
        row = connection.execute(load_sql("faiss/version"), {"collection": collection}, prepare=True).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise VectorIndexError(
            f"FAISS index of {collection!r}: the database is of an earlier embeddings-pipeline; {BUILD_AGAIN}"
        ) from error
    if row is None:
        raise VectorIndexError(f"FAISS index of {collection!r}: the database has no such collection; {BUILD_AGAIN}")
    return TableVersion(*row)


def current_version(connection: psycopg.Connection, table: Destination, what: str) -> TableVersion:
    """As `table_version`; VectorIndexError, which says of what, if the table's model is not the current one."""
    now = table_version(connection, table.collection)
    if now.fingerprint != table.fingerprint:
        raise VectorIndexError(
            f"{what} of {table.collection!r}: model {table.fingerprint} is not the current one, which is "
            f"{now.fingerprint}; {BUILD_AGAIN}"
        )
    return now


def vector_counts(connection: psycopg.Connection, table: Destination) -> dict[str, int]:
    """Vector name → how many vectors it has."""
    query = sql.SQL("SELECT vector_name, count(*) FROM {} GROUP BY 1 ORDER BY 1").format(table.identifier)
    return dict(connection.execute(query).fetchall())


def vector_blocks(connection: psycopg.Connection, table: Destination, name: str) -> Iterator[tuple[NDArray, NDArray]]:
    """Blocks of text ids (b,) int64 and vectors (b, dimension), float16 or float32 as they are stored."""
    query = sql.SQL("SELECT text_id, embedding FROM {} WHERE vector_name = {}").format(
        table.identifier, sql.Literal(name)
    )
    columns = {"text_id": "bigint", "embedding": table.storage}
    for block in copy_blocks(connection, query, columns, dimension=table.dimension):  # type: ignore[arg-type]
        yield block["text_id"], block["embedding"]
