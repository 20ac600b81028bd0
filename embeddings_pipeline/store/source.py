"""Reading the user's table or query: streamed as a whole, or some items by key. Nothing is ever written to it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, compress, islice
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import row_hash
from embeddings_pipeline.errors import ConfigurationError, SourceError, did_you_mean
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.halves import MOST_FAILURES, by_halves, is_of_data
from embeddings_pipeline.store.session import RUN_LIMITS, ReadLimits, reading, used_here, what_to_do
from embeddings_pipeline.store.source_keys import MAX_KEY_BYTES, NOTHING, LeftOut, SourceKeys, too_long
from embeddings_pipeline.store.source_rows import (
    RAW_ITEMS,
    SCANNED_ROWS,
    ScannedRow,
    SourceRows,
    UpdatedRow,
    is_key,
    joined,
    scanned_rows,
)
from embeddings_pipeline.store.source_sql import (
    TIMESTAMPS,
    Position,
    column_types,
    columns_of,
    hashed_columns,
    is_after,
    item_keys_of,
    key_of,
    order_of,
    primary,
    relation_of,
    tables,
    text_array,
    user_statement,
    with_keys,
)
from embeddings_pipeline.store.source_url import connect_url
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted

ROWS_AT_ONCE = 20_000
HASHED_ALONE = sql.SQL("SELECT item_key, row_json FROM ({}) AS item")  # PostgreSQL leaves the rest of the query out
ROWS_A_BLOCK = 256  # that are held with their JSON while a scan hashes them: each may be long
OVERLAP = timedelta(minutes=10)
"""Incremental reads go back so far once they have caught up: a row may be committed that long after its time."""


@dataclass(frozen=True)
class Source:
    """The source of a collection, in the pipeline's database or in another PostgreSQL."""

    definition: CollectionDefinition
    database: Database
    limits: ReadLimits = RUN_LIMITS

    @contextmanager
    def connect(self, *, lasting: bool = False) -> Iterator[psycopg.Connection]:
        """A connection to the source, for the reads below, each of which is a read-only transaction of its own: a
        pooler may stand before it. `lasting`: it is none of the few that the process shares. Raises SourceError,
        ConfigurationError or DatabaseError in one line.
        """
        url = self.definition.attributes.source.url
        if not url:
            own = self.database.connect(autocommit=True) if lasting else None
            with own or self.database.session() as connection:
                yield connection
            return
        try:
            connection = connect_url(url)
        except (SourceError, ConfigurationError) as error:
            raise type(error)(f"{self}: {error} (in {self._file})") from error
        with connection, used_here(connection):
            yield connection

    def check(self, connection: psycopg.Connection) -> dict[str, str]:
        """Column → type of the source. SourceError if a column that the collection names is not there."""
        with self._reading(connection):
            types = self._types(connection)
        config = self.definition.attributes
        named = [(f"template `{name}:`", c) for name, t in self.definition.templates.items() for c in t.columns]
        named += [("`columns:`", column) for column in config.columns]
        named += [("`source.key:`", column) for column in config.source.key]
        named += [("`source.updated_at:`", column) for column in [config.source.updated_at] if column]
        for place, column in named:
            if column not in types:
                # `{title.__class__}` and `{title:>10}` are such names too: templates know columns and nothing else.
                meant = did_you_mean(column, types) or did_you_mean(re.split(r"\W", column.strip())[0], types)
                raise SourceError(
                    f"{self}: {place} names a column {column!r} that {self._name} does not have{meant}; "
                    f"correct it in {self._file}"
                )
        if config.source.updated_at and types[config.source.updated_at] not in TIMESTAMPS:
            raise SourceError(
                f"{self}: `source.updated_at:` names {config.source.updated_at!r} of type "
                f"{types[config.source.updated_at]}; name a timestamp, or leave it out (full scans find every change) "
                f"in {self._file}"
            )
        return types

    def scan(self, connection: psycopg.Connection, apart: LeftOut = NOTHING) -> Iterator[SourceRows]:
        """Key and hash of every row of the source in one snapshot, at most 20,000 at a time, in no order.

        `apart`: rows that stopped a scan before, which are looked at by themselves. SourceError if another one does:
        `scan_by_key` finds which.
        """
        types = self.check(connection)
        others = apart.condition(self._key)
        selected = self._select(others, types, guarded=True) if any(apart) else self._select(sql.SQL("true"), types)
        keys, hashes, unusable = list[str](), list[bytes](), list[ScannedRow]()
        for block in self._stream(connection, HASHED_ALONE.format(selected)):
            some_keys, rows = block
            if max(map(len, some_keys)) > MAX_KEY_BYTES // 4:
                long = [too_long(key) for key in some_keys]
                unusable += filter(None, long)
                some_keys, rows = (list(compress(column, [not row for row in long])) for column in block)
            keys += some_keys
            hashes += map(row_hash, some_keys, rows)
            if len(keys) >= ROWS_AT_ONCE - ROWS_A_BLOCK:
                yield SourceRows(scanned_rows(keys, hashes))
                keys, hashes = [], []
        yield SourceRows(scanned_rows(keys, hashes), unusable=unusable)
        if any(apart):
            yield replace(
                self.look(connection, apart.item_keys), unusable=self._keys(connection).still_there(apart.unusable)
            )

    def scan_by_key(self, connection: psycopg.Connection) -> Iterator[SourceRows]:
        """As `scan`, with the rows that cannot be read. SourceError if those are all, or too many."""
        self._check_statement(connection, self.check(connection))
        keys, unusable = self._keys(connection).all()
        yield SourceRows(SCANNED_ROWS.empty_table(), unusable=unusable)
        readable, failed, example = 0, 0, None
        for start in range(0, len(keys), ROWS_AT_ONCE):
            rows = self.look(connection, keys[start : start + ROWS_AT_ONCE])
            readable, failed = readable + rows.table.num_rows, failed + len(rows.unreadable)
            example = example or next(iter(rows.unreadable.items()), None)
            last = start + ROWS_AT_ONCE >= len(keys)
            if example and (failed > MOST_FAILURES or (last and failed > 1 and not readable)):
                raise SourceError(
                    f"{self}: {counted(failed, 'row')} of {self._name} cannot be read, and {readable:,} could; the one "
                    f"with the key ({example[0]}): {example[1]}; correct `source:` in {self._file}"
                )
            yield rows

    def newest(self, connection: psycopg.Connection, left_out: LeftOut = NOTHING) -> Position | None:
        """Where the last update stood `OVERLAP` ago, by the rows' own time; None without rows."""
        order = order_of(self.definition.attributes.source, self.check(connection))
        condition = left_out.condition(self._key) if any(left_out) else sql.SQL("true")
        statement = sql.SQL(load_sql("source/newest")).format(
            **order, overlap=sql.Literal(OVERLAP), condition=condition
        )
        with self._reading(connection):
            row = connection.execute(statement).fetchone()
        return Position(row[0], "") if row else None

    def is_ahead(self, connection: psycopg.Connection, position: Position | None) -> bool:
        """Whether a position is of a time that is yet to come by the source's clock."""
        order = order_of(self.definition.attributes.source, self.check(connection))
        at = sql.Literal(position.updated_at if position else None)
        with self._reading(connection):
            statement = sql.SQL("SELECT CAST({at} AS {type}) > {clock}").format(**order, at=at)
            return connection.execute(statement).fetchone() == (True,)

    def updated_after(
        self,
        connection: psycopg.Connection,
        after: Position | None,
        limit: int,
        left_out: LeftOut = NOTHING,
        *,
        types: dict[str, str] | None = None,
        until_now: bool = False,
    ) -> list[UpdatedRow]:
        """At most `limit` rows that were updated after a position, in the order of their positions.

        Rows without `updated_at` are not among them; `until_now`: nor those whose time is ahead of the source's clock.
        `types`: what `check` gave a moment ago. SourceError if one hides its key: a full scan finds it, and may be left
        out from then on.
        """
        types = types or self.check(connection)
        order = order_of(self.definition.attributes.source, types)
        condition = is_after(after, order)
        if until_now:
            condition = sql.SQL("{condition} AND {updated_at} <= {clock}").format(**order, condition=condition)
        if any(left_out):  # and what does not meet `where:`, which full scans find
            asked = (condition, left_out.condition(self._key), self._where)
            condition = sql.SQL("{} AND {} AND ({}\n)").format(*asked)
        seen = tuple(dict.fromkeys((*self.definition.template_columns, *self.definition.attributes.columns)))
        columns = dict.fromkeys(
            (*self.definition.attributes.source.key, *seen, self.definition.attributes.source.updated_at)
        )
        parts = {
            **order,
            "used": columns_of(c for c in columns if c),
            "seen": self._hashed(types),
            "condition": condition,
            "limit": sql.Literal(limit),
        }
        row_json, meets = sql.SQL("row_to_json(seen.*)::text"), sql.SQL("({}\n)").format(self._where)
        statement = sql.SQL(load_sql("source/updated"))
        try:
            found = list(self._rows(connection, statement.format(**parts, row_json=row_json, meets=meets)))
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
            places = statement.format(**parts, row_json=sql.SQL("''"), meets=sql.SQL("true"))
            return self._updated_by_key(connection, list(self._rows(connection, places)))
        return [
            UpdatedRow(key, row_hash(key, row) if met else None, Position(updated_at, key), ahead)
            for key, row, updated_at, met, ahead in found
        ]

    def _updated_by_key(self, connection: psycopg.Connection, places: list[tuple[Any, ...]]) -> list[UpdatedRow]:
        """Rows at these places, each read by its key since one of them cannot be read."""
        keys = list(dict.fromkeys(key for key, *_ in places))
        hashes = dict(zip(*self.look(connection, keys).hashes.to_pydict().values(), strict=True))
        last = {key: n for n, (key, *_) in enumerate(places)}
        return [
            UpdatedRow(key, hashes.get(key) if last[key] == n else None, Position(updated_at, key), ahead)
            for n, (key, _, updated_at, _, ahead) in enumerate(places)
        ]

    def read(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> SourceRows:
        """The rows with these keys, as they are now; those that are gone are missing."""
        return self._by_key(connection, item_keys, RAW_ITEMS)

    def look(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> SourceRows:
        """As `read`, of each row its key and its hash alone."""
        return self._by_key(connection, item_keys, SCANNED_ROWS)

    def item_keys(self, connection: psycopg.Connection, values: Sequence[tuple[str, ...]]) -> list[str]:
        """The item keys of rows whose key columns have these values, as the types write them."""
        if not values:
            return []
        statement = item_keys_of(self.definition.attributes.source.key, values, self.check(connection))
        return [row[0] for row in self._rows(connection, statement)]

    def _by_key(self, connection: psycopg.Connection, item_keys: Sequence[str], schema: pa.Schema) -> SourceRows:
        columns = len(self.definition.attributes.source.key)
        if columns > 1:
            item_keys = [item_key for item_key in item_keys if is_key(item_key, columns)]
        if not item_keys:
            return joined([], schema)
        types = self.check(connection)
        try:
            return self._read(connection, self._select(self._with_keys(item_keys, types), types), schema)
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
        self._check_statement(connection, types)
        # Either a row cannot be read, or the column's type, which was changed, cannot hold a key: as text that is just
        # not found.
        as_text = not self._keys(connection).can_ask(self._with_keys(item_keys, types))

        def read(keys: list[str]) -> SourceRows:
            texts = sql.SQL("{} = ANY ({}::text[])").format(self._key, sql.Literal(text_array(keys)))
            condition = texts if as_text else self._with_keys(keys, types)
            return self._read(connection, self._select(condition, types, guarded=True), schema)

        parts, failed = by_halves(read, item_keys, lambda error: is_of_data(error.__cause__))
        reasons = {key: primary(error.__cause__) for key, error in failed.items()}  # type: ignore[arg-type]
        return SourceRows(joined(parts, schema).table, reasons)

    def _read(self, connection: psycopg.Connection, query: sql.Composable, schema: pa.Schema) -> SourceRows:
        if schema is SCANNED_ROWS:
            query = HASHED_ALONE.format(query)
        blocks = list(self._stream(connection, query))
        if not blocks:
            return joined([], schema)
        keys, rows, *payloads = (list(chain.from_iterable(column)) for column in zip(*blocks, strict=True))
        hashes = list(map(row_hash, keys, rows))
        columns = [keys, hashes] if schema is SCANNED_ROWS else [keys, hashes, rows, *payloads]
        return SourceRows(pa.table(columns, schema=schema))

    def _keys(self, connection: psycopg.Connection) -> SourceKeys:
        columns = columns_of(self.definition.attributes.source.key)
        return SourceKeys(self._key, columns, self._where, self._relation, partial(self._rows, connection))

    def _check_statement(self, connection: psycopg.Connection, types: dict[str, str]) -> None:
        """SourceError if it fails without any row too: then no row is to blame."""
        list(self._rows(connection, self._select(sql.SQL("false"), types)))

    def _rows(self, connection: psycopg.Connection, query: sql.Composable) -> Iterator[tuple[Any, ...]]:
        """As `_stream`, row by row: those before one that fails are given."""
        with self._reading(connection), connection.cursor() as cursor:
            for row in cursor.stream(sql.Composed([query])):
                self._check_keys(row[:1], row[1:2])
                yield row

    def _stream(self, connection: psycopg.Connection, query: sql.Composable) -> Iterator[tuple[Sequence[Any], ...]]:
        """The columns of a query, some rows at a time; the first two are texts: an item's key and its JSON."""
        size = ROWS_A_BLOCK if psycopg.capabilities.has_stream_chunked() else 1
        with self._reading(connection), connection.cursor() as cursor:
            rows = cursor.stream(sql.Composed([query]), size=size)
            while block := tuple(zip(*islice(rows, ROWS_A_BLOCK), strict=True)):
                self._check_keys(*block[:2])
                yield block

    def _check_keys(self, keys: Sequence[str | None], rows: Sequence[str]) -> None:
        """SourceError if one is NULL."""
        if None in keys:
            key = ", ".join(self.definition.attributes.source.key)
            near = rows[keys.index(None)][:80]
            told = f"{self._name} has a row whose key ({key}) is NULL, near {near}; give it a key"
            raise SourceError(f"{self}: {told}, or leave it out with `where:`")

    def _select(self, condition: sql.Composable, types: dict[str, str], *, guarded: bool = False) -> sql.Composed:
        """The rows that meet `where:` and a condition; `guarded`: `where:` is asked of none that does not meet it."""
        config = self.definition.attributes
        if where := (config.source.where or "").strip():
            both = "({where}\n) AND {condition}"
            if guarded:
                both = "{condition} AND CASE WHEN {condition} THEN ({where}\n) END"
            condition = sql.SQL(both).format(where=user_statement(where), condition=condition)
        seen = tuple(dict.fromkeys((*self.definition.template_columns, *config.columns)))
        return sql.SQL(load_sql("source/rows")).format(
            key=self._key,
            used=columns_of(dict.fromkeys((*config.source.key, *seen))),
            seen=self._hashed(types),
            payload=columns_of(config.columns),
            relation=self._relation,
            condition=condition,
        )

    def _hashed(self, types: dict[str, str]) -> sql.Composable:
        """The columns that a row is hashed and rendered by."""
        return hashed_columns(self.definition.template_columns, self.definition.attributes.columns, types)

    @property
    def _where(self) -> sql.Composable:
        return user_statement((self.definition.attributes.source.where or "").strip() or "true")

    @property
    def _key(self) -> sql.Composable:
        return key_of(self.definition.attributes.source.key)

    def _with_keys(self, item_keys: Sequence[str], types: dict[str, str]) -> sql.Composed:
        return with_keys(self.definition.attributes.source.key, item_keys, types)

    def _types(self, connection: psycopg.Connection) -> dict[str, str]:
        config = self.definition.attributes
        named = (*config.source.key, *self.definition.template_columns, *config.columns, config.source.updated_at)
        return column_types(connection, self._relation, [name for name in dict.fromkeys(named) if name])

    @property
    def _relation(self) -> sql.Composable:
        return relation_of(self.definition.attributes.source)

    @property
    def _name(self) -> str:
        table = self.definition.attributes.source.table
        return f"table {table!r}" if table else "the query"

    def __str__(self) -> str:
        return f"collection {self.definition.name!r}"

    @property
    def _file(self) -> str:
        return str(self.definition.path or "defs.yaml")

    @contextmanager
    def _reading(self, connection: psycopg.Connection) -> Iterator[None]:
        """A transaction that reads the source. A psycopg error becomes one line that says what to do."""
        some_rows_do = self.definition.attributes.source.row_security
        try:
            with reading(connection, self.limits, some_rows_do=some_rows_do):
                yield
        except psycopg.Error as error:
            said = what_to_do(error, self.limits) or self._what_to_do(error, connection)
            raise SourceError(f"{self}: {said}") from error

    def _what_to_do(self, error: psycopg.Error, connection: psycopg.Connection) -> str:
        said, table = primary(error), self.definition.attributes.source.table
        if isinstance(error, psycopg.errors.UndefinedTable):
            remedy = "correct"
            if table:
                nearest = did_you_mean(table, tables(connection))
                remedy = f"create it (`embeddings-pipeline load FILE --table {table}`), or correct"
                remedy = f"correct{nearest}" if nearest else remedy
            return f"{said}; {remedy} `source:` in {self._file}"
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            return f"{said}; GRANT SELECT on it to the pipeline's role"
        if isinstance(error, psycopg.errors.SyntaxErrorOrAccessRuleViolation | psycopg.errors.DataError):
            return f"{said}; correct `source:` in {self._file}"
        if isinstance(error, psycopg.OperationalError):
            return f"the source cannot be read: {said}; try again"
        return f"{said}; see `source:` in {self._file}"
