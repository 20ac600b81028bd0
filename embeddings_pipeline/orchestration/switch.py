"""Switching a collection's profile with one call: the phases of a model change, as runs in this process."""

import time
from dataclasses import dataclass

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.prices import Api
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.activity import activity
from embeddings_pipeline.health.lag import indexes_lag
from embeddings_pipeline.model_change.state import candidate_profile, incomplete_batches, open_change, texts_done
from embeddings_pipeline.orchestration.figures import read_figures
from embeddings_pipeline.orchestration.names import partitions_name
from embeddings_pipeline.orchestration.partitions import add_partitions, batches_of, range_tags, run_ranges
from embeddings_pipeline.orchestration.progress import TextMeter, both, index_watched
from embeddings_pipeline.orchestration.resources import batch_done
from embeddings_pipeline.orchestration.runner import JobRunner, open_instance
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.shadow import Backfilled
from embeddings_pipeline.pipeline.submit import check_api, look_at_jobs
from embeddings_pipeline.progress import Progress, counting, silent


@dataclass
class SwitchResult:
    """What a switch did: texts embedded and in quarantine, what the gate measured, seconds."""

    collection: str
    previous: str
    profile: str
    embedded: int = 0
    quarantined: int = 0
    in_jobs: int = 0  # texts that batch jobs have: nothing is swapped yet
    recall_at_10: float | None = None
    neighbour_overlap: float | None = None
    ndcg_current: float | None = None
    ndcg_candidate: float | None = None
    locked_ms: float = 0.0
    seconds: float = 0.0


def switch(
    definition: CollectionDefinition,
    settings: Settings,
    name: str,
    *,
    api: Api = "direct",
    progress_of: Progress = silent,
    instance: dg.DagsterInstance | None = None,
) -> SwitchResult:
    """Expand, backfill, index, gate, swap, and a new FAISS generation. What a killed switch had done is not done again.

    `api: batch` hands texts to a hosted model's Batch API; as long as batch jobs have texts (`in_jobs`), nothing is
    swapped, and the same call goes on later. `progress_of(phase, done, total)` is called with texts. Raises
    PipelineError with one line; the current model serves until the swap, and whatever fails.
    """
    started = time.perf_counter()
    collection = open_collection(definition, settings)
    if api == "batch":
        check_api(candidate_profile(collection, name), api)
    result = SwitchResult(definition.name, collection.profile.name, name)
    with (
        activity(collection.database, definition.name, f"switch to {name}") as told,
        open_instance(instance) as instance,
    ):
        tell = both(progress_of, told)
        meter = TextMeter(tell)
        runner = JobRunner(collection, instance)
        with runner.others_watched(), counting(meter.count):
            look_at_jobs(collection, tell)
            tell("expanding", 0, 0)
            config = {"ops": {runner.op("migration/expand"): {"config": {"candidate_profile": name}}}}
            runner.execute("migration_expand", config, {})
            change = open_change(collection)
            assert change is not None
            add_partitions(instance, definition, collection.ledger.batches())
            existing = batches_of(instance.get_dynamic_partitions(partitions_name(definition)))
            size = definition.attributes.items_per_batch
            work = dict.fromkeys(incomplete_batches(collection, change.candidate), size)
            meter.set_total(*texts_done(collection, change.candidate))
            meter.tell("embedding")
            listening = batch_done.set(meter.batch_done)
            try:
                for first, last in run_ranges(work, existing, size):
                    config = {"ops": {runner.op("migration/backfill"): {"config": {"api": api}}}}
                    for each in runner.execute("migration_backfill", config, range_tags(first, last)):
                        if not each.metadata:  # a partition that somebody added by hand
                            continue
                        backfilled_batch = read_figures(Backfilled, each.metadata)
                        result.embedded += backfilled_batch.embedded
                        result.quarantined += backfilled_batch.quarantined
                        result.in_jobs += backfilled_batch.in_jobs
            finally:
                batch_done.reset(listening)
            if result.in_jobs:
                result.seconds = round(time.perf_counter() - started, 2)
                return result
            tell("indexing and checking", 0, 0)
            with index_watched(collection, tell):
                [swapped] = runner.execute("migration_swap", {}, {})
            figures = swapped.metadata
            result.recall_at_10, result.locked_ms = figures["recall_at_10"], figures["locked_ms"]
            result.neighbour_overlap = figures.get("neighbour_overlap")  # None: measured with golden queries instead
            result.ndcg_current, result.ndcg_candidate = figures.get("ndcg_current"), figures.get("ndcg_candidate")
            if indexes_lag(open_collection(definition, settings)):
                tell("building FAISS", 0, 0)
                runner.execute("index", {}, {})
    result.seconds = round(time.perf_counter() - started, 2)
    return result
