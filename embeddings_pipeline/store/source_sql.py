"""The user's table, query and columns as parts of statements, and what PostgreSQL says of them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import SourceDefinition
from embeddings_pipeline.config.recommending import InteractionsDefinition
from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.sql import load_sql

TIMESTAMPS = ("timestamp with time zone", "timestamp without time zone")
_WITHOUT_NAN = {
    kind + array: function
    for kind in ("real", "double precision", "numeric")
    for array, function in (("", "nullif({}, 'NaN')"), ("[]", "array_replace({}, 'NaN', NULL)"))
}


class Position(NamedTuple):
    """A place in the order in which rows were updated: what `updated_at` says, as text, and the item's key."""

    updated_at: str
    item_key: str | None  # None: after all rows of that time


def split_key(item_key: str) -> list[str]:
    """The values of several key columns as texts: the inverse of how an item key is made of them."""
    values: list[str] = json.loads(item_key)
    return values


def table_identifier(name: str) -> sql.Identifier:
    """`movies`, `schema.movies` or `"odd.name"` as an identifier; the case is kept. SourceError for another shape."""
    part = r'(?:"(?:[^"]|"")+"|[^".]+)'
    if not re.fullmatch(rf"{part}(\.{part})?", name) or "\0" in name:
        raise SourceError(f'{name!r} is not the name of a table: write `movies`, `schema.movies` or `"odd.name"`')
    parts = re.findall(r'"((?:[^"]|"")+)"|([^".]+)', name)
    return sql.Identifier(*(quoted.replace('""', '"') or plain for quoted, plain in parts))


def relation_of(source: SourceDefinition | InteractionsDefinition) -> sql.Composable:
    """The table, or the query in parentheses."""
    return (
        table_identifier(source.table) if source.table else sql.SQL("({}\n)").format(user_statement(source.query or ""))
    )


def tables(connection: psycopg.Connection) -> list[str]:
    """Tables and views that are not the system's or ours, as `table:` names them."""
    return [row[0] for row in connection.execute(load_sql("source/tables"))]


_TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | \$(\w*)\$.*?\$\1\$
      | (?P<comment>--[^\n]* | /\*.*?\*/ | \s+) | (?P<semicolon>;) | .""",
    re.VERBOSE | re.DOTALL,
)


def user_statement(text: str) -> sql.SQL:
    """A query or condition of the user's, without the semicolons that end it; comments may follow those."""
    end = 0
    for token in _TOKEN.finditer(text):
        if not token["comment"] and not token["semicolon"]:
            end = token.end()
    return sql.SQL(text[:end])


def columns_of(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(column_of, names))


def column_of(name: str) -> sql.Composed:
    return sql.SQL("source.{}").format(sql.Identifier(name))


def column_types(connection: psycopg.Connection, relation: sql.Composable, named: Sequence[str]) -> dict[str, str]:
    """Column → type of a table or query, within a transaction; of those that are named, if we may read no others."""
    try:
        statement = sql.SQL("SELECT * FROM {} AS source LIMIT 0").format(relation)
        connection.execute("SAVEPOINT before_description")
        described = connection.execute(statement).description or []
    except psycopg.errors.InsufficientPrivilege:  # perhaps only of columns that we do not need
        connection.execute("ROLLBACK TO SAVEPOINT before_description")
        statement = sql.SQL("SELECT {} FROM {} AS source LIMIT 0").format(columns_of(named), relation)
        described = connection.execute(statement).description or []
    oids = [column.type_code for column in described]
    names = connection.execute("SELECT array_agg(format_type(o, -1)) FROM unnest(%s::oid[]) o", [oids]).fetchone()
    return dict(zip([column.name for column in described], (names and names[0]) or [], strict=True))


def key_of(columns: Sequence[str]) -> sql.Composable:
    """The item key as an expression: NULL if any of its columns is."""
    parts = [column_of(column) for column in columns]
    if len(parts) == 1:
        return sql.SQL("{}::text").format(parts[0])
    return sql.SQL("CASE WHEN {} THEN json_build_array({})::text END").format(
        sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(part) for part in parts),
        sql.SQL(", ").join(sql.SQL("{}::text").format(part) for part in parts),
    )


