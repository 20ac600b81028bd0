"""The commit: the one transaction in which items, texts and vectors of batches reach PostgreSQL (rules 3 to 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.errors import StaleRunError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.pipeline.batch_result import BatchResult, batch_result, text_places
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import (
    FailedItem,
    is_certainly_of_an_item,
    is_of_an_item,
    reason_of,
)
from embeddings_pipeline.pipeline.figures import Committed
from embeddings_pipeline.store.copy_binary import Column, columns_of, copy_in, jsonb, some_of
from embeddings_pipeline.store.destination.base import CollectionTables, Destination
from embeddings_pipeline.store.halves import by_halves
from embeddings_pipeline.store.lake import vectors_from_arrow
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.source_sql import text_array
from embeddings_pipeline.store.sql import load_sql

BYTES_TOGETHER = 64 << 20  # of texts and vectors, and what the last batch adds
NOW = ["item_key", "current_hash"]
COUNTED = ("deleted", "left", "quarantined", "inserted", "updated", "unchanged")
TEXTS = pa.schema(
    [
        ("batch", pa.int64()),
        ("id", pa.int64()),
        ("item_key", pa.string()),
        ("vector_name", pa.string()),
        ("chunk", pa.int64()),
        ("content_hash", pa.binary()),
    ]
)
FAILED = ["item_key", "row_hash", "step", "reason"]


def commit_batches(collection: Collection, batches: Sequence[int], run: str) -> dict[int, Committed]:
    """Bring what a run has for these batches into PostgreSQL, each whole or not at all (rule 4), and in one transaction
    as many of them as memory should hold at once; one alone if it holds rows of the user's own table.

    If there is one batch, an item with a value that the database refuses goes into quarantine, and the others are
    committed (rule 7); if there are several, that is an error, and each is to be tried by itself. Raises StaleRunError,
    with nothing changed, if another model has become the current one.
    """
    waiting = collection.ledger.waiting_items(batches)
    done: dict[int, Committed] = {}
    results: list[BatchResult] = []
    most = 0 if collection.model.destination.user_tables else BYTES_TOGETHER
    for batch in batches:
        results.append(_without_waiting(batch_result(collection, batch, run), waiting))
        if batch == batches[-1] or sum(result.nbytes for result in results) >= most:
            done |= _commit_together(collection, results)
            results = []
    return done


def _commit_together(collection: Collection, results: Sequence[BatchResult]) -> dict[int, Committed]:
    """The commit, and after it the lake's files that nobody needs."""
    if len(results) == 1:
        done = _commit_without_refused(collection, results[0])
    else:
        done = giving_way(lambda: _commit(collection, results))
    for result in results:
        for asset in ("raw_items", "item_texts", "embeddings"):
            collection.lake.sweep(collection.folder(asset), result.batch, keep=result.file)
    return done


def _without_waiting(result: BatchResult, waiting: Mapping[str, tuple[bytes, str]]) -> BatchResult:
    """Items that could not be stored, and are not to be tried now, have failed."""
    return result.with_failed(
        {
            item_key: FailedItem(row_hash, "store", reason)
            for item_key, (row_hash, reason) in waiting.items()
            if result.row_hash(item_key) == row_hash
        }
    )


def _commit_without_refused(collection: Collection, result: BatchResult) -> dict[int, Committed]:
    """Commit; if the database refuses a value, find by trials whose it is, and commit the others.

    If a trial without any item fails too, the items are not to blame, nor if each fails and several for what may refuse
    any value: the error is raised.
    """

    def commit(result: BatchResult, *, trial: bool = False) -> dict[int, Committed]:
        return giving_way(lambda: _commit(collection, [result], trial=trial))

    try:
        return commit(result)
    except Exception as error:
        keys = result.items["item_key"].to_pylist()
        if not keys or not is_of_an_item(error):
            raise
        commit(result.of_items([]), trial=True)
        _, refused = by_halves(lambda some: commit(result.of_items(some), trial=True), keys, is_of_an_item)
        doubtful = sum(not is_certainly_of_an_item(reason) for reason in refused.values())
        if not refused or (len(refused) == len(keys) and doubtful > 1):
            raise
        failed = {
            item_key: FailedItem(result.row_hash(item_key) or b"", "store", reason_of(reason))
            for item_key, reason in refused.items()
        }
    return commit(result.with_failed(failed))


