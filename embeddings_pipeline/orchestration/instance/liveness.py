"""Whether the process that executes a run still lives, and an end for runs whose process is gone (rule 11).

When the code server dies with its runs, or a process that runs in-process is killed, nobody reports the end: the run
would say STARTED, and hold its place in the pools, for ever.
"""

import socket
import time
from collections.abc import Sequence

import psutil
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry, RunsFilter

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_locked

SYNC_TAG = "embeddings_pipeline/sync"  # of a run in the process of a `sync`, which no launcher started
GRACE_SECONDS = 10  # a run that has just been started may not have named its process yet
# Which machine (or container) a run's process is on: process ids mean nothing elsewhere.
HOST_TAG = "embeddings_pipeline/host"
CLOCK_SECONDS = 2.0  # psutil computes a process's start from the boot time, which moves a little


def host_tags() -> dict[str, str]:
    """Tags for a run that this machine executes, so that `worker_alive` can judge it."""
    return {HOST_TAG: socket.gethostname()}


def worker_alive(instance: DagsterInstance, run: DagsterRun) -> bool | None:
    """Whether the process that executes the run lives; None if that cannot be known from here."""
    host = run.tags.get(HOST_TAG)
    if host is None and load_settings().database_url:
        return None  # a database of several machines, and it was started by other means
    if host is not None and host != socket.gethostname():
        return None
    started = _process_of(instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT))
    if started is None:
        return None
    pid, when = started
    try:
        process = psutil.Process(pid)
        # A process that began after it had reported the run's start is another one with the same number.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= when + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None


def _process_of(events: Sequence[EventLogEntry]) -> tuple[int, float] | None:
    """Process id and time of the run's own last start; steps may have processes of their own."""
    for entry in reversed(events):
        if entry.step_key is None and entry.dagster_event is not None:
            pid = entry.dagster_event.engine_event_data.metadata.get("pid")
            if pid is not None and str(pid.value).isdigit():
                return int(str(pid.value)), entry.timestamp
    return None


def cancel_dead_runs(instance: DagsterInstance, database: Database) -> list[str]:
    """End runs that say they are under way though their process is gone, and free their places in the pools."""
    open_statuses = [
        DagsterRunStatus.NOT_STARTED,
        DagsterRunStatus.STARTING,
        DagsterRunStatus.STARTED,
        DagsterRunStatus.CANCELING,
    ]
    dead = []
    with database.connect(autocommit=True) as connection:
        for record in instance.get_run_records(RunsFilter(statuses=open_statuses)):
            run = record.dagster_run
            if run_locked(connection, run.run_id):
                continue
            if SYNC_TAG not in run.tags and run.status == DagsterRunStatus.NOT_STARTED:
                continue  # in the queue, or about to be launched
            alive = worker_alive(instance, run)  # a PostgreSQL that was killed took the locks of the living with it
            if alive is None and SYNC_TAG not in run.tags and run.status != DagsterRunStatus.STARTED:
                continue  # on another machine, which may take minutes to start
            age = time.time() - (record.start_time or record.create_timestamp.timestamp())
            if alive or (alive is None and age < GRACE_SECONDS):
                continue
            instance.report_run_canceled(run, message="Its process is gone: ended by a later sync.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            dead.append(run.run_id)
    return dead
