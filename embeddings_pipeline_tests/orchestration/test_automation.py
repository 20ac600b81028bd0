"""The sensor, the schedules, the quarantine's retries, the nightly checks and the alerts."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import dagster as dg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import OutageError, ProfileError, SourceError
from embeddings_pipeline.health.alerts import alert
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.drift import measure
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.orchestration import automation
from embeddings_pipeline.orchestration.automation import build_refresh_jobs, evaluate, named, under_way
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import BulkActionStatus, InMemoryJob
from embeddings_pipeline.orchestration.instance.liveness import host_tags
from embeddings_pipeline.orchestration.names import partitions_name
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.sync import Recent, sync
from embeddings_pipeline.pipeline.canaries import CANARIES
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.embed import embed_batches, pending_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.dagster_internals import (
    AssetBackfillData,
    PartitionBackfill,
    create_run_for_test,
    execute_run,
)
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
    run_batch,
    sync_once,
)

DIMENSIONS = 32
OTHER_HASH = "UPDATE embeddings.{vector} SET content_hash = decode(repeat('00', 16), 'hex') WHERE text_id = 3"


def jobs_of(result: dg.SensorResult) -> list[str]:
    return [request.job_name or "" for request in result.run_requests or []]


class Daemon:
    """What Dagster's daemon does with a tick: adds partitions, and launches the runs it asks for."""

    def __init__(self, instance: dg.DagsterInstance, one: CollectionDefinition) -> None:
        self.instance, self.collection = instance, one
        self.definitions = build_definitions(one)

    def tick(self) -> dg.SensorResult:
        result = evaluate(self.instance, self.collection, DIMENSIONS)
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        return result

    def run(self, request: dg.RunRequest) -> bool:
        job = self.definitions.resolve_job_def(request.job_name or "")
        run = self.instance.create_run_for_job(job, run_config=request.run_config, tags=dict(request.tags))
        return execute_run(InMemoryJob(job), run, self.instance, raise_on_error=False).success

    def until_quiet(self, most: int = 10) -> int:
        """Tick and run until nothing is asked for; how many ticks that took."""
        for ticks in range(1, most + 1):
            requests = self.tick().run_requests or []
            if not requests:
                return ticks
            for request in requests:
                self.run(request)
        raise AssertionError("it does not come to rest")


@pytest.fixture
def daemon(instance: dg.DagsterInstance) -> Callable[..., Daemon]:
    return lambda **attributes: Daemon(instance, definition(**attributes))


def later(database: Database, seconds: int) -> None:
    """Move what waits for its next try forward, as if time had passed."""
    for table in ("batch", "quarantine"):
        execute(database, f"UPDATE embeddings.{table} SET next_try = next_try - interval '{seconds} s'")


