"""Reading the user's table or query: streamed as a whole, or some items by key. Nothing is ever written to it."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.collection import Collection, did_you_mean
from embeddings_pipeline.errors import ConfigurationError, SourceError
from embeddings_pipeline.store.postgres import Database, load_sql
from embeddings_pipeline.texts import row_hash

MAX_KEY_BYTES = 2000  # a B-tree entry of PostgreSQL holds about 2,700
ROWS_AT_ONCE = 20_000


class SourceRow(NamedTuple):
    """One row of the source, as far as the collection looks at it."""

    item_key: str
    row_hash: bytes
    template_json: str
    payload_json: str


@dataclass(frozen=True)
class Source:
    """The source of a collection, in the pipeline's database or in another PostgreSQL."""

    collection: Collection
    database: Database

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection]:
        """A read-only connection to the source. Every psycopg error in it becomes one line that says what to do."""
        with self._errors():
            url = self.collection.config.source.url
            connection = connect_url(url) if url else self.database.connect(autocommit=True)
            with connection:
                connection.execute("SET default_transaction_read_only = on")
                # Both reads of a row must give the same bytes whatever the role's own settings are.
                connection.execute("SET TimeZone = 'UTC'; SET bytea_output = 'hex'; SET extra_float_digits = 1")
                connection.execute("SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'")
                yield connection

    def check(self, connection: psycopg.Connection) -> dict[str, str]:
        """Column → type of the source. SourceError where a column that the collection names is not there."""
        with self._errors():
            statement = sql.SQL("SELECT * FROM {} AS source LIMIT 0").format(self._relation)
            described = connection.execute(statement).description or []
            oids = [column.type_code for column in described]
            names = connection.execute("SELECT array_agg(format_type(o, -1)) FROM unnest(%s::oid[]) o", [oids])
            types = dict(zip([column.name for column in described], (names.fetchone() or [[]])[0] or [], strict=True))
        config = self.collection.config
        named = [(f"template `{name}:`", c) for name, t in self.collection.templates.items() for c in t.columns]
        named += [("`columns:`", column) for column in config.columns]
        named += [("`source.key:`", column) for column in config.source.key]
        named += [("`source.updated_at:`", column) for column in [config.source.updated_at] if column]
        for where, column in named:
            if column not in types:
                raise SourceError(
                    f"{self}: {where} names a column {column!r} that {self._name} does not have"
                    f"{did_you_mean(column, types)}; correct it in {self.collection.path or 'defs.yaml'}"
                )
        return types

    def scan(self, connection: psycopg.Connection) -> Iterator[list[SourceRow]]:
        """Every row of the source in one snapshot, in lists of at most 20,000, in no order."""
        return self._copy(connection, sql.SQL("true"))

    def read(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> list[SourceRow]:
        """The rows with these keys, as they are now; those that are gone are missing from the list."""
        if not item_keys:
            return []
        types = self.check(connection)
        return [row for rows in self._copy(connection, self._with_keys(item_keys, types)) for row in rows]

    def _copy(self, connection: psycopg.Connection, condition: sql.Composable) -> Iterator[list[SourceRow]]:
        query = sql.SQL("COPY ({}) TO STDOUT").format(self._select(condition))
        with self._errors(), connection.cursor() as cursor, cursor.copy(query) as copy:
            copy.set_types(["text", "text", "text"])
            rows: list[SourceRow] = []
            for item_key, template_json, payload_json in copy.rows():
                if item_key is None:
                    raise SourceError(
                        f"{self}: {self._name} has a row whose key ({', '.join(self.collection.config.source.key)}) is "
                        f"NULL, near {template_json[:80]}; give it a key, or leave it out with `where:`"
                    )
                if len(item_key) > MAX_KEY_BYTES // 4 and len(item_key.encode()) > MAX_KEY_BYTES:
                    raise SourceError(
                        f"{self}: the key {item_key[:60]!r}… is longer than {MAX_KEY_BYTES} bytes; choose a shorter key"
                    )
                digest = row_hash(item_key, template_json, payload_json)
                rows.append(SourceRow(item_key, digest, template_json, payload_json))
                if len(rows) == ROWS_AT_ONCE:
                    yield rows
                    rows = []
            if rows:
                yield rows

    def _select(self, condition: sql.Composable) -> sql.Composed:
        config = self.collection.config
        columns = [_column(column) for column in config.source.key]
        if len(columns) == 1:
            key: sql.Composable = sql.SQL("{}::text").format(columns[0])
        else:
            key = sql.SQL("CASE WHEN {} THEN json_build_array({})::text END").format(
                sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(column) for column in columns),
                sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns),
            )
        where = config.source.where
        if where:
            condition = sql.SQL("({}\n) AND {}").format(sql.SQL(where), condition)  # type: ignore[arg-type]
        return sql.SQL(load_sql("source")).format(  # type: ignore[arg-type]
            key=key,
            template_columns=sql.SQL(", ").join(map(_column, self.collection.template_columns)),
            payload_columns=sql.SQL(", ").join(map(_column, config.columns)),
            relation=self._relation,
            condition=condition,
        )

    def _with_keys(self, item_keys: Sequence[str], types: dict[str, str]) -> sql.Composed:
        columns = self.collection.config.source.key
        values = list(zip(*(split_key(item_key, len(columns)) for item_key in item_keys), strict=True))
        arrays = [
            sql.SQL("CAST({} AS text[])::{}[]").format(sql.Literal(list(v)), sql.SQL(types[c]))  # type: ignore[arg-type]
            for c, v in zip(columns, values, strict=True)
        ]
        if len(columns) == 1:  # the plain form uses an index wherever there is one
            return sql.SQL("{} = ANY ({})").format(_column(columns[0]), arrays[0])
        return sql.SQL("({}) IN (SELECT * FROM unnest({}))").format(
            sql.SQL(", ").join(map(_column, columns)), sql.SQL(", ").join(arrays)
        )

    @property
    def _relation(self) -> sql.Composable:
        source = self.collection.config.source
        if source.table:
            return table_identifier(source.table)
        return sql.SQL("({}\n)").format(sql.SQL((source.query or "").strip().rstrip(";")))  # type: ignore[arg-type]

    @property
    def _name(self) -> str:
        return f"table {self.collection.config.source.table!r}" if self.collection.config.source.table else "the query"

    def __str__(self) -> str:
        return f"collection {self.collection.name!r}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        where = self.collection.path or "defs.yaml"
        try:
            yield
        except psycopg.errors.UndefinedTable as error:
            table = self.collection.config.source.table
            remedy = (
                f"; create it (`embeddings-pipeline load FILE --table {table}`), or correct" if table else "; correct"
            )
            raise SourceError(f"{self}: {_primary(error)}{remedy} `source:` in {where}") from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise SourceError(f"{self}: {_primary(error)}; GRANT SELECT on it to the pipeline's role") from error
        except (psycopg.errors.SyntaxErrorOrAccessRuleViolation, psycopg.errors.DataError) as error:
            raise SourceError(f"{self}: {_primary(error)}; correct `source:` in {where}") from error
        except psycopg.OperationalError as error:
            raise SourceError(f"{self}: the source cannot be read: {_primary(error)}; try again") from error
        except psycopg.Error as error:
            raise SourceError(f"{self}: {_primary(error)}; see `source:` in {where}") from error


