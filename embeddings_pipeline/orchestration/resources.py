"""The one resource: opens collections, and holds the lock that says a run is alive (rule 11)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.health.activity import activity, this_process
from embeddings_pipeline.ledger.full_scan import FullScan
from embeddings_pipeline.orchestration.dagster_internals import create_console_logger
from embeddings_pipeline.orchestration.instance.liveness import SYNC_TAG, process_tags
from embeddings_pipeline.orchestration.names import collections_of
from embeddings_pipeline.pipeline.collection import Collection, look_at_collection, open_collection
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.locks import run_lock

# Called as (asset, batch, figures) when a step of a batch is done; a `sync` in this process listens, for its progress.
batch_done: ContextVar[Callable[[str, int, Mapping[str, Any]], None]] = ContextVar(
    "batch_done", default=lambda asset, batch, figures: None
)
# What a `sync` in this process has just seen of the source, so that its run does not read it a second time.
scanned_ahead: ContextVar[FullScan | None] = ContextVar("scanned_ahead", default=None)


@contextmanager
def known_to_live(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Within it the run holds its liveness lock, and has noted that this process executes it."""
    with run_lock(open_database(load_settings()), run_id):
        instance.add_run_tags(run_id, process_tags(run_id))
        yield


class PipelineResource(dg.ConfigurableResource):
    """Gives assets and checks their collection, with settings read from the environment."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["PipelineResource"]:
        """While the resource is in use, its run holds its liveness lock."""
        if context.run is None or context.instance is None:
            yield self
            return
        run, database = context.run, open_database(load_settings())
        with ExitStack() as stack:
            stack.enter_context(known_to_live(context.instance, run.run_id))
            if SYNC_TAG not in run.tags:  # else it is a part of what notes itself
                who = f"Dagster's run {run.run_id[:8]}, {this_process()}"
                for name in collections_of(run.job_name, run.asset_selection or ()):
                    stack.enter_context(activity(database, name, run.job_name, who, run.run_id))
            yield self

    def open(self, definition: CollectionDefinition) -> Collection:
        """The collection with its database, lake and current model."""
        return open_collection(definition, load_settings())

    def look_at(self, definition: CollectionDefinition) -> Collection:
        """The same for a dry run: nothing is written."""
        return look_at_collection(definition, load_settings())


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
