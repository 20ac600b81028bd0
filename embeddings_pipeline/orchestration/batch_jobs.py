"""Batch jobs in the UI: an asset that shows them and fetches what they answered, and the sensor that looks at them.

The sensor asks the servers how far jobs are, has a run fetch what has ended, and then asks for the runs that submitted
it once more: these find their answers in the embedding cache, commit them, and submit what was left unanswered. All of
it is derived from state at each tick (rule 1).
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import dagster as dg
import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.prices import is_hosted
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.model_change.state import incomplete_batches, open_change
from embeddings_pipeline.orchestration.asset_options import asset_options
from embeddings_pipeline.orchestration.automation import RUNS_PER_TICK, has_just_failed
from embeddings_pipeline.orchestration.names import (
    asset_key,
    asset_op_name,
    automation_name,
    embeddings_asset,
    job_name,
    partitions_name,
)
from embeddings_pipeline.orchestration.partitions import batches_of, range_tags, run_ranges
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import failures, open_logged
from embeddings_pipeline.orchestration.under_way import UNDER_WAY, under_way
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import open_database, was_used
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.schema import has_schema
from embeddings_pipeline.wording import counted

TICK_SECONDS = 30
ASK_SECONDS = 20.0  # of servers, in one tick
MOST_ROWS = 100  # of jobs, in the UI
BY_BATCH_JOBS = {"config": {"api": "batch"}}

OfJobs = Mapping[str, Mapping[int, datetime]]
"""Fingerprint → batch → when the last job that has texts of it was made."""


def has_batch_jobs(definition: CollectionDefinition, profile: Profile) -> bool:
    """Whether the collection has a hosted model, or may change to one; `profile`: the declared one."""
    settings, own = load_settings(), definition.attributes.profiles.values()
    is_any_hosted = is_hosted(profile) or any(each.provider == "openai" for each in own)
    return is_any_hosted or bool(settings.openai_api_key or settings.openai_base_url)


def build_batch_jobs(definition: CollectionDefinition) -> dg.AssetsDefinition:
    """The asset `batch_jobs`."""

    @dg.asset(**asset_options(definition, "batch_jobs", {"openai"}, [], partitioned=False))
    def batch_jobs(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """Texts that were handed to a hosted model's Batch API, with `api: batch` in a launchpad, `sync --api batch` or
        `profile switch --api batch`: half the price, within a day. Materialize it to look at each job now, and to fetch
        what has been answered; `batch_jobs_sensor` does so by itself.

        Numbers: jobs `at_work`, their `texts` and `done`; `usd`, what they are expected to cost. The table has each job
        of the last week with its state, age and price.
        """
        with failures():
            collection = open_logged(context, pipeline, definition)
            jobs = BatchJobs(collection.database, collection.settings, definition.name)
            for job in jobs.due(now=True):
                try:
                    jobs.look(job)
                except PipelineError as error:  # the others are no worse for it, and the table says so
                    context.log.warning(str(error))
        return dg.MaterializeResult(metadata=jobs_metadata(jobs.listed()))

    return batch_jobs


def jobs_metadata(listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the UI shows of jobs: sums of those at work, and a row for each."""
    at_work = [job for job in listed if job["ended_at"] is None]
    rows = [
        dg.TableRecord(
            {
                "job": job["id"][:8],
                "state": job["state"],
                "server_says": job["remote_state"] or "",
                "profile": job["profile"],
                "texts": job["texts"],
                "done": job["remote_done"],
                "answered": job["answered"],
                "refused": job["refused"],
                "unanswered": job["unanswered"],
                "age_hours": round(job["age_seconds"] / 3600, 1),
                "usd_expected": round(job["usd"], 4),
                "usd_billed": round(job["billed_usd"], 4),
                "batch": job["remote"] or "",
                "reason": job["reason"] or "",
            }
        )
        for job in listed[:MOST_ROWS]
    ]
    return {
        "at_work": len(at_work),
        "texts": sum(job["texts"] for job in at_work),
        "done": sum(job["remote_done"] for job in at_work),
        "usd": round(sum((job["usd"] for job in at_work), 0.0), 6),
        "oldest_hours": round(max((job["age_seconds"] for job in at_work), default=0.0) / 3600, 2),
        **({"jobs": dg.MetadataValue.table(rows)} if rows else {}),
    }


def build_batch_sensor(definition: CollectionDefinition, jobs: Sequence[Any], dimensions: int) -> dg.SensorDefinition:
    """`batch_jobs_sensor`; `jobs` are those that it starts."""

    @dg.sensor(
        name=automation_name(definition, "batch_jobs_sensor"),
        jobs=jobs,
        minimum_interval_seconds=TICK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Looks at the batch jobs of {definition.name!r}, if there are any: asks the server how far they are, has "
            f"what was answered fetched, and starts the runs that commit it."
        ),
    )
    def batch_jobs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return evaluate_jobs(context.instance, definition, dimensions, context.cursor)

    return batch_jobs_sensor


