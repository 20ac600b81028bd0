"""Vectors to and from PostgreSQL in COPY's binary form, packed and parsed as NumPy structured arrays.

The form (PostgreSQL's manual, "COPY", "Binary Format"): an 11-byte signature, two int32 (flags, length of the
extension), then for each row an int16 with the number of fields and for each field an int32 length and its bytes; an
int16 of -1 ends it. A `vector` is int16 dimension, int16 zero and big-endian float32s; a `halfvec` has float16s.
Rows are of one width here, as every field is.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8
TRAILER = b"\xff\xff"
BLOCK_BYTES = 2 << 20  # what is packed or parsed at a time, so that memory holds the arrays and little else

Storage = Literal["halfvec", "vector"]
ELEMENT: dict[Storage, str] = {"halfvec": ">f2", "vector": ">f4"}


def copy_in(
    connection: psycopg.Connection,
    table: sql.Identifier,
    columns: Mapping[str, NDArray],
    *,
    storage: Storage,
) -> int:
    """COPY arrays of one length into `table`: int64 → bigint, bool → boolean, (n, 16) uint8 → bytea, `S…` → text,
    and float (n, d) → halfvec or vector as `storage` says. All texts of a column must have one length.

    Returns the number of rows. Like pgvector's own input, the server refuses NaN and infinity with psycopg.DataError;
    what is too large for a float16 is infinite in a halfvec. ValueError if the arrays differ in length.
    """
    rows = len(next(iter(columns.values())))
    if any(len(array) != rows for array in columns.values()):
        raise ValueError(f"columns of different lengths: { {name: len(array) for name, array in columns.items()} }")
    row_type = _row_type({name: _field(array, storage) for name, array in columns.items()})
    query = copy_statement(table, columns)
    rows_a_block = max(1, BLOCK_BYTES // row_type.itemsize)
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        copy.write(SIGNATURE)
        for start in range(0, rows, rows_a_block):
            block = {name: array[start : start + rows_a_block] for name, array in columns.items()}
            copy.write(_pack(block, row_type).tobytes())
        copy.write(TRAILER)
    return rows


def copy_statement(table: sql.Identifier, columns: Iterable[str]) -> sql.Composed:
    """The COPY that `copy_in` runs."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, names)


def _pack(columns: Mapping[str, NDArray], row_type: np.dtype) -> NDArray[np.void]:
    packed = np.zeros(len(next(iter(columns.values()))), row_type)
    packed["fields"] = len(columns)
    for name, array in columns.items():
        packed[f"{name}_length"] = row_type[name].itemsize
        if array.dtype.kind == "f":
            packed[name]["dimension"] = array.shape[1]
            with np.errstate(over="ignore"):  # infinite in float16: the server says so better
                packed[name]["elements"] = array
        elif array.ndim == 2:
            packed[name] = np.ascontiguousarray(array).view(f"V{array.shape[1]}").reshape(len(array))
        else:
            packed[name] = array
    return packed


def copy_out(
    connection: psycopg.Connection,
    query: sql.Composable,
    columns: Mapping[str, Literal["bigint", "bytea16", "halfvec", "vector"]],
    *,
    dimension: int,
) -> dict[str, NDArray]:
    """The result of a SELECT as arrays: int64 (n,), `V16` (n,) for a 16-byte bytea, and native float16 or float32
    (n, dimension) for halfvec and vector.

    ValueError if a value is NULL or a vector has another dimension.
    """
    blocks = list(copy_blocks(connection, query, columns, dimension=dimension))
    return {name: np.concatenate([block.pop(name) for block in blocks]) for name in columns}


def copy_blocks(
    connection: psycopg.Connection,
    query: sql.Composable,
    columns: Mapping[str, Literal["bigint", "bytea16", "halfvec", "vector"]],
    *,
    dimension: int,
) -> Iterator[dict[str, NDArray]]:
    """As `copy_out`, in blocks of some megabytes, at least one: for what is larger than memory should hold twice."""
    row_type = _row_type({name: _stored(kind, dimension) for name, kind in columns.items()})
    pending = bytearray()
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query)) as copy,
    ):
        header = True
        for data in copy:
            pending += data
            if header and len(pending) >= len(SIGNATURE):
                del pending[: len(SIGNATURE)]
                header = False
            if len(pending) >= BLOCK_BYTES:
                rows_end = len(pending) // row_type.itemsize * row_type.itemsize
                yield _parse(pending[:rows_end], row_type, columns)
                del pending[:rows_end]
    if pending[-len(TRAILER) :] != TRAILER or (len(pending) - len(TRAILER)) % row_type.itemsize:
        raise _another_width(columns, row_type)
    yield _parse(pending[: -len(TRAILER)], row_type, columns)


def _parse(data: bytearray, row_type: np.dtype, columns: Mapping[str, str]) -> dict[str, NDArray]:
    rows = np.frombuffer(data, row_type)
    if not (rows["fields"] == len(columns)).all():
        raise _another_width(columns, row_type)
    arrays: dict[str, NDArray] = {}
    for name in columns:
        if not (rows[f"{name}_length"] == row_type[name].itemsize).all():
            raise _another_width(columns, row_type)
        array = rows[name]["elements"] if row_type[name].names else rows[name]
        arrays[name] = array.copy() if array.dtype.kind == "V" else array.astype(array.dtype.newbyteorder("="))
    return arrays


def _another_width(columns: Mapping[str, str], row_type: np.dtype) -> ValueError:
    return ValueError(f"rows of another width than the {row_type.itemsize} bytes of {dict(columns)}, or with NULL")


def _field(array: NDArray, storage: Storage) -> np.dtype:
    if array.dtype.kind == "f":
        return _stored(storage, array.shape[1])
    if array.dtype.kind == "S":
        return array.dtype
    if array.ndim == 2:
        return np.dtype(f"V{array.shape[1]}")
    return np.dtype("?") if array.dtype.kind == "b" else np.dtype(">i8")


def _stored(kind: str, dimension: int) -> np.dtype:
    if kind == "halfvec" or kind == "vector":
        element = (ELEMENT[kind], (dimension,))  # type: ignore[index]
        return np.dtype([("dimension", ">i2"), ("unused", ">i2"), ("elements", *element)])
    return np.dtype({"bigint": ">i8", "bytea16": "V16"}[kind])


def _row_type(fields: Mapping[str, np.dtype]) -> np.dtype:
    described: list[tuple[str, object]] = [("fields", ">i2")]
    for name, field in fields.items():
        described += [(f"{name}_length", ">i4"), (name, field)]
    return np.dtype(described)
