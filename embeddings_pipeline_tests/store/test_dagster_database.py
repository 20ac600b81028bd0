"""The name of Dagster's database, which must never be that of the pipeline's own."""

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.dagster_database import NAME_BYTES, dagster_bytes, dagster_database_name
from embeddings_pipeline.store.database import Database, open_database


def named(name: str) -> str:
    return dagster_database_name(name, embedded=False)


@pytest.mark.parametrize("length", [1, 54, 55, 56, 62, 63])
def test_a_name_fits_and_is_another_one(length: int) -> None:
    own = "d" * length
    name = named(own)
    assert name.endswith("_dagster") and len(name) <= NAME_BYTES and name != own
    assert (name == f"{own}_dagster") == (length <= 55)


def test_names_of_more_bytes_than_letters_fit_too() -> None:
    own = "é" * 31
    assert len(named(own).encode()) <= NAME_BYTES and named(own).endswith("_dagster")


def test_long_names_that_begin_alike_give_different_ones() -> None:
    assert named("d" * 62 + "a") != named("d" * 62 + "b")


def test_a_long_name_gives_two_databases(new_databases: None, server: Database) -> None:
    own = "tests_" + "d" * 57
    database = open_database(Settings(database_url=Database(server.ensure_sibling(own)).url))
    try:
        with database.connect(autocommit=True) as connection:
            assert dagster_bytes(connection, database) is None
            database.ensure_sibling(named(own))
            assert dagster_bytes(connection, database) > 1_000_000
            names = connection.execute("SELECT datname FROM pg_database WHERE starts_with(datname, 'tests_ddd')")
            assert len(names.fetchall()) == 2
    finally:
        with server.connect(autocommit=True) as connection:
            for name in (own, named(own)):
                connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')  # type: ignore[arg-type]
