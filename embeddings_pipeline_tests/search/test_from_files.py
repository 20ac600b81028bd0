"""Searches while the database cannot be reached: the published files answer, and say how old they are."""

import logging
import time
from typing import Any

import pytest
from pydantic import SecretStr

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, PipelineError, VectorIndexError
from embeddings_pipeline.index import faiss_build, faiss_read
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.items_file import open_items
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.search import from_files
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.urls import read_address, url_of
from embeddings_pipeline_tests.search.test_where import COLUMNS, FILTERS, MEANINGS
from embeddings_pipeline_tests.support.pooler import Pooler
from embeddings_pipeline_tests.support.workbench import PROFILE, definition, execute, make_films, sync_once

FILMS = [
    (1, "Lamp", "a lamp lights the desk", 9_007_199_254_740_993),
    (2, "Lamp", "a lamp lights a desk in Berlin", 20),
    (3, "Sea", "walruses swim in the cold sea", None),
    (4, "Sea", "walruses in the sea near Berlin", 40),
    (5, "Blank", "", 50),
]
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "text": {"mode": "text"},
    "hybrid": {"mode": "hybrid"},
    "two vectors": {"mode": "dense", "vectors": ["base", "title"]},
}


def with_words(**others: Any) -> CollectionDefinition:
    vectors = {"base": "{overview}", "title": "{title}"}
    return definition(vectors=vectors, words={}, filters={"revenue": "number"}, **others)


@pytest.fixture
def published(database: Database, settings: Settings) -> CollectionDefinition:
    make_films(database, FILMS)
    publish(database, settings, with_words())
    return with_words()


def publish(database: Database, settings: Settings, one: CollectionDefinition) -> None:
    collection, _ = sync_once(one, settings)
    if one.attributes.words:
        ensure_words(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)


@pytest.fixture
def down(settings: Settings, database: Database) -> Settings:
    return gone(settings, database)


def gone(settings: Settings, database: Database) -> Settings:
    """The same settings, of a server that does not answer any more."""
    nowhere = url_of(read_address(database.url) | {"host": "127.0.0.1", "port": "9"})
    return settings.model_copy(update={"database_url": SecretStr(nowhere)})


@pytest.mark.parametrize("way", WAYS)
def test_the_files_answer_as_the_database_did(
    published: CollectionDefinition, settings: Settings, down: Settings, way: str
) -> None:
    index: Any = {"index": "faiss"}
    before = search(published, settings, "a lamp in Berlin", k=3, **index, **WAYS[way])
    after = search(published, down, "a lamp in Berlin", k=3, **WAYS[way])
    assert [hit.item_key for hit in after] == [hit.item_key for hit in before]
    assert [hit.score for hit in after] == pytest.approx([hit.score for hit in before], abs=1e-3)
    assert [(hit.text, hit.item, hit.vector_name, hit.chunk) for hit in after] == [
        (hit.text, hit.item, hit.vector_name, hit.chunk) for hit in before
    ]
    assert after[0].item["revenue"] in (9_007_199_254_740_993, 20)
    [told] = after.explanation.fell_back
    assert told.startswith("answered from files that are 0 minutes old") and "cannot be used" in told
    assert after.explanation.profile == "test"


def test_items_like_an_item_are_answered_too(
    published: CollectionDefinition, settings: Settings, down: Settings
) -> None:
    before = similar(published, settings, 3, k=3)
    after = similar(published, down, 3, k=3)
    assert [hit.item_key for hit in after] == [hit.item_key for hit in before]
    for key in (5, 99):
        with pytest.raises(ConfigurationError, match=f"the files have no vector of item '{key}'"):
            similar(published, down, key)