class TestSensor:
    def test_it_brings_a_new_collection_up_to_date_and_comes_to_rest(self, database, project, daemon) -> None:
        make_films(database, films(35))
        one = daemon()
        assert jobs_of(one.tick()) == ["films_scan"]
        assert one.until_quiet() <= 4
        status = collection_status(one.collection, database, project)
        assert (status["coverage"], status["vectors"], status["faiss"]["current"]) == (1.0, 35, True)
        result = one.tick()
        assert jobs_of(result) == []
        said = result.skip_reason.skip_message
        assert (
            "batches: 4, with something to do: 0, being worked on: 0, waiting for their next try: 0" in said
            and "indexes current" in said
        )
        assert "last full scan 0 minutes ago" in said

    def test_rows_that_are_new_changed_and_gone_arrive_by_themselves(self, database, project, daemon) -> None:
        execute(
            database,
            "CREATE TABLE films (id int PRIMARY KEY, title text, overview text, revenue int, updated_at timestamptz)",
        )
        execute(database, "INSERT INTO films SELECT n, 'Film', 'story ' || n, n, now() FROM generate_series(1, 12) n")
        one = daemon(source={"table": "films", "key": ["id"], "updated_at": "updated_at"})
        one.until_quiet()
        execute(database, "INSERT INTO films VALUES (13, 'New', 'row', 1, now())")
        execute(database, "UPDATE films SET overview = 'edited', updated_at = now() WHERE id = 3")
        result = one.tick()
        assert jobs_of(result) == ["films_batches"]  # both batches in one run, and no scan
        assert one.run(result.run_requests[0])
        assert committed(database)["13"][0] == "New | row" and committed(database)["3"][0] == "Film | edited"
        execute(database, "DELETE FROM films WHERE id = 5")
        execute(database, "UPDATE embeddings.scan SET full_scan_at = now() - interval '16 minutes'")
        one.instance.delete_run(
            one.instance.get_run_records(dg.RunsFilter(job_name="films_scan"))[0].dagster_run.run_id
        )
        one.until_quiet()
        assert "5" not in committed(database)

    def test_two_runs_never_work_on_one_batch(self, database, project, daemon, instance) -> None:
        make_films(database, films(35))
        one = daemon()
        one.run(one.tick().run_requests[0])
        instance.add_dynamic_partitions(partitions_name(one.definition), ["000000", "000001", "000002", "000003"])
        run = create_run_for_test(
            instance, job_name="films_batches", status=dg.DagsterRunStatus.NOT_STARTED, tags=range_tags(1, 2)
        )
        ranges = [dict(request.tags) for request in one.tick().run_requests if request.job_name == "films_batches"]
        assert ranges == [range_tags(0, 0), range_tags(3, 3)]
        instance.report_run_canceled(run)
        later(database, 3600)
        ranges = [dict(request.tags) for request in one.tick().run_requests if request.job_name == "films_batches"]
        assert ranges == [range_tags(0, 3)]

    def test_what_was_asked_for_and_died_comes_back_after_a_wait(self, database, project, daemon, instance) -> None:
        make_films(database, films(5))
        one = daemon()
        one.run(one.tick().run_requests[0])
        assert jobs_of(one.tick()) == ["films_batches"]  # and its process is killed before it does anything
        result = one.tick()
        assert jobs_of(result) == [] and "waiting for their next try: 1" in result.skip_reason.skip_message
        later(database, 60)
        assert jobs_of(one.tick()) == ["films_batches"]
        later(database, 60)
        assert jobs_of(one.tick()) == []  # the second wait is longer
        later(database, 60)
        assert jobs_of(one.tick()) == ["films_batches"]

    def test_a_batch_that_kills_its_process_is_not_tried_at_each_tick(self, database, settings, daemon) -> None:
        make_films(database, films(5))
        collection, _ = sync_once(definition(), settings)
        execute(database, "UPDATE films SET overview = 'BOOM' WHERE id = 1")
        collection.ledger.full_scan(collection.source)
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "BOOM", KeyboardInterrupt  # noted by no handler
        with pytest.raises(KeyboardInterrupt):
            run_batch(collection, 0, "killed")
        assert collection.ledger.work(due=True) == {} and collection.ledger.work() == {0: 1}
        DeterministicEncoder.reset()
        run_batch(collection, 0, "whole")
        assert execute(database, "SELECT attempts, next_try FROM embeddings.batch") == [(0, None)]

    def test_a_run_that_failed_waits_and_the_others_go_on(self, database, project, daemon) -> None:
        make_films(database, films(25))
        one = daemon()
        one.run(one.tick().run_requests[0])
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "number 2 ", OutageError
        for request in one.tick().run_requests:
            assert not one.run(request)
        later(database, 240)
        DeterministicEncoder.reset()
        one.until_quiet()
        assert len(committed(database)) == 25

    def test_a_scan_that_is_refused_is_not_asked_for_at_each_tick(self, database, project, daemon) -> None:
        make_films(database, films(10))
        one = daemon()
        one.until_quiet()
        execute(database, "DELETE FROM films WHERE id > 5")
        execute(database, "UPDATE embeddings.scan SET full_scan_at = now() - interval '1 day'")
        for record in one.instance.get_run_records(dg.RunsFilter(job_name="films_scan")):
            one.instance.delete_run(record.dagster_run.run_id)
        [request] = one.tick().run_requests
        assert not one.run(request)
        assert jobs_of(one.tick()) == []
        assert len(committed(database)) == 10

    def test_a_sync_and_a_backfill_keep_their_batches_to_themselves(self, database, project, daemon, instance) -> None:
        make_films(database, films(35))
        one = daemon()
        one.run(one.tick().run_requests[0])
        one.tick()
        later(database, 3600)

        graph = one.definitions.resolve_asset_graph()
        key = dg.AssetKey(["films", "raw_items"])
        data = AssetBackfillData.from_asset_partitions(
            asset_graph=graph,
            partition_names=["000001", "000002"],
            asset_selection=[key],
            dynamic_partitions_store=instance,
            all_partitions=False,
            backfill_start_timestamp=0.0,
        )
        instance.add_backfill(
            PartitionBackfill(
                backfill_id="backfill",
                status=BulkActionStatus.REQUESTED,
                from_failure=False,
                tags={},
                backfill_timestamp=0.0,
                asset_selection=[key],
                serialized_asset_backfill_data=None,
                asset_backfill_data=data,
            )
        )
        assert under_way(instance, one.collection, DIMENSIONS).partitions == {"000001", "000002"}
        ranges = [dict(request.tags) for request in one.tick().run_requests]
        assert ranges == [range_tags(0, 0), range_tags(3, 3)]

    def test_the_indexes_wait_for_the_batches_but_not_for_ever(self, database, project, daemon, monkeypatch) -> None:
        make_films(database, films(15))
        one = daemon()
        one.until_quiet()
        execute(database, "UPDATE films SET overview = 'x' WHERE id IN (1, 9)")  # of both batches
        collection = open_collection(one.definition, project)
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 1, "run")
        collection.ledger.note_attempts([0])
        assert "indexes behind" in one.tick().skip_reason.skip_message
        built = datetime.now(UTC) - timedelta(minutes=11)
        monkeypatch.setattr(automation, "lagging_since", lambda collection: built)
        assert jobs_of(one.tick()) == ["films_index"]

    def test_a_day_without_the_daemon_and_a_tick_that_failed_need_no_mending(
        self, database, project, daemon, monkeypatch
    ) -> None:
        make_films(database, films(12))
        one = daemon()
        one.until_quiet()
        execute(database, "UPDATE embeddings.scan SET full_scan_at = now() - interval '1 day'")
        execute(database, "UPDATE films SET overview = 'meanwhile' WHERE id = 4")
        execute(database, "ALTER TABLE films RENAME TO away")
        for record in one.instance.get_run_records(dg.RunsFilter(job_name="films_scan")):
            one.instance.delete_run(record.dagster_run.run_id)
        assert not one.run(one.tick().run_requests[0])
        execute(database, "ALTER TABLE away RENAME TO films")
        monkeypatch.setattr(automation, "FAILED_WAIT", timedelta(0))
        one.until_quiet()
        assert committed(database)["4"][0] == "Film 4 | meanwhile"

    def test_a_read_that_fails_does_not_keep_the_rest_waiting(self, database, project, daemon, monkeypatch) -> None:
        columns = "id int PRIMARY KEY, title text, overview text, revenue int, at timestamptz"
        execute(database, f"CREATE TABLE films ({columns})")
        execute(database, "INSERT INTO films SELECT n, 'Film', 'story ' || n, n, now() FROM generate_series(1, 12) n")
        one = daemon(source={"table": "films", "key": ["id"], "updated_at": "at"})
        one.run(one.tick().run_requests[0])

        def fails(*_: object, **__: object) -> None:
            raise SourceError("the source cannot be read")

        monkeypatch.setattr("embeddings_pipeline.ledger.ledger.Ledger.incremental_scan", fails)
        assert jobs_of(one.tick()) == ["films_batches"]
        assert "could not be read: the source cannot be read" in one.tick().skip_reason.skip_message

    @pytest.mark.parametrize("damage", ["DROP INDEX {index}", "UPDATE embeddings.collection SET version = version + 1"])
    def test_an_index_that_lags_is_built_though_no_batch_has_landed(self, database, project, daemon, damage) -> None:
        make_films(database, films(12))
        one = daemon()
        one.until_quiet()
        hnsw = "SELECT schemaname || '.' || indexname FROM pg_indexes WHERE indexdef LIKE '%USING hnsw%'"
        [(index,)] = execute(database, hnsw)
        execute(database, damage.format(index=index))
        assert jobs_of(one.tick()) == ["films_index"]

    def test_partitions_that_somebody_added_out_of_order_do_not_stop_the_work(
        self, database, project, daemon, instance
    ) -> None:
        make_films(database, films(35))
        one = daemon()
        instance.add_dynamic_partitions(partitions_name(one.definition), ["000003", "by hand"])
        one.until_quiet()
        assert len(committed(database)) == 35
        execute(database, "UPDATE films SET overview = 'again'")
        sync(one.definition, project, instance=instance)
        assert {text for text, *_ in committed(database).values()} == {f"Film {n} | again" for n in range(1, 36)}

    def test_its_name_and_those_of_the_schedules_have_the_collections_prefix_but_for_items(self) -> None:
        assert named(definition(name="items"), "new_rows_sensor") == "new_rows_sensor"
        repository = build_definitions(definition()).get_repository_def()
        assert {sensor.name for sensor in repository.sensor_defs} == {"films_new_rows_sensor", "films_failure_alerts"}
        assert {one.name for one in repository.schedule_defs} == {"films_daily_refresh", "films_recent_refresh"}


