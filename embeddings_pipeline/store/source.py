"""Reading the user's table or query: streamed as a whole, or some items by key. Nothing is ever written to it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import row_hash, unreadable_hash
from embeddings_pipeline.errors import ConfigurationError, SourceError, did_you_mean
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.halves import MOST_FAILURES, by_halves, is_of_data
from embeddings_pipeline.store.session import RUN_LIMITS, ReadLimits, reading, what_to_do
from embeddings_pipeline.store.source_rows import Position, ScannedRow, SourceRow, UpdatedRow, is_key, split_key
from embeddings_pipeline.store.source_sql import (
    column_of,
    columns_of,
    primary,
    relation_of,
    tables,
    user_statement,
)
from embeddings_pipeline.store.source_url import connect_url
from embeddings_pipeline.store.sql import load_sql

MAX_KEY_BYTES = 2000  # a B-tree entry of PostgreSQL holds about 2,700
ROWS_AT_ONCE = 20_000
_WITHOUT_NAN = {
    kind + array: function
    for kind in ("real", "double precision", "numeric")
    for array, function in (("", "nullif({}, 'NaN')"), ("[]", "array_replace({}, 'NaN', NULL)"))
}
TIMESTAMPS = ("timestamp with time zone", "timestamp without time zone")
OVERLAP = timedelta(minutes=10)
"""Incremental reads go back so far once they have caught up: a row may be committed that long after its time."""


@dataclass(frozen=True)
class Source:
    """The source of a collection, in the pipeline's database or in another PostgreSQL."""

    definition: CollectionDefinition
    database: Database
    limits: ReadLimits = RUN_LIMITS

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection]:
        """A connection to the source, for the reads below, each of which is a read-only transaction of its own: a
        pooler may stand before it. Raises SourceError, ConfigurationError or DatabaseError in one line.
        """
        url = self.definition.attributes.source.url
        try:
            connection = connect_url(url) if url else self.database.connect(autocommit=True)
        except (SourceError, ConfigurationError) as error:
            raise type(error)(f"{self}: {error} (in {self._file})") from error
        with connection:
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

    def scan(self, connection: psycopg.Connection, apart: Sequence[str] = ()) -> Iterator[list[ScannedRow]]:
        """Every row of the source in one snapshot, in lists of at most 20,000, in no order.

        `apart`: keys of rows that could not be read before, which are read by themselves. SourceError if another cannot
        be read: `scan_by_key` finds which.
        """
        # Only what is hashed comes over: PostgreSQL leaves the rest of the query out.
        types = self.check(connection)
        others = sql.SQL("{} <> ALL ({}::text[])").format(self._key, sql.Literal(list(apart)))
        selected = self._select(others, types, guarded=True) if apart else self._select(sql.SQL("true"), types)
        statement = sql.SQL("SELECT item_key, row_json FROM ({}) AS item").format(selected)
        rows: list[ScannedRow] = []
        for item_key, row_json in self._copy(connection, statement, 2):
            rows.append(ScannedRow(item_key, row_hash(item_key, row_json)))
            if len(rows) == ROWS_AT_ONCE:
                yield rows
                rows = []
        rows += [ScannedRow(row.item_key, row.row_hash, row.reason) for row in self.read(connection, apart)]
        if rows:
            yield rows

    def scan_by_key(self, connection: psycopg.Connection) -> Iterator[list[ScannedRow]]:
        """As `scan`, with the rows that cannot be read among the others. SourceError if those are all, or too many."""
        self._check_statement(connection, self.check(connection))
        keys = self._keys(connection)
        readable, failed, example = 0, 0, None
        for start in range(0, len(keys), ROWS_AT_ONCE):
            rows = self.read(connection, keys[start : start + ROWS_AT_ONCE])
            unreadable = [row for row in rows if row.reason is not None]
            readable, failed = readable + len(rows) - len(unreadable), failed + len(unreadable)
            example = example or next(iter(unreadable), None)
            last = start + ROWS_AT_ONCE >= len(keys)
            if example and (failed > MOST_FAILURES or (last and failed > 1 and not readable)):
                raise SourceError(
                    f"{self}: {failed:,} rows of {self._name} cannot be read, and {readable:,} could; the one with the "
                    f"key ({example.item_key}): {example.reason}; correct `source:` in {self._file}"
                )
            yield [ScannedRow(row.item_key, row.row_hash, row.reason) for row in rows]

    def newest(self, connection: psycopg.Connection) -> Position | None:
        """Where the last update stood `OVERLAP` ago, by the rows' own time; None without rows."""
        statement = sql.SQL(load_sql("source/newest")).format(
            **self._order(self.check(connection)), overlap=sql.Literal(OVERLAP)
        )
        with self._reading(connection):
            row = connection.execute(statement).fetchone()
        return Position(row[0], "") if row else None

    def is_ahead(self, connection: psycopg.Connection, position: Position | None) -> bool:
        """Whether a position is of a time that is yet to come by the source's clock."""
        order, at = self._order(self.check(connection)), sql.Literal(position.updated_at if position else None)
        with self._reading(connection):
            statement = sql.SQL("SELECT CAST({at} AS {type}) > {clock}").format(**order, at=at)
            return connection.execute(statement).fetchone() == (True,)

    def updated_after(
        self,
        connection: psycopg.Connection,
        after: Position | None,
        limit: int,
        *,
        types: dict[str, str] | None = None,
        until_now: bool = False,
    ) -> list[UpdatedRow]:
        """At most `limit` rows that were updated after a position, in the order of their positions.

        Rows without `updated_at` are not among them; `until_now`: nor those whose time is ahead of the source's clock.
        `types`: what `check` gave a moment ago.
        """
        condition: sql.Composable = sql.SQL("true")
        types = types or self.check(connection)
        order = self._order(types)
        if after:
            at = sql.SQL("CAST({} AS {})").format(sql.Literal(after.updated_at), order["type"])
            if after.item_key is None:
                condition = sql.SQL("{updated_at} > {at}").format(**order, at=at)
            else:
                position = '{updated_at} >= {at} AND ({updated_at}, {key} COLLATE "C") > ({at}, {at_key})'
                condition = sql.SQL(position).format(**order, at=at, at_key=sql.Literal(after.item_key))
        if until_now:
            condition = sql.SQL("{condition} AND {updated_at} <= {clock}").format(**order, condition=condition)
        seen = tuple(dict.fromkeys((*self.definition.template_columns, *self.definition.attributes.columns)))
        where = user_statement((self.definition.attributes.source.where or "").strip() or "true")
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
        row_json, meets = sql.SQL("row_to_json(seen.*)::text"), sql.SQL("({}\n)").format(where)
        statement = sql.SQL(load_sql("source/updated"))
        try:
            found = list(self._copy(connection, statement.format(**parts, row_json=row_json, meets=meets), 5))
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
            places = statement.format(**parts, row_json=sql.SQL("''"), meets=sql.SQL("true"))
            return self._updated_by_key(connection, list(self._copy(connection, places, 5)))
        return [
            UpdatedRow(key, row_hash(key, row) if met == "t" else None, Position(updated_at, key), ahead == "t")
            for key, row, updated_at, met, ahead in found
        ]

    def _updated_by_key(self, connection: psycopg.Connection, places: list[tuple[str, ...]]) -> list[UpdatedRow]:
        """Rows at these places, each read by its key since one of them cannot be read."""
        keys = list(dict.fromkeys(key for key, *_ in places))
        hashes = {row.item_key: row.row_hash for row in self.read(connection, keys)}
        last = {key: n for n, (key, *_) in enumerate(places)}
        return [
            UpdatedRow(key, hashes.get(key) if last[key] == n else None, Position(updated_at, key), ahead == "t")
            for n, (key, _, updated_at, _, ahead) in enumerate(places)
        ]

    def _order(self, types: dict[str, str]) -> dict[str, sql.Composable]:
        """The parts of statements that read in the order of updates."""
        column = self.definition.attributes.source.updated_at
        assert column is not None
        kind = types[column]
        # What writers of a timestamp without time zone call now is at most 14 hours ahead of UTC.
        clock = "clock_timestamp()" if kind == TIMESTAMPS[0] else "(clock_timestamp() AT TIME ZONE 'UTC' + '14 hours')"
        return {
            "key": self._key,
            "updated_at": column_of(column),
            "type": sql.SQL(kind),
            "clock": sql.SQL(clock),
            "relation": self._relation,
        }

    def read(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> list[SourceRow]:
        """The rows with these keys, as they are now; those that are gone are missing from the list. A row that cannot
        be read is in it with the reason.
        """
        columns = len(self.definition.attributes.source.key)
        item_keys = [item_key for item_key in item_keys if is_key(item_key, columns)]
        if not item_keys:
            return []
        types = self.check(connection)
        try:
            return self._read(connection, self._select(self._with_keys(item_keys, types), types))
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
        self._check_statement(connection, types)
        # Either a row cannot be read, or the column's type, which was changed, cannot hold a key: as text that is just
        # not found.
        as_text = not self._can_ask(connection, self._with_keys(item_keys, types))

        def read(keys: list[str]) -> list[SourceRow]:
            condition = self._with_keys_as_text(keys) if as_text else self._with_keys(keys, types)
            return self._read(connection, self._select(condition, types, guarded=True))

        parts, failed = by_halves(read, item_keys, lambda error: is_of_data(error.__cause__))
        reasons = {key: primary(error.__cause__) for key, error in failed.items()}  # type: ignore[arg-type]
        unreadable = [SourceRow(key, unreadable_hash(key), "", "", reason) for key, reason in reasons.items()]
        return [*(row for part in parts for row in part), *unreadable]

    def _read(self, connection: psycopg.Connection, query: sql.Composable) -> list[SourceRow]:
        rows = self._copy(connection, query, 3)
        return [SourceRow(key, row_hash(key, row_json), row_json, payload) for key, row_json, payload in rows]

    def _keys(self, connection: psycopg.Connection) -> list[str]:
        """The key of each row; of each whatever `where:` says, if it cannot be asked of one of them."""
        where = user_statement((self.definition.attributes.source.where or "").strip() or "true")
        asked = where if self._can_ask(connection, where) else sql.SQL("true")
        return [row[0] for row in self._copy(connection, self._asking(asked), 2)]

    def _check_statement(self, connection: psycopg.Connection, types: dict[str, str]) -> None:
        """SourceError if it fails without any row too: then no row is to blame."""
        list(self._copy(connection, self._select(sql.SQL("false"), types), 3))

    def _can_ask(self, connection: psycopg.Connection, condition: sql.Composable) -> bool:
        try:
            for _ in self._copy(connection, self._asking(condition), 2):
                pass
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
            return False
        return True

    def _asking(self, condition: sql.Composable) -> sql.Composed:
        """The keys of the rows that meet a condition, and nothing else of them."""
        statement = sql.SQL("SELECT {}, '' FROM {} AS source WHERE ({}\n)")
        return statement.format(self._key, self._relation, condition)

    def _copy(self, connection: psycopg.Connection, query: sql.Composable, columns: int) -> Iterator[tuple[str, ...]]:
        """The rows of a query whose first two columns are an item's key and its JSON, all texts."""
        statement = sql.SQL("COPY ({}) TO STDOUT").format(query)
        with self._reading(connection), connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(["text"] * columns)
            for row in copy.rows():
                item_key = row[0]
                if item_key is None:
                    key = ", ".join(self.definition.attributes.source.key)
                    raise SourceError(
                        f"{self}: {self._name} has a row whose key ({key}) is NULL, near {row[1][:80]}; give it a key, "
                        f"or leave it out with `where:`"
                    )
                if len(item_key) > MAX_KEY_BYTES // 4 and len(item_key.encode()) > MAX_KEY_BYTES:
                    raise SourceError(
                        f"{self}: the key {item_key[:60]!r}… is longer than {MAX_KEY_BYTES} bytes; choose a shorter key"
                    )
                yield row

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
        """The columns that a row is hashed and rendered by. NaN is not a number: a template's column is empty there."""
        rendered = self.definition.template_columns
        columns: list[sql.Composable] = []
        for name in dict.fromkeys((*rendered, *self.definition.attributes.columns)):
            function = _WITHOUT_NAN.get(types[name]) if name in rendered else None
            column = sql.SQL(function or "{}").format(column_of(name))
            columns.append(sql.SQL("{} AS {}").format(column, sql.Identifier(name)) if function else column)
        return sql.SQL(", ").join(columns)

    @property
    def _key(self) -> sql.Composable:
        """The item key as an expression: NULL if any of its columns is."""
        columns = [column_of(column) for column in self.definition.attributes.source.key]
        if len(columns) == 1:
            return sql.SQL("{}::text").format(columns[0])
        return sql.SQL("CASE WHEN {} THEN json_build_array({})::text END").format(
            sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(column) for column in columns),
            sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns),
        )

    def item_keys(self, connection: psycopg.Connection, values: Sequence[tuple[str, ...]]) -> list[str]:
        """The item keys of rows whose key columns have these values, as the types write them."""
        if not values:
            return []
        columns = sql.SQL(", ").join(map(sql.Identifier, self.definition.attributes.source.key))
        arrays = sql.SQL(", ").join(self._arrays(values, self.check(connection)))
        statement = sql.SQL("SELECT {}, '' FROM unnest({}) AS source ({})").format(self._key, arrays, columns)
        return [row[0] for row in self._copy(connection, statement, 2)]

    def _arrays(self, values: Sequence[Sequence[str]], types: dict[str, str]) -> list[sql.Composed]:
        """For each key column the array of its values."""
        columns = self.definition.attributes.source.key
        return [
            sql.SQL("CAST({} AS text[])::{}[]").format(sql.Literal(list(of_column)), sql.SQL(types[column]))
            for column, of_column in zip(columns, zip(*values, strict=True), strict=True)
        ]

    def _with_keys(self, item_keys: Sequence[str], types: dict[str, str]) -> sql.Composed:
        columns = self.definition.attributes.source.key
        arrays = self._arrays([split_key(item_key, len(columns)) for item_key in item_keys], types)
        if len(columns) == 1:  # the plain form uses an index if there is one
            return sql.SQL("{} = ANY ({})").format(column_of(columns[0]), arrays[0])
        return sql.SQL("({}) IN (SELECT * FROM unnest({}))").format(
            sql.SQL(", ").join(map(column_of, columns)), sql.SQL(", ").join(arrays)
        )

    def _with_keys_as_text(self, item_keys: Sequence[str]) -> sql.Composed:
        return sql.SQL("{} = ANY ({}::text[])").format(self._key, sql.Literal(list(item_keys)))

    def _types(self, connection: psycopg.Connection) -> dict[str, str]:
        try:
            statement = sql.SQL("SELECT * FROM {} AS source LIMIT 0").format(self._relation)
            connection.execute("SAVEPOINT before_description")
            described = connection.execute(statement).description or []
        except psycopg.errors.InsufficientPrivilege:  # perhaps only of columns that we do not need
            connection.execute("ROLLBACK TO SAVEPOINT before_description")
            config = self.definition.attributes
            named = dict.fromkeys((*config.source.key, *self.definition.template_columns, *config.columns))
            named |= {config.source.updated_at: None} if config.source.updated_at else {}
            statement = sql.SQL("SELECT {} FROM {} AS source LIMIT 0").format(columns_of(named), self._relation)
            described = connection.execute(statement).description or []
        oids = [column.type_code for column in described]
        names = connection.execute("SELECT array_agg(format_type(o, -1)) FROM unnest(%s::oid[]) o", [oids]).fetchone()
        return dict(zip([column.name for column in described], (names and names[0]) or [], strict=True))

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
