"""A step for many batches, a few at a time; those of which it failed wait before they are tried again."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import psycopg

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import one_line
from embeddings_pipeline.store.retry import what_it_says
from embeddings_pipeline.store.session import end_statements

Report = TypeVar("Report")


AT_ONCE, ITEMS_AT_ONCE = 2, 10_000
"""Batches that a step is at work on, since one waits for the database while another computes; and not many more items.
"""


def each_batch(
    collection: Collection, batches: Iterable[int], step: Callable[[Collection, int], Report]
) -> Iterator[tuple[int, Report]]:
    """Do a step for each batch; yields the batches in their order with what the step returns.

    It is done in threads, some batches ahead of whoever takes them: steps one after the other, of which each
    takes its batches from the one before, are at work at the same time. If a batch fails, here or in a step before,
    what was begun is done and yielded, and then the error is raised.
    """

    def work(batch: int) -> Report:
        with failure_noted(collection, [batch]):
            return step(collection, batch)

    most = max(1, min(AT_ONCE, ITEMS_AT_ONCE // collection.definition.attributes.items_per_batch))
    begun: deque[tuple[int, Future[Report]]] = deque()
    failures: list[Exception] = []

    def first_done() -> Iterator[tuple[int, Report]]:
        batch, future = begun.popleft()
        try:
            report = future.result()
        except Exception as error:
            failures.append(error)
        else:
            yield batch, report

    coming = iter(batches)
    with _threads() as threads, _closed(coming):
        while not failures:
            try:
                batch = next(coming)
            except StopIteration:
                break
            except Exception as error:
                failures.append(error)
                break
            begun.append((batch, threads.submit(work, batch)))
            if len(begun) >= most:
                yield from first_done()
        while begun:
            yield from first_done()
    if failures:
        raise failures[0]


@contextmanager
def _closed(iterator: Iterator[int]) -> Iterator[None]:
    """With the block a step before ends as well, if it is one."""
    try:
        yield
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that end with the block; what they wait for is cancelled, unless that comes to its end."""
    own: set[int] = set()
    threads = ThreadPoolExecutor(AT_ONCE, initializer=lambda: own.add(threading.get_ident()))
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        end_statements(own)
        raise
    finally:
        threads.shutdown()


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
