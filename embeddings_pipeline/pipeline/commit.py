"""The commit: the one transaction in which a batch's items, texts and vectors reach PostgreSQL (rules 3 to 5)."""

from collections.abc import Collection as Keys
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray
from psycopg import sql
from psycopg.types.json import Jsonb

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
from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.halves import by_halves
from embeddings_pipeline.store.lake import DEFINITION_HASH, vectors_from_arrow
from embeddings_pipeline.store.locks import giving_way, lock_batch
from embeddings_pipeline.store.sql import load_sql


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
            if item_key in result.items and result.items[item_key][0] == row_hash
        }
    )
    try:
        return commit(result)
    except Exception as error:
        if not result.items or not is_of_an_item(error):
            raise
        commit(result.of_items([]), trial=True)
        _, refused = by_halves(
            lambda keys: commit(result.of_items(keys), trial=True), list(result.items), is_of_an_item
        )
        doubtful = sum(not is_certainly_of_an_item(reason) for reason in refused.values())
        if not refused or (len(refused) == len(result.items) and doubtful > 1):
            raise
        failed = {
            item_key: FailedItem(result.items[item_key][0], "store", reason_of(reason))
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
    table, tables = collection.model.destination, collection.model.destination.tables
    key = {"collection": collection.definition.name, "batch": batch}
    committed = Committed()
    with collection.source.connect() as reading, collection.database.connect() as connection:
        _stage(connection, result, table)
        lock_batch(connection, collection.definition.name, batch)
        item_keys = [row[0] for row in connection.execute(tables.statement("commit/keys"), key)]
        now = collection.source.read(reading, item_keys)
        with connection.cursor() as cursor, cursor.copy("COPY commit_now FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["text", "bytea"])
            for row in now:
                copy.write_row((row.item_key, row.row_hash))
        failpoint("commit.second_look")

        connection.execute(tables.statement("commit/decide"), {**key, "item_keys": item_keys})
        rerendered = {row[0] for row in connection.execute(tables.statement("commit/gone_texts")).fetchall()}
        for destination in collection.ledger.model_tables(connection):  # a text that goes, goes from every model
            committed.vectors_deleted += destination.delete(
                connection, replaced=destination.fingerprint == collection.fingerprint
            )
        new_texts = connection.execute(tables.statement("commit/new_texts")).rowcount
        incomplete = {"fingerprint": collection.fingerprint, "new_texts": new_texts}
        connection.execute(load_sql("commit/mark_shadows"), {**key, **incomplete})
        committed.vectors_written = table.write(connection, adopt=collection.adopts)
        mended = {"collection": collection.definition.name, "fingerprint": collection.fingerprint}
        connection.execute(table.statement("commit/mended"), mended)
        collection.ledger.note_failed_items(connection)
        _count(connection, rerendered, result.failed, committed)
        connection.execute(tables.statement("commit/delete_items"))
        connection.execute(tables.statement("commit/update_items"))
        # The texts may be older than the definition, if this step is done alone: then the batch stays dirty.
        connection.execute(load_sql("commit/batch_committed"), {**key, "definition_hash": definition_hash})

        changed = committed.vectors_written + committed.vectors_deleted > 0
        own = None if collection.definition.path is None else collection.definition.outcome_hash
        model = {"fingerprint": collection.fingerprint, "outcome_hash": own, "changed": changed, "file": file}
        version = connection.execute(load_sql("commit/raise_version"), {**key, **model}).fetchone()
        if version is None:
            connection.rollback()
            raise StaleRunError(
                f"collection {collection.definition.name!r}, batch {batch}: another profile became current, or a newer "
                f"definition came into force, while this run encoded with {collection.profile.name!r}; nothing was "
                "changed, sync again"
            )
        committed.version = version[0]
        if trial:
            connection.rollback()
    return committed


def _count(connection: psycopg.Connection, rerendered: set[str], failed: Container[str], committed: Committed) -> None:
    for item_key, decision, was, encoded, other_payload in connection.execute(load_sql("commit/decisions")).fetchall():
        if decision == "delete":
            committed.deleted += was is not None
        elif decision != "commit":
            committed.left += 1
        elif item_key in failed:
            committed.quarantined += 1
        elif was is None:
            committed.inserted += 1
        elif was != encoded or other_payload or item_key in rerendered:
            committed.updated += 1
        else:
            committed.unchanged += 1


@dataclass(frozen=True)
class _BatchResult:
    """What a run has for a batch, of whole items only: those with each text embedded, quarantined or blank."""

    items: dict[str, tuple[bytes, str]]  # item key → row hash, payload
    failed: dict[str, FailedItem]  # by item key: those that have no texts
    texts: list[tuple[int, str, str, int, bytes, str, bool]]
    row_numbers: NDArray[np.int64]  # of the text that each vector belongs to
    hashes: NDArray[np.uint8]
    encoded: NDArray[np.bool_]
    vectors: NDArray

    def of_items(self, item_keys: Keys[str]) -> "_BatchResult":
        """What there is for these items, and no other."""
        chosen = set(item_keys)
        texts = [text for text in self.texts if text[1] in chosen]
        kept = np.isin(self.row_numbers, np.array([text[0] for text in texts], np.int64))
        return _BatchResult(
            {item_key: item for item_key, item in self.items.items() if item_key in chosen},
            {},
            texts,
            self.row_numbers[kept],
            self.hashes[kept],
            self.encoded[kept],
            self.vectors[kept],
        )

    def with_failed(self, failed: Mapping[str, FailedItem]) -> "_BatchResult":
        """The same, with items that have no texts after all."""
        others = self.of_items(self.items.keys() - failed.keys())
        return replace(others, failed={**self.failed, **failed})


def _match(texts: pa.Table, embeddings: pa.Table, collection: Collection) -> _BatchResult:
    place = ["item_key", "vector_name", "chunk", "content_hash"]
    vector_at = {key: n for n, key in enumerate(zip(*(embeddings[c].to_pylist() for c in place), strict=True))}
    rows = texts.to_pylist()
    vector_of = [vector_at.get(tuple(row[c] for c in place)) for row in rows]
    missing = [row for row, n in zip(rows, vector_of, strict=True) if n is None and not row["blank"]]
    excused = collection.ledger.quarantined(collection.fingerprint, [row["content_hash"] for row in missing])
    incomplete = {row["item_key"] for row in missing if row["content_hash"] not in excused}

    complete = [n for n, row in enumerate(rows) if row["item_key"] not in incomplete]
    columns = ["item_key", "vector_name", "chunk", "content_hash", "text", "blank"]
    picked = [(n, vector_of[n]) for n in complete if vector_of[n] is not None]
    numbers, at = np.array(picked, np.int64).reshape(-1, 2).T
    hashes = np.frombuffer(b"".join(embeddings["content_hash"].to_pylist()), np.uint8).reshape(-1, 16)
    return _BatchResult(
        {rows[n]["item_key"]: (rows[n]["row_hash"], rows[n]["payload"]) for n in complete},
        failed_items(texts),
        [(n, *(rows[n][column] for column in columns)) for n in complete],
        numbers,
        hashes[at],
        np.asarray(embeddings["encoded"].to_pylist(), bool)[at],
        vectors_from_arrow(embeddings["embedding"])[at],
    )


def _stage(connection: psycopg.Connection, result: _BatchResult, table: Destination) -> None:
    connection.execute(sql.SQL(load_sql("commit/stage")).format(type=table.type))
    with connection.cursor() as cursor:
        with cursor.copy("COPY commit_item FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["text", "bytea", "jsonb"])
            for item_key, (row_hash, payload) in result.items.items():
                copy.write_row((item_key, row_hash, Jsonb(payload, dumps=str)))
            for item_key, item in result.failed.items():
                copy.write_row((item_key, item.row_hash, None))
        with cursor.copy("COPY commit_failed FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["text", "bytea", "text", "text"])
            for item_key, item in result.failed.items():
                copy.write_row((item_key, *item))
        with cursor.copy("COPY commit_text FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int8", "text", "text", "int8", "bytea", "text", "bool"])
            for row in result.texts:
                copy.write_row(row)
    columns: dict[str, NDArray] = {
        "row_number": result.row_numbers,
        "content_hash": result.hashes,
        "encoded": result.encoded,
    }
    copy_in(
        connection, sql.Identifier("commit_vector"), {**columns, "embedding": result.vectors}, storage=table.storage
    )
