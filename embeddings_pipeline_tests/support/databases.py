"""Databases for tests: copies of a template where the role may make databases, else one that is emptied each time."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.pipeline.canaries import forget_canaries
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.schema import ensure_schema, forget_schemas
from embeddings_pipeline.store.server.binaries import server_binaries
from embeddings_pipeline.store.urls import database_name

KEEPER = "tests: the database is in use"  # the session that keeps other test runs out of a database


@dataclass(frozen=True)
class Rights:
    """What the role of a server's URL may do."""

    superuser: bool
    create_databases: bool


def rights(server: Database) -> Rights:
    with server.connect() as connection:
        query = "SELECT rolsuper, rolsuper OR rolcreatedb FROM pg_roles WHERE rolname = current_user"
        [(superuser, create_databases)] = connection.execute(query).fetchall()
    return Rights(superuser, create_databases)


def name_of(database: Database) -> str:
    return database_name(database.parts)


def as_role(database: Database, role: str, password: str) -> Database:
    """The same database for another role."""
    parts = urlsplit(database.url)
    host = parts.netloc.rpartition("@")[2]
    return Database(urlunsplit(parts._replace(netloc=f"{role}:{quote(password, safe='')}@{host}")))


def copied(server: Database, name: str, template: str) -> Database:
    """The new database `name`, which is a copy of the database `template`."""
    with server.connect(autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    return replace(server, url=server.ensure_sibling(name))


def dropped(server: Database, name: str) -> None:
    """Drop the database `name` if it is there, whoever is still connected to it."""
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def forgotten(database: Database) -> None:
    """End the threads of this process that keep its sessions, however the database was opened."""
    for opened in (database, replace(database, server=None)):
        opened._close_pool()


def dumped(database: Database, file: Path) -> None:
    """Back the database up, as its administrator would."""
    subprocess.run([server_binaries() / "pg_dump", "-Fc", "-f", file, database.url], check=True)


def restored(server: Database, database: Database, file: Path) -> None:
    """The database goes back to what it was when it was backed up."""
    dropped(server, name_of(database))
    server.ensure_sibling(name_of(database))
    subprocess.run([server_binaries() / "pg_restore", "-d", database.url, file], check=True)


def kept(database: Database) -> psycopg.Connection:
    """A session that keeps other test runs out of the database. ValueError if one is there, or its name says no test.

    All that its owner has in it is dropped before each test: that must not happen to anybody's data.
    """
    if "test" not in name_of(database):
        raise ValueError(f"{database.name_and_host} is emptied before each test: its name must have `test` in it")
    keeper = database.connect(autocommit=True, application_name=KEEPER)
    if keeper.execute("SELECT pg_try_advisory_lock(hashtext('tests'))").fetchone() != (True,):
        keeper.close()
        raise ValueError(f"{database.name_and_host} is in use by another test process: give -n 0")
    return keeper


def emptied(database: Database) -> None:
    """Drop whatever the role owns in the database, whoever else is connected to it."""
    database.close()
    with database.connect(autocommit=True) as connection:
        connection.execute(
            """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()
               AND usename = current_user AND pid <> pg_backend_pid() AND application_name <> %s""",
            [KEEPER],
        )
        connection.execute("DROP OWNED BY CURRENT_USER CASCADE")
        connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(name_of(database))))


def with_schema(database: Database) -> Database:
    """The database, with the pipeline's schema, though this process may have made it there before."""
    forget_schemas()
    ensure_schema(database)
    forget_schemas()
    forget_canaries()
    return database


def refused(call: Callable[[], object]) -> str:
    """The message of the DatabaseError that the call raises: one line without the password `s3cret`."""
    with pytest.raises(DatabaseError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    return str(caught.value)
