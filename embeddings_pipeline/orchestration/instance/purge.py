"""What Dagster has written goes after some days: runs with their events, and the files of what they printed."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.cache import sweep
from embeddings_pipeline.orchestration.at_rest import purge_is_due, purge_mark
from embeddings_pipeline.orchestration.instance.event_log import PipelineEventLogStorage
from embeddings_pipeline.orchestration.instance.storage import StateComputeLogs
from embeddings_pipeline.store.database import open_database

ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
PAGE = 500  # runs
QUIET_TAG = "found"  # of a scan that found nothing new
NOTHING = "nothing"


@dataclass
class Purged:
    """What a purge removed. Kept are old runs that say how an asset, a partition or a check is."""

    runs: int = 0
    folders: int = 0
    kept: int = 0


def purge(instance: dg.DagsterInstance, settings: Settings, *, seconds: float | None = None) -> Purged:
    """Remove runs that ended more than `settings.keep_days` ago, with their events and log files.

    Only from the pipeline's own storage: another instance has other people's runs too. `seconds`: at most about so
    long; the rest is left to the next purge.
    """
    events, purged = instance.event_log_storage, Purged()
    if not settings.keep_days or not isinstance(events, PipelineEventLogStorage):
        return purged
    deadline = None if seconds is None else time.monotonic() + seconds
    before = datetime.now(UTC) - timedelta(days=settings.keep_days)
    newest, old = events.newest_runs(), dg.RunsFilter(statuses=ENDED, created_before=before)
    cursor: str | None = None  # the last one that was kept: from a run that is gone, Dagster finds no way on
    while True:
        records = instance.get_run_records(old, limit=PAGE, cursor=cursor, ascending=True)
        for run_id in (record.dagster_run.run_id for record in records):
            if run_id in newest:
                cursor, purged.kept = run_id, purged.kept + 1
            else:
                forget_run(instance, run_id)
                purged.runs += 1
        if len(records) < PAGE or (deadline is not None and time.monotonic() > deadline):
            break
    if purged.runs:
        events.forget_checks()
        events.make_room()
    purged.folders = _remove_strays(instance, before)
    return purged


def forget_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Delete a run, its events, and what it printed."""
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    shutil.rmtree(Path(instance.storage_directory()) / run_id, ignore_errors=True)
    instance.delete_run(run_id)


def forget_quiet_scans(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Of the scans that found nothing, keep the last one that has ended, and `run`, which is such a scan."""
    instance.add_run_tags(run.run_id, {QUIET_TAG: NOTHING})
    quiet = dg.RunsFilter(job_name=run.job_name, tags={QUIET_TAG: NOTHING}, statuses=[dg.DagsterRunStatus.SUCCESS])
    former = instance.get_run_records(quiet, limit=PAGE)[1:]
    for record in former:
        forget_run(instance, record.dagster_run.run_id)
    if former and isinstance(instance.event_log_storage, PipelineEventLogStorage):
        instance.event_log_storage.make_room()


def purge_daily(instance: dg.DagsterInstance, settings: Settings) -> None:
    """As `purge`, for some seconds, and the embedding cache is swept; unless this folder's last one was today: where no
    daemon runs the daily job.
    """
    if not purge_is_due(settings):
        return
    purge(instance, settings, seconds=5)
    sweep(open_database(settings), settings)
    done = purge_mark(settings)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def _remove_strays(instance: dg.DagsterInstance, before: datetime) -> int:
    """Folders of runs that are no longer there, as of runs that were deleted in the UI; how many."""
    removed, logs = 0, instance.compute_log_manager
    for folder in (Path(instance.storage_directory()), *([logs.folder] if isinstance(logs, StateComputeLogs) else [])):
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before.timestamp() and instance.get_run_by_id(path.name) is None:
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
    return removed