def _commit(collection: Collection, results: Sequence[BatchResult], *, trial: bool = False) -> dict[int, Committed]:
    """The transaction. Under the locks of the batches, `results` are compared with the source as it is now.

    `trial`: it is rolled back at its end.
    """
    name, tables = collection.definition.name, collection.model.destination.tables
    done = {result.batch: Committed() for result in results}
    with (
        collection.source.connect() as reading,
        collection.database.session() as connection,
        connection.transaction(force_rollback=trial),
    ):
        _stage(connection, results)
        for batch in sorted(done):
            lock_batch(connection, name, batch)
        item_keys = [row[0] for row in connection.execute(tables.statement("commit/keys"), {"batches": list(done)})]
        now = collection.source.look(reading, item_keys).hashes.rename_columns(NOW)
        keys = pc.value_counts(now["item_key"])
        for item_key in keys.field("values").filter(pc.greater(keys.field("counts"), 1)).to_pylist():
            raise collection.ledger.key_twice(item_key)
        copy_in(connection, sql.Identifier("commit_now"), columns_of(now))
        failpoint("commit.second_look")

        decide = {"batches": list(done), "item_keys": text_array(item_keys)}
        connection.execute(tables.statement("commit/decide"), decide)
        left_out = [row[0] for row in connection.execute(load_sql("commit/left_out"))]
        results = [result.without(left_out) for result in results] if left_out else results
        _write(connection, collection, results, done)
        collection.ledger.note_failed_items(connection)
        for batch, *counts in connection.execute(load_sql("commit/count")):
            for figure, number in zip(COUNTED, counts, strict=True):
                setattr(done[batch], figure, number)
        connection.execute(tables.statement("commit/delete_items"))
        connection.execute(tables.statement("commit/update_items"))
        for result in results:
            # The texts may be older than the definition, if this step is done alone: then the batch stays dirty.
            rendered = {"collection": name, "batch": result.batch, "definition_hash": result.definition_hash}
            connection.execute(load_sql("commit/batch_committed"), rendered)
        for result in results:
            committed = done[result.batch]
            changed = committed.vectors_written + committed.vectors_deleted > 0
            what = {"changed": changed, "file": result.file}
            committed.version = _raise_version(connection, collection, result.batch, what)
    return done


def _write(
    connection: psycopg.Connection,
    collection: Collection,
    results: Sequence[BatchResult],
    done: Mapping[int, Committed],
) -> None:
    """Bring texts and vectors to what is expected; how many vectors it were, goes to `done`."""
    name, tables = collection.definition.name, collection.model.destination.tables
    model = {"collection": name, "fingerprint": collection.fingerprint}
    models = collection.ledger.model_tables(connection)  # of which none is dropped in this transaction
    quarantined = collection.ledger.any_quarantined(connection, collection.fingerprint)
    every_text_before = _texts_before(connection, tables)
    for result in results:
        texts_before = every_text_before.filter(pc.equal(every_text_before["batch"], result.batch))
        done[result.batch].vectors_deleted = _delete_gone(connection, collection, models, result, texts_before)
        text_ids, before = _write_texts(connection, tables, result, texts_before)
        if len(models) > 1:
            incomplete = {**model, "batch": result.batch, "new_texts": int((~before).sum())}
            connection.execute(load_sql("commit/mark_shadows"), incomplete)
        done[result.batch].vectors_written = _write_vectors(connection, collection, result, text_ids, before)
        if quarantined:
            hashes = result.vectors["content_hash"].unique().to_pylist()
            mended = collection.model.destination.statement("commit/mended")
            connection.execute(mended, {**model, "content_hashes": hashes})


def _texts_before(connection: psycopg.Connection, tables: CollectionTables) -> pa.Table:
    """The texts that are there of the items that are committed or deleted."""
    rows = connection.execute(tables.statement("commit/texts_before"), binary=True).fetchall()
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(TEXTS), schema=TEXTS)


