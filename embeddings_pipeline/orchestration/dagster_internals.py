"""Every import of Dagster that its documentation does not promise; other modules take these names from here.

Each has a comment with the public call that would replace it, or says that there is none. The pin on Dagster's minor
version is because of this module: look through it before the pin is raised.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING

# Runs in this process, with events as they come. `dg.execute_job` needs a job that another process could load, and
# `JobDefinition.execute_in_process` neither takes a run that exists nor yields events.
from dagster._check import CheckError  # what it raises if dagster.yaml names a class that is not there
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run_iterator

# Which backfills are open. No public call: `DagsterInstance.get_backfills` takes this filter.
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

# Whether a run's process lives. `RunLauncher` is documented for launchers of one's own, what its methods take is not.
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, WorkerStatus

# Where a run of ours comes from: the UI's first page shows no run without it. No public call.
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin

# How a check ended before. No public call: `dg.AssetCheckEvaluation` has no history.
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

# A storage and a log manager of our own, named in dagster.yaml. No public call.
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.compute_log_manager import CapturedLogContext

# The table of events, for writing those of planned partitions together; that of the pools, for a default limit that two
# processes set at once. No public call.
from dagster._core.storage.event_log.schema import ConcurrencyLimitsTable, SqlEventLogStorageTable
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage

# The tags that say which partitions a run has. `context.partition_key_range` says it, but only within a run.
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    GRPC_INFO_TAG,  # how a run's code server is reached
    MAX_RETRIES_TAG,  # documented, as `dagster/max_retries`
    PARTITION_NAME_TAG,
    REPOSITORY_LABEL_TAG,
)

# A run's id before the run, for its lock. `uuid.uuid4()` gives the same today.
from dagster._core.utils import make_new_run_id

# `dg.ConfigurableClass` does not exist; dagster.yaml takes nothing else.
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from dagster._utils import touch_file  # pathlib.Path.touch, after making the folder
from dagster._utils.error import SerializableErrorInfo  # only a type: what events carry as their error

# A terminal's log as Dagster writes it. `dg.colored_console_logger` has no level of ours.
from dagster._utils.log import create_console_logger

# The three storages on PostgreSQL are documented for dagster.yaml, not as classes to inherit from.
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage
from dagster_postgres.utils import DagsterPostgresException

if TYPE_CHECKING:
    from dagster._grpc.client import DagsterGrpcClient as DagsterGrpcClient


# What Dagster imports only when a run begins: to be imported before it. There is no list of it; a test compares.
MODULES_OF_A_RUN = [
    "dagster._core.definitions.external_asset",
    "dagster._core.definitions.repository_definition.repository_data_builder",
    "dagster._core.execution.plan.active",
    "dagster._core.executor.in_process",
    "dagster._core.instance.factory",
    "dagster._core.secrets.env_file",
    "dagster._core.storage.sqlite_storage",
    "dagster._core.system_config.composite_descent",
    "dagster._core.types.primitive_mapping",
    "dagster._core.types.transform_typing",
    "dagster._core.utility_ops",
    "dagster._grpc.impl",
    "dagster._grpc.server",
    "dagster._utils.test.definitions",
]


def grpc_client(*, host: str = "localhost", port: int | None = None, socket: str | None = None) -> "DagsterGrpcClient":
    """For asking the process in front of a code server to load the definitions anew. No public call but GraphQL's, and
    a code server does not know where the webserver is. Its import takes long.
    """
    from dagster._grpc.client import DagsterGrpcClient

    return DagsterGrpcClient(host=host, port=port, socket=socket)


def start_runs_by(context: Callable[[], BaseContext | None]) -> None:
    """Have this process, if it is a code server, start the processes of runs by that context of multiprocessing; by
    Dagster's own, if there is none. No public call: a code server always spawns them.
    """
    from dagster._grpc.server import DagsterApiServer

    own = multiprocessing.get_context("spawn")
    # A property of the class comes before the attribute that the server, which is just being made, has set on itself.
    chosen = property(lambda server: context() or own, lambda server, given: None)
    DagsterApiServer._mp_ctx = chosen  # type: ignore[assignment]


__all__ = [
    "ASSET_PARTITION_RANGE_END_TAG",
    "ASSET_PARTITION_RANGE_START_TAG",
    "GRPC_INFO_TAG",
    "MAX_RETRIES_TAG",
    "MODULES_OF_A_RUN",
    "PARTITION_NAME_TAG",
    "REPOSITORY_LABEL_TAG",
    "AssetCheckExecutionRecordStatus",
    "BulkActionStatus",
    "BulkActionsFilter",
    "CapturedLogContext",
    "CheckError",
    "CheckRunHealthResult",
    "ConcurrencyLimitsTable",
    "ConfigurableClass",
    "ConfigurableClassData",
    "DagsterPostgresException",
    "DagsterStorage",
    "InMemoryJob",
    "LaunchRunContext",
    "LocalArtifactStorage",
    "LocalComputeLogManager",
    "PostgresEventLogStorage",
    "PostgresRunStorage",
    "PostgresScheduleStorage",
    "RegisteredCodeLocationOrigin",
    "RemoteRepositoryOrigin",
    "SerializableErrorInfo",
    "SqlEventLogStorageTable",
    "WorkerStatus",
    "create_console_logger",
    "execute_run_iterator",
    "grpc_client",
    "make_new_run_id",
    "start_runs_by",
    "touch_file",
]
