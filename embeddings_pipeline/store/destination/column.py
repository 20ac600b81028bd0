"""A destination that is a column of a table that the user already has.

A view shows the column as a model table, and follows it when a swap renames it; a companion table remembers whose text
each vector was made from. So all that reads a model table reads an adopted column, and only writing differs.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import DestinationDefinition, IndexDefinition
from embeddings_pipeline.errors import ConfigurationError, profile_command
from embeddings_pipeline.store.copy_binary import Column, copy_out
from embeddings_pipeline.store.destination import column_checks, column_indexes, column_write
from embeddings_pipeline.store.destination.base import NORM, Destination, Exchange, Layout, Limits, PutAhead
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.indexes import AnnIndex, IndexChange, parse_options
from embeddings_pipeline.store.destination.rights import ModelRights, column_grants, grant_changes
from embeddings_pipeline.store.destination.table import COLUMNS
from embeddings_pipeline.store.source_sql import table_identifier
from embeddings_pipeline.store.sql import load_sql

HASH_ROW_BYTES = 80  # of a companion table
COLUMN_TEXTS, COLUMN_SECONDS = 20_000, 60.0  # of a backfill, as they lie in the table's pages
TEXTS_AT_ONCE = 1_000  # of one batch, in one transaction
VECTORS_PER_SECOND = {"": 6_000, "ivfflat": 6_000, "hnsw": 2_500}  # written, by the index on the current column


@dataclass(frozen=True)
class ColumnDestination(Destination):
    """The vectors of one collection under one fingerprint, in a column of the user's own table.

    Which column it is, the catalog says: the view `identifier` follows it when a swap renames it.
    """

    declared: DestinationDefinition = field(kw_only=True)
    key: tuple[str, ...] = field(kw_only=True)  # the table's columns
    source_key: tuple[str, ...] = field(kw_only=True)
    vector_name: str = field(kw_only=True)

    # --- names ---

    @property
    def relation(self) -> sql.Identifier:
        """The user's table."""
        return table_identifier(self.declared.table)

    @property
    def place(self) -> str:
        return self.declared.table

    @property
    def user_tables(self) -> list[sql.Identifier]:
        return [self.relation]

    @property
    def hash(self) -> sql.Identifier:
        """The companion table: of which row and text each vector is."""
        return sql.Identifier("embeddings", f"{self.collection}_hash_{self.fingerprint}")

    @property
    def written(self) -> sql.Identifier:
        return sql.Identifier("embeddings", f"{self.collection}_written_{self.fingerprint}")

    @property
    def counted(self) -> tuple[sql.Identifier, int]:
        return self.hash, HASH_ROW_BYTES

    @property
    def identity(self) -> str | None:
        return json.dumps([self.source_key, self.key, self.declared.column, self.vector_name])

    @property
    def candidate_column(self) -> str:
        """Its name beside the current model's column."""
        return f"{self.declared.column}_{self.dimension}"

    @property
    def previous_column(self) -> str:
        """The name of the previous model's column after a swap."""
        return f"{self.declared.column}_previous"

    def suffix(self, column: str) -> str:
        """What the name of an index on this column has at its end."""
        return column.removeprefix(self.declared.column)

    def column(self, connection: psycopg.Connection) -> str:
        """The column's name now. ConfigurationError if it is gone."""
        name = self.column_or_none(connection)
        if name is None:
            raise ConfigurationError(
                f"collection {self.collection!r}: {self.declared.table!r} no longer has the column of model "
                f"{self.fingerprint}; `{profile_command('status', self.collection)}` says whether that is the previous "
                f"model, which `profile contract --now` forgets, or a candidate, which `profile rollback` forgets"
            )
        return name

    def column_or_none(self, connection: psycopg.Connection) -> str | None:
        """The column's name now; None if somebody has dropped it."""
        names = {"view": self.identifier.as_string(connection), "table": self.relation.as_string(connection)}
        row = connection.execute(load_sql("column/column"), names).fetchone()
        return row[0] if row else None

    def is_relation(self, connection: psycopg.Connection, name: str) -> bool:
        """Whether a table or index of this name is in the table's schema."""
        parameters = {"table": self.relation.as_string(connection), "name": name}
        return connection.execute(load_sql("column/is_relation"), parameters).fetchone() is not None

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        return super().statement(name, **{"written": self.written, "hash": self.hash, **others})

    def column_statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """A statement of sql/column.sql, `column/NAME`."""
        numbered = [(sql.Identifier(f"key_{n}"), sql.Identifier(key)) for n, key in enumerate(self.key, 1)]
        items: list[sql.Composable] = [sql.SQL("made.item_key")]
        if len(self.key) > 1:
            items = [sql.SQL("made.item_key::jsonb -> {}").format(sql.Literal(n)) for n in range(len(self.key))]
        named = [sql.SQL("{}, {}").format(sql.Literal(f"key_{n}"), item) for n, item in enumerate(items, 1)]
        own_named = [
            sql.SQL("{}, {}").format(sql.Literal(key), item) for key, item in zip(self.key, items, strict=True)
        ]
        comma, both = sql.SQL(", "), sql.SQL(" AND ")
        parts = {
            "key_columns": comma.join(sql.SQL("destination.{} AS {}").format(own, name) for name, own in numbered),
            "typed_keys": comma.join(sql.SQL("typed.{}").format(name) for name, _ in numbered),
            "keys": comma.join(name for name, _ in numbered),
            "hash_keys": comma.join(sql.SQL("hash.{}").format(name) for name, _ in numbered),
            "same_row": both.join(sql.SQL("destination.{} = hash.{}").format(own, name) for name, own in numbered),
            "same_as_typed": both.join(
                sql.SQL("destination.{} = typed.{}").format(own, name) for name, own in numbered
            ),
            "key_json": sql.SQL("jsonb_build_object({})").format(comma.join(named)),
            "own_key_json": sql.SQL("jsonb_build_object({})").format(comma.join(own_named)),
            "same_row_as_typed": both.join(sql.SQL("destination.{0} = typed.{0}").format(own) for _, own in numbered),
            "first_key": sql.Identifier(self.key[0]),
            "vector_name": sql.Literal(self.vector_name),
            "destination": self.relation,
            "type": self.type,
            "norm": sql.SQL(NORM[self.storage]),
            "collection": sql.Literal(self.collection),
            "fingerprint": sql.Literal(self.fingerprint),
        }
        return self.statement(name, **{**parts, **others})

    # --- making and removing it ---

    def create(self, connection: psycopg.Connection) -> None:
        """Adopt the declared column. ConfigurationError says why it cannot be."""
        column_checks.check_adoption(connection, self)
        for change in self._companions(self.declared.column):
            connection.execute(change.statement)

    def add_changes(self) -> list[Change]:
        column = self.column_statement("column/add_column", column=sql.Identifier(self.candidate_column))
        return [Change(column, f"ACCESS EXCLUSIVE of {self.place}"), *self._companions(self.candidate_column)]

    def _companions(self, column: str) -> list[Change]:
        """What makes the companion table and the views over a column."""
        name = f"{self.collection}_hash_{self.fingerprint}"
        names = {
            "column": sql.Identifier(column),
            "hash_name": sql.Literal(self.hash.as_string(None)),
            "primary_key": sql.Identifier(f"{name}_text"),
            "key_index": sql.Identifier(f"{name}_key"),
        }
        statements = (
            "column/create_hash",
            "column/create_primary_key",
            "column/create_key_index",
            "column/create_vector",
            "column/create_written",
        )
        lock = f"ACCESS SHARE of {self.place}; the rest is new"
        made = [Change(self.column_statement(statement, **names), lock) for statement in statements]
        return [*made, self.lacking_change()]

    def is_as_declared(self, connection: psycopg.Connection) -> bool:
        names = {"vector": self.identifier, "written": self.written, "hash": self.hash}
        parameters: dict[str, Any] = {name: relation.as_string(connection) for name, relation in names.items()}
        parameters |= {"collection": self.collection, "fingerprint": self.fingerprint}
        row = connection.execute(load_sql("column/made_for"), parameters).fetchone()
        if row is None or row[0] != self.identity or None in row:
            return False
        return self.column_or_none(connection) is not None

    def check_exists(self, connection: psycopg.Connection) -> None:
        self.column(connection)

    def release(self, connection: psycopg.Connection) -> None:
        for change in self._releases():
            connection.execute(change.statement)

    def _releases(self) -> list[Change]:
        names = ("column/drop_written", "column/drop_vector", "column/drop_hash")
        ours = [Change(self.column_statement(name), "ACCESS EXCLUSIVE of it, which is ours") for name in names]
        return [self.drop_lacking_change(), *ours]

    def removal(self, connection: psycopg.Connection) -> Layout:
        column = self.column_or_none(connection)
        if column is not None:
            column_checks.check_dependants(connection, self, column, [self])
        return Layout(column or "")

    def drop_changes(self, layout: Layout) -> list[Change]:
        if not layout.column:  # somebody has dropped it already
            return self._releases()
        if layout.column == self.declared.column:
            raise ConfigurationError(f"collection {self.collection!r}: {layout.column!r} is its current model's column")
        column = self.column_statement("column/drop_column", column=sql.Identifier(layout.column))
        return [*self._releases(), Change(column, f"ACCESS EXCLUSIVE of {self.place}")]

    @property
    def drop_relations(self) -> list[sql.Identifier]:
        return [self.relation]

    # --- who may read it ---

    @property
    def kept(self) -> list[sql.Identifier]:
        return [self.hash, self.identifier, self.written, self.lacking]

    def rights(self, connection: psycopg.Connection) -> ModelRights:
        column = self.column_or_none(connection) or self.candidate_column
        grants = column_grants(connection, self.relation, column)
        return replace(super().rights(connection), column=column, column_grants=grants)

    def rights_changes(self, own: ModelRights, wanted: ModelRights) -> list[Change]:
        of_column = ({grant._replace(column=own.column) for grant in rights.column_grants} for rights in (own, wanted))
        return [*super().rights_changes(own, wanted), *grant_changes(self.relation, *of_column)]

    # --- vectors within a commit ---

    def delete(self, connection: psycopg.Connection, *, coming: Sequence[str] | None) -> int:
        connection.execute(f"SET LOCAL lock_timeout = {column_write.ROW_LOCK_TIMEOUT_MS}")
        return column_write.change_vectors(connection, self, "column/delete", coming=sql.Literal(list(coming or [])))

    def write(
        self, connection: psycopg.Connection, vectors: Mapping[str, Column], before: NDArray, *, adopt: bool
    ) -> int:
        column_write.stage_commit(connection, self, vectors)
        made = self.column_statement("column/committed", adopt=sql.Literal(adopt))
        return column_write.change_vectors(connection, self, "column/write", made=made)

    def adoptable_items(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> set[str]:
        keys = sql.Literal(list(item_keys))
        if self.is_made(connection):
            column = sql.Identifier(self.column(connection))
            query = self.column_statement("column/adoptable", column=column, item_keys=keys)
        else:
            column_checks.check_adoption(connection, self)
            column = sql.Identifier(self.declared.column)
            query = self.column_statement("column/adoptable_at_first", column=column, item_keys=keys)
        return {row[0] for row in connection.execute(query)}

    def adopted_vectors(
        self, connection: psycopg.Connection, item_keys: Sequence[str], row_hashes: Sequence[bytes]
    ) -> tuple[NDArray, NDArray]:
        column = sql.Identifier(self.column(connection))
        keys, hashes = sql.Literal(list(item_keys)), sql.Literal(list(row_hashes))
        query = self.column_statement("column/adopted", column=column, item_keys=keys, row_hashes=hashes)
        rows = copy_out(connection, query, {"number": "bigint", "embedding": self.storage}, dimension=self.dimension)
        return rows["number"] - 1, rows["embedding"]

    # --- vectors of a backfill ---

    @property
    def limits(self) -> Limits:
        return Limits(COLUMN_TEXTS, COLUMN_SECONDS)

    def put(self, connection: psycopg.Connection, columns: Mapping[str, Column]) -> None:
        column_write.put(connection, self, columns)

    def put_ahead(self, batches: int, texts: int) -> PutAhead | None:
        return partial(column_write.put_ahead, self) if batches > 1 or texts > TEXTS_AT_ONCE else None

    def prepared(self, connection: psycopg.Connection) -> AbstractContextManager[None]:
        return column_write.vectors_out_of_line(connection, self)

    def restore(self, connection: psycopg.Connection) -> None:
        column_write.restore(connection, self)

    def setting_changes(self, connection: psycopg.Connection) -> tuple[list[Change], list[Change]]:
        return column_write.setting_changes(connection, self)

    def put_changes(self) -> list[Change]:
        return column_write.put_changes(self, COLUMNS)

    def vectors_per_second(self, connection: psycopg.Connection) -> int:
        methods = [index.method for index in self.indexes(connection, self.declared.column)]
        return min((VECTORS_PER_SECOND[method] for method in methods), default=VECTORS_PER_SECOND[""])

    # --- ANN indexes ---

    def layout(self, connection: psycopg.Connection) -> Layout:
        return self._layout(connection, self.column_or_none(connection) or self.candidate_column)

    def current_layout(self, connection: psycopg.Connection) -> Layout:
        return self._layout(connection, self.declared.column)

    def _layout(self, connection: psycopg.Connection, column: str) -> Layout:
        parameters = {"table": self.relation.as_string(connection)}
        row = connection.execute(load_sql("column/schema"), parameters).fetchone()
        return Layout(column, tuple(self.indexes(connection, column)), row[0] if row else "public")

    def indexes(self, connection: psycopg.Connection, column: str) -> list[AnnIndex]:
        """The ANN indexes on a column of the table, by name."""
        names = {"table": self.relation.as_string(connection), "column": column}
        return [
            AnnIndex(name, self.vector_name, method, parse_options(options), valid, size, schema, operators)
            for schema, name, method, operators, options, valid, size in connection.execute(
                load_sql("column/indexes"), names
            )
        ]

    def wants_index(self, config: IndexDefinition) -> bool:
        """On a user's own column the default does not count."""
        return config.method != "none" and bool(config.model_fields_set)

    def index_methods(self, connection: psycopg.Connection, config: IndexDefinition) -> list[str]:
        if self.wants_index(config):
            return [config.method]
        if config.model_fields_set:
            return []
        return [index.method for index in self.indexes(connection, self.column(connection))]

    def index_changes(
        self,
        config: IndexDefinition,
        rows: Mapping[str, int],
        own: Layout,
        current: Layout,
        *,
        sizes_known: bool = True,
    ) -> list[IndexChange]:
        return column_indexes.index_changes(self, config, sum(rows.values()), own, current)

    def manages(self, index: AnnIndex) -> bool:
        return True

    # --- a model change ---

    def check_candidate(self, connection: psycopg.Connection, candidate: Destination, *, is_kept: bool) -> None:
        assert isinstance(candidate, ColumnDestination)
        column_checks.check_candidate(connection, self, candidate, is_kept=is_kept)

    def check_exchange(self, connection: psycopg.Connection, shadow: Destination) -> None:
        assert isinstance(shadow, ColumnDestination)
        column_checks.check_dependants(connection, self, self.column(connection), [self, shadow])
        column_checks.check_dependants(connection, shadow, shadow.column(connection), [self, shadow])

    def exchange(self, own: Layout, shadow: Layout) -> Exchange:
        return column_indexes.exchange(self, own, shadow)

    def lost_vectors(self, connection: psycopg.Connection) -> tuple[int, str]:
        column = self.column(connection)
        names = {"previous": sql.Identifier(column), "column": sql.Identifier(self.declared.column)}
        row = connection.execute(self.column_statement("column/lost", **names)).fetchone()
        return row[
            0
        ] if row else 0, f"rows of {self.place} have a vector in {column!r} and none in {self.declared.column!r}"

    def freed_bytes(self, texts: int, method: str) -> int:
        """The index's alone: what the vectors take is free when VACUUM FULL or pg_repack has run."""
        return self.needed_bytes(texts, method) - self.needed_bytes(texts, "none")
