"""Reading any table or query: every type of key, odd names, and one line for what cannot be read."""

import json
import re

import pytest
from psycopg import sql

from embeddings_pipeline.config.templates import parse_row
from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.source_sql import table_identifier
from embeddings_pipeline_tests.support.sources import (
    both_ways,
    make,
    read,
    scanned,
    source_of,
    titles,
)
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once


def test_rows_that_are_gone_are_missing_from_a_read_and_no_keys_read_nothing(database):
    make(database, "bigint", [1, 2, 3])
    assert set(read(source_of(database), ["2", "5"])) == {"2"}
    assert read(source_of(database), []) == {}


@pytest.mark.parametrize("key", [["id"], ["kind", "id"]])
def test_reading_by_key_uses_the_index(database, key):
    execute(database, "CREATE TABLE things (id bigint, kind varchar(9), title text, overview text)")
    execute(database, f"ALTER TABLE things ADD PRIMARY KEY ({', '.join(key)})")
    execute(database, "INSERT INTO things SELECT n, 'movie', repeat('x', 200), '' FROM generate_series(1, 20000) n")
    execute(database, "ANALYZE things")
    source = source_of(database, key=key)
    keys = [
        str(n) if len(key) == 1 else json.dumps([str(n) if k == "id" else "movie" for k in key]) for n in range(100)
    ]
    with source.connect() as connection:
        types = source.check(connection)
        query = source._select(source._with_keys(keys, types), types)
        plan = "\n".join(row[0] for row in connection.execute(sql.SQL("EXPLAIN ") + query))
        assert source.read(connection, keys).table.num_rows == 99
    assert "things_pkey" in plan and "Seq Scan" not in plan, plan


def test_the_row_hash_changes_with_template_and_payload_columns_and_with_no_other(database):
    execute(database, "CREATE TABLE things (id bigint PRIMARY KEY, title text, plot text, year int, revenue bigint)")
    execute(database, "INSERT INTO things VALUES (1, 'Heat', 'A heist', 1995, 5)")
    source = source_of(database, columns=["year"], vectors={"base": "{title}", "plot": "{plot}"})
    hashes = [scanned(source)["1"]]
    for change, same in [
        ("revenue = 6", True),
        ("year = 1996", False),
        ("title = 'HEAT'", False),
        ("plot = NULL", False),
    ]:
        execute(database, f"UPDATE things SET {change}")
        hashes.append(scanned(source)["1"])
        assert (hashes[-1] == hashes[-2]) is same
    execute(database, "ALTER TABLE things ADD COLUMN another text DEFAULT 'x'")
    assert scanned(source)["1"] == hashes[-1]


def test_the_row_hash_is_the_same_in_every_version(database):
    execute(database, "CREATE TABLE things (id bigint PRIMARY KEY, title text, n numeric, at timestamptz, tags text[])")
    execute(database, "INSERT INTO things VALUES (1, 'Heat', 12.50, '2024-02-29 12:00+01', '{a,NULL}')")
    found = read(source_of(database, columns=["title", "n", "at", "tags"]), ["1"])["1"]
    assert found.row_json == '{"title":"Heat","n":12.50,"at":"2024-02-29T11:00:00+00:00","tags":["a",null]}'
    assert found.row_hash.hex() == "bc7ac0d05e6ab24a14ab9e9a4f0bff1e"


def test_the_roles_own_settings_change_no_hash(database):
    execute(
        database, "CREATE TABLE things (id timestamptz PRIMARY KEY, title double precision, span interval, raw bytea)"
    )
    execute(database, "INSERT INTO things VALUES ('2024-02-29 12:00+01', 0.1 + 0.2, '1 day 2 hours', '\\xff')")
    source = source_of(database, columns=["title", "span", "raw"], url=database.url)
    before = both_ways(source)
    name = execute(database, "SELECT quote_ident(current_database())")[0][0]
    for setting in ("TimeZone = 'Asia/Tokyo'", "DateStyle = 'German'", "IntervalStyle = 'iso_8601'",
                    "bytea_output = 'escape'", "extra_float_digits = -5", "statement_timeout = 100"):  # fmt: skip
        execute(database, f"ALTER DATABASE {name} SET {setting}")
    assert both_ways(source) == before


def test_json_that_postgresql_cannot_hold_as_jsonb_is_committed_cleaned(database, settings):
    execute(database, "CREATE TABLE things (id bigint PRIMARY KEY, title text, extra json)")
    execute(database, r"""INSERT INTO things VALUES (1, 'Heat', '{"a": "x\u0000y", "b": "\ud800", "n": 1.50}')""")
    one = definition("things", source={"table": "things", "key": "id"}, columns=["extra"], vectors={"base": "{extra}"})
    sync_once(one, settings)
    [(text, payload)] = execute(database, "SELECT text, payload::text FROM embeddings.things")
    assert text == '{"a": "x\ufffdy", "b": "\ufffd", "n": 1.50}'
    assert payload == '{"extra": {"a": "x\ufffdy", "b": "\ufffd", "n": 1.50}}'


