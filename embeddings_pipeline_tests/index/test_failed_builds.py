"""A build of an ANN index that fails takes away what it left, whatever made it fail."""

import os
import signal
import subprocess
import threading
import time

import pytest
from psycopg import sql

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index import pgvector_build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.store.destination.indexes import index_name
from embeddings_pipeline_tests.index.test_pgvector import HNSW, hold_up, indexes, until
from embeddings_pipeline_tests.support.databases import name_of
from embeddings_pipeline_tests.support.model_tables import add_vectors, make_collection, unit_vectors


@pytest.fixture
def table(database):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(2000))
    return table


def begun(database, table, **deadline):
    """A build in a thread, and the VectorIndexError that it may end with."""
    failed: list[VectorIndexError] = []

    def build() -> None:
        try:
            ensure_index(database, table, HNSW, ["base"], **deadline)
        except VectorIndexError as error:
            failed.append(error)

    building = threading.Thread(target=build)
    building.start()
    return building, failed


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_build_that_the_server_ends_leaves_no_index(database, table, how):
    with database.connect() as older:
        hold_up(older, table)
        building, failed = begun(database, table)
        until(lambda: indexes(database, table))
        with database.connect(autocommit=True) as connection:
            connection.execute(f"SELECT {how}(pid) FROM pg_stat_progress_create_index")
            until(lambda: connection.execute("SELECT 1 FROM pg_stat_progress_create_index").fetchone() is None)
        older.rollback()
        building.join()
    assert len(failed) == 1 and "\n" not in str(failed[0])
    assert indexes(database, table) == []


def test_a_build_that_comes_to_its_deadline_leaves_no_index(database, table):
    with database.connect() as older:
        hold_up(older, table)
        building, failed = begun(database, table, deadline_seconds=1)
        until(lambda: indexes(database, table))
        time.sleep(2)  # it waits for the same transaction to remove it
        older.rollback()
        building.join()
    assert "not done within 1 s" in str(failed[0])
    assert indexes(database, table) == []


class Interrupted(BaseException):
    """As Dagster interrupts a run: no KeyboardInterrupt, for which psycopg itself cancels."""


def test_a_build_that_is_interrupted_leaves_no_index(database, table):
    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with database.connect() as older:
            hold_up(older, table)
            ending = threading.Timer(4, older.rollback)
            ending.start()
            signal.setitimer(signal.ITIMER_REAL, 2)
            with pytest.raises(Interrupted):
                ensure_index(database, table, HNSW, ["base"])
            ending.join()  # a session that is closed while another thread uses it takes the process along
    finally:
        signal.signal(signal.SIGALRM, before)
    assert indexes(database, table) == []


def test_what_cannot_be_removed_is_told_and_removed_by_the_next_build(database, table, monkeypatch, caplog):
    monkeypatch.setattr(pgvector_build, "REMOVE_SECONDS", 0.5)
    with database.connect() as older:
        hold_up(older, table)
        building, _ = begun(database, table, deadline_seconds=1)
        building.join()
    assert f"has left the index embeddings.{index_name(table, 'base')}" in caplog.text
    assert [index.valid for index in indexes(database, table)] == [False]
    ensure_index(database, table, HNSW, ["base"])
    assert [index.valid for index in indexes(database, table)] == [True]


@pytest.fixture
def small_disk(superuser, embedded, server, open_folder):
    """The name of a tablespace of 20 MB."""
    folder = open_folder / "small"
    folder.mkdir()
    owner = (server.server.folder / "data").stat()
    options = f"size=20m,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with server.connect(autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(folder))))
        yield "small"
        with server.connect(autocommit=True) as connection:
            connection.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_free_again_after_a_build(server, database, small_disk):
    name = sql.Identifier(name_of(database))
    database.close()
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET TABLESPACE small").format(name))
    try:
        table = make_collection(database, dimension=512)
        add_vectors(database, table, unit_vectors(6000, 512))
        before = size(database)
        with pytest.raises(VectorIndexError, match=r"No space left on device|could not extend"):
            ensure_index(database, table, HNSW, ["base"])
        assert indexes(database, table) == []
        assert size(database) < before + (1 << 20)
    finally:
        database.close()
        with server.connect(autocommit=True) as connection:
            connection.execute(sql.SQL("ALTER DATABASE {} SET TABLESPACE pg_default").format(name))


def size(database) -> int:
    with database.connect() as connection:
        return connection.execute("SELECT pg_database_size(current_database())").fetchone()[0]