@pytest.mark.parametrize("way", WAYS)
def test_conditions_hold_without_a_database_too(database: Database, settings: Settings, way: str) -> None:
    """The files know a payload as it was published; each condition means what it means in PostgreSQL."""
    rows = [(n, f"Film {n}", f"a lamp of {n} {'lamps ' * (n % 7)}", n * 10) for n in range(1, 101)]
    make_films(database, rows)
    execute(database, "ALTER TABLE films ADD seen boolean, ADD shown timestamptz, ADD genres text, ADD tags text[]")
    execute(database, "ALTER TABLE films ADD plain text")
    execute(
        database,
        """UPDATE films SET seen = id % 2 = 0, shown = '2020-01-01 00:00+00'::timestamptz + id * interval '1 day',
           genres = CASE id % 4 WHEN 0 THEN 'Drama, Crime' WHEN 1 THEN 'Drama' WHEN 2 THEN E'Comedy\\n' ELSE '' END,
           tags = ARRAY['all', 'n' || id % 3]""",
    )
    execute(database, f"UPDATE films SET {', '.join(f'{column} = NULL' for column in FILTERS)} WHERE id = 10")
    one = definition(
        vectors={"base": "{overview}", "title": "{title}"},
        words={},
        columns=COLUMNS,
        filters=FILTERS,
        items_per_batch=500,
    )
    publish(database, settings, one)
    nowhere = gone(settings, database)
    for where, meets in MEANINGS:
        expected = {str(n) for n in range(1, 101) if meets(n)}
        hits = search(one, nowhere, "a lamp 7", k=100, where=where, **WAYS[way])
        assert {hit.item_key for hit in hits} == expected, where
        assert all("that match" in leg.how for leg in hits.explanation.legs)
    near = similar(one, nowhere, 7, k=5, where={"genres": "Drama"})
    before = similar(one, settings, 7, k=5, where={"genres": "Drama"}, index="faiss")
    assert [hit.item_key for hit in near] == [hit.item_key for hit in before] and len(near) == 5


def test_it_is_told_once_and_the_database_is_asked_again_after_a_while(
    published: CollectionDefinition,
    settings: Settings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    embedded: None,
) -> None:
    monkeypatch.setattr(from_files, "AGAIN_SECONDS", 0.2)
    pooler = Pooler(database, by_session=True)
    port = int(read_address(pooler.url)["port"])
    through = settings.model_copy(update={"database_url": SecretStr(pooler.url)})
    pooler.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert search(published, through, "walruses", k=1)[0].item_key in ("3", "4")
    assert sum("answered from files that are 0 minutes old" in text for text in caplog.messages) == 1
    execute(database, "UPDATE films SET overview = 'a walrus of today' WHERE id = 1")
    sync_once(published, settings)
    again = Pooler(database, by_session=True, port=port)
    try:
        time.sleep(0.3)  # the next attempt is due
        hits = search(published, through, "a walrus of today", k=1, mode="dense")
        assert hits[0].text == "a walrus of today" and not hits.explanation.fell_back
        assert "warning: the database answers again" in caplog.messages
    finally:
        again.close()


