"""`load`: a CSV or Parquet file into a source table, a stand-in for the user's own database."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.templates import clean_json
from embeddings_pipeline.errors import SourceError, did_you_mean
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import table_identifier
from embeddings_pipeline.store.sql import load_sql

UPDATED_AT = "updated_at"
MOST_BLOCK_BYTES = 1 << 30
EXACT_DIGITS = 15  # that a double precision number keeps


def load_file(
    database: Database, path: Path, table: str, *, key: Sequence[str] = ("id",), replace: bool = False
) -> dict[str, int]:
    """Create `table` from the file, or upsert into it by its key. Rows that do not change are not written.

    A table made here gets a primary key, and a column `updated_at` that a trigger sets at each change. `replace`
    deletes the rows that are there first, in the same transaction. Returns rows, inserted and updated. SourceError
    for what is wrong in the file, or does not fit the table.
    """
    data = _read(path)
    for column in key:
        if column not in data.column_names:
            raise SourceError(
                f"{path}: there is no column {column!r} to be the key{did_you_mean(column, data.column_names)} "
                f"(columns: {', '.join(data.column_names)}); name one with --key"
            )
    parts = _parts(data.schema, table, key)

    def execute(name: str) -> psycopg.Cursor:
        return connection.execute(sql.SQL(load_sql(f"load/{name}")).format(**parts))

    try:
        with database.connect() as connection:
            # Two loads at once would both make the table.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('embeddings-pipeline load'))")
            existing = connection.execute("SELECT to_regclass(%s)", [parts["table"].as_string(None)]).fetchone()
            if existing == (None,):
                execute("table")
            elif replace:
                connection.execute(sql.SQL("DELETE FROM {}").format(parts["table"]))
            execute("stage")
            copy_in = sql.SQL("COPY load_row ({names}) FROM STDIN").format(**parts)
            with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
                for row in zip(*map(_values, data.columns), strict=True):
                    copy.write_row(row)
            if bad := execute("bad_key").fetchone():
                raise SourceError(
                    f"{path}: the key ({', '.join(key)}) must be there and identify a row, and "
                    f"({', '.join(map(str, bad))}) does not; correct the file, or name another key with --key"
                )
            inserted, updated = execute("upsert").fetchone() or (0, 0)
    except (psycopg.ProgrammingError, psycopg.DataError, psycopg.IntegrityError, psycopg.NotSupportedError) as error:
        said = error.diag.message_primary or str(error).strip().splitlines()[0]
        raise SourceError(
            f"{path}: it does not fit the table {table!r}: {said}; change the table or the file, or choose another "
            f"--table"
        ) from error
    except psycopg.Error as error:
        said = error.diag.message_primary or str(error).strip().splitlines()[0]
        raise SourceError(f"{path}: it could not be loaded into {table!r}: {said}; nothing was changed") from error
    return {"rows": data.num_rows, "inserted": inserted, "updated": updated}


def _parts(schema: pa.Schema, table: str, key: Sequence[str]) -> dict[str, sql.Composable]:
    """What the statements of sql/load/ have in their braces."""

    def listed(form: str, names: Sequence[str]) -> sql.Composed:
        template = sql.SQL(form)
        return sql.SQL(", ").join(template.format(sql.Identifier(name)) for name in names)

    names = schema.names
    others = [name for name in names if name != UPDATED_AT]
    columns = [
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(_type(schema.field(name).type))) for name in others
    ]
    loaded = [
        sql.SQL("coalesce({}, now())" if name == UPDATED_AT else "{}").format(sql.Identifier(name)) for name in names
    ]
    return {
        "table": table_identifier(table),
        "key": listed("{}", key),
        "columns": sql.SQL(", ").join(columns),
        "names": listed("{}", names),
        "loaded": sql.SQL(", ").join(loaded),
        "values": listed("excluded.{}", names),
        "old": listed("loaded.{}", others),
        "new": listed("excluded.{}", others),
    }


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        table = pq.read_table(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    except (pa.ArrowException, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise SourceError(f"{path}: not a CSV (UTF-8, with a header) or Parquet file: {said}") from error
    names = table.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise SourceError(f"{path}: two columns are called {twice[0]!r}; rename one")
    if "" in names:
        raise SourceError(f"{path}: column {names.index('') + 1} has no name; give it one in the header")
    return table


def _read_csv(path: Path) -> pa.Table:
    def read(types: dict[str, pa.DataType] | None = None) -> pa.Table:
        return pacsv.read_csv(
            path,
            # One block, so that a column's type is found from all its values and not from the first ones.
            read_options=pacsv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), MOST_BLOCK_BYTES)),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True, column_types=types
            ),
        )

    table = read()
    if raw := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
        raise pa.ArrowInvalid(f"column {raw[0]!r} is not UTF-8")
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    if len(set(table.column_names)) == table.num_columns and floats:
        # Numbers that a float would round (ids of 20 digits) stay as they are written.
        as_written = read(dict.fromkeys(floats, pa.string()))
        for name in floats:
            written = as_written[name]
            plain = pc.match_substring_regex(written, r"^\s*[-+]?[0-9.]+\s*$")
            digits = pc.utf8_length(pc.replace_substring_regex(written, r"^[-+0.\s]+|[^0-9]", ""))
            exact = pc.and_(plain, pc.greater(digits, 2 + EXACT_DIGITS))
            if pc.any(exact).as_py() and pc.all(plain).as_py():
                column = pc.cast(pc.utf8_trim_whitespace(written), pa.decimal256(76, _scale(written)))
                table = table.set_column(table.column_names.index(name), name, column)
    return table


def _scale(numbers: pa.ChunkedArray) -> int:
    fractions = pc.replace_substring_regex(numbers, r"^[^.]*\.?", "")
    return pc.max(pc.utf8_length(pc.utf8_trim_whitespace(fractions))).as_py() or 0


def _type(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_dictionary(kind):
        return _type(kind.value_type)
    if types.is_boolean(kind):
        return "boolean"
    if types.is_decimal(kind) or types.is_uint64(kind):
        return "numeric"
    if types.is_integer(kind):
        return "bigint"
    if types.is_floating(kind):
        return "double precision"
    if types.is_date(kind):
        return "date"
    if types.is_timestamp(kind):
        return "timestamptz"
    if types.is_time(kind):
        return "time"
    if types.is_duration(kind):
        return "interval"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "bytea"
    if _is_list(kind) and not types.is_nested(kind.value_type):
        return f"{_type(kind.value_type)}[]"
    return "jsonb" if types.is_nested(kind) else "text"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values as psycopg writes them. PostgreSQL has no NUL and no nanoseconds."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    values = column.to_pylist()
    if pa.types.is_map(kind):
        values = [None if value is None else dict(value) for value in values]
    convert: Callable[[Any], Any] = _without_nul
    if _type(kind) == "jsonb":
        convert = _json
    elif _is_list(kind):
        convert = _list_without_nul
    return [None if value is None else convert(value) for value in values]


def _without_nul(value: Any) -> Any:
    return value.replace("\x00", "\ufffd") if isinstance(value, str) else value


def _list_without_nul(values: list[Any]) -> list[Any]:
    return [_without_nul(value) for value in values]


def _json(value: Any) -> Jsonb:
    return Jsonb(value, dumps=lambda part: clean_json(json.dumps(part, default=str, ensure_ascii=False)))
