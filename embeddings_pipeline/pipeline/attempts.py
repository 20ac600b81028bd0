"""Batches of which a step failed wait before they are tried again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import psycopg

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import one_line
from embeddings_pipeline.store.retry import what_it_says

Report = TypeVar("Report")


def each_batch(
    collection: Collection, batches: Iterable[int], step: Callable[[Collection, int], Report]
) -> Iterator[tuple[int, Report]]:
    """Do a step batch by batch; yields each batch with what the step returns."""
    for batch in batches:
        with failure_noted(collection, [batch]):
            report = step(collection, batch)
        yield batch, report


@contextmanager
def failure_noted(collection: Collection, batches: Sequence[int]) -> Iterator[None]:
    """Note an attempt at these batches, and why it failed, if what is done within fails."""
    try:
        yield
    except Exception as error:
        with suppress(PipelineError, psycopg.Error):  # the database may be what failed
            collection.ledger.note_attempts(batches)
            collection.ledger.note_failure(batches, _reason(error))
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, psycopg.Error):
        return what_it_says(error)
    return str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {one_line(error)}"
