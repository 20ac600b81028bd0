"""A column of a table that the user already has, as a model table.

A view shows the column as one, and follows it when a swap renames it; a companion table remembers whose text each
vector was made from. So all that reads a model table reads an adopted column, and only writing differs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import psycopg
from numpy.typing import NDArray
from psycopg import errors, sql

from embeddings_pipeline.config.definition import CollectionDefinition, DestinationDefinition
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.destination.table import NORM, TableDestination
from embeddings_pipeline.store.locks import giving_way
from embeddings_pipeline.store.source import table_identifier
from embeddings_pipeline.store.sql import load_sql

HASH_ROW_BYTES = 80  # of a companion table
LOCK_TIMEOUT_MS = 500  # for rows that the user's own programs hold: below deadlock_timeout, so that we give way
OUR_VIEW = "view embeddings."  # as PostgreSQL describes it
ALTER_TIMEOUT_MS = 2000
TOAST_BYTES = 2032  # a longer row has its longest values elsewhere (TOAST_TUPLE_TARGET in PostgreSQL's heaptoast.h)
ROW_HEADER_BYTES = 32
POINTER_BYTES = 18  # to a value that lies elsewhere
NOTE = "toast_tuple_target of the destination's table was: "
LONGEST_NAME = 63  # bytes, of an identifier
VECTOR_TYPES = ("vector", "halfvec")


class ColumnIndex(NamedTuple):
    """An ANN index on a column of the user's table."""

    schema: str
    name: str
    method: str
    operator_class: str
    options: list[str]
    valid: bool
    bytes: int


