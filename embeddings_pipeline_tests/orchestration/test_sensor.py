"""The sensor: each tick derives from state what is to be started."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import OutageError, SourceError
from embeddings_pipeline.health.activity import LIVE, activity
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.orchestration import automation
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import BulkActionStatus, InMemoryJob
from embeddings_pipeline.orchestration.instance.liveness import PROCESS_TAG, process_tags
from embeddings_pipeline.orchestration.names import automation_name, partitions_name
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.orchestration.under_way import under_way
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.session import ReadLimits
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
    later,
    make_films,
    run_batch,
    sync_once,
)

DIMENSIONS = 32


def jobs_of(result: dg.SensorResult) -> list[str]:
    return [request.job_name or "" for request in result.run_requests or []]


class Daemon:
    """What Dagster's daemon does with a tick: adds partitions, and launches the runs it asks for."""

    def __init__(self, instance: dg.DagsterInstance, one: CollectionDefinition) -> None:
        self.instance, self.definition = instance, one
        self.definitions = build_definitions(one)

    def tick(self) -> dg.SensorResult:
        result = evaluate(self.instance, self.definition, DIMENSIONS)
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        return result

    def run(self, request: dg.RunRequest) -> bool:
        job = self.definitions.resolve_job_def(request.job_name or "")
        if request.asset_selection is not None:
            checks = set(request.asset_check_keys or ())
            job = job.get_subset(asset_selection=set(request.asset_selection), asset_check_selection=checks)
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


