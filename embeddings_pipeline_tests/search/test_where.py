"""A filter is data: what it means, what is refused, and that it never returns too few."""

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from psycopg import sql

from embeddings_pipeline.cli.where import where_of_words
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters, filters_fit
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.inventory import take_inventory
from embeddings_pipeline.pipeline.renaming import rename_in_database
from embeddings_pipeline.search import nearest, selectivity
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, make_films, sync_once

FILTERS = {
    "revenue": "number",
    "title": "text",
    "seen": "boolean",
    "shown": "timestamp",
    "genres": {"type": "texts", "separator": ","},
    "tags": "texts",
}
COLUMNS = ["title", "revenue", "seen", "shown", "genres", "tags", "plain"]


def filtered_definition(**others: Any) -> CollectionDefinition:
    attributes: dict[str, Any] = {"columns": COLUMNS, "filters": FILTERS, "items_per_batch": 5000, **others}
    return definition(**attributes)


@pytest.fixture
def collection(database: Database, settings: Settings) -> Collection:
    """100 films; every column of the tenth is NULL."""
    DeterministicEncoder.reset()
    make_films(database, [(n, f"Film {n}", f"a story about number {n}", n * 10) for n in range(1, 101)])
    execute(database, "ALTER TABLE films ADD seen boolean, ADD shown timestamptz, ADD genres text, ADD tags text[]")
    execute(database, "ALTER TABLE films ADD plain text")
    execute(
        database,
        """UPDATE films SET seen = id % 2 = 0, shown = '2020-01-01 00:00+00'::timestamptz + id * interval '1 day',
           genres = CASE id % 4 WHEN 0 THEN 'Drama, Crime' WHEN 1 THEN 'Drama' WHEN 2 THEN 'Comedy' ELSE '' END,
           tags = ARRAY['all', 'n' || id % 3]""",
    )
    nulls = ", ".join(f"{column} = NULL" for column in FILTERS)
    execute(database, f"UPDATE films SET {nulls} WHERE id = 10")
    collection, _ = sync_once(filtered_definition(), settings)
    ensure_filters(database, collection.definition)
    return collection


Numbers = Callable[[int], bool]
MEANINGS: list[tuple[dict[str, Any], Numbers]] = [
    ({"revenue": {"gte": 500}}, lambda n: n >= 50),
    ({"revenue": {"gt": 500, "lt": Decimal("700.5")}}, lambda n: 51 <= n <= 70),
    ({"revenue": 500}, lambda n: n == 50),
    ({"revenue": {"gte": Fraction(999, 2)}}, lambda n: n >= 50),
    ({"revenue": [10, 20.0, np.int64(30)]}, lambda n: n <= 3),
    ({"revenue": {"any": []}}, lambda n: False),
    ({"revenue": None}, lambda n: n == 10),
    ({"revenue": {"ne": None}}, lambda n: n != 10),
    ({"revenue": {"ne": 500}}, lambda n: n != 50),
    ({"not": {"revenue": {"gte": 500}}}, lambda n: n < 50),
    ({"title": "Film 7"}, lambda n: n == 7),
    ({"title": {"any": ["Film 7", "Film 8", "no film's"]}}, lambda n: n in (7, 8)),
    ({"seen": True}, lambda n: n % 2 == 0 and n != 10),
    ({"seen": {"ne": np.True_}}, lambda n: n % 2 == 1 or n == 10),
    ({"shown": {"gte": "2020-03-01"}}, lambda n: n >= 60),
    ({"shown": {"lte": date(2020, 1, 6)}}, lambda n: n <= 5),
    ({"shown": datetime(2020, 1, 6, tzinfo=UTC)}, lambda n: n == 5),
    ({"genres": "Drama"}, lambda n: n % 4 in (0, 1)),
    ({"genres": {"any": ["Crime", "Comedy"]}}, lambda n: n % 4 in (0, 2) and n != 10),
    ({"genres": {"all": ["Crime", "Drama"]}}, lambda n: n % 4 == 0),
    ({"not": {"genres": ["Drama"]}}, lambda n: n % 4 in (2, 3)),
    ({"tags": {"all": ["all", "n0"]}}, lambda n: n % 3 == 0),
    ({"or": [{"revenue": 10}, {"and": [{"revenue": 20}, {"seen": True}]}]}, lambda n: n <= 2),
    ({"revenue": {"lte": 100}, "genres": "Drama"}, lambda n: n <= 9 and n % 4 in (0, 1)),
    ({"or": []}, lambda n: False),
    ({"revenue": [*range(0, 500_000, 10)]}, lambda n: n != 10),  # 50,000 values
    ({"title": [f"Film {n}" for n in range(50, 50_050)]}, lambda n: n >= 50),
    ({"tags": {"any": [f"n{n}" for n in range(2, 50_002)]}}, lambda n: n % 3 == 2),
]


