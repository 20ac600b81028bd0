"""Parquet files: what Python's and pandas's types cannot hold is loaded as it is, or refused with its place."""

import uuid
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.load import load_file
from embeddings_pipeline_tests.support.workbench import execute

NAN, INFINITY = float("nan"), float("inf")
STRUCT = pa.struct({"f": pa.float64(), "b": pa.binary(), "t": pa.timestamp("us"), "d": pa.date32()})
UUID = uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")


def parquet(path: Path, **columns: pa.Array) -> Path:
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"id": pa.array(range(rows)), **columns}), path)
    return path


def days(*values: int | None) -> pa.Array:
    return pa.array(values, pa.int32()).cast(pa.date32())


VALUES: dict[str, tuple[pa.Array, str, list[str | None]]] = {
    "far": (days(2932897, -719163, -719529, None), "date", ["10000-01-01", "0001-12-31 BC", "0002-12-31 BC", None]),
    "far_us": (
        pa.array([253402300800000000, -62135596800000001, 0], pa.timestamp("us")),
        "timestamp without time zone",
        ["10000-01-01 00:00:00", "0001-12-31 23:59:59.999999 BC", "1970-01-01 00:00:00"],
    ),
    "far_utc": (
        pa.array([253402300800, 0], pa.timestamp("s", "Asia/Tokyo")),
        "timestamp with time zone",
        ["10000-01-01 00:00:00+00", "1970-01-01 00:00:00+00"],
    ),
    "ns": (pa.array([1_000, 1_500_000_000], pa.timestamp("ns")), "timestamp without time zone", [
        "1970-01-01 00:00:00.000001", "1970-01-01 00:00:01.5",
    ]),
    "date64": (pa.array([date(2024, 2, 29)], pa.date64()), "date", ["2024-02-29"]),
    "clock": (pa.array([0, 86_399_999_999], pa.time64("us")), "time without time zone", [
        "00:00:00", "23:59:59.999999",
    ]),
    "span": (pa.array([-1, 90_061], pa.duration("s")), "interval", ["-1 days +23:59:59", "1 day 01:01:01"]),
    "u64": (pa.array([2**64 - 1], pa.uint64()), "numeric", [str(2**64 - 1)]),
    "i8": (pa.array([-128], pa.int8()), "bigint", ["-128"]),
    "f64": (pa.array([0.1, NAN, -INFINITY, 5.0]), "double precision", ["0.1", "NaN", "-Infinity", "5"]),
    "f32": (pa.array([0.1, NAN], pa.float32()), "real", ["0.1", "NaN"]),
    "f16": (pa.array([1.5], pa.float16()), "real", ["1.5"]),
    "decimal": (pa.array([Decimal("12.50"), Decimal("0E-10")], pa.decimal256(60, 10)), "numeric", [
        "12.5000000000", "0.0000000000",
    ]),
    "small_decimal": (pa.array([Decimal("1.10")], pa.decimal128(5, 2)), "numeric", ["1.10"]),
    "flag": (pa.array([True, False]), "boolean", ["true", "false"]),
    "word": (pa.array(["007", "1e5", ""]).dictionary_encode(), "text", ["007", "1e5", ""]),
    "large": (pa.array(["1.10"], pa.large_string()), "text", ["1.10"]),
    "raw": (pa.array([b"\x00\xff", b""]), "bytea", ["\\x00ff", "\\x"]),
    "raw16": (pa.array([b"0123"], pa.binary(4)), "bytea", ["\\x30313233"]),
    "uuid": (pa.array([UUID.bytes], pa.uuid()), "uuid", [str(UUID)]),
    "json": (pa.array(['{"a": 1.0}'], pa.json_()), "jsonb", ['{"a": 1.0}']),
    "nan": (pa.array([{"f": NAN, "b": b"\x00\xff", "d": None}], STRUCT), "jsonb", [
        '{"b": "\\\\x00ff", "d": null, "f": null, "t": null}',
    ]),
    "infinite": (pa.array([[{"f": INFINITY}], [{"f": 0.5}]]), "jsonb", ['[{"f": null}]', '[{"f": 0.5}]']),
    "nan_map": (pa.array([[("a", NAN), ("b", 0.5)]], pa.map_(pa.string(), pa.float64())), "jsonb", [
        '{"a": null, "b": 0.5}',
    ]),
    "twice": (pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), "jsonb", ['[["a", 1], ["a", 2]]']),
    "numbered": (pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())), "jsonb", ['{"1": "x"}']),
    "floats": (pa.array([[0.1, NAN, None]], pa.list_(pa.float32())), "real[]", ["{0.1,NaN,NULL}"]),
    "fixed": (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), "bigint[]", ["{1,2}"]),
    "far_dates": (pa.array([[2932897]], pa.list_(pa.int32())).cast(pa.list_(pa.date32())), "date[]", ["{10000-01-01}"]),
    "raws": (pa.array([[b"\xff"]]), "bytea[]", ['{"\\\\xff"}']),
    "words": (pa.array([["a", 'b"\\,{}', "NULL", ""]]), "text[]", ['{a,"b\\"\\\\,{}","NULL",""}']),
    "lists": (pa.array([[[NAN], []]], pa.list_(pa.list_(pa.float64()))), "jsonb", ["[[null], []]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_each_type_is_loaded_as_what_it_is(database, tmp_path, name):
    array, kind, expected = VALUES[name]
    loaded = load_file(database, parquet(tmp_path / "f.parquet", value=array), "films")
    assert loaded.types["value"] == kind and loaded.rows == len(array)
    found = [value for (value,) in execute(database, "SELECT value::text FROM films ORDER BY id")]
    assert found == expected


def test_what_postgresql_cannot_hold_is_one_line_that_names_column_and_row(database, tmp_path):
    invalid = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    for array, says in [
        (pa.array([0, 9223372036854775807], pa.timestamp("ms")), "row 2, column 'at': it does not fit the table"),
        (pa.array([0, -9223372036854775808], pa.timestamp("us")), "row 2, column 'at': it does not fit the table"),
        (pa.array([-9223372036854775807, 0], pa.timestamp("ms")), "row 1, column 'at': it does not fit the table"),
        (days(0, 2147483647), "row 2, column 'at': it does not fit the table 'films': date out of range"),
        (pa.array([2**62], pa.duration("ms")), "row 1, column 'at': it does not fit the table"),
        (invalid, "row 2, column 'at': bytes that are no UTF-8 text"),
    ]:
        with pytest.raises(SourceError) as error:
            load_file(database, parquet(tmp_path / "f.parquet", at=array), "films")
        assert says in str(error.value) and "\n" not in str(error.value)
    sentinel = parquet(tmp_path / "f.parquet", at=pa.array([-9223372036854775807], pa.timestamp("us")))
    load_file(database, sentinel, "films", types={"at": "text"})
    assert execute(database, "SELECT at FROM films") == [("290309-12-21 19:59:05.224193 BC",)]


def test_a_table_that_is_there_decides_how_a_value_is_written(database, tmp_path):
    execute(
        database,
        "CREATE TABLE own (id int PRIMARY KEY, flag text, at text, tags jsonb, names text, n bigint, v vector(2))",
    )
    path = parquet(
        tmp_path / "f.parquet",
        flag=pa.array([True]),
        at=pa.array([datetime(2024, 1, 1, 12)], pa.timestamp("ns")),
        tags=pa.array([["a", None]]),
        names=pa.array([[{"a": b"\xff"}]]),
        n=pa.array([5.0]),
        v=pa.array([[0.5, 1.0]]),
    )
    assert load_file(database, path, "own").notes == []
    assert execute(database, "SELECT flag, at, tags, names, n, v::text FROM own") == [
        ("true", "2024-01-01 12:00:00", ["a", None], '[{"a": "\\\\xff"}]', 5, "[0.5,1]")
    ]


def test_nanoseconds_that_are_lost_are_told(database, tmp_path):
    path = parquet(tmp_path / "f.parquet", at=pa.array([1_000, 1_001], pa.timestamp("ns")))
    loaded = load_file(database, path, "films")
    assert loaded.notes == [
        "column 'at', row 2: '1970-01-01 00:00:00.000001001' is 1970-01-01 00:00:00.000001 "
        "as timestamp without time zone"
    ]


def test_a_folder_whose_name_has_an_equals_sign_adds_no_column(database, tmp_path):
    (tmp_path / "year=2024").mkdir()
    path = parquet(tmp_path / "year=2024" / "f.parquet", title=pa.array(["a"]))
    assert list(load_file(database, path, "films").types) == ["id", "title"]
