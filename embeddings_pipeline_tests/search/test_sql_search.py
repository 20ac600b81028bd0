"""`embeddings.hybrid_search` finds what a hybrid search of the library finds whose words PostgreSQL looks up."""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import psycopg
import pytest
import simplejson
from pgvector import Vector
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.terms import query_words, stop_words_of
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.hits import Hit, exact_cursor
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import current_model
from embeddings_pipeline_tests.search.test_where import COLUMNS, FILTERS, MEANINGS, MISTAKES
from embeddings_pipeline_tests.search.test_words import BAD, TYPED, without_files
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.databases import as_role, name_of
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import PROFILE, by_name, definition, execute, make_films, sync_once

CALL = "SELECT * FROM embeddings.hybrid_search('films', %s, %s, %s, %s, %s, %s)"
KINDS: dict[str, dict[str, Any]] = {
    "table": {"vectors": {"base": "{overview}"}},
    "two vectors": {"vectors": {"base": "{overview}", "title": "{title}"}, "storage": "vector"},
    "chunks": {"vectors": {"base": "{overview}"}, "chunk": {"characters": 60}},
    "column": {
        "vectors": {"base": "{overview}"},
        "profile": None,
        "profiles": by_name(PROFILE),
        "destination": {"table": "films", "column": "embedding", "profile": "test"},
    },
}
WORDS = [
    "lamp",
    "sea",
    "cold",
    "walruses",
    "B-52",
    "O'Brien",
    "running",
    "кошки",
    "the",
    "of",
    "Gundam",
    "café",
    "story",
]


def made(database: Database, settings: Settings, **attributes: Any) -> Collection:
    """120 films, each column with NULLs, some long texts; synced, with the indexes that filters and words have."""
    chance = random.Random(7)
    texts = [" ".join(chance.choices(WORDS, k=chance.choice((3, 6, 40)))) for _ in range(120)]
    films = [(n, chance.choice(WORDS), text, n * 10) for n, text in enumerate(texts, 1)]
    make_films(database, films)
    execute(database, "ALTER TABLE films ADD seen boolean, ADD shown timestamptz, ADD genres text, ADD tags text[]")
    execute(database, "ALTER TABLE films ADD plain text, ADD embedding halfvec(32)")
    execute(
        database,
        """UPDATE films SET seen = id % 2 = 0, shown = '2020-01-01 00:00+00'::timestamptz + id * interval '1 day',
           genres = CASE id % 4 WHEN 0 THEN 'Drama, Crime' WHEN 1 THEN 'Drama' WHEN 2 THEN 'Comedy' ELSE '' END,
           tags = ARRAY['all', 'n' || id % 3]""",
    )
    execute(database, f"UPDATE films SET {', '.join(f'{column} = NULL' for column in FILTERS)} WHERE id % 10 = 0")
    return indexed(database, settings, definition(**{**shape(), **attributes}))


def shape() -> dict[str, Any]:
    return {"columns": COLUMNS, "filters": FILTERS, "words": {}, "items_per_batch": 5000}


def indexed(database: Database, settings: Settings, one: CollectionDefinition) -> Collection:
    collection, _ = sync_once(one, settings)
    ensure_filters(database, one)
    ensure_words(database, one)
    return collection


@pytest.fixture
def films(database: Database, settings: Settings) -> Collection:
    return made(database, settings, **KINDS["table"])


def vector_of(database: Database, one: CollectionDefinition, query: str) -> tuple[str, str]:
    """A query's vector, as another program would have it, and its fingerprint."""
    with database.connect(autocommit=True) as connection:
        model = current_model(connection, one)
    assert model is not None
    vector = DeterministicEncoder(model.profile).encode_queries([query])[0]
    return Vector(vector).to_text(), model.destination.fingerprint


def by_sql(
    database: Database, one: CollectionDefinition, query: str, k: int, where: Any = None, vectors: Any = None
) -> list[Hit]:
    given = where if where is None else simplejson.dumps(where, use_decimal=True, default=as_json)
    with database.connect(autocommit=True) as connection, exact_cursor(connection) as cursor:
        rows = cursor.execute(CALL, [*vector_of(database, one, query), query, k, given, vectors]).fetchall()
    return [Hit(key, score, payload, *others) for key, score, payload, *others in rows]


