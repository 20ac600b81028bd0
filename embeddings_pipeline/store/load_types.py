"""Which types a new table's columns get, and whether a type alters what a file says."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from types import MappingProxyType
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.file_column import FileColumn
from embeddings_pipeline.store.sql import load_sql

EMPTY: Mapping[str, str] = MappingProxyType({})
MOST_SHOWN = 200  # characters of a value
NUMBERS = ("smallint", "integer", "bigint", "numeric", "real", "double precision")

# Characters of a number that these types keep for sure; of longer ones PostgreSQL is asked.
_DIGITS = {"smallint": 5, "integer": 10, "bigint": 19, "numeric": 1000, "real": 6, "double precision": 15}
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_EXACT_NUMBER = re.compile(r"(?!-0$)-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
# What a value must look like before PostgreSQL is asked for its text as these types, in this order. The patterns leave
# out what has another text of the same value (1.0, -0, 1e5, NaN), and clock times, which may as well be ratios.
_SHAPES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"true|false"), ("boolean",)),
    (_EXACT_NUMBER, ("bigint", "double precision", "numeric")),
    (re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"), ("date",)),
    (
        re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]*[1-9])?(\+00)?"),
        ("timestamp without time zone", "timestamp with time zone"),
    ),
)


class Altered(NamedTuple):
    """Values that a column's type changes: how many, and the first of them."""

    rows: int
    first: int  # from 1, without the header
    written: str
    stored: str


def new_types(
    connection: psycopg.Connection, columns: Sequence[FileColumn], chosen: Mapping[str, str]
) -> dict[str, str]:
    """Column → type of PostgreSQL: the one that was chosen, else the file's own, else what the values are.

    A column of text is a boolean, number, date or timestamp only if each value, as PostgreSQL reads and renders it, is
    the text of the file; a column without a value is text.
    """
    types = {column.name: chosen.get(column.name) or column.type or "text" for column in columns}
    open_columns = [column for column in columns if column.name not in chosen and column.type is None]
    shapes = [(column, shape) for column in open_columns if (shape := _shape(column))]
    if not shapes:
        return types
    names = [sql.Identifier(column.name) for column, _ in shapes]
    definitions = sql.SQL(", ").join(sql.SQL("{} text").format(name) for name in names)
    connection.execute(sql.SQL(load_sql("load/stage_text")).format(columns=definitions))
    copy_in = sql.SQL("COPY load_text ({}) FROM STDIN").format(sql.SQL(", ").join(names))
    with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
        for row in zip(*(column.texts("text") for column, _ in shapes), strict=True):
            copy.write_row(row)
    for column, shape in shapes:
        types[column.name] = next((kind for kind in shape if _rendered(connection, column.name, kind)), "text")
    connection.execute(load_sql("load/unstage_text"))  # the table to be made may have the same name
    return types


def _shape(column: FileColumn) -> tuple[str, ...]:
    """The types that all values of a column may be; none if it has no values."""
    values = [value for value in column.texts("text") if value is not None]
    for pattern, types in _SHAPES:
        if values and all(map(pattern.fullmatch, values)):
            return types
    return ()


def kept_texts(columns: Sequence[FileColumn], types: Mapping[str, str]) -> list[str]:
    """Which columns of numbers are text, and since which value, for people."""
    notes = []
    for column in columns:
        values = column.texts("text") if column.type is None and types[column.name] == "text" else []
        if any(values) and all(value is None or _NUMBER.fullmatch(value) for value in values):
            odd = (row for row, value in enumerate(values, 1) if value and not _EXACT_NUMBER.fullmatch(value))
            row = next(odd, 1)
            notes.append(
                f"column {column.name!r} is text, since row {row} says {shown(values[row - 1] or '')}; "
                f"drop the table and load it with --type {column.name}=numeric for numbers"
            )
    return notes


def shown(text: str) -> str:
    """A value of a file in one line."""
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…")


def printable(name: str) -> str:
    """A name of a file's column as it is, or quoted if it would break a line or write to the terminal."""
    return name if name.isprintable() else repr(name)


def _rendered(connection: psycopg.Connection, name: str, kind: str) -> bool:
    statement = sql.SQL(load_sql("load/rendered")).format(column=sql.Identifier(name), type=sql.SQL(kind))
    try:
        with connection.transaction():
            return connection.execute(statement).fetchone() == (True,)
    except psycopg.DataError:
        return False


def check_type(connection: psycopg.Connection, name: str, kind: str) -> str:
    """How PostgreSQL calls the type that `--type name=kind` chooses. SourceError if it has none of that name."""
    remedy = "--type COLUMN=TYPE takes a type of PostgreSQL, such as text, bigint, numeric, date or timestamptz"
    if not re.fullmatch(r'[\w\s.,()\[\]"]+', kind):
        raise SourceError(f"there is no type {kind!r} for the column {name!r}; {remedy}")
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(sql.SQL(load_sql("load/stage_type")).format(type=sql.SQL(kind)))
            row = connection.execute(load_sql("load/type")).fetchone()
    except (psycopg.ProgrammingError, psycopg.NotSupportedError, psycopg.DataError) as error:
        raise SourceError(f"there is no type {kind!r} for the column {name!r}; {remedy}") from error
    return str(row[0]) if row else kind


def surely_kept(kind: str, written: Sequence[str | None]) -> bool:
    """Whether a column of that type must have these texts as numbers, so that nobody need ask."""
    most = _DIGITS.get(kind)
    return most is not None and all(
        value is None or (len(value) <= most and _EXACT_NUMBER.fullmatch(value)) for value in written
    )


def altered(kind: str, written: Sequence[str | None], stored: Sequence[str | None]) -> Altered | None:
    """What became another number or time, as far as a type of numbers or times can do that; None if nothing did."""
    same = _SAME.get(kind)
    if same is None:
        return None
    differ = [
        (row, before, after)
        for row, (before, after) in enumerate(zip(written, stored, strict=True), 1)
        if before != after and not (before and after and same(before, after))
    ]
    if not differ:
        return None
    row, before, after = differ[0]
    return Altered(len(differ), row, before or "", after or "")


def _never(_before: str, _after: str) -> bool:
    return False


def _parsed(parse: Callable[[str], Any]) -> Callable[[str, str], bool]:
    """Whether two texts are the same time. An offset that a type without time zone has dropped makes another one."""

    def same(before: str, after: str) -> bool:
        try:
            return not _NANOSECONDS.search(before) and bool(parse(before) == parse(after))
        except ValueError:
            return False

    return same


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # as the session reads it


_NANOSECONDS = re.compile(r"\.[0-9]{6}[0-9]*[1-9]")  # which PostgreSQL does not have, and Python cuts
_SAME: dict[str, Callable[[str, str], bool]] = {
    **dict.fromkeys(NUMBERS, _never),
    "date": _parsed(date.fromisoformat),
    "time without time zone": _parsed(time.fromisoformat),
    "timestamp without time zone": _parsed(datetime.fromisoformat),
    "timestamp with time zone": _parsed(_instant),
}
COMPARED = frozenset(_SAME)
"""The types that may alter what they take, without an error."""
