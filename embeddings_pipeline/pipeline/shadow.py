"""A shadow model gets the vectors that a batch lacks in it.

Which texts there are is in the collection's tables, so nothing is read from the source again. The encoder works outside
every transaction, and what it makes is in the lake first; the vectors of a batch reach the model's table under the
batch's lock, where no commit can change its texts.
"""

import logging
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray

from embeddings_pipeline.errors import OutageError, PipelineError, StaleRunError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.steps import embed_batches, embed_texts, embeddings_table, vectors_there
from embeddings_pipeline.store.destination.base import Change, Destination
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.retry import what_it_says
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

ATTEMPTS, FIRST_WAIT_SECONDS = 3, 2.0  # of an outage, the encoder's or the database's: 2 s, then 8 s


@dataclass
class Backfilled:
    """What backfilling one batch did, in texts."""

    texts: int = 0
    embedded: int = 0
    reused: int = 0
    quarantined: int = 0
    vectors_written: int = 0
    complete: bool = False
    seconds: float = 0.0

    def metadata(self) -> dict[str, Any]:
        rate = self.texts / self.seconds if self.seconds else 0.0
        return {**vars(self), "seconds": round(self.seconds, 3), "texts_per_second": round(rate, 1)}


def wanted_batches(model: Collection, batches: Sequence[int]) -> list[int]:
    """Which of these batches a run keeps current for the model; the others are an open migration's to backfill."""
    parameters = {"collection": model.definition.name, "fingerprint": model.fingerprint, "batches": list(batches)}
    with model.database.connect(autocommit=True) as connection:
        return [row[0] for row in connection.execute(load_sql("backfill/wanted"), parameters)]


def backfill_batch(model: Collection, batch: int, run: str, *, encode: bool = True) -> Backfilled:
    """Give each text of the batch its vector under `model`, which is not the current one (`Collection.with_model`).

    Without `encode`, only what the lake has is written. Raises StaleRunError where the model is kept no longer.
    """
    with while_kept(model), model.database.connect(autocommit=True) as connection:
        made = prepare_batch(model, connection, batch, run, encode=encode)
        if encode:
            write_to_lake(model, made, run)
        [(_, backfilled)] = write_batches(model, connection, [made])
    return backfilled


@dataclass
class ShadowBatch:
    """A batch on its way to a shadow model."""

    batch: int
    rows: list[Any]  # see `texts` of sql/backfill.sql
    backfilled: Backfilled
    vectors: dict[bytes, NDArray] = field(default_factory=dict)  # by content hash, of texts that lack theirs
    encoded: Container[bytes] = ()  # of them, what this run has made
    file: str | None = None  # of the lake
    resumed: bool = False  # it is this run's, and an earlier try has written its vectors to the table


def wait_for_outage(model: Collection, attempt: int, error: Exception) -> None:
    """Say what failed, and wait before the next of ATTEMPTS attempts: 2 s, then 8 s."""
    seconds = FIRST_WAIT_SECONDS * 4 ** (attempt - 1)
    said = what_it_says(error) if isinstance(error, psycopg.Error) else error
    log.warning("collection %r: %s; trying again in %s s", model.definition.name, said, seconds)
    time.sleep(seconds)


def prepare_batch(
    model: Collection, connection: psycopg.Connection, batch: int, run: str, *, encode: bool
) -> ShadowBatch:
    """The vectors that the batch's texts lack: from the lake, or (`encode`) made anew."""
    started = time.perf_counter()
    parameters = {
        "collection": model.definition.name,
        "fingerprint": model.fingerprint,
        "attempts": model.definition.attributes.quarantine.attempts,
        "batch": batch,
    }
    rows = connection.execute(model.current.table.statement("backfill/texts"), parameters).fetchall()
    made = ShadowBatch(batch, rows, Backfilled(texts=len(rows)))
    lacking = {digest: (text, excused) for *_, digest, text, there, excused in rows if not there}
    if lacking:
        made.vectors = vectors_there(model, batch, committed=any(there for *_, there, _ in rows))
        if encode:
            _encode(model, made, lacking)
    if rows and not (lacking and encode):  # a run that was killed may have written it, and the table too
        newest = model.lake.newest(model.folder("embeddings"), batch, run)
        made.file = newest[0].rsplit("/", 1)[-1] if newest else None
        made.resumed = not lacking and made.file is not None and made.file.startswith(run)
    made.backfilled.seconds = time.perf_counter() - started
    return made


