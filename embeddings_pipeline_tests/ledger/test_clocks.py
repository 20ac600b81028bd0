"""A clock that was ahead for a while: a time that is yet to come counts as none, and no wait is too long."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.health.freshness import freshness
from embeddings_pipeline.model_change.preflight import check_contract
from embeddings_pipeline.orchestration import automation
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.switch import switch
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.dagster_internals import create_run_for_test
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    execute,
    films,
    make_films,
    run_batch,
    sync_once,
)

AHEAD = "now() + interval '1 year'"


@pytest.fixture
def collection(database: Database, settings: Settings) -> Collection:
    """Three films, of which the first has changed."""
    make_films(database, films(3))
    synced, _ = sync_once(definition(), settings)
    execute(database, "UPDATE films SET overview = 'another' WHERE id = 1")
    synced.ledger.full_scan(synced.source)
    return synced


def test_a_batch_waits_no_longer_than_the_longest_wait(database, collection) -> None:
    collection.ledger.note_attempts([0])
    assert collection.ledger.work(due=True) == {}
    execute(database, f"UPDATE embeddings.batch SET next_try = {AHEAD}")
    assert collection.ledger.work(due=True) == {0: 1} == collection.ledger.dirty_items(due=True)
    execute(database, "UPDATE embeddings.batch SET attempts = 90, next_try = now() + interval '64 minutes'")
    assert collection.ledger.work(due=True) == {}
    execute(database, f"UPDATE embeddings.batch SET next_try = {AHEAD}")
    collection.ledger.note_attempts([0])  # which is another attempt
    assert execute(database, "SELECT attempts, next_try - now() <= '64 minutes' FROM embeddings.batch") == [(91, True)]


def test_new_items_of_such_a_batch_are_recent_work(database, settings) -> None:
    make_films(database, films(2))
    collection = open_collection(definition(), settings)
    collection.ledger.full_scan(collection.source)
    execute(database, f"UPDATE embeddings.batch SET next_try = {AHEAD}")
    assert collection.ledger.recent_items(7, 10) == {0: ["1", "2"]}


def test_a_poison_text_waits_no_longer_than_the_longest_wait(database, collection) -> None:
    DeterministicEncoder.reset()
    DeterministicEncoder.fail_on = "another"
    assert run_batch(collection, 0, "poison").quarantined == 1
    DeterministicEncoder.reset()
    assert collection.ledger.work(due=True) == {}
    execute(database, f"UPDATE embeddings.quarantine SET next_try = {AHEAD}")
    assert collection.ledger.work(due=True) == {0: 1}
    assert run_batch(collection, 0, "again").embedded == 1
    assert execute(database, "SELECT * FROM embeddings.quarantine") == []


def test_a_change_that_was_seen_in_a_time_to_come_is_seen_again_by_the_next_scan(database, collection) -> None:
    execute(database, f"UPDATE embeddings.films_item SET seen_at = {AHEAD} WHERE item_key = '1'")
    execute(database, f"UPDATE embeddings.scan SET full_scan_at = {AHEAD}, read_at = {AHEAD}")
    waits = freshness(database, "films", collection.model.destination)
    assert (waits.oldest_change, waits.full_scan_at, waits.read_at) == (None, None, None)
    collection.ledger.full_scan(collection.source)
    waits = freshness(database, "films", collection.model.destination)
    assert waits.oldest_change is not None and waits.oldest_change <= waits.asked_at


def test_an_incremental_scan_goes_on_where_it_was_before_the_sources_clock_was_ahead(database, settings) -> None:
    execute(database, "CREATE TABLE films (id int PRIMARY KEY, title text, overview text, revenue int, at timestamptz)")
    execute(database, "INSERT INTO films SELECT n, 'Film', 'story ' || n, n, now() FROM generate_series(1, 3) n")
    collection, _ = sync_once(definition(source={"table": "films", "key": ["id"], "updated_at": "at"}), settings)
    collection.ledger.incremental_scan(collection.source)
    year = (
        """UPDATE embeddings.scan SET watermark = jsonb_set(watermark, '{cursor}', '["2199-01-01 00:00:00+00", "9"]')"""
    )
    execute(database, year)
    execute(database, "UPDATE films SET overview = 'edited', at = now() WHERE id = 2")
    assert collection.ledger.incremental_scan(collection.source).changed == 1


def test_a_file_of_the_lake_that_is_far_ahead_is_swept(collection) -> None:
    run_batch(collection, 0, "later")
    folder = Path(collection.lake.root) / "films/raw_items/000000"
    ahead = time.time() + 10 * 86_400
    for file in folder.iterdir():
        at = ahead + file.name.startswith("later")
        os.utime(file, (at, at))
    assert list(folder.glob("run*"))
    run_batch(collection, 0, "last")
    assert not list(folder.glob("run*"))


@pytest.mark.slow
class TestSensor:
    def test_a_full_scan_of_a_time_to_come_does_not_keep_the_next_one_waiting(
        self, database, project, collection, instance
    ) -> None:
        execute(database, f"UPDATE embeddings.scan SET full_scan_at = {AHEAD}")
        run = create_run_for_test(instance, job_name="films_scan", status=dg.DagsterRunStatus.SUCCESS)
        execute_in_dagster = f"UPDATE runs SET end_time = {time.time() + 1e7} WHERE run_id = '{run.run_id}'"
        with instance.run_storage.connect() as connection:
            connection.exec_driver_sql(execute_in_dagster)
        result = evaluate(instance, collection.definition, 32)
        assert "films_scan" in [request.job_name for request in result.run_requests]

    def test_indexes_that_lag_since_a_time_to_come_are_built(self, project, collection, instance, monkeypatch) -> None:
        monkeypatch.setattr(automation, "lagging_since", lambda _: datetime.now(UTC) + timedelta(days=300))
        result = evaluate(instance, collection.definition, 32)
        assert "films_index" in [request.job_name for request in result.run_requests]


@pytest.mark.slow
def test_a_grace_period_is_never_longer_than_it_is(database, project, instance) -> None:
    make_films(database, films(3))
    candidate = {**PROFILE, "name": "candidate", "dimensions": 48}
    one = definition(profiles=by_name(candidate))
    sync_once(one, project)
    switch(one, project, "candidate", instance=instance)
    execute(database, f"UPDATE embeddings.model_change SET swapped_at = {AHEAD}")
    with pytest.raises(ModelChangeError, match="the grace period runs until"):
        check_contract(open_collection(one, project), now=False)
    assert execute(database, "SELECT swapped_at <= now() FROM embeddings.model_change") == [(True,)]
