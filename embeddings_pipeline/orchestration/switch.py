"""Switching a collection's profile with one call: the phases of a migration, as runs in this process."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg

from embeddings_pipeline.config.definition import Collection
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.lag import indexes_lag
from embeddings_pipeline.model_change.phases import open_migration, progress, unfilled_batches
from embeddings_pipeline.orchestration.assets import add_partitions
from embeddings_pipeline.orchestration.resources import batch_done
from embeddings_pipeline.orchestration.sync import JobRunner, batches_of, open_instance, range_tags, run_ranges
from embeddings_pipeline.pipeline.collection import open_collection


@dataclass
class SwitchResult:
    """What a switch did: texts embedded and in quarantine, what the gate measured, seconds."""

    collection: str
    former: str
    profile: str
    embedded: int = 0
    quarantined: int = 0
    recall_at_10: float | None = None
    neighbour_overlap: float | None = None
    ndcg_former: float | None = None
    ndcg_next: float | None = None
    locked_ms: float = 0.0
    seconds: float = 0.0


def switch(
    collection: Collection,
    settings: Settings,
    name: str,
    *,
    progress_of: Callable[[str, int, int], None] = lambda phase, done, total: None,
    instance: dg.DagsterInstance | None = None,
) -> SwitchResult:
    """Expand, backfill, index, gate, swap, and a new FAISS generation. What a killed switch had done is not done again.

    `progress_of(phase, done, total)` is called with batches. Raises PipelineError with one line; the former model
    serves until the swap, and whatever fails.
    """
    started = time.perf_counter()
    opened = open_collection(collection, settings)
    result = SwitchResult(collection.name, opened.profile.name, name)
    with open_instance(instance) as instance:
        runner = JobRunner(opened, instance)
        with runner.others_watched():
            progress_of("expanding", 0, 0)
            config = {"ops": {runner.op("migration/expand"): {"config": {"target_profile": name}}}}
            runner.execute(f"{collection.name}_migration_expand", config, {})
            migration = open_migration(opened)
            assert migration is not None
            add_partitions(instance, collection, opened.ledger.batches())
            existing = batches_of(instance.get_dynamic_partitions(collection.partitions_name))
            size = collection.config.items_per_batch
            work = dict.fromkeys(unfilled_batches(opened, migration.next), size)
            done = progress(opened, migration.next)
            filled = itertools.count(done.filled)
            progress_of("embedding", next(filled), done.batches)
            listening = batch_done.set(lambda asset, batch: progress_of("embedding", next(filled), done.batches))
            try:
                for first, last in run_ranges(work, existing, size):
                    sums = runner.execute(f"{collection.name}_migration_backfill", {}, range_tags(first, last))
                    result.embedded += sums["embedded"]
                    result.quarantined += sums["quarantined"]
            finally:
                batch_done.reset(listening)
            done = progress(opened, migration.next)
            progress_of("indexing and checking", done.filled, done.batches)
            figures = runner.execute(f"{collection.name}_migration_swap", {}, {})
            for figure in ("recall_at_10", "neighbour_overlap", "ndcg_former", "ndcg_next", "locked_ms"):
                if figure in figures:
                    setattr(result, figure, figures[figure])
            if indexes_lag(open_collection(collection, settings)):
                progress_of("building FAISS", done.filled, done.batches)
                runner.execute(f"{collection.name}_index", {}, {})
    result.seconds = round(time.perf_counter() - started, 2)
    return result
