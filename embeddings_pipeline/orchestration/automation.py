"""What keeps a collection current by itself: the sensor and the schedules.

The sensor is level-triggered (rule 1): each tick derives what is to be done from the ledger, the indexes and the runs
that are under way, so a tick that failed, a run that was killed or a day without the daemon needs no mending.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
from pydantic import Field

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import PipelineError, StaleDefinitionError
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.health.freshness import left_to_live
from embeddings_pipeline.health.lag import about_foreign, indexes_due, lagging_since, map_due
from embeddings_pipeline.ledger.incremental_scan import IncrementalScan
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.orchestration.instance.liveness import RunWatch, cancel_dead_runs
from embeddings_pipeline.orchestration.instance.workers import warm_up
from embeddings_pipeline.orchestration.names import (
    AUTOMATION,
    PEOPLE,
    asset_key,
    automation_name,
    job_name,
    job_tags,
    op_name,
    partitions_name,
)
from embeddings_pipeline.orchestration.partitions import batches_of, build_partitions, range_tags, run_ranges
from embeddings_pipeline.orchestration.reload import reload_definitions
from embeddings_pipeline.orchestration.resources import known_to_live
from embeddings_pipeline.orchestration.steps import failures
from embeddings_pipeline.orchestration.sync import Recent, SyncResult, sync
from embeddings_pipeline.orchestration.under_way import UnderWay, under_way
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.models import collection_state
from embeddings_pipeline.store.session import TICK_LIMITS
from embeddings_pipeline.wording import counted

log = logging.getLogger(__name__)

TICK_SECONDS = 4  # each time that the daemon looks at its sensors, which is every 5 seconds
READ_SECONDS = 5.0  # of the source, in one tick
RUNS_PER_TICK = 4
FAILED_WAIT = timedelta(minutes=5)  # an index run that failed is asked for again after so long
EVERYTHING = "scan and audit everything, embed what is to be, bring the indexes up to date, run every check."


class RefreshConfig(dg.Config):
    """Launchpad settings of the daily refresh."""

    allow_deletes: bool = Field(default=False, description="Go on if more than 20 % of the items are gone.")
    force: bool = Field(default=False, description="Encode every text anew, also those whose vector is current.")


# --- the sensor --------------------------------------------------------------------------------------------------


def build_sensor(definition: CollectionDefinition, jobs: Sequence[Any], dimensions: int) -> dg.SensorDefinition:
    """`new_rows_sensor`; `jobs` are the collection's."""
    runs = RunWatch()

    @dg.sensor(
        name=automation_name(definition, "new_rows_sensor"),
        jobs=jobs,
        minimum_interval_seconds=TICK_SECONDS,
        description=(
            f"Looks for new, changed and vanished rows of {definition.name!r}, and starts a run for each range of "
            f"batches with something to do, then one for the indexes. What is to be done is derived from the ledger "
            f"at each tick: whatever crashed, the next tick goes on."
        ),
    )
    def new_rows_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        warm_up()
        return evaluate(context.instance, definition, dimensions, runs)

    return new_rows_sensor


def evaluate(
    instance: dg.DagsterInstance, definition: CollectionDefinition, dimensions: int, runs: RunWatch | None = None
) -> dg.SensorResult:
    """One tick: read what is new, then derive from state which runs are to be started.

    A sensor whose definition is not the newest one starts nothing, and says so.
    """
    try:
        collection = open_collection(definition, load_settings())
    except StaleDefinitionError as error:
        return _step_aside(definition, error)
    cancel_dead_runs(instance, collection.database, runs or RunWatch())
    config = definition.attributes.automation
    recent: IncrementalScan | str | None = None
    if definition.attributes.source.updated_at and _since_full_scan(collection) is not None:
        try:
            source = replace(collection.source, limits=TICK_LIMITS)
            with failure_kept(collection.database, definition.name, "incremental_scan"):
                recent = collection.ledger.incremental_scan(source, seconds=READ_SECONDS)
        except (PipelineError, psycopg.Error) as error:  # the rest goes on; full scans find what this one did not
            recent = " ".join(str(error).split())
    known = instance.get_dynamic_partitions(partitions_name(definition))
    seen = set(known)
    added = [key for key in map(batch_key, collection.ledger.batches()) if key not in seen]
    existing = batches_of([*known, *added])
    busy = under_way(instance, definition, dimensions, known)
    dirty, work = collection.ledger.dirty_items(), collection.ledger.work(due=True)
    free = {batch: items for batch, items in work.items() if batch_key(batch) not in busy.partitions}
    if left_to_live(collection.database, definition.name, collection.model.destination):
        free = {}
    ranges = run_ranges(free, existing, definition.attributes.items_per_batch)[:RUNS_PER_TICK]
    requests = [_request(job_name(definition, "batches"), range_tags(first, last)) for first, last in ranges]
    if _full_scan_due(instance, collection, busy):
        requests.append(_request(job_name(definition, "scan")))
    idle = not (busy.index or busy.refresh)
    index_due = idle and indexes_due(collection)
    lags = index_due or (idle and map_due(collection))
    if lags and _may_index(instance, collection, bool(dirty), busy, timedelta(minutes=config.index_lag_minutes)):
        the_map: dict[str, Any] = {"asset_selection": [asset_key(definition, "map")], "asset_check_keys": []}
        requests.append(_request(job_name(definition, "index"), **({} if index_due else the_map)))
    if ranges:  # noted before: a run that dies before its first step must not come back at each tick
        place = {batch: n for n, batch in enumerate(existing)}
        tried = [n for n in free if n in place and any(place[a] <= place[n] <= place[b] for a, b in ranges)]
        collection.ledger.note_attempts(tried)
    looked = _what_was_seen(collection, recent, len(existing), dirty, work, busy, lags)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else dg.SkipReason(looked),
        dynamic_partitions_requests=[build_partitions(definition).build_add_request(added)] if added else [],
        cursor=looked,
    )


