"""A step for many batches, a few at a time or together; those of which it failed wait before they are tried again."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeAlias, TypeVar

import psycopg

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import one_line
from embeddings_pipeline.store.retry import what_it_says
from embeddings_pipeline.store.session import end_statements

log = logging.getLogger(__name__)

Report = TypeVar("Report")

AT_ONCE, ITEMS_AT_ONCE = 2, 10_000
"""Batches that a step is at work on, since one waits for the database while another computes; and not many more items.
"""
ITEMS_TOGETHER = 5_000  # of batches that a step takes together: each statement is for all of them

Done: TypeAlias = "tuple[Mapping[int, Report], Exception | None]"  # reports by batch, and what failed after these


def each_batch(
    collection: Collection, batches: Iterable[int], step: Callable[[Collection, int], Report]
) -> Iterator[tuple[int, Report]]:
    """Do a step for each batch; yields the batches in their order with what the step returns.

    It is done in threads, some batches ahead of whoever takes them: steps one after the other, of which each
    takes its batches from the one before, are at work at the same time. If a batch fails, here or in a step before,
    what was begun is done and yielded, and then the error is raised.
    """
    return each_group(collection, batches, lambda collection, group: {group[0]: step(collection, group[0])}, items=0)


def each_group(
    collection: Collection,
    batches: Iterable[int],
    step: Callable[[Collection, Sequence[int]], Mapping[int, Report]],
    *,
    items: int = ITEMS_TOGETHER,
) -> Iterator[tuple[int, Report]]:
    """As `each_batch`, for a step that takes several batches together, up to so many items: those that wait when it
    begins. If it fails for several, it is done for each of them by itself, so that a failure is that batch's own.
    """
    per_batch = collection.definition.attributes.items_per_batch
    together = max(1, items // per_batch)
    most = max(1, min(AT_ONCE * together, ITEMS_AT_ONCE // per_batch))
    waiting: deque[int] = deque()
    taking = threading.Lock()
    begun: deque[Future[Done[Report]]] = deque()
    failures: list[Exception] = []
    under_way = 0

    def work() -> "Done[Report]":
        with taking:
            group = [waiting.popleft() for _ in range(min(together, len(waiting)))]
        return _done(collection, group, step, stopped)

    def first_done() -> Iterator[tuple[int, Report]]:
        nonlocal under_way
        done, failure = begun.popleft().result()
        for batch, report in done.items():
            under_way -= 1
            yield batch, report
        if failure is not None:
            failures.append(failure)

    coming = iter(batches)
    with _threads() as (threads, stopped), _closed(coming):
        while not failures:
            try:
                batch = next(coming)
            except StopIteration:
                break
            except Exception as error:
                failures.append(error)
                break
            waiting.append(batch)
            under_way += 1
            begun.append(threads.submit(work))
            while under_way >= most and not failures:
                yield from first_done()
        while begun:
            yield from first_done()
    if failures:
        raise failures[0]


def _done(
    collection: Collection,
    group: Sequence[int],
    step: Callable[[Collection, Sequence[int]], Mapping[int, Report]],
    stopped: threading.Event,
) -> "Done[Report]":
    """A step for some batches together; if that fails, for each by itself, up to one that fails."""
    if len(group) > 1:
        try:
            return step(collection, group), None
        except Exception as error:
            if stopped.is_set():
                return {}, error
            log.info("batches %s are done one by one: %s", ", ".join(map(str, group)), _reason(error))
    done: dict[int, Report] = {}
    for batch in group:
        try:
            with failure_noted(collection, [batch]):
                done |= step(collection, [batch])
        except Exception as error:
            return done, error
    return done, None


@contextmanager
def _closed(iterator: Iterator[int]) -> Iterator[None]:
    """With the block a step before ends as well, if it is one."""
    try:
        yield
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


@contextmanager
def _threads() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that end with the block; what they wait for is cancelled, unless that comes to its end: the event says
    so.
    """
    own: set[int] = set()
    stopped = threading.Event()
    threads = ThreadPoolExecutor(AT_ONCE, initializer=lambda: own.add(threading.get_ident()))
    try:
        yield threads, stopped
    except BaseException:
        stopped.set()
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