def test_what_needs_the_database_is_refused(
    published: CollectionDefinition, settings: Settings, down: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    published = with_words()
    later = definition(vectors={"base": "{overview}"}, columns=["title", "note"], filters={"note": "text"}, words={})
    for one, asked in ((later, {"where": {"note": "x"}}), (published, {"profile": "other"})):
        with pytest.raises(DatabaseError, match="cannot be used"):
            search(one, down, "lamp", **asked)  # type: ignore[arg-type]
    elsewhere = down.model_copy(update={"embeddings_state_dir": settings.state_dir / "elsewhere"})
    with pytest.raises(DatabaseError, match="cannot be used"):
        search(published, elsewhere, "lamp")
    assert not caplog.messages  # nothing is said to answer that does not


def test_another_model_s_vectors_are_never_asked(
    published: CollectionDefinition, settings: Settings, down: Settings
) -> None:
    other = with_words(profile={**PROFILE, "revision": "another"})
    with pytest.raises(PipelineError, match="the files are of another model than profile 'test'"):
        search(other, down, "lamp", mode="dense")
    hits = search(other, down, "lamp", mode="hybrid")
    assert hits and [leg.answered_by for leg in hits.explanation.legs] == ["bm25"]
    assert "words alone answered" in hits.explanation.fell_back[1]


def test_words_that_were_not_published_leave_it_to_the_vectors(
    database: Database, settings: Settings, down: Settings
) -> None:
    make_films(database, FILMS)
    collection, _ = sync_once(with_words(), settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    hits = search(with_words(), down, "a lamp in Berlin", k=2)
    assert [leg.answered_by for leg in hits.explanation.legs] == ["faiss"] and len(hits) == 2
    assert "vectors alone answered" in hits.explanation.fell_back[1]
    with pytest.raises(DatabaseError, match="the files have no words"):
        search(with_words(), down, "lamp", mode="text")


def test_long_items_take_no_places_of_others(database: Database, settings: Settings, down: Settings) -> None:
    make_films(database, [(1, "Long", "a lamp shines on the desk at night. " * 30, 0), *FILMS[1:4]])
    chunked = definition(vectors={"base": "{overview}"}, chunk={"characters": 50})
    publish(database, settings, chunked)
    assert len(search(chunked, down, "a lamp on the desk", k=4)) == 4


def test_a_damaged_file_is_named(published: CollectionDefinition, settings: Settings, down: Settings) -> None:
    [path] = (settings.state_dir / "faiss" / "films").glob("*/texts.arrow")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(VectorIndexError, match=r"texts\.arrow is damaged"):
        search(published, down, "lamp", mode="dense")


def test_a_generation_without_items_answers_nothing(settings: Settings, published: CollectionDefinition) -> None:
    assert open_items(settings.state_dir / "faiss", "nobody") is None


def test_lists_that_hold_too_few_are_not_all_that_is_looked_into(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_build, "EXACT_BELOW", 2000)
    monkeypatch.setattr(faiss_build, "POINTS_PER_LIST", 30)
    monkeypatch.setattr(faiss_read, "TUNED_FOR", 1000)
    make_films(database, [(n, f"Film {n}", f"story {n} of {n % 97} and {n % 89}", n) for n in range(2500)])
    one = definition(items_per_batch=5000)
    publish(database, settings, one)
    hits = search(one, gone(settings, database), "a story", k=1000)
    assert hits.explanation.legs[0].answered_by == "faiss" and len({hit.item_key for hit in hits}) == 1000


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_generation_that_is_replaced_meanwhile_answers_whole(
    published: CollectionDefinition,
    database: Database,
    settings: Settings,
    down: Settings,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
) -> None:
    encode = from_files.query_vector

    def replaced(*given: Any) -> Any:
        monkeypatch.setattr(from_files, "query_vector", encode)
        execute(database, "INSERT INTO films VALUES (6, 'Lamp', 'a lamp in Berlin today', 60)")
        publish(database, settings, published)
        return encode(*given)

    monkeypatch.setattr(from_files, "query_vector", replaced)
    hits = search(published, down, "a lamp in Berlin today", k=3, mode=mode)
    assert (hits[0].item_key, len(hits)) == ("6", 3)


def test_which_items_meet_a_condition_is_looked_up_once(
    published: CollectionDefinition, database: Database, settings: Settings, down: Settings, monkeypatch: Any
) -> None:
    read, meets = list[object](), from_files.meets

    def counted(*given: Any) -> Any:
        meets_it = meets(*given)
        return lambda payload: read.append(payload) or meets_it(payload)  # type: ignore[func-returns-value]

    monkeypatch.setattr(from_files, "meets", counted)
    below: dict[str, Any] = {"where": {"revenue": {"lt": 30}}, "mode": "dense"}
    for _ in range(3):
        assert [hit.item_key for hit in search(published, down, "a lamp", **below)] == ["2"]
    assert len(read) == len(FILMS)
    above = search(published, down, "a lamp", where={"revenue": {"gt": 30}}, mode="dense")
    assert {hit.item_key for hit in above} == {"1", "4"} and len(read) == 2 * len(FILMS)
    execute(database, "UPDATE films SET revenue = 21 WHERE id = 4")
    publish(database, settings, published)
    assert {hit.item_key for hit in search(published, down, "a lamp", **below)} == {"2", "4"}