def test_each_condition_is_met_by_the_items_that_it_says(
    database: Database, settings: Settings, collection: Collection
) -> None:
    build(database, collection.model.destination, settings.state_dir / "faiss")
    for where, meets in MEANINGS:
        expected = {str(n) for n in range(1, 101) if meets(n)}
        for index in ("pgvector", "faiss"):
            found = search(collection.definition, settings, "a story", k=100, where=where, index=index)  # type: ignore[arg-type]
            assert {hit.item_key for hit in found} == expected, (where, index)
        assert json.loads(json.dumps(where, default=str))  # data, as JSON has it


@pytest.mark.parametrize("way", ["lookup", "hnsw", "ivfflat", "faiss lookup", "faiss"])
def test_as_many_are_found_as_are_asked_for_wherever_as_many_match(
    database: Database, settings: Settings, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(n, f"Film {n % 50}", f"a story about number {n % 97} and {n % 89}", n % 1000) for n in range(3000)]
    make_films(database, rows)
    one = (
        definition(filters={"revenue": "number"}, items_per_batch=5000, index={"method": way.split()[-1]})
        if way
        in (
            "hnsw",
            "ivfflat",
        )
        else definition(filters={"revenue": "number"}, items_per_batch=5000)
    )
    collection, _ = sync_once(one, settings)
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    ensure_filters(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    index = "faiss" if way.startswith("faiss") else "pgvector"
    exact = {
        below: search(one, settings, "a story about 7", k=20, where={"revenue": {"lt": below}}) for below in (1, 30)
    }
    if way in ("hnsw", "ivfflat"):
        monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    if way in ("hnsw", "ivfflat", "faiss"):
        monkeypatch.setattr(selectivity, "LOOKED_UP", 1e9)
    for below, there in ((1, 3), (30, 90), (100, 300), (1000, 3000)):
        hits = search(one, settings, "a story about 7", k=20, where={"revenue": {"lt": below}}, index=index)  # type: ignore[arg-type]
        assert len(hits) == min(20, there) and all(hit.item["revenue"] < below for hit in hits)
        if below in exact:
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in exact[below]], abs=1e-5)
        [leg] = hits.explanation.legs
        assert leg.answered_by == index and (way != "hnsw" or below == 1 or leg.how == "hnsw index")
    others = similar(one, settings, 7, k=20, where={"revenue": {"lt": 30}}, index=index)  # type: ignore[arg-type]
    assert len(others) == 20 and "7" not in {hit.item_key for hit in others}


