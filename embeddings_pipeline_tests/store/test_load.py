"""`load`: files of every shape into a source table, and nothing written that did not change."""

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.load import Loaded, load_file
from embeddings_pipeline_tests.support.workbench import execute


def csv(folder: Path, text: str, name: str = "films.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def parquet(folder: Path, columns: dict[str, pa.Array], name: str = "films.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def counts(loaded: Loaded) -> tuple[int, int, int]:
    return loaded.rows, loaded.inserted, loaded.updated


def types(database, table: str = "films") -> dict[str, str]:
    query = """SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
               WHERE attrelid = %s::regclass AND attnum > 0"""
    return dict(execute(database, query, [table]))


def test_a_csv_becomes_a_table_with_types_a_key_and_updated_at(database, tmp_path):
    header = "id,title,year,score,seen,on,at,note\n"
    path = csv(tmp_path, header + '2,"a, ""b""\nc",1999,7.5,true,1999-12-31,2024-01-01 00:00:00,\n'
                         "1,Ünïcode 🎬,,,false,,,\n")  # fmt: skip
    assert counts(load_file(database, path, "films")) == (2, 2, 0)
    assert types(database) == {
        "id": "bigint", "title": "text", "year": "bigint", "score": "double precision", "seen": "boolean",
        "on": "date", "at": "timestamp without time zone", "note": "text", "updated_at": "timestamp with time zone",
    }  # fmt: skip
    rows = execute(database, 'SELECT id, title, year, score, seen, "on", at, note FROM films ORDER BY id')
    at = datetime(2024, 1, 1)
    assert rows == [
        (1, "Ünïcode 🎬", None, None, False, None, None, None),
        (2, 'a, "b"\nc', 1999, 7.5, True, date(1999, 12, 31), at, None),
    ]
    assert execute(database, "SELECT count(*) FROM films WHERE updated_at IS NULL") == [(0,)]
    [(key,)] = execute(
        database,
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'films_pkey'",
    )
    assert key == "PRIMARY KEY (id)"


def test_numbers_that_a_float_would_round_stay_exact(database, tmp_path):
    path = csv(
        tmp_path, "id,big,fine,mixed,short\n1,12345678901234567890123,0.1,1e5,1.5\n2,-1,1234567890.12345678901,x,2\n"
    )
    load_file(database, path, "films")
    assert execute(database, "SELECT big::text, fine::text, mixed, short::text FROM films ORDER BY id") == [
        ("12345678901234567890123", "0.1", "1e5", "1.5"),
        ("-1", "1234567890.12345678901", "x", "2"),
    ]


def test_a_parquet_file_keeps_its_types(database, tmp_path):
    day, now = date(2024, 2, 29), datetime(2024, 2, 29, 12, 0, 0, 123456)
    columns = {
        "id": pa.array([1, 2], pa.int32()),
        "big": pa.array([2**64 - 1, None], pa.uint64()),
        "price": pa.array([Decimal("12.50"), None], pa.decimal128(10, 2)),
        "ratio": pa.array([0.5, float("nan")], pa.float32()),
        "day": pa.array([day, None]),
        "at": pa.array([now, None], pa.timestamp("ns")),
        "at_utc": pa.array([now, None], pa.timestamp("ms", "Europe/Berlin")).cast(pa.timestamp("us", "Europe/Berlin")),
        "clock": pa.array([time(12, 30), None]),
        "span": pa.array([timedelta(days=1, seconds=2), None]),
        "raw": pa.array([b"\x00\xff", None]),
        "tags": pa.array([["a", None, 'it\'s "x"', "n\x00l"], []], pa.list_(pa.string())),
        "scores": pa.array([[1, 2], None], pa.large_list(pa.int64())),
        "genre": pa.array(["Drama", None]).dictionary_encode(),
        "cast": pa.array(
            [[{"name": "Al\x00", "n": 1}], None], pa.list_(pa.struct({"name": pa.string(), "n": pa.int64()}))
        ),
        "nested": pa.array([[[1], [2, 3]], None], pa.list_(pa.list_(pa.int64()))),
        "box": pa.array([{"day": day, "d": Decimal("1.50")}, None]),
        "pairs": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "nothing": pa.nulls(2),
    }
    load_file(database, parquet(tmp_path, columns), "films")
    assert types(database) == {
        "id": "bigint", "big": "numeric", "price": "numeric", "ratio": "real", "day": "date",
        "at": "timestamp without time zone", "at_utc": "timestamp with time zone", "clock": "time without time zone",
        "span": "interval",
        "raw": "bytea", "tags": "text[]", "scores": "bigint[]", "genre": "text", "cast": "jsonb",
        "nested": "jsonb", "box": "jsonb", "pairs": "jsonb", "nothing": "text",
        "updated_at": "timestamp with time zone",
    }  # fmt: skip
    [row] = execute(
        database,
        """SELECT big, price, day, at, clock, span, raw, tags, scores, genre, "cast", nested, box, pairs
           FROM films WHERE id = 1""",
    )
    assert row == (
        2**64 - 1, Decimal("12.50"), day, now, time(12, 30), timedelta(days=1, seconds=2),
        b"\x00\xff", ["a", None, 'it\'s "x"', "n\ufffdl"], [1, 2], "Drama", [{"name": "Al\ufffd", "n": 1}],
        [[1], [2, 3]],
        {"day": "2024-02-29", "d": "1.50"}, {"a": 1},
    )  # fmt: skip
    [row] = execute(database, 'SELECT tags, scores, "cast", at, nothing FROM films WHERE id = 2')
    assert row == ([], None, None, None, None)


def state(database) -> dict[int, tuple]:
    return {row[0]: row[1:] for row in execute(database, "SELECT id, xmin::text, updated_at, title FROM films")}


def test_a_second_load_writes_only_what_changed_and_the_trigger_tells_when(database, tmp_path):
    load_file(database, csv(tmp_path, "id,title\n1,a\n2,b\n3,\n"), "films")
    before = state(database)
    assert counts(load_file(database, csv(tmp_path, "id,title\n1,a\n2,b\n3,\n"), "films")) == (3, 0, 0)
    assert state(database) == before
    assert counts(load_file(database, csv(tmp_path, "id,title\n1,a\n2,B\n4,d\n"), "films")) == (3, 1, 1)
    after = state(database)
    assert (after[1], after[3]) == (before[1], before[3])
    assert after[2][1] > before[2][1] and after[2][2] == "B"
    execute(database, "UPDATE films SET title = 'x' WHERE id = 1; UPDATE films SET title = title WHERE id = 3")
    assert state(database)[1][1] > before[1][1] and state(database)[3][1] == before[3][1]


def test_updated_at_of_the_file_counts_for_new_rows_and_its_gaps_are_now(database, tmp_path):
    load_file(database, csv(tmp_path, "id,updated_at,title\n1,2001-01-01T00:00:00Z,a\n2,,b\n"), "films")
    first, second = (row[1] for row in sorted(state(database).values(), key=lambda row: row[2]))
    assert first.year == 2001 and second.year > 2020
    assert load_file(database, csv(tmp_path, "id,updated_at,title\n1,2002-01-01T00:00:00Z,a\n"), "films").updated == 0


def test_a_composite_key_upserts_by_both_columns(database, tmp_path):
    path = csv(tmp_path, "tmdb_id,media_type,title\n1,movie,a\n1,tv,b\n")
    load_file(database, path, "films", key=("tmdb_id", "media_type"))
    csv(tmp_path, "tmdb_id,media_type,title\n1,tv,c\n")
    assert load_file(database, path, "films", key=("tmdb_id", "media_type")).updated == 1
    assert execute(database, "SELECT title FROM films ORDER BY 1") == [("a",), ("c",)]


def test_replace_deletes_what_is_not_in_the_file_and_only_if_all_goes_well(database, tmp_path):
    load_file(database, csv(tmp_path, "id,title\n1,a\n2,b\n"), "films")
    with pytest.raises(SourceError):
        load_file(database, csv(tmp_path, "id,title\n1,a\n1,b\n"), "films", replace=True)
    assert len(state(database)) == 2
    assert load_file(database, csv(tmp_path, "id,title\n3,c\n"), "films", replace=True).inserted == 1
    assert set(state(database)) == {3}


def test_odd_names_and_a_byte_order_mark_are_taken(database, tmp_path):
    path = csv(tmp_path, '\ufeffid,"Primary Title",100%,"say ""hi""",order,{x}\n1,a,b,c,d,e\n')
    load_file(database, path, "select")
    load_file(database, path, '"odd.name"')
    assert execute(database, 'SELECT "Primary Title", "100%", "say ""hi""", "order", "{x}" FROM "odd.name"') == [
        tuple("abcde")
    ]


def test_a_file_with_a_header_only_makes_an_empty_table(database, tmp_path):
    assert counts(load_file(database, csv(tmp_path, "id,title\n"), "films")) == (0, 0, 0)
    assert execute(database, "SELECT count(*) FROM films") == [(0,)]


BAD_FILES = {
    "missing": (None, "there is no such file"),
    "empty": (b"", "not a CSV"),
    "latin-1": ("id,title\n1,\xe9\n".encode("latin-1"), "not a CSV (UTF-8"),
    "ragged": (b"id,title\n1,a,b\n", "row 1 has 3 cells, and the header names 2 columns (after column 'title')"),
    "no key": (b"ide,title\n1,a\n", "column 'id' to be the key (did you mean 'ide'?) (columns: ide, title); name one"),
    "no key, odd names": (b'ide,"ti\ntle"\n1,a\n', "(columns: ide, 'ti\\ntle')"),
    "key twice, odd": (b'id,title\n1,a\n1,"b\n"\n', "row 1: the key (id)"),
    "NULL key": (b"id,title\n1,a\n,b\n", "row 2: the key (id) must be there and identify a row, and (None) does not"),
    "key twice": (b"id,title\n1,a\n7,b\n7,b\n", "row 2: the key (id) must be there and identify a row"),
    "column twice": (b"id,title,title\n1,a,b\n", "two columns are called 'title'; rename one"),
    "column without a name": (b"id,,title\n1,a,b\n", "column 2 has no name"),
    "not a Parquet": (b"id,title\n", "not a CSV (UTF-8, with a header) or Parquet file"),
    "short": (b"id,title\n1,a\n2\n", "row 2 has 1 cells, and the header names 2 columns (column 'title' is missing)"),
    "stray quote": (b'id,title\n1,"a "b" c"\n', "row 1: ',' expected after '\"'"),
    "open quote": (b'id,title\n1,"a\n', "row 1: unexpected end of data"),
    "long name": (b"id," + b"c" * 64 + b"\n1,a\n", "63 bytes are the most"),
    "padded key": (b"id,title\n1,a\n001,b\n", "row 2, column 'id': '001' is no key of type bigint"),
    "other columns": (b"id,title,extra\n1,a,b\n", "it does not fit the table 'there': the table has no column 'extra'"),
    "other types": (b"id,title,year\n1,a,soon\n", "row 1, column 'year': it does not fit the table 'there'"),
    "system column": (b"id,ctid\n1,a\n", "it does not fit the table 'there'"),
}  # fmt: skip


def test_a_file_that_cannot_be_loaded_is_one_line_and_changes_nothing(database, tmp_path):
    load_file(database, csv(tmp_path, "id,title,year\n1,a,1999\n"), "there")
    before = execute(database, "SELECT *, xmin::text FROM there")
    for name, (content, says) in BAD_FILES.items():
        path = tmp_path / f"{name}.{'parquet' if name == 'not a Parquet' else 'csv'}"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SourceError) as error:
            load_file(database, path, "there")
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        assert says in str(error.value), str(error.value)
    assert execute(database, "SELECT *, xmin::text FROM there") == before