def _step_aside(definition: CollectionDefinition, error: StaleDefinitionError) -> dg.SensorResult:
    reason = str(error)
    log.warning("%s", reason)
    Ledger(definition, open_database(load_settings())).step_aside(reason)
    if error.file_changed and definition.path is not None and reload_definitions(definition.path):
        reason += "; they are being reloaded"
    return dg.SensorResult(skip_reason=dg.SkipReason(reason))


def _request(job_name: str, tags: Mapping[str, str] | None = None, **selection: Any) -> dg.RunRequest:
    # Our console logger, which is quiet, counts only if the run's configuration names it.
    config: dict[str, Any] = {"loggers": {"console": {}}}
    return dg.RunRequest(job_name=job_name, run_config=config, tags=dict(tags or {}), **selection)


def _since_full_scan(collection: Collection) -> timedelta | None:
    """How long ago the last full scan ended, by the database's clock; None without one."""
    with collection.database.session() as connection:
        state = collection_state(connection, collection.definition.name)
    return state.asked_at - state.full_scan_at if state and state.full_scan_at else None


def _still(since: float, wait: timedelta) -> bool:
    """Whether a wait that began at a time of Dagster's goes on. A time that is yet to come counts as none: the clock
    was ahead for a while.
    """
    return 0 <= time.time() - since < wait.total_seconds()


def _full_scan_due(instance: dg.DagsterInstance, collection: Collection, busy: UnderWay) -> bool:
    every = timedelta(minutes=collection.definition.attributes.automation.full_scan_minutes)
    since = _since_full_scan(collection)
    if busy.scan or busy.refresh or (since is not None and since < every):
        return False
    # One that was refused or failed is not asked for again at each tick.
    tried = instance.get_run_records(dg.RunsFilter(job_name=job_name(collection.definition, "scan")), limit=1)
    return not (tried and _still(tried[0].end_time or tried[0].start_time or 0, min(every, FAILED_WAIT)))


def _may_index(
    instance: dg.DagsterInstance, collection: Collection, dirty: bool, busy: UnderWay, longest: timedelta
) -> bool:
    """With batches still to be committed, the indexes wait, but not for ever."""
    with collection.database.session() as connection:
        state = collection_state(connection, collection.definition.name)
    if state is None or state.version == 0:  # nothing to index is committed
        return False
    since = lagging_since(collection)
    waited = since is not None and not _still(since.timestamp(), longest)
    may = waited or not (dirty or busy.partitions)
    return may and not has_just_failed(instance, job_name(collection.definition, "index"))


def has_just_failed(instance: dg.DagsterInstance, job: str) -> bool:
    """Whether the job's last run failed, less than FAILED_WAIT ago."""
    tried = instance.get_run_records(dg.RunsFilter(job_name=job), limit=1)
    failed = tried and tried[0].dagster_run.status == dg.DagsterRunStatus.FAILURE
    return bool(failed and _still(tried[0].end_time or 0, FAILED_WAIT))


def _what_was_seen(
    collection: Collection,
    recent: IncrementalScan | str | None,
    batches: int,
    dirty: Mapping[int, int],
    work: Mapping[int, int],
    busy: UnderWay,
    lags: bool,
) -> str:
    waiting = sum(batch_key(batch) not in busy.partitions for batch in dirty.keys() - work.keys())
    to_do = sum(batch_key(batch) not in busy.partitions for batch in work)
    parts = []
    if isinstance(recent, str):
        parts.append(f"rows updated lately could not be read: {recent}")
    elif recent is not None:
        parts.append(
            f"{counted(recent.read, 'row')} updated lately were read ({recent.new} new, {recent.changed} changed, "
            f"{recent.gone} gone)"
        )
        if recent.refused:
            parts.append(
                f"{counted(recent.refused, 'row')} no longer meet `where:`, more than 20 %: left to the full scan"
            )
        if not recent.caught_up:
            parts.append("there are more rows to read")
    since = _since_full_scan(collection)
    minutes = "never" if since is None else f"{since.total_seconds() / 60:.0f} minutes ago"
    parts.append(f"last full scan {minutes}" + (", one is under way" if busy.scan or busy.refresh else ""))
    counts = {"batches": batches, "with something to do": to_do, "being worked on": len(busy.partitions)}
    counts["waiting for their next try"] = waiting
    parts.append(", ".join(f"{what}: {count}" for what, count in counts.items()))
    index = "being built" if busy.index else "behind" if lags else "current"
    parts.append(f"indexes {index}")
    if lags and (foreign := about_foreign(collection)):
        parts.append(foreign)
    return "; ".join(parts)