def test_a_text_of_a_megabyte_is_read_and_is_committed_whole(database, settings):
    make(database, "bigint", [1])
    execute(
        database, "UPDATE things SET title = (SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, 32000) n)"
    )
    sync_once(
        definition("things", source={"table": "things", "key": "id"}, vectors={"b": "{title}"}, columns=[]), settings
    )
    assert execute(database, "SELECT length(text), text = title FROM embeddings.things, public.things") == [
        (1055999, True)
    ]


TABLES = ["select", "Movies", "odd.name", 'with "quotes"', "100% {x}", "таблица", "a b;--", "source", "seen"]


def test_any_table_in_any_schema_is_read(database):
    execute(database, """CREATE SCHEMA other; CREATE SCHEMA "Odd Schema"; CREATE SCHEMA "a.b" """)
    for schema in ("public", "other", "Odd Schema", "a.b"):
        for table in TABLES:
            name = sql.Identifier(schema, table)
            execute(database, sql.SQL("CREATE TABLE {} (id bigint PRIMARY KEY, title text)").format(name))
            execute(database, sql.SQL("INSERT INTO {} VALUES (1, {})").format(name, sql.Literal(schema + table)))
            quoted = [
                '"{}"'.format(part.replace('"', '""')) if re.search(r'[."]', part) else part for part in (schema, table)
            ]
            assert titles(both_ways(source_of(database, table=".".join(quoted)))) == {"1": schema + table}
            if schema == "public":
                assert titles(both_ways(source_of(database, table=quoted[1]))) == {"1": schema + table}


@pytest.mark.parametrize("name", ["", "a.b.c", 'half "quoted"', ".", "a.", "nul\x00"])
def test_what_is_no_table_name_is_refused(name):
    with pytest.raises(SourceError, match="is not the name of a table"):
        table_identifier(name)


COLUMNS = [
    "order",
    "Primary Title",
    "100%",
    'say "hi"',
    "it's",
    "é🎬",
    "a.b",
    "text",
    "name",
    "source",
    "seen",
    "item_key",
]


def test_any_column_name_is_read_as_key_template_and_payload(database):
    names = sql.SQL(", ").join(sql.Identifier(column) for column in COLUMNS)
    kinds = sql.SQL(", ").join(sql.SQL("{} text NOT NULL").format(sql.Identifier(column)) for column in COLUMNS)
    execute(database, sql.SQL("CREATE TABLE things ({}, PRIMARY KEY ({}))").format(kinds, names))
    execute(database, sql.SQL("INSERT INTO things VALUES ({})").format(sql.SQL(", ").join(map(sql.Literal, COLUMNS))))
    template = " | ".join(f"{{{column}}}" for column in COLUMNS)
    source = source_of(database, key=COLUMNS, columns=COLUMNS, vectors={"base": template}, where="source.text = 'text'")
    [(key, row)] = both_ways(source).items()
    assert json.loads(key) == COLUMNS
    assert json.loads(row.payload_json) == json.loads(row.row_json) == dict(zip(COLUMNS, COLUMNS, strict=True))


def test_values_of_every_type_are_read(database):
    execute(database, "CREATE TYPE pair AS (a int, b text)")
    execute(
        database,
        """CREATE TABLE things AS SELECT 1 AS id, ROW(1, 'x')::pair AS composite, ARRAY[[1,2],[3,4]] AS nested,
           '[1,5)'::int4range AS range, 'a b'::tsvector AS words, point(1,2) AS point, '\\x00'::bytea AS raw,
           'NaN'::float AS nan, '1 day'::interval AS span, ARRAY[ROW(1,'x')::pair] AS pairs, NULL::text AS nothing""",
    )
    names = [
        row[0]
        for row in execute(
            database, "SELECT attname FROM pg_attribute WHERE attrelid = 'things'::regclass AND attnum > 1"
        )
    ]
    source = source_of(database, columns=names, vectors={"base": " ".join(f"{{{name}}}" for name in names)})
    [found] = both_ways(source).values()
    row = json.loads(found.payload_json)
    assert row["composite"] == {"a": 1, "b": "x"} and row["pairs"] == [{"a": 1, "b": "x"}]
    assert (row["nested"], row["range"], row["nan"], row["nothing"]) == ([[1, 2], [3, 4]], "[1,5)", "NaN", None)