class TestSchedules:
    def test_their_numbers_are_those_of_the_file(self) -> None:
        numbers = {"timezone": "Europe/Berlin", "daily_refresh": "23:30", "recent_every_hours": 3}
        repository = build_definitions(definition(automation=numbers)).get_repository_def()
        daily, recent = (repository.get_schedule_def(f"films_{name}_refresh") for name in ("daily", "recent"))
        assert (daily.cron_schedule, daily.execution_timezone) == ("30 23 * * *", "Europe/Berlin")
        assert recent.cron_schedule == "0 */3 * * *"
        default = build_definitions(definition()).get_repository_def()
        assert default.get_schedule_def("films_daily_refresh").cron_schedule == "0 4 * * *"
        assert default.get_schedule_def("films_recent_refresh").cron_schedule == "0 */6 * * *"

    def test_the_daily_refresh_does_all_and_runs_every_check(self, database, project, instance) -> None:
        make_films(database, films(12))
        refresh, _ = build_refresh_jobs(definition())
        assert refresh.execute_in_process(instance=instance).success
        assert len(committed(database)) == 12
        keys = build_definitions(definition()).resolve_asset_graph().asset_check_keys
        for key in keys:
            [record] = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            assert record.status.value == "SUCCEEDED", key
        assert {key.name for key in keys} >= {"coverage", "freshness", "quarantine", "agreement", "model_drift"}

    def test_the_recent_refresh_takes_new_items_up_to_its_number_and_nothing_else(
        self, database, project, instance
    ) -> None:
        make_films(database, films(25))
        one = definition(vectors={"base": "{title} | {overview}", "title": "{title}"})
        collection, _ = sync_once(one, project)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
        for n in range(101, 112):
            execute(database, f"INSERT INTO films VALUES ({n}, 'New {n}', 'row {n}', 1)")
        collection.ledger.full_scan(collection.source)
        execute(
            database,
            "UPDATE embeddings.films_item SET first_seen_at = now() - interval '8 days' WHERE item_key = '101'",
        )
        done = sync(one, project, recent=Recent(days=7, items=6), instance=instance)
        assert done.embedded == 12  # two texts an item
        new = {key for key in committed(database) if int(key) > 100}
        assert len(new) == 6 and "101" not in new
        assert committed(database)["3"][0] != "Film 3 | edited"

    def test_the_recent_refresh_reads_what_is_new_where_the_source_has_updated_at(
        self, database, project, instance
    ) -> None:
        execute(
            database, "CREATE TABLE films (id int PRIMARY KEY, title text, overview text, revenue int, at timestamptz)"
        )
        one = definition(source={"table": "films", "key": ["id"], "updated_at": "at"})
        execute(database, "INSERT INTO films SELECT n, 'Film', 'story ' || n, n, now() FROM generate_series(1, 12) n")
        _, recent = build_refresh_jobs(one)
        assert recent.execute_in_process(instance=instance).success
        assert len(committed(database)) == 12


