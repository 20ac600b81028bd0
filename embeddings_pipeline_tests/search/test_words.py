"""Searches by words: what is typed is found, by the BM25 files and by PostgreSQL, and joined to what vectors find."""

import shutil
from typing import Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.hits import Hits
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, make_films, sync_once

LEGS = ("bm25", "tsvector")
TYPED = {
    1: "the B-52 bomber over Vietnam",
    2: "Conan O'Brien and O’Toole on a late show",
    3: "pilot of the RX-78-2 “Gundam”",
    4: "the release v1.5 of AT&T UNIX by e-mail to root@example.org",
    5: "to be or not to be",
    6: "she runs, he was running",
    7: "Кошки и собаки",
    8: "naïve café, straße",
    9: 'he said "exact phrase" twice (really) [sic] {ok}',
    10: "東京 物語",
    11: "a plain story of 52 cards and 78 records, part 2",
}


def with_words(**others: Any) -> CollectionDefinition:
    attributes = {"vectors": {"base": "{overview}"}, "words": {}, "items_per_batch": 5000, **others}
    return definition(**attributes)


def indexed(database: Database, settings: Settings, one: CollectionDefinition) -> Collection:
    """Synced, and with each index that the definition asks for."""
    collection, _ = sync_once(one, settings)
    ensure_filters(database, one)
    ensure_words(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
    return collection


@pytest.fixture
def typed(database: Database, settings: Settings) -> CollectionDefinition:
    make_films(database, [(n, f"Film {n}", text, n) for n, text in TYPED.items()])
    return indexed(database, settings, with_words()).definition


def without_files(settings: Settings) -> Settings:
    """As on another machine, where no generation was ever built: PostgreSQL answers."""
    elsewhere = settings.state_dir.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return settings.model_copy(update={"embeddings_state_dir": elsewhere})


def by_leg(one: CollectionDefinition, settings: Settings, leg: str, query: str, **others: Any) -> Hits:
    here = settings if leg == "bm25" else without_files(settings)
    hits = search(one, here, query, **{"mode": "text", "k": 20, **others})
    assert [each.answered_by for each in hits.explanation.legs] == [leg]
    return hits


def keys(hits: Hits) -> list[str]:
    return [hit.item_key for hit in hits]


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("B-52", "1"),
        ("b52", "1"),
        ("B 52", "1"),
        ("O'Brien", "2"),
        ("O’Brien", "2"),
        ("obrien", "2"),
        ("O'Toole", "2"),
        ("RX-78-2", "3"),
        ("rx 78 2", "3"),
        ("Gundam", "3"),
        ("v1.5", "4"),
        ("AT&T", "4"),
        ("root@example.org", "4"),
        ("email", "4"),
        ("to be or not to be", "5"),
        ("ran RUNS", "6"),
        ("кошки", "7"),
        ("café", "8"),
        ("STRASSE straße", "8"),
        ('"exact phrase"', "9"),
        ("(really)", "9"),
        ("東京", "10"),
    ],
)
def test_what_is_typed_is_found_first(
    settings: Settings, typed: CollectionDefinition, leg: str, query: str, best: str
) -> None:
    assert keys(by_leg(typed, settings, leg, query))[:1] == [best]


BAD = {
    "long": "lamp " * 20_000,
    "long and each word another": " ".join(f"word{n}" for n in range(12_000)),
    "one long word": "x" * 100_000,
    "emoji": "😀🎬👩‍🚀",
    "operators": "\" & | ! :* \\ <-> ( ) ' E'' %(k)s {x} %s",
    "operators around a word": "!(lamp:* & | <-> 'lamp\\'",
    "another script": "フィルム 映画 кино",
    "punctuation": "?!… —",
    "NUL and half a character": "lamp \0 \ud83d",
}


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("query", BAD.values(), ids=BAD)
def test_any_query_is_answered(settings: Settings, typed: CollectionDefinition, leg: str, query: str) -> None:
    here = settings if leg == "bm25" else without_files(settings)
    by_words = search(typed, here, query, mode="text")
    assert [each.answered_by for each in by_words.explanation.legs] == [leg]
    assert len(search(typed, here, query, k=5)) == 5