@pytest.mark.parametrize("kind", ["real", "double precision", "numeric", "share"])
def test_nan_is_empty_in_a_text_and_a_word_only_where_it_is_text(database, kind):
    execute(database, "CREATE DOMAIN share AS double precision")
    numbers = "double precision" if kind == "share" else kind
    execute(
        database,
        f"""CREATE TABLE things AS SELECT n AS id, v::{kind} AS rating, ARRAY[v, '1', NULL]::{numbers}[] AS ratings,
            ARRAY[[v]]::{numbers}[] AS nested, v AS title FROM (VALUES (1, 'NaN'), (2, '0.5')) AS row (n, v)""",
    )
    vectors = {"base": "Rating: {rating} | All: {ratings} | Nested: {nested} | {title}"}
    source = source_of(database, columns=["rating"], vectors=vectors)
    rows = both_ways(source)
    template = source.definition.templates["base"]
    texts = {key: template.render(parse_row(row.row_json)) for key, row in rows.items()}
    assert texts == {"1": "All: 1 | NaN", "2": "Rating: 0.5 | All: 0.5, 1 | Nested: 0.5 | 0.5"}
    assert json.loads(rows["1"].payload_json) == {"rating": "NaN"}


def test_a_table_of_many_columns_is_read(database):
    execute(database, f"CREATE TABLE things AS SELECT 1 AS id, {', '.join(f'{n} AS c{n}' for n in range(300))}")
    source = source_of(database, columns=[f"c{n}" for n in range(300)], vectors={"base": "{c1}"})
    assert len(json.loads(both_ways(source)["1"].payload_json)) == 300


def test_views_materialized_views_and_partitioned_tables_are_sources(database):
    execute(database, "CREATE TABLE base (id bigint PRIMARY KEY, title text) PARTITION BY RANGE (id)")
    execute(database, "CREATE TABLE base_1 PARTITION OF base FOR VALUES FROM (0) TO (10)")
    execute(database, "INSERT INTO base VALUES (1, 'Heat')")
    execute(database, "CREATE VIEW seen AS SELECT id, upper(title) AS title FROM base")
    execute(database, "CREATE MATERIALIZED VIEW kept AS SELECT * FROM seen")
    found = [titles(both_ways(source_of(database, table=name)))["1"] for name in ("base", "seen", "kept")]
    assert found == ["Heat", "HEAT", "HEAT"]


def test_an_empty_table_has_no_rows(database):
    make(database, "bigint", [])
    assert scanned(source_of(database)) == {}


CONDITIONS = [
    "title LIKE '%a%'", "title = 'it''s 100%'", "title <> '{}'", "source.id = 1 OR id = 2", "true -- all of them",
    "true /* all */", "id IN (1,\n2) -- these\n", "true;", "title <> ';--'", "  ",
]  # fmt: skip


def test_any_condition_is_taken_as_it_is(database):
    execute(database, "CREATE TABLE things (id bigint PRIMARY KEY, title text)")
    execute(database, "INSERT INTO things VALUES (1, 'a'), (2, 'it''s 100%'), (3, 'b')")
    for where in CONDITIONS:
        condition = where.strip().rstrip(";") or "true"
        expected = execute(database, f"SELECT id::text FROM things AS source WHERE {condition}")
        assert set(both_ways(source_of(database, where=where))) == {row[0] for row in expected}, where


QUERIES = [
    "SELECT id, title FROM things",
    "SELECT id, title FROM things;",
    "SELECT id, title FROM things ; -- that is all; really\n",
    "SELECT id, title FROM things -- no semicolon; here",
    "SELECT id, title FROM things /* one; */ ; /* two */ ;",
    "WITH x AS (SELECT * FROM things) SELECT id, title FROM x ORDER BY title LIMIT 100",
    "SELECT id, title FROM things WHERE title <> ';--' AND title LIKE '%' AND title <> '{x}'",
    "SELECT id, title FROM things WHERE title <> $q$;'--$q$ AND title <> E'\\';--'",
    "TABLE things",
]


def test_a_query_may_end_as_people_end_them(database):
    make(database, "bigint", [1])
    for query in QUERIES:
        assert list(both_ways(source_of(database, query=query))) == ["1"], query


def test_a_source_is_never_written_to(database):
    make(database, "bigint", [1])
    execute(database, "CREATE FUNCTION wipe() RETURNS bigint LANGUAGE sql AS 'DELETE FROM things RETURNING id'")
    with pytest.raises(SourceError, match="read-only transaction"):
        scanned(source_of(database, query="SELECT wipe() AS id, 'x' AS title"))
    assert execute(database, "SELECT count(*) FROM things") == [(1,)]
