"""What a file says is what is stored: in a table that is there, and in the columns of a new one."""

import csv
import io
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.store.load import load_file
from embeddings_pipeline_tests.support.workbench import execute


def write(path: Path, columns: dict[str, list[str]]) -> Path:
    """A CSV of these columns, and an `id` that counts the rows; shorter columns end with empty cells."""
    rows = max(map(len, columns.values()))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["id", *columns])
    for row in range(rows):
        writer.writerow([row, *(column[row] if row < len(column) else "" for column in columns.values())])
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    return path


def stored(database, table: str, column: str) -> list[str | None]:
    statement = sql.SQL("SELECT {}::text FROM {} ORDER BY id").format(sql.Identifier(column), sql.Identifier(table))
    with database.connect() as connection:
        return [value for (value,) in connection.execute(statement)]


NEW_COLUMNS = {
    "bigint": [["1", "20"], ["-9223372036854775808", "0"], ["1902"], ["20240105"]],
    "double precision": [["0.1", "32.985763"], ["1", "2.5"], ["-0.5"]],
    "numeric": [
        *(["12345678901234567890"], ["9223372036854775808", "1"], ["0.12345678901234567"], ["0.00001"]),
        *(["1000000000000000.5"], ["12345678901234567890123", "0.1"]),
    ],
    "boolean": [["true", "false"]],
    "date": [["2024-01-05", "9999-12-31"]],
    "timestamp without time zone": [["2024-01-01 00:00:00", "2024-01-01 12:30:00.123456"]],
    "timestamp with time zone": [["2024-01-01 00:00:00+00"]],
    "text": [
        *(["02134", "01001"], ["1", "02"], ["1.10"], ["7.5", "7.50"], ["+1"], ["+4915112345678"], ["1_000"], [" 1"]),
        *(["1 "], ["1."], [".5"], ["-0"], ["-0.0"], ["0x1F"], ["1e5"], ["1E5"], ["12345e7"], ["1e400"], ["1,5"]),
        *(["Infinity"], ["-inf"], ["NaN", "1"], ["None"], ["N/A"], ["null"], ["\\N"], ["٣"], ["50%"], ["\u00a01"]),
        *(["9" * 140_000], ["0." + "3" * 17_000], ["1\n"], ["1", "x"], ["1"] * 5 + ["n/a"]),
        *(["2024-1-5"], ["05/01/2024"], ["2024-02-30"], ["0000-01-01"], ["10000-01-01"], ["infinity"]),
        *(["today"], ["24:00"], ["16:09"], ["01:30:00"], ["2016-12-31 23:59:60"], ["2024-01-01 24:00:00"]),
        *(["2024-01-01T00:00:00Z"], ["2024-01-01T00:00:00"], ["2024-02-03T01:00:00+02:00"], ["2024-01-01 00:00:00+02"]),
        *(["2024-01-01 00:00"], ["2024-01-01 00:00:00.1234567"], ["2024-01-01 00:00:00", "2024-01-01 00:00:00+00"]),
        *(["t", "f"], ["yes", "no"], ["True"], ["TRUE"], ["true", "1"], ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"]),
        *(['{"a": 1.0}'], ["{1,2}"], ["\\x00"], [""]),
    ],
}  # fmt: skip


def test_a_new_column_is_a_number_or_time_only_if_its_text_is_the_files(database, tmp_path):
    cases = [(kind, values) for kind, lists in NEW_COLUMNS.items() for values in lists]
    columns = {f"c{number}": values for number, (_, values) in enumerate(cases)}
    loaded = load_file(database, write(tmp_path / "f.csv", columns), "films")
    assert {name: loaded.types[name] for name in columns} == {
        name: kind for name, (kind, _) in zip(columns, cases, strict=True)
    }
    for name, values in columns.items():
        kept = stored(database, "films", name)
        assert kept == [value or None for value in values] + [None] * (len(kept) - len(values))


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
LOOKS = st.one_of(
    *(st.integers().map(str), st.floats().map(str), st.decimals().map(str), st.dates().map(str)),
    *(st.datetimes().map(str), st.times().map(str), st.booleans().map(str), st.uuids().map(str)),
    st.from_regex(r"[-+]?[0-9]{0,3}\.?[0-9]{0,20}(e[0-9])?", fullmatch=True),
    st.from_regex(r"[0-9]{4}-[0-1][0-9]-[0-3][0-9]( [0-2][0-9]:[0-6][0-9]:[0-6][0-9](\+00)?)?", fullmatch=True),
    TEXTS,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.lists(st.lists(LOOKS, min_size=1, max_size=3), min_size=6, max_size=6))
def test_any_text_is_stored_as_it_is_written(database, tmp_path, columns):
    path = write(tmp_path / "f.csv", {f"c{number}": values for number, values in enumerate(columns)})
    texts = ", ".join(f"c{number} text" for number in range(len(columns)))
    execute(database, f"DROP TABLE IF EXISTS new, own; CREATE TABLE own (id int PRIMARY KEY, {texts})")
    for table in ("new", "own"):
        load_file(database, path, table)
        for number, values in enumerate(columns):
            kept = stored(database, table, f"c{number}")
            assert kept == [value or None for value in values] + [None] * (len(kept) - len(values))


def test_a_second_file_never_changes_the_type_that_the_first_one_chose(database, tmp_path):
    load_file(database, write(tmp_path / "f.csv", {"code": ["007", "n/a"], "n": ["1", "2"]}), "films")
    loaded = load_file(database, write(tmp_path / "f.csv", {"code": ["007", "008"], "n": ["1", "02"]}), "films")
    assert loaded.types == {"id": "bigint", "code": "text", "n": "bigint"} and loaded.updated == 1
    assert stored(database, "films", "code") == ["007", "008"]
    assert loaded.notes == ["column 'n', row 2: '02' is 2 as bigint"]
    with pytest.raises(SourceError, match=r"row 2, column 'n': .* invalid input syntax for type bigint: \"x\""):
        load_file(database, write(tmp_path / "f.csv", {"n": ["1", "x"]}), "films")


def test_keys_that_differ_in_their_text_are_two(database, tmp_path):
    for number, keys in enumerate((["001", "1"], ["1.0", "1"], ["1e3", "1000"], ["+1", "1"])):
        (tmp_path / "f.csv").write_text("sku,name\n" + "".join(f"{key},lamp\n" for key in keys))
        assert load_file(database, tmp_path / "f.csv", f"lamps{number}", key=("sku",)).inserted == 2
        assert execute(database, f"SELECT sku FROM lamps{number} ORDER BY ctid") == [(key,) for key in keys]


OWN = """
CREATE TABLE own (
    id int PRIMARY KEY, n numeric(5, 2), f float8, d date, ts timestamp, tz timestamptz, j json, v varchar(3)
)
"""
TOLD = {
    ("n", "1.239"): "'1.239' is 1.24 as numeric(5,2)",
    ("f", "0.1234567890123456789"): "'0.1234567890123456789' is 0.12345678901234568 as double precision",
    ("d", "05/01/2024"): "'05/01/2024' is 2024-05-01 as date",
    ("d", "2024-01-01T23:00:00+02:00"): "'2024-01-01T23:00:00+02:00' is 2024-01-01 as date",
    ("ts", "2024-01-01T00:00:00+02"): "is 2024-01-01 00:00:00 as timestamp without time zone",
    ("ts", "2024-01-01T00:00:00"): None,
    ("tz", "2024-01-01T00:00:00+02:00"): None,
    ("tz", "2024-01-01"): None,
    ("d", "10000-01-01"): None,
    ("j", '{"a": 1.0}'): None,
}
REFUSED = {
    ("n", "12345"): "row 1, column 'n': it does not fit the table 'own': numeric field overflow",
    ("f", "1e400"): "row 1, column 'f': it does not fit the table 'own': \"1e400\" is out of range",
    ("j", "{\n"): "row 1, column 'j': it does not fit the table 'own': invalid input syntax for type json",
    ("v", "a\nbcd"): "row 1, column 'v': it does not fit the table 'own': value too long",
}


def test_what_a_type_alters_is_told_and_what_it_cannot_hold_is_refused_with_its_place(database, tmp_path):
    execute(database, OWN)
    for (column, text), told in TOLD.items():
        notes = load_file(database, write(tmp_path / "f.csv", {column: [text]}), "own").notes
        assert (told is None and notes == []) or (told and len(notes) == 1 and told in notes[0]), (column, text, notes)
    for (column, text), says in REFUSED.items():
        with pytest.raises(SourceError) as error:
            load_file(database, write(tmp_path / "f.csv", {column: [text]}), "own")
        assert says in str(error.value) and "\n" not in str(error.value)


def test_a_change_of_the_text_alone_is_written(database, tmp_path):
    execute(database, "CREATE TABLE own (id int PRIMARY KEY, n numeric, f float8, j json)")
    first = {"n": ["1.10"], "f": ["0"], "j": ['{"a": 1}']}
    assert load_file(database, write(tmp_path / "f.csv", first), "own").inserted == 1
    assert load_file(database, write(tmp_path / "f.csv", first), "own").updated == 0
    for column, text in {"n": "1.1", "f": "-0", "j": '{"a":1}'}.items():
        assert load_file(database, write(tmp_path / "f.csv", {column: [text]}), "own").updated == 1
        assert stored(database, "own", column) == [text]
    load_file(database, write(tmp_path / "f.csv", first), "new", types={"n": "numeric", "j": "json"})
    [(before,)] = execute(database, "SELECT updated_at FROM new")
    load_file(database, write(tmp_path / "f.csv", {**first, "n": ["1.1"]}), "new")
    [(after,)] = execute(database, "SELECT updated_at FROM new")
    assert after > before


def test_a_chosen_type_decides_for_a_new_column_only(database, tmp_path):
    path = write(tmp_path / "f.csv", {"zip": ["02134", "5"], "n": ["1", "2"]})
    loaded = load_file(database, path, "films", types={"zip": "varchar(5)", "n": "text"})
    assert loaded.types == {"id": "bigint", "zip": "character varying(5)", "n": "text"}
    assert load_file(database, path, "films", types={"n": "TEXT"}).updated == 0
    for types, says in [
        ({"n": "bigint"}, "the column 'n' of the table 'films' is text, and no file changes that"),
        ({"nn": "text"}, "--type names a column 'nn' that is not there (did you mean 'n'?)"),
        ({"n": "strin"}, "there is no type 'strin' for the column 'n'"),
        ({"n": "text NOT NULL"}, "there is no type"),
        ({"n": "text; DROP TABLE films"}, "there is no type"),
    ]:
        with pytest.raises(SourceError) as error:
            load_file(database, path, "films", types=types)
        assert says in str(error.value)
    with pytest.raises(SourceError, match="row 2, column 'n'"):
        load_file(database, write(tmp_path / "g.csv", {"n": ["1", "x"]}), "other", types={"n": "bigint"})
    assert load_file(database, path, "last", types={"zip": "bigint"}).notes == [
        "column 'zip', row 1: '02134' is 2134 as bigint"
    ]


def test_what_keeps_a_column_of_numbers_text_is_told(database, tmp_path):
    columns = {"score": ["0.5", "6.50E-05"], "price": ["7.99", "12.50"], "n": ["1", "2"], "word": ["1", "n/a"]}
    assert load_file(database, write(tmp_path / "f.csv", columns), "films").notes == [
        f"column '{name}' is text, since row 2 says '{text}'; "
        f"drop the table and load it with --type {name}=numeric for numbers"
        for name, text in (("score", "6.50E-05"), ("price", "12.50"))
    ]


def test_without_a_name_the_table_is_the_files_and_never_one_that_load_has_not_made(database, tmp_path):
    path = write(tmp_path / "films.csv", {"title": ["a"]})
    assert load_file(database, path).table == "films" and load_file(database, path).created is False
    odd = load_file(database, write(tmp_path / "My films.2024.csv", {"title": ["a"]}))
    assert stored(database, "My films.2024", "title") == ["a"] and odd.table == '"My films.2024"'
    execute(database, "CREATE TABLE own (id int PRIMARY KEY, title text)")
    for name in ("own", "pg_class"):
        with pytest.raises(RefusedError, match=f"there is a table '{name}' that load has not made; name it"):
            load_file(database, write(tmp_path / f"{name}.csv", {"title": ["a"]}))
    assert load_file(database, tmp_path / "own.csv", "own").inserted == 1
    for name in ("load_row", "load_text"):  # as the tables are called that it works with
        assert load_file(database, write(tmp_path / f"{name}.csv", {"row": ["1"], "row_": ["2"]})).inserted == 1
        assert stored(database, name, "row_") == ["2"]
    with pytest.raises(SourceError, match="longer than 63 bytes"):
        load_file(database, write(tmp_path / f"{'x' * 64}.csv", {"title": ["a"]}))


def test_replacing_or_updating_the_rows_of_another_file_is_told(database, tmp_path):
    first, second = tmp_path / "monday.csv", tmp_path / "tuesday.csv"
    load_file(database, write(first, {"title": ["a", "b"]}), "films")
    assert load_file(database, write(first, {"title": ["a", "c"]}), "films").notes == []
    loaded = load_file(database, write(second, {"title": ["a", "d"]}), "films")
    assert loaded.notes == [f"1 of its rows were updated, and it was loaded from {first}"]
    loaded = load_file(database, write(first, {"title": ["e"]}), "films", replace=True)
    assert loaded.deleted == 2 and loaded.notes == [f"2 of its rows were deleted, and it was loaded from {second}"]
    assert load_file(database, write(first, {"title": ["f"]}), "films").notes == []


def test_a_nul_is_told_and_a_constraint_names_the_row(database, tmp_path):
    path = write(tmp_path / "f.csv", {"title": ["a", "b\0c"]})
    assert load_file(database, path, "films").notes == [
        "column 'title', row 2: PostgreSQL has no NUL; it became U+FFFD"
    ]
    execute(database, "CREATE TABLE own (id int PRIMARY KEY, title text NOT NULL CHECK (title <> 'c') UNIQUE)")
    for titles, says in [
        (["a", ""], "row 2, column 'title': it does not fit the table 'own': null value"),
        (["a", "c"], "Failing row contains (1, c)"),
        (["a", "a"], "Key (title)=(a) already exists"),
    ]:
        with pytest.raises(SourceError) as error:
            load_file(database, write(path, {"title": titles}), "own")
        assert says in str(error.value)
    assert isinstance(error.value.__cause__, psycopg.IntegrityError)
