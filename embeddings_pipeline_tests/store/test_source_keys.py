"""Any value of any type may be a key, alone or as a part of one."""

import json

import pytest

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline_tests.support.sources import (
    both_ways,
    make,
    read,
    scanned,
    source_of,
    titles,
)
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once

ODD_KEYS = [
    "plain", "", " ", "it's", 'say "hi"', "a\nb", "a\tb", "a\rb", "100%", "%s %(x)s", "a:b", "a\\b", "\\N", "\\", "{}",
    "{key}", "🎬", "שלום", "ﷺ", "𠜎𠜱", "a,b", '["a"]', "NULL", "null", "\u2028", "e\u0301", "\x01\x1f\x7f",
    "; DROP TABLE x --",
]  # fmt: skip


def test_any_text_may_be_a_key(database):
    for kind in ("text", "varchar(40)", 'text COLLATE "C"'):
        make(database, kind, ODD_KEYS)
        assert titles(both_ways(source_of(database))) == {key: repr(key) for key in ODD_KEYS}


def test_any_text_may_be_part_of_a_composite_key_whose_item_key_is_a_json_array(database):
    execute(database, "CREATE TABLE things (id text, kind text, title text, PRIMARY KEY (id, kind))")
    with database.connect() as connection, connection.cursor() as cursor:
        pairs = [(a, b, repr((a, b))) for a in ODD_KEYS for b in ODD_KEYS[:3]]
        cursor.executemany("INSERT INTO things VALUES (%s, %s, %s)", pairs)
    found = titles(both_ways(source_of(database, key=("id", "kind"))))
    assert {tuple(json.loads(key)): title for key, title in found.items()} == {(a, b): t for a, b, t in pairs}


KEYS_OF_TYPES = [
    ("bigint", ["1", "-9223372036854775808", "9223372036854775807"]),
    ("smallint", ["1", "-5"]),
    ("uuid", ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000000"]),
    ("date", ["2024-02-29", "infinity", "0044-03-15 BC"]),
    ("timestamptz", ["2024-02-29 12:00:00.123456+00", "-infinity"]),
    ("timestamp(3)", ["2024-02-29 12:00:00.123"]),
    ("time", ["23:59:59.999999"]),
    ("interval", ["1 year 2 mons 3 days 04:05:06.7", "-00:00:01"]),
    ("numeric", ["1.50", "12345678901234567890.123456789", "NaN", "-0.1"]),
    ("numeric(10,2)", ["1.50", "0.00"]),
    ("double precision", ["0.1", "1e+300", "Infinity", "1.0000000000000002"]),
    ("boolean", ["true", "false"]),
    ("bytea", ["\\x00ff", "\\x"]),
    ("inet", ["192.168.0.1/32", "::1/64"]),
    ("char(4)", ["ab", "abcd", ""]),
    ("name", ["a name"]),
    ("mood", ["so so", "it's 100%", "Ünger"]),
    ("public.\"Odd Mood\"", ["x"]),
    ("positive", ["1", "2"]),
    ("int4range", ["[1,5)", "empty"]),
    ("jsonb", ['{"a": 1}', "[1, 2.50]"]),
]  # fmt: skip


def test_any_type_may_be_a_key(database):
    execute(database, """CREATE TYPE mood AS ENUM ('so so', 'it''s 100%', 'Ünger')""")
    execute(database, """CREATE TYPE "Odd Mood" AS ENUM ('x')""")
    execute(database, "CREATE DOMAIN positive AS integer CHECK (VALUE > 0)")
    for kind, keys in KEYS_OF_TYPES:
        make(database, kind, keys)
        assert titles(both_ways(source_of(database))) == {key: repr(key) for key in keys}, kind


def test_a_key_of_any_two_types_is_read_back(database):
    execute(database, "CREATE TABLE things (id uuid, at timestamptz, title char(3), PRIMARY KEY (id, at, title))")
    execute(
        database,
        "INSERT INTO things SELECT gen_random_uuid(), now() - n * '1 day'::interval, n FROM generate_series(1, 50) n",
    )
    rows = both_ways(source_of(database, key=("id", "at", "title")))
    assert len(rows) == 50


def test_a_null_key_is_named_with_its_row(database):
    execute(database, "CREATE TABLE things (id bigint, kind text, title text)")
    execute(database, "INSERT INTO things VALUES (1, 'a', 'fine'), (NULL, 'a', 'Heat')")
    for key in (["id"], ["kind", "id"]):
        with pytest.raises(
            SourceError, match=r"collection 'things': table 'things' has a row whose key .*id\) is NULL.*Heat.*where"
        ):
            scanned(source_of(database, key=key))
    assert len(scanned(source_of(database, where="id IS NOT NULL"))) == 1


def test_a_key_that_is_too_long_to_index_is_no_items(database):
    make(database, "text", ["ü" * 1000, "ü" * 1100])
    source = source_of(database)
    with source.connect() as connection:
        [rows] = source.scan(connection)
    [too_long] = rows.unusable
    assert rows.hashes["item_key"].to_pylist() == ["ü" * 1000]
    assert not too_long.is_item and too_long.reason == "its key has 2,200 bytes, and may have 2,000"


def test_two_rows_with_one_key_stop_the_scan_and_the_key_is_shown(database, settings):
    execute(database, "CREATE TABLE things (id bigint, title text, overview text)")
    execute(database, "INSERT INTO things VALUES (1, 'a'), (7, 'b'), (7, 'c')")
    query = {"query": "SELECT * FROM things", "key": "id"}
    with pytest.raises(SourceError, match=r"the key \(7\) more than once.*source.key.*\(id\)"):
        sync_once(definition("things", source=query, columns=["title"]), settings)
    execute(database, "DELETE FROM things WHERE title = 'c'")
    assert sync_once(definition("things", source=query, columns=["title"]), settings)[1] == 2


def test_keys_that_the_columns_type_no_longer_holds_are_just_not_found(database):
    make(database, "text", ["1", "2", "x"])
    before = list(scanned(source_of(database)))
    execute(database, "DELETE FROM things WHERE id = 'x'")
    execute(database, "ALTER TABLE things ALTER id TYPE bigint USING id::bigint")
    assert set(read(source_of(database), before)) == {"1", "2"}
