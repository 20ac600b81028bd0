"""Roles that may do less than everything, and databases without what is needed: one line with the statement."""

import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from psycopg import sql

from embeddings_pipeline.store import schema
from embeddings_pipeline.store.database import Database, psql_command
from embeddings_pipeline.store.schema import ensure_schema
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.databases import refused
from embeddings_pipeline_tests.support.workbench import wait_until


@pytest.fixture
def plain_role(server: Database, embedded: None, database: Database) -> Iterator[str]:
    """The name of a role without any rights, whose password `s3cret` is asked for."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    rules = server.server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 's3cret'").format(sql.Identifier(role)))
        rules.write_text(f"local all {role} scram-sha-256\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    yield role
    rules.write_text(before)
    with database.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def as_role(database: Database, role: str, password: str = "s3cret") -> Database:
    return Database(database.url.replace("postgres@", f"{role}:{password}@", 1))


def test_wrong_password_is_said_without_any(database: Database, plain_role: str) -> None:
    wait_until(lambda: "password" in refused(as_role(database, plain_role, "wr0ng").connect))
    message = refused(as_role(database, plain_role, "wr0ng").connect)
    assert "check user and password in DATABASE_URL" in message
    assert "wr0ng" not in message


def test_missing_database_is_said(database: Database) -> None:
    missing = replace(database, url=database.url.replace(databases.name_of(database), "nowhere"), server=None)
    assert "create that database, or correct DATABASE_URL" in refused(missing.connect)


def test_role_that_may_not_create_a_database_gets_the_statement(database: Database, plain_role: str) -> None:
    message = refused(lambda: as_role(database, plain_role).ensure_sibling("new_dagster"))
    assert message.endswith(f'an administrator runs: CREATE DATABASE "new_dagster" OWNER "{plain_role}"')


@pytest.fixture
def empty(superuser: None, database: Database) -> Database:
    """The test's database as a newly created one is: without pgvector and schema."""
    with database.connect(autocommit=True) as connection:
        connection.execute("DROP SCHEMA embeddings CASCADE")
        connection.execute("DROP EXTENSION vector CASCADE")
    return database


def test_role_that_may_not_install_pgvector_gets_the_statement(empty: Database, plain_role: str) -> None:
    message = refused(lambda: ensure_schema(as_role(empty, plain_role)))
    assert message.endswith("an administrator runs there: CREATE EXTENSION vector")


def test_role_that_may_not_make_the_schema_gets_the_statement(empty: Database, plain_role: str) -> None:
    with empty.connect(autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    message = refused(lambda: ensure_schema(as_role(empty, plain_role)))
    assert message.endswith(
        f'an administrator runs: GRANT CREATE ON DATABASE "{databases.name_of(empty)}" TO "{plain_role}"'
    )


def test_role_with_create_on_the_database_can_do_it_all(empty: Database, plain_role: str) -> None:
    with empty.connect(autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")  # the wheel's is not marked as trusted
        names = (sql.Identifier(databases.name_of(empty)), sql.Identifier(plain_role))
        connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(*names))
    ensure_schema(as_role(empty, plain_role))


def test_server_without_pgvector_is_said(empty: Database) -> None:
    with empty.connect(autocommit=True) as connection:  # where the server looks for extensions: nowhere
        name = sql.Identifier(databases.name_of(empty))
        connection.execute(sql.SQL("ALTER DATABASE {} SET extension_control_path = '/nowhere'").format(name))
    assert "the server has no pgvector; install pgvector 0.7 or newer" in refused(lambda: ensure_schema(empty))


@pytest.mark.usefixtures("superuser")
def test_old_pgvector_is_said_with_the_statement_that_updates_it(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'")
        connection.execute("DELETE FROM embeddings.schema_migration")
    message = refused(lambda: ensure_schema(database))
    assert "pgvector is 0.6.2" in message
    assert message.endswith("ALTER EXTENSION vector UPDATE")


def test_schema_of_a_newer_package_is_left_alone(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("INSERT INTO embeddings.schema_migration (version) VALUES (999)")
    message = refused(lambda: ensure_schema(database))
    assert "its schema has version 999" in message
    assert "install a newer embeddings-pipeline" in message


def test_only_files_that_the_database_does_not_have_are_run(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = schema_versions()
    assert [version for version, _ in first] == list(range(1, len(first) + 1))
    later = (len(first) + 1, "ALTER TABLE embeddings.scan ADD COLUMN extra text")
    monkeypatch.setattr(schema, "schema_versions", lambda: [*first, later])
    schema.forget_schemas()
    ensure_schema(database)
    with database.connect() as connection:
        rows = connection.execute("SELECT version FROM embeddings.schema_migration ORDER BY version").fetchall()
        assert rows == [(version,) for version, _ in [*first, later]]
        connection.execute("SELECT extra FROM embeddings.scan")


def test_a_schema_of_before_the_numbered_files_is_refused_and_kept(empty: Database) -> None:
    with empty.connect() as connection:
        connection.execute("CREATE SCHEMA embeddings")
        connection.execute("CREATE TABLE embeddings.schema_version (version bigint); CREATE TABLE embeddings.item ()")
    message = refused(lambda: ensure_schema(empty))
    assert "made by a version before 0.1" in message and "start over" in message
    with empty.connect() as connection:
        assert connection.execute("SELECT to_regclass('embeddings.item') IS NOT NULL").fetchone() == (True,)
        assert connection.execute("SELECT to_regclass('embeddings.collection') IS NULL").fetchone() == (True,)


def test_psql_gets_the_password_where_nobody_sees_it(database: Database, plain_role: str) -> None:
    path, argv, environment = psql_command(as_role(database, plain_role), ["-Atc", "SELECT current_user"])
    assert "s3cret" not in " ".join(argv)
    done = subprocess.run([path, *argv[1:]], env=environment, check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{plain_role}\n", "")
