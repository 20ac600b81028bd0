"""Incremental scans: what was updated is found by its `updated_at`, in bounded steps, and nothing is passed over."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.ledger import incremental_scan
from embeddings_pipeline.ledger.incremental_scan import IncrementalScan, Watermark
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.commit import commit_batch
from embeddings_pipeline.pipeline.embed import embed_batches
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source_sql import Position
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, run_batch

SOURCE = {"table": "films", "key": ["id"], "updated_at": "updated_at"}


def timed(**source: Any) -> CollectionDefinition:
    return definition(source={**SOURCE, **source})


@pytest.fixture
def films_of(database: Database) -> Iterator[Any]:
    """Makes the table `films` with `updated_at` of a type, and a number of films."""
    DeterministicEncoder.reset()

    def make(number: int, kind: str = "timestamptz", value: str = "now()") -> None:
        execute(
            database,
            f"""CREATE TABLE films (id bigint PRIMARY KEY, title text, overview text, revenue bigint,
                    is_removed boolean NOT NULL DEFAULT false, updated_at {kind})""",
        )
        execute(
            database,
            f"INSERT INTO films SELECT n, 'Film ' || n, 'story ' || n, n, false, {value} "
            f"FROM generate_series(1, {number}) n",
        )

    yield make


def settle(collection: Collection) -> None:
    """Scan and commit everything."""
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, f"run{batch}")
    assert collection.ledger.dirty_batches() == []


def tick(collection: Collection, rows: int = 20_000) -> IncrementalScan:
    return collection.ledger.incremental_scan(collection.source, rows_at_once=rows)


def seen(found: IncrementalScan) -> tuple[int, int, int]:
    return found.new, found.changed, found.gone


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


def test_the_watermark_stands_in_the_transaction_that_writes_the_ledger(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    tick(collection)
    before = execute(database, "SELECT watermark->'cursor' FROM embeddings.scan")
    execute(database, "UPDATE films SET overview = 'other', updated_at = now() WHERE id = 2")

    def killed() -> None:
        raise psycopg.OperationalError("the connection was lost")

    with at_failpoint("incremental_scan.suspected", killed), pytest.raises(psycopg.OperationalError):
        tick(collection)
    assert execute(database, "SELECT watermark->'cursor' FROM embeddings.scan") == before
    assert collection.ledger.dirty_batches() == []
    assert seen(tick(collection)) == (0, 1, 0)


def test_an_edit_and_its_undoing_around_a_commit_are_not_lost(database, settings, films_of) -> None:
    """The scan reads the undone row while a commit that saw the edit has not committed yet."""
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'edited', updated_at = now() WHERE id = 2")
    tick(collection)
    read_items(collection, 0, "run")
    render_texts(collection, 0, "run")
    list(embed_batches(collection, [0], "run"))

    def undone_and_scanned() -> None:
        execute(database, "UPDATE films SET overview = 'story 2', updated_at = clock_timestamp() WHERE id = 2")
        scanning.start()
        for _ in range(100):
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
            if execute(database, waiting) == [(1,)]:
                return
            scanning.join(0.05)
        raise AssertionError("the scan does not wait for the commit")

    scanning = threading.Thread(target=lambda: tick(collection))
    with at_failpoint("commit.second_look", undone_and_scanned):
        commit_batch(collection, 0, "run")
    scanning.join()
    assert committed(database)["2"][0] == "Film 2 | edited"
    assert collection.ledger.dirty_batches() == [0]
    run_batch(collection, 0, "again")
    assert committed(database)["2"][0] == "Film 2 | story 2"


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


def test_two_scans_and_a_tick_out_of_order_end_in_the_same_state(database, settings, films_of) -> None:
    films_of(30)
    collection = open_collection(timed(), settings)
    settle(collection)
    with collection.source.connect() as reading:
        old = list(collection.source.scan(reading))
    execute(database, "UPDATE films SET overview = 'other', updated_at = now() WHERE id <= 3")
    tick(collection)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, "run")

    class Old(type(collection.source)):  # type: ignore[misc]
        def scan(self, connection: Any, apart: Any = ()) -> Any:
            return iter(old)

    collection.ledger.full_scan(Old(collection.source.definition, collection.source.database))  # older than the commit
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, "later")
    assert collection.ledger.dirty_batches() == []
    assert [committed(database)[str(n)][0] for n in (1, 2, 3)] == [f"Film {n} | other" for n in (1, 2, 3)]


def test_a_source_that_loses_its_connection_mid_scan_is_one_line_and_changes_nothing(
    database: Database, settings: Settings, films_of: Any
) -> None:
    films_of(30_000)
    execute(
        database,
        """CREATE VIEW ending AS SELECT id, overview, revenue, updated_at,
               CASE WHEN id = 20000 THEN pg_terminate_backend(pg_backend_pid())::text ELSE title END AS title
           FROM films""",
    )
    collection = open_collection(timed(table="ending"), settings)
    with pytest.raises(SourceError, match=r"cannot be read.*try again"):
        collection.ledger.full_scan(collection.source)
    assert execute(database, "SELECT count(*) FROM embeddings.films_item") == [(0,)]


def test_a_tick_with_a_new_row_waits_for_a_commit_without_a_deadlock(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'edited', updated_at = now() WHERE id = 2")
    execute(database, "INSERT INTO films VALUES (77, 'New', 'row', 1, false, now())")
    read_items(collection, 0, "run")
    render_texts(collection, 0, "run")
    list(embed_batches(collection, [0], "run"))
    found: list[IncrementalScan] = []
    ticking = threading.Thread(target=lambda: found.append(tick(collection)))

    def scanned_meanwhile() -> None:
        ticking.start()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
        for _ in range(100):
            if execute(database, waiting) == [(1,)]:
                return
            ticking.join(0.05)
        raise AssertionError("the tick does not wait for the commit")

    with at_failpoint("commit.second_look", scanned_meanwhile):
        commit_batch(collection, 0, "run")
    ticking.join()
    assert [result.new for result in found] == [1]
    assert committed(database)["2"][0] == "Film 2 | edited"


def test_many_small_ticks_do_not_wipe_what_one_big_one_may_not(database, settings, films_of, monkeypatch) -> None:
    films_of(50)
    collection = open_collection(timed(where="is_removed = false"), settings)
    settle(collection)
    monkeypatch.setattr(incremental_scan, "ROWS_PER_TRANSACTION", 4)
    execute(database, "UPDATE films SET is_removed = true, updated_at = now()")
    for n in range(8):
        tick(collection, rows=4)
        for batch in collection.ledger.dirty_batches():
            run_batch(collection, batch, f"tick{n}-{batch}")
    assert len(committed(database)) >= 40
    with pytest.raises(RefusedError):
        collection.ledger.full_scan(collection.source)


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


def test_an_edit_of_a_dirty_item_does_not_make_it_younger(database, settings, films_of) -> None:
    films_of(5)
    collection = open_collection(timed(), settings)
    settle(collection)
    execute(database, "UPDATE films SET overview = 'one', updated_at = now() WHERE id = 2")
    tick(collection)
    execute(database, "UPDATE embeddings.films_item SET seen_at = now() - interval '2 hours' WHERE item_key = '2'")
    execute(database, "UPDATE films SET overview = 'two', updated_at = now() WHERE id = 2")
    assert tick(collection).changed == 1
    old = "SELECT seen_at < now() - interval '1 hour' FROM embeddings.films_item WHERE item_key = '2'"
    assert execute(database, old) == [(True,)]