def as_json(value: Any) -> Any:
    if isinstance(value, Fraction):
        return Decimal(value.numerator) / value.denominator
    return value.item() if isinstance(value, np.generic) else str(value)


def chosen(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A condition at random."""
    if depth < 3 and chance.random() < 0.4:
        word = chance.choice(["and", "or", "not"])
        several = [chosen(chance, depth + 1) for _ in range(chance.randrange(4))]
        return {"not": chosen(chance, depth + 1)} if word == "not" else {word: several}
    column = chance.choice(list(FILTERS))
    values: dict[str, Callable[[], Any]] = {
        "revenue": lambda: chance.choice([chance.randrange(1300), chance.random() * 1300, -1]),
        "title": lambda: chance.choice([*WORDS, "no title's"]),
        "seen": lambda: chance.random() < 0.5,
        "shown": lambda: str(datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=chance.randrange(130))),
        "genres": lambda: chance.choice(["Drama", " Crime\n", "Comedy", "none"]),
        "tags": lambda: chance.choice(["all", "n0", "n1", "n2"]),
    }
    operators = {"title": ["eq", "ne", "any"], "seen": ["eq", "ne"], "genres": ["eq", "ne", "any", "all"]}
    operators["tags"] = operators["genres"]
    operator = chance.choice(operators.get(column, ["eq", "ne", "gt", "gte", "lt", "lte", "any"]))
    value = values[column]
    if operator in ("any", "all"):
        return {column: {operator: [value() for _ in range(chance.randrange(4))]}}
    if operator in ("eq", "ne") and chance.random() < 0.2:
        return {column: {operator: None}}
    return {column: value()} if operator == "eq" and chance.random() < 0.5 else {column: {operator: value()}}


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_same_in_the_same_order_with_the_same_scores(
    database: Database, settings: Settings, kind: str
) -> None:
    one = made(database, settings, **KINDS[kind]).definition
    elsewhere, chance = without_files(settings), random.Random(kind)
    names = list(one.attributes.vectors)
    for number in range(60):
        query = " ".join(chance.choices([*WORDS, "unheard", "run"], k=chance.randrange(1, 5)))
        k, where = chance.choice([1, 3, 10, 60, 1000]), chosen(chance) if number % 4 else None
        vectors = chance.choice([None, names[-1:], names])
        expected = search(one, elsewhere, query, k=k, where=where, vectors=vectors)
        assert [leg.answered_by for leg in expected.explanation.legs][-1] == "tsvector"
        assert by_sql(database, one, query, k, where, vectors) == list(expected), (query, k, where, vectors)


def test_each_condition_means_what_it_means_in_python(
    database: Database, settings: Settings, films: Collection
) -> None:
    for where, _ in MEANINGS:
        expected = search(films.definition, without_files(settings), "lamp", k=200, where=where)
        assert by_sql(database, films.definition, "lamp", 200, where) == list(expected), where


@pytest.mark.parametrize("shown", ["20200105", "2020-01-05T01", "2020-01-05 01:02", "2020-01-05T01:02:03.1234567Z",
                                   "2020-01-05T010203,5+0530", " 2020-01-05T01:02+01:00:30 "])  # fmt: skip
def test_times_are_read_as_in_python(database: Database, settings: Settings, films: Collection, shown: str) -> None:
    execute(database, "UPDATE films SET shown = '2020-01-05T01:02:03.123456Z' WHERE id = 50")
    sync_once(films.definition, settings)
    for operator in ("eq", "lt", "gt"):
        where = {"shown": {operator: shown}}
        expected = search(films.definition, without_files(settings), "lamp", k=200, where=where)
        assert by_sql(database, films.definition, "lamp", 200, where) == list(expected)


def refused(database: Database, *arguments: Any) -> psycopg.errors.Diagnostic:
    """What a search that cannot be is told: one line and a hint."""
    with database.connect(autocommit=True) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(CALL, arguments)
    told = caught.value.diag
    assert told.message_primary and told.message_hint
    assert "\n" not in told.message_primary and len(told.message_primary) < 400
    return told


def test_a_condition_that_cannot_be_is_told_with_a_hint(database: Database, films: Collection) -> None:
    vector, fingerprint = vector_of(database, films.definition, "lamp")
    for where, _ in MISTAKES:
        if where in ({"title": "a\0b"}, {3: 3}, {"revenue": 10**5000}) or "nan" in str(where):  # which no JSON says
            continue
        told = refused(database, vector, fingerprint, "lamp", 3, simplejson.dumps(where), None)
        assert told.sqlstate == "22023" and "where: " in (told.message_primary or ""), where
    refused(database, vector, fingerprint, "lamp", 3, '{"revenue": 1e5000}', None)
    told = refused(database, vector, fingerprint, "lamp", 3, '{"revenu": 1}', None)
    assert told.message_primary == 'collection films: where: there is no filter "revenu"'
    assert "revenue (number)" in (told.message_hint or "")
    told = refused(database, vector, fingerprint, "lamp", 3, '{"revenue": {"gte": "2000"}}', None)
    assert told.message_primary == 'collection films: where: "revenue" is a number, and "2000" is none'
    deep = '{"not": ' * 3000 + '{"revenue": 1}' + "}" * 3000
    assert "20 deep" in str(refused(database, vector, fingerprint, "lamp", 3, deep, None).message_primary)


def test_arguments_that_cannot_be_are_told_with_a_hint(database: Database, films: Collection) -> None:
    vector, fingerprint = vector_of(database, films.definition, "lamp")
    rest = ("lamp", 3, None, None)
    for arguments, state, told in (
        ((vector, fingerprint, "lamp", 0, None, None), "22023", "k cannot be 0"),
        ((vector, fingerprint, "lamp", 10_000, None, None), "22023", "k cannot be 10000"),
        ((vector, fingerprint, "lamp", None, None, None), "22023", "k cannot be NULL"),
        ((vector, fingerprint, None, 3, None, None), "22023", "text cannot be NULL"),
        ((vector, None, *rest), "22023", "fingerprint cannot be NULL"),
        ((None, fingerprint, *rest), "22023", "vector cannot be NULL"),
        ((vector, fingerprint, " \n\u200b", 3, None, None), "22023", "the text is blank"),
        (("[1,2,3]", fingerprint, *rest), "22023", "the vector has 3 dimensions, and the model 32"),
        ((str([0] * 32), fingerprint, *rest), "22023", "the vector is zero"),
        ((vector, "another", *rest), "EMB01", "model another is not the current one"),
        ((vector, "x'; DROP TABLE films; --", *rest), "EMB01", "is not the current one"),
        ((vector, fingerprint, "lamp", 3, None, ["base", "titel"]), "22023", "it has no vector titel"),
        ((vector, fingerprint, "lamp", 3, None, [None]), "22023", "it has no vector"),
    ):
        diagnostic = refused(database, *arguments)
        assert told in str(diagnostic.message_primary) and diagnostic.sqlstate == state
    with database.connect(autocommit=True) as connection, pytest.raises(psycopg.Error) as error:
        connection.execute(CALL.replace("films", "nobody"), (vector, fingerprint, *rest))
    assert error.value.sqlstate == "22023"
    assert "collection nobody: there is no such collection" in str(error.value.diag.message_primary)


def test_any_text_is_answered_as_in_python(database: Database, settings: Settings) -> None:
    make_films(database, [(n, f"Film {n}", text, n) for n, text in TYPED.items()])
    one = indexed(database, settings, definition(vectors={"base": "{overview}"}, words={})).definition
    elsewhere = without_files(settings)
    for query in [*(text for text in BAD.values() if "\0" not in text), *TYPED.values(), "the of", "B-52's AT&T"]:
        expected = search(one, elsewhere, query, k=5)
        assert by_sql(database, one, query, 5) == list(expected) and len(expected) == 5, query
        words = one.attributes.words
        assert words is not None
        [(found,)] = execute(database, "SELECT embeddings.query_words(%s, %s)", [query, sorted(stop_words_of(words))])
        assert found == query_words(query, words)


def test_nothing_that_is_asked_becomes_a_part_of_a_statement(database: Database, settings: Settings) -> None:
    odd = """50% off "{x}" 'é' $1 \\ %(k)s"""
    make_films(database, [(n, f"Film '{n}'\\", f"lamp {n}", n) for n in range(30)])
    execute(database, sql.SQL("ALTER TABLE films RENAME revenue TO {}").format(sql.Identifier(odd)))
    filters = {odd: "number", "title": "text"}
    one = definition(columns=["title", odd], filters=filters, vectors={"base": "{overview}"}, words={})
    one = indexed(database, settings, one).definition
    assert {hit.item_key for hit in by_sql(database, one, "lamp", 10, {odd: {"gte": 27}})} == {"27", "28", "29"}
    for title in ("Film '3'\\", "'", "\\'; DROP TABLE films; --", "$1", "%s %I"):
        hits = by_sql(database, one, "lamp", 10, {"title": [title, "Film '4'\\"]})
        assert {hit.item_key for hit in hits} == ({"3", "4"} if title.startswith("Film") else {"4"})
    vector, fingerprint = vector_of(database, one, "lamp")
    for where in ({"title') OR true --": "x"}, {odd: {"gte) OR true --": 1}}):
        refused(database, vector, fingerprint, "lamp", 3, simplejson.dumps(where), None)


def test_until_the_words_are_there_vectors_answer_alone(database: Database, settings: Settings) -> None:
    make_films(database, [(n, "", text, n) for n, text in TYPED.items()])
    one = definition(vectors={"base": "{overview}"}, words={})
    sync_once(one, settings)
    told: list[str | None] = []
    with database.connect(autocommit=True) as connection:
        connection.add_notice_handler(lambda diagnostic: told.append(diagnostic.message_primary))
        asked = [*vector_of(database, one, "Gundam"), "Gundam", 3, None, None]
        rows = connection.execute(CALL, asked).fetchall()
    assert [row[:2] for row in rows] == [(hit.item_key, hit.score) for hit in search(one, settings, "Gundam", k=3)]
    assert told == ["collection films: the words of its texts are not in PostgreSQL yet: vectors alone answer"]


def test_what_is_searched_by_follows_the_definition(database: Database, settings: Settings, films: Collection) -> None:
    vector, fingerprint = vector_of(database, films.definition, "lamp")
    fewer: dict[str, Any] = {"columns": COLUMNS, "vectors": {"base": "{overview}"}, "items_per_batch": 5000}
    changed = definition(**fewer, words={"fusion": {"k": 1, "weights": {"text": 3}}, "stop_words": ["lamp"]})
    sync_once(changed, settings)
    assert by_sql(database, changed, "lamp sea", 5) == list(search(changed, without_files(settings), "lamp sea", k=5))
    assert "no filter" in str(refused(database, vector, fingerprint, "lamp", 3, '{"revenue": 1}', None).message_primary)
    sync_once(definition(**fewer), settings)
    assert "no lexical index" in str(refused(database, vector, fingerprint, "lamp", 3, None, None).message_primary)
    execute(database, "DELETE FROM embeddings.search_definition")  # as after an upgrade
    assert "not in the database yet" in str(refused(database, vector, fingerprint, "x", 3, None, None).message_primary)
    sync_once(films.definition, settings)
    assert len(by_sql(database, films.definition, "lamp", 5, {"revenue": {"gte": 50}})) == 5


def test_vectors_of_any_length_ask_the_same(database: Database, settings: Settings, films: Collection) -> None:
    vector, fingerprint = vector_of(database, films.definition, "lamp")
    keys = []
    for factor in (1, 1e-30, 1e30, 1e-6, 1e6):
        longer = str([float(number) * factor for number in vector.strip("[]").split(",")])
        rows = execute(database, CALL, [longer, fingerprint, "lamp", 10, None, None])
        keys.append({row[0] for row in rows})
    assert all(each == keys[0] for each in keys)


@pytest.fixture
def reader(database: Database) -> Iterator[Database]:
    """A role that may read what the reference says, and no more."""
    if not databases.rights(database).superuser:
        pytest.skip("the role of EMBEDDINGS_TESTS_DATABASE_URL may not make roles")
    name = f"reader_{name_of(database)}"
    execute(database, f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
    try:
        yield as_role(database, name, name)
    finally:
        execute(database, f"DROP OWNED BY {name}")
        execute(database, f"DROP ROLE {name}")


def test_who_may_read_the_tables_may_search(
    database: Database, settings: Settings, films: Collection, reader: Database
) -> None:
    asked = [*vector_of(database, films.definition, "lamp"), "lamp", 3, '{"revenue": {"gte": 50}}', None]
    name, table = f"reader_{name_of(database)}", films.model.destination.name
    execute(database, f"GRANT USAGE ON SCHEMA embeddings TO {name}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(reader, CALL, asked)
    tables = f"embeddings.films_item, embeddings.films_text, embeddings.films_text_words, embeddings.{table}"
    execute(database, f"GRANT SELECT ON {tables} TO {name}")
    assert execute(reader, CALL, asked) == execute(database, CALL, asked)
    with reader.connect() as connection:  # also in a transaction that only reads
        connection.read_only = True
        assert len(connection.execute(CALL, asked).fetchall()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ivfflat", "hnsw"])
def test_many_are_asked_by_an_index_and_as_many_found_as_match(
    database: Database, settings: Settings, method: str
) -> None:
    make_films(database, [(1, "Film", "a lamp", 1)])
    index = {"method": method, "m": 4, "ef_construction": 16} if method == "hnsw" else {"method": method}
    one = definition(vectors={"base": "{overview}"}, filters={"revenue": "number"}, words={}, index=index)
    collection = indexed(database, settings, one)
    table = collection.model.destination
    execute(
        database,
        """INSERT INTO embeddings.films_item (item_key, batch, seen_hash, committed_hash, payload)
           SELECT n, 0, 'x', 'x', jsonb_build_object('title', '', 'revenue', n % 1000)
           FROM generate_series(2, 80000) AS n""",
    )
    execute(
        database,
        """INSERT INTO embeddings.films_text (item_key, vector_name, chunk, content_hash, text, blank)
           SELECT n, 'base', 0, 'x', CASE WHEN n % 50 = 0 THEN 'a lamp' ELSE 'another' END, false
           FROM generate_series(2, 80000) AS n""",
    )
    insert = """INSERT INTO {} SELECT text.id, 'base', 'x', (
                  SELECT array_agg(sin(text.id * number))::vector::halfvec FROM generate_series(1, 32) AS number)
                FROM embeddings.films_text AS text WHERE text.id NOT IN (SELECT text_id FROM {})"""
    execute(database, sql.SQL(insert).format(table.identifier, table.identifier))
    ensure_index(database, table, one.attributes.index, ["base"])
    with database.connect(autocommit=True) as connection:
        connection.execute("ANALYZE")
    elsewhere = without_files(settings)
    ways = set()
    for below, there in ((1, 80), (5, 401), (100, 8001), (1001, 80_000)):
        for k in (10, 200):
            where = {"revenue": {"lt": below}}
            expected = search(one, elsewhere, "a lamp", k=k, where=where)
            ways.add(expected.explanation.legs[0].how)
            found = by_sql(database, one, "a lamp", k, where)
            assert found == list(expected) and len(found) == min(k, there), (below, k)
    assert ways == {"all that match compared", f"{method} index"}
    assert by_sql(database, one, "a lamp", 10) == list(search(one, elsewhere, "a lamp"))
    with database.connect() as connection:  # what the function sets for itself is over with it
        settings_before = connection.execute("SELECT name, setting FROM pg_settings").fetchall()
        connection.execute(CALL, [*vector_of(database, one, "a lamp"), "a lamp", 10, None, None])
        after: dict[str, str] = dict(connection.execute("SELECT name, setting FROM pg_settings").fetchall())
        assert {name: after[name] for name, _ in settings_before} == dict(settings_before)
