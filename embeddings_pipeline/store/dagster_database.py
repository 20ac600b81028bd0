"""The database beside the pipeline's in which Dagster keeps runs and events: what it is called and how large it is."""

from hashlib import blake2b

import psycopg
from psycopg.conninfo import conninfo_to_dict

from embeddings_pipeline.store.database import Database, database_name

NAME_BYTES = 63  # PostgreSQL cuts longer names off, without an error
SUFFIX = "_dagster"


def dagster_database_name(database: Database) -> str:
    """`dagster` on the embedded server; elsewhere the name of the pipeline's database with `_dagster` at its end.

    A name that would be too long is cut, and gets a hash of the whole: cut off by the server, it could be the name of
    the pipeline's own database.
    """
    if database.embedded:
        return "dagster"
    own = database_name(conninfo_to_dict(database.url))
    if len(f"{own}{SUFFIX}".encode()) <= NAME_BYTES:
        return f"{own}{SUFFIX}"
    end = f"_{blake2b(own.encode(), digest_size=4).hexdigest()}{SUFFIX}"
    return own.encode()[: NAME_BYTES - len(end)].decode(errors="ignore") + end


def dagster_bytes(connection: psycopg.Connection, database: Database) -> int | None:
    """What Dagster's database takes on the disk; None if it is not there, or the role may not know."""
    may_know = "CASE WHEN has_database_privilege(datname, 'CONNECT') THEN pg_database_size(datname) END"
    query = f"SELECT {may_know} FROM pg_database WHERE datname = %s"
    row = connection.execute(query, [dagster_database_name(database)]).fetchone()
    return row[0] if row else None