@pytest.mark.slow
class TestSensor:
    def test_it_brings_a_new_collection_up_to_date_and_comes_to_rest(self, database, project, daemon) -> None:
        make_films(database, films(35))
        one = daemon()
        assert jobs_of(one.tick()) == ["films_scan"]
        assert one.until_quiet() <= 4
        status = collection_status(one.definition, database, project)
        assert (status["coverage"], status["vectors"], status["faiss"]["current"]) == (1.0, 35, True)
        result = one.tick()
        assert jobs_of(result) == []
        said = result.skip_reason.skip_message
        assert (
            "batches: 4, with something to do: 0, being worked on: 0, waiting for their next try: 0" in said
            and "indexes current" in said
        )
        assert "last full scan 0 minutes ago" in said

    def test_a_map_that_is_gone_is_made_again_and_no_index(self, database, project, daemon) -> None:
        make_films(database, films(25))
        one = daemon()
        one.until_quiet()
        folder = project.state_dir / "faiss" / "films"
        generation = (folder / "CURRENT").read_text()
        (folder / "map.json").unlink()
        [request] = one.tick().run_requests or []
        assert request.job_name == "films_index"
        assert one.run(request) and one.until_quiet() == 1
        assert (folder / "map.json").is_file() and (folder / "CURRENT").read_text() == generation

    def test_a_locked_source_does_not_hold_a_tick_up(self, database, project, daemon, monkeypatch) -> None:
        monkeypatch.setattr(automation, "TICK_LIMITS", ReadLimits(lock_seconds=1, statement_seconds=5))
        make_films(database, films(5))
        execute(database, "ALTER TABLE films ADD COLUMN updated_at timestamptz DEFAULT now()")
        one = daemon(source={"table": "films", "key": ["id"], "updated_at": "updated_at"})
        one.until_quiet()
        with database.connect() as locker:
            locker.execute("LOCK TABLE films IN ACCESS EXCLUSIVE MODE")
            said = one.tick().skip_reason.skip_message
            waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'films'::regclass AND NOT granted"
            assert locker.execute(waiting).fetchone() == (0,)
        assert "another session has locked the source for more than 1 s" in said

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

    def test_a_tick_at_rest_makes_the_session_of_its_scan_and_no_other(
        self, database, project, daemon, monkeypatch
    ) -> None:
        make_films(database, films(35))
        execute(database, "ALTER TABLE films ADD COLUMN updated_at timestamptz DEFAULT now()")
        one = daemon(source={"table": "films", "key": ["id"], "updated_at": "updated_at"})
        one.until_quiet()
        made: list[str] = []
        connect = Database.connect

        def counted(self: Database, **options: Any) -> psycopg.Connection:
            made.append(self.name_and_host)
            return connect(self, **options)

        monkeypatch.setattr(Database, "connect", counted)
        assert jobs_of(one.tick()) == []
        assert len(made) == 1  # for what it stages; all else is the pool's

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
        existing = instance.get_dynamic_partitions(partitions_name(one.definition))
        assert under_way(instance, one.definition, DIMENSIONS, existing).partitions == {"000001", "000002"}
        ranges = [dict(request.tags) for request in one.tick().run_requests]
        assert ranges == [range_tags(0, 0), range_tags(3, 3)]

    def test_the_indexes_wait_for_the_batches_but_not_for_ever(self, database, project, daemon, monkeypatch) -> None:
        make_films(database, films(15))
        one = daemon()
        one.until_quiet()
        execute(database, "UPDATE films SET overview = 'x' WHERE id IN (1, 8, 9)")  # of both batches, and enough
        collection = open_collection(one.definition, project)
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 1, "run")
        collection.ledger.note_attempts([0])
        assert "indexes behind" in one.tick().skip_reason.skip_message
        built = datetime.now(UTC) - timedelta(minutes=11)
        monkeypatch.setattr(automation, "lagging_since", lambda collection: built)
        assert jobs_of(one.tick()) == ["films_index"]

    def test_batches_are_left_to_live_as_long_as_it_keeps_up(self, database, project, daemon) -> None:
        make_films(database, films(15))
        one = daemon()
        one.until_quiet()
        execute(database, "UPDATE films SET overview = 'x' WHERE id = 1")
        collection = open_collection(one.definition, project)
        collection.ledger.full_scan(collection.source)
        with activity(database, "films", LIVE):
            assert jobs_of(one.tick()) == []
            execute(database, "UPDATE embeddings.films_item SET seen_at = now() - interval '2 minutes'")
            assert jobs_of(one.tick()) == ["films_batches"]
        later(database, 3600)
        assert jobs_of(one.tick()) == ["films_batches"]

    def test_an_index_is_built_when_searches_wait_for_what_came_after_it(self, database, project, daemon) -> None:
        make_films(database, films(35))
        one = daemon()
        one.until_quiet()
        execute(database, "UPDATE films SET overview = 'x' WHERE id <= 3")
        sync_once(one.definition, project)
        assert jobs_of(one.tick()) == []
        execute(database, "UPDATE films SET overview = 'y' WHERE id = 4")
        sync_once(one.definition, project)
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

    @pytest.mark.parametrize(
        "damage", ["DROP INDEX {index}", "UPDATE embeddings.collection SET version = version + 5001"]
    )
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
        assert automation_name(definition(name="items"), "new_rows_sensor") == "new_rows_sensor"
        repository = build_definitions(definition()).get_repository_def()
        assert {sensor.name for sensor in repository.sensor_defs} == {"films_new_rows_sensor", "films_failure_alerts"}
        assert {one.name for one in repository.schedule_defs} == {"films_daily_refresh", "films_recent_refresh"}


def test_runs_of_a_dead_sync_are_ended_by_the_tick(database, project, daemon, instance) -> None:
    make_films(database, films(5))
    one = daemon()
    one.run(one.tick().run_requests[0])
    instance.add_dynamic_partitions(partitions_name(one.definition), ["000000"])
    run = create_run_for_test(
        instance, job_name="films_batches", status=dg.DagsterRunStatus.STARTED, tags=range_tags(0, 0)
    )
    noted = json.loads(process_tags(run.run_id)[PROCESS_TAG])
    instance.add_run_tags(run.run_id, {PROCESS_TAG: json.dumps({**noted, "pid": 2**22 + 1})})
    assert jobs_of(one.tick()) == ["films_batches"]
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED
