"""What tests import of Dagster that its documentation does not promise, beside what the package's own module has."""

from dagster._core.events import EngineEventData
from dagster._core.execution.api import execute_run
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.instance import InstanceRef
from dagster._core.test_utils import create_run_for_test

__all__ = [
    "AssetBackfillData",
    "EngineEventData",
    "InstanceRef",
    "PartitionBackfill",
    "create_run_for_test",
    "execute_run",
]
