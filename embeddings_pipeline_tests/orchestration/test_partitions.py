"""Which batches a run takes together."""

import pytest

from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.orchestration.partitions import run_ranges
from embeddings_pipeline_tests.support.workbench import definition


@pytest.mark.parametrize(
    ("items_per_batch", "together"), [(1, 100), (10, 100), (40, 25), (100, 10), (1000, 10), (100_000, 10)]
)
def test_runs_and_backfills_take_ten_batches_and_of_small_ones_a_thousand_items(
    items_per_batch: int, together: int
) -> None:
    work = dict.fromkeys(range(250), items_per_batch)
    ranges = run_ranges(work, list(work), items_per_batch)
    assert {last - first + 1 for first, last in ranges[:-1]} == {together}
    assert [batch for first, last in ranges for batch in range(first, last + 1)] == list(work)

    one = definition(items_per_batch=items_per_batch)
    policy = build_definitions(one).resolve_assets_def(asset_key(one, "raw_items")).backfill_policy
    assert policy is not None and policy.max_partitions_per_run == together
