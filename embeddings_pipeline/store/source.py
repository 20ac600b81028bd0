"""Reading the user's table or query: streamed as a whole, or some items by key. Nothing is ever written to it."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import row_hash
from embeddings_pipeline.errors import ConfigurationError, SourceError, did_you_mean
from embeddings_pipeline.store.database import Database
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

# Both reads of a row must give the same bytes, whatever the role's own settings are, and however long they take.
_SOURCE_SESSION = """
SET client_encoding = 'UTF8'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres';
SET bytea_output = 'hex'; SET extra_float_digits = 1; SET jit = off; SET default_transaction_read_only = on;
SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0
"""


class ScannedRow(NamedTuple):
    """What a scan keeps of a row."""

    item_key: str
    row_hash: bytes


class Position(NamedTuple):
    """A place in the order in which rows were updated: what `updated_at` says, as text, and the item's key."""

    updated_at: str
    item_key: str | None  # None: after all rows of that time


class UpdatedRow(NamedTuple):
    """A row as an incremental read sees it."""

    item_key: str
    row_hash: bytes | None  # None: it does not meet the collection's `where:`
    position: Position
    ahead: bool  # its `updated_at` is later than the source's clock


class SourceRow(NamedTuple):
    """One row of the source, as far as the collection looks at it."""

    item_key: str
    row_hash: bytes
    row_json: str  # template columns and payload
    payload_json: str