class TestQuarantine:
    @pytest.fixture
    def poisoned(self, database, settings) -> Any:
        """Nine films, the fifth of which the encoder refuses."""
        DeterministicEncoder.reset()
        make_films(database, films(9))
        execute(database, "UPDATE films SET overview = 'POISON' WHERE id = 5")
        DeterministicEncoder.fail_on = "POISON"
        collection, _ = sync_once(definition(quarantine={"attempts": 3}), settings)
        return collection

    def test_a_text_is_tried_again_after_its_wait_and_a_bounded_number_of_times(self, database, poisoned) -> None:
        tried = []
        for n in range(6):
            tried.append(poisoned.ledger.work(due=True))
            for batch in poisoned.ledger.work():
                run_batch(poisoned, batch, f"try{n}")
            later(database, 24 * 3600)
        assert tried == [{}, {0: 1}, {0: 1}, {}, {}, {}]
        [entry] = poisoned.ledger.quarantine_entries()
        assert (entry.item_key, entry.items, entry.attempts, entry.next_try) == ("5", 1, 3, None)

    def test_a_text_that_goes_well_again_leaves_the_quarantine(self, database, poisoned) -> None:
        DeterministicEncoder.reset()
        later(database, 600)
        for batch in poisoned.ledger.work():
            run_batch(poisoned, batch, "again")
        assert poisoned.ledger.quarantine_entries() == []
        assert len(committed(database)) == 9

    def test_a_dry_look_does_not_count_what_waits(self, poisoned) -> None:
        assert pending_texts(poisoned, ["5", "6"]) == (0, 1)
        assert pending_texts(poisoned, ["5", "6"], force=True) == (2, 0)

    def test_a_retry_that_dies_before_its_commit_is_tried_again(self, database, poisoned) -> None:
        DeterministicEncoder.reset()
        later(database, 600)
        list(embed_batches(poisoned, [0], "killed"))
        later(database, 3600)
        assert poisoned.ledger.work(due=True) == {0: 1}
        run_batch(poisoned, 0, "again")
        assert len(committed(database)) == 9 and poisoned.ledger.quarantine_entries() == []

    def test_a_text_of_two_batches_leaves_when_both_have_its_vector(self, database, settings) -> None:
        make_films(database, [(n, "Same", "POISON" if n in (1, 19) else f"story {n}", 1) for n in range(1, 20)])
        DeterministicEncoder.reset()
        DeterministicEncoder.fail_on = "POISON"
        collection, _ = sync_once(definition(), settings)
        poison = "SELECT batch FROM embeddings.films_item WHERE item_key IN ('1', '19')"
        batches = {row[0] for row in execute(database, poison)}
        DeterministicEncoder.reset()
        later(database, 600)
        work = list(collection.ledger.work())
        assert set(work) == batches
        run_batch(collection, work[0], "one")
        left = collection.ledger.work()
        assert set(left) == batches - {work[0]}
        for batch in left:
            run_batch(collection, batch, "other")
        assert collection.ledger.work() == {} and len(committed(database)) == 19

    def test_an_outage_while_a_text_is_tried_again_makes_the_batch_wait(self, database, poisoned) -> None:
        later(database, 600)
        DeterministicEncoder.error = OutageError
        with pytest.raises(OutageError):
            run_batch(poisoned, 0, "outage")
        assert poisoned.ledger.work(due=True) == {} and poisoned.ledger.work() == {0: 1}

    def test_waits_grow(self, database, poisoned) -> None:
        waits = []
        for n in range(2):
            [(wait,)] = execute(
                database, "SELECT round(extract(epoch FROM next_try - last_try) / 60) FROM embeddings.quarantine"
            )
            waits.append(int(wait))
            later(database, 24 * 3600)
            run_batch(poisoned, 0, f"try{n}")
        assert waits == [10, 40]

    def test_retry_gives_new_attempts_and_clear_makes_it_a_new_text(self, database, poisoned) -> None:
        [entry] = poisoned.ledger.quarantine_entries()
        assert poisoned.ledger.quarantine_retry([bytes.fromhex(entry.content_hash)]) == 1
        assert poisoned.ledger.work() == {0: 1}
        DeterministicEncoder.reset()
        assert poisoned.ledger.quarantine_clear() == 1
        assert poisoned.ledger.quarantine_entries() == [] and poisoned.ledger.dirty_items() == {0: 1}
        run_batch(poisoned, 0, "again")
        assert len(committed(database)) == 9

    def test_an_edited_text_takes_the_old_one_out_of_every_count(self, database, poisoned) -> None:
        execute(database, "UPDATE films SET overview = 'mended' WHERE id = 5")
        poisoned.ledger.full_scan(poisoned.source)
        run_batch(poisoned, 0, "again")
        [entry] = poisoned.ledger.quarantine_entries()
        assert (entry.item_key, entry.items) == (None, 0)
        later(database, 24 * 3600)
        assert poisoned.ledger.work() == {}