def with_keys(columns: Sequence[str], item_keys: Sequence[str], types: Mapping[str, str]) -> sql.Composed:
    """Whether a row has one of these keys. types: of the columns."""
    values = list(zip(*map(split_key, item_keys), strict=True)) if len(columns) > 1 else [item_keys]
    arrays = _arrays(columns, values, types)
    if len(columns) == 1:  # the plain form uses an index if there is one
        return sql.SQL("{} = ANY ({})").format(column_of(columns[0]), arrays[0])
    return sql.SQL("({}) IN (SELECT * FROM unnest({}))").format(
        sql.SQL(", ").join(map(column_of, columns)), sql.SQL(", ").join(arrays)
    )


def item_keys_of(columns: Sequence[str], rows: Sequence[tuple[str, ...]], types: Mapping[str, str]) -> sql.Composed:
    """The statement that gives the item keys of rows whose key columns have these values. types: of the columns."""
    return sql.SQL(load_sql("source/item_keys")).format(
        key=key_of(columns),
        arrays=sql.SQL(", ").join(_arrays(columns, list(zip(*rows, strict=True)), types)),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
    )


def _arrays(columns: Sequence[str], values: Sequence[Sequence[str]], types: Mapping[str, str]) -> list[sql.Composed]:
    """For each key column the array of its values."""
    return [
        sql.SQL("CAST({} AS text[])::{}[]").format(sql.Literal(text_array(v)), sql.SQL(types[c]))
        for c, v in zip(columns, values, strict=True)
    ]


def order_of(source: SourceDefinition, types: Mapping[str, str]) -> dict[str, sql.Composable]:
    """The parts of statements that read in the order of updates."""
    assert source.updated_at is not None
    kind = types[source.updated_at]
    # What writers of a timestamp without time zone call now is at most 14 hours ahead of UTC.
    clock = "clock_timestamp()" if kind == TIMESTAMPS[0] else "(clock_timestamp() AT TIME ZONE 'UTC' + '14 hours')"
    return {
        "key": key_of(source.key),
        "updated_at": column_of(source.updated_at),
        "type": sql.SQL(kind),
        "clock": sql.SQL(clock),
        "relation": relation_of(source),
    }


def is_after(position: Position | None, order: Mapping[str, sql.Composable]) -> sql.Composable:
    """Whether a row comes after a position. order: the parts that `order_of` gives."""
    if position is None:
        return sql.SQL("true")
    at = sql.SQL("CAST({} AS {})").format(sql.Literal(position.updated_at), order["type"])
    if position.item_key is None:
        return sql.SQL("{updated_at} > {at}").format(**order, at=at)
    later = '{updated_at} >= {at} AND ({updated_at}, {key} COLLATE "C") > ({at}, {at_key})'
    return sql.SQL(later).format(**order, at=at, at_key=sql.Literal(position.item_key))


def hashed_columns(rendered: Sequence[str], payload: Sequence[str], types: Mapping[str, str]) -> sql.Composed:
    """What a row is hashed by. NaN is not a number: a column that a template renders is empty there."""
    columns: list[sql.Composable] = []
    for name in dict.fromkeys((*rendered, *payload)):
        function = _WITHOUT_NAN.get(types[name]) if name in rendered else None
        column = sql.SQL(function or "{}").format(column_of(name))
        columns.append(sql.SQL("{} AS {}").format(column, sql.Identifier(name)) if function else column)
    return sql.SQL(", ").join(columns)


def primary(error: psycopg.Error) -> str:
    said = error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0]
    told = f"{said} ({error.diag.message_hint})" if error.diag.message_hint else said
    return " ".join(told.split())


def text_array(values: Iterable[str]) -> str:
    """Texts as PostgreSQL writes an array of them; psycopg takes ten times as long for many."""
    escaped = [value.replace("\\", "\\\\").replace('"', '\\"') for value in values]
    return f"""{{{",".join(f'"{value}"' for value in escaped)}}}"""
