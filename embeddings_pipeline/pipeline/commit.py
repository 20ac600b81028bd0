"""The commit: the one transaction in which a batch's items, texts and vectors reach PostgreSQL (rules 3 to 5)."""

from collections.abc import Collection as Keys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.errors import StaleRunError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import (
    FailedItem,
    failed_items,
    is_certainly_of_an_item,
    is_of_an_item,
    reason_of,
)
from embeddings_pipeline.pipeline.figures import Committed
from embeddings_pipeline.store.copy_binary import Column, columns_of, copy_in, jsonb, some_of
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.halves import by_halves
from embeddings_pipeline.store.lake import DEFINITION_HASH, vectors_from_arrow
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.source_sql import text_array
from embeddings_pipeline.store.sql import load_sql

NOW = ["item_key", "current_hash"]
TEXTS = pa.schema(
    [
        ("id", pa.int64()),
        ("item_key", pa.string()),
        ("vector_name", pa.string()),
        ("chunk", pa.int64()),
        ("content_hash", pa.binary()),
    ]
)
FAILED = ["item_key", "row_hash", "step", "reason"]


def commit_batch(collection: Collection, batch: int, run: str) -> Committed:
    """Bring what a run has for a batch into PostgreSQL, whole or not at all (rule 4).

    An item with a value that the database refuses goes into quarantine, and the others are committed (rule 7). Raises
    StaleRunError, with nothing changed, if another model has become the current one.
    """
    _, texts = collection.newest("item_texts", batch, run)
    path, embeddings = collection.newest("embeddings", batch, run)
    result = _match(texts, embeddings, collection)
    definition_hash = (texts.schema.metadata or {}).get(DEFINITION_HASH)
    file = path.rsplit("/", 1)[-1]
    committed = _commit_without_refused(collection, batch, result, definition_hash, file)
    for asset in ("raw_items", "item_texts", "embeddings"):
        collection.lake.sweep(collection.folder(asset), batch, keep=file)
    return committed


def _commit_without_refused(
    collection: Collection, batch: int, result: "_BatchResult", definition_hash: bytes | None, file: str
) -> Committed:
    """Commit; if the database refuses a value, find by trials whose it is, and commit the others.

    If a trial without any item fails too, the items are not to blame, nor if each fails and several for what may refuse
    any value: the error is raised.
    """

    def commit(result: "_BatchResult", *, trial: bool = False) -> Committed:
        return giving_way(lambda: _commit(collection, batch, result, definition_hash, file, trial=trial))

    waiting = collection.ledger.waiting_items(batch)
    result = result.with_failed(
        {
            item_key: FailedItem(row_hash, "store", reason)
            for item_key, (row_hash, reason) in waiting.items()
            if result.row_hash(item_key) == row_hash
        }
    )
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


def _commit(
    collection: Collection,
    batch: int,
    result: "_BatchResult",
    definition_hash: bytes | None,
    file: str,
    *,
    trial: bool = False,
) -> Committed:
    """The transaction. Under the lock of the batch, `result` is compared with the source as it is now.

    `trial`: it is rolled back at its end.
    """
    tables = collection.model.destination.tables
    key = {"collection": collection.definition.name, "batch": batch}
    committed = Committed()
    with (
        collection.source.connect() as reading,
        collection.database.session() as connection,
        connection.transaction(force_rollback=trial),
    ):
        _stage(connection, result)
        lock_batch(connection, collection.definition.name, batch)
        item_keys = [row[0] for row in connection.execute(tables.statement("commit/keys"), key)]
        now = collection.source.look(reading, item_keys).hashes.rename_columns(NOW)
        keys = pc.value_counts(now["item_key"])
        for item_key in keys.field("values").filter(pc.greater(keys.field("counts"), 1)).to_pylist():
            raise collection.ledger.key_twice(item_key)
        copy_in(connection, sql.Identifier("commit_now"), columns_of(now))
        failpoint("commit.second_look")

        connection.execute(tables.statement("commit/decide"), {**key, "item_keys": text_array(item_keys)})
        left_out = [row[0] for row in connection.execute(load_sql("commit/left_out"))]
        result = result.without(left_out) if left_out else result
        texts_before = _texts_before(connection, tables)
        committed.vectors_deleted = _delete_gone(connection, collection, result, texts_before)
        text_ids, before = _write_texts(connection, tables, result, texts_before)
        incomplete = {"fingerprint": collection.fingerprint, "new_texts": int((~before).sum())}
        connection.execute(load_sql("commit/mark_shadows"), {**key, **incomplete})
        committed.vectors_written = _write_vectors(connection, collection, result, text_ids, before)
        collection.ledger.note_failed_items(connection)
        _count(connection, committed)
        connection.execute(tables.statement("commit/delete_items"))
        connection.execute(tables.statement("commit/update_items"))
        # The texts may be older than the definition, if this step is done alone: then the batch stays dirty.
        connection.execute(load_sql("commit/batch_committed"), {**key, "definition_hash": definition_hash})

        changed = committed.vectors_written + committed.vectors_deleted > 0
        committed.version = _raise_version(connection, collection, batch, {"changed": changed, "file": file})
    return committed


