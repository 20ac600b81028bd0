"""`sync` through Dagster: its runs, what the UI will show of them, crashes, and two at once."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RunFailed
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.instance.liveness import RunWatch, cancel_dead_runs
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.pipeline import embed
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    committed,
    definition,
    execute,
    films,
    make_films,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_sync(project: Settings, instance: dg.DagsterInstance) -> Callable[..., SyncResult]:
    def run(**options: object) -> SyncResult:
        attributes = options.pop("attributes", {})
        one = definition(**attributes)  # type: ignore[arg-type]
        return sync(one, project, instance=instance, **options)  # type: ignore[arg-type]

    return run


def start_sync(seconds_per_call: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "embeddings_pipeline_tests.support.sync_process", str(seconds_per_call)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_first_sync_covers_all_and_a_second_does_nothing(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
) -> None:
    make_films(database, films(35))
    first = run_sync()
    assert (first.scanned, first.new, first.embedded, first.reused) == (35, 35, 35, 0)
    status = collection_status(definition(), database, project)
    assert (status["items"], status["vectors"], status["coverage"], status["dirty_batches"]) == (35, 35, 1.0, 0)
    assert status["faiss"]["current"] and status["faiss"]["vectors"] == 35
    assert [index["method"] for index in status["pgvector_index"]] == ["hnsw"]
    assert first.indexed == ["pgvector (hnsw)", "FAISS", "map"]
    runs = len(instance.get_runs())
    second = run_sync()
    assert not second.indexed
    assert (second.scanned, second.new, second.changed, second.embedded, second.reused) == (35, 0, 0, 0, 0)
    assert len(instance.get_runs()) == runs + 1, "nothing to do is one run, the scan"


def test_progress_is_in_texts_and_moves_within_a_batch(
    database: Database, run_sync: Callable[..., SyncResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "FIRST_TEXTS", 4)
    monkeypatch.setattr(embed, "TEXTS_AT_ONCE", 3)
    make_films(database, films(25))
    told: list[tuple[str, int, int]] = []
    run_sync(progress=lambda *far: told.append(far))
    embedding = [(done, total) for phase, done, total in told if phase == "embedding" and total]
    done = [texts for texts, _ in embedding]
    assert done == sorted(done) and {4, 8, 12, 16} <= set(done)
    assert embedding[-1] == (25, 25)
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["scanning", "reading", "embedding", "commit", "indexing"]

    execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3; UPDATE films SET revenue = 0 WHERE id > 3")
    told.clear()
    run_sync(progress=lambda *far: told.append(far))
    assert [far for far in told if far[0] == "embedding"][-1] == ("embedding", 1, 1)  # 24 keep their vectors


def test_every_partition_shows_its_own_numbers(
    database: Database, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
) -> None:
    make_films(database, films(13))
    run_sync()
    numbers = {}
    for asset in ("raw_items", "item_texts", "embeddings_32", "pgvector_table"):
        records = instance.fetch_materializations(dg.AssetKey(["films", asset]), limit=10).records
        numbers[asset] = {r.partition_key: r.asset_materialization.metadata for r in records}  # type: ignore[union-attr]
    assert {key: m["rows"].value for key, m in numbers["raw_items"].items()} == {"000000": 10, "000001": 3}
    assert {key: m["texts"].value for key, m in numbers["item_texts"].items()} == {"000000": 10, "000001": 3}
    assert {key: m["embedded"].value for key, m in numbers["embeddings_32"].items()} == {"000000": 10, "000001": 3}
    assert {key: m["inserted"].value for key, m in numbers["pgvector_table"].items()} == {"000000": 10, "000001": 3}


def test_edits_new_rows_and_deletes_arrive_in_one_sync(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(30))
    run_sync()
    execute(database, "UPDATE films SET overview = 'edited' WHERE id = 5")
    execute(database, "UPDATE films SET revenue = 1 WHERE id = 6")
    execute(database, "DELETE FROM films WHERE id = 7")
    execute(database, "INSERT INTO films VALUES (31, 'New', 'film', 0)")
    done = run_sync()
    assert (done.new, done.changed, done.deleted, done.embedded) == (1, 2, 1, 2)
    there = committed(database)
    assert there["5"][0] == "Film 5 | edited" and there["6"][2]["revenue"] == 1
    assert "7" not in there and "31" in there
    status = collection_status(definition(), database, project)
    assert status["coverage"] == 1.0 and status["faiss"]["vectors"] == 30 and status["faiss"]["current"]


def test_a_dry_run_counts_and_writes_nothing(
    database: Database, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
) -> None:
    make_films(database, films(15))
    looked = run_sync(dry_run=True)
    assert (looked.new, looked.left, looked.embedded) == (15, 15, 0)
    assert execute(database, "SELECT to_regclass('embeddings.films_item')") == [(None,)]
    assert instance.get_runs() == []
    run_sync()
    execute(database, "UPDATE films SET overview = 'edited' WHERE id <= 2; UPDATE films SET revenue = 0 WHERE id = 3")
    looked = run_sync(dry_run=True)
    assert (looked.changed, looked.left, looked.reused) == (3, 2, 8)  # of the batch that they are in
    assert run_sync(dry_run=True, force=True).left == 15


def test_limit_stops_the_sync_and_the_next_one_goes_on(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(25))
    assert run_sync(limit=12).embedded == 12
    assert collection_status(definition(), database, project)["missing"] == 13
    rest = run_sync()
    assert (rest.embedded, collection_status(definition(), database, project)["coverage"]) == (13, 1.0)


def test_force_encodes_all_anew(database: Database, run_sync: Callable[..., SyncResult]) -> None:
    make_films(database, films(12))
    run_sync()
    assert run_sync(force=True).embedded == 12


def test_a_failing_batch_is_one_line_and_the_next_sync_mends_it(
    database: Database, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(5))
    DeterministicEncoder.fail_on = " "
    with pytest.raises(RunFailed, match="a text holds ' '") as failure:
        run_sync()
    assert "\n" not in str(failure.value)
    assert execute(database, "SELECT attempts, next_try IS NOT NULL FROM embeddings.batch") == [(1, True)]
    DeterministicEncoder.reset()
    assert run_sync().embedded == 5
    assert execute(database, "SELECT attempts, next_try FROM embeddings.batch") == [(0, None)]


def test_a_refused_scan_is_one_line_and_deletes_nothing(
    database: Database, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(10))
    run_sync()
    execute(database, "TRUNCATE films")
    with pytest.raises(RunFailed, match=r"10 of 10 items are gone .*--allow-deletes"):
        run_sync()
    assert len(committed(database)) == 10
    assert run_sync(allow_deletes=True).deleted == 10
    assert committed(database) == {}


def test_what_was_deleted_by_hand_is_repaired(database: Database, run_sync: Callable[..., SyncResult]) -> None:
    make_films(database, films(10))
    run_sync()
    [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
    execute(database, f"DELETE FROM embeddings.{table} WHERE text_id < 4")
    run_sync()
    assert len(committed(database)) == 10


@pytest.mark.slow
def test_a_sync_that_was_killed_leaves_nothing_to_wait_for(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
) -> None:
    make_films(database, films(40))
    killed = start_sync(seconds_per_call=20)
    embedding = dg.AssetKey(["films", "embeddings_32"])

    def encoding() -> bool:
        pools = instance.event_log_storage.get_concurrency_keys()
        return any(instance.event_log_storage.get_concurrency_info(pool).active_slot_count for pool in pools)

    wait_until(encoding)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    started = time.monotonic()
    done = run_sync()
    assert time.monotonic() - started < 20
    assert done.embedded == 40 and len(committed(database)) == 40
    assert instance.get_latest_materialization_event(embedding) is not None
    assert {run.status for run in instance.get_runs()} <= {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED}
    assert sum(run.status == dg.DagsterRunStatus.CANCELED for run in instance.get_runs()) == 1


@pytest.mark.slow
def test_a_sync_goes_on_when_the_one_it_waits_for_is_killed(
    database: Database, project: Settings, instance: dg.DagsterInstance
) -> None:
    make_films(database, films(40))
    storage = instance.event_log_storage
    killed = start_sync(seconds_per_call=60)
    wait_until(lambda: any(storage.get_concurrency_info(p).active_slot_count for p in storage.get_concurrency_keys()))
    waiting = start_sync()
    wait_until(lambda: any(storage.get_concurrency_info(p).pending_step_count for p in storage.get_concurrency_keys()))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.wait(timeout=60) == 0
    assert len(committed(database)) == 40


@pytest.mark.slow
def test_a_living_run_that_lost_its_lock_is_left_alone(
    database: Database, project: Settings, instance: dg.DagsterInstance
) -> None:
    make_films(database, films(10))
    running = start_sync(seconds_per_call=3)
    storage = instance.event_log_storage
    wait_until(lambda: any(storage.get_concurrency_info(p).active_slot_count for p in storage.get_concurrency_keys()))
    execute(  # as a PostgreSQL that is killed and started again does
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'embeddings-pipeline run%'",
    )
    assert cancel_dead_runs(instance, database, RunWatch()) == []
    assert running.wait(timeout=60) == 0
    assert len(committed(database)) == 10


@pytest.mark.slow
def test_two_syncs_at_once_end_in_the_same_state(database: Database, project: Settings) -> None:
    make_films(database, films(60))
    syncs = [start_sync(seconds_per_call=0.2) for _ in range(2)]
    for one in syncs:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
        assert "'scanned': 60" in out
    status = collection_status(definition(), database, project)
    assert (status["items"], status["vectors"], status["coverage"], status["orphans"]) == (60, 60, 1.0, 0)
    assert status["faiss"]["current"]
    assert execute(database, "SELECT count(DISTINCT item_key) FROM embeddings.films") == [(60,)]


class TestLaunchpad:
    """Runs as the launchpad starts them: chosen assets, one partition, configuration."""

    @pytest.fixture
    def launch(self, database: Database, project: Settings) -> Callable[..., dg.ExecuteInProcessResult]:
        make_films(database, films(15))
        job = build_definitions(definition()).resolve_implicit_global_asset_job_def()
        ephemeral = dg.DagsterInstance.ephemeral()

        def run(*names: str, partition: str | None = None, **config: object) -> dg.ExecuteInProcessResult:
            ops = {"films__embeddings_32": {"config": config}} if config else {}
            return job.execute_in_process(
                asset_selection=[dg.AssetKey(["films", name]) for name in names],
                partition_key=partition,
                instance=ephemeral,
                run_config={"ops": ops},
                raise_on_error=False,
            )

        return run

    def test_step_by_step_in_runs_of_their_own(
        self, database: Database, launch: Callable[..., dg.ExecuteInProcessResult]
    ) -> None:
        assert launch("item_ledger").success
        for name in ("raw_items", "item_texts", "embeddings_32", "pgvector_table"):
            assert launch(name, partition="000001").success
        assert len(committed(database)) == 5
        assert launch("pgvector_index", "faiss_index").success

    def test_a_dry_run_materializes_nothing(
        self, database: Database, launch: Callable[..., dg.ExecuteInProcessResult]
    ) -> None:
        launch("item_ledger")
        done = launch("raw_items", "item_texts", "embeddings_32", "pgvector_table", partition="000000", dry_run=True)
        assert done.success
        made = {event.asset_key.path[-1] for event in done.get_asset_materialization_events() if event.asset_key}
        assert made == {"raw_items", "item_texts"}
        assert committed(database) == {}

    def test_a_step_without_the_one_before_says_what_to_do(
        self, launch: Callable[..., dg.ExecuteInProcessResult]
    ) -> None:
        launch("item_ledger")
        done = launch("embeddings_32", partition="000000")
        [failure] = [event for event in done.all_events if event.is_step_failure]
        description = failure.step_failure_data.user_failure_data.description
        assert "batch 0: the lake has no item_texts of it; materialize item_texts first" in description


class TestChecks:
    def evaluate(self, database: Database, project: Settings, instance: dg.DagsterInstance) -> dict[str, bool]:
        definitions = build_definitions(definition())
        done = definitions.resolve_job_def("films_index").execute_in_process(instance=instance)
        return {e.check_name: e.passed for e in done.get_asset_check_evaluations()}

    def test_all_is_green_after_a_sync_and_each_check_notices_its_damage(
        self, database: Database, project: Settings, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
    ) -> None:
        make_films(database, films(12))
        run_sync()
        good = dict.fromkeys(("coverage", "integrity", "quarantine", "truncation", "freshness", "index_parity"), True)
        assert self.evaluate(database, project, instance) == good
        table = f"embeddings.{open_collection(definition(), project).model.destination.name}"
        execute(database, f"UPDATE {table} SET embedding = (embedding + embedding)::halfvec(32) WHERE text_id = 2")
        assert self.evaluate(database, project, instance)["integrity"] is False
        execute(database, f"DELETE FROM {table} WHERE text_id = 2")
        assert self.evaluate(database, project, instance)["coverage"] is False

    def test_all_equal_vectors_are_noticed(
        self, database: Database, project: Settings, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
    ) -> None:
        make_films(database, films(12))
        run_sync()
        table = f"embeddings.{open_collection(definition(), project).model.destination.name}"
        execute(database, f"UPDATE {table} SET embedding = (SELECT embedding FROM {table} LIMIT 1)")
        assert self.evaluate(database, project, instance)["integrity"] is False


@pytest.mark.parametrize("file", ["manifest.json", "base.faiss"])
def test_a_damaged_faiss_index_is_built_again(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult], file: str
) -> None:
    make_films(database, films(12))
    run_sync()
    folder = project.state_dir / "faiss" / "films"
    damaged = folder / (folder / "CURRENT").read_text().strip() / file
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")
    run_sync()
    assert open_index(project.state_dir / "faiss", "films").manifest.count == 12
    assert collection_status(definition(), database, project)["faiss"]["current"]


def test_a_profile_that_made_no_vector_yet_can_be_changed(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(3))
    broken = {**PROFILE, "name": "typo", "model": "no_such_module:Encoder"}
    with pytest.raises(RunFailed, match="no_such_module"):
        run_sync(attributes={"profile": broken, "storage": "vector"})
    assert run_sync().embedded == 3
    assert collection_status(definition(), database, project)["profile"] == "test"


def test_another_declared_profile_changes_no_vector_and_is_named(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult], caplog: pytest.LogCaptureFixture
) -> None:
    make_films(database, films(4))
    run_sync()
    before = committed(database)
    other = {**PROFILE, "name": "other", "dimensions": 64}
    collection = open_collection(definition(profile=other), project)
    assert collection.warning and "'other'" in collection.warning and "'test'" in collection.warning
    assert collection.profile == replace(collection.profile, name="test", dimensions=32)
    run_sync(attributes={"profile": other})
    assert committed(database) == before


def test_a_full_sync_that_fails_says_why_and_still_runs_every_check(
    database: Database, project: Settings, run_sync: Callable[..., SyncResult], instance: dg.DagsterInstance
) -> None:
    make_films(database, films(5))
    run_sync()
    execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
    with pytest.raises(RunFailed, match="names a column 'title'"):
        run_sync(full=True)
    assert instance.get_runs(dg.RunsFilter(job_name="films_audit"))