class TestAudit:
    @pytest.fixture
    def collection(self, database, project, instance) -> Any:
        make_films(database, films(25))
        sync(definition(), project, instance=instance)
        collection = open_collection(definition(), project)
        assert audit(collection).agree
        return collection

    @pytest.mark.parametrize(
        ("damage", "found"),
        [
            ("DELETE FROM embeddings.films_text WHERE item_key = '3'", "items_without_texts vectors_without_text"),
            ("DELETE FROM embeddings.films_item WHERE item_key = '3'", "texts_without_item"),
            ("DELETE FROM embeddings.{vector} WHERE text_id = 3", "texts_without_vector vectors_not_in_faiss"),
            (
                "UPDATE embeddings.{vector} SET text_id = 999 WHERE text_id = 3",
                "vectors_without_text texts_without_vector",
            ),
            (OTHER_HASH, "vectors_of_another_text"),
        ],
    )
    def test_what_somebody_did_by_hand_is_counted_and_mended(
        self, database, project, instance, collection, damage, found
    ) -> None:
        before = committed(database)
        execute(database, damage.format(vector=collection.current.table.name))
        counted = audit(collection)
        assert not counted.agree
        for name in found.replace("vectors_not_in_faiss", "").split():
            assert getattr(counted, name) == 1, counted
        sync(definition(), project, instance=instance)
        assert audit(collection).agree
        assert committed(database) == before

    @pytest.mark.parametrize("damage", ["unlink", "truncate"])
    def test_a_lake_file_that_is_gone_or_damaged_is_written_again(
        self, database, project, instance, collection, damage
    ) -> None:
        [file] = (project.state_dir / "lake" / collection.folder("embeddings") / "000001").glob("*.parquet")
        file.unlink() if damage == "unlink" else file.write_bytes(file.read_bytes()[:100])
        counted = audit(collection)
        assert (counted.batches_without_lake_file, counted.batches_marked) == (1, 1)
        done = sync(definition(), project, instance=instance)
        assert done.embedded == 0  # from the table
        assert audit(collection).agree

    def test_an_index_with_other_ids_than_the_table_is_built_again(
        self, database, project, instance, collection
    ) -> None:
        vector = f"embeddings.{collection.current.table.name}"
        text = "embeddings.films_text (item_key, vector_name, chunk, content_hash, text, blank)"
        copied = "item_key, vector_name, 7, content_hash, text, blank FROM embeddings.films_text WHERE id = 3"
        [(new,)] = execute(database, f"INSERT INTO {text} SELECT {copied} RETURNING id")
        copied = f"SELECT {new}, vector_name, content_hash, embedding FROM {vector} WHERE text_id = 3"
        execute(database, f"INSERT INTO {vector} {copied}")
        assert audit(collection).vectors_not_in_faiss == 1
        sync(definition(), project, instance=instance)
        assert audit(collection).agree

    def test_the_check_names_what_is_wrong_and_the_command(self, database, project, instance, collection) -> None:
        execute(database, "DELETE FROM embeddings.films_text WHERE item_key = '3'")
        job = build_definitions(definition()).resolve_job_def("films_audit")
        done = job.execute_in_process(instance=instance)
        by_name = {evaluation.check_name: evaluation for evaluation in done.get_asset_check_evaluations()}
        assert not by_name["agreement"].passed
        assert "1 items without texts" in by_name["agreement"].description
        assert "sync --full" in by_name["agreement"].description
        full = sync(definition(), project, full=True, instance=instance)
        assert full.embedded == 0  # its vector is in the lake
        assert audit(collection).agree


