"""Reading any table or query: every type of key, odd names, and one line for what cannot be read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.config.templates import parse_row
from embeddings_pipeline.errors import PipelineError, SourceError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.source_sql import table_identifier
from embeddings_pipeline_tests.support.databases import as_role
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once

ODD_KEYS = [
    "plain", "", " ", "it's", 'say "hi"', "a\nb", "a\tb", "a\rb", "100%", "%s %(x)s", "a:b", "a\\b", "\\N", "\\", "{}",
    "{key}", "🎬", "שלום", "ﷺ", "𠜎𠜱", "a,b", '["a"]', "NULL", "null", "\u2028", "e\u0301", "\x01\x1f\x7f",
    "; DROP TABLE x --",
]  # fmt: skip


def source_of(
    database: Database, *, table: str | None = "things", key: Sequence[str] = ("id",), **options: Any
) -> Source:
    """A source over `table` with the template {title} and the payload column title, unless said otherwise."""
    attributes = {"columns": ["title"], "vectors": {"base": "{title}"}}
    attributes |= {name: options.pop(name) for name in ("columns", "vectors") if name in options}
    source = {"key": list(key), **({"table": table} if "query" not in options else {}), **options}
    return Source(definition("things", source=source, **attributes), database)


class SourceRow(NamedTuple):
    """One row of what `Source.read` gives."""

    item_key: str
    row_hash: bytes
    row_json: str
    payload_json: str


def scanned(source: Source) -> dict[str, bytes]:
    with source.connect() as connection:
        parts = [rows.hashes.to_pydict() for rows in source.scan(connection)]
    return {key: row_hash for part in parts for key, row_hash in zip(*part.values(), strict=True)}


def read(source: Source, keys: Sequence[str]) -> dict[str, SourceRow]:
    with source.connect() as connection:
        columns = source.read(connection, keys).table.to_pydict().values()
    return {row[0]: SourceRow(*row) for row in zip(*columns, strict=True)}


def both_ways(source: Source) -> dict[str, SourceRow]:
    """All rows, read by the keys that a scan found: with the same hashes, or the test fails."""
    hashes = scanned(source)
    rows = read(source, list(hashes))
    assert {key: row.row_hash for key, row in rows.items()} == hashes
    return rows


def titles(rows: dict[str, SourceRow]) -> dict[str, Any]:
    return {key: json.loads(row.payload_json)["title"] for key, row in rows.items()}


def make(database: Database, key: str, keys: Sequence[Any]) -> None:
    """The table `things`, anew, with a key of that type, and a title that tells which row it is."""
    execute(
        database, f"DROP TABLE IF EXISTS things; CREATE TABLE things (id {key} PRIMARY KEY, title text, other text)"
    )
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO things VALUES (%s::text::{key}, %s)", [(k, repr(k)) for k in keys])


# --- keys --------------------------------------------------------------------------------------------------------


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


# --- what a hash covers ------------------------------------------------------------------------------------------


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
                    "bytea_output = 'escape'", "extra_float_digits = -5", "statement_timeout = 1"):  # fmt: skip
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


# --- tables and columns with odd names ---------------------------------------------------------------------------


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


# --- views, queries, where ---------------------------------------------------------------------------------------


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


# --- what cannot be read -----------------------------------------------------------------------------------------


def refused(source: Source) -> str:
    with pytest.raises(PipelineError) as error, source.connect() as connection:
        source.check(connection)
        list(source.scan(connection))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_is_not_there_is_named_with_what_was_meant(database):
    make(database, "bigint", [1])
    execute(database, "CREATE SCHEMA other; CREATE TABLE other.people (id int)")
    for options, says in [
        ({"table": "thing"}, ["does not exist", "did you mean 'things'", "correct", "`source:`"]),
        ({"table": "other.peple"}, ["did you mean 'other.people'"]),
        ({"table": "zzz"}, ['"zzz" does not exist', "embeddings-pipeline load FILE --table zzz"]),
        ({"key": ["ide"]}, ["`source.key:` names a column 'ide'", "did you mean 'id'"]),
        ({"columns": ["tilte"]}, ["`columns:` names a column 'tilte'", "did you mean 'title'"]),
        ({"updated_at": "updated"}, ["`source.updated_at:` names a column 'updated'"]),
        ({"vectors": {"plot": "{title.__class__}"}}, ["template `plot:`", "'title.__class__'", "did you mean 'title'"]),
        ({"vectors": {"base": "{0}"}}, ["template `base:`", "names a column '0'"]),
        ({"vectors": {"base": "{title!r}"}}, ["'title!r'", "did you mean 'title'"]),
        ({"vectors": {"base": "{title:>10}"}}, ["'title:>10'", "did you mean 'title'"]),
        ({"vectors": {"base": "{to_json}"}}, ["names a column 'to_json'"]),
        ({"where": "removed = false"}, ['column "removed" does not exist', "`source:`"]),
        ({"where": "id = 'x'"}, ["invalid input syntax", "`source:`"]),
        ({"where": "id = "}, ["syntax error", "`source:`"]),
        ({"query": "SELECT id, t.title FROM things"}, ["missing FROM-clause entry"]),
        ({"query": "SELECT id, ttle AS title FROM things"}, ['"ttle" does not exist', "things.title"]),
        ({"query": "SELECT id, title, title FROM things"}, ["title", "ambiguous"]),
        ({"query": "DELETE FROM things RETURNING *"}, ["syntax error"]),
    ]:  # fmt: skip
        message = refused(source_of(database, **options))  # type: ignore[arg-type]
        assert message.startswith("collection 'things': "), message
        for part in says:
            assert part in message, message


@pytest.fixture
def reader(superuser, database):
    """A role with no rights, and the URL to log in with it."""
    name = execute(database, "SELECT 'reader_' || substr(md5(random()::text), 1, 8)")[0][0]
    execute(database, f"CREATE ROLE {name} LOGIN PASSWORD 'pw/@:%'")
    yield name, as_role(database, name, "pw/@:%").url
    execute(database, f"DROP OWNED BY {name}")
    execute(database, f"DROP ROLE {name}")


def test_a_role_without_rights_is_told_what_to_grant(database, reader):
    name, url = reader
    make(database, "bigint", [1])
    source = source_of(database, url=url)
    assert "permission denied for table things; GRANT SELECT on it" in refused(source)
    execute(database, f"GRANT SELECT (id) ON things TO {name}")
    assert "permission denied" in refused(source)
    execute(database, f"GRANT SELECT (title) ON things TO {name}")
    assert list(both_ways(source)) == ["1"]  # `other` is never read


def test_another_database_is_read_by_its_url_with_what_the_environment_holds(database, server, monkeypatch, tmp_path):
    execute(server, "DROP TABLE IF EXISTS public.elsewhere")
    execute(server, "CREATE TABLE public.elsewhere AS SELECT 1 AS id, 'Heat' AS title")
    source = source_of(
        database, table="elsewhere", url=server.url.replace("postgresql://", "postgresql+psycopg://${WHO}", 1)
    )
    source = source_of(database, table="elsewhere", url="${SOURCE_URL}")
    monkeypatch.delenv("SOURCE_URL", raising=False)
    assert "`source.url:` names ${SOURCE_URL}, which is not set; export it or put it in .env" in refused(source)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / ".env").write_text(f"SOURCE_URL={server.url}\n")
    assert titles(both_ways(source)) == {"1": "Heat"}
    monkeypatch.setenv("SOURCE_URL", server.url.replace("postgresql://", "postgres://"))
    assert titles(both_ways(source)) == {"1": "Heat"}


URLS = [
    "postgresql://user:hunter2@127.0.0.1:1/db",
    "postgresql://user:hun/ter2@127.0.0.1:1/db",
    "postgresql://user:hun@ter2@127.0.0.1:1/db",
    "postgresql://user:hunter2@127.0.0.1:port/db",
    "postgresql://user:hunter2@/db?host=/nowhere",
    "postgresql://user:hunter2@no-such-host.invalid/db",
    "mysql://user:hunter2@127.0.0.1/db",
    "host=127.0.0.1 port=1 password=hunter2",
    "postgresql://user:hunter2@127.0.0.1:1/db?nonsense=1",
]


def test_a_url_that_does_not_answer_is_one_line_without_its_password(database):
    for url in URLS:
        message = refused(source_of(database, url=url))
        assert message.startswith("collection 'things': ")
        assert "`source.url:`" in message
        assert "ter2" not in message


def test_a_database_that_is_not_there_is_named(database, reader):
    _, url = reader
    message = refused(source_of(database, url=url.replace("test_", "no_such_database_")))
    assert "does not exist" in message and "check the URL" in message and "pw" not in message


def test_a_wrong_password_is_one_line_without_it(database, reader):
    name, url = reader
    hba = Path(execute(database, "SHOW hba_file")[0][0])
    before = hba.read_text()
    try:
        hba.write_text(f"local all {name} scram-sha-256\n{before}")
        execute(database, "SELECT pg_reload_conf()")
        make(database, "bigint", [1])
        execute(database, f"GRANT SELECT ON things TO {name}")
        assert list(both_ways(source_of(database, url=url))) == ["1"]
        message = refused(source_of(database, url=url.replace("pw%2F", "hunter2%2F")))
        assert "password authentication failed" in message and "check the URL" in message
        assert "hunter2" not in message
    finally:
        hba.write_text(before)
        execute(database, "SELECT pg_reload_conf()")


def test_an_error_of_the_pipelines_own_database_is_not_blamed_on_the_source(database):
    reading = source_of(database, url=database.url).connect()
    with pytest.raises(psycopg.errors.DivisionByZero), reading, database.connect() as own:
        own.execute("SELECT 1/0")
