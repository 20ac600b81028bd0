"""The server's log, where it may be followed, tells of deletes and of edits without `updated_at`."""

from collections.abc import Iterator
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.live.watch import UpdatedRows
from embeddings_pipeline.store.change_stream import Changes, NotFollowedError, follow_changes
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.schema import ensure_schema, forget_schemas
from embeddings_pipeline.store.source import Source
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.following import following
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
    sync_once,
    wait_until,
)

SLOTS = "SELECT count(*) FROM pg_replication_slots"


@pytest.fixture(scope="module")
def logical(open_folder: Path) -> Iterator[Database]:
    """A server of its own, with wal_level=logical."""
    settings = Settings(embeddings_state_dir=open_folder / "logical")
    database = open_database(settings)
    execute(database, "SELECT 1")
    with database.connect(autocommit=True) as connection:
        for change in ("wal_level = logical", "fsync = off", "max_replication_slots = 3"):
            connection.execute(f"ALTER SYSTEM SET {change}")  # type: ignore[arg-type]
    database.close()  # and is started again by the next session
    wait_until(lambda: execute(open_database(settings), "SHOW wal_level") == [("logical",)])
    yield open_database(settings)
    database.close()


@pytest.fixture
def films_there(logical: Database, tmp_path: Path) -> Iterator[tuple[Database, Settings]]:
    """A database on that server with 25 films, published."""
    DeterministicEncoder.reset()
    name = f"test_{tmp_path.name[-30:]}"
    url = logical.ensure_sibling(name)
    database = Database(url, logical.server)
    forget_schemas()
    ensure_schema(database)
    make_films(database, films(25))
    execute(database, "CREATE PUBLICATION films_changes FOR TABLE films")
    yield database, Settings(database_url=url, embeddings_state_dir=tmp_path / ".state")
    execute(database, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT temporary")
    wait_until(lambda: execute(database, SLOTS) == [(0,)])
    databases.dropped(logical, name)


def soon(holds: Any) -> None:
    wait_until(holds, 20)


def source_of(database: Database, one: CollectionDefinition | None = None) -> Source:
    return Source(one or definition(), database)


def test_inserts_edits_deletes_and_truncates_are_seen_without_updated_at(films_there: Any) -> None:
    database, settings = films_there
    sync_once(definition(), settings)
    with following(definition(), settings=settings, use_log=True) as heard:
        assert "log" in heard.watched["films"]
        execute(database, "INSERT INTO films VALUES (100, 'New', 'walruses', 1)")
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
        execute(database, "UPDATE films SET id = 200 WHERE id = 4")
        execute(database, "DELETE FROM films WHERE id = 7")
        expected = {str(n) for n in range(1, 26)} - {"4", "7"} | {"100", "200"}
        soon(lambda: set(committed(database)) == expected and committed(database)["3"][0] == "Film 3 | edited")
        execute(database, "TRUNCATE films")
        soon(lambda: heard.says("nothing was deleted"))
    soon(lambda: execute(database, SLOTS) == [(0,)])


def test_a_key_that_no_item_can_have_stops_no_other_row(films_there: Any) -> None:
    database, settings = films_there
    execute(database, "CREATE TABLE things (name text PRIMARY KEY, title text)")
    execute(database, "CREATE PUBLICATION things_changes FOR TABLE things")
    execute(database, "INSERT INTO things VALUES ('a', 'A')")
    one = definition("things", source={"table": "things", "key": ["name"]}, columns=[], vectors={"base": "{title}"})
    sync_once(one, settings)
    with following(one, settings=settings, use_log=True) as heard:
        execute(database, "INSERT INTO things VALUES (%s, 'long'), ('b', 'B')", ["x" * 2500])
        soon(lambda: set(committed(database, "things")) == {"a", "b"})
        execute(database, "DELETE FROM things WHERE name <> 'b' AND title <> 'A'")
        execute(database, "UPDATE things SET title = 'new' WHERE name = 'b'")
        soon(lambda: committed(database, "things")["b"][0] == "new")
    assert not heard.lines


def test_what_is_no_text_is_left_to_a_full_scan() -> None:
    changes = Changes(("name",), frozenset({1}))
    changes.message(b"R" + pack("!i", 1) + b"public\0things\0d" + pack("!h", 1) + b"\1name\0" + bytes(8))
    for written, taken in ((b"caf\xe9", (set(), True)), ("café".encode(), ({("café",)}, False))):
        changes.message(b"I" + pack("!i", 1) + b"N" + pack("!h", 1) + b"t" + pack("!i", len(written)) + written)
        assert changes.take() == taken


def test_what_changed_while_it_was_away_is_found_by_the_scan_at_its_start(films_there: Any) -> None:
    database, settings = films_there
    sync_once(definition(), settings)
    execute(database, "DELETE FROM films WHERE id = 7")
    with following(definition(), settings=settings, use_log=True):
        soon(lambda: "7" not in committed(database))


def test_a_session_that_is_ended_loses_its_slot_and_nothing_else(films_there: Any) -> None:
    database, settings = films_there
    sync_once(definition(), settings)
    with following(definition(), settings=settings, use_log=True) as heard:
        execute(database, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
        execute(database, "DELETE FROM films WHERE id = 7")
        soon(lambda: "7" not in committed(database) and heard.says("followed again"))
        assert execute(database, SLOTS) == [(1,)]


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("a text, b int", ('it\'s "odd" \\ ü\n\t', 7)),
        ("a char(6), b boolean", ("ab", True)),
        ("a inet, b cidr", ("10.0.0.1", "10.0.0.0/8")),
        ("a timestamptz, b numeric", ("2026-01-02 03:04:05.6+00", "1.50")),
        ("a uuid, b bytea", ("6f9619ff-8b86-d011-b42d-00cf4fc964ff", b"\x00\xff")),
    ],
)
@pytest.mark.parametrize("columns", ["a", "a, b"])
def test_keys_are_what_the_source_says_they_are(films_there: Any, key: str, row: Any, columns: str) -> None:
    database, _ = films_there
    execute(database, f"CREATE TABLE things ({key}, title text, PRIMARY KEY ({columns}))")
    execute(database, "CREATE PUBLICATION things_changes FOR TABLE things")
    source = {"table": "things", "key": columns.split(", ")}
    things = source_of(database, definition("things", source=source, columns=[], vectors={"base": "{title}"}))
    execute(database, "INSERT INTO things VALUES (%s, %s, 'before')", row)
    with things.connect() as connection:
        [known] = [key for rows in things.scan(connection) for key in rows.table["item_key"].to_pylist()]
    with follow_changes(things) as changes:
        for change in ("UPDATE things SET title = 'after'", "DELETE FROM things"):
            execute(database, change)
            soon(changes.woken.is_set)
            changes.woken.clear()
            keys, everything = changes.take()
            with things.connect() as connection:
                assert (things.item_keys(connection, list(keys)), everything) == ([known], False)