@dataclass(frozen=True)
class Source:
    """The source of a collection, in the pipeline's database or in another PostgreSQL."""

    definition: CollectionDefinition
    database: Database

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection]:
        """A read-only connection to the source. Raises SourceError, ConfigurationError or DatabaseError in one line."""
        url = self.definition.attributes.source.url
        try:
            connection = connect_url(url) if url else self.database.connect(autocommit=True)
        except (SourceError, ConfigurationError) as error:
            raise type(error)(f"{self}: {error} (in {self._file})") from error
        with connection:
            with self._errors():
                connection.execute(_SOURCE_SESSION)
            yield connection

    def check(self, connection: psycopg.Connection) -> dict[str, str]:
        """Column → type of the source. SourceError if a column that the collection names is not there."""
        with self._errors(connection):
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

    def scan(self, connection: psycopg.Connection) -> Iterator[list[ScannedRow]]:
        """Every row of the source in one snapshot, in lists of at most 20,000, in no order."""
        # Only what is hashed comes over: PostgreSQL leaves the rest of the query out.
        types = self.check(connection)
        statement = sql.SQL("SELECT item_key, row_json FROM ({}) AS item").format(self._select(sql.SQL("true"), types))
        rows: list[ScannedRow] = []
        for item_key, row_json in self._copy(connection, statement, 2):
            rows.append(ScannedRow(item_key, row_hash(item_key, row_json)))
            if len(rows) == ROWS_AT_ONCE:
                yield rows
                rows = []
        if rows:
            yield rows

    def newest(self, connection: psycopg.Connection) -> Position | None:
        """Where the last update stood `OVERLAP` ago, by the rows' own time; None without rows."""
        order = self._order(self.check(connection))
        statement = sql.SQL(load_sql("source/newest")).format(**order, overlap=sql.Literal(OVERLAP))
        with self._errors(connection):
            return next((Position(at, "") for (at,) in connection.execute(statement)), None)

    def is_ahead(self, connection: psycopg.Connection, position: Position | None) -> bool:
        """Whether a position is of a time that is yet to come by the source's clock."""
        order, at = self._order(self.check(connection)), sql.Literal(position.updated_at if position else None)
        with self._errors(connection):
            statement = sql.SQL("SELECT CAST({at} AS {type}) > {clock}").format(**order, at=at)
            return connection.execute(statement).fetchone() == (True,)

    def updated_after(self, connection: psycopg.Connection, after: Position | None, limit: int) -> list[UpdatedRow]:
        """At most `limit` rows that were updated after a position, in the order of their positions.

        Rows without `updated_at` are not among them.
        """
        condition: sql.Composable = sql.SQL("true")
        types = self.check(connection)
        order = self._order(types)
        if after:
            at = sql.SQL("CAST({} AS {})").format(sql.Literal(after.updated_at), order["type"])
            if after.item_key is None:
                condition = sql.SQL("{updated_at} > {at}").format(**order, at=at)
            else:
                position = '{updated_at} >= {at} AND ({updated_at}, {key} COLLATE "C") > ({at}, {at_key})'
                condition = sql.SQL(position).format(**order, at=at, at_key=sql.Literal(after.item_key))
        seen = tuple(dict.fromkeys((*self.definition.template_columns, *self.definition.attributes.columns)))
        where = _statement((self.definition.attributes.source.where or "").strip() or "true")
        columns = dict.fromkeys(
            (*self.definition.attributes.source.key, *seen, self.definition.attributes.source.updated_at)
        )
        statement = sql.SQL(load_sql("source/updated")).format(
            **order,
            used=_columns(c for c in columns if c),
            seen=self._hashed(types),
            meets=sql.SQL("({}\n)").format(where),
            condition=condition,
            limit=sql.Literal(limit),
        )
        rows = []
        for item_key, row_json, updated_at, meets, ahead in self._copy(connection, statement, 5):
            digest = row_hash(item_key, row_json) if meets == "t" else None
            rows.append(UpdatedRow(item_key, digest, Position(updated_at, item_key), ahead == "t"))
        return rows

    def _order(self, types: dict[str, str]) -> dict[str, sql.Composable]:
        """The parts of statements that read in the order of updates."""
        column = self.definition.attributes.source.updated_at
        assert column is not None
        kind = types[column]
        # What writers of a timestamp without time zone call now is at most 14 hours ahead of UTC.
        clock = "clock_timestamp()" if kind == TIMESTAMPS[0] else "(clock_timestamp() AT TIME ZONE 'UTC' + '14 hours')"
        return {
            "key": self._key,
            "updated_at": _column(column),
            "type": sql.SQL(kind),
            "clock": sql.SQL(clock),
            "relation": self._relation,
        }

    def read(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> list[SourceRow]:
        """The rows with these keys, as they are now; those that are gone are missing from the list."""
        columns = len(self.definition.attributes.source.key)
        item_keys = [item_key for item_key in item_keys if _is_key(item_key, columns)]
        if not item_keys:
            return []
        types = self.check(connection)
        try:
            return self._read(connection, self._with_keys(item_keys, types), types)
        except SourceError as error:
            if not isinstance(error.__cause__, psycopg.DataError):
                raise
            # A key that the column's type cannot hold: the type was changed. As text it is just not found.
            return self._read(connection, self._with_keys_as_text(item_keys), types)

    def _read(
        self, connection: psycopg.Connection, condition: sql.Composable, types: dict[str, str]
    ) -> list[SourceRow]:
        rows = self._copy(connection, self._select(condition, types), 3)
        return [SourceRow(key, row_hash(key, row_json), row_json, payload) for key, row_json, payload in rows]

    def _copy(self, connection: psycopg.Connection, query: sql.Composable, columns: int) -> Iterator[tuple[str, ...]]:
        """The rows of a query whose first two columns are an item's key and its JSON, all texts."""
        statement = sql.SQL("COPY ({}) TO STDOUT").format(query)
        with self._errors(connection), connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(["text"] * columns)
            for row in copy.rows():
                item_key = row[0]
                if item_key is None:
                    raise SourceError(
                        f"{self}: {self._name} has a row whose key "
                        f"({', '.join(self.definition.attributes.source.key)}) is "
                        f"NULL, near {row[1][:80]}; give it a key, or leave it out with `where:`"
                    )
                if len(item_key) > MAX_KEY_BYTES // 4 and len(item_key.encode()) > MAX_KEY_BYTES:
                    raise SourceError(
                        f"{self}: the key {item_key[:60]!r}… is longer than {MAX_KEY_BYTES} bytes; choose a shorter key"
                    )
                yield row

    def _select(self, condition: sql.Composable, types: dict[str, str]) -> sql.Composed:
        config = self.definition.attributes
        if where := (config.source.where or "").strip():
            condition = sql.SQL("({}\n) AND {}").format(_statement(where), condition)
        seen = tuple(dict.fromkeys((*self.definition.template_columns, *config.columns)))
        return sql.SQL(load_sql("source/rows")).format(
            key=self._key,
            used=_columns(dict.fromkeys((*config.source.key, *seen))),
            seen=self._hashed(types),
            payload=_columns(config.columns),
            relation=self._relation,
            condition=condition,
        )

    def _hashed(self, types: dict[str, str]) -> sql.Composable:
        """The columns that a row is hashed and rendered by. NaN is not a number: a template's column is empty there."""
        rendered = self.definition.template_columns
        columns: list[sql.Composable] = []
        for name in dict.fromkeys((*rendered, *self.definition.attributes.columns)):
            function = _WITHOUT_NAN.get(types[name]) if name in rendered else None
            column = sql.SQL(function or "{}").format(_column(name))
            columns.append(sql.SQL("{} AS {}").format(column, sql.Identifier(name)) if function else column)
        return sql.SQL(", ").join(columns)

    @property
    def _key(self) -> sql.Composable:
        """The item key as an expression: NULL if any of its columns is."""
        columns = [_column(column) for column in self.definition.attributes.source.key]
        if len(columns) == 1:
            return sql.SQL("{}::text").format(columns[0])
        return sql.SQL("CASE WHEN {} THEN json_build_array({})::text END").format(
            sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(column) for column in columns),
            sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns),
        )

    def _with_keys(self, item_keys: Sequence[str], types: dict[str, str]) -> sql.Composed:
        columns = self.definition.attributes.source.key
        values = list(zip(*(split_key(item_key, len(columns)) for item_key in item_keys), strict=True))
        arrays = [
            sql.SQL("CAST({} AS text[])::{}[]").format(sql.Literal(list(v)), sql.SQL(types[c]))
            for c, v in zip(columns, values, strict=True)
        ]
        if len(columns) == 1:  # the plain form uses an index if there is one
            return sql.SQL("{} = ANY ({})").format(_column(columns[0]), arrays[0])
        return sql.SQL("({}) IN (SELECT * FROM unnest({}))").format(
            sql.SQL(", ").join(map(_column, columns)), sql.SQL(", ").join(arrays)
        )

    def _with_keys_as_text(self, item_keys: Sequence[str]) -> sql.Composed:
        return sql.SQL("{} = ANY ({}::text[])").format(self._key, sql.Literal(list(item_keys)))

    def _types(self, connection: psycopg.Connection) -> dict[str, str]:
        try:
            statement = sql.SQL("SELECT * FROM {} AS source LIMIT 0").format(self._relation)
            described = connection.execute(statement).description or []
        except psycopg.errors.InsufficientPrivilege:  # perhaps only of columns that we do not need
            config = self.definition.attributes
            named = dict.fromkeys((*config.source.key, *self.definition.template_columns, *config.columns))
            named |= {config.source.updated_at: None} if config.source.updated_at else {}
            statement = sql.SQL("SELECT {} FROM {} AS source LIMIT 0").format(_columns(named), self._relation)
            described = connection.execute(statement).description or []
        oids = [column.type_code for column in described]
        names = connection.execute("SELECT array_agg(format_type(o, -1)) FROM unnest(%s::oid[]) o", [oids]).fetchone()
        return dict(zip([column.name for column in described], (names and names[0]) or [], strict=True))

    @property
    def _relation(self) -> sql.Composable:
        source = self.definition.attributes.source
        if source.table:
            return table_identifier(source.table)
        return sql.SQL("({}\n)").format(_statement(source.query or ""))

    @property
    def _name(self) -> str:
        return (
            f"table {self.definition.attributes.source.table!r}"
            if self.definition.attributes.source.table
            else "the query"
        )

    def __str__(self) -> str:
        return f"collection {self.definition.name!r}"

    @property
    def _file(self) -> str:
        return str(self.definition.path or "defs.yaml")

    @contextmanager
    def _errors(self, connection: psycopg.Connection | None = None) -> Iterator[None]:
        """A psycopg error becomes one line that says what to do."""
        source = self.definition.attributes.source
        try:
            yield
        except psycopg.errors.UndefinedTable as error:
            remedy = "correct"
            if source.table and connection:
                nearest = did_you_mean(source.table, tables(connection))
                remedy = f"create it (`embeddings-pipeline load FILE --table {source.table}`), or correct"
                remedy = f"correct{nearest}" if nearest else remedy
            raise SourceError(f"{self}: {_primary(error)}; {remedy} `source:` in {self._file}") from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise SourceError(f"{self}: {_primary(error)}; GRANT SELECT on it to the pipeline's role") from error
        except (psycopg.errors.SyntaxErrorOrAccessRuleViolation, psycopg.errors.DataError) as error:
            raise SourceError(f"{self}: {_primary(error)}; correct `source:` in {self._file}") from error
        except psycopg.OperationalError as error:
            raise SourceError(f"{self}: the source cannot be read: {_primary(error)}; try again") from error
        except psycopg.Error as error:
            raise SourceError(f"{self}: {_primary(error)}; see `source:` in {self._file}") from error


