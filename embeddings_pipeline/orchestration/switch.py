"""Switching a collection's profile with one call: the phases of a model change, as runs in this process."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.lag import indexes_lag
from embeddings_pipeline.model_change.state import incomplete_batches, open_change, progress
from embeddings_pipeline.orchestration.figures import read_figures
from embeddings_pipeline.orchestration.names import partitions_name
from embeddings_pipeline.orchestration.partitions import add_partitions, batches_of, range_tags, run_ranges
from embeddings_pipeline.orchestration.resources import batch_done
from embeddings_pipeline.orchestration.runner import JobRunner, open_instance
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.shadow import Backfilled


@dataclass
class SwitchResult:
    """What a switch did: texts embedded and in quarantine, what the gate measured, seconds."""

    collection: str
    previous: str
    profile: str
    embedded: int = 0
    quarantined: int = 0
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
    progress_of: Callable[[str, int, int], None] = lambda phase, done, total: None,
    instance: dg.DagsterInstance | None = None,
) -> SwitchResult:
    """Expand, backfill, index, gate, swap, and a new FAISS generation. What a killed switch had done is not done again.

    `progress_of(phase, done, total)` is called with batches. Raises PipelineError with one line; the current model
    serves until the swap, and whatever fails.
    """
    started = time.perf_counter()
    collection = open_collection(definition, settings)
    result = SwitchResult(definition.name, collection.profile.name, name)
    with open_instance(instance) as instance:
        runner = JobRunner(collection, instance)
        with runner.others_watched():
            progress_of("expanding", 0, 0)
            config = {"ops": {runner.op("migration/expand"): {"config": {"candidate_profile": name}}}}
            runner.execute("migration_expand", config, {})
            change = open_change(collection)
            assert change is not None
            add_partitions(instance, definition, collection.ledger.batches())
            existing = batches_of(instance.get_dynamic_partitions(partitions_name(definition)))
            size = definition.attributes.items_per_batch
            work = dict.fromkeys(incomplete_batches(collection, change.candidate), size)
            done = progress(collection, change.candidate)
            backfilled = itertools.count(done.backfilled)
            progress_of("embedding", next(backfilled), done.batches)
            listening = batch_done.set(lambda asset, batch: progress_of("embedding", next(backfilled), done.batches))
            try:
                for first, last in run_ranges(work, existing, size):
                    for each in runner.execute("migration_backfill", {}, range_tags(first, last)):
                        if not each.metadata:  # a partition that somebody added by hand
                            continue
                        backfilled_batch = read_figures(Backfilled, each.metadata)
                        result.embedded += backfilled_batch.embedded
                        result.quarantined += backfilled_batch.quarantined
            finally:
                batch_done.reset(listening)
            done = progress(collection, change.candidate)
            progress_of("indexing and checking", done.backfilled, done.batches)
            [swapped] = runner.execute("migration_swap", {}, {})
            figures = swapped.metadata
            result.recall_at_10, result.locked_ms = figures["recall_at_10"], figures["locked_ms"]
            result.neighbour_overlap = figures.get("neighbour_overlap")  # None: measured with golden queries instead
            result.ndcg_current, result.ndcg_candidate = figures.get("ndcg_current"), figures.get("ndcg_candidate")
            if indexes_lag(open_collection(definition, settings)):
                progress_of("building FAISS", done.backfilled, done.batches)
                runner.execute("index", {}, {})
    result.seconds = round(time.perf_counter() - started, 2)
    return result
