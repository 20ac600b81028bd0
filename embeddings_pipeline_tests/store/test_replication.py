"""A publication FOR ALL TABLES is in the way of nothing: each of our tables has a primary key."""

import pytest
from psycopg import errors

from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.model_change.phases import contract, roll_back, swap
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.inventory import take_inventory
from embeddings_pipeline.pipeline.renaming import end_renaming, rename_in_database
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support.model_change import WIDE, again, backfill_all, begin, commit_all
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    committed,
    definition,
    edit,
    execute,
    films,
    make_films,
    sync_once,
)

WITHOUT_KEY = """SELECT relname FROM pg_class
                 WHERE relnamespace = 'embeddings'::regnamespace AND relkind = 'r'
                   AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary)"""


@pytest.fixture
def published(superuser: None, database: Database) -> Database:
    """A database whose tables are all published, those to come as well, and 25 films in it."""
    execute(database, "CREATE PUBLICATION everything FOR ALL TABLES")
    make_films(database, films(25))
    return database


def in_tables(settings: Settings) -> Collection:
    return sync_once(definition(profiles=by_name(WIDE)), settings)[0]


def in_a_column(settings: Settings) -> Collection:
    """The films' vectors in a column of their own table."""
    database = revealed(settings.database_url)
    assert database
    execute(Database(database), "ALTER TABLE films ADD COLUMN embedding halfvec(32)")
    destination = {"table": "films", "profile": "test"}
    one = definition(profile=None, profiles=by_name(PROFILE, WIDE), destination=destination)
    return sync_once(one, settings)[0]


@pytest.mark.parametrize("made", [in_tables, in_a_column])
def test_a_collection_is_kept_and_its_model_changed_and_undone(published, settings, made) -> None:
    collection = made(settings)
    edit(published, 3, "another story")
    edit(published, 4, None)
    commit_all(collection)
    assert len(committed(published)) == 24
    begin(collection, "wide")
    backfill_all(collection)
    swap(collection, "swap")
    assert execute(published, WITHOUT_KEY) == []
    edit(published, 5, None)
    edit(published, 6, "another story, too")
    commit_all(again(collection))
    roll_back(again(collection), "back")
    swap(again(collection), "swap")
    contract(again(collection), now=True)
    assert len(committed(published)) == 23
    assert execute(published, WITHOUT_KEY) == []


def test_a_collection_is_renamed_with_its_primary_keys(published, settings) -> None:
    collection = in_tables(settings)
    kept = take_inventory(published, settings, "films")
    rename_in_database(published, kept, "movies")
    end_renaming(published, "movies")
    keys = "SELECT conname FROM pg_constraint WHERE connamespace = 'embeddings'::regnamespace AND contype = 'p'"
    assert [name for (name,) in execute(published, keys) if name.startswith("films")] == []
    assert collection.fingerprint in str(execute(published, "SELECT relname FROM pg_class WHERE relname ~ '^movies'"))


def without_keys(database: Database) -> None:
    """The tables as they were before each had a primary key."""
    ours = "SELECT relname FROM pg_class WHERE relname ~ '_(current|hash)_' AND relkind = 'r'"
    for (name,) in execute(database, ours):
        if "_current_" in name:
            execute(database, f"ALTER TABLE embeddings.{name} DROP COLUMN fingerprint")
        else:
            execute(database, f"ALTER TABLE embeddings.{name} DROP CONSTRAINT {name}_text")
            execute(database, f"ALTER TABLE embeddings.{name} ALTER COLUMN text_id DROP NOT NULL")
            execute(database, f"CREATE UNIQUE INDEX {name}_text ON embeddings.{name} (text_id)")


@pytest.mark.parametrize("made", [in_tables, in_a_column])
def test_tables_of_before_get_theirs_by_the_upgrade(published, settings, made) -> None:
    collection = made(settings)
    without_keys(published)
    assert execute(published, WITHOUT_KEY) != []
    if made is in_a_column:
        edit(published, 4, None)
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            commit_all(collection)
    [upgrade] = [statements for _, statements in schema_versions() if "PRIMARY KEY USING INDEX" in statements]
    for _ in range(2):  # it does no harm to tables that have theirs
        execute(published, upgrade)
    assert execute(published, WITHOUT_KEY) == []
    edit(published, 4, None)
    commit_all(again(collection))
    assert len(committed(published)) == 24
