"""`sync`: scan, then every dirty batch, then the indexes, as Dagster runs in this process."""

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import dagster as dg
import psycopg
import sqlalchemy.exc
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run_iterator
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    REPOSITORY_LABEL_TAG,
)
from dagster._core.utils import make_new_run_id
from dagster._utils.error import SerializableErrorInfo
from dagster_postgres.utils import DagsterPostgresException

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings, project_root
from embeddings_pipeline.errors import DatabaseError, PipelineError
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.lag import indexes_lag
from embeddings_pipeline.ledger.work import contiguous_ranges
from embeddings_pipeline.orchestration.assets import BATCHES_PER_RUN, MOST_BATCHES_PER_RUN, add_partitions, asset_key
from embeddings_pipeline.orchestration.instance.launcher import host_tags, worker_alive
from embeddings_pipeline.orchestration.instance.storage import StateComputeLogs
from embeddings_pipeline.orchestration.jobs import build_pipeline
from embeddings_pipeline.orchestration.resources import batch_done
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.steps import pending_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_lock, run_locked

log = logging.getLogger(__name__)

LOCATION = "embeddings_pipeline"  # as workspace.yaml and pyproject.toml name it
SYNC_TAG = "embeddings_pipeline/sync"
WATCH_SECONDS = 5.0
GRACE_SECONDS = 10  # a run that has just been started may not have named its process yet
STEPS = {  # what goes on once a batch has this asset; the texts of all batches are rendered in a moment
    "raw_items": "reading",
    "item_texts": "embedding",
    "embeddings": "embedding",
    "pgvector_table": "commit",
}
PASSES = 3  # rows that change while a sync runs are dirty again at once


@dataclass
class SyncResult:
    """What a sync did: items (scanned, new, changed, deleted), texts (embedded, reused, quarantined), seconds."""

    collection: str
    scanned: int = 0
    new: int = 0
    changed: int = 0
    deleted: int = 0
    embedded: int = 0
    reused: int = 0
    quarantined: int = 0
    left: int = 0  # texts that `limit` or `dry_run` left for later
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True)
class Recent:
    """Work on items first seen in the last `days` of which nothing is committed, at most `items` of them, alone."""

    days: int
    items: int


class RunFailed(PipelineError):
    """A run ended in failure; its message is the failed step's."""


def sync(
    definition: CollectionDefinition,
    settings: Settings,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    allow_deletes: bool = False,
    full: bool = False,
    recent: Recent | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    instance: dg.DagsterInstance | None = None,
) -> SyncResult:
    """Bring a collection up to date, and say what was done.

    `force` encodes every text anew; `limit` encodes at most that many; `dry_run` counts and writes nothing.
    `full` audits every copy first and runs every check last; `recent` leaves the full scan to others, and everything
    but new items. `progress(phase, done, total)` is called as batches are embedded. `instance`: Dagster's, the one of
    dagster.yaml if left out. Raises PipelineError with one line where a run failed.
    """
    started = time.perf_counter()
    result = SyncResult(definition.name, dry_run=dry_run)
    collection = open_collection(definition, settings)
    if collection.warning:
        log.warning("warning: %s", collection.warning)
    if dry_run:
        _look(collection, result, force)
    else:
        with open_instance(instance) as instance:
            _Sync(collection, instance, result, progress).run(_Options(force, limit, allow_deletes, full, recent))
    result.seconds = round(time.perf_counter() - started, 2)
    return result


