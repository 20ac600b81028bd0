"""A model beside the active one gets the vectors that it lacks.

Which texts there are is in the collection's tables, so nothing is read from the source again. The encoder works outside
every transaction, and what it makes is in the lake first; the vectors of a batch reach the model's table under the
batch's lock, where no landing can change its texts.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray

from embeddings_pipeline.errors import OutageError, PipelineError, StaleRunError
from embeddings_pipeline.opened import OpenCollection
from embeddings_pipeline.steps import embed_batches, embed_texts, embeddings_table, vectors_there
from embeddings_pipeline.store.postgres import load_sql
from embeddings_pipeline.store.targets import AdoptedColumn, giving_way

log = logging.getLogger(__name__)

TEXTS_TOGETHER = 20_000  # of several batches in the pages of a user's own table
ATTEMPTS, FIRST_WAIT_SECONDS = 3, 2.0  # of an encoder's outage: 2 s, then 8 s


@dataclass
class Filled:
    """What filling one batch did, in texts."""

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


def wanted_batches(model: OpenCollection, batches: Sequence[int]) -> list[int]:
    """Which of these batches a run keeps current for the model; the others are an open migration's to fill."""
    parameters = {"collection": model.collection.name, "fingerprint": model.fingerprint, "batches": list(batches)}
    with model.database.connect(autocommit=True) as connection:
        return [row[0] for row in connection.execute(load_sql("fill/wanted"), parameters)]


def fill_batches(model: OpenCollection, batches: Iterable[int], run: str) -> Iterator[tuple[int, Filled]]:
    """As `fill_batch`, for many; yields each when it is done.

    Into a column of the user's own table, several batches are written together, as its pages have them.
    """
    table = model.active.table
    if not isinstance(table, AdoptedColumn):
        for batch in batches:
            yield batch, fill_batch(model, batch, run)
        return
    with model.database.connect(autocommit=True) as connection, table.vectors_out_of_line(connection):
        group: list[_Made] = []
        for batch in batches:
            group.append(_make_batch(model, connection, batch, run, encode=True))
            if sum(len(made.rows) for made in group) >= TEXTS_TOGETHER:
                yield from _write_together(model, connection, table, group)
                group = []
        yield from _write_together(model, connection, table, group)


def _write_together(
    model: OpenCollection, connection: psycopg.Connection, table: AdoptedColumn, group: "list[_Made]"
) -> Iterator[tuple[int, Filled]]:
    began = time.perf_counter()
    put: list[tuple[int, bytes]] = []
    vectors: dict[bytes, NDArray] = {}
    for made in group:
        own = [(row[0], row[4]) for row in made.rows if not row[6] and row[4] in made.vectors]
        made.written_before = len(own)
        put, vectors = put + own, {**vectors, **made.vectors}
    if put:
        table.put_many(connection, _columns(put, table.vector_name, vectors), partial(_check_kept, model))
    for made in group:
        made.filled.seconds += (time.perf_counter() - began) * made.written_before / max(1, len(put))
    for made in group:
        yield made.batch, _write_batch(model, connection, made)


def fill_batch(model: OpenCollection, batch: int, run: str, *, encode: bool = True) -> Filled:
    """Give each text of the batch its vector under `model`, which is not the active one (`OpenCollection.with_model`).

    Without `encode`, only what the lake has is written. Raises StaleRunError where the model is kept no longer.
    """
    with model.database.connect(autocommit=True) as connection:
        return _write_batch(model, connection, _make_batch(model, connection, batch, run, encode=encode))


@dataclass
class _Made:
    """What is to be written of a batch."""

    batch: int
    rows: list[Any]  # see sql/fill/texts.sql
    vectors: dict[bytes, NDArray]  # by content hash
    file: str | None  # of the lake
    filled: Filled
    written_before: int = 0  # vectors, together with other batches


def _make_batch(model: OpenCollection, connection: psycopg.Connection, batch: int, run: str, *, encode: bool) -> _Made:
    started = time.perf_counter()
    try:
        rows = connection.execute(model.active.table.statement("fill/texts"), {"batch": batch}).fetchall()
    except psycopg.errors.UndefinedTable as error:
        raise _no_longer(model) from error
    filled = Filled(texts=len(rows))
    vectors, file = _vectors(model, batch, run, rows, encode, filled)
    filled.seconds = time.perf_counter() - started
    return _Made(batch, rows, vectors, file, filled)


def _write_batch(model: OpenCollection, connection: psycopg.Connection, made: _Made) -> Filled:
    started = time.perf_counter()

    def write() -> None:
        with connection.transaction():
            _write(model, connection, made)

    giving_way(write)
    made.filled.seconds += time.perf_counter() - started
    return made.filled


