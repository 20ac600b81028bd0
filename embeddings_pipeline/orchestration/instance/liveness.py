"""Whether the process that executes a run still lives, and an end for runs whose process is gone (rule 11).

When the code server dies with its runs, or a process that runs in-process is killed, nobody reports the end: the run
would say STARTED, and hold its place in the pools, for ever.

A run itself notes its process: which machine, which space of process numbers on it, which number in that space. Only
who is in the same space can look. Anybody else has the run's lock to go by.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import psycopg
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from embeddings_pipeline.orchestration.dagster_internals import GRPC_INFO_TAG
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_locked

# The UI's list of runs shows no tag that begins with `.dagster/`.
SYNC_TAG = ".dagster/embeddings_pipeline_sync"  # of a run in the process of a `sync`, which no launcher started
PROCESS_TAG = ".dagster/embeddings_pipeline_process"  # what the run's process noted of itself
LAUNCHER_TAG = (
    ".dagster/embeddings_pipeline_launched_from"  # where the launcher was, which need not be where the run is
)
# A run of which no more can be known than that its lock is free: dead after so long. A living one takes its lock again
# seconds after it has lost it.
UNKNOWN_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """Where process numbers mean something: a machine since its last start, and a PID namespace of it."""

    host: str
    boot: str
    pid_namespace: str


@dataclass(frozen=True)
class RunProcess:
    """What a run noted of its process. Retries and re-executions copy tags, so it says of which run."""

    run_id: str
    place: Place | None
    pid: int
    started: str  # as `_started` says it


def this_place() -> Place | None:
    """Where this process is; None if the numbers in /proc are those of another PID namespace than its own."""
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Place(socket.gethostname(), boot, str(Path("/proc/self/ns/pid").readlink()))
    except OSError:  # not Linux, or a sandbox that is a machine of its own
        return Place(socket.gethostname(), "", "")


def process_tags(run_id: str) -> dict[str, str]:
    """Tags by which a run says that this process executes it."""
    pid = os.getpid()
    return {PROCESS_TAG: json.dumps(asdict(RunProcess(run_id, this_place(), pid, _started(pid) or "")))}


def launcher_tags() -> dict[str, str]:
    """Tags of a run that is launched from here."""
    place = this_place()
    return {LAUNCHER_TAG: json.dumps(asdict(place))} if place else {}


class RunWatch:
    """Judges runs. Of those of which nothing but the lock can be seen it remembers since when it was free."""

    def __init__(self) -> None:
        self._free_since: dict[str, float] = {}

    def is_dead(self, instance: DagsterInstance, connection: psycopg.Connection, run: DagsterRun) -> bool:
        """Whether the run's process is gone for certain, or its lock has been free for `UNKNOWN_SECONDS`."""
        if run_locked(connection, run.run_id):
            self._free_since.pop(run.run_id, None)
            return False
        noted = noted_process(run)
        alive = _lives(noted) if noted else _launched_process_lives(instance, run)
        if alive is not None or noted is None:  # a run that has noted nothing may be none of ours, without a lock
            return alive is False
        now = time.monotonic()
        return now - self._free_since.setdefault(run.run_id, now) > UNKNOWN_SECONDS

    def forget_others(self, run_ids: set[str]) -> None:
        """Keep nothing of runs but these."""
        self._free_since = {run_id: since for run_id, since in self._free_since.items() if run_id in run_ids}


def noted_process(run: DagsterRun) -> RunProcess | None:
    """What the run's own process noted."""
    try:
        noted = json.loads(run.tags[PROCESS_TAG])
        place = None if noted["place"] is None else Place(**noted["place"])
        process = RunProcess(**{**noted, "place": place})
    except (KeyError, TypeError, ValueError):  # nothing, or another version's
        return None
    return process if process.run_id == run.run_id else None


def _lives(process: RunProcess) -> bool | None:
    """Whether it lives; None if that cannot be known from here."""
    if process.place is None or process.place != this_place():
        return None
    if not psutil.pid_exists(process.pid):  # it asks the kernel: /proc may hide other users' processes
        return False
    started = _started(process.pid)
    if started is None:
        return None if psutil.pid_exists(process.pid) else False
    return started == process.started


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did, which no clock that is set changes; or that it is a
    zombie. None if it is gone, or not to be seen.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "zombie" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:  # not Linux
        process = psutil.Process(pid)
        return "zombie" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def _launched_process_lives(instance: DagsterInstance, run: DagsterRun) -> bool | None:
    """Of a run that has not noted its process: whether the one that Dagster names lives. None unless its code server is
    a child of a launcher that was here.
    """
    try:
        here = Place(**json.loads(run.tags[LAUNCHER_TAG])) == this_place()
        child = "socket" in json.loads(run.tags[GRPC_INFO_TAG])
    except (KeyError, TypeError, ValueError):
        return None
    if not (here and child):
        return None
    for entry in reversed(instance.all_logs(run.run_id, of_type=DagsterEventType.ENGINE_EVENT)):
        if entry.step_key is None and entry.dagster_event is not None:  # steps may have processes of their own
            pid = entry.dagster_event.engine_event_data.metadata.get("pid")
            if pid is not None and str(pid.value).isdigit():
                number = int(str(pid.value))
                return psutil.pid_exists(number) and _started(number) != "zombie"
    return None


def cancel_dead_runs(instance: DagsterInstance, database: Database, watch: RunWatch) -> list[str]:
    """End runs that say they are under way though their process is gone, and free their places in the pools."""
    open_statuses = [
        DagsterRunStatus.NOT_STARTED,
        DagsterRunStatus.STARTING,
        DagsterRunStatus.STARTED,
        DagsterRunStatus.CANCELING,
    ]
    dead = []
    runs = [record.dagster_run for record in instance.get_run_records(RunsFilter(statuses=open_statuses))]
    watch.forget_others({run.run_id for run in runs})
    with database.session() as connection:
        for run in runs:
            if not watch.is_dead(instance, connection, run):
                continue
            instance.report_run_canceled(run, message="Its process is gone: ended by a later sync.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            dead.append(run.run_id)
    _free_places_of_ended_runs(instance, {run.run_id for run in runs} - set(dead))
    return dead


def _free_places_of_ended_runs(instance: DagsterInstance, open_runs: set[str]) -> None:
    """A process that is killed while the database takes its place in a pool gets it after its run has been ended."""
    storage = instance.event_log_storage
    pools = [storage.get_concurrency_info(key) for key in storage.get_concurrency_keys()]
    holding = {step.run_id for pool in pools for step in pool.claimed_slots}
    waiting = {step.run_id for pool in pools for step in pool.pending_steps}
    for run_id in (holding | waiting) - open_runs:
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