# --- the schedules -----------------------------------------------------------------------------------------------


def build_refresh_jobs(definition: CollectionDefinition) -> list[dg.JobDefinition]:
    """`…_refresh` and `…_recent`: what the schedules start. Each runs the runs of a `sync` in its own process."""
    automation = definition.attributes.automation

    @dg.op(name=op_name(definition, "refresh_everything"), out=dg.Out(dg.Nothing))
    def refresh_everything(context: dg.OpExecutionContext, config: RefreshConfig) -> None:
        with _alive(context), failures():
            result = sync(
                definition,
                load_settings(),
                full=True,
                force=config.force,
                allow_deletes=config.allow_deletes,
                instance=context.instance,
            )
        context.log.info(_in_words(result))
        for check in result.checks:
            context.log.warning(f"check {check.name}: {check.told(definition.name)}")

    @dg.op(name=op_name(definition, "refresh_recent"), out=dg.Out(dg.Nothing))
    def refresh_recent(context: dg.OpExecutionContext) -> None:
        recent = Recent(automation.recent_days, automation.recent_items)
        with _alive(context), failures():
            result = sync(definition, load_settings(), recent=recent, instance=context.instance)
        context.log.info(_in_words(result))

    @dg.job(
        name=job_name(definition, "refresh"),
        **job_tags(definition, AUTOMATION),
        description=f"For its schedule, the same as `{job_name(definition, 'all')}`: {EVERYTHING}",
    )
    def refresh() -> None:
        refresh_everything()

    @dg.job(
        name=job_name(definition, "recent"),
        **job_tags(definition, AUTOMATION),
        description=(
            f"For its schedule: embed items first seen in the last {counted(automation.recent_days, 'day')} that have "
            f"no vectors, at most {automation.recent_items}."
        ),
    )
    def recent_job() -> None:
        refresh_recent()

    return [refresh, recent_job]


def build_job_for_people(definition: CollectionDefinition, refresh: dg.JobDefinition) -> dg.JobDefinition:
    """`…_all`: the job `…_refresh` under a name that comes first."""
    return refresh.graph.to_job(
        name=job_name(definition, "all"),
        **job_tags(definition, PEOPLE),
        description=f"THE ONE TO USE: {EVERYTHING}",
    )


def build_schedules(
    definition: CollectionDefinition, jobs: Sequence[dg.JobDefinition], *, paid: bool = False
) -> list[dg.ScheduleDefinition]:
    """`daily_refresh` and `recent_refresh`; the latter is on from the start if the model is `paid` for, so that what is
    new is embedded a little at a time.
    """
    refresh, recent = jobs
    config = definition.attributes.automation
    schedules = [
        dg.ScheduleDefinition(
            name=automation_name(definition, "recent_refresh"),
            job=recent,
            cron_schedule=f"0 */{config.recent_every_hours} * * *" if config.recent_every_hours < 24 else "0 0 * * *",
            execution_timezone=config.timezone,
            default_status=dg.DefaultScheduleStatus.RUNNING if paid else dg.DefaultScheduleStatus.STOPPED,
            description=recent.description,
        )
    ]
    if config.daily_refresh:
        hour, minute = config.daily_refresh.split(":")
        daily = dg.ScheduleDefinition(
            name=automation_name(definition, "daily_refresh"),
            job=refresh,
            cron_schedule=f"{int(minute)} {int(hour)} * * *",
            execution_timezone=config.timezone,
            description=refresh.description,
        )
        schedules.insert(0, daily)
    return schedules


def _alive(context: dg.OpExecutionContext) -> AbstractContextManager[None]:
    return known_to_live(context.instance, context.run_id)


def _in_words(result: SyncResult) -> str:
    return (
        f"{counted(result.scanned, 'row')} read: {result.new:,} new, {result.changed:,} changed, "
        f"{result.deleted:,} deleted; {counted(result.embedded, 'text')} embedded, {result.cached:,} from the cache, "
        f"{result.reused:,} reused, {result.quarantined:,} in quarantine; {result.seconds:.1f} s, ${result.usd:,.4f}"
    )
