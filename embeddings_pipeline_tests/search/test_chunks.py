"""One long item never takes the places of others: a search returns as many items as are asked for."""

from typing import Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.search import by_faiss, nearest
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import PROFILE, definition, execute, make_films, sync_once

QUERY = "cats purr and chase mice"
LONG = [(1, "", ". ".join(f"{QUERY}, remark {n}" for n in range(300)), 0)]
SHORT = [(n, "", f"a note about cats, page {n}", 0) for n in range(2, 30)]


@pytest.fixture(params=["all compared", "hnsw", "ivfflat", "faiss"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in ("hnsw", "ivfflat"):
        monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    return str(request.param)


def synced(database: Database, settings: Settings, way: str, characters: int, **others: Any) -> CollectionDefinition:
    """A collection of chunks, with the index that a way of searching needs."""
    method = way if way in ("hnsw", "ivfflat") else "none"
    one = definition(
        vectors={"base": "{overview}"}, chunk={"characters": characters}, index={"method": method}, **others
    )
    collection, _ = sync_once(one, settings)
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    if way == "faiss":
        build(database, collection.model.destination, settings.state_dir / "faiss")
    return one


def by(way: str) -> dict[str, Any]:
    return {"index": "faiss" if way == "faiss" else "pgvector"}


def test_one_long_item_is_one_of_the_items(database: Database, settings: Settings, way: str) -> None:
    make_films(database, [*LONG, *SHORT])
    one = synced(database, settings, way, 50)
    for k in (1, 10, 29, 40):
        hits = search(one, settings, QUERY, k=k, **by(way))
        assert len({hit.item_key for hit in hits}) == len(hits) == min(k, 29)
        [leg] = hits.explanation.legs
        assert leg.answered_by == by(way)["index"] and [*leg.ranks] == [hit.item_key for hit in hits]
    assert hits[0].item_key == "1" and "cats purr" in hits[0].text


def test_each_item_has_many_chunks(database: Database, settings: Settings, way: str) -> None:
    every = [(n, "", ". ".join(f"{QUERY} in book {n}, remark {i}" for i in range(25)), 0) for n in range(1, 13)]
    make_films(database, every)
    one = synced(database, settings, way, 50)
    query = f"{QUERY} in book 3"
    [vector] = DeterministicEncoder(Profile(**PROFILE)).encode_queries([query])  # type: ignore[arg-type]
    best = "SELECT item_key, max(1 - (embedding <=> %s::halfvec)) FROM embeddings.films GROUP BY 1"
    exact = dict(execute(database, best, [str(vector.tolist())]))
    for k in (3, 12):
        hits = search(one, settings, query, k=k, **by(way))
        assert len(hits) == k
        assert [hit.score for hit in hits] == pytest.approx(sorted(exact.values(), reverse=True)[:k], abs=1e-6)
    others = similar(one, settings, 3, k=11, **by(way))
    assert {hit.item_key for hit in others} == {str(n) for n in range(1, 13)} - {"3"}


def test_of_items_that_are_equally_near_faiss_names_those_that_postgres_names(
    database: Database, settings: Settings
) -> None:
    near = [(700, "", ". ".join(f"{QUERY}, remark {n}" for n in range(70)), 0)]
    make_films(database, [*near, *((n, "", "a note about cats", 0) for n in range(1, 600))])
    one = synced(database, settings, "faiss", 50)
    for k in (5, 10, 100):
        assert search(one, settings, QUERY, k=k, index="faiss") == search(one, settings, QUERY, k=k)


def test_an_index_that_gives_too_few_is_helped_out(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_films(database, [*LONG, *SHORT])
    one = synced(database, settings, "hnsw", 50)
    monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    monkeypatch.setattr(nearest, "MOST_FROM_INDEX", 60)
    hits = search(one, settings, QUERY, k=10)
    assert len(hits) == 10
    assert hits.explanation.legs[0].fell_back[0].endswith("items: all were compared")


def test_postgres_answers_if_faiss_is_asked_for_too_much(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_films(database, [*LONG, *SHORT])
    one = synced(database, settings, "faiss", 50)
    monkeypatch.setattr(by_faiss, "MOST_TEXTS", 60)
    hits = search(one, settings, QUERY, k=10, index="faiss")
    [leg] = hits.explanation.legs
    assert len(hits) == 10 and leg.answered_by == "pgvector"
    assert leg.fell_back == ("60 texts are nearer than those of 10 items: PostgreSQL answered",)


def test_a_long_item_that_came_after_the_generation_takes_no_places_either(
    database: Database, settings: Settings
) -> None:
    make_films(database, SHORT[:20])
    one = synced(database, settings, "faiss", 50)
    execute(database, "INSERT INTO films VALUES (1, '', %s, 0)", [LONG[0][2]])
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO films VALUES (%s, %s, %s, %s)", SHORT[20:])
    sync_once(one, settings)
    hits = search(one, settings, QUERY, k=29, index="faiss")
    assert hits.explanation.legs[0].answered_by == "faiss"
    assert hits == search(one, settings, QUERY, k=29) and len(hits) == 29