def _vectors(
    model: OpenCollection, batch: int, run: str, rows: list[Any], encode: bool, filled: Filled
) -> tuple[dict[bytes, NDArray], str | None]:
    """Vectors by content hash of the texts that lack theirs, and the lake's file with them."""
    lacking = {digest: text for _, _, _, _, digest, text, there in rows if not there}
    if not lacking:
        return {}, None
    vectors = vectors_there(model, batch, landed=any(row[6] for row in rows))
    if not encode:
        newest = model.lake.newest(model.folder("embeddings"), batch, run)
        return vectors, newest[0].rsplit("/", 1)[-1] if newest else None
    wanted = {digest: text for digest, text in lacking.items() if digest not in vectors}
    excused = model.ledger.quarantined(model.fingerprint, list(wanted), waiting=True)
    wanted = {digest: text for digest, text in wanted.items() if digest not in excused}
    made, bad, _ = _embed_patiently(model, wanted) if wanted else ({}, {}, {})
    vectors |= made
    filled.embedded, filled.quarantined = len(made), len(bad) + len(excused)
    filled.reused = sum(digest in vectors for digest in lacking) - len(made)
    columns = list(zip(*(row[1:5] for row in rows), strict=True))
    names = ("item_key", "vector_name", "chunk", "content_hash")
    texts = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
    path = model.lake.write(embeddings_table(model, texts, vectors, made), model.folder("embeddings"), batch, run)
    return vectors, path.rsplit("/", 1)[-1]


def _embed_patiently(
    model: OpenCollection, texts: dict[bytes, str]
) -> tuple[dict[bytes, NDArray], dict[bytes, str], dict[bytes, int]]:
    """As `embed_texts`; an outage is waited for and tried again, up to ATTEMPTS times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return embed_texts(model, texts)
        except OutageError as error:
            wait = FIRST_WAIT_SECONDS * 4 ** (attempt - 1)
            log.warning("collection %r: %s; trying again in %s s", model.collection.name, error, wait)
            time.sleep(wait)
    return embed_texts(model, texts)


def _columns(
    put: Sequence[tuple[int, bytes]], vector_name: str, vectors: Mapping[bytes, NDArray]
) -> dict[str, NDArray]:
    """Text ids and content hashes with their vectors, as `ModelTable.put` takes them."""
    return {
        "text_id": np.array([i for i, _ in put], np.int64),
        "vector_name": np.full(len(put), vector_name.encode(), f"S{len(vector_name)}"),
        "content_hash": np.frombuffer(b"".join(digest for _, digest in put), np.uint8).reshape(-1, 16),
        "embedding": np.stack([vectors[digest] for _, digest in put]),
    }


def _check_kept(model: OpenCollection, connection: psycopg.Connection) -> None:
    """StaleRunError where the model is kept no longer; else it is kept until the transaction ends."""
    if model.active.table.name not in {kept.name for kept in model.ledger.model_tables(connection)}:
        raise _no_longer(model)


def _write(model: OpenCollection, connection: psycopg.Connection, made: _Made) -> None:
    """Under the batch's lock, until the transaction ends."""
    table, vectors, filled, batch, file = model.active.table, made.vectors, made.filled, made.batch, made.file
    key = {"collection": model.collection.name, "fingerprint": model.fingerprint, "batch": batch}
    name_of = {row[0]: row[2] for row in made.rows}
    model.ledger.lock_batch(connection, batch)
    _check_kept(model, connection)
    lacking = connection.execute(table.statement("fill/lacking"), key).fetchall()
    # A text that has come since `rows` were read is left: the batch is not complete then.
    put = [(i, name_of[i], digest) for i, digest, _ in lacking if digest in vectors and i in name_of]
    for vector_name in sorted({name for _, name, _ in put}):
        own = [(i, digest) for i, name, digest in put if name == vector_name]
        table.put(connection, _columns(own, vector_name, vectors))
    filled.vectors_written = made.written_before + len(put)
    if filled.vectors_written:
        connection.execute(table.statement("fill/mended"), key)
    # Last, since landings of other batches wait for it: no swap makes this model the active one until we have ended.
    active = "SELECT fingerprint FROM embeddings.collection WHERE name = %s FOR SHARE"
    if connection.execute(active, [model.collection.name]).fetchone() == (model.fingerprint,):
        raise StaleRunError(
            f"collection {model.collection.name!r}: profile {model.profile.name!r} has become the active model"
        )
    written = {i for i, _, _ in put}
    filled.complete = all(i in written or excused for i, _, excused in lacking)
    connection.execute(load_sql("fill/done"), {**key, "complete": filled.complete, "file": file})


def embed_beside(models: Sequence[OpenCollection], batches: Sequence[int], run: str) -> None:
    """Encode what a run rendered with each model beside the active one, for `fill_beside` to write. An outage of such a
    model does not stop the run: what it lacks stays marked.
    """
    for model in models:
        try:
            for _ in embed_batches(model, wanted_batches(model, batches), run):
                pass
        except StaleRunError:
            continue
        except (PipelineError, psycopg.Error) as error:
            _warn(model, error)


def fill_beside(models: Sequence[OpenCollection], batch: int, run: str) -> None:
    """After a landing: each model beside the active one gets what the run made for it. What it lacks stays marked, and
    the batch waits before it is tried again.
    """
    for model in models:
        try:
            if wanted_batches(model, [batch]) and not fill_batch(model, batch, run, encode=False).complete:
                model.ledger.trying([batch])
        except StaleRunError:  # it was dropped meanwhile
            continue
        except (PipelineError, psycopg.Error) as error:
            _warn(model, error)


def _warn(model: OpenCollection, error: Exception) -> None:
    name = (model.collection.name, model.profile.name)
    log.warning("collection %r: profile %s, beside the active one, is behind: %s", *name, error)


def _no_longer(model: OpenCollection) -> StaleRunError:
    return StaleRunError(
        f"collection {model.collection.name!r}: profile {model.profile.name!r} ({model.fingerprint}) is kept no longer"
    )
