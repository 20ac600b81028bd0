"""What assets have in common while they run: their collection, a step for each batch, failures in one line."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg
import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.orchestration.instance.event_log import partitions_held
from embeddings_pipeline.orchestration.resources import PipelineResource, batch_done
from embeddings_pipeline.pipeline.attempts import each_batch
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.retry import what_it_says


class Failed(dg.Failure):
    """A failure that the UI shows by its sentence, which would otherwise come after Dagster's name for the class."""

    __module__ = "builtins"


@contextmanager
def failures() -> Iterator[None]:
    """What a user can cause becomes one line in the UI; its traceback stays in the log."""
    try:
        yield
    except PipelineError as error:
        raise Failed(description=str(error), allow_retries=False) from error
    except psycopg.Error as error:
        raise Failed(description=what_it_says(error), allow_retries=False) from error


@contextmanager
def failures_kept(definition: CollectionDefinition, step: str) -> Iterator[None]:
    """As `failures`; and `status` tells why the step failed, until it goes well."""
    with failures(), failure_kept(open_database(load_settings()), definition.name, step):
        yield


def open_logged(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    definition: CollectionDefinition,
    *,
    dry_run: bool = False,
) -> Collection:
    collection = pipeline.look_at(definition) if dry_run else pipeline.open(definition)
    for warning in collection.warnings:
        context.log.warning(warning)
    return collection


def each_alone(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    definition: CollectionDefinition,
    step: Callable[[Collection, int], Mapping[str, Any]],
) -> None:
    """As `each`, for a step that takes one batch."""
    each(context, pipeline, definition, lambda collection, batches: each_batch(collection, batches, step))


def each(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    definition: CollectionDefinition,
    steps: Callable[[Collection, list[int]], Iterator[tuple[int, Mapping[str, Any]]]],
    *,
    dry_run: bool = False,
) -> None:
    """Do a step for the batches of the run, with metadata for each partition, but for a dry run."""
    with failures(), partitions_held():
        collection = open_logged(context, pipeline, definition, dry_run=dry_run)
        existing = {batch_key(batch): batch for batch in collection.ledger.batches()}
        strays = [key for key in context.partition_keys if key not in existing]  # the UI lets people add any partition
        if strays:
            message = (
                f"collection {definition.name!r} has no batch {', '.join(strays)}: delete what was added by hand; "
                f"item_ledger adds the partitions"
            )
            if len(strays) == len(context.partition_keys):
                raise ConfigurationError(message)
            context.log.warning(message)
        batches = [existing[key] for key in context.partition_keys if key in existing]
        for batch, metadata in steps(collection, batches):
            batch_done.get()(context.asset_key.path[-1], batch, metadata)
            if not dry_run:
                context.add_asset_metadata(metadata, partition_key=batch_key(batch))
