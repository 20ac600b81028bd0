"""The user's table, query and columns as parts of statements, and what PostgreSQL says of them."""

import re
from collections.abc import Iterable

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import SourceDefinition
from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.sql import load_sql


def table_identifier(name: str) -> sql.Identifier:
    """`movies`, `schema.movies` or `"odd.name"` as an identifier; the case is kept. SourceError for another shape."""
    part = r'(?:"(?:[^"]|"")+"|[^".]+)'
    if not re.fullmatch(rf"{part}(\.{part})?", name) or "\0" in name:
        raise SourceError(f'{name!r} is not the name of a table: write `movies`, `schema.movies` or `"odd.name"`')
    parts = re.findall(r'"((?:[^"]|"")+)"|([^".]+)', name)
    return sql.Identifier(*(quoted.replace('""', '"') or plain for quoted, plain in parts))


def relation_of(source: SourceDefinition) -> sql.Composable:
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


def primary(error: psycopg.Error) -> str:
    said = error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0]
    told = f"{said} ({error.diag.message_hint})" if error.diag.message_hint else said
    return " ".join(told.split())


def text_array(values: Iterable[str]) -> str:
    """Texts as PostgreSQL writes an array of them; psycopg takes ten times as long for many."""
    escaped = [value.replace("\\", "\\\\").replace('"', '\\"') for value in values]
    return f"""{{{",".join(f'"{value}"' for value in escaped)}}}"""