@dataclass(frozen=True)
class ColumnDestination(TableDestination):
    """The vectors of one collection under one fingerprint, in a column of the user's own table.

    Which column it is, the catalog says: the view `identifier` follows it when a swap renames it.
    """

    declared: DestinationDefinition = field(kw_only=True)
    key: tuple[str, ...] = field(kw_only=True)  # the destination's columns
    source_key: tuple[str, ...] = field(kw_only=True)
    vector_name: str = field(kw_only=True)

    @property
    def relation(self) -> sql.Identifier:
        """The user's table."""
        return table_identifier(self.declared.table)

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

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        return super().statement(name, **{"written": self.written, "hash": self.hash, **others})

    def _statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """The statement `NAME of sql/column.sql`."""
        numbered = [(sql.Identifier(f"key_{n}"), sql.Identifier(key)) for n, key in enumerate(self.key, 1)]
        items: list[sql.Composable] = [sql.SQL("made.item_key")]
        if len(self.key) > 1:
            items = [sql.SQL("made.item_key::jsonb -> {}").format(sql.Literal(n)) for n in range(len(self.key))]
        named = [sql.SQL("{}, {}").format(sql.Literal(f"key_{n}"), item) for n, item in enumerate(items, 1)]
        comma, both = sql.SQL(", "), sql.SQL(" AND ")
        pairs = {
            "key_columns": comma.join(sql.SQL("destination.{} AS {}").format(own, name) for name, own in numbered),
            "typed_keys": comma.join(sql.SQL("typed.{}").format(name) for name, _ in numbered),
            "keys": comma.join(name for name, _ in numbered),
            "hash_keys": comma.join(sql.SQL("hash.{}").format(name) for name, _ in numbered),
            "same_row": both.join(sql.SQL("destination.{} = hash.{}").format(own, name) for name, own in numbered),
            "same_as_typed": both.join(
                sql.SQL("destination.{} = typed.{}").format(own, name) for name, own in numbered
            ),
            "key_json": sql.SQL("jsonb_build_object({})").format(comma.join(named)),
            "first_key": sql.Identifier(self.key[0]),
            "vector_name": sql.Literal(self.vector_name),
            "destination": self.relation,
            "type": self.type,
            "norm": sql.SQL(NORM[self.storage]),
            "identity": sql.Literal(self.identity),
        }
        return self.statement(f"column/{name}", **{**pairs, **others})

    # --- the column ---

    def look(self, connection: psycopg.Connection, column: str) -> Mapping[str, Any]:
        """What ``look` of sql/column.sql` says of the table and one of its columns. ConfigurationError without the
        table.
        """
        table = self.relation.as_string(connection)
        cursor = connection.execute(load_sql("column/look"), {"table": table, "column": column, "keys": list(self.key)})
        row = cursor.fetchone()
        if row is None:
            raise ConfigurationError(
                f"collection {self.collection!r}: `destination.table:` names {self.declared.table!r}, which is not "
                "in the "
                f"pipeline's database; create it, or correct the name in its defs.yaml"
            )
        return dict(zip((one.name for one in cursor.description or ()), row, strict=True))

    def column(self, connection: psycopg.Connection) -> str:
        """The column's name now. ConfigurationError where it is gone."""
        name = self.column_or_none(connection)
        if name is None:
            raise ConfigurationError(
                f"collection {self.collection!r}: {self.declared.table!r} no longer has the column of model "
                f"{self.fingerprint}; `embeddings-pipeline profile status` says whether that is a former model, which "
                f"`profile contract --now` forgets, or the next one, which `profile rollback` forgets"
            )
        return name

    def column_or_none(self, connection: psycopg.Connection) -> str | None:
        """The column's name now; None where somebody has dropped it."""
        names = {"view": self.identifier.as_string(connection), "table": self.relation.as_string(connection)}
        row = connection.execute(load_sql("column/column"), names).fetchone()
        return row[0] if row else None

    @property
    def identity(self) -> str:
        """What the companion table and the views were made for; they are made anew where it is another."""
        return json.dumps([self.source_key, self.key, self.declared.column, self.vector_name])

    def is_adopted(self, connection: psycopg.Connection) -> bool:
        """Whether the views are there, of this very table, and made for what the definition says now."""
        query = "SELECT obj_description(to_regclass(%s), 'pg_class'), to_regclass(%s), to_regclass(%s)"
        names = [one.as_string(connection) for one in (self.identifier, self.written, self.hash)]
        row = connection.execute(query, names).fetchone()
        if row is None or row[0] != self.identity or None in row:
            return False
        return self.column_or_none(connection) is not None

    @property
    def next_column(self) -> str:
        """Its name beside the current model's column."""
        return f"{self.declared.column}_{self.dimension}"

    @property
    def previous_column(self) -> str:
        """The name of the former model's column after a swap."""
        return f"{self.declared.column}_previous"

    def create_statements(self, column: str) -> list[sql.Composed]:
        name = f"{self.collection}_hash_{self.fingerprint}"
        indexes = {"text_index": sql.Identifier(f"{name}_text"), "key_index": sql.Identifier(f"{name}_key")}
        create = self._statement("create", column=sql.Identifier(column), **indexes)
        return [sql.Composed([create, sql.SQL(";\n"), self.lacking_statement()])]

    def add_statements(self) -> list[sql.Composed]:
        """What makes the column of a shadow model."""
        column = sql.Identifier(self.next_column)
        return [self._statement("add_column", column=column), *self.create_statements(self.next_column)]

    def create(self, connection: psycopg.Connection) -> None:
        """Adopt the column. ConfigurationError says why it cannot be."""
        self.check(connection)
        for statement in self.create_statements(self.declared.column):
            connection.execute(statement)

    def check(self, connection: psycopg.Connection) -> None:
        """ConfigurationError where the column cannot hold this model's vectors."""
        found, where = self.look(connection, self.declared.column), f"collection {self.collection!r}: `destination:`"
        name = f"{self.declared.table}.{self.declared.column}"
        if not found["is_table"]:
            problem = f"{self.declared.table} is not a plain table; name the table that holds the column"
        elif found["type"] is None:
            problem = f"{self.declared.table} has no column {self.declared.column!r}; correct it in its defs.yaml"
        elif found["type"] not in VECTOR_TYPES or found["generated"]:
            problem = f"{name} is of type {found['type']}; it has to be a plain vector(n) or halfvec(n)"
        elif found["dimension"] < 0:
            problem = f"{name} has no dimension: ALTER TABLE … ALTER COLUMN … TYPE {found['type']}({self.dimension})"
        elif (found["type"], found["dimension"]) != (self.storage, self.dimension):
            problem = (
                f"{name} is a {found['type']}({found['dimension']}), and the profile makes {self.storage}"
                f"({self.dimension}); `destination.profile:` names the profile that made the vectors that are there"
            )
        elif found["not_null"]:
            problem = f"{name} is NOT NULL, and a row waits there for its vector: ALTER TABLE … DROP NOT NULL"
        elif not found["key_is_unique"]:
            problem = f"{self.declared.table} has no unique index on ({', '.join(self.key)}), by which rows are found"
        elif not found["may_write"]:
            problem = f"the role may not read and update {self.declared.table}: GRANT SELECT, UPDATE ON it"
        elif others := [one for one in self.dependants(connection, self.declared.column, [self]) if OUR_VIEW in one]:
            problem = f"{name} is the destination of another collection already ({others[0]})"
        else:
            return
        raise ConfigurationError(f"{where} {problem}")

    def dependants(self, connection: psycopg.Connection, column: str, ours: Sequence["ColumnDestination"]) -> list[str]:
        """What would go on following a column through its renaming, as PostgreSQL describes it."""
        views = [view.as_string(connection) for one in ours for view in (one.identifier, one.written)]
        names = {"table": self.relation.as_string(connection), "column": column, "ours": views}
        return [row[0] for row in connection.execute(load_sql("column/dependants"), names)]

    # --- its vectors ---

    def delete(self, connection: psycopg.Connection, *, replaced: bool) -> int:
        connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        return self._changed(connection, "delete", replaced=sql.Literal(replaced))

    def write(self, connection: psycopg.Connection, *, adopt: bool = False) -> int:
        return self._changed(connection, "write", made=self._statement("committed", adopt=sql.Literal(adopt)))

    def put(self, connection: psycopg.Connection, columns: Mapping[str, NDArray]) -> None:
        connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        connection.execute(self._statement("stage_backfill", on_commit=sql.SQL("DROP")))
        copy_in(connection, sql.Identifier("backfill_vector"), columns, storage=self.storage)
        self._changed(connection, "write", made=self._statement("backfilled"))

    def put_many(
        self, connection: psycopg.Connection, columns: Mapping[str, NDArray], kept: Callable[[psycopg.Connection], Any]
    ) -> None:
        """As `put`, for many batches and without their locks, in short transactions; texts that change meanwhile are
        left out. `kept` is called in each: it raises where the model is kept no longer.
        """
        connection.execute(self._statement("stage_backfill", on_commit=sql.SQL("PRESERVE ROWS")))
        try:
            copy_in(connection, sql.Identifier("backfill_vector"), columns, storage=self.storage)
            connection.execute(self._statement("layers"))
            [(last,)] = connection.execute("SELECT coalesce(max(layer), -1) FROM backfill_layer").fetchall()
            for layer in range(last + 1):
                giving_way(partial(self._put_layer, connection, layer, kept))
        finally:
            if not connection.closed:
                connection.execute("DROP TABLE IF EXISTS backfill_vector, backfill_layer")

    def _put_layer(self, connection: psycopg.Connection, layer: int, kept: Callable[[psycopg.Connection], Any]) -> None:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
            connection.execute("SET LOCAL synchronous_commit = off")  # what marks the batch as whole comes after it
            kept(connection)
            self._changed(connection, "write", made=self._statement("backfilled_layer", layer=sql.Literal(layer)))

    @contextmanager
    def vectors_out_of_line(self, connection: psycopg.Connection) -> Iterator[None]:
        """Meanwhile new vectors go out of the table's pages, so that an updated row fits into its own.

        By the table's `toast_tuple_target`, low enough for a vector and too high for whatever else is in a row now.
        What it was is noted at the companion table, should this process be killed. It stays where nothing is won.
        """
        self.restore(connection)
        longest = self._row_bytes(connection) + POINTER_BYTES
        if longest < min(self.bytes_per_vector, TOAST_BYTES):
            self._alter(connection, f"SET (toast_tuple_target = {max(longest, 128)})", note=True)
        try:
            yield
        finally:
            if not connection.closed:
                self.restore(connection)

    def restore(self, connection: psycopg.Connection) -> None:
        """End what `vectors_out_of_line` began, though it was killed."""
        query = "SELECT obj_description(to_regclass(%s), 'pg_class')"
        row = connection.execute(query, [self.hash.as_string(connection)]).fetchone()
        if row and row[0]:
            former = row[0].removeprefix(NOTE)
            change = f"SET (toast_tuple_target = {int(former)})" if former.isdigit() else "RESET (toast_tuple_target)"
            self._alter(connection, change, note=False)

    def _alter(self, connection: psycopg.Connection, change: str, *, note: bool) -> None:
        options = "SELECT option FROM pg_class, unnest(reloptions) AS option WHERE oid = to_regclass(%s)"
        relation = self.relation.as_string(connection)
        former = [one for (one,) in connection.execute(options, [relation]) if one.startswith("toast_tuple_target=")]
        said = sql.Literal(NOTE + (former[0].partition("=")[2] if former else "default")) if note else sql.SQL("NULL")
        # It keeps out VACUUM and the like, but neither readers nor writers. Where it is not to be had, it is left.
        with suppress(errors.LockNotAvailable, errors.InsufficientPrivilege), connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = {ALTER_TIMEOUT_MS}")
            for statement in self.alter_statements(change, said):
                connection.execute(statement)

    def alter_statements(self, change: str, said: sql.Composable) -> list[sql.Composed]:
        """What changes the table's parameters, and notes at the companion table what they were."""
        return [
            sql.SQL("COMMENT ON TABLE {} IS {}").format(self.hash, said),
            sql.SQL("ALTER TABLE {} {}").format(self.relation, sql.SQL(change)),
        ]

    def _row_bytes(self, connection: psycopg.Connection) -> int:
        """The longest row as it lies in its page, in bytes, two for alignment a column; a vector too long for it lies
        elsewhere.
        """
        listed = """SELECT attname, typname FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
                    WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped"""
        found = connection.execute(listed, [self.relation.as_string(connection)]).fetchall()
        sizes = []
        for name, kind in found:
            size = sql.SQL("coalesce(pg_column_size(destination.{}), 0)").format(sql.Identifier(name))
            if kind in VECTOR_TYPES:
                elsewhere = "CASE WHEN {size} > {most} THEN {pointer} ELSE {size} END"
                most, pointer = sql.Literal(TOAST_BYTES - 100), sql.Literal(POINTER_BYTES)
                size = sql.SQL(elsewhere).format(size=size, most=most, pointer=pointer)
            sizes.append(size)
        query = sql.SQL("SELECT max({}) FROM {} AS destination").format(sql.SQL(" + ").join(sizes), self.relation)
        row = connection.execute(query).fetchone()
        return ROW_HEADER_BYTES + 2 * len(found) + (row[0] if row and row[0] else 0)

    def backfill_statement(self) -> sql.Composed:
        """What `put_many` writes a layer with, into the column of a shadow model."""
        made = self._statement("backfilled_layer", layer=sql.SQL(":layer"))
        return self._statement("write", column=sql.Identifier(self.next_column), made=made)

    def _changed(self, connection: psycopg.Connection, name: str, **others: sql.Composable) -> int:
        try:
            # Until the transaction ends nobody renames the column, so its name is the one that is written to.
            connection.execute(sql.SQL("LOCK TABLE {} IN ROW EXCLUSIVE MODE").format(self.relation))
            statement = self._statement(name, column=sql.Identifier(self.column(connection)), **others)
            connection.execute(load_sql("column/by_key"))
            row = connection.execute(statement).fetchone()
            connection.execute(load_sql("column/by_plan"))
        except (errors.IntegrityError, errors.RaiseException, errors.InsufficientPrivilege) as error:
            remedy = "; GRANT SELECT, UPDATE ON it" if isinstance(error, errors.InsufficientPrivilege) else ""
            # Without the row, which the error's other lines have in them.
            raise ConfigurationError(
                f"collection {self.collection!r}: a vector cannot be written to {self.declared.table}: "
                f"{error.diag.message_primary}{remedy}"
            ) from error
        return row[0] if row else 0

    def theirs(
        self, connection: psycopg.Connection, item_keys: Sequence[str], row_hashes: Sequence[bytes]
    ) -> sql.Composed:
        """Selects number (from 1, in `item_keys`) and embedding of items that have a vector, are never committed, and
        are as they were first seen.
        """
        column = sql.Identifier(self.column(connection))
        keys, hashes = sql.Literal(list(item_keys)), sql.Literal(list(row_hashes))
        return self._statement("theirs", column=column, item_keys=keys, row_hashes=hashes)

    def there(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> set[str]:
        """Which of these items have a vector that would be taken, if they were committed as they are."""
        column = sql.Identifier(self.column(connection))
        query = self._statement("there", column=column, item_keys=sql.Literal(list(item_keys)))
        return {row[0] for row in connection.execute(query)}

    # --- removing it ---

    def exclusive(self) -> list[sql.Identifier]:
        return [self.relation]

    def release(self, connection: psycopg.Connection) -> None:
        connection.execute(self._statement("release"))

    def drop_statements(self, connection: psycopg.Connection) -> list[sql.Composed]:
        column = self.column_or_none(connection)
        if column is None:  # somebody has dropped it already
            return [self._statement("release")]
        if column == self.declared.column:
            raise ConfigurationError(f"collection {self.collection!r}: {column!r} is its current model's column")
        return self.removal(column)

    def removal(self, column: str) -> list[sql.Composed]:
        """What removes the model, where its column is called so."""
        return [self._statement("release"), self._statement("drop_column", column=sql.Identifier(column))]

    # --- its indexes ---

    def is_relation(self, connection: psycopg.Connection, name: str) -> bool:
        """Whether a table or index of this name is in the table's schema."""
        query = """SELECT FROM pg_class AS one JOIN pg_class AS other USING (relnamespace)
                   WHERE other.oid = to_regclass(%s) AND one.relname = %s"""
        return connection.execute(query, [self.relation.as_string(connection), name]).fetchone() is not None

    def indexes(self, connection: psycopg.Connection, column: str) -> list[ColumnIndex]:
        """The ANN indexes on a column of the table."""
        names = {"table": self.relation.as_string(connection), "column": column}
        return [ColumnIndex(*row) for row in connection.execute(load_sql("column/indexes"), names)]

    def index_statement(
        self, column: str, name: str, method: str, operator_class: str, options: Sequence[str]
    ) -> sql.Composed:
        """Makes an ANN index on a column."""
        given = sql.SQL("WITH ({})").format(sql.SQL(", ").join(map(sql.SQL, options))) if options else sql.SQL("")
        return self._statement(
            "create_index",
            index=sql.Identifier(name),
            method=sql.SQL(method),
            column=sql.Identifier(column),
            operator_class=sql.SQL(operator_class),
            parameters=given,
        )

    # --- the swap ---

    def exchange_statements(self, connection: psycopg.Connection, to: "ColumnDestination") -> list[sql.Composed]:
        """What gives the column of `to` the name that this one has, and so its indexes."""
        return self.renames(connection, to, self.column(connection), to.column(connection))

    def renames(
        self, connection: psycopg.Connection, to: "ColumnDestination", own: str, other: str, coming: Sequence[str] = ()
    ) -> list[sql.Composed]:
        """As `exchange_statements`, where this column is called `own` and that of `to` `other`, which is still to get
        the indexes `coming`.
        """
        aside = self.next_column if other == self.previous_column else self.previous_column
        rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
        statements = [
            rename.format(self.relation, sql.Identifier(own), sql.Identifier(aside)),
            rename.format(self.relation, sql.Identifier(other), sql.Identifier(own)),
        ]
        for before, after in ((own, aside), (other, own)):
            there = [(index.schema, index.name) for index in self.indexes(connection, before)]
            for *schema, name in [*there, *((name,) for name in coming if before == other)]:
                new = named_like(name.removesuffix(self.suffix(before)), self.suffix(after))
                if new != name:
                    index = sql.Identifier(*schema, name)
                    statements.append(sql.SQL("ALTER INDEX {} RENAME TO {}").format(index, sql.Identifier(new)))
        return statements

    def suffix(self, column: str) -> str:
        """What the name of an index on this column has at its end."""
        return column.removeprefix(self.declared.column)


def named_like(name: str, suffix: str) -> str:
    """An index's name with a suffix, at most 63 bytes long."""
    return name.encode()[: LONGEST_NAME - len(suffix)].decode(errors="ignore") + suffix


def model_table(definition: CollectionDefinition, fingerprint: str, dimension: int, storage: Any) -> TableDestination:
    """Where a collection's vectors under one fingerprint are."""
    destination = definition.attributes.destination
    if destination is None:
        return TableDestination(definition.name, fingerprint, dimension, storage)
    key = destination.key or definition.attributes.source.key
    (vector_name,) = definition.attributes.vectors
    return ColumnDestination(
        definition.name,
        fingerprint,
        dimension,
        storage,
        declared=destination,
        key=key,
        source_key=definition.attributes.source.key,
        vector_name=vector_name,
    )


def declared_storage(connection: psycopg.Connection, definition: CollectionDefinition) -> Literal["halfvec", "vector"]:
    """`storage:`, or what the destination's column is."""
    if definition.attributes.destination is None:
        return definition.attributes.storage
    table = model_table(definition, "", 0, "vector")
    assert isinstance(table, ColumnDestination)
    return "halfvec" if table.look(connection, table.declared.column)["type"] == "halfvec" else "vector"
