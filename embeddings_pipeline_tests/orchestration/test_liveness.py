"""A living run is never taken for a dead one, by any machine; a dead one holds nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import dagster as dg
import psutil
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.dagster_internals import GRPC_INFO_TAG, WorkerStatus
from embeddings_pipeline.orchestration.instance import liveness
from embeddings_pipeline.orchestration.instance.launcher import WatchedRunLauncher
from embeddings_pipeline.orchestration.instance.liveness import (
    PROCESS_TAG,
    RunProcess,
    RunWatch,
    cancel_dead_runs,
    launcher_tags,
    noted_process,
    process_tags,
    this_place,
)
from embeddings_pipeline.orchestration.resources import known_to_live
from embeddings_pipeline.store import locks
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_lock, run_locked
from embeddings_pipeline_tests.support.dagster_internals import EngineEventData, create_run_for_test
from embeddings_pipeline_tests.support.workbench import execute, wait_until

STARTED = dg.DagsterRunStatus.STARTED
KILL_SESSIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'embeddings-pipeline run%'"
)

# Executes a run: notes its process, takes the run's lock, and waits for ever.
WORKER = """
import sys, time
import dagster as dg
from embeddings_pipeline.orchestration.resources import known_to_live

with dg.DagsterInstance.get() as instance, known_to_live(instance, sys.argv[1]):
    print("waiting", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    return create_run_for_test(instance, job_name="films_batches", status=STARTED)


def again(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRun:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


def note(instance: dg.DagsterInstance, run: dg.DagsterRun, process: RunProcess) -> dg.DagsterRun:
    """The run, as a process somewhere else would have noted itself."""
    instance.add_run_tags(run.run_id, {PROCESS_TAG: json.dumps({**vars(process), "place": vars(process.place)})})
    return again(instance, run)


def own_process(run: dg.DagsterRun) -> RunProcess:
    """What this process notes of itself."""
    process = noted_process(replace_tags(run, process_tags(run.run_id)))
    assert process is not None
    return process


def replace_tags(run: dg.DagsterRun, tags: dict[str, str]) -> dg.DagsterRun:
    return run.with_tags({**run.tags, **tags})


def worker(run: dg.DagsterRun, *before: str) -> "subprocess.Popen[str]":
    """A process that executes the run, with `before` in front of its command."""
    command = [*before, sys.executable, "-c", WORKER, run.run_id]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    return process


def health(instance: dg.DagsterInstance, run: dg.DagsterRun) -> WorkerStatus:
    return instance.run_launcher.check_run_worker_health(run).status


@pytest.mark.slow
def test_the_run_of_a_killed_process_is_known_to_be_dead(database, instance, run) -> None:
    executing = worker(run)
    assert health(instance, again(instance, run)) == WorkerStatus.RUNNING
    executing.kill()
    executing.wait()
    wait_until(lambda: health(instance, again(instance, run)) == WorkerStatus.FAILED, 10)
    assert cancel_dead_runs(instance, database, RunWatch()) == [run.run_id]


def test_a_place_that_an_ended_run_got_after_its_end_is_free_again(database, instance, run) -> None:
    storage = instance.event_log_storage
    storage.set_concurrency_slots("encoder", 1)
    instance.report_run_canceled(run)
    assert storage.claim_concurrency_slot("encoder", run.run_id, "step").is_claimed
    other = create_run_for_test(instance, job_name="films_batches", status=dg.DagsterRunStatus.STARTED)
    assert not storage.claim_concurrency_slot("encoder", other.run_id, "step").is_claimed
    assert cancel_dead_runs(instance, database, RunWatch()) == []
    assert storage.claim_concurrency_slot("encoder", other.run_id, "step").is_claimed
    cancel_dead_runs(instance, database, RunWatch())
    assert storage.get_concurrency_info("encoder").active_run_ids == {other.run_id}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="it needs root, and unshare")
def test_a_run_in_another_container_is_judged_by_its_lock_alone(database, instance, run, monkeypatch) -> None:
    executing = worker(run, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    try:
        noted, watch = noted_process(again(instance, run)), RunWatch()
        assert noted is not None and noted.place != this_place()
        monkeypatch.setattr(liveness, "UNKNOWN_SECONDS", 0.0)
        for _ in range(3):
            assert health(instance, again(instance, run)) == WorkerStatus.RUNNING
            assert cancel_dead_runs(instance, database, watch) == []
            time.sleep(0.01)
    finally:
        executing.kill()
        executing.wait()
    wait_until(lambda: cancel_dead_runs(instance, database, watch) == [run.run_id], 10)


def test_a_lock_that_is_held_outweighs_all_that_is_noted(database, instance, run) -> None:
    gone = replace(own_process(run), pid=2**22 + 1)
    with run_lock(database, run.run_id):
        assert cancel_dead_runs(instance, database, RunWatch()) == []
        note(instance, run, gone)
        assert cancel_dead_runs(instance, database, RunWatch()) == []
        assert health(instance, again(instance, run)) == WorkerStatus.RUNNING
    assert cancel_dead_runs(instance, database, RunWatch()) == [run.run_id]


def test_a_process_here_lives_without_its_lock_whatever_the_clock_says(database, instance, run, monkeypatch) -> None:
    note(instance, run, own_process(run))
    monkeypatch.setattr(liveness, "UNKNOWN_SECONDS", 0.0)
    monkeypatch.setattr(psutil, "boot_time", lambda: time.time() + 3600)
    assert cancel_dead_runs(instance, database, RunWatch()) == []


def test_a_number_that_another_process_has_now_counts_as_dead(database, instance, run) -> None:
    note(instance, run, replace(own_process(run), started="1"))
    assert cancel_dead_runs(instance, database, RunWatch()) == [run.run_id]


@pytest.mark.parametrize("part", ["host", "boot", "pid_namespace"])
def test_what_cannot_be_known_lives_until_its_time_limit(database, instance, run, part, monkeypatch) -> None:
    own = own_process(run)
    assert own.place is not None
    note(instance, run, replace(own, place=replace(own.place, **{part: "another"}), pid=2**22 + 1))
    watch, now = RunWatch(), [1000.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    assert cancel_dead_runs(instance, database, watch) == []
    now[0] += liveness.UNKNOWN_SECONDS - 1
    with run_lock(database, run.run_id):  # it was lost, and is taken again
        assert cancel_dead_runs(instance, database, watch) == []
    now[0] += 2
    assert cancel_dead_runs(instance, database, watch) == []
    now[0] += liveness.UNKNOWN_SECONDS + 1
    assert cancel_dead_runs(instance, database, watch) == [run.run_id]


def test_a_retry_is_not_judged_by_what_its_parent_noted(database, instance, run, monkeypatch) -> None:
    gone = note(instance, run, replace(own_process(run), pid=2**22 + 1))
    retry = create_run_for_test(instance, job_name="films_batches", status=STARTED, tags=dict(gone.tags))
    monkeypatch.setattr(liveness, "UNKNOWN_SECONDS", -1.0)
    assert cancel_dead_runs(instance, database, RunWatch()) == [run.run_id]
    assert again(instance, retry).status == STARTED


def test_a_run_that_never_takes_a_lock_is_none_of_ours(database, instance, run, monkeypatch) -> None:
    monkeypatch.setattr(liveness, "UNKNOWN_SECONDS", -1.0)
    assert cancel_dead_runs(instance, database, RunWatch()) == []
    assert health(instance, run) == WorkerStatus.RUNNING


@pytest.mark.parametrize(("info", "status"), [("socket", WorkerStatus.FAILED), ("port", WorkerStatus.RUNNING)])
def test_a_run_that_died_before_it_noted_anything_is_known_if_its_code_server_is_a_child(
    instance, run, info, status
) -> None:
    """A code server that is reached by a port may be anywhere, and its process numbers mean nothing here."""
    instance.report_engine_event("Started process", run, EngineEventData.in_process(2**22 + 1))
    assert health(instance, run) == WorkerStatus.RUNNING
    instance.add_run_tags(run.run_id, {**launcher_tags(), GRPC_INFO_TAG: json.dumps({"host": "localhost", info: "1"})})
    assert health(instance, again(instance, run)) == status


def test_without_a_database_a_run_counts_as_running(instance, run, monkeypatch) -> None:
    note(instance, run, replace(own_process(run), pid=2**22 + 1))
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    launcher = WatchedRunLauncher()
    launcher.register_instance(instance)
    assert launcher.check_run_worker_health(again(instance, run)).status == WorkerStatus.RUNNING


def test_a_run_takes_its_lock_again_when_it_has_lost_it(
    database: Database, project: Settings, instance: dg.DagsterInstance, run: dg.DagsterRun, monkeypatch
) -> None:
    monkeypatch.setattr(locks, "RUN_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(locks, "RUN_LOCK_AGAIN_SECONDS", 0.05)

    def held() -> bool:
        with database.connect(autocommit=True) as connection:
            return run_locked(connection, run.run_id)

    with known_to_live(instance, run.run_id):
        for _ in range(2):
            assert execute(database, KILL_SESSIONS) == [(True,)]  # as a PostgreSQL that is started again does
            wait_until(held, 10)
    assert not held()


@pytest.fixture
def no_own_proc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where /proc is another PID namespace's: `unshare --pid` without `--mount-proc`."""
    pid = os.getpid()
    monkeypatch.setattr(liveness.os, "getpid", lambda: pid + 1)
    yield


def test_numbers_of_another_namespaces_proc_say_nothing(database, instance, run, no_own_proc) -> None:
    assert this_place() is None
    instance.add_run_tags(run.run_id, process_tags(run.run_id))
    assert cancel_dead_runs(instance, database, RunWatch()) == []
