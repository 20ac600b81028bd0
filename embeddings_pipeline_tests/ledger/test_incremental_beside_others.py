"""Incremental scans beside commits, full scans, other ticks and sessions that end."""

import threading
from typing import Any

import psycopg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.ledger import incremental_scan
from embeddings_pipeline.ledger.incremental_scan import IncrementalScan
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.embed import embed_batches
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.incremental import (
    seen,
    settle,
    tick,
    timed,
)
from embeddings_pipeline_tests.support.workbench import commit_batch, committed, execute, run_batch


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
    read_items(collection, [0], "run")
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
    read_items(collection, [0], "run")
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