@pytest.mark.parametrize("method", ["hnsw", "ivfflat"])
def test_a_filter_that_keeps_away_from_the_query_is_answered_exactly(
    database: Database, settings: Settings, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = [(n, "", f"cats purr and chase mice {n}", 1) for n in range(2000)]
    make_films(database, [*near, *[(n, "", f"walruses in winter {n}", 0) for n in range(2000, 2060)]])
    one = definition(
        vectors={"base": "{overview}"}, filters={"revenue": "number"}, items_per_batch=5000, index={"method": method}
    )
    collection, _ = sync_once(one, settings)
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    ensure_filters(database, one)
    where = {"revenue": 0}
    exact = search(one, settings, "cats purr and chase mice", k=30, where=where)
    assert exact.explanation.legs[0].how == "all that match compared" and len(exact) == 30
    monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    monkeypatch.setattr(selectivity, "LOOKED_UP", 1e9)
    monkeypatch.setattr(nearest, "PATIENCE", 0.5)
    hits = search(one, settings, "cats purr and chase mice", k=30, where=where)
    [leg] = hits.explanation.legs
    assert hits == exact and leg.fell_back[0].startswith(f"the {method} index gave ")


def test_a_filter_is_added_and_removed_without_embedding_anything(
    database: Database, settings: Settings, collection: Collection
) -> None:
    calls = DeterministicEncoder.calls
    for filters in ({"revenue": "number"}, {}, {"revenue": "text", "tags": "texts"}, FILTERS):
        one = filtered_definition(filters=filters)
        opened, encoded = sync_once(one, settings)
        assert encoded == 0 and not opened.ledger.work()
        with database.connect(autocommit=True) as connection:
            assert not filters_fit(connection, one)
        assert set(ensure_filters(database, one)) <= set(filters)
        with database.connect(autocommit=True) as connection:
            assert filters_fit(connection, one)
        assert ensure_filters(database, one) == []
    assert DeterministicEncoder.calls == calls


def test_a_column_that_the_payload_lacks_until_the_next_sync_is_told(
    settings: Settings, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    one = filtered_definition(columns=[*COLUMNS, "overview"], filters={**FILTERS, "overview": "text"})
    asked = {"overview": "a story about number 7"}
    assert search(one, settings, "a story", where={"revenue": 70}) and not caplog.messages
    assert not search(one, settings, "a story", where=asked)
    assert (
        "some items have no overview in their payload yet" in caplog.text
        and "`embeddings-pipeline sync`" in caplog.text
    )
    sync_once(one, settings)
    caplog.clear()
    assert [hit.item_key for hit in search(one, settings, "a story", where=asked)] == ["7"] and not caplog.messages


def test_white_space_around_parts_of_lists_counts_nowhere(
    database: Database, settings: Settings, collection: Collection
) -> None:
    execute(
        database, r"UPDATE films SET genres = E'Crime,\n\tDrama', tags = ARRAY[E'tab\t', E'\x0bvalley v'] WHERE id = 6"
    )
    sync_once(collection.definition, settings)
    for where in ({"genres": {"all": ["Drama ", "\nCrime"]}, "revenue": 60}, {"tags": "tab"}, {"tags": "tab\t"},
                  {"tags": "valley v"}):  # fmt: skip
        assert [hit.item_key for hit in search(collection.definition, settings, "a story", where=where)] == ["6"], where


def test_the_indexes_follow_a_collection_that_is_renamed(
    database: Database, settings: Settings, collection: Collection
) -> None:
    rename_in_database(database, take_inventory(database, settings, "films"), "movies")
    with database.connect(autocommit=True) as connection:
        assert filters_fit(connection, filtered_definition(name="movies"))


def test_an_index_whose_build_was_ended_is_built_again(
    database: Database, settings: Settings, collection: Collection
) -> None:
    if not databases.rights(database).superuser:
        pytest.skip("the role of EMBEDDINGS_TESTS_DATABASE_URL may not spoil an index")
    [(name,)] = execute(database, "SELECT min(indexname) FROM pg_indexes WHERE indexname LIKE 'films_filter_%%'", [])
    execute(database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [f"embeddings.{name}"])
    with database.connect(autocommit=True) as connection:
        assert not filters_fit(connection, collection.definition)
    assert len(ensure_filters(database, collection.definition)) == 1
    with database.connect(autocommit=True) as connection:
        assert filters_fit(connection, collection.definition)


def test_what_a_commit_changes_is_filtered_by_at_once(
    database: Database, settings: Settings, collection: Collection
) -> None:
    execute(database, "UPDATE films SET revenue = 77777 WHERE id = 3")
    _, encoded = sync_once(collection.definition, settings)
    assert encoded == 0
    [hit] = search(collection.definition, settings, "anything", where={"revenue": 77777})
    assert hit.item_key == "3"


def test_values_that_are_none_of_the_type_are_missing_and_never_stop_a_commit(
    database: Database, settings: Settings, collection: Collection
) -> None:
    execute(database, "ALTER TABLE films ALTER title TYPE text, ALTER revenue TYPE numeric, ALTER shown TYPE text")
    execute(
        database,
        "UPDATE films SET title = %s, revenue = 10::numeric ^ 5000, shown = 'tomorrow', tags = %s WHERE id = 4",
        ["long " * 10_000, ["x" * 9000, "short"]],
    )
    execute(database, "UPDATE films SET revenue = 'NaN', shown = '2020-02-31' WHERE id = 5")
    sync_once(collection.definition, settings)
    one = collection.definition
    assert [hit.item_key for hit in search(one, settings, "x", where={"title": "long " * 10_000})] == ["4"]
    assert {hit.item_key for hit in search(one, settings, "x", where={"revenue": None})} == {"4", "5", "10"}
    assert {hit.item_key for hit in search(one, settings, "x", where={"shown": None})} == {"4", "5", "10"}
    assert [hit.item_key for hit in search(one, settings, "x", where={"tags": "short"})] == ["4"]


def test_a_column_may_be_called_anything(database: Database, settings: Settings) -> None:
    make_films(database, [(n, f"Film {n}", "", n) for n in range(5)])
    odd = """50% off "{x}" 'é' %(k)s"""
    execute(database, sql.SQL("ALTER TABLE films RENAME revenue TO {}").format(sql.Identifier(odd)))
    one = definition(columns=["title", odd], filters={odd: "number"})
    sync_once(one, settings)
    assert ensure_filters(database, one) == [odd]
    for where in ({odd: {"gte": 3}}, where_of_words(one, [f"{odd}>=3"])):
        assert {hit.item_key for hit in search(one, settings, "a film", where=where)} == {"3", "4"}


def test_a_schema_that_knows_no_filters_yet_is_told(
    database: Database, settings: Settings, collection: Collection
) -> None:
    execute(database, "DROP FUNCTION embeddings.filter_number CASCADE")
    with pytest.raises(DatabaseError, match="has no filters yet: `embeddings-pipeline sync` brings"):
        search(collection.definition, settings, "x", where={"revenue": 1})


MISTAKES: list[tuple[Any, str]] = [
    ({"revenu": 1}, "there is no filter 'revenu' (did you mean 'revenue'?)"),
    ({"plain": "x"}, "'plain' is not declared: add `filters: {plain: TYPE}`"),
    ({"revenue": "2000"}, "'revenue' is a number, and '2000' is none"),
    ({"revenue": {"gte": "2000"}}, "'revenue' is a number, and '2000' is none"),
    ({"revenue": True}, "is a number, and True is none"),
    ({"revenue": float("nan")}, "not finite"),
    ({"revenue": 10**5000}, "longer"),
    ({"revenue": {"like": 3}}, "has no operator 'like'"),
    ({"revenue": {}}, "is compared with nothing"),
    ({"revenue": {"any": 3}}, "takes a list"),
    ({"title": 3}, "is a text, and 3 is none"),
    ({"title": "a\0b"}, "none that a database can hold"),
    ({"title": {"gte": "a"}}, "has no operator 'gte'"),
    ({"seen": "yes"}, "is a boolean"),
    ({"shown": "last week"}, "is a timestamp"),
    ({"genres": {"any": ["x" * 501]}}, "longer than 500"),
    ({"revenue": [*range(100_001)]}, "more than 100,000 values"),
    ({"and": {"revenue": 1}}, "takes a list of conditions"),
    ({"not": "revenue"}, "is no condition"),
    ("revenue >= 1", "is no condition"),
    ([], "is no condition"),
    ({3: 3}, "there is no filter 3"),
]


@pytest.mark.parametrize(("where", "told"), MISTAKES)
def test_a_condition_that_cannot_be_is_told_in_one_line(
    settings: Settings, where: Any, told: str
) -> None:  # before anything is connected to
    with pytest.raises(ConfigurationError, match=re.escape(told)) as error:
        search(filtered_definition(), settings, "x", where=where)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_conditions_within_conditions_have_an_end(settings: Settings) -> None:
    where: dict[str, Any] = {"revenue": 1}
    for _ in range(3000):
        where = {"not": where}
    with pytest.raises(ConfigurationError, match="more than 20 deep"):
        search(filtered_definition(), settings, "x", where=where)


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"revenue": "numbr"}, "did you mean 'number'"),
        ({"genre": "texts"}, "is not among `columns:` (did you mean 'genres'?)"),
        ({"revenue": {"type": "number", "separator": ","}}, "leave it out"),
        ({"revenue": {"typ": "number"}}, "typ"),
    ],
)
def test_a_filter_that_cannot_be_is_told(filters: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        filtered_definition(filters=filters)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("revenue>=2000", {"revenue": {"gte": Decimal(2000)}}),
        ("revenue != 1.50", {"revenue": {"ne": Decimal("1.50")}}),
        ("genres=Drama", {"genres": {"eq": "Drama"}}),
        ('genres=["Drama", "Crime"]', {"genres": ["Drama", "Crime"]}),
        ('genres!=["Drama"]', {"not": {"genres": {"any": ["Drama"]}}}),
        ("title=a = b >= c", {"title": {"eq": "a = b >= c"}}),
        ("seen=true", {"seen": {"eq": True}}),
        ("title=null", {"title": {"eq": None}}),
        ('{"revenue": {"lt": 3.5}}', {"revenue": {"lt": Decimal("3.5")}}),
    ],
)
def test_conditions_as_people_type_them(words: str, expected: dict[str, Any]) -> None:
    assert where_of_words(filtered_definition(), [words]) == {"and": [expected]}


@pytest.mark.parametrize(("words", "told"), [("revenue", "is no condition"), ('{"revenue": ', "is no JSON")])
def test_words_that_are_no_condition_are_told(words: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        where_of_words(filtered_definition(), [words])
