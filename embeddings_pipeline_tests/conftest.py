"""Fixtures for all tests: one embedded PostgreSQL a session, and a fresh database with the schema for each test."""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg import sql

from embeddings_pipeline.settings import Settings
from embeddings_pipeline.store.postgres import Database, ensure_schema, open_database

# What would lead a test to the developer's own database, model or account.
DEPLOYMENT = re.compile(r"DATABASE_URL|DAGSTER_HOME|OPENAI_.*|LAKE_URI|EMBEDDING_.*|EMBEDDINGS_.*|PG[A-Z]+")


@pytest.fixture(scope="session", autouse=True)
def _no_deployment() -> Iterator[None]:
    """Tests know nothing of the deployment that the shell is set up for, and ask nothing of the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if DEPLOYMENT.fullmatch(name):
                patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through: as root, PostgreSQL runs as another user."""
    folder = Path(tempfile.mkdtemp(prefix="embeddings-tests-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server(open_folder: Path) -> Iterator[Database]:
    """The session's embedded server (its database `embeddings`); tests take `database`."""
    database = open_database(Settings(embeddings_state_dir=open_folder))
    with database.connect(autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")  # these databases need not survive the machine
        connection.execute("SELECT pg_reload_conf()")
    yield database
    database.close()


@pytest.fixture(scope="session")
def template(server: Database) -> str:
    """The name of a database with the schema and nothing else, which each test's database is a copy of."""
    ensure_schema(replace(server, url=server.ensure_sibling("template")))
    return "template"


@pytest.fixture
def database(server: Database, template: str) -> Iterator[Database]:
    """A database of this test's own, with the schema. Dropped afterwards, whoever is still connected."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with server.connect(autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    yield replace(server, url=server.ensure_sibling(name))
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def settings(database: Database, tmp_path: Path) -> Settings:
    """Settings as they are when DATABASE_URL names this test's database; what is written goes below tmp_path."""
    return Settings(database_url=database.url, embeddings_state_dir=tmp_path / ".state")
