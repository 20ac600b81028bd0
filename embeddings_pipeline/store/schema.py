"""The schema `embeddings` and pgvector: made if they are missing, brought up to date by numbered files."""

import re

import psycopg
from psycopg import errors

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.database import Database, one_line, quoted
from embeddings_pipeline.store.locks import lock_schema
from embeddings_pipeline.store.session import set_up
from embeddings_pipeline.store.sql import load_sql, schema_versions

OLDEST_PGVECTOR = (0, 7)  # the first with halfvec

_current_schemas: set[str] = set()
_mutex = ProcessLock()


def ensure_schema(database: Database) -> None:
    """Make or bring up to date the schema `embeddings`. It is looked at each time, by the process's pool: a database
    that was restored meanwhile may have an older one, or none.

    Writes: the extension `vector` if it is missing, and the files of sql/schema that the database does not have yet, in
    one transaction that several processes may race for. Raises DatabaseError if pgvector is older than 0.7, a right is
    missing, or the schema comes from a newer version of this package, or from one before 0.1.
    """
    with _mutex:
        if database.url in _current_schemas:
            with database.session() as connection:
                if is_current(connection):
                    return
        with database.connect() as connection:
            try:
                if _version(connection) != schema_versions()[-1][0]:
                    lock_schema(connection)
                    _upgrade(connection, database)
            except errors.InsufficientPrivilege as error:
                name, user = quoted(connection.info.dbname), quoted(connection.info.user)
                raise DatabaseError(
                    f"{database.name_and_host}: this user may not make the schema `embeddings` "
                    f"({one_line(error)}); an administrator runs: GRANT CREATE ON DATABASE {name} TO {user}"
                ) from error
            except (errors.DiskFull, errors.ReadOnlySqlTransaction, errors.OutOfMemory) as error:
                raise DatabaseError(f"{database.name_and_host} cannot be written: {one_line(error)}") from error
        _current_schemas.add(database.url)


def has_schema(database: Database) -> bool:
    """Whether the schema `embeddings` is there, and of this version. Writes nothing.

    Raises DatabaseError if it is of another version.
    """
    with _mutex:
        if database.url in _current_schemas:
            return True
        with database.connect(autocommit=True) as connection:
            current, newest = _version(connection), schema_versions()[-1][0]
            _check_known(connection, database, current, newest)
        if 0 < current < newest:
            raise DatabaseError(
                f"{database.name_and_host}: its schema has version {current} and this embeddings-pipeline has "
                f"{newest}: `embeddings-pipeline sync` brings it up to date"
            )
        if current:
            _current_schemas.add(database.url)
        return current > 0


def forget_schemas() -> None:
    """Let `ensure_schema` look at every database again, as a new process does."""
    _current_schemas.clear()


def is_current(connection: psycopg.Connection) -> bool:
    """Whether the schema is there, of this version."""
    return _version(connection) == schema_versions()[-1][0]


def _version(connection: psycopg.Connection) -> int:
    """The number of the last file of sql/schema that the database has; 0 without the schema."""
    try:
        with connection.transaction():
            row = connection.execute(load_sql("schema/version")).fetchone()
    except (errors.UndefinedTable, errors.InvalidSchemaName):
        return 0
    return row[0] if row else 0


def _upgrade(connection: psycopg.Connection, database: Database) -> None:
    current, files = _version(connection), schema_versions()
    _check_known(connection, database, current, files[-1][0])
    _ensure_pgvector(connection, database)
    connection.execute(load_sql("schema/create"))
    for version, statements in files:
        if version > current:
            connection.execute(statements)
            connection.execute(load_sql("schema/applied"), {"version": version})


def _check_known(connection: psycopg.Connection, database: Database, current: int, newest: int) -> None:
    """DatabaseError if the schema is newer than this package, or older than the numbered files."""
    if current > newest:
        raise DatabaseError(
            f"{database.name_and_host}: its schema has version {current} and this embeddings-pipeline knows {newest}: "
            "install a newer embeddings-pipeline, or name another database"
        )
    if connection.execute(load_sql("schema/older")).fetchone() == (True,):
        keep = "move the state folder away" if database.embedded else "ALTER SCHEMA embeddings RENAME TO embeddings_old"
        raise DatabaseError(
            f"{database.name_and_host}: its schema `embeddings` was made by a version before 0.1, which this one does "
            f"not read; nothing was changed. To start over and keep what is there: {keep}, then sync"
        )


def _ensure_pgvector(connection: psycopg.Connection, database: Database) -> None:
    name = database.name_and_host
    found = connection.execute(load_sql("schema/pgvector")).fetchall()
    [(installed, available, schema, may_use, current_schema)] = found
    if installed is None and available is None:
        raise DatabaseError(f"{name}: the server has no pgvector; install pgvector 0.7 or newer there")
    if _parsed(installed or available) < OLDEST_PGVECTOR:
        remedy = "install a newer one on the server"
        if installed and _parsed(available or "0") >= OLDEST_PGVECTOR:
            remedy = "an administrator runs there: ALTER EXTENSION vector UPDATE"
        raise DatabaseError(f"{name}: pgvector is {installed or available}, and 0.7 is needed (halfvec); {remedy}")
    if installed is None:
        try:
            place = "" if current_schema else " SCHEMA public"
            connection.execute(f"CREATE EXTENSION IF NOT EXISTS vector{place}")
        except errors.InsufficientPrivilege as error:
            raise DatabaseError(
                f"{name}: this user may not install pgvector; an administrator runs there: CREATE EXTENSION vector"
            ) from error
        set_up(connection)
    elif not may_use:
        raise DatabaseError(
            f"{name}: pgvector is in the schema {quoted(schema)}, which this user may not use; an administrator runs "
            f"there: GRANT USAGE ON SCHEMA {quoted(schema)} TO {quoted(connection.info.user)}"
        )


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
