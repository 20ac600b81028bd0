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
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.ledger.quarantine import LONGEST_TEXT_WAIT
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.embed import EmbeddedTexts, embed_batches, embed_texts
from embeddings_pipeline.pipeline.vectors import embeddings_table, vectors_there
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.retry import outage_attempts
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)


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

    @property
    def texts_per_second(self) -> float:
        return round(self.texts / self.seconds, 1) if self.seconds else 0.0


def wanted_batches(model: Collection, batches: Sequence[int]) -> list[int]:
    """Which of these batches a run keeps current for the model; the others are an open migration's to backfill."""
    parameters = {"collection": model.definition.name, "fingerprint": model.fingerprint, "batches": list(batches)}
    with model.database.connect(autocommit=True) as connection:
        return [row[0] for row in connection.execute(load_sql("backfill/wanted"), parameters)]


def backfill_batch(model: Collection, batch: int, run: str, *, encode: bool = True) -> Backfilled:
    """Give each text of the batch its vector under `model`, which is not the current one (`Collection.with_model`).

    Without `encode`, only what the lake has is written. Raises StaleRunError if the model is kept no longer.
    """
    with while_kept(model), model.database.connect(autocommit=True) as connection:
        shadow = prepare_batch(model, connection, batch, run, encode=encode)
        if encode:
            write_to_lake(model, shadow, run)
        [(_, backfilled)] = write_batches(model, connection, [shadow])
    return backfilled


@dataclass
class ShadowBatch:
    """A batch on its way to a shadow model."""

    batch: int
    rows: list[Any]  # see `texts` of sql/backfill.sql
    backfilled: Backfilled
    vectors: dict[bytes, NDArray] = field(default_factory=dict)  # by content hash, of texts that lack theirs
    encoded: Container[bytes] = ()  # of them, what this run has encoded
    file: str | None = None  # of the lake
    resumed: bool = False  # the file is this run's, and an earlier try has written its vectors to the table


def prepare_batch(
    model: Collection, connection: psycopg.Connection, batch: int, run: str, *, encode: bool
) -> ShadowBatch:
    """The vectors that the batch's texts lack: from the lake, or (`encode`) encoded anew."""
    started = time.perf_counter()
    parameters = {
        "collection": model.definition.name,
        "fingerprint": model.fingerprint,
        "attempts": model.definition.attributes.quarantine.attempts,
        "longest_text": LONGEST_TEXT_WAIT,
        "batch": batch,
    }
    rows = connection.execute(model.model.destination.statement("backfill/texts"), parameters).fetchall()
    shadow = ShadowBatch(batch, rows, Backfilled(texts=len(rows)))
    lacking = {digest: (text, excused) for *_, digest, text, has_vector, excused in rows if not has_vector}
    if lacking:
        shadow.vectors = vectors_there(model, batch, committed=any(has_vector for *_, has_vector, _ in rows))
        if encode:
            _encode(model, shadow, lacking)
    if rows and not (lacking and encode):  # a run that was killed may have written it, and the table too
        newest = model.lake.newest(model.folder("embeddings"), batch, run)
        shadow.file = newest[0].rsplit("/", 1)[-1] if newest else None
        shadow.resumed = not lacking and shadow.file is not None and shadow.file.startswith(run)
    shadow.backfilled.seconds = time.perf_counter() - started
    return shadow


def _encode(model: Collection, shadow: ShadowBatch, lacking: Mapping[bytes, tuple[str, bool]]) -> None:
    wanted = {digest: text for digest, (text, _) in lacking.items() if digest not in shadow.vectors}
    excused = [digest for digest in wanted if lacking[digest][1]]
    for digest in excused:
        del wanted[digest]
    made = _embed_patiently(model, wanted) if wanted else EmbeddedTexts()
    shadow.vectors |= made.vectors
    shadow.encoded = made.vectors.keys()
    shadow.backfilled.embedded, shadow.backfilled.quarantined = len(made.encoded), len(made.bad) + len(excused)
    shadow.backfilled.reused = sum(digest in shadow.vectors for digest in lacking) - len(made.encoded)


def write_to_lake(model: Collection, shadow: ShadowBatch, run: str) -> None:
    """Write the batch's vectors to the lake, where they are before they are in the table."""
    if not shadow.vectors:
        return
    columns = list(zip(*(row[1:5] for row in shadow.rows), strict=True))
    names = ("item_key", "vector_name", "chunk", "content_hash")
    texts = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
    table = embeddings_table(model, texts, shadow.vectors, shadow.encoded)
    shadow.file = model.lake.write(table, model.folder("embeddings"), shadow.batch, run).rsplit("/", 1)[-1]


def _embed_patiently(model: Collection, texts: dict[bytes, str]) -> EmbeddedTexts:
    """As `embed_texts`; an outage is waited for and tried again, up to OUTAGE_ATTEMPTS times."""
    for attempt in outage_attempts(model.definition.name, OutageError):
        with attempt:
            return embed_texts(model, texts)
    raise AssertionError("unreachable")