def split_key(item_key: str, columns: int) -> list[str]:
    """The key columns' values as texts: the inverse of how an item key is made."""
    return [item_key] if columns == 1 else json.loads(item_key)


def _is_key(item_key: str, columns: int) -> bool:
    """Whether a key of the ledger can be one of the source, whose key columns may have been others before."""
    if columns == 1:
        return True
    try:
        values = json.loads(item_key)
    except ValueError:
        return False
    return isinstance(values, list) and len(values) == columns and all(isinstance(value, str) for value in values)


def table_identifier(name: str) -> sql.Identifier:
    """`movies`, `schema.movies` or `"odd.name"` as an identifier; the case is kept. SourceError for another shape."""
    part = r'(?:"(?:[^"]|"")+"|[^".]+)'
    if not re.fullmatch(rf"{part}(\.{part})?", name) or "\0" in name:
        raise SourceError(f'{name!r} is not the name of a table: write `movies`, `schema.movies` or `"odd.name"`')
    parts = re.findall(r'"((?:[^"]|"")+)"|([^".]+)', name)
    return sql.Identifier(*(quoted.replace('""', '"') or plain for quoted, plain in parts))


def tables(connection: psycopg.Connection) -> list[str]:
    """Tables and views that are not the system's or ours, as `table:` names them."""
    return [row[0] for row in connection.execute(load_sql("source/tables"))]


_TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | \$(\w*)\$.*?\$\1\$
      | (?P<comment>--[^\n]* | /\*.*?\*/ | \s+) | (?P<semicolon>;) | .""",
    re.VERBOSE | re.DOTALL,
)


def _statement(text: str) -> sql.SQL:
    """A query or condition of the user's, without the semicolons that end it; comments may follow those."""
    end = 0
    for token in _TOKEN.finditer(text):
        if not token["comment"] and not token["semicolon"]:
            end = token.end()
    return sql.SQL(text[:end])


def _columns(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(_column, names))


def _column(name: str) -> sql.Composed:
    return sql.SQL("source.{}").format(sql.Identifier(name))


def _primary(error: psycopg.Error) -> str:
    said = error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{said} ({error.diag.message_hint})" if error.diag.message_hint else said
