"""A shadow model gets the vectors that a batch lacks in it.

Which texts there are is in the collection's tables, so nothing is read from the source again. The encoder works outside
every transaction, and what it makes is in the lake first; the vectors of a batch reach the model's table under the
batch's lock, where no commit can change its texts.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from embeddings_pipeline.config.prices import Api, is_hosted
from embeddings_pipeline.errors import OutageError, PipelineError, StaleRunError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.ledger.quarantine import LONGEST_TEXT_WAIT
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.embed import EmbedOptions, Encoded, embed_batches, embed_texts, texts_by_hash
from embeddings_pipeline.pipeline.vectors import Vectors, embeddings_table, joined, no_vectors, vectors_there
from embeddings_pipeline.store.copy_binary import Column, columns_of
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.lake import ITEM_TEXTS
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.retry import outage_attempts
from embeddings_pipeline.store.source_rows import HASH
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)


@dataclass
class Backfilled:
    """What backfilling one batch did, in texts."""

    texts: int = 0
    embedded: int = 0
    reused: int = 0
    quarantined: int = 0
    in_jobs: int = 0  # that batch jobs have: their vectors come later
    vectors_written: int = 0
    complete: bool = False
    seconds: float = 0.0

    @property
    def texts_per_second(self) -> float:
        return round(self.texts / self.seconds, 1) if self.seconds else 0.0


def wanted_batches(model: Collection, batches: Sequence[int]) -> list[int]:
    """Which of these batches a run keeps current for the model; the others are an open migration's to backfill."""
    parameters = {"collection": model.definition.name, "fingerprint": model.fingerprint, "batches": list(batches)}
    with model.database.session() as connection:
        return [row[0] for row in connection.execute(load_sql("backfill/wanted"), parameters)]


def backfill_batch(model: Collection, batch: int, run: str, *, encode: bool = True) -> Backfilled:
    """Give each text of the batch its vector under `model`, which is not the current one (`Collection.with_model`).

    Without `encode`, only what the lake has is written. Raises StaleRunError if the model is kept no longer.
    """
    with while_kept(model), model.database.session() as connection:
        shadow = read_batch(model, connection, batch, run, encode=encode)
        if encode:
            encode_batch(model, shadow)
            write_to_lake(model, shadow, run)
        [(_, backfilled)] = write_batches(model, connection, [shadow])
    return backfilled


@dataclass
class ShadowBatch:
    """A batch on its way to a shadow model."""

    batch: int
    texts: pa.Table  # SHADOW_TEXTS
    vectors: Vectors  # of texts that lack theirs
    encoded: Vectors  # of them, what this run has encoded
    backfilled: Backfilled
    file: str | None = None  # of the lake
    resumed: bool = False  # the file is this run's, and an earlier try has written its vectors to the table


# See `texts` and `lacking` of sql/backfill.sql.
SHADOW_TEXTS = pa.schema(
    [
        ("text_id", pa.int64()),
        *((name, ITEM_TEXTS.field(name).type) for name in ("item_key", "vector_name", "chunk", "content_hash", "text")),
        ("has_vector", pa.bool_()),
        ("excused", pa.bool_()),
    ]
)
LACKING = pa.schema([("batch", pa.int64()), ("text_id", pa.int64()), ("content_hash", HASH), ("excused", pa.bool_())])


def _selected(
    connection: psycopg.Connection, query: sql.Composed, parameters: Mapping[str, Any], schema: pa.Schema
) -> pa.Table:
    """The rows of a query as columns."""
    rows = connection.execute(query, parameters, binary=True).fetchall()
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(schema), schema=schema)


def read_batch(model: Collection, connection: psycopg.Connection, batch: int, run: str, *, encode: bool) -> ShadowBatch:
    """The batch's texts, and what is there for those that lack their vector. `encode`: `encode_batch` follows."""
    started = time.perf_counter()
    parameters = {
        "collection": model.definition.name,
        "fingerprint": model.fingerprint,
        "attempts": model.definition.attributes.quarantine.attempts,
        "longest_text": LONGEST_TEXT_WAIT,
        "batch": batch,
    }
    texts = _selected(connection, model.model.destination.statement("backfill/texts"), parameters, SHADOW_TEXTS)
    nothing = no_vectors(model.model.destination.dimension)
    shadow = ShadowBatch(batch, texts, nothing, nothing, Backfilled(texts=texts.num_rows))
    lacking = texts.filter(pc.invert(texts["has_vector"]))
    if lacking.num_rows:
        shadow.vectors = vectors_there(model, batch, committed=lacking.num_rows < texts.num_rows)
    if texts.num_rows and not (lacking.num_rows and encode):  # a run that was killed may have written it, and the table
        newest = model.lake.newest(model.folder("embeddings"), batch, run)
        shadow.file = newest[0].rsplit("/", 1)[-1] if newest else None
        shadow.resumed = not lacking.num_rows and shadow.file is not None and shadow.file.startswith(run)
    shadow.backfilled.seconds = time.perf_counter() - started
    return shadow


