"""The database beside the pipeline's in which Dagster keeps runs and events: what it is called and how large it is."""

from hashlib import blake2b

import psycopg

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.urls import url_of

NAME_BYTES = 63  # PostgreSQL cuts longer names off, without an error
SUFFIX = "_dagster"


def dagster_database_name(own: str, *, embedded: bool) -> str:
    """What it is called beside the database `own`: `dagster` on the embedded server, elsewhere `own` with `_dagster`.

    A name that would be too long is cut, and gets a hash of the whole: cut off by the server, it could be the name of
    the pipeline's own database.
    """
    if embedded:
        return "dagster"
    if len(f"{own}{SUFFIX}".encode()) <= NAME_BYTES:
        return f"{own}{SUFFIX}"
    end = f"_{blake2b(own.encode(), digest_size=4).hexdigest()}{SUFFIX}"
    return own.encode()[: NAME_BYTES - len(end)].decode(errors="ignore") + end


def connect_to_dagsters(database: Database) -> psycopg.Connection:
    """A session in Dagster's database beside `database`. DatabaseError if it is not there."""
    with database.session() as connection:
        name = dagster_database_name(connection.info.dbname, embedded=database.embedded)
    return Database(url_of(database.parts | {"dbname": name}), database.server).connect(autocommit=True)


def dagster_bytes(connection: psycopg.Connection, database: Database) -> int | None:
    """What Dagster's database takes on the disk; None if it is not there, or the role may not know."""
    may_know = "CASE WHEN has_database_privilege(datname, 'CONNECT') THEN pg_database_size(datname) END"
    query = f"SELECT {may_know} FROM pg_database WHERE datname = %s"
    name = dagster_database_name(connection.info.dbname, embedded=database.embedded)
    row = connection.execute(query, [name]).fetchone()
    return row[0] if row else None