@contextmanager
def open_instance(given: dg.DagsterInstance | None = None) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance, the one of dagster.yaml if none is given, for runs in this process: it prints for itself."""
    os.environ.setdefault("DAGSTER_HOME", str(project_root()))
    with nullcontext(given) if given else dg.DagsterInstance.get() as instance:
        if isinstance(instance.compute_log_manager, StateComputeLogs):
            instance.compute_log_manager.capturing = False
        try:
            yield instance
        except (DagsterPostgresException, sqlalchemy.exc.OperationalError) as error:
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            said = str(cause).strip().partition("\n")[0]
            raise DatabaseError(f"Dagster's database does not answer ({said}): start it, and try again") from error


def _look(collection: Collection, result: SyncResult, force: bool) -> None:
    found, item_keys = collection.ledger.look(collection.source, everything=force)
    result.scanned, result.new, result.changed = found.scanned, found.new, found.changed
    result.deleted = found.gone
    result.left, result.reused = pending_texts(collection, item_keys, force=force)


@dataclass(frozen=True)
class _Options:
    force: bool
    limit: int | None
    allow_deletes: bool
    full: bool
    recent: Recent | None


class JobRunner:
    """Runs a collection's jobs in this process, as runs that the UI shows."""

    def __init__(self, collection: Collection, instance: dg.DagsterInstance) -> None:
        self.collection, self.instance = collection, instance
        self.definitions = build_pipeline(collection.definition)

    def op(self, name: str) -> str:
        """The op of an asset, as runs' configuration names it."""
        return "__".join(asset_key(self.collection.definition, name).path)

    @contextmanager
    def others_watched(self) -> Iterator[None]:
        """A run that is killed while ours waits for its place in a pool must not keep us waiting."""
        done = threading.Event()
        cancel_dead_runs(self.instance, self.collection.database)

        def watch() -> None:
            while not done.wait(WATCH_SECONDS):
                with suppress(PipelineError, psycopg.Error, sqlalchemy.exc.SQLAlchemyError):  # until the next round
                    cancel_dead_runs(self.instance, self.collection.database)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()

    def execute(self, job_name: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> Mapping[str, Any]:
        """Run a job to its end; the sums of its materializations' numbers."""
        job = self.definitions.resolve_job_def(job_name)
        run_id = make_new_run_id()
        with run_lock(self.collection.database, run_id):
            run = self.instance.create_run_for_job(
                job,
                run_id=run_id,
                run_config={**config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                tags={**tags, **host_tags(), SYNC_TAG: "true", REPOSITORY_LABEL_TAG: f"__repository__@{LOCATION}"},
            )
            sums: defaultdict[str, Any] = defaultdict(int)
            failure: str | None = None
            for event in execute_run_iterator(InMemoryJob(job), run, self.instance):
                if event.is_step_materialization:
                    for name, value in event.step_materialization_data.materialization.metadata.items():
                        if isinstance(value.value, int | float) and not isinstance(value.value, bool):
                            sums[name] += value.value
                elif event.is_step_failure:
                    failure = _failure(event)
                elif event.is_failure and failure is None:
                    failure = _innermost(event.job_failure_data.error) or event.message or "the run failed"
        if failure:
            raise RunFailed(f"{failure} (run {run_id[:8]}: see it in the Dagster UI)")
        return sums


class _Sync:
    def __init__(
        self,
        collection: Collection,
        instance: dg.DagsterInstance,
        result: SyncResult,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.collection, self.instance, self.result, self.progress = collection, instance, result, progress
        self.batches = self.embedded = 0
        self.definition = collection.definition
        self.runner = JobRunner(collection, instance)
        self.size = collection.definition.attributes.items_per_batch
        self.dimensions = resolve_profile(collection.definition.declared_profile, collection.settings).dimensions

    def run(self, options: _Options) -> None:
        listening = batch_done.set(self._batch_done)
        try:
            with self.runner.others_watched():
                self._run(options)
        finally:
            batch_done.reset(listening)

    def _run(self, options: _Options) -> None:
        try:
            self._bring_up_to_date(options)
        except PipelineError:
            if options.full:  # then most of all; what failed first is what is told
                with suppress(PipelineError):
                    self._run_every_check()
            raise
        if options.full:
            self._run_every_check()

    def _run_every_check(self) -> None:
        self.progress("checking", self.embedded, self.batches)
        self.runner.execute(f"{self.definition.name}_audit", {}, {})

    def _bring_up_to_date(self, options: _Options) -> None:
        ledger, name, result = self.collection.ledger, self.definition.name, self.result
        self.progress("scanning", 0, 0)
        items = None
        if options.recent is None:
            self._scan(options.allow_deletes)
            if options.full:
                self.progress("auditing", 0, 0)
                audit(self.collection)
            else:
                ledger.repair()
            work = dict.fromkeys(ledger.batches(), self.size) if options.force else ledger.work()
        else:
            if self.definition.attributes.source.updated_at:
                found = ledger.incremental_scan(self.collection.source)
                result.scanned, result.new, result.changed = found.read, found.new, found.changed
            recent = ledger.recent_items(options.recent.days, options.recent.items)
            work = {batch: len(keys) for batch, keys in recent.items()}
            items = [key for keys in recent.values() for key in keys]

        force, limit = options.force, options.limit
        self.batches = len(work)
        for _ in range(PASSES):
            add_partitions(self.instance, self.definition, ledger.batches())
            existing = batches_of(self.instance.get_dynamic_partitions(self.definition.partitions_name))
            for first, last in run_ranges(work, existing, self.size):
                if limit is not None and result.embedded >= limit:
                    break
                left = None if limit is None else limit - result.embedded
                self._execute_batches(first, last, {"force": force, "limit": left, "items": items})
            # Rows that changed while we ran; what `limit` and `recent` leave is left on purpose.
            work = {} if limit is not None or items is not None else ledger.dirty_items()
            if not work:
                break
            force, self.batches = False, self.batches + len(work)
        if work:
            log.warning(
                "warning: collection %r: rows of %s batches changed again while they were synced; sync again, and see "
                "whether a column changes at each read",
                *(name, len(work)),
            )
        if indexes_lag(self.collection, verify=True):
            self.progress("indexing", self.embedded, self.batches)
            self.runner.execute(f"{name}_index", {}, {})

    def _scan(self, allow_deletes: bool) -> None:
        config = {"ops": {self.runner.op("item_ledger"): {"config": {"allow_deletes": allow_deletes}}}}
        found, result = self.runner.execute(f"{self.definition.name}_scan", config, {}), self.result
        result.scanned, result.new, result.changed = found["scanned"], found["new"], found["changed"]

    def _batch_done(self, asset: str, _: int) -> None:
        name = "embeddings" if asset.startswith("embeddings") else asset
        self.embedded += name == "embeddings"
        self.progress(STEPS[name], self.embedded, self.batches)

    def _current_fingerprint(self) -> str | None:
        current = self.collection.ledger.current()
        return current.table.fingerprint if current else None

    def _execute_batches(self, first: int, last: int, embed: dict[str, Any]) -> None:
        name = self.definition.name
        config = {"ops": {self.runner.op(f"embeddings_{self.dimensions}"): {"config": embed}}}
        self.progress("reading", self.embedded, self.batches)
        before = self._current_fingerprint()
        try:
            found = self.runner.execute(f"{name}_batches", config, range_tags(first, last))
        except RunFailed:
            if self._current_fingerprint() == before:
                raise
            return  # another model became current meanwhile: what this run did not commit is dirty, for the next pass
        self.result.deleted += found["deleted"]
        self.result.embedded += found["embedded"]
        self.result.reused += found["reused"]
        self.result.quarantined += found["quarantined"]
        self.result.left += 0 if embed["force"] else found["left_to_embed"]


def batches_of(partitions: Sequence[str]) -> list[int | None]:
    """The batches in the order in which Dagster knows their partitions; None for what was added by hand."""
    return [int(key) if key.isdecimal() and batch_key(int(key)) == key else None for key in partitions]


def run_ranges(work: Mapping[int, int], existing: Sequence[int | None], items_per_batch: int) -> list[tuple[int, int]]:
    """The runs, as (first, last) batch, that do this work (batch → items)."""
    most = {"most_batches": MOST_BATCHES_PER_RUN, "most_items": BATCHES_PER_RUN * items_per_batch}
    return contiguous_ranges(work, existing, **most)


def range_tags(first: int, last: int) -> dict[str, str]:
    """The tags of a run over these batches."""
    return {ASSET_PARTITION_RANGE_START_TAG: batch_key(first), ASSET_PARTITION_RANGE_END_TAG: batch_key(last)}


def _failure(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return data.user_failure_data.description
    error = data.error
    if error and error.cls_name == "DagsterExecutionInterruptedError":
        return "interrupted; what is committed stays"
    return _innermost(error) or event.message or "a step failed"


def _innermost(error: SerializableErrorInfo | None) -> str:
    while error and error.cause:
        error = error.cause
    return " ".join(error.message.split()) if error else ""


def cancel_dead_runs(instance: dg.DagsterInstance, database: Database) -> list[str]:
    """End runs that say they are under way though their process is gone, and free their places in the pools."""
    open_statuses = [
        dg.DagsterRunStatus.NOT_STARTED,
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]
    dead = []
    with database.connect(autocommit=True) as connection:
        for record in instance.get_run_records(dg.RunsFilter(statuses=open_statuses)):
            run = record.dagster_run
            if run_locked(connection, run.run_id):
                continue
            if SYNC_TAG not in run.tags and run.status == dg.DagsterRunStatus.NOT_STARTED:
                continue  # in the queue, or about to be launched
            alive = worker_alive(instance, run)  # a PostgreSQL that was killed took the locks of the living with it
            if alive is None and SYNC_TAG not in run.tags and run.status != dg.DagsterRunStatus.STARTED:
                continue  # on another machine, which may take minutes to start
            age = time.time() - (record.start_time or record.create_timestamp.timestamp())
            if alive or (alive is None and age < GRACE_SECONDS):
                continue
            instance.report_run_canceled(run, message="Its process is gone: ended by a later sync.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            dead.append(run.run_id)
    return dead