def evaluate_jobs(
    instance: dg.DagsterInstance, definition: CollectionDefinition, dimensions: int, cursor: str | None = None
) -> dg.SensorResult:
    """One tick. `cursor`: what the jobs looked like when the UI was last told."""
    settings = load_settings()
    database = open_database(settings) if was_used(settings) else None
    try:
        if database is None or not has_schema(database):
            return _nothing("nothing has been synced yet", cursor)
    except PipelineError as error:
        return _nothing(str(error), cursor)
    jobs = BatchJobs(database, settings, definition.name)
    states, errors = _ask(jobs)
    listed, requests = jobs.listed(), []
    if "ended" in states and not _is_under_way(instance, job_name(definition, "batch_jobs")):
        requests.append(_request(job_name(definition, "batch_jobs"), {}, {}))
    requests += _follow_up(instance, definition, dimensions, jobs)
    seen = hashlib.blake2b(json.dumps([_told(job) for job in listed]).encode(), digest_size=8).hexdigest()
    at_work = sum(job["ended_at"] is None for job in listed)
    told = "; ".join([f"{counted(at_work, 'batch job')} at work", *map(str, errors)])
    shown = dg.AssetMaterialization(asset_key(definition, "batch_jobs"), metadata=jobs_metadata(listed))
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else dg.SkipReason(told),
        asset_events=[shown] if listed and seen != cursor else [],
        cursor=seen,
    )


def _nothing(reason: str, cursor: str | None) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=cursor)


def _told(job: Mapping[str, Any]) -> list[Any]:
    return [job[name] for name in ("id", "state", "remote_state", "remote_done", "answered", "reason")]


def _ask(jobs: BatchJobs) -> tuple[set[str | None], list[PipelineError]]:
    """Look at the jobs whose time it is, without fetching anything: their states, and what went wrong."""
    began, states, errors = time.monotonic(), set[str | None](), list[PipelineError]()
    for job in jobs.due():
        if time.monotonic() - began > ASK_SECONDS:
            break
        try:
            states.add(jobs.look(job, fetch=False))
        except PipelineError as error:
            errors.append(error)
    return states, errors


def _follow_up(
    instance: dg.DagsterInstance, definition: CollectionDefinition, dimensions: int, jobs: BatchJobs
) -> list[dg.RunRequest]:
    """The runs whose jobs have ended, once more."""
    if not (of_jobs := jobs.to_follow_up()):
        return []
    try:
        collection = open_collection(definition, load_settings())
    except (PipelineError, psycopg.Error):  # the collection's own sensor says so
        return []
    change = open_change(collection)
    candidate = change.candidate if change is not None and change.phase == "expanded" else None
    backfill = _backfill_again(instance, collection, candidate, of_jobs) if candidate else []
    return [*_commit(instance, collection, dimensions, candidate, of_jobs), *backfill]


def _commit(
    instance: dg.DagsterInstance, collection: Collection, dimensions: int, candidate: Model | None, of_jobs: OfJobs
) -> list[dg.RunRequest]:
    """Runs over the batches whose items the jobs were made for; those of shadow models are incomplete as a whole."""
    definition, ledger = collection.definition, collection.ledger
    batches = set(ledger.dirty_since(of_jobs.get(collection.fingerprint, {})))
    for model in ledger.shadow_models():
        if candidate is None or model.destination.fingerprint != candidate.destination.fingerprint:
            batches.update(of_jobs.get(model.destination.fingerprint, {}))
    if not batches:
        return []
    known = instance.get_dynamic_partitions(partitions_name(definition))
    busy, work = under_way(instance, definition, dimensions, known).partitions, ledger.work(due=True)
    existing = batches_of(known)
    wanted = {batch: work[batch] for batch in batches if batch in work and batch_key(batch) not in busy}
    ranges = run_ranges(wanted, existing, definition.attributes.items_per_batch)[:RUNS_PER_TICK]
    place = {batch: n for n, batch in enumerate(existing)}
    tried = [n for n in wanted if n in place and any(place[a] <= place[n] <= place[b] for a, b in ranges)]
    if tried:  # noted before: a run that dies before its first step must not come back at each tick
        ledger.note_attempts(tried)
    op = asset_op_name(definition, embeddings_asset(dimensions))
    ops = {op: BY_BATCH_JOBS} if is_hosted(collection.profile) else {}
    return [_request(job_name(definition, "batches"), ops, range_tags(*each)) for each in ranges]


def _backfill_again(
    instance: dg.DagsterInstance, collection: Collection, candidate: Model, of_jobs: OfJobs
) -> list[dg.RunRequest]:
    """Backfills of the candidate, over the batches of its jobs that lack vectors still."""
    definition = collection.definition
    job, op = job_name(definition, "migration_backfill"), asset_op_name(definition, "migration/backfill")
    ended = of_jobs.get(candidate.destination.fingerprint)
    if not ended or _is_under_way(instance, job) or has_just_failed(instance, job):
        return []
    size = definition.attributes.items_per_batch
    left = {batch: size for batch in incomplete_batches(collection, candidate) if batch in ended}
    existing = batches_of(instance.get_dynamic_partitions(partitions_name(definition)))
    ranges = run_ranges(left, existing, size)[:RUNS_PER_TICK]
    return [_request(job, {op: BY_BATCH_JOBS}, range_tags(*each)) for each in ranges]


def _is_under_way(instance: dg.DagsterInstance, job: str) -> bool:
    return bool(instance.get_runs(dg.RunsFilter(job_name=job, statuses=UNDER_WAY), limit=1))


def _request(job: str, ops: Mapping[str, Any], tags: Mapping[str, str]) -> dg.RunRequest:
    return dg.RunRequest(job_name=job, run_config={"ops": dict(ops), "loggers": {"console": {}}}, tags=dict(tags))