def encode_batch(model: Collection, shadow: ShadowBatch) -> None:
    """Make the vectors that are not there, but for those of texts that quarantine excuses."""
    started = time.perf_counter()
    lacking, unknown = _lacking(shadow)
    excused = unknown.filter(unknown["excused"])["content_hash"].unique()
    if wanted := wanted_texts(shadow):
        made = _embed_patiently(model, wanted)
        shadow.encoded, shadow.backfilled.quarantined = made.vectors, len(made.bad)
        shadow.backfilled.in_jobs = len(made.in_jobs)
        shadow.backfilled.embedded = len(made.vectors) - len(made.cached)
        shadow.vectors = joined([made.vectors, shadow.vectors], model.model.destination.dimension)
    shadow.backfilled.quarantined += len(excused)
    had = int(shadow.vectors.has(pa.chunked_array([lacking["content_hash"].unique()])).sum())
    shadow.backfilled.reused = had - shadow.backfilled.embedded
    shadow.backfilled.seconds += time.perf_counter() - started


def wanted_texts(shadow: ShadowBatch) -> dict[bytes, str]:
    """Content hash → text, of what is to be encoded."""
    _, unknown = _lacking(shadow)
    return texts_by_hash(unknown.filter(pc.invert(unknown["excused"])))


def _lacking(shadow: ShadowBatch) -> tuple[pa.Table, pa.Table]:
    """The texts that have no vector in the table, and of these those that have none anywhere."""
    lacking = shadow.texts.filter(pc.invert(shadow.texts["has_vector"]))
    return lacking, lacking.filter(~shadow.vectors.has(lacking["content_hash"]))


def write_to_lake(model: Collection, shadow: ShadowBatch, run: str) -> None:
    """Write the batch's vectors to the lake, where they are before they are in the table."""
    if not len(shadow.vectors):
        return
    table = embeddings_table(model, shadow.texts, shadow.encoded, shadow.vectors)
    shadow.file = model.lake.write(table, model.folder("embeddings"), shadow.batch, run).rsplit("/", 1)[-1]


def _embed_patiently(model: Collection, texts: dict[bytes, str]) -> Encoded:
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
        lacking = [(shadow, shadow.texts.filter(pc.invert(shadow.texts["has_vector"]))) for shadow in group]
        put, by_batch = _new_vectors(lacking)
        if by_batch:
            put_ahead(connection, put, partial(_check_kept, model))
            before.update(by_batch)

    def write() -> None:
        with connection.transaction():
            _write(model, connection, group, before)

    if group:
        giving_way(write)
    for shadow in group:
        shadow.backfilled.seconds += (time.perf_counter() - started) * shadow.backfilled.texts / max(1, texts)
    return [(shadow.batch, shadow.backfilled) for shadow in group]


def _new_vectors(lacking: Sequence[tuple[ShadowBatch, pa.Table]]) -> tuple[dict[str, Column], Counter[int]]:
    """Of texts that lack their vector, batch by batch, those that have one now, as `Destination.put` takes them; and
    how many of each batch.
    """
    texts, matrices, by_batch = [], [], Counter[int]()
    for shadow, table in lacking:
        places = shadow.vectors.places(table["content_hash"])
        kept = table.select(["text_id", "vector_name", "content_hash"]).filter(places >= 0)
        if kept.num_rows:
            texts.append(kept)
            matrices.append(shadow.vectors.matrix[places[places >= 0]])
            by_batch[shadow.batch] += kept.num_rows
    if not texts:
        return {}, by_batch
    return {**columns_of(pa.concat_tables(texts)), "embedding": np.concatenate(matrices)}, by_batch


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
    lacking = _selected(connection, table.statement("backfill/lacking"), key, LACKING)
    # A text that has come since `texts` were read is left: its batch is not complete then.
    known = pa.concat_tables([shadow.texts.select(["text_id", "vector_name"]) for shadow in group])
    place = pc.index_in(lacking["text_id"], value_set=known["text_id"])
    lacking = lacking.append_column("vector_name", known["vector_name"].take(place))
    there = lacking.filter(pc.is_valid(place))
    put, by_put = _new_vectors([(by_batch[n], there.filter(pc.equal(there["batch"], n))) for n in batches])
    if put:
        table.put(connection, put)
    written = before + by_put
    mended, done = (change.statement for change in note_changes(table))
    if written:
        connection.execute(mended, key)
    # Last, since commits of other batches wait for it: no swap makes this model the current one until we have ended.
    current = "SELECT fingerprint FROM embeddings.collection WHERE name = %s FOR SHARE"
    if connection.execute(current, [model.definition.name]).fetchone() == (model.fingerprint,):
        raise StaleRunError(
            f"collection {model.definition.name!r}: profile {model.profile.name!r} has become the current model"
        )
    left = lacking.filter(pc.invert(lacking["excused"]))
    if put:
        left = left.filter(pc.invert(pc.is_in(left["text_id"], value_set=put["text_id"])))
    incomplete = set(left["batch"].unique().to_pylist())
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


def embed_shadows(shadows: Sequence[Collection], batches: Sequence[int], run: str, api: Api = "direct") -> None:
    """Encode what a run rendered with each shadow model, for `backfill_shadows` to write. An outage of such a
    model does not stop the run: what it lacks stays marked. api: how those that are hosted are asked.
    """
    for model in shadows:
        options = EmbedOptions(api=api if is_hosted(model.profile) else "direct")
        try:
            for _ in embed_batches(model, wanted_batches(model, batches), run, options):
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