class TestDrift:
    def test_the_canaries_are_stored_with_the_first_vectors_and_compared_later(self, database, settings) -> None:
        make_films(database, films(3))
        collection, _ = sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.canary") == [(len(CANARIES),)]
        found = measure(database, collection.fingerprint, collection.encoder())
        assert (found.texts, found.lowest_cosine, found.same) == (20, 1.0, True)
        execute(database, "UPDATE embeddings.canary SET embedding[1] = embedding[1] + 0.5 WHERE number = 7")
        changed = measure(database, collection.fingerprint, collection.encoder())
        assert changed.lowest_cosine < 0.999 and not changed.same and changed.worst_text == CANARIES[7]

    def test_weights_that_are_not_those_of_the_fingerprint_fail_the_check_in_one_line(
        self, database, project, instance, monkeypatch
    ) -> None:
        make_films(database, films(3))
        sync(definition(), project, instance=instance)

        def other_weights(_: object) -> None:
            raise ProfileError("Profile test: the weights are not those that the vectors were made with")

        monkeypatch.setattr(Collection, "encoder", other_weights)
        done = build_definitions(definition()).resolve_job_def("films_audit").execute_in_process(instance=instance)
        by_name = {evaluation.check_name: evaluation for evaluation in done.get_asset_check_evaluations()}
        assert not by_name["model_drift"].passed and by_name["agreement"].passed
        assert "the weights are not those" in by_name["model_drift"].description

    def test_the_audit_keeps_its_checks_evaluated_when_the_indexes_are_built_again(
        self, database, project, instance
    ) -> None:
        make_films(database, films(3))
        sync(definition(), project, full=True, instance=instance)
        numbers = instance.get_latest_materialization_event(dg.AssetKey(["films", "audit"]))
        assert numbers.asset_materialization.metadata["vectors_not_in_faiss"].value == 0
        again = build_definitions(definition()).resolve_job_def("films_index").execute_in_process(instance=instance)
        checked = {evaluation.check_name for evaluation in again.get_asset_check_evaluations()}
        assert checked == {"coverage", "integrity", "quarantine", "freshness", "index_parity"}

    def test_a_model_of_other_dimensions_or_without_a_number_is_drift(self, database, settings) -> None:
        make_films(database, films(3))
        collection, _ = sync_once(definition(), settings)
        execute(database, "UPDATE embeddings.canary SET embedding = array_fill(0, ARRAY[32]) WHERE number = 0")
        assert not measure(database, collection.fingerprint, collection.encoder()).same
        execute(database, "UPDATE embeddings.canary SET embedding = ARRAY[1, 2]")
        assert not measure(database, collection.fingerprint, collection.encoder()).same