def test_a_blank_query_is_told(settings: Settings, typed: CollectionDefinition) -> None:
    for query in ("", " \n", "\u200b"):
        with pytest.raises(ConfigurationError, match="the query is blank"):
            search(typed, settings, query, mode="text")


def test_words_are_searched_without_a_model(settings: Settings, typed: CollectionDefinition) -> None:
    calls = DeterministicEncoder.calls
    hits = search(typed, settings, "Gundam", mode="text")
    assert keys(hits) == ["3"]
    took = hits.explanation.milliseconds
    assert took["search"] > hits.explanation.legs[0].milliseconds  # which is no time of encoding
    assert DeterministicEncoder.calls == calls


def test_both_legs_are_joined_by_their_ranks_and_said(settings: Settings, typed: CollectionDefinition) -> None:
    hits = search(typed, settings, "Gundam records", k=4)
    dense, text = hits.explanation.legs
    assert (hits.explanation.mode, dense.answered_by, text.answered_by) == ("hybrid", "pgvector", "bm25")
    assert set(text.ranks) == {"3", "11"} and len(hits) == 4
    for hit in hits:
        ranks = [leg.ranks[hit.item_key][0] for leg in (dense, text) if hit.item_key in leg.ranks]
        assert hit.score == pytest.approx(sum(1 / (20 + rank) for rank in ranks))
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    elsewhere = search(typed, without_files(settings), "Gundam records", k=4)
    assert elsewhere.explanation.legs[1].fell_back == ("there are no BM25 files here: PostgreSQL answered",)


def test_the_mode_is_what_the_collection_has_an_index_for(settings: Settings, typed: CollectionDefinition) -> None:
    plain = definition(vectors={"base": "{overview}"}, items_per_batch=5000)
    assert search(plain, settings, "lamp").explanation.mode == "dense"
    assert search(typed, settings, "lamp").explanation.mode == "hybrid"
    for mode in ("text", "hybrid"):
        with pytest.raises(
            ConfigurationError, match=rf"no lexical index, which mode '{mode}' needs: add `words: {{}}`"
        ):
            search(plain, settings, "lamp", mode=mode)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="mode cannot be 'words': it may be 'dense', 'text' or 'hybrid'"):
        search(typed, settings, "lamp", mode="words")  # type: ignore[arg-type]