def write_batches(
    model: Collection, connection: psycopg.Connection, group: Sequence[ShadowBatch], lake: Iterable[Future[None]] = ()
) -> list[tuple[int, Backfilled]]:
    """Write several batches in one transaction, under their locks, once their files are in the lake; each batch with
    what was done.
    """
    if group:
        failpoint("backfill.group", batches=[made.batch for made in group])
    for file in lake:
        file.result()
    started = time.perf_counter()
    texts = sum(shadow.backfilled.texts for shadow in group)
    table, before = model.model.destination, Counter[int]()
    if (put_ahead := table.put_ahead(len(group), texts)) is not None:
        put = [
            _NewVector(shadow.batch, text_id, vector_name, digest, shadow.vectors)
            for shadow in group
            for text_id, _, vector_name, _, digest, _, has_vector, _ in shadow.rows
            if not has_vector and digest in shadow.vectors
        ]
        if put:
            put_ahead(connection, _columns(put), partial(_check_kept, model))
            before.update(vector.batch for vector in put)

    def write() -> None:
        with connection.transaction():
            _write(model, connection, group, before)

    if group:
        giving_way(write)
    for shadow in group:
        shadow.backfilled.seconds += (time.perf_counter() - started) * shadow.backfilled.texts / max(1, texts)
    return [(shadow.batch, shadow.backfilled) for shadow in group]


class _NewVector(NamedTuple):
    """A text whose vector is to be written."""

    batch: int
    text_id: int
    vector_name: str
    content_hash: bytes
    vectors: Mapping[bytes, NDArray]  # of its batch, by content hash


def _columns(put: Sequence[_NewVector]) -> dict[str, NDArray]:
    """Texts of one vector name, with their vectors, as `Destination.put` takes them."""
    name = put[0].vector_name.encode()
    return {
        "text_id": np.array([vector.text_id for vector in put], np.int64),
        "vector_name": np.full(len(put), name, f"S{len(name)}"),
        "content_hash": np.frombuffer(b"".join(vector.content_hash for vector in put), np.uint8).reshape(-1, 16),
        "embedding": np.stack([vector.vectors[vector.content_hash] for vector in put]),
    }


@contextmanager
def while_kept(model: Collection) -> Iterator[None]:
    """What a statement says of a table that is gone is StaleRunError if the model has been dropped."""
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject):
        with model.database.connect() as connection:
            _check_kept(model, connection)
        raise


def _check_kept(model: Collection, connection: psycopg.Connection) -> None:
    """StaleRunError if the model is kept no longer; else it is kept until the transaction ends."""
    if model.model.destination.name not in {kept.name for kept in model.ledger.model_tables(connection)}:
        raise _no_longer(model)


def _write(
    model: Collection, connection: psycopg.Connection, group: Sequence[ShadowBatch], before: Counter[int]
) -> None:
    """Under the batches' locks, until the transaction ends. before: vectors already written, by batch."""
    failpoint("backfill.write")
    table, by_batch = model.model.destination, {shadow.batch: shadow for shadow in group}
    batches = sorted(by_batch)
    key = {"collection": model.definition.name, "fingerprint": model.fingerprint, "batches": batches}
    for batch in batches:
        lock_batch(connection, model.definition.name, batch)
    _check_kept(model, connection)
    lacking = connection.execute(table.statement("backfill/lacking"), key).fetchall()
    # A text that has come since `rows` were read is left: its batch is not complete then.
    known = {row[0]: row[2] for shadow in group for row in shadow.rows}
    put = [
        _NewVector(batch, text_id, known[text_id], digest, by_batch[batch].vectors)
        for batch, text_id, digest, _ in lacking
        if text_id in known and digest in by_batch[batch].vectors
    ]
    for _, own in groupby(sorted(put, key=attrgetter("vector_name")), attrgetter("vector_name")):
        table.put(connection, _columns(list(own)))
    written = before + Counter(vector.batch for vector in put)
    mended, done = (change.statement for change in note_changes(table))
    if written:
        connection.execute(mended, key)
    # Last, since commits of other batches wait for it: no swap makes this model the current one until we have ended.
    current = "SELECT fingerprint FROM embeddings.collection WHERE name = %s FOR SHARE"
    if connection.execute(current, [model.definition.name]).fetchone() == (model.fingerprint,):
        raise StaleRunError(
            f"collection {model.definition.name!r}: profile {model.profile.name!r} has become the current model"
        )
    new = {vector.text_id for vector in put}
    incomplete = {batch for batch, text_id, _, excused in lacking if text_id not in new and not excused}
    for batch, shadow in by_batch.items():
        shadow.backfilled.vectors_written = written[batch]
        shadow.backfilled.complete = batch not in incomplete
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