class _Hook(BaseHTTPRequestHandler):
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is posted to ALERT_WEBHOOK_URL."""
    _Hook.bodies = []
    server = HTTPServer(("127.0.0.1", 0), _Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ALERT_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hook?token=SECRET")
    yield _Hook.bodies
    server.shutdown()


class TestAlerts:
    def test_a_check_that_begins_to_fail_is_posted_once(self, database, project, instance, webhook) -> None:
        make_films(database, films(5))
        sync(definition(), project, instance=instance)
        assert webhook == []
        execute(database, "UPDATE embeddings.canary SET embedding[1] = embedding[1] + 0.5")
        job = build_definitions(definition()).resolve_job_def("films_audit")
        for _ in range(2):
            job.execute_in_process(instance=instance)
        [body] = webhook
        assert (body["event"], body["collection"], body["check"]) == ("check_failed", "films", "model_drift")
        assert "lowest cosine" in body["text"]

    def test_a_failed_run_is_posted_with_its_reason(self, database, project, instance, webhook) -> None:
        make_films(database, films(5))
        execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
        definitions = build_definitions(definition())
        done = definitions.resolve_job_def("films_scan").execute_in_process(instance=instance, raise_on_error=False)
        failed = next(event for event in done.all_events if event.event_type_value == "PIPELINE_FAILURE")
        sensor = definitions.get_repository_def().get_sensor_def("films_failure_alerts")
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_instance=instance, dagster_run=done.dagster_run, dagster_event=failed
        ).for_run_failure()
        sensor(context)
        [body] = webhook
        assert (body["event"], body["job"], body["run_id"]) == ("run_failed", "films_scan", done.run_id)
        assert "names a column 'title'" in body["text"]

    def test_a_webhook_that_does_not_answer_fails_nothing_and_shows_no_secret(self, caplog) -> None:
        settings = Settings(alert_webhook_url="http://127.0.0.1:9/hook?token=SECRET")  # type: ignore[arg-type]
        assert alert(settings, "run_failed", "it failed") is False
        assert "did not take an alert" in caplog.text and "SECRET" not in caplog.text
        assert '"event": "run_failed"' in caplog.text
        assert alert(Settings(alert_webhook_url="no url"), "run_failed", "it failed") is False  # type: ignore[arg-type]


def test_runs_of_a_dead_sync_are_ended_by_the_tick(database, project, daemon, instance) -> None:
    make_films(database, films(5))
    one = daemon()
    one.run(one.tick().run_requests[0])
    instance.add_dynamic_partitions(partitions_name(one.definition), ["000000"])
    tags = {**range_tags(0, 0), **host_tags(), "embeddings_pipeline/sync": "true"}
    run = create_run_for_test(instance, job_name="films_batches", status=dg.DagsterRunStatus.STARTED, tags=tags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embeddings_pipeline.orchestration.instance.liveness.GRACE_SECONDS", 0)
        assert jobs_of(one.tick()) == ["films_batches"]
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED
