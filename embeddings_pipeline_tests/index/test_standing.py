"""Which database, and which of its states, a FAISS generation is of."""

from dataclasses import replace

import pytest

from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import Manifest, open_index, read_manifest
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.index.standing import Standing, standing, why_foreign
from embeddings_pipeline.store.schema import ensure_schema, forget_schemas
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.model_tables import (
    FINGERPRINT,
    add_vectors,
    make_collection,
    raise_version,
    remove_vectors,
    unit_vectors,
)
from embeddings_pipeline_tests.support.workbench import execute


@pytest.fixture
def table(database):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(50))
    return table


def stands(database, folder, name="things"):
    with database.connect() as connection:
        return standing(connection, name, read_manifest(folder, "things"))


def why(database, folder):
    with database.connect() as connection:
        return why_foreign(connection, open_index(folder, "things").manifest)


def test_a_generation_is_current_until_a_vector_changes_and_then_behind(database, folder, table):
    assert stands(database, folder) is Standing.MISSING
    build(database, table, folder)
    assert stands(database, folder) is Standing.CURRENT
    remove_vectors(database, table, [3])
    remove_vectors(database, table, [4])
    assert stands(database, folder) is Standing.BEHIND
    execute(database, "UPDATE embeddings.collection SET version = version + 1, fingerprint = 'another'")
    assert stands(database, folder) is Standing.OTHER_MODEL
    execute(database, "UPDATE embeddings.collection SET version = version + 1, epoch = gen_random_uuid()")
    assert stands(database, folder) is Standing.FOREIGN and "made anew" in why(database, folder)


@pytest.mark.usefixtures("superuser", "new_databases")
class TestRestored:
    """The database goes back, by pg_dump and pg_restore, and its files do not."""

    def test_an_index_of_the_lost_future_is_foreign_even_at_the_same_count(
        self, server, database, folder, table, tmp_path
    ):
        databases.dumped(database, tmp_path / "backup")
        add_vectors(database, table, unit_vectors(5, seed=1), first_id=100)
        lost = build(database, table, folder)
        databases.restored(server, database, tmp_path / "backup")
        assert stands(database, folder) is Standing.FOREIGN and "restored from a backup" in why(database, folder)
        add_vectors(database, table, unit_vectors(5, seed=2), first_id=100)  # other texts, and the same ids
        assert execute(database, "SELECT version FROM embeddings.collection") == [(lost.version,)]
        assert stands(database, folder) is Standing.FOREIGN
        assert not check_parity(database, table, open_index(folder, "things")).comparable

    @pytest.mark.parametrize("versions", [0, 1, 5])
    def test_the_next_build_replaces_it_though_its_version_is_lower(
        self, server, database, folder, table, tmp_path, versions
    ):
        databases.dumped(database, tmp_path / "backup")
        for n in range(3):
            add_vectors(database, table, unit_vectors(1, seed=1), first_id=100 + n)
        build(database, table, folder)
        databases.restored(server, database, tmp_path / "backup")
        for n in range(versions):
            add_vectors(database, table, unit_vectors(1, seed=2), first_id=100 + n)
        built = build(database, table, folder)
        assert read_manifest(folder, "things") == built and stands(database, folder) is Standing.CURRENT
        assert check_parity(database, table, open_index(folder, "things")).ok

    def test_an_index_that_is_older_than_the_backup_is_behind_and_serves(
        self, server, database, folder, table, tmp_path
    ):
        build(database, table, folder)
        add_vectors(database, table, unit_vectors(1, seed=1), first_id=100)
        databases.dumped(database, tmp_path / "backup")
        add_vectors(database, table, unit_vectors(1, seed=2), first_id=101)
        databases.restored(server, database, tmp_path / "backup")
        assert stands(database, folder) is Standing.BEHIND

    def test_a_build_that_began_before_does_not_replace_what_is_of_the_database(
        self, server, database, folder, table, tmp_path
    ):
        databases.dumped(database, tmp_path / "backup")
        add_vectors(database, table, unit_vectors(1, seed=1), first_id=100)
        ours: list[Manifest | None] = []

        def goes_back():
            if not ours:
                databases.restored(server, database, tmp_path / "backup")
                ours.append(None)  # it is being built
                ours.append(build(database, table, folder))

        with at_failpoint("faiss.publish", goes_back):
            built = build(database, table, folder)
        assert built == ours[-1] == read_manifest(folder, "things")
        assert stands(database, folder) is Standing.CURRENT


def test_another_database_never_takes_the_index_for_its_own(database, folder, table):
    build(database, table, folder)
    execute(database, "UPDATE embeddings.database_identity SET id = gen_random_uuid()")
    assert stands(database, folder) is Standing.FOREIGN and "another database" in why(database, folder)
    build(database, table, folder)
    assert stands(database, folder) is Standing.CURRENT


def test_a_renamed_collection_keeps_its_index(database, folder, table):
    build(database, table, folder)
    execute(database, "UPDATE embeddings.collection SET name = 'others'")
    assert stands(database, folder, "others") is Standing.CURRENT
    execute(database, "UPDATE embeddings.collection SET version = version + 1")
    assert stands(database, folder, "others") is Standing.BEHIND


def test_a_commit_that_changes_no_vector_leaves_the_stamp(database, table):
    stamp = execute(database, "SELECT stamp FROM embeddings.collection")
    execute(database, "UPDATE embeddings.collection SET version = version + 0, last_batch = 7")
    assert execute(database, "SELECT stamp FROM embeddings.collection") == stamp
    with database.connect() as connection:
        raise_version(connection)
    assert execute(database, "SELECT stamp FROM embeddings.collection") != stamp


def test_ten_thousand_former_stamps_stay(database, table):
    execute(database, "UPDATE embeddings.collection SET version = 10000")
    execute(database, "UPDATE embeddings.collection SET version = version + 1")
    execute(database, "UPDATE embeddings.collection SET version = version + 1")
    versions = "SELECT version FROM embeddings.collection_stamp ORDER BY version"
    assert execute(database, versions) == [(10000,), (10001,)]


@pytest.mark.usefixtures("superuser", "new_databases")
def test_a_database_of_before_the_stamps_gets_them_and_its_readers_may_read_them(server, database):
    name = f"{databases.name_of(database)}_old"
    old = replace(server, url=server.ensure_sibling(name))
    try:
        execute(
            old,
            "CREATE EXTENSION vector; CREATE SCHEMA embeddings; CREATE TABLE embeddings.schema_migration "
            "(version bigint PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now());",
        )
        execute(old, schema_versions()[0][1])
        execute(old, "INSERT INTO embeddings.schema_migration VALUES (1)")
        for collection in ("films", "books"):
            execute(
                old,
                "INSERT INTO embeddings.collection (name, fingerprint, definition_hash, version) "
                "VALUES (%s, %s, '', 5)",
                [collection, FINGERPRINT],
            )
        execute(old, "GRANT SELECT ON embeddings.collection TO PUBLIC")
        forget_schemas()
        ensure_schema(old)
        assert execute(old, "SELECT count(DISTINCT stamp) FROM embeddings.collection") == [(2,)]
        may = "SELECT has_table_privilege('public', 'embeddings.' || name, 'SELECT') FROM unnest(%s::text[]) AS name"
        assert execute(old, may, [["collection_stamp", "database_identity"]]) == [(True,), (True,)]
        execute(old, "UPDATE embeddings.collection SET version = 6 WHERE name = 'films'")
        assert execute(old, "SELECT collection, version FROM embeddings.collection_stamp") == [("films", 5)]
    finally:
        databases.dropped(server, name)