def test_partitions_and_rows_without_a_named_key_are_followed(films_there: Any) -> None:
    database, _ = films_there
    execute(database, "CREATE TABLE parts (id int, title text) PARTITION BY LIST (id)")
    execute(database, "CREATE TABLE part_1 PARTITION OF parts FOR VALUES IN (1)")
    execute(database, "ALTER TABLE part_1 REPLICA IDENTITY FULL")
    execute(database, "CREATE PUBLICATION parts_changes FOR TABLE parts")
    source = {"table": "parts", "key": ["id"]}
    parts = source_of(database, definition("parts", source=source, columns=[], vectors={"base": "{title}"}))
    with follow_changes(parts) as changes:
        execute(database, "INSERT INTO parts VALUES (1, 'one')")
        soon(changes.woken.is_set)
        assert changes.take() == ({("1",)}, False)


def test_what_it_takes_is_said_in_one_line(films_there: Any, database: Database) -> None:
    there, _ = films_there
    with (
        pytest.raises(NotFollowedError, match="is a query"),
        follow_changes(source_of(there, definition(source={"query": "SELECT * FROM films", "key": ["id"]}))),
    ):
        pass
    execute(there, "CREATE VIEW shown AS SELECT * FROM films")
    with (
        pytest.raises(NotFollowedError, match="is no table"),
        follow_changes(source_of(there, definition(source={"table": "shown", "key": ["id"]}))),
    ):
        pass
    execute(there, "ALTER PUBLICATION films_changes SET (publish = 'insert')")
    with (
        pytest.raises(NotFollowedError, match='CREATE PUBLICATION … FOR TABLE "films"'),
        follow_changes(source_of(there)),
    ):
        pass
    execute(there, "ALTER PUBLICATION films_changes SET (publish = 'insert, update, delete, truncate')")
    execute(there, "CREATE ROLE reads_only LOGIN PASSWORD 'reads_only'")
    execute(there, "GRANT SELECT ON films TO reads_only")
    try:
        with (
            pytest.raises(NotFollowedError, match="may not replicate"),
            follow_changes(source_of(databases.as_role(there, "reads_only", "reads_only"))),
        ):
            pass
    finally:
        execute(there, "DROP OWNED BY reads_only")
        execute(there, "DROP ROLE reads_only")
    make_films(database, films(1))
    with pytest.raises(NotFollowedError, match="wal_level=replica"), follow_changes(source_of(database)):
        pass


def test_without_a_free_slot_updated_at_is_looked_at(films_there: Any) -> None:
    database, settings = films_there
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    one = definition(source={"table": "films", "key": ["id"], "updated_at": "at"})
    sync_once(one, settings)
    with database.connect(autocommit=True) as connection:
        soon(lambda: execute(database, SLOTS) == [(0,)])
        for n in range(3):
            connection.execute(f"SELECT pg_create_physical_replication_slot('taken_{n}', false, true)")  # type: ignore[arg-type]
        with following(one, settings=settings, use_log=True) as heard:
            assert heard.watched == {"films": UpdatedRows.words}
            execute(database, "INSERT INTO films VALUES (100, 'New', 'walruses', 1)")
            soon(lambda: "100" in committed(database))
        with following(definition(), settings=settings, use_log=True) as heard:
            pass
        assert isinstance(heard.error, ConfigurationError) and "replication slots are in use" in str(heard.error)
