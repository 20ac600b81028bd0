"""Runs in processes of the code server, as Dagster's default; and whether such a process still lives.

When the code server dies with its runs, or a process that runs in-process is killed, nobody reports the end: the run
would say STARTED, and hold its place in the pools, for ever.
"""

import socket
from collections.abc import Sequence

import psutil
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DefaultRunLauncher, EventLogEntry
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, WorkerStatus

from embeddings_pipeline.config.settings import load_settings

# Which machine (or container) a run's process is on: process ids mean nothing elsewhere.
HOST_TAG = "embeddings_pipeline/host"
CLOCK_SECONDS = 2.0  # psutil computes a process's start from the boot time, which moves a little


def host_tags() -> dict[str, str]:
    """Tags for a run that this machine executes, so that `worker_alive` can judge it."""
    return {HOST_TAG: socket.gethostname()}


def worker_alive(instance: DagsterInstance, run: DagsterRun) -> bool | None:
    """Whether the process that executes the run lives; None where that cannot be known from here."""
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


class WatchedRunLauncher(DefaultRunLauncher):
    """The default launcher, whose runs fail within seconds when their process has gone (Dagster's run monitoring)."""

    def launch_run(self, context: LaunchRunContext) -> None:
        self._instance.add_run_tags(context.dagster_run.run_id, host_tags())
        super().launch_run(context)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        # What cannot be known counts as running: a failure would start the run a second time beside the first.
        if worker_alive(self._instance, run) is False:
            return CheckRunHealthResult(WorkerStatus.FAILED, "the process that executed the run has gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
