"""`load`: a CSV or Parquet file into a source table, a stand-in for the user's own database."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.source import table_identifier
from embeddings_pipeline.store.postgres import Database, load_sql


def load_file(
    database: Database, path: Path, table: str, *, key: Sequence[str] = ("id",), replace: bool = False
) -> dict[str, int]:
    """Create `table` from the file, or upsert into it by its key. Rows that do not change are not written.

    The table gets a primary key and a column `updated_at` that a trigger sets at each change. `replace` empties the
    table first, in the same transaction. Returns rows, inserted and updated. SourceError for what is wrong in the file.
    """
    data = _read(path)
    if missing := [column for column in key if column not in data.column_names]:
        raise SourceError(
            f"{path}: there is no column {missing[0]!r} to be the key (columns: {', '.join(data.column_names)}); "
            f"name one with --key"
        )
    names = data.column_names
    parts = {
        "table": table_identifier(table),
        "key": sql.SQL(", ").join(map(sql.Identifier, key)),
        "columns": sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(n), sql.SQL(_type(data.schema.field(n).type)))  # type: ignore[arg-type]
            for n in names
            if n != "updated_at"
        ),
        "names": sql.SQL(", ").join(map(sql.Identifier, names)),
        "values": sql.SQL(", ").join(sql.SQL("excluded.{}").format(sql.Identifier(n)) for n in names),
        "old": sql.SQL(", ").join(sql.SQL("loaded.{}").format(sql.Identifier(n)) for n in names if n != "updated_at"),
        "new": sql.SQL(", ").join(sql.SQL("excluded.{}").format(sql.Identifier(n)) for n in names if n != "updated_at"),
    }
    try:
        with database.connect() as connection:
            connection.execute(sql.SQL(load_sql("load/table")).format(**parts))  # type: ignore[arg-type]
            if replace:
                connection.execute(sql.SQL("DELETE FROM {}").format(parts["table"]))
            connection.execute(sql.SQL(load_sql("load/stage")).format(**parts))  # type: ignore[arg-type]
            copy_statement = sql.SQL("COPY load_row ({names}) FROM STDIN").format(**parts)
            with connection.cursor() as cursor, cursor.copy(copy_statement) as copy:
                for row in zip(*(data[name].to_pylist() for name in names), strict=True):
                    copy.write_row([_value(value) for value in row])
            found = connection.execute(sql.SQL(load_sql("load/upsert")).format(**parts)).fetchone()  # type: ignore[arg-type]
    except (psycopg.errors.CardinalityViolation, psycopg.errors.NotNullViolation) as error:
        raise SourceError(
            f"{path}: the key ({', '.join(key)}) must be there and identify a row: {error.diag.message_primary}; "
            f"correct the file, or name another key with --key"
        ) from error
    except (psycopg.errors.ProgrammingError, psycopg.errors.DataError) as error:
        raise SourceError(
            f"{path}: it does not fit the table {table!r}: {error.diag.message_primary}; choose another --table"
        ) from error
    inserted, updated = found or (0, 0)
    return {"rows": data.num_rows, "inserted": inserted, "updated": updated}


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pq.read_table(path)
        # One block, so that a column's type is found from all its values and not from the first ones.
        block = pacsv.ReadOptions(block_size=max(path.stat().st_size, 1 << 20))
        empty_is_null = pacsv.ConvertOptions(
            null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
        )
        table = pacsv.read_csv(
            path,
            read_options=block,
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=empty_is_null,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a CSV (UTF-8, with a header) or Parquet file: {_first_line(error)}") from error
    if len(set(table.column_names)) != len(table.column_names):
        raise SourceError(f"{path}: two columns have the same name; rename one")
    return table


def _type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "bigint"
    if pa.types.is_decimal(kind):
        return "numeric"
    if pa.types.is_floating(kind):
        return "double precision"
    if pa.types.is_date(kind):
        return "date"
    if pa.types.is_timestamp(kind):
        return "timestamptz"
    if pa.types.is_binary(kind):
        return "bytea"
    if pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type):
        return f"{_type(kind.value_type)}[]"
    return "jsonb" if pa.types.is_nested(kind) else "text"


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")  # PostgreSQL has no NUL
    return Jsonb(value) if isinstance(value, dict) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
