"""Columns to and from PostgreSQL in COPY's binary form, joined by Arrow and parsed as NumPy structured arrays.

The form (PostgreSQL's manual, "COPY", "Binary Format"): an 11-byte signature, two int32 (flags, length of the
extension), then for each row an int16 with the number of fields and for each field an int32 length and its bytes; an
int16 of -1 ends it. A `vector` is int16 dimension, int16 zero and big-endian float32s; a `halfvec` has float16s.
What is read is of one width here, as every field is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

if TYPE_CHECKING:
    import pyarrow as pa  # elsewhere where it is used: a search writes nothing

SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8
TRAILER = b"\xff\xff"
BLOCK_BYTES = 2 << 20  # what is packed or parsed at a time, so that memory holds the arrays and little else

Storage = Literal["halfvec", "vector"]
Column: TypeAlias = "NDArray | pa.Array | pa.ChunkedArray"
ELEMENT: dict[Storage, str] = {"halfvec": ">f2", "vector": ">f4"}


def copy_in(
    connection: psycopg.Connection,
    table: sql.Identifier,
    columns: Mapping[str, Column],
    *,
    storage: Storage = "halfvec",
) -> int:
    """COPY columns of one length into `table`: int64 → bigint, bool → boolean, (n, 16) uint8 and binary → bytea, `S…`
    and string → text, `jsonb` → jsonb, float (n,) → real, and float (n, d) → halfvec or vector as `storage` says. NULL
    in Arrow's columns.

    Returns the number of rows. Like pgvector's own input, the server refuses NaN and infinity with psycopg.DataError;
    what is too large for a float16 is infinite in a halfvec. ValueError if the columns differ in length.
    """
    rows = len(next(iter(columns.values())))
    if any(len(column) != rows for column in columns.values()):
        raise ValueError(f"columns of different lengths: { {name: len(column) for name, column in columns.items()} }")
    if not rows:
        return 0
    bytes_a_row = max(1, sum(column.nbytes for column in columns.values()) // rows)
    rows_a_block = max(1, BLOCK_BYTES // bytes_a_row)
    with connection.cursor() as cursor, cursor.copy(copy_statement(table, columns)) as copy:
        copy.write(SIGNATURE)
        for start in range(0, rows, rows_a_block):
            copy.write(_packed([column[start : start + rows_a_block] for column in columns.values()], storage))
        copy.write(TRAILER)
    return rows


def copy_statement(table: sql.Identifier, columns: Iterable[str]) -> sql.Composed:
    """The COPY that `copy_in` runs."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, names)


def some_of(columns: Mapping[str, Column], rows: NDArray[np.bool_]) -> Mapping[str, Column]:
    """The chosen rows of columns."""
    if rows.all():
        return columns
    return {name: c[rows] if isinstance(c, np.ndarray) else c.filter(rows) for name, c in columns.items()}


def columns_of(table: "pa.Table") -> "dict[str, pa.ChunkedArray]":
    """An Arrow table as `copy_in` wants it."""
    return dict(zip(table.column_names, table.columns, strict=True))


def jsonb(documents: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """JSON texts as `copy_in` wants them for a column of type jsonb, whose binary form begins with its version."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(b"\x01", documents.cast(pa.binary()), b"")


def _packed(columns: Sequence[Column], storage: Storage) -> memoryview:
    """The rows of these columns, as COPY wants them: Arrow joins what belongs to a row. Nothing here is a scalar of
    Arrow's: making one imports pandas, if that is installed.
    """
    import pyarrow.compute as pc

    rows = len(columns[0])
    parts = [_bytes_of(np.full(rows, len(columns), ">i2"))]
    for column in columns:
        fields = _fields(column, storage)
        lengths = np.diff(_offsets(fields)).astype(">i4")
        if fields.null_count:
            lengths[fields.is_null().to_numpy(zero_copy_only=False)] = -1
            fields = fields.fill_null(b"")
        parts += [_bytes_of(lengths), fields]
    joined = pc.binary_join_element_wise(*parts, _bytes_of(np.zeros((rows, 0), np.uint8)))
    offsets = _offsets(joined)
    return memoryview(joined.buffers()[2])[offsets[0] : offsets[-1]]


def _offsets(fields: "pa.Array") -> NDArray[np.int32]:
    """Where each value begins in their bytes, and where the last one ends."""
    return np.frombuffer(fields.buffers()[1], np.int32, len(fields) + 1, 4 * fields.offset)


def _fields(column: Column, storage: Storage) -> "pa.Array":
    """The values of a column as the server reads them, each some bytes."""
    import pyarrow as pa

    if isinstance(column, pa.Array | pa.ChunkedArray):
        if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type):
            return _fields(column.to_numpy(), storage)
        chunked = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
        values = chunked.cast(pa.binary()).combine_chunks()
        return values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    if column.dtype.kind == "f" and column.ndim == 1:
        return _bytes_of(column.astype(">f4"))
    if column.dtype.kind == "f":
        packed = np.zeros(len(column), _stored(storage, column.shape[1]))
        packed["dimension"] = column.shape[1]
        with np.errstate(over="ignore"):  # infinite in float16: the server says so better
            packed["elements"] = column
        return _bytes_of(packed)
    if column.dtype.kind == "S":
        return pa.array(column.tolist(), pa.binary())
    if column.ndim == 2:
        return _bytes_of(np.ascontiguousarray(column))
    return _bytes_of(column.astype("?" if column.dtype.kind == "b" else ">i8"))


def _bytes_of(values: NDArray) -> "pa.Array":
    """Each element of an array, or each row of bytes, as its bytes."""
    import pyarrow as pa

    size = values.dtype.itemsize * (values.shape[1] if values.ndim == 2 else 1)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(size)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values.reshape(-1).view(np.uint8))]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


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