def _encode(model: Collection, made: ShadowBatch, lacking: Mapping[bytes, tuple[str, bool]]) -> None:
    wanted = {digest: text for digest, (text, _) in lacking.items() if digest not in made.vectors}
    excused = [digest for digest in wanted if lacking[digest][1]]
    for digest in excused:
        del wanted[digest]
    vectors, bad, _ = _embed_patiently(model, wanted) if wanted else ({}, {}, {})
    made.vectors |= vectors
    made.encoded = vectors.keys()
    made.backfilled.embedded, made.backfilled.quarantined = len(vectors), len(bad) + len(excused)
    made.backfilled.reused = sum(digest in made.vectors for digest in lacking) - len(vectors)


def write_to_lake(model: Collection, made: ShadowBatch, run: str) -> None:
    """Write the batch's vectors to the lake, where they are before they are in the table."""
    if not made.vectors:
        return
    columns = list(zip(*(row[1:5] for row in made.rows), strict=True))
    names = ("item_key", "vector_name", "chunk", "content_hash")
    texts = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
    table = embeddings_table(model, texts, made.vectors, made.encoded)
    made.file = model.lake.write(table, model.folder("embeddings"), made.batch, run).rsplit("/", 1)[-1]


def _embed_patiently(
    model: Collection, texts: dict[bytes, str]
) -> tuple[dict[bytes, NDArray], dict[bytes, str], dict[bytes, int]]:
    """As `embed_texts`; an outage is waited for and tried again, up to ATTEMPTS times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return embed_texts(model, texts)
        except OutageError as error:
            wait_for_outage(model, attempt, error)
    return embed_texts(model, texts)


def write_batches(
    model: Collection, connection: psycopg.Connection, group: Sequence[ShadowBatch], lake: Iterable[Future[None]] = ()
) -> list[tuple[int, Backfilled]]:
    """Write several batches in one transaction, under their locks, once their files are in the lake; each batch with
    what was done.
    """
    for file in lake:
        file.result()
    started = time.perf_counter()
    texts = sum(made.backfilled.texts for made in group)
    table, before = model.current.table, Counter[int]()
    if table.puts_ahead(len(group), texts):
        put = [
            _Put(made.batch, row[0], row[2], row[4], made.vectors) for made in group for row in made.rows if not row[6]
        ]
        put = [one for one in put if one.content_hash in one.vectors]
        if put:
            table.put_ahead(connection, _columns(put), partial(_check_kept, model))
            before.update(one.batch for one in put)

    def write() -> None:
        with connection.transaction():
            _write(model, connection, group, before)

    if group:
        giving_way(write)
    for made in group:
        made.backfilled.seconds += (time.perf_counter() - started) * made.backfilled.texts / max(1, texts)
    return [(made.batch, made.backfilled) for made in group]


class _Put(NamedTuple):
    """A text whose vector is to be written."""

    batch: int
    text_id: int
    vector_name: str
    content_hash: bytes
    vectors: Mapping[bytes, NDArray]  # of its batch, by content hash


def _columns(put: Sequence[_Put]) -> dict[str, NDArray]:
    """Texts of one vector name, with their vectors, as `TableDestination.put` takes them."""
    name = put[0].vector_name.encode()
    return {
        "text_id": np.array([one.text_id for one in put], np.int64),
        "vector_name": np.full(len(put), name, f"S{len(name)}"),
        "content_hash": np.frombuffer(b"".join(one.content_hash for one in put), np.uint8).reshape(-1, 16),
        "embedding": np.stack([one.vectors[one.content_hash] for one in put]),
    }


@contextmanager
def while_kept(model: Collection) -> Iterator[None]:
    """What a statement says of a table that is gone is StaleRunError where the model has been dropped."""
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject):
        with model.database.connect() as connection:
            _check_kept(model, connection)
        raise


def _check_kept(model: Collection, connection: psycopg.Connection) -> None:
    """StaleRunError where the model is kept no longer; else it is kept until the transaction ends."""
    if model.current.table.name not in {kept.name for kept in model.ledger.model_tables(connection)}:
        raise _no_longer(model)


def _write(
    model: Collection, connection: psycopg.Connection, group: Sequence[ShadowBatch], before: Counter[int]
) -> None:
    """Under the batches' locks, until the transaction ends. before: vectors already written, by batch."""
    table, by_batch = model.current.table, {made.batch: made for made in group}
    batches = sorted(by_batch)
    key = {"collection": model.definition.name, "fingerprint": model.fingerprint, "batches": batches}
    for batch in batches:
        lock_batch(connection, model.definition.name, batch)
    _check_kept(model, connection)
    lacking = connection.execute(table.statement("backfill/lacking"), key).fetchall()
    # A text that has come since `rows` were read is left: its batch is not complete then.
    known = {row[0]: row[2] for made in group for row in made.rows}
    put = [
        _Put(batch, text_id, known[text_id], digest, by_batch[batch].vectors)
        for batch, text_id, digest, _ in lacking
        if text_id in known and digest in by_batch[batch].vectors
    ]
    for _, own in groupby(sorted(put, key=attrgetter("vector_name")), attrgetter("vector_name")):
        table.put(connection, _columns(list(own)))
    written = before + Counter(one.batch for one in put)
    mended, done = (change.statement for change in note_changes(table))
    if written:
        connection.execute(mended, key)
    # Last, since commits of other batches wait for it: no swap makes this model the current one until we have ended.
    current = "SELECT fingerprint FROM embeddings.collection WHERE name = %s FOR SHARE"
    if connection.execute(current, [model.definition.name]).fetchone() == (model.fingerprint,):
        raise StaleRunError(
            f"collection {model.definition.name!r}: profile {model.profile.name!r} has become the current model"
        )
    there = {one.text_id for one in put}
    incomplete = {batch for batch, text_id, _, excused in lacking if text_id not in there and not excused}
    for batch, made in by_batch.items():
        made.backfilled.vectors_written = written[batch]
        made.backfilled.complete = batch not in incomplete
    noted = {
        "complete": [batch not in incomplete for batch in batches],
        "wrote": [written[batch] > 0 or by_batch[batch].resumed for batch in batches],
        "file": [by_batch[batch].file for batch in batches],
    }
    connection.execute(done, {**key, **noted})


