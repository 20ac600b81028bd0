"""`load`: a CSV or Parquet file into a source table, a stand-in for the user's own database."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import RefusedError, SourceError, did_you_mean
from embeddings_pipeline.progress import Progress, silent
from embeddings_pipeline.store.csv_file import read_csv
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.file_column import FileColumn
from embeddings_pipeline.store.load_types import (
    COMPARED,
    EMPTY,
    MOST_SHOWN,
    altered,
    check_type,
    kept_texts,
    new_types,
    printable,
    shown,
    surely_kept,
)
from embeddings_pipeline.store.parquet_file import read_parquet
from embeddings_pipeline.store.source_sql import table_identifier
from embeddings_pipeline.store.sql import load_sql

UPDATED_AT = "updated_at"
MOST_NAME_BYTES = 63  # PostgreSQL cuts what is longer, and two names become one
ROWS_COUNTED = 1000  # between two words on the progress
MOST_FILES = 20  # that a table's comment names
PARQUET = b"PAR1"  # how such a file begins
_FILES = "Loaded by embeddings-pipeline from "


@dataclass(frozen=True)
class Loaded:
    """What a load did: rows of the file, of the table; the types of the file's columns; what else is to be told."""

    table: str
    created: bool
    rows: int
    inserted: int
    updated: int
    deleted: int
    types: dict[str, str]
    notes: list[str]


def load_file(
    database: Database,
    path: Path,
    table: str | None = None,
    *,
    key: Sequence[str] = ("id",),
    replace: bool = False,
    types: Mapping[str, str] = EMPTY,
    progress: Progress = silent,
) -> Loaded:
    """Create `table` from the file, or upsert into it by its key. Rows that do not change are not written.

    Without a name, the table is called after the file, and must be one that `load` has made. A table that is there
    decides the types; for a new one, `types` (column → type of PostgreSQL) does, and where that is silent, the values:
    see `new_types`. A new table gets a primary key, and a column `updated_at` that a trigger sets at each change.
    `replace` deletes the rows that are there first. All is one transaction. SourceError for what is wrong in the file,
    or does not fit the table; RefusedError for a table that nobody named.
    """
    progress("reading", 0, 0)
    columns = _read(path, key)
    for name in types:
        if name not in {column.name for column in columns}:
            names = [column.name for column in columns]
            raise SourceError(f"{path}: --type names a column {name!r} that is not there{did_you_mean(name, names)}")
    named = table is not None
    table = _called_after(path) if table is None else table
    try:
        with database.connect() as connection:
            return _Load(connection, path, table, tuple(key), columns, progress).run(
                types, named=named, replace=replace
            )
    except (psycopg.ProgrammingError, psycopg.DataError, psycopg.IntegrityError, psycopg.NotSupportedError) as error:
        where = _place(error, columns)
        remedy = "change the table or the file, or choose another --table"
        raise SourceError(f"{path}: {where}it does not fit the table {table!r}: {_said(error)}; {remedy}") from error
    except psycopg.Error as error:
        raise SourceError(
            f"{path}: it could not be loaded into {table!r}: {_said(error)}; nothing was changed"
        ) from error


