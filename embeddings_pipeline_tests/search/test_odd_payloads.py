"""Odd values of a payload meet the same conditions in PostgreSQL, in SQL's own function and in the published files."""

import random
from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.search.test_from_files import gone
from embeddings_pipeline_tests.search.test_sql_search import by_sql
from embeddings_pipeline_tests.support.workbench import definition, execute, make_films, sync_once

ODD = [
    *(
        None,
        "",
        " ",
        "0",
        "-0",
        "5",
        " 5",
        "5 ",
        "+5",
        "-5",
        "1e2",
        "1E+02",
        "1e100",
        "1e-100",
        ".5",
        "5.",
        "5.0",
        "0x10",
    ),
    *(
        "NaN",
        "Infinity",
        "-infinity",
        "infinity",
        "٣",
        "５",
        "1_000",
        "9" * 400,
        "9" * 501,
        "1e99",
        "1e999",
        "--5",
        "5e",
    ),
    *("true", "True", "t", "false", "FALSE", "1", "yes", "null"),
    *("2020-01-01", "2020-01-01 10:00", "2020-01-01T10:00:00Z", "2020-01-01T10:00:00+02", "2020-01-01T10:00:00+02:30"),
    *(
        "2020-01-01T24:00:00",
        "2020-13-01",
        "2020-02-30",
        "20200101",
        "2020-W01-1",
        "2020-01-01T10",
        "2020-01-01 10:00:60",
    ),
    *(
        "2020-01-01T10:00:00.123456789",
        "2020-01-01T10:00:00,5",
        " 2020-01-01",
        "2020-01-01 ",
        "today",
    ),
    *("0001-01-01", "0000-01-01", "9999-12-31T23:59:59.999999", "9999-12-31T23:59:59-10", "10000-01-01", "2020-1-1"),
    *("2020-01-01 BC", "2020-01-01T10:00:00 +02", "2020-01-01 10:00:00 UTC", "2020-01-01 10:00:00+02:30:15", "now"),
    *("2020-01-01t10:00:00z", "2020-01-01T10:00+0200", "2020-01-01\n", "2020-01-01T25:00"),
    *("a,b", "a, b ,c", ",", ",,a", "a\tb, \u00a0c", "\u3000a", "x" * 501, "x" * 500 + ",b", " a", "A", "ä", "a\u0308"),
]
JSON = [
    *(
        "1",
        "1.0",
        "1.10",
        "1e2",
        "12345678901234567890123",
        "0.1",
        "-0",
        "true",
        "false",
        "null",
        '"5"',
        '"a"',
        "[]",
        "{}",
    ),
    *('["a", "b"]', "[1, 2.50]", "[true, null]", '[["a"]]', '[{"a": 1}]', '{"a": "b"}', '" a "', '["a ", ""]', "1e-7"),
    *('"2020-01-01"', "20200101", '["2020-01-01"]', '["1e2", 100]', "[1e2]", "[0.10]", '[{"b": [1, "ü"], "a": null}]'),
]
KINDS = ["number", "text", "boolean", "timestamp", "texts", {"type": "texts", "separator": ","}]
FILTERS = {f"{column}{n}": kind for n, kind in enumerate(KINDS) for column in ("t", "j")}
OPERANDS: dict[str, list[Any]] = {
    "number": [0, 5, -5, 0.5, 100, 1e99, 1, 1.1, 20200101, 16],
    "text": [
        "5",
        "",
        " ",
        "true",
        "a",
        "1.0",
        "1.10",
        "1E+2",
        "100",
        "0.1",
        "0.0000001",
        " a ",
        "null",
        "12345678901234567890123",
    ],
    "boolean": [True, False],
    "timestamp": [
        "2020-01-01",
        "2020-01-01T10:00:00Z",
        "2020-01-01T08:00Z",
        "2020-01-02",
        "0001-01-01",
        "9999-12-31T23:59:59.999999Z",
    ],
    "texts": [
        "a",
        "b",
        "c",
        "a ",
        "\u00a0c",
        "1",
        "2.5",
        "2.50",
        "true",
        "",
        "ä",
        "100",
        "1e2",
        "0.10",
        "0.1",
        '["a"]',
        '{"a": 1}',
        "x" * 500,
    ],
}


def condition(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    if depth < 2 and chance.random() < 0.3:
        word = chance.choice(["and", "or", "not"])
        inner = [condition(chance, depth + 1) for _ in range(chance.randint(0, 3))]
        return {"not": inner[0] if inner else condition(chance, depth + 1)} if word == "not" else {word: inner}
    column = chance.choice(list(FILTERS))
    kind = FILTERS[column]
    name = kind if isinstance(kind, str) else kind["type"]
    others = {"boolean": [], "text": ["any"], "texts": ["any", "all"]}.get(name, ["gt", "gte", "lt", "lte", "any"])
    operators = ["eq", "ne", *others]
    operator, operands = chance.choice(operators), OPERANDS[name]
    if operator in ("any", "all"):
        return {column: {operator: chance.sample(operands, chance.randint(0, min(3, len(operands))))}}
    if operator in ("eq", "ne") and chance.random() < 0.2:
        return {column: {operator: None}}
    return {column: {operator: chance.choice(operands)}}


@pytest.mark.parametrize("seed", [1])
def test_each_way_of_answering_finds_the_same(database: Database, settings: Settings, seed: int) -> None:
    chance = random.Random(seed)
    number = max(len(ODD), len(JSON))
    make_films(database, [(n, f"Film {n}", f"a lamp {n}", n) for n in range(number)])
    for column in FILTERS:
        execute(database, f"ALTER TABLE films ADD {column} {'text' if column[0] == 't' else 'jsonb'}")
    for n in range(number):
        values = [ODD[n % len(ODD)] if column[0] == "t" else JSON[n % len(JSON)] for column in FILTERS]
        marks = ", ".join(f"{column} = %s" for column in FILTERS)
        execute(database, f"UPDATE films SET {marks} WHERE id = %s", [*values, n])
    one = definition(
        columns=["title", *FILTERS], filters=FILTERS, words={}, vectors={"base": "{overview}"}, items_per_batch=500
    )
    collection, _ = sync_once(one, settings)
    ensure_words(database, one)
    ensure_filters(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
    nowhere, wrong = gone(settings, database), []
    every = [
        {c: {o: v}}
        for c, k in FILTERS.items()
        for v in OPERANDS[k if isinstance(k, str) else k["type"]]
        for o in (["eq"] if k in ("text", "boolean") or not isinstance(k, str) or k == "texts" else ["eq", "lt"])
    ]
    for where in [*every, *(condition(chance) for _ in range(150))]:
        found = {
            "database": {hit.item_key for hit in search(one, settings, "a lamp", k=1000, where=where, mode="dense")},
            "files": {hit.item_key for hit in search(one, nowhere, "a lamp", k=1000, where=where, mode="dense")},
            "sql": {hit.item_key for hit in by_sql(database, one, "a lamp", 1000, where)},
        }
        for way in ("files", "sql"):
            if odd := found[way] ^ found["database"]:
                wrong.append(
                    (
                        where,
                        way,
                        sorted((n, n in found[way], ODD[int(n) % len(ODD)], JSON[int(n) % len(JSON)]) for n in odd)[:4],
                    )
                )
    assert not wrong, "\n".join(map(repr, wrong))
