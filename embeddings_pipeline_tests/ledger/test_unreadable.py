"""Rows that cannot be read are found by their keys, by full and incremental scans, and nothing is gone for that."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, run_batch, sync_once


def make(database: Database, rows: int) -> None:
    execute(
        database,
        """CREATE TABLE films (id bigint PRIMARY KEY, title text, divisor bigint NOT NULL DEFAULT 1, year text,
               updated_at timestamptz NOT NULL DEFAULT now())""",
    )
    execute(database, "CREATE VIEW readable AS SELECT *, 10 / divisor AS number FROM films")
    execute(
        database, f"INSERT INTO films (id, title, year) SELECT n, 'Film ' || n, n FROM generate_series(1, {rows}) n"
    )


def films(**source: Any) -> CollectionDefinition:
    source = {"table": "readable", "key": ["id"], **source}
    return definition(source=source, columns=["title"], vectors={"base": "{title} {number}"}, items_per_batch=100)


def quarantined(collection: Collection) -> list[str]:
    return sorted(entry.item_key or "" for entry in collection.ledger.quarantine_entries())


def test_a_scan_finds_the_rows_and_reads_them_apart_from_then_on(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(database, 50)
    execute(database, "UPDATE films SET divisor = 0 WHERE id IN (7, 30)")
    collection, _ = sync_once(films(), settings)
    assert quarantined(collection) == ["30", "7"] and len(committed(database)) == 48
    monkeypatch.setattr(type(collection.source), "scan_by_key", None)  # which costs more
    scan = collection.ledger.full_scan(collection.source)
    assert (scan.scanned, scan.unchanged, scan.gone, scan.changed) == (50, 50, 0, 0)
    execute(database, "UPDATE films SET divisor = 2 WHERE id = 7")
    collection, _ = sync_once(films(), settings, "mended")
    assert quarantined(collection) == ["30"] and committed(database)["7"][0] == "Film 7 5"


def test_a_where_that_fails_for_a_row_is_a_row_that_cannot_be_read(database: Database, settings: Settings) -> None:
    make(database, 20)
    execute(database, "UPDATE films SET year = 'n/a' WHERE id = 13")
    collection, _ = sync_once(films(where="year::int > 5"), settings)
    assert quarantined(collection) == ["13"]
    assert set(committed(database)) == {str(n) for n in range(6, 21) if n != 13}
    scan = collection.ledger.full_scan(collection.source)
    assert (scan.scanned, scan.unchanged) == (15, 15)
    execute(database, "UPDATE films SET year = 3 WHERE id = 13")
    collection, _ = sync_once(films(where="year::int > 5"), settings, "mended")
    assert quarantined(collection) == [] and len(committed(database)) == 14


def test_a_key_of_several_columns_and_a_query_without_an_index(database: Database, settings: Settings) -> None:
    make(database, 20)
    execute(database, "UPDATE films SET divisor = 0 WHERE id = 13")
    query = "SELECT id, title, 10 / divisor AS number, year FROM films"
    source = {"table": None, "query": query, "key": ["id", "year"]}
    collection, _ = sync_once(films(**source), settings)
    assert quarantined(collection) == ['["13", "13"]'] and len(committed(database)) == 19


def test_an_incremental_scan_finds_them_and_goes_on(database: Database, settings: Settings) -> None:
    make(database, 20)
    one = films(updated_at="updated_at", where="year::int > 0")
    collection, _ = sync_once(one, settings)
    collection.ledger.incremental_scan(collection.source)
    execute(database, "UPDATE films SET divisor = 0, updated_at = now() WHERE id = 13")
    execute(database, "UPDATE films SET year = 'n/a', updated_at = now() WHERE id = 14")
    execute(database, "UPDATE films SET title = 'New', updated_at = now() WHERE id = 15")
    execute(database, "UPDATE films SET year = -1, updated_at = now() WHERE id = 16")
    scan = collection.ledger.incremental_scan(collection.source)
    assert (scan.changed, scan.gone, scan.caught_up) == (3, 1, True)
    run_batch(collection, 0, "again")
    assert quarantined(collection) == ["13", "14"]
    assert set(committed(database)) == {str(n) for n in range(1, 21) if n not in (13, 14, 16)}
    assert committed(database)["15"][0] == "New 10"
    scan = collection.ledger.incremental_scan(collection.source)
    assert (scan.changed, scan.gone) == (0, 0)


def test_too_many_that_can_no_longer_be_read_are_refused(database: Database, settings: Settings) -> None:
    make(database, 50)
    sync_once(films(), settings)
    execute(database, "UPDATE films SET divisor = 0 WHERE id <= 11")
    collection = open_collection(films(), settings)
    with pytest.raises(RefusedError, match=r"11 of 50 items can no longer be read .* key \(\d+\): division by zero"):
        collection.ledger.full_scan(collection.source)
    assert collection.ledger.dirty_batches() == [] and len(committed(database)) == 50
    collection.ledger.full_scan(collection.source, allow_deletes=True)
    run_batch(collection, 0, "wanted")
    assert len(committed(database)) == 39 and len(quarantined(collection)) == 11


def test_a_source_of_which_no_row_can_be_read_is_at_fault_itself(database: Database, settings: Settings) -> None:
    make(database, 5)
    sync_once(films(), settings)
    execute(database, "UPDATE films SET divisor = 0")
    with pytest.raises(SourceError, match=r"5 rows of table 'readable' cannot be read, and 0 could; .*by zero"):
        sync_once(films(), settings, "broken")
    assert len(committed(database)) == 5


def test_a_statement_that_fails_without_any_row_blames_none(database: Database, settings: Settings) -> None:
    make(database, 1)
    with pytest.raises(SourceError, match="invalid input syntax for type bigint"):
        sync_once(films(where="id = 'x'"), settings)


@pytest.fixture
def legacy(server: Database, database: Database, superuser: None) -> Iterator[Database]:
    """A database that takes any bytes for text."""
    name = f"{databases.name_of(database)}_legacy"
    with server.connect(autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    yield replace(server, url=server.ensure_sibling(name))
    databases.dropped(server, name)


def test_bytes_that_are_no_text_are_one_row(database: Database, settings: Settings, legacy: Database) -> None:
    execute(legacy, "CREATE TABLE films (id bigint PRIMARY KEY, title text)")
    execute(legacy, r"INSERT INTO films VALUES (1, 'plain'), (77, E'caf\xe9'), (3, 'more')")
    one = definition(
        source={"table": "films", "key": ["id"], "url": legacy.url}, columns=["title"], vectors={"base": "{title}"}
    )
    collection, _ = sync_once(one, settings)
    assert set(committed(database)) == {"1", "3"}
    [entry] = collection.ledger.quarantine_entries()
    assert (entry.item_key, entry.step) == ("77", "read") and "invalid byte sequence" in entry.reason
    execute(legacy, r"UPDATE films SET title = 'caf' WHERE id = 77")
    collection, _ = sync_once(one, settings, "mended")
    assert set(committed(database)) == {"1", "3", "77"} and quarantined(collection) == []


def made_to_hide(database: Database) -> CollectionDefinition:
    """A collection over a view with a function that raises for a film with the title `bad`."""
    make(database, 300)
    execute(
        database,
        """CREATE FUNCTION shouted(title text) RETURNS text LANGUAGE plpgsql AS
            $$ BEGIN IF title = 'bad' THEN RAISE 'no such title'; END IF; RETURN upper(title); END $$""",
    )
    execute(database, "CREATE VIEW shouting AS SELECT id, updated_at, shouted(title) AS title FROM films")
    source = {"table": "shouting", "key": ["id"], "updated_at": "updated_at"}
    return definition(source=source, columns=["title"], vectors={"base": "{title}"}, items_per_batch=100)


def test_a_damaged_row_is_one_row(database: Database, settings: Settings) -> None:
    """What PostgreSQL raises for a lost piece of a long text, and for a length that cannot be."""
    make(database, 30)
    execute(
        database,
        """CREATE FUNCTION sized(id bigint) RETURNS bigint LANGUAGE plpgsql STABLE AS $$ BEGIN
               IF id = 7 THEN RAISE 'missing chunk number 0 for toast value 1' USING ERRCODE = 'XX001'; END IF;
               IF id = 9 THEN RAISE 'invalid memory alloc request size 1' USING ERRCODE = 'XX000'; END IF;
               RETURN id; END $$""",
    )
    execute(database, "DROP VIEW readable")
    execute(database, "CREATE VIEW readable AS SELECT *, sized(id) AS number FROM films")
    collection, _ = sync_once(films(), settings)
    assert quarantined(collection) == ["7", "9"] and len(committed(database)) == 28
    reasons = {entry.item_key: entry.reason for entry in collection.ledger.quarantine_entries()}
    assert "missing chunk" in reasons["7"] and "invalid memory alloc" in reasons["9"]


def test_a_row_that_hides_its_key_behind_a_volatile_function_is_found(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made_to_hide(database)
    execute(database, "UPDATE films SET title = 'bad' WHERE id IN (77, 200)")
    collection, _ = sync_once(one, settings)
    assert quarantined(collection) == ["200", "77"] and len(committed(database)) == 298
    monkeypatch.setattr(type(collection.source), "scan_by_key", None)  # which costs more
    scan = collection.ledger.full_scan(collection.source)
    assert (scan.scanned, scan.unchanged, scan.gone) == (300, 300, 0)
    execute(database, "UPDATE films SET title = 'New', updated_at = now() + interval '1 s' WHERE id = 5")
    execute(database, "UPDATE films SET updated_at = now() WHERE id = 77")
    assert collection.ledger.incremental_scan(collection.source).changed == 1
    execute(database, "UPDATE films SET title = 'good' WHERE id = 77")
    collection, _ = sync_once(one, settings, "mended")
    assert quarantined(collection) == ["200"] and committed(database)["77"][0] == "GOOD"


def test_a_view_that_keeps_keys_back_is_told_where_the_row_stands(database: Database, settings: Settings) -> None:
    one = made_to_hide(database)
    execute(database, "UPDATE films SET title = 'bad' WHERE id = 77")
    execute(database, "DROP VIEW shouting")
    execute(
        database,
        "CREATE VIEW shouting AS SELECT id, updated_at, shouted(title) AS title FROM films ORDER BY id LIMIT 999",
    )
    with pytest.raises(
        SourceError, match=r"no such title.* read after 76 others, the last .* key \(76\), .* in the view"
    ):
        sync_once(one, settings)


def test_too_many_rows_that_hide_their_keys_are_the_views_fault(database: Database, settings: Settings) -> None:
    one = made_to_hide(database)
    execute(database, "UPDATE films SET title = 'bad' WHERE id > 200")
    with pytest.raises(SourceError, match=r"no such title.* read after [0-9]+ others.* so do more than 20 rows"):
        sync_once(one, settings)


LONG = "x" * 2500


def test_keys_that_no_item_can_have_are_left_out_and_told(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    execute(database, "CREATE TABLE films (name text, title text, updated_at timestamptz DEFAULT now())")
    execute(database, "INSERT INTO films VALUES ('a', 'A'), ('b', 'B'), (%s, 'C')", [LONG])
    one = definition(
        source={"table": "films", "key": ["name"], "updated_at": "updated_at"}, columns=[], vectors={"base": "{title}"}
    )
    collection, _ = sync_once(one, settings)
    assert set(committed(database)) == {"a", "b"}
    [entry] = collection.ledger.quarantine_entries()
    assert (entry.step, entry.next_try) == ("key", None) and (entry.item_key or "").startswith("xxxxxxxxxx")
    assert "2,500 bytes" in entry.reason and "is left out: its key has 2,500 bytes" in caplog.text
    covered = coverage(collection.database, collection.model)
    assert (covered.items, covered.missing, covered.quarantined_items, covered.complete) == (2, 0, 1, True)
    execute(database, "UPDATE films SET title = title || '!', updated_at = now() + interval '1 s'")
    assert collection.ledger.incremental_scan(collection.source).changed == 2
    collection, _ = sync_once(one, settings, "again")
    assert len(quarantined(collection)) == 1 and collection.ledger.work() == {}
    execute(database, "UPDATE films SET name = 'c' WHERE title = 'C!'")
    collection, _ = sync_once(one, settings, "mended")
    assert set(committed(database)) == {"a", "b", "c"} and quarantined(collection) == []


def test_if_no_row_has_a_key_that_an_item_can_have_the_declared_key_is_at_fault(
    database: Database, settings: Settings
) -> None:
    execute(database, "CREATE TABLE films (name text, title text)")
    execute(database, "INSERT INTO films VALUES (%s, 'C'), (%s, 'D')", [LONG, LONG + "y"])
    one = definition(source={"table": "films", "key": ["name"]}, columns=[], vectors={"base": "{title}"})
    with pytest.raises(SourceError, match=r"2 rows have keys that no item can have.* choose another `source.key:`"):
        sync_once(one, settings)


@pytest.mark.parametrize("key", [["name"], ["name", "id"]])
def test_a_key_whose_bytes_are_no_text_is_one_row(
    database: Database, settings: Settings, legacy: Database, key: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(legacy, "CREATE TABLE films (id bigint, name text, title text, updated_at timestamptz DEFAULT now())")
    execute(legacy, r"INSERT INTO films VALUES (1, 'a', 'A'), (2, E'caf\xe9', 'B'), (3, 'c', 'C'), (4, E'\xe9', 'no')")
    source = {"table": "films", "key": key, "url": legacy.url, "updated_at": "updated_at", "where": "title <> 'no'"}
    one = definition(source=source, columns=["title"], vectors={"base": "{title}"})
    collection, _ = sync_once(one, settings)
    assert sorted(text for text, *_ in committed(database).values()) == ["A", "C"]
    [entry] = collection.ledger.quarantine_entries()
    assert entry.step == "key" and r"caf\xe9" in (entry.item_key or "") and "invalid byte sequence" in entry.reason
    monkeypatch.setattr(type(collection.source), "scan_by_key", None)  # which costs more
    execute(legacy, "UPDATE films SET title = 'new', updated_at = now() + interval '1 s' WHERE title = 'A'")
    collection.ledger.incremental_scan(collection.source)
    collection, _ = sync_once(one, settings, "again")
    assert sorted(text for text, *_ in committed(database).values()) == ["C", "new"]
    assert len(quarantined(collection)) == 1
    execute(legacy, "UPDATE films SET name = 'cafe' WHERE id = 2")
    collection, _ = sync_once(one, settings, "mended")
    assert sorted(text for text, *_ in committed(database).values()) == ["B", "C", "new"]
    assert quarantined(collection) == []
