"""What runs and backfills are working on now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.orchestration.dagster_internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
    BulkActionsFilter,
    BulkActionStatus,
)
from embeddings_pipeline.orchestration.names import asset_key, batch_assets, job_name

UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class UnderWay:
    """What runs and backfills are working on now."""

    partitions: frozenset[str]
    scan: bool
    index: bool
    refresh: bool


def under_way(
    instance: dg.DagsterInstance, definition: CollectionDefinition, dimensions: int, existing: Sequence[str]
) -> UnderWay:
    """What runs (this sensor's, a `sync`'s, the UI's) and backfills are working on now; `existing`: all partitions."""
    step_assets = {asset_key(definition, asset) for asset in batch_assets(dimensions)}
    index_assets = {asset_key(definition, asset) for asset in ("pgvector_index", "faiss_index")}
    place = {key: n for n, key in enumerate(existing)}
    partitions: set[str] = set()
    scan = index = refresh = False
    for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY)):
        selected = run.asset_selection or set()
        scan |= run.job_name == job_name(definition, "scan") or asset_key(definition, "item_ledger") in selected
        index |= run.job_name == job_name(definition, "index") or bool(selected & index_assets)
        refresh |= run.job_name in {job_name(definition, "refresh"), job_name(definition, "all")}
        if run.job_name != job_name(definition, "batches") and not selected & step_assets:
            continue
        first = run.tags.get(ASSET_PARTITION_RANGE_START_TAG, run.tags.get(PARTITION_NAME_TAG, ""))
        last = run.tags.get(ASSET_PARTITION_RANGE_END_TAG, first)
        if first in place and last in place:
            partitions.update(existing[place[first] : place[last] + 1])
    unfinished = BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING])
    for backfill in instance.get_backfills(filters=unfinished):  # their runs may not have been made yet
        partitions.update(_partitions_of(backfill, step_assets, job_name(definition, "batches")))
    return UnderWay(frozenset(partitions), scan, index, refresh)


def _partitions_of(backfill: Any, step_assets: set[dg.AssetKey], job_name: str) -> set[str]:
    if backfill.asset_backfill_data is not None:
        target = backfill.asset_backfill_data.target_subset
        return {
            key
            for asset in step_assets & set(target.asset_keys)
            for key in target.get_partitions_subset(asset).get_partition_keys()
        }
    origin = backfill.partition_set_origin
    return set(backfill.partition_names or []) if origin and job_name in origin.partition_set_name else set()