def test_until_the_words_are_there_vectors_answer_alone(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    make_films(database, [(n, f"Film {n}", text, n) for n, text in TYPED.items()])
    sync_once(with_words(), settings)
    hits = search(with_words(), settings, "Gundam", k=3)
    assert len(hits) == 3 and "vectors alone answer" in hits.explanation.fell_back[0] and "sync" in caplog.text
    with pytest.raises(DatabaseError, match="not in PostgreSQL yet: `embeddings-pipeline sync` brings them there"):
        search(with_words(), settings, "Gundam", mode="text")


@pytest.mark.parametrize("leg", LEGS)
def test_what_came_after_the_files_is_found_and_what_has_gone_is_not(
    database: Database, settings: Settings, typed: CollectionDefinition, leg: str
) -> None:
    execute(database, "INSERT INTO films VALUES (50, 'New', 'a zeppelin and a Gundam', 1)")
    execute(database, "UPDATE films SET overview = 'nothing of the kind' WHERE id = 9")
    execute(database, "UPDATE films SET overview = 'a Gundam, a Gundam' WHERE id = 11")
    execute(database, "DELETE FROM films WHERE id = 1")
    collection, _ = sync_once(typed, settings)
    assert keys(by_leg(typed, settings, leg, "zeppelin")) == ["50"]
    assert keys(by_leg(typed, settings, leg, "bomber over Vietnam phrase")) == []
    assert set(keys(by_leg(typed, settings, leg, "gundam", k=3))) == {"3", "11", "50"}
    for query in ("gundam", "a zeppelin of the kind", "52 cards"):  # as if all were in the files
        before = keys(by_leg(typed, settings, leg, query))
        build(database, collection.model.destination, settings.state_dir / "faiss", typed.attributes.words)
        assert keys(by_leg(typed, settings, leg, query)) == before


@pytest.mark.parametrize("leg", LEGS)
def test_what_is_in_quarantine_is_not_found(database: Database, settings: Settings, leg: str) -> None:
    make_films(database, [(1, "", "a lamp that is poison", 0), (2, "", "a lamp", 0)])
    DeterministicEncoder.fail_on = "poison"
    one = indexed(database, settings, with_words()).definition
    assert keys(by_leg(one, settings, leg, "lamp poison")) == ["2"]
    DeterministicEncoder.reset()


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_as_many_are_found_as_match_the_filter(database: Database, settings: Settings, leg: str, mode: str) -> None:
    rows = [(n, "", f"a lamp of {n} {'lamps ' * (n % 7)}", n % 500) for n in range(1500)]
    make_films(database, rows)
    one = indexed(database, settings, with_words(filters={"revenue": "number"})).definition
    here = settings if leg == "bm25" else without_files(settings)
    for below, there in ((1, 3), (5, 15), (250, 750), (500, 1500)):
        for k in (10, 40):
            hits = search(one, here, "lamp", k=k, where={"revenue": {"lt": below}}, mode=mode)  # type: ignore[arg-type]
            assert len(set(keys(hits))) == min(k, there), (below, k)
            assert all(hit.item["revenue"] < below for hit in hits)
            assert hits.explanation.legs[-1].answered_by == leg


@pytest.mark.parametrize("leg", LEGS)
def test_a_long_item_never_takes_the_places_of_others(database: Database, settings: Settings, leg: str) -> None:
    long = " ".join(f"lamp number {n}" for n in range(2000))
    make_films(
        database, [(1, "", long, 0), *((n, "", f"an essay, which mentions a lamp {n}", 0) for n in range(2, 40))]
    )
    one = indexed(database, settings, with_words(chunk={"characters": 60})).definition
    for mode in ("text", "hybrid"):
        hits = by_leg(one, settings, leg, "lamp", k=30) if mode == "text" else search(one, settings, "lamp", k=30)
        assert len(set(keys(hits))) == len(hits) == 30


@pytest.mark.parametrize("leg", LEGS)
def test_equal_ones_keep_their_order_whatever_is_asked_for(database: Database, settings: Settings, leg: str) -> None:
    make_films(database, [(n, "", "a lamp", 0) for n in (30, 4, 100, 12, 7, 55, 1)])
    one = indexed(database, settings, with_words()).definition
    first = keys(by_leg(one, settings, leg, "lamp", k=7))
    assert all(keys(by_leg(one, settings, leg, "lamp", k=k)) == first[:k] for k in range(1, 7))


@pytest.mark.parametrize("leg", LEGS)
def test_words_of_several_vectors_are_those_of_the_vectors_that_are_asked(
    database: Database, settings: Settings, leg: str
) -> None:
    make_films(database, [(1, "lamp", "a story", 0), (2, "sofa", "a lamp", 0), (3, "desk", "wood", 0)])
    one = indexed(database, settings, with_words(vectors={"base": "{overview}", "title": "{title}"})).definition
    assert keys(by_leg(one, settings, leg, "lamp")) == ["2"]
    assert keys(by_leg(one, settings, leg, "lamp", vectors="title")) == ["1"]
    assert set(keys(by_leg(one, settings, leg, "lamp", vectors=["base", "title"]))) == {"1", "2"}


def test_damaged_and_foreign_files_are_not_asked(
    database: Database, settings: Settings, typed: CollectionDefinition, caplog: pytest.LogCaptureFixture
) -> None:
    execute(database, "UPDATE embeddings.collection SET epoch = gen_random_uuid()")
    [leg] = search(typed, settings, "Gundam", mode="text").explanation.legs
    assert leg.answered_by == "tsvector" and "of tables that were made anew since" in leg.fell_back[0]
    [file] = (settings.state_dir / "faiss" / "films").glob("*/base.words.scores.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    elsewhere = settings.model_copy(update={"embeddings_state_dir": settings.state_dir.parent / "copied"})
    shutil.copytree(settings.state_dir / "faiss", elsewhere.state_dir / "faiss")
    copied = elsewhere.state_dir / "faiss" / file.relative_to(settings.state_dir / "faiss")
    copied.write_bytes(content)
    hits = search(typed, elsewhere, "Gundam", mode="text")
    assert keys(hits) == ["3"] and "base.words.scores.npy is damaged" in hits.explanation.legs[0].fell_back[0]
