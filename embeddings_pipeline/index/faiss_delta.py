"""What came into a model table after a FAISS generation was built: a search takes it from the table.

A changed text gets a new id, which is higher than any before it, and a generation says up to which id it has every
text. So what it lacks is a range of ids, and those few older texts that had no vector when it was built.
"""

import psycopg
from psycopg import sql

from embeddings_pipeline.index.faiss_read import Manifest
from embeddings_pipeline.index.snapshot import table_version
from embeddings_pipeline.store.condition import Condition, parts_of
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.locks import batches_in_commit, lock_batch

GROWN_SHARE, GROWN_VECTORS = 0.1, 10_000  # of a generation's vectors; some tens of milliseconds for a search
GROWN_COMMITS = 5_000  # half of those after which nobody knows any more what the generation is of


def newest_text(database: Database, table: Destination) -> int:
    """An id of a text so that whoever looks from now on sees each text up to it that will ever be there.

    Commits take ids under their batches' locks: what is being committed now may have lower ones, and is waited for.
    """
    with database.connect(autocommit=True) as connection:
        statement = table.statement("faiss/newest_text")
        [(newest,)] = connection.execute(statement).fetchall()
        for batch in sorted(batches_in_commit(connection, table.collection)):
            with connection.transaction():
                lock_batch(connection, table.collection, batch)
    return int(newest)


def texts_lacking(connection: psycopg.Connection, table: Destination, newest: int) -> list[int]:
    """The texts up to that id that have no vector."""
    rows = connection.execute(table.statement("faiss/lacking"), {"newest": newest})
    return [row[0] for row in rows]


def has_grown(connection: psycopg.Connection, table: Destination, manifest: Manifest) -> bool:
    """Whether so much came after the generation that searches wait for it: then it is time for a new one."""
    if table_version(connection, table.collection).version - manifest.version > GROWN_COMMITS:
        return True
    most = min(GROWN_VECTORS, int(GROWN_SHARE * manifest.count))
    statement = table.statement("faiss/changed")
    row = connection.execute(statement, {**_since(manifest), "most": most + 1}).fetchone()
    return row is not None and row[0] > most


def nearest_changed(
    connection: psycopg.Connection,
    table: Destination,
    manifest: Manifest,
    vector_name: str,
    query: str,
    n: int,
    condition: Condition | None = None,
) -> list[int]:
    """Ids of the `n` texts nearest to a vector (as pgvector writes it) among what came after the generation; and of
    those that are exactly as near as the last. `condition`: of their items.
    """
    filtered, given = parts_of(condition, table.tables), condition.parameters if condition else {}
    statement = table.statement(
        "faiss/nearest_changed", type=table.type, vector_name=sql.Literal(vector_name), **filtered
    )
    rows = connection.execute(statement, {**_since(manifest), **given, "query": query, "n": n})
    return [row[0] for row in rows]


def _since(manifest: Manifest) -> dict[str, object]:
    return {"newest": manifest.newest_text, "lacking": manifest.lacking}
