"""Incremental scans: what was updated is found by its `updated_at`, in bounded steps, and nothing is passed over."""

import re
from datetime import timedelta

import pytest

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.ledger import incremental_scan
from embeddings_pipeline.ledger.incremental_scan import Watermark
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.source_sql import Position
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.incremental import (
    seen,
    settle,
    tick,
    timed,
)
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, run_batch


def test_new_and_changed_rows_are_found_and_an_unchanged_one_is_not(database, settings, films_of) -> None:
    films_of(25)
    collection = open_collection(timed(), settings)
    settle(collection)
    assert seen(tick(collection)) == (0, 0, 0)
    execute(database, "INSERT INTO films VALUES (99, 'New', 'row', 1, false, now())")
    execute(database, "UPDATE films SET overview = 'other', updated_at = now() WHERE id = 3")
    execute(database, "UPDATE films SET updated_at = now() WHERE id = 4")
    assert seen(tick(collection)) == (1, 1, 0)
    assert seen(tick(collection)) == (0, 0, 0)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, "again")
    assert committed(database)["99"][0] == "New | row"
    assert committed(database)["3"][0] == "Film 3 | other"


def test_the_pages_trigger_tells_of_edits_that_do_not_set_updated_at(database, settings, films_of) -> None:
    page = (PROJECT / "docs" / "how-to" / "keep-it-current.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    films_of(5, value="CASE n WHEN 5 THEN now() ELSE timestamptz '2020-01-01' END")
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'other' WHERE id = 3")
    assert seen(tick(collection)) == (0, 0, 0)
    execute(database, block.replace("products", "films"))
    execute(database, "UPDATE films SET overview = 'other' WHERE id = 4")
    execute(database, "INSERT INTO films VALUES (99, 'New', 'row', 1)")
    assert seen(tick(collection)) == (1, 1, 0)
    assert execute(database, "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%films%(updated_at)'") == [(1,)]


def test_what_has_settled_is_not_read_again(database, settings, films_of, monkeypatch) -> None:
    films_of(25)
    collection = open_collection(timed(), settings)
    settle(collection)
    monkeypatch.setattr(incremental_scan, "OVERLAP", timedelta(0))  # as if an overlap passed between any two ticks
    tick(collection)
    tick(collection)
    assert tick(collection).read == 0
    execute(database, "UPDATE films SET overview = 'other', updated_at = clock_timestamp() WHERE id = 3")
    found = tick(collection)
    assert (found.read, found.changed) == (1, 1)


def test_many_rows_of_one_time_pass_in_bounded_ticks(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(
        database, "INSERT INTO films SELECT n, 'T', 'o', 1, false, now() FROM generate_series(1001, 4000) n"
    )  # one statement, one time stamp
    found, ticks = 0, 0
    while True:
        result = collection.ledger.incremental_scan(collection.source, seconds=0, rows_at_once=700)
        assert result.read <= 700
        found, ticks = found + result.new, ticks + 1
        if result.caught_up:
            break
    assert (found, ticks) == (3000, 5)
    assert execute(database, "SELECT count(*) FROM embeddings.films_item") == [(3005,)]


def test_a_transaction_that_commits_late_is_seen(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    tick(collection)
    with database.connect() as late:
        late.execute("UPDATE films SET overview = 'late', updated_at = now() WHERE id = 2")
        execute(database, "UPDATE films SET overview = 'early', updated_at = clock_timestamp() WHERE id = 3")
        assert seen(tick(collection)) == (0, 1, 0)
    assert seen(tick(collection)) == (0, 1, 0)
    assert len(collection.ledger.dirty_batches()) == 1


def test_the_watermark_goes_back_to_where_it_stood_an_overlap_ago() -> None:
    first, second, third = (Position(f"2026-01-0{n}", "k") for n in (1, 2, 3))
    mark = Watermark("updated_at", third, first, second, noted_at=1000.0)
    soon = mark.caught_up(1300.0)
    assert (soon.cursor, soon.settled, soon.noted, soon.noted_at) == (first, first, second, 1000.0)
    later = mark.caught_up(1700.0)
    settled = Position(second.updated_at, None)  # after all rows of that time
    assert (later.cursor, later.settled, later.noted, later.noted_at) == (settled, settled, third, 1700.0)
    assert mark.caught_up(10.0).settled == settled  # this machine's clock was set back


@pytest.mark.parametrize("kind", ["timestamptz", "timestamp"])
def test_a_time_in_the_future_hides_no_other_row(database, settings, films_of, kind) -> None:
    films_of(5, kind)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'ahead', updated_at = now() + interval '3 days' WHERE id = 1")
    execute(database, "UPDATE films SET overview = 'never', updated_at = 'infinity' WHERE id = 2")
    assert seen(tick(collection)) == (0, 2, 0)
    execute(database, "UPDATE films SET overview = 'today', updated_at = now() WHERE id = 3")
    assert seen(tick(collection)) == (0, 1, 0)
    stored = execute(database, "SELECT watermark->'cursor'->>0 FROM embeddings.scan")[0][0]
    assert execute(database, f"SELECT '{stored}'::{kind} <= (now() + interval '14 hours')::{kind}") == [(True,)]


def test_a_page_full_of_future_rows_does_not_stop_the_ticks(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'ahead', updated_at = now() + interval '1 year'")
    assert collection.ledger.incremental_scan(collection.source, rows_at_once=2).caught_up
    execute(database, "UPDATE films SET overview = 'now', updated_at = now() WHERE id = 5")
    collection.ledger.incremental_scan(collection.source, rows_at_once=2)
    assert execute(
        database, "SELECT seen_hash IS DISTINCT FROM committed_hash FROM embeddings.films_item WHERE item_key = '5'"
    ) == [(True,)]


def test_local_time_stamps_of_any_zone_are_followed(database, settings, films_of) -> None:
    films_of(5, "timestamp", "now() AT TIME ZONE 'America/Los_Angeles'")
    collection = open_collection(timed(), settings)
    settle(collection)
    tick(collection)
    for zone in ("America/Los_Angeles", "Pacific/Auckland"):
        execute(
            database, f"UPDATE films SET overview = '{zone}', updated_at = now() AT TIME ZONE '{zone}' WHERE id = 2"
        )
        assert seen(tick(collection)) == (0, 1, 0)


def test_null_and_backward_times_are_left_to_the_full_scan(database, settings, films_of) -> None:
    films_of(10)
    collection = open_collection(timed(), settings)
    settle(collection)
    tick(collection)
    execute(database, "UPDATE films SET overview = 'null', updated_at = NULL WHERE id = 1")
    execute(database, "UPDATE films SET overview = 'back', updated_at = '1999-01-01' WHERE id = 2")
    assert seen(tick(collection)) == (0, 0, 0)
    assert collection.ledger.full_scan(collection.source).changed == 2


def test_rows_that_no_longer_meet_the_condition_are_gone(database, settings, films_of) -> None:
    films_of(20)
    collection = open_collection(timed(where="is_removed = false"), settings)
    settle(collection)
    execute(database, "UPDATE films SET is_removed = true, updated_at = now() WHERE id IN (3, 4)")
    assert seen(tick(collection)) == (0, 0, 2)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, "again")
    assert set(committed(database)) == {str(n) for n in range(1, 21) if n not in (3, 4)}
    execute(database, "UPDATE films SET is_removed = false, updated_at = now() WHERE id = 3")
    assert seen(tick(collection)) == (1, 0, 0)


def test_more_than_a_fifth_that_no_longer_meets_the_condition_is_left_to_a_full_scan(
    database, settings, films_of
) -> None:
    films_of(20)
    collection = open_collection(timed(where="is_removed = false"), settings)
    settle(collection)
    execute(database, "UPDATE films SET is_removed = true, updated_at = now() WHERE id <= 5")
    execute(database, "UPDATE films SET overview = 'other', updated_at = now() WHERE id = 6")
    found = tick(collection)
    assert (found.changed, found.gone, found.refused) == (1, 0, 5)
    run_batch(collection, 0, "again")
    assert len(committed(database)) == 20


@pytest.mark.parametrize(
    ("kind", "value"), [("date", "now()::date"), ("text", "now()::text"), ("bigint", "1700000000")]
)
def test_a_column_that_is_no_time_stamp_is_an_error_that_says_so(database, settings, films_of, kind, value) -> None:
    films_of(3, kind, value)
    collection = open_collection(timed(), settings)
    with pytest.raises(SourceError, match=rf"`source.updated_at:` names 'updated_at' of type {kind}.*leave it out"):
        collection.ledger.full_scan(collection.source)


@pytest.mark.parametrize(
    "change", ["ALTER TABLE films DROP COLUMN overview", "ALTER TABLE films RENAME COLUMN updated_at TO changed"]
)
def test_a_column_that_was_dropped_or_renamed_is_an_error_that_names_it(database, settings, films_of, change) -> None:
    films_of(3)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, change)
    with pytest.raises(SourceError, match="names a column"):
        tick(collection)
    with pytest.raises(SourceError, match="names a column"):
        collection.ledger.full_scan(collection.source)
    assert len(committed(database)) == 3


def test_a_composite_key_and_a_query_are_read_incrementally(database, settings, films_of) -> None:
    films_of(12)
    source = {
        "query": "SELECT id, id % 3 AS kind, title, overview, revenue, updated_at AS changed FROM films",
        "key": ["id", "kind"],
        "updated_at": "changed",
    }
    collection = open_collection(definition(source=source), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'other', updated_at = now() WHERE id = 7")
    execute(database, "INSERT INTO films VALUES (13, 'N', 'o', 1, false, now())")
    assert seen(tick(collection)) == (1, 1, 0)


def test_rows_outside_the_condition_break_nothing(database, settings, films_of) -> None:
    """A history table: one current row an item, and older ones, of which some have no key."""
    execute(
        database,
        """CREATE TABLE films (id bigint, title text, overview text, revenue bigint, is_current boolean,
               updated_at timestamptz)""",
    )
    execute(database, "INSERT INTO films SELECT n, 'T', 'old', 1, false, now() FROM generate_series(1, 9) n")
    execute(database, "INSERT INTO films SELECT n, 'T', 'new', 1, true, now() FROM generate_series(1, 9) n")
    execute(database, "INSERT INTO films VALUES (NULL, 'T', 'none', 1, false, now())")
    collection = open_collection(timed(where="is_current"), settings)
    settle(collection)
    for rows in (20_000, 3):
        found = tick(collection, rows)
        assert (found.changed, found.gone) == (0, 0)
    assert collection.ledger.dirty_batches() == []
    execute(database, "INSERT INTO films VALUES (1, 'T', 'newer', 1, true, now())")
    with pytest.raises(SourceError, match="more than once"):
        tick(collection)