def note_changes(destination: Destination) -> list[Change]:
    """What follows in the transaction in which vectors of a shadow model are written."""
    return [
        Change(destination.statement("backfill/mended"), "ROW EXCLUSIVE of embeddings.quarantine"),
        Change(destination.statement("backfill/done"), "ROW EXCLUSIVE of embeddings.backfill"),
    ]


def embed_shadows(shadows: Sequence[Collection], batches: Sequence[int], run: str) -> None:
    """Encode what a run rendered with each shadow model, for `backfill_shadows` to write. An outage of such a
    model does not stop the run: what it lacks stays marked.
    """
    for model in shadows:
        try:
            for _ in embed_batches(model, wanted_batches(model, batches), run):
                pass
        except StaleRunError:
            continue
        except (PipelineError, psycopg.Error) as error:
            _warn(model, error)


def backfill_shadows(shadows: Sequence[Collection], batch: int, run: str) -> None:
    """After a commit: each shadow model gets what the run made for it. What it lacks stays marked, and
    the batch waits before it is tried again.
    """
    for model in shadows:
        try:
            if wanted_batches(model, [batch]) and not backfill_batch(model, batch, run, encode=False).complete:
                model.ledger.note_attempts([batch])
        except StaleRunError:  # it was dropped meanwhile
            continue
        except (PipelineError, psycopg.Error) as error:
            _warn(model, error)


def _warn(model: Collection, error: Exception) -> None:
    name = (model.definition.name, model.profile.name)
    log.warning("collection %r: profile %s, beside the current one, is behind: %s", *name, error)


def _no_longer(model: Collection) -> StaleRunError:
    return StaleRunError(
        f"collection {model.definition.name!r}: profile {model.profile.name!r} ({model.fingerprint}) is kept no longer"
    )