@dataclass
class _Load:
    """One file on its way into one table, in one transaction."""

    connection: psycopg.Connection
    path: Path
    table: str
    key: tuple[str, ...]
    columns: list[FileColumn]
    progress: Progress

    @cached_property
    def parts(self) -> dict[str, sql.Composable]:
        """What the statements of sql/load.sql have in their braces."""
        names = [column.name for column in self.columns]
        row = "row"
        while row in names:
            row += "_"
        return {
            "table": table_identifier(self.table),
            "row": sql.Identifier(row),
            "names": _listed("{}", names),
            "key": _listed("{}", self.key),
        }

    def run(self, chosen: Mapping[str, str], *, named: bool, replace: bool) -> Loaded:
        # Two loads at once would both make the table.
        self.connection.execute("SELECT pg_advisory_xact_lock(hashtext('embeddings-pipeline load'))")
        chosen = {name: check_type(self.connection, name, kind) for name, kind in chosen.items()}
        created = not self._states()
        decided = self._create(chosen) if created else []
        [state] = self._states()
        if not self.parts["table"].as_string(None).endswith(sql.Identifier(state.name).as_string(None)):
            raise SourceError(f"{self.path}: the table's name is longer than {MOST_NAME_BYTES} bytes; choose --table")
        if not (state.made or named):
            raise RefusedError(
                f"{self.path}: there is a table {self.table!r} that load has not made; name it with --table to write "
                "into it, or name another"
            )
        self.parts["table"] = state.identifier
        types = self._types({} if created else chosen)
        texts, notes = self._texts(types)
        notes += decided
        self._stage(texts)
        # What a CSV decided for a new column is its text already; a Parquet file's nanoseconds are not.
        asked = [c for c in self.columns if not created or c.name in chosen or (c.type or "").startswith("time")]
        compared = [column.name for column in asked if types[column.name][1] in COMPARED]
        notes += self._alterations(compared, texts, types, key=() if created else self.key)
        self._check_key()
        deleted = self._execute("delete").rowcount if replace and not created else 0
        inserted, updated = self._upsert(types)
        notes += self._others(state.files, updated, deleted)
        if state.made and state.ours:
            self._note_file([] if replace else state.files)
        in_file = {name: types[name][0] for name in texts}
        return Loaded(self.table, created, len(texts[self.key[0]]), inserted, updated, deleted, in_file, notes)

    def _execute(self, name: str, **parts: sql.Composable) -> psycopg.Cursor:
        return self.connection.execute(sql.SQL(load_sql(f"load/{name}")).format(**self.parts, **parts))

    def _states(self) -> "list[_State]":
        """The table if it is there."""
        parameters = {"table": self.parts["table"].as_string(None)}
        return [_State.of(*row) for row in self.connection.execute(load_sql("load/state"), parameters)]

    def _create(self, chosen: Mapping[str, str]) -> list[str]:
        columns = [column for column in self.columns if column.name != UPDATED_AT]
        if UPDATED_AT in chosen:
            raise SourceError(f"{self.path}: the type of {UPDATED_AT} is timestamptz: load keeps it")
        types = new_types(self.connection, columns, chosen)
        definitions = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in types.items()]
        self._execute("table", columns=sql.SQL(", ").join(definitions))
        return kept_texts([column for column in columns if column.name not in chosen], types)

    def _types(self, chosen: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """The table's columns: the type, and what it is without length and domain."""
        parameters = {"table": self.parts["table"].as_string(None)}
        rows = self.connection.execute(load_sql("load/columns"), parameters).fetchall()
        types = {name: (full, plain) for name, full, plain in rows}
        for column in self.columns:
            if column.name not in types:
                raise SourceError(
                    f"{self.path}: it does not fit the table {self.table!r}: the table has no column {column.name!r}"
                    f"{did_you_mean(column.name, types)}; change the table or the file, or choose another --table"
                )
        for name, kind in chosen.items():
            if kind != types[name][0]:
                raise SourceError(
                    f"{self.path}: the column {name!r} of the table {self.table!r} is {types[name][0]}, and no file "
                    f"changes that; leave out --type {name}, or drop the table first"
                )
        return types

    def _texts(self, types: Mapping[str, tuple[str, str]]) -> tuple[dict[str, list[str | None]], list[str]]:
        texts, notes = {}, []
        for column in self.columns:
            values = column.texts(types[column.name][1])
            if rows := [row for row, value in enumerate(values, 1) if value and "\0" in value]:
                values = [value and value.replace("\0", "\ufffd") for value in values]
                notes.append(f"column {column.name!r}, row {rows[0]}: PostgreSQL has no NUL; it became U+FFFD")
            texts[column.name] = values
        return texts, notes

    def _stage(self, texts: Mapping[str, list[str | None]]) -> None:
        self._execute("stage")
        total = len(texts[self.key[0]])
        self.progress("loading", 0, total)
        copy_in = sql.SQL("COPY load_row ({row}, {names}) FROM STDIN").format(**self.parts)
        with self.connection.cursor() as cursor, cursor.copy(copy_in) as copy:
            for number, row in enumerate(zip(*texts.values(), strict=True), 1):
                copy.write_row((number, *row))
                if number % ROWS_COUNTED == 0:
                    self.progress("loading", number, total)
        self.progress("writing", total, total)

    def _alterations(
        self,
        names: Sequence[str],
        texts: Mapping[str, list[str | None]],
        types: Mapping[str, tuple[str, str]],
        *,
        key: Sequence[str],
    ) -> list[str]:
        """What the types of columns change. SourceError for a column of the key: two keys must not become one."""
        notes = []
        for name in names:
            if surely_kept(types[name][0], texts[name]):
                continue
            stored = [value for (value,) in self._execute("rows", column=sql.Identifier(name)).fetchall()]
            change = altered(types[name][1], texts[name], stored)
            if change is None:
                continue
            written, kind = shown(change.written), types[name][0]
            if name in key:
                raise SourceError(
                    f"{self.path}: row {change.first}, column {name!r}: {written} is no key of type {kind}, "
                    f"which would make it {change.stored}; correct the file, or change the column to text"
                )
            more = f"; in {change.rows:,} rows in all" if change.rows > 1 else ""
            notes.append(f"column {name!r}, row {change.first}: {written} is {change.stored} as {kind}{more}")
        return notes

    def _check_key(self) -> None:
        if bad := self._execute("bad_key").fetchone():
            row, *values = bad
            names, key = (", ".join(printable(str(part)) for part in parts) for parts in (self.key, values))
            raise SourceError(
                f"{self.path}: row {row}: the key ({names}) must be there and identify a row, and ({key}) does not; "
                "correct the file, or name another key with --key"
            )

    def _upsert(self, types: Mapping[str, tuple[str, str]]) -> tuple[int, int]:
        names = [column.name for column in self.columns]
        others = [name for name in names if name != UPDATED_AT]
        dated = types.get(UPDATED_AT, ("", ""))[1].startswith("timestamp")
        loaded = [
            sql.SQL("coalesce({}, now())" if name == UPDATED_AT and dated else "{}").format(sql.Identifier(name))
            for name in names
        ]
        parts = {
            "loaded": sql.SQL(", ").join(loaded),
            "values": _listed("excluded.{}", names),
            "old": _listed("loaded.{}", others),
            "new": _listed("excluded.{}", others),
        }
        return self._execute("upsert", **parts).fetchone() or (0, 0)

    def _others(self, files: Sequence[str], updated: int, deleted: int) -> list[str]:
        others = [file for file in files if file != self._file]
        if not others or not (updated or deleted):
            return []
        change = f"{deleted:,} of its rows were deleted" if deleted else f"{updated:,} of its rows were updated"
        return [f"{change}, and it was loaded from {', '.join(others)}"]

    @property
    def _file(self) -> str:
        return str(self.path.resolve()).encode("utf-8", "replace").decode()

    def _note_file(self, files: Sequence[str]) -> None:
        kept = [file for file in files if file != self._file][1 - MOST_FILES :]
        comment = _FILES + json.dumps([*kept, self._file], ensure_ascii=False)
        self._execute("note_files", files=sql.Literal(comment))


@dataclass(frozen=True)
class _State:
    """A table that is there."""

    name: str
    identifier: sql.Identifier  # with its schema: a temporary table may have the same name
    made: bool  # by `load`
    ours: bool
    files: list[str]

    @classmethod
    def of(cls, schema: str, name: str, made: bool, ours: bool, comment: str | None) -> "_State":
        files = comment.removeprefix(_FILES) if comment and comment.startswith(_FILES + "[") else "[]"
        return cls(name, sql.Identifier(schema, name), made, ours, json.loads(files))


def _read(path: Path, key: Sequence[str]) -> list[FileColumn]:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(PARQUET)) == PARQUET or path.suffix.lower() in (".parquet", ".pq")
        columns = read_parquet(path) if is_parquet else read_csv(path, key)
    except OSError as error:
        raise SourceError(f"{path}: it cannot be read: {error.strerror or error}") from error
    names = [column.name for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SourceError(f"{path}: two columns are called {twice[0]!r}; rename one")
    if "" in names:
        raise SourceError(f"{path}: column {names.index('') + 1} has no name; give it one in the header")
    for name in names:
        _check_name(path, name)
    for column in key:
        if column not in names:
            raise SourceError(
                f"{path}: there is no column {column!r} to be the key{did_you_mean(column, names)} "
                f"(columns: {', '.join(map(printable, names))}); name one with --key"
            )
    return columns


def _check_name(path: Path, name: str) -> None:
    if "\0" in name or len(name.encode("utf-8", "replace")) > MOST_NAME_BYTES:
        raise SourceError(
            f"{path}: {shown(name)} cannot be the name of a column: {MOST_NAME_BYTES} bytes are the most, without NUL"
        )


def _called_after(path: Path) -> str:
    """The table for a file whose name is all that is known."""
    name = path.stem
    if not name.isprintable():
        raise SourceError(f"{path}: its name is none for a table; name one with --table")
    return '"' + name.replace('"', '""') + '"' if re.search(r'["."]', name) else name


def _listed(form: str, names: Sequence[str]) -> sql.Composed:
    template = sql.SQL(form)
    return sql.SQL(", ").join(template.format(sql.Identifier(name)) for name in names)


def _said(error: psycopg.Error) -> str:
    """What PostgreSQL says, in one line; of a constraint, also the row that does not meet it."""
    said = error.diag.message_primary or str(error).strip().splitlines()[0]
    if isinstance(error, psycopg.IntegrityError):
        said = f"{said}: {error.diag.message_detail or ''}"
    said = " ".join(said.split()).rstrip(".")
    return said if len(said) <= 2 * MOST_SHOWN else f"{said[: 2 * MOST_SHOWN]}…"


def _place(error: psycopg.Error, columns: Sequence[FileColumn]) -> str:
    """Where in the file: PostgreSQL's context of a COPY, in any language, has the line and the column."""
    match = re.search(r"(?m:^)COPY load_row, \w+ (\d+)(?:, \w+ (.*))?", error.diag.context or "", re.DOTALL)
    if match:
        rest = match[2] or ""
        names = [column.name for column in columns if rest.startswith(f"{column.name}:") or rest == column.name]
        return f"row {match[1]}, " + (f"column {max(names, key=len)!r}: " if names else "")
    for column in columns:
        if isinstance(error, psycopg.errors.NotNullViolation) and column.name == error.diag.column_name:
            values = column.texts("text")
            return f"row {values.index(None) + 1}, column {column.name!r}: " if None in values else ""
    return ""