def test_a_table_of_ones_own_is_loaded_into_and_gets_no_trigger(database, tmp_path):
    execute(database, "CREATE TABLE mine (id text PRIMARY KEY, title varchar(5) NOT NULL, extra int DEFAULT 7)")
    assert load_file(database, csv(tmp_path, "id,title\nx,a\n"), "mine").inserted == 1
    assert load_file(database, csv(tmp_path, "id,title\nx,b\n"), "mine").updated == 1
    assert execute(database, "SELECT * FROM mine") == [("x", "b", 7)]
    assert execute(database, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'mine'::regclass") == [(0,)]
    for content, says in [("id,title\ny,\n", "null value"), ("id,title\ny,much too long\n", "too long")]:
        with pytest.raises(SourceError, match=says):
            load_file(database, csv(tmp_path, content), "mine")


def test_a_table_without_that_key_and_names_that_are_none_are_refused(database, tmp_path):
    execute(database, "CREATE TABLE keyless (id bigint, title text)")
    path = csv(tmp_path, "id,title\n1,a\n")
    for table, says in [
        ("keyless", "no unique or exclusion constraint"),
        ("nowhere.films", 'schema "nowhere" does not exist'),
        ("a.b.c", "is not the name of a table"),
        ("", "is not the name of a table"),
    ]:
        with pytest.raises(SourceError, match=says):
            load_file(database, path, table)


def test_a_thousand_rows_a_second_are_the_least_that_a_load_does(database, tmp_path):
    path = csv(tmp_path, "id,title\n" + "".join(f"{n},{'x' * 1000}\n" for n in range(20_000)))
    started = datetime.now()
    load_file(database, path, "films")
    assert (datetime.now() - started).total_seconds() < 20
