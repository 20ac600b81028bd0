"""A destination that is a table of our own, one a model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.store.copy_binary import Column, copy_in, copy_statement, some_of
from embeddings_pipeline.store.destination.base import NORM, ROW_BYTES, Destination, Exchange, Layout, Limits, PutAhead
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.indexes import (
    NEW,
    AnnIndex,
    IndexChange,
    build_memory,
    drop_index,
    index_name,
    index_parameters,
    parse_options,
    predicate_name,
    why_rebuilt,
)
from embeddings_pipeline.store.sql import load_sql

PAGE_BYTES = 8000  # what a row may take to stay in its page
WRITTEN_PER_SECOND = 20_000  # rows, through the lake; see BENCHMARKS.md
TABLE_TEXTS, TABLE_SECONDS = 5_000, 5.0  # of a backfill, in one transaction
COLUMNS = ("text_id", "vector_name", "content_hash", "embedding")


@dataclass(frozen=True)
class TableDestination(Destination):
    """The vectors of one collection under one fingerprint, in a table of their own."""

    @property
    def counted(self) -> tuple[sql.Identifier, int]:
        return self.identifier, self.bytes_per_vector + ROW_BYTES

    @property
    def identity(self) -> str | None:
        return None

    @property
    def place(self) -> str:
        return f"embeddings.{self.name}"

    # --- making and removing it ---

    def create(self, connection: psycopg.Connection) -> None:
        for change in self.add_changes():
            connection.execute(change.statement)

    def add_changes(self) -> list[Change]:
        plain = self.bytes_per_vector + 100 <= PAGE_BYTES
        storage = sql.SQL("PLAIN" if plain else "EXTERNAL")
        lock = f"ACCESS EXCLUSIVE of {self.place}, which is new"
        return [
            Change(self.statement("table/create", type=self.type), lock),
            Change(self.statement("table/set_storage", vector_storage=storage), lock),
            self.lacking_change(),
        ]

    def is_as_declared(self, connection: psycopg.Connection) -> bool:
        return True

    def check_exists(self, connection: psycopg.Connection) -> None:
        """Nothing to look for: a table that somebody dropped is made anew when the collection is opened."""

    def release(self, connection: psycopg.Connection) -> None:
        for change in self.drop_changes(Layout("embedding")):
            connection.execute(change.statement)

    def removal(self, connection: psycopg.Connection) -> Layout:
        return Layout("embedding")

    def drop_changes(self, layout: Layout) -> list[Change]:
        table = Change(self.statement("table/drop"), f"ACCESS EXCLUSIVE of {self.place}")
        return [self.drop_lacking_change(), table]

    @property
    def drop_relations(self) -> list[sql.Identifier]:
        return [self.identifier]

    @property
    def kept(self) -> list[sql.Identifier]:
        return [self.identifier, self.lacking]

    # --- vectors within a commit ---

    def delete(self, connection: psycopg.Connection, *, coming: Sequence[str] | None) -> int:
        deleted = connection.execute(self.statement("table/delete")).rowcount
        if coming is not None:
            names = {
                "collection_name": sql.Literal(self.collection),
                "model_fingerprint": sql.Literal(self.fingerprint),
            }
            unusable = self.statement("table/delete_unusable", norm=sql.SQL(NORM[self.storage]), **names)
            deleted += connection.execute(unusable).rowcount
        return deleted

    def write(
        self, connection: psycopg.Connection, vectors: Mapping[str, Column], before: NDArray, *, adopt: bool
    ) -> int:
        missing = np.ones(len(before), bool)
        if before.any():
            places = np.flatnonzero(before)
            ids = vectors["text_id"][places].tolist()
            rows = connection.execute(self.statement("table/written"), {"ids": ids}, binary=True).fetchall()
            there: dict[int, bytes] = dict(rows)
            hashes = vectors["content_hash"].take(places).to_pylist()  # type: ignore[union-attr]
            made = zip(ids, hashes, vectors["encoded"][places], strict=True)
            missing[places] = [encoded or there.get(text_id) != digest for text_id, digest, encoded in made]
            replaced = [text_id for text_id in compress(ids, missing[places]) if text_id in there]
            if replaced:
                connection.execute(self.statement("table/replaced"), {"ids": replaced})
        columns = {name: vectors[name] for name in COLUMNS}
        return copy_in(connection, self.identifier, some_of(columns, missing), storage=self.storage)

    def adoptable_items(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> set[str]:
        return set()

    def adopted_vectors(
        self, connection: psycopg.Connection, item_keys: Sequence[str], row_hashes: Sequence[bytes]
    ) -> tuple[NDArray, NDArray]:
        return np.zeros(0, np.int64), np.zeros((0, self.dimension), np.float16)

    # --- vectors of a backfill ---

    @property
    def limits(self) -> Limits:
        return Limits(TABLE_TEXTS, TABLE_SECONDS)

    def put(self, connection: psycopg.Connection, columns: Mapping[str, Column]) -> None:
        copy_in(connection, self.identifier, columns, storage=self.storage)

    def put_ahead(self, batches: int, texts: int) -> PutAhead | None:
        return None

    def prepared(self, connection: psycopg.Connection) -> AbstractContextManager[None]:
        return nullcontext()

    def restore(self, connection: psycopg.Connection) -> None:
        """Nothing to restore."""

    def setting_changes(self, connection: psycopg.Connection) -> tuple[list[Change], list[Change]]:
        return [], []

    def put_changes(self) -> list[Change]:
        lock = f"ROW EXCLUSIVE of {self.place}, and the batch's advisory lock"
        return [Change(copy_statement(self.identifier, COLUMNS), lock, grows=True)]

    def vectors_per_second(self, connection: psycopg.Connection) -> int:
        return WRITTEN_PER_SECOND

    # --- ANN indexes ---

    def layout(self, connection: psycopg.Connection) -> Layout:
        rows = connection.execute(load_sql("table/indexes"), {"table": self.name}, prepare=True).fetchall()
        indexes = [
            AnnIndex(name, predicate_name(predicate), method, parse_options(options), valid, size)
            for name, method, options, valid, predicate, size in rows
        ]
        return Layout("embedding", tuple(indexes))

    def current_layout(self, connection: psycopg.Connection) -> Layout:
        return Layout("embedding")  # our own indexes are as declared, whatever the current model has

    def wants_index(self, config: IndexDefinition) -> bool:
        return config.method != "none"

    def index_methods(self, connection: psycopg.Connection, config: IndexDefinition) -> list[str]:
        return [config.method] if config.method != "none" else []

    def index_changes(
        self,
        config: IndexDefinition,
        rows: Mapping[str, int],
        own: Layout,
        current: Layout,
        *,
        sizes_known: bool = True,
    ) -> list[IndexChange]:
        kept = rows if config.method != "none" else {}
        managed = [index for index in own.indexes if self._is_ours(index)]
        useless = [index for index in managed if not index.valid or index.vector_name not in kept]
        useful = {index.name: index for index in managed if index not in useless}
        changes = [drop_index(index) for index in useless]
        for vector_name, count in kept.items():
            changes += self._index_changes(config, vector_name, count, useful, sizes_known=sizes_known)
        return changes

    def _index_changes(
        self, config: IndexDefinition, vector_name: str, rows: int, useful: Mapping[str, AnnIndex], *, sizes_known: bool
    ) -> list[IndexChange]:
        name = index_name(self, vector_name)
        old, new = useful.get(name), useful.get(name + NEW)
        reason = why_rebuilt(old, config, rows, sizes_known=sizes_known)
        changes: list[IndexChange] = []
        if new is not None and (not reason or why_rebuilt(new, config, rows, sizes_known=sizes_known)):
            changes.append(drop_index(new))
            new = None
        if not reason:
            return changes
        wanted = AnnIndex(name, vector_name, config.method, index_parameters(config, rows), True, 0)
        if new is None:
            built = wanted if old is None else replace(wanted, name=name + NEW)
            memory = build_memory(self, wanted.parameters, rows)
            changes.append(IndexChange("create", built, self._create_index(config, built), reason, memory))
        if old is not None:
            changes.append(drop_index(old))
        if old is not None or new is not None:
            rename = sql.SQL("ALTER INDEX {} RENAME TO {}").format(
                sql.Identifier("embeddings", name + NEW), sql.Identifier(name)
            )
            changes.append(IndexChange("rename", wanted, rename, reason))
        return changes

    def _create_index(self, config: IndexDefinition, index: AnnIndex) -> sql.Composed:
        given = (sql.SQL("{} = {}").format(sql.SQL(key), sql.Literal(value)) for key, value in index.parameters.items())
        return self.statement(
            "table/create_index",
            index=sql.Identifier(index.name),
            method=sql.SQL(config.method),
            operator_class=sql.SQL(f"{self.storage}_cosine_ops"),
            parameters=sql.SQL(", ").join(given),
            vector_name=sql.Literal(index.vector_name),
        )

    def _is_ours(self, index: AnnIndex) -> bool:
        return index.name.removesuffix(NEW) == index_name(self, index.vector_name)

    def manages(self, index: AnnIndex) -> bool:
        return index.name == index_name(self, index.vector_name)

    # --- a model change ---

    @property
    def user_tables(self) -> list[sql.Identifier]:
        return []

    def check_candidate(self, connection: psycopg.Connection, candidate: Destination, *, is_kept: bool) -> None:
        row = connection.execute("SELECT to_regclass(%s)", [candidate.identifier.as_string(connection)]).fetchone()
        if not is_kept and row and row[0] is not None:
            raise ModelChangeError(
                f"there is a table {row[0]} that the pipeline has not made: rename or drop it, then try again"
            )

    def check_exchange(self, connection: psycopg.Connection, shadow: Destination) -> None:
        """Nothing stands in the way of a view that is pointed elsewhere."""

    def exchange(self, own: Layout, shadow: Layout) -> Exchange:
        return Exchange([], own, shadow)

    def lost_vectors(self, connection: psycopg.Connection) -> tuple[int, str]:
        return 0, ""

    def freed_bytes(self, texts: int, method: str) -> int:
        return self.needed_bytes(texts, method)