def split_key(item_key: str, columns: int) -> list[str]:
    """The key columns' values as texts: the inverse of how an item key is made."""
    return [item_key] if columns == 1 else json.loads(item_key)


def table_identifier(name: str) -> sql.Identifier:
    """`movies`, `schema.movies` or `"odd.name"` as an identifier; the case is kept."""
    parts = re.findall(r'"((?:[^"]|"")+)"|([^".]+)', name)
    return sql.Identifier(*(quoted.replace('""', '"') or plain for quoted, plain in parts))


def expand_environment(url: str) -> str:
    """`${NAME}` replaced from the environment, so that no password stands in a file."""

    def value(match: re.Match[str]) -> str:
        if (found := os.environ.get(match[1])) is None:
            raise ConfigurationError(
                f"`source.url:` names ${{{match[1]}}}, which is not set; export it or put it in .env"
            )
        return found

    return re.sub(r"\$\{(\w+)\}", value, url)


def connect_url(url: str) -> psycopg.Connection:
    """A connection to the database of `source.url:`."""
    url = re.sub(r"^postgres(ql)?(\+psycopg2?)?://", "postgresql://", expand_environment(url))
    try:
        return psycopg.connect(url, autocommit=True, connect_timeout=10)
    except psycopg.ProgrammingError:  # its message would show the password
        raise ConfigurationError(
            "`source.url:` cannot be read: it looks like postgresql://user:${PASSWORD}@host:5432/name"
        ) from None


def _column(name: str) -> sql.Composed:
    return sql.SQL("source.{}").format(sql.Identifier(name))


def _primary(error: psycopg.Error) -> str:
    return error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0]
