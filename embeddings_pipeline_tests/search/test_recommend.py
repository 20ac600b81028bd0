"""Recommendations: what was liked and disliked, a person's history, what others liked, what is popular, diversity."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, SourceError
from embeddings_pipeline.index.cooccurrence import build_cooccurrence
from embeddings_pipeline.search.ranking import diverse, places
from embeddings_pipeline.search.recommend import recommend
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.interactions import Interactions
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, make_films, sync_once

FILMS = [
    (1, "Lamp", "a lamp lights the desk", 10),
    (2, "Lamp", "a lamp lights a desk", 20),
    (3, "Lamp", "lamp lights, desk", 90),
    (4, "Sea", "walruses swim in the cold sea", 50),
    (5, "Sea", "walruses in a cold sea", 40),
    (6, "Sea", "the cold sea of walruses", 30),
    (7, "Blank", "", 70),
]
INTERACTIONS = {"table": "ratings", "user": "who", "item": "film", "weight": "stars", "neutral": 3, "at": "seen"}


def with_films(**attributes: Any) -> CollectionDefinition:
    return definition(vectors={"base": "{overview}"}, filters={"revenue": "number"}, **attributes)


@pytest.fixture
def there(database: Database, settings: Settings) -> CollectionDefinition:
    """The films, embedded; the last one has no text."""
    make_films(database, FILMS)
    sync_once(with_films(), settings)
    return with_films()


@pytest.fixture
def rated(database: Database, there: CollectionDefinition) -> CollectionDefinition:
    """With what people thought of them, from 1 to 5 stars."""
    execute(database, "CREATE TABLE ratings (who bigint, film bigint, stars numeric(3, 1), seen timestamp)")
    rows = [
        (1, 1, 5, "2020-01-01"),
        (1, 4, 5, "2026-01-01"),
        (2, 7, 5, "2026-01-01"),
        (2, 4, 1, "2026-01-01"),
        *((who, film, 4, "2025-01-01") for who in range(10, 14) for film in (7, 5)),
        (14, 3, 5, None),
        (15, 3, None, None),
        (16, 99, 5, None),
    ]
    for row in rows:
        execute(database, "INSERT INTO ratings VALUES (%s, %s, %s, %s)", row)
    return with_films(interactions=INTERACTIONS)


def keys(hits: Any) -> list[str]:
    return [hit.item_key for hit in hits]


@pytest.mark.parametrize("strategy", ["mean", "best"])
def test_what_is_like_what_was_liked_and_not_known_yet(
    there: CollectionDefinition, settings: Settings, strategy: Any
) -> None:
    calls = DeterministicEncoder.calls
    hits = recommend(there, settings, liked=[1], k=2, strategy=strategy, diversity=0)
    assert sorted(keys(hits)) == ["2", "3"]
    assert all(0 < hit.score <= 1 for hit in hits) and hits[0].item["title"] == "Lamp"
    hits = recommend(there, settings, liked=["1", 4], k=4, strategy=strategy, diversity=0)
    assert sorted(keys(hits)) == ["2", "3", "5", "6"]
    assert DeterministicEncoder.calls == calls


def test_what_is_like_what_was_disliked_comes_last(there: CollectionDefinition, settings: Settings) -> None:
    for strategy in ("mean", "best"):
        options: dict[str, Any] = {"liked": [1, 4], "k": 3, "strategy": strategy, "diversity": 0}
        before = {hit.item_key: hit.score for hit in recommend(there, settings, **options)}
        after = {hit.item_key: hit.score for hit in recommend(there, settings, **options, disliked=[5])}
        assert "5" not in after and after["6"] < before["6"]
        assert after["6"] - before["6"] < after["2"] - before["2"]


def test_a_history_counts_by_weight_and_age(there: CollectionDefinition, settings: Settings) -> None:
    now = datetime.now(UTC)
    old = [{"item": 1, "at": now - timedelta(days=300)}, {"item": 4, "at": now}]

    def first(history: list[Any], **options: Any) -> str:
        [hit] = recommend(there, settings, history=history, k=1, diversity=0, **options)
        return str(hit.item["title"])

    assert first(old, half_life_days=30) == "Sea"
    assert first([{"item": 1}, {"item": 4, "weight": 0.1}]) == "Lamp"
    assert first([{"item": 1, "weight": -1, "at": "2026-01-01"}, 4]) == "Sea"
    assert (
        first([{"item": 1, "at": (now + timedelta(days=3000)).isoformat()}, *old[1:]], half_life_days=1)
        in FILMS[0] + FILMS[3]
    )


def test_a_person_s_history_is_read(rated: CollectionDefinition, settings: Settings) -> None:
    hits = recommend(rated, settings, user=1, half_life_days=100, k=3, diversity=0)
    assert not {"1", "4"} & set(keys(hits)) and hits[0].item["title"] == "Sea"
    assert keys(recommend(rated, settings, user="1", half_life_days=100, k=3, diversity=0)) == keys(hits)
    with pytest.raises(ConfigurationError, match=r"user 'nobody'.*`interactions.user:` is a column of type bigint"):
        recommend(rated, settings, user="nobody")


def test_what_has_no_vector_is_answered_by_what_others_liked(
    rated: CollectionDefinition, settings: Settings, database: Database
) -> None:
    collection, _ = sync_once(rated, settings)
    found = build_cooccurrence(database, Interactions(collection.source))
    assert (found.people, found.items, found.left_out) == (8, 6, 0)
    hits = recommend(rated, settings, user=2, k=1)
    assert keys(hits) == ["5"]
    assert [leg.answered_by for leg in hits.explanation.legs] == ["cooccurrence"]
    # Somebody unknown, and somebody whose only film is gone: what most people liked.
    for history in ({"user": 77}, {"user": 16}, {"history": [99]}):
        hits = recommend(rated, settings, k=2, **history)
        assert sorted(keys(hits)) == ["5", "7"]
        assert hits.explanation.legs[-1].how == "what most people liked"


def test_cooccurrence_is_the_cosine_of_people_and_is_written_anew(
    rated: CollectionDefinition, settings: Settings, database: Database
) -> None:
    collection, _ = sync_once(rated, settings)
    build_cooccurrence(database, Interactions(collection.source))
    pairs = execute(database, "SELECT item_key, other_key, score FROM embeddings.cooccurrence")
    scores = {(one, other): score for one, other, score in pairs}
    assert scores["7", "5"] == scores["5", "7"] == pytest.approx(4 / np.sqrt(4 * 5))
    assert ("1", "4") in scores and ("4", "5") not in scores
    execute(database, "DELETE FROM ratings WHERE who <> 1")
    build_cooccurrence(database, Interactions(collection.source))
    assert execute(database, "SELECT count(*) FROM embeddings.cooccurrence") == [(2,)]
    execute(database, "DELETE FROM ratings")
    assert build_cooccurrence(database, Interactions(collection.source)).pairs == 0
    assert execute(database, "SELECT count(*) FROM embeddings.liked") == [(0,)]


def test_filters_apply_to_every_way(rated: CollectionDefinition, settings: Settings, database: Database) -> None:
    collection, _ = sync_once(rated, settings)
    build_cooccurrence(database, Interactions(collection.source))
    where = {"revenue": {"lt": 60}}
    for given in ({"liked": [1]}, {"user": 2}, {"user": 77}):
        hits = recommend(rated, settings, where=where, k=3, **given)
        assert hits and all(hit.item["revenue"] < 60 for hit in hits)


def test_popularity_counts_by_its_share(there: CollectionDefinition, settings: Settings) -> None:
    blend = with_films(recommend={"blend": {"revenue": 0.9}, "diversity": 0})
    assert keys(recommend(blend, settings, liked=[1], k=2)) == ["3", "4"]  # 90 and 50, of those with a vector
    assert keys(recommend(there, settings, liked=[1], k=2, diversity=0))[0] in ("2", "3")
    popular = recommend(blend, settings, k=3)
    assert keys(popular) == ["3", "7", "4"] and popular.explanation.legs[0].how == "the highest revenue"
    assert popular[1].text == "" and popular[1].item["title"] == "Blank"
    few = recommend(blend, settings, liked=[1], where={"revenue": {"gte": 70}}, k=2)
    assert keys(few) == ["3", "7"]  # filled up with what has no vector


def test_what_is_liked_and_not_there_is_told(
    rated: CollectionDefinition, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    recommend(rated, settings, liked=[1, 7, 99], k=1)  # the last but one has no text
    [told] = caplog.messages
    assert "of what was liked, 1 item is not there: ['99']" in told
    caplog.clear()
    recommend(rated, settings, liked=[1, 7], k=1)
    assert not caplog.messages


def test_nothing_to_go_by_is_told(there: CollectionDefinition, settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="nothing was liked, and nothing says what is popular"):
        recommend(there, settings)
    with pytest.raises(ConfigurationError, match="declare `interactions:`"):
        recommend(there, settings, user=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"liked": "1"}, "liked cannot be '1': it may be a list of items' keys"),
        ({"liked": [None]}, "item_key cannot be None"),
        ({"history": [{"item": 1, "weight": float("nan")}]}, "the weight of item '1' cannot be nan"),
        ({"history": [{"item": 1, "weight": True}]}, "cannot be True"),
        ({"history": [{"item": 1, "at": "yesterday"}]}, "`at` of item '1' cannot be 'yesterday'"),
        ({"history": [{"key": 1}]}, "is none of its entries"),
        ({"history": {"item": 1}}, "history cannot be"),
        ({"liked": [1], "strategy": "median"}, "strategy cannot be 'median': it may be 'mean' or 'best'"),
        ({"liked": [1], "diversity": 2}, "diversity cannot be 2: it may be a number from 0 to 1"),
        ({"liked": [1], "half_life_days": 0}, "half_life_days cannot be 0"),
        ({"liked": [1], "k": 0}, "k cannot be 0"),
        ({"user": 1.5}, "user cannot be 1.5"),
    ],
)
def test_what_cannot_be_is_named(there: CollectionDefinition, settings: Settings, given: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        recommend(there, settings, **given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"user": "whom"}, "names a column 'whom' that is not there (did you mean 'who'?)"),
        (
            {"weight": "seen"},
            "`interactions.weight:` names 'seen' of type timestamp without time zone, which is not a number",
        ),
        ({"at": "stars"}, "`interactions.at:` names 'stars' of type numeric, which is not a timestamp"),
        ({"table": "rating"}, "cannot be read from table 'rating'"),
        ({"table": None, "query": "SELECT 1 / 0 AS who, 1 AS film, 1 AS stars, now() AS seen"}, "division by zero"),
    ],
)
def test_interactions_that_cannot_be_read_are_told(
    rated: CollectionDefinition, settings: Settings, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(SourceError, match=re.escape(said)):
        recommend(with_films(interactions={**INTERACTIONS, **changed}), settings, user=1)


def test_diversity_takes_what_is_unlike_what_was_taken() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    scores = np.array([0.9, 0.8, 0.5])
    assert diverse(scores, vectors, 3, 0.0) == [0, 1, 2]
    assert diverse(scores, vectors, 3, 0.5) == [0, 2, 1]
    assert diverse(scores, vectors, 9, 1.0)[0] == 0


def test_places_are_shared_by_equals_and_last_for_none() -> None:
    assert places(np.array([3.0, np.nan, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.0, 0.5]
    assert places(np.array([5.0, 5.0])).tolist() == [0.5, 0.5]
    assert places(np.array([np.nan, 7.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("strategy", ["mean", "best"])
@pytest.mark.parametrize(
    "history",
    [
        [{"item": 1, "weight": 1e308}, {"item": 2, "weight": 1e308}],
        [{"item": 1, "weight": 1e-320}, {"item": 2, "weight": 1e-320}],
        [{"item": 1, "at": "2001-01-01"}, {"item": 2, "at": "2001-01-02"}],
        [{"item": 1, "at": "2001-01-01"}, {"item": 4, "weight": -1.0, "at": "2020-01-01"}],
    ],
)
def test_a_history_that_is_long_past_or_weighs_anything_says_what_was_liked(
    there: CollectionDefinition, settings: Settings, history: list[dict[str, Any]], strategy: Any
) -> None:
    hits = recommend(there, settings, history=history, half_life_days=1, k=2, diversity=0, strategy=strategy)
    assert hits[0].item_key in ("2", "3") and all(np.isfinite(hit.score) for hit in hits)
