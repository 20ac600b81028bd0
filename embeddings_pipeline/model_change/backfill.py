"""A backfill: many batches of a shadow model, written together while the vectors of the next ones are made."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack

import psycopg

from embeddings_pipeline.encoders.batch_api import MOST_TEXTS
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.shadow import (
    Backfilled,
    ShadowBatch,
    encode_batch,
    read_batch,
    wanted_texts,
    while_kept,
    write_batches,
    write_to_lake,
)
from embeddings_pipeline.pipeline.submit import check_api, submit_texts
from embeddings_pipeline.store.retry import OUTAGE_ATTEMPTS, is_outage, wait_for_outage

BATCHES_TOGETHER = 50  # their locks are held at once
BATCHES_AHEAD = 2  # that are read while one is encoded


def backfill_batches(model: Collection, batches: Iterable[int], run: str) -> Iterator[tuple[int, Backfilled]]:
    """As `backfill_batch`, for many; yields each when it is done.

    Several batches are written together, while the vectors of the next ones are made. A database that goes away is
    waited for, and what it has not got is tried again, up to OUTAGE_ATTEMPTS times.
    """
    left, attempt = dict.fromkeys(batches), 1
    while left:
        try:
            for batch, backfilled in _backfill_batches(model, list(left), run):
                del left[batch]
                attempt = 1
                yield batch, backfilled
        except (psycopg.OperationalError, DatabaseError) as error:
            if attempt == OUTAGE_ATTEMPTS or not is_outage(error):
                raise
            wait_for_outage(model.definition.name, attempt, error)
            attempt += 1


def submit_batches(model: Collection, batches: Iterable[int], run: str) -> Iterator[list[int]]:
    """Submit what these batches lack to the Batch API, in files that are as large as they may be; yields the batches of
    each file. A backfill at once leaves those texts, and one that comes when they are answered writes them.
    """
    check_api(model.profile, "batch")
    texts, group = dict[bytes, str](), dict[int, dict[bytes, str]]()
    with while_kept(model), model.database.connect(autocommit=True) as reader:
        for batch in dict.fromkeys(batches):
            wanted = wanted_texts(read_batch(model, reader, batch, run, encode=True))
            if group and len(texts) + len(wanted) > MOST_TEXTS:
                submit_texts(model, texts, group)
                yield list(group)
                texts, group = {}, {}
            texts |= wanted
            group[batch] = wanted
        submit_texts(model, texts, group)
        yield list(group)


def _backfill_batches(model: Collection, batches: Iterable[int], run: str) -> Iterator[tuple[int, Backfilled]]:
    writing: Future[list[tuple[int, Backfilled]]] | None = None
    failure: Exception | None = None
    group: list[ShadowBatch] = []
    with while_kept(model), ExitStack() as stack:
        reader, writer = (stack.enter_context(model.database.connect(autocommit=True)) for _ in range(2))
        stack.enter_context(model.model.destination.prepared(reader))
        # One reads, one writes to the lake, one to the database, while this one encodes.
        reading, filing, committing = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        coming = _read_ahead(model, reader, batches, run, reading)
        while failure is None and (group or writing is None):
            group, lake, failure = _make_group(model, coming, run, filing)
            if writing is not None:
                yield from writing.result()
            writing = committing.submit(write_batches, model, writer, group, lake)
        if writing is not None:
            yield from writing.result()
        if failure is not None:
            raise failure


def _read_ahead(
    model: Collection, connection: psycopg.Connection, batches: Iterable[int], run: str, thread: Executor
) -> Iterator[ShadowBatch]:
    """The batches as they are read, BATCHES_AHEAD of whoever takes them."""
    read: deque[Future[ShadowBatch]] = deque()
    for batch in batches:
        read.append(thread.submit(read_batch, model, connection, batch, run, encode=True))
        if len(read) > BATCHES_AHEAD:
            yield read.popleft().result()
    while read:
        yield read.popleft().result()


def _make_group(
    model: Collection, coming: Iterator[ShadowBatch], run: str, thread: Executor
) -> tuple[list[ShadowBatch], list[Future[None]], Exception | None]:
    """The next batches to be written together, their files on the way to the lake, and what went wrong after them."""
    limits = model.model.destination.limits
    group: list[ShadowBatch] = []
    lake: list[Future[None]] = []
    texts, began = 0, time.monotonic()
    try:
        for shadow in coming:
            encode_batch(model, shadow)
            group.append(shadow)
            lake.append(thread.submit(write_to_lake, model, shadow, run))
            texts += shadow.texts.num_rows
            if texts >= limits.texts or len(group) == BATCHES_TOGETHER or time.monotonic() - began > limits.seconds:
                break
    except Exception as error:
        return group, lake, error
    return group, lake, None