def _delete_gone(
    connection: psycopg.Connection,
    collection: Collection,
    models: Sequence[Destination],
    result: BatchResult,
    texts_before: pa.Table,
) -> int:
    """Delete the texts that are no longer expected, and the vectors of these under every model; how many vectors."""
    if not texts_before.num_rows:
        return 0
    expected = pc.is_in(text_places(texts_before), value_set=text_places(result.texts))
    gone = texts_before["id"].filter(pc.invert(expected)).to_pylist()
    connection.execute(collection.model.destination.tables.statement("commit/gone_texts"), {"ids": gone})
    coming = result.texts["item_key"].take(result.places_of_vectors()).unique().to_pylist()
    return sum(
        destination.delete(connection, coming=coming if destination.fingerprint == collection.fingerprint else None)
        for destination in models
    )


def _write_texts(
    connection: psycopg.Connection, tables: CollectionTables, result: BatchResult, texts_before: pa.Table
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Write the texts that are not there yet, under new ids. The id of each text, and whether it was there before."""
    texts = result.texts
    ids, before = np.zeros(texts.num_rows, np.int64), np.zeros(texts.num_rows, bool)
    if texts_before.num_rows and texts.num_rows:
        place = pc.index_in(text_places(texts), value_set=text_places(texts_before))
        before = place.is_valid().to_numpy()
        ids[before] = texts_before["id"].take(place.drop_null()).to_numpy()
    new = ~before
    if new.any():
        statement = tables.statement("commit/new_ids", text_name=sql.Literal(tables.text.as_string(connection)))
        rows = connection.execute(statement, {"number": int(new.sum())}, binary=True)
        ids[new] = np.fromiter((row[0] for row in rows), np.int64)
        columns: dict[str, Column] = {"id": ids, **columns_of(texts.drop_columns(["row_number"]))}
        copy_in(connection, tables.text, some_of(columns, new))
    return ids, before


def _write_vectors(
    connection: psycopg.Connection,
    collection: Collection,
    result: BatchResult,
    text_ids: NDArray[np.int64],
    before: NDArray[np.bool_],
) -> int:
    """Write the vectors of texts; how many. text_ids: of `result.texts`; before: which of these were there."""
    place, vectors, table = result.places_of_vectors(), result.vectors, collection.model.destination
    columns: dict[str, Column] = {
        "text_id": text_ids[place],
        "vector_name": result.texts["vector_name"].take(place),
        "content_hash": vectors["content_hash"],
        "encoded": vectors["encoded"].to_numpy(),
        "embedding": vectors_from_arrow(vectors["embedding"]),
    }
    return table.write(connection, columns, before[place], adopt=collection.adopts)


def _raise_version(connection: psycopg.Connection, collection: Collection, batch: int, what: dict[str, Any]) -> int:
    """The collection's new version. StaleRunError if its model or definition is no longer the one of this run."""
    name = collection.definition.name
    own = None if collection.definition.path is None else collection.definition.outcome_hash
    model = {"fingerprint": collection.fingerprint, "outcome_hash": own}
    parameters = {"collection": name, "batch": batch, **model, **what}
    version = connection.execute(load_sql("commit/raise_version"), parameters).fetchone()
    if version is None:
        raise StaleRunError(
            f"collection {name!r}, batch {batch}: another profile became current, or a newer definition came into "
            f"force, while this run encoded with {collection.profile.name!r}; nothing was changed, sync again"
        )
    return int(version[0])


def _stage(connection: psycopg.Connection, results: Sequence[BatchResult]) -> None:
    if connection.execute(load_sql("commit/is_staged")).fetchone() == (False,):
        connection.execute(load_sql("commit/stage"))
    items = columns_of(pa.concat_tables(result.items for result in results))
    copy_in(connection, sql.Identifier("commit_item"), {**items, "payload": jsonb(items["payload"])})
    if failures := {key: item for result in results for key, item in result.failed.items()}:
        reasons = [list(column) for column in zip(*failures.values(), strict=True)]
        failed = pa.table([list(failures), *reasons], FAILED)
        without_texts = columns_of(failed.select(["item_key", "row_hash"]).rename_columns(["item_key", "encoded_hash"]))
        copy_in(connection, sql.Identifier("commit_item"), without_texts)
        copy_in(connection, sql.Identifier("commit_failed"), columns_of(failed))
