"""A Parquet file as columns of text, each value as PostgreSQL reads it: far dates, NaN and bytes too."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.file_column import FileColumn

types = pa.types
SECONDS_A_DAY = 86_400
DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def read_parquet(path: Path) -> list[FileColumn]:
    """The columns of the file. SourceError if it is not one, or says what is no text."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise SourceError(f"{path}: not a CSV (UTF-8, with a header) or Parquet file: {said}") from error
    return [
        FileColumn(field.name, postgres_type(field.type), partial(_texts, path, field, column))
        for field, column in zip(table.schema, table.columns, strict=True)
    ]


def postgres_type(kind: pa.DataType) -> str:
    """The type of PostgreSQL for a type of Arrow."""
    if isinstance(kind, pa.BaseExtensionType):
        known = {"arrow.uuid": "uuid", "arrow.json": "jsonb"}
        return known.get(kind.extension_name) or postgres_type(kind.storage_type)
    if types.is_dictionary(kind):
        return postgres_type(kind.value_type)
    if _is_list(kind) and not types.is_nested(kind.value_type):
        return f"{postgres_type(kind.value_type)}[]"
    if types.is_timestamp(kind):
        return "timestamp with time zone" if kind.tz else "timestamp without time zone"
    return next((name for fits, name in _TYPES if fits(kind)), "text")


def _is_list(kind: pa.DataType) -> bool:
    return any(
        fits(kind)
        for fits in (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    )  # fmt: skip


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        fits(kind)
        for fits in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    )  # fmt: skip


_TYPES: list[tuple[Callable[[pa.DataType], bool], str]] = [
    (types.is_boolean, "boolean"),
    (types.is_decimal, "numeric"),
    (types.is_uint64, "numeric"),
    (types.is_integer, "bigint"),
    (types.is_float64, "double precision"),
    (types.is_floating, "real"),
    (types.is_date, "date"),
    (types.is_time, "time without time zone"),
    (types.is_duration, "interval"),
    (_is_binary, "bytea"),
    (types.is_nested, "jsonb"),
]


def _texts(path: Path, field: pa.Field, column: pa.ChunkedArray, target: str) -> list[str | None]:
    kind = field.type
    integers = _integers(kind)
    try:
        values = (column if integers == kind else column.cast(integers)).to_pylist()
    except pa.ArrowException as error:
        said = " ".join(str(error).split())
        raise SourceError(f"{path}: column {field.name!r} of type {kind} cannot be loaded: {said}") from error
    except UnicodeDecodeError as error:
        row = next(number for number in range(len(column)) if not _is_text(column[number])) + 1
        raise SourceError(f"{path}: row {row}, column {field.name!r}: bytes that are no UTF-8 text") from error
    text = partial(_text, kind=kind, array=target.endswith("[]"))
    return [None if value is None else text(value) for value in values]


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _integers(kind: pa.DataType) -> pa.DataType:
    """The type with times as the integers they are kept as: Python's and pandas's times end too early."""
    if isinstance(kind, pa.BaseExtensionType):
        return _integers(kind.storage_type)
    if types.is_dictionary(kind):
        return _integers(kind.value_type)
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.int64()
    if types.is_struct(kind):
        return pa.struct([pa.field(part.name, _integers(part.type)) for part in kind])
    if types.is_map(kind):
        return pa.map_(_integers(kind.key_type), _integers(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_integers(kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_integers(kind.value_type))
    return pa.list_(_integers(kind.value_type)) if _is_list(kind) else kind


def _text(value: Any, kind: pa.DataType, *, array: bool) -> str:
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return str(UUID(bytes=value))
        return _text(value, kind.storage_type, array=array)
    if types.is_dictionary(kind):
        return _text(value, kind.value_type, array=array)
    if types.is_nested(kind):
        return _array(value, kind) if array and _is_list(kind) else _json(value, kind)
    return _scalar(value, kind)


def _scalar(value: Any, kind: pa.DataType) -> str:
    if types.is_boolean(kind):
        return "true" if value else "false"
    if types.is_floating(kind):
        return _float(value, kind).removesuffix(".0")
    if types.is_decimal(kind):
        return format(value, "f")
    if types.is_date32(kind):
        return _moment(value * SECONDS_A_DAY, "s", clock=False)
    if types.is_date64(kind):
        return _moment(value, "ms", clock=False)
    if types.is_timestamp(kind):
        return _moment(value, kind.unit, zone="+00" if kind.tz else "")
    if types.is_time(kind):
        return _clock(value, kind.unit)
    if types.is_duration(kind):
        days, rest = divmod(value, SECONDS_A_DAY * 10 ** DIGITS[kind.unit])
        return f"{days} days {_clock(rest, kind.unit)}"
    if _is_binary(kind):
        return "\\x" + value.hex()
    return str(value)


def _float(value: float, kind: pa.DataType) -> str:
    """The shortest text that is this number, in the precision of the file."""
    return repr(value) if types.is_float64(kind) else str(np.float32(value))


def _moment(value: int, unit: str, *, clock: bool = True, zone: str = "") -> str:
    """A time since 1970 as PostgreSQL writes it; it says `BC` where ISO counts from the year 0 back."""
    days, rest = divmod(value, SECONDS_A_DAY * 10 ** DIGITS[unit])
    year, month, day = str(np.datetime64(days, "D")).rsplit("-", 2)
    before = int(year) <= 0
    date = f"{1 - int(year) if before else int(year):04}-{month}-{day}"
    return date + (f" {_clock(rest, unit)}{zone}" if clock else "") + (" BC" if before else "")


def _clock(value: int, unit: str) -> str:
    seconds, fraction = divmod(value, 10 ** DIGITS[unit])
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{fraction:0{DIGITS[unit]}}".rstrip("0") if fraction else text


def _array(values: list[Any], kind: pa.DataType) -> str:
    return "{" + ",".join(_element(value, kind.value_type) for value in values) + "}"


def _element(value: Any, kind: pa.DataType) -> str:
    if value is None:
        return "NULL"
    text = _text(value, kind, array=True)
    return text if _is_list(kind) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _json(value: Any, kind: pa.DataType) -> str:
    """JSON, which has no NaN and no infinity (null), and no bytes (hex, as PostgreSQL writes them)."""
    if value is None:
        return "null"
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name != "arrow.uuid":
        return _json(value, kind.storage_type)
    if types.is_dictionary(kind):
        return _json(value, kind.value_type)
    if _is_list(kind):
        return "[" + ", ".join(_json(part, kind.value_type) for part in value) + "]"
    if types.is_struct(kind):
        return _object([(part.name, _json(value[part.name], part.type)) for part in kind])
    if types.is_map(kind):
        pairs = [(_text(name, kind.key_type, array=False), _json(part, kind.item_type)) for name, part in value]
        if len({name for name, _ in pairs}) < len(pairs):  # an object would keep the last one only
            return "[" + ", ".join(f"[{_string(name)}, {part}]" for name, part in pairs) + "]"
        return _object(pairs)
    if types.is_floating(kind):
        return _float(value, kind) if np.isfinite(value) else "null"
    if types.is_boolean(kind) or types.is_integer(kind):
        return _scalar(value, kind)
    text = _text(value, kind, array=False)
    return _string(text.replace("+00", "+00:00") if types.is_timestamp(kind) else text)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{_string(name)}: {part}" for name, part in pairs) + "}"


def _string(text: str) -> str:
    return json.dumps(text.replace("\x00", "\ufffd"), ensure_ascii=False)
