"""The one resource: opens collections, and holds the lock that says a run is alive (rule 11)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b

import dagster as dg
import psycopg
from dagster._utils.log import create_console_logger

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database, open_database

# Called as (asset, batch) when a step of a batch is done; a `sync` in this process listens, for its progress bar.
batch_done: ContextVar[Callable[[str, int], None]] = ContextVar("batch_done", default=lambda asset, batch: None)


class PipelineResource(dg.ConfigurableResource):
    """Gives assets and checks their collection, with settings read from the environment."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["PipelineResource"]:
        """While the resource is in use, its run holds its liveness lock."""
        if context.run is None:
            yield self
            return
        with run_lock(open_database(load_settings()), context.run.run_id):
            yield self

    def open(self, definition: CollectionDefinition) -> Collection:
        """The collection with its database, lake and current model."""
        return open_collection(definition, load_settings())


@contextmanager
def run_lock(database: Database, run_id: str) -> Iterator[None]:
    """Hold the session lock that says this run is alive. PostgreSQL lets it go when the process dies, however it dies.

    A `sync` holds it from before its run is created; the run's own resource then finds it taken, and that is fine.
    """
    with database.connect(autocommit=True, application_name=f"embeddings-pipeline run {run_id[:8]}") as connection:
        connection.execute("SELECT pg_try_advisory_lock(%s)", [_lock_key(run_id)])
        yield


def run_locked(connection: psycopg.Connection, run_id: str) -> bool:
    """Whether some process holds the run's liveness lock."""
    row = connection.execute("SELECT pg_try_advisory_lock_shared(%s)", [_lock_key(run_id)]).fetchone()
    free = bool(row and row[0])
    if free:
        connection.execute("SELECT pg_advisory_unlock_shared(%s)", [_lock_key(run_id)])
    return not free


def _lock_key(run_id: str) -> int:
    return int.from_bytes(blake2b(f"run/{run_id}".encode(), digest_size=8).digest(), "big", signed=True)


@dg.logger(
    description="Warnings and errors of runs, on the terminal; the UI has everything.",
    config_schema={"log_level": dg.Field(str, is_required=False, default_value="WARNING")},
)
def console(context: dg.InitLoggerContext) -> logging.Logger:
    return create_console_logger("dagster", logging.getLevelNamesMapping()[context.logger_config["log_level"]])


# One object of each for all collections: merged definitions compare resources and executors by identity.
PIPELINE = PipelineResource()
EXECUTOR = dg.in_process_executor
LOGGERS = {"console": console}