def _texts_before(connection: psycopg.Connection, tables: CollectionTables) -> pa.Table:
    """The texts that are there of the items that are committed or deleted."""
    rows = connection.execute(tables.statement("commit/texts_before"), binary=True).fetchall()
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(TEXTS), schema=TEXTS)


def _delete_gone(
    connection: psycopg.Connection, collection: Collection, result: "_BatchResult", texts_before: pa.Table
) -> int:
    """Delete the texts that are no longer expected, and the vectors of these under every model; how many vectors."""
    models = collection.ledger.model_tables(connection)  # of which none is dropped in this transaction
    if not texts_before.num_rows:
        return 0
    expected = pc.is_in(_places(texts_before), value_set=_places(result.texts))
    gone = texts_before["id"].filter(pc.invert(expected)).to_pylist()
    connection.execute(collection.model.destination.tables.statement("commit/gone_texts"), {"ids": gone})
    coming = result.texts["item_key"].take(result.places_of_vectors()).unique().to_pylist()
    return sum(
        destination.delete(connection, coming=coming if destination.fingerprint == collection.fingerprint else None)
        for destination in models
    )


def _write_texts(
    connection: psycopg.Connection, tables: CollectionTables, result: "_BatchResult", texts_before: pa.Table
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Write the texts that are not there yet, under new ids. The id of each text, and whether it was there before."""
    texts = result.texts
    ids, before = np.zeros(texts.num_rows, np.int64), np.zeros(texts.num_rows, bool)
    if texts_before.num_rows and texts.num_rows:
        place = pc.index_in(_places(texts), value_set=_places(texts_before))
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
    result: "_BatchResult",
    text_ids: NDArray[np.int64],
    before: NDArray[np.bool_],
) -> int:
    """Write the vectors of texts, and let go of what is in quarantine no longer; how many. text_ids: of `result.texts`,
    before: which of these were there.
    """
    place, vectors, table = result.places_of_vectors(), result.vectors, collection.model.destination
    columns: dict[str, Column] = {
        "text_id": text_ids[place],
        "vector_name": result.texts["vector_name"].take(place),
        "content_hash": vectors["content_hash"],
        "encoded": vectors["encoded"].to_numpy(),
        "embedding": vectors_from_arrow(vectors["embedding"]),
    }
    written = table.write(connection, columns, before[place], adopt=collection.adopts)
    model = {"collection": collection.definition.name, "fingerprint": collection.fingerprint}
    if connection.execute(load_sql("quarantine/any"), model).fetchone() is not None:
        hashes = vectors["content_hash"].unique().to_pylist()
        connection.execute(table.statement("commit/mended"), {**model, "content_hashes": hashes})
    return written


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


def _count(connection: psycopg.Connection, committed: Committed) -> None:
    row = connection.execute(load_sql("commit/count")).fetchone()
    assert row is not None
    for name, number in zip(("deleted", "left", "quarantined", "inserted", "updated", "unchanged"), row, strict=True):
        setattr(committed, name, number)


@dataclass(frozen=True)
class _BatchResult:
    """What a run has for a batch, of whole items only: those with each text embedded, quarantined or blank."""

    items: pa.Table  # item_key, encoded_hash, payload
    failed: dict[str, FailedItem]  # by item key: those that have no texts
    texts: pa.Table  # row_number, item_key, vector_name, chunk, content_hash, text, blank
    vectors: pa.Table  # row_number (of the text), content_hash, encoded, embedding

    def row_hash(self, item_key: str) -> bytes | None:
        """What this run read of an item; None if it is not among these."""
        place = pc.index(self.items["item_key"], item_key).as_py()
        row_hash: bytes | None = self.items["encoded_hash"][place].as_py() if place >= 0 else None
        return row_hash

    def of_items(self, item_keys: Keys[str]) -> "_BatchResult":
        """What there is for these items, and no other."""
        return self._filtered(pa.array(list(item_keys), pa.string()))

    def without(self, item_keys: Keys[str]) -> "_BatchResult":
        """What there is for other items."""
        return self._filtered(pa.array(list(item_keys), pa.string()), others=True)

    def places_of_vectors(self) -> NDArray[np.int64]:
        """Where in `texts` the text of each vector is."""
        places: NDArray[np.int64] = pc.index_in(
            self.vectors["row_number"], value_set=self.texts["row_number"]
        ).to_numpy()
        return places

    def with_failed(self, failed: Mapping[str, FailedItem]) -> "_BatchResult":
        """The same, with items that have no texts after all."""
        others = self._filtered(pa.array(list(failed), pa.string()), others=True) if failed else self
        return replace(others, failed={**self.failed, **failed})

    def _filtered(self, item_keys: pa.Array, *, others: bool = False) -> "_BatchResult":
        def chosen(column: pa.ChunkedArray) -> pa.ChunkedArray:
            mask = pc.is_in(column, value_set=item_keys)
            return pc.invert(mask) if others else mask

        texts = self.texts.filter(chosen(self.texts["item_key"]))
        with_text = pc.is_in(self.vectors["row_number"], value_set=texts["row_number"])
        return _BatchResult(
            self.items.filter(chosen(self.items["item_key"])), {}, texts, self.vectors.filter(with_text)
        )


def _match(texts: pa.Table, embeddings: pa.Table, collection: Collection) -> _BatchResult:
    vector_at = pc.index_in(_places(texts), value_set=_places(embeddings))
    missing = texts.filter(pc.and_(pc.is_null(vector_at), pc.invert(texts["blank"])))
    if missing.num_rows:
        hashes = missing["content_hash"].to_pylist()
        excused = collection.ledger.quarantined(collection.fingerprint, hashes)
        lacking = missing["item_key"].filter(pa.array([digest not in excused for digest in hashes]))
        whole = pc.invert(pc.is_in(texts["item_key"], value_set=lacking))
        texts, vector_at = texts.filter(whole), vector_at.filter(whole)

    texts = texts.append_column("row_number", pa.array(np.arange(texts.num_rows)))
    with_vector = pc.is_valid(vector_at)
    vectors = embeddings.select(["content_hash", "encoded", "embedding"]).take(vector_at.filter(with_vector))
    _, first = np.unique(texts["item_key"].combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True)
    items = texts.select(["item_key", "row_hash", "payload"]).take(first)
    return _BatchResult(
        items.rename_columns(["item_key", "encoded_hash", "payload"]),
        failed_items(texts),
        texts.select(["row_number", "item_key", "vector_name", "chunk", "content_hash", "text", "blank"]),
        vectors.append_column("row_number", texts["row_number"].filter(with_vector)),
    )


def _places(texts: pa.Table) -> pa.ChunkedArray:
    """Which text of which item each row is, in one value: PostgreSQL's texts have no NUL."""
    chunk = texts["chunk"].cast(pa.string())
    parts = [part.cast(pa.binary()) for part in (texts["content_hash"], chunk, texts["vector_name"], texts["item_key"])]
    return pc.binary_join_element_wise(*parts, b"\x00")


def _stage(connection: psycopg.Connection, result: _BatchResult) -> None:
    if connection.execute(load_sql("commit/is_staged")).fetchone() == (False,):
        connection.execute(load_sql("commit/stage"))
    items = columns_of(result.items)
    copy_in(connection, sql.Identifier("commit_item"), {**items, "payload": jsonb(items["payload"])})
    if result.failed:
        reasons = [list(column) for column in zip(*result.failed.values(), strict=True)]
        failed = pa.table([list(result.failed), *reasons], FAILED)
        without_texts = columns_of(failed.select(["item_key", "row_hash"]).rename_columns(["item_key", "encoded_hash"]))
        copy_in(connection, sql.Identifier("commit_item"), without_texts)
        copy_in(connection, sql.Identifier("commit_failed"), columns_of(failed))
