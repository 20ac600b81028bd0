"""What a process remembers of filters is what is committed."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.search import matching, nearest, selectivity
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once


@pytest.mark.parametrize("most_committed", [20, 0])
def test_what_was_committed_since_counts_for_a_filter_that_was_asked_before(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, most_committed: int
) -> None:
    one = definition(filters={"revenue": "number"})
    make_films(database, films(100))
    execute(database, "UPDATE films SET revenue = id")
    collection, _ = sync_once(one, settings)
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    ensure_filters(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    monkeypatch.setattr(matching, "MOST_COMMITTED", most_committed)
    monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    monkeypatch.setattr(selectivity, "LOOKED_UP", 0)

    def found(index: str) -> set[int]:
        hits = search(one, settings, "a story", k=100, where={"revenue": {"lte": 30}}, index=index)  # type: ignore[arg-type]
        [leg] = hits.explanation.legs
        assert leg.answered_by == index and not leg.fell_back
        return {int(hit.item_key) for hit in hits}

    expected = set(range(1, 31))
    assert found("pgvector") == found("faiss") == expected
    # The payload alone: no vector is written.
    execute(database, "UPDATE films SET revenue = 1000 WHERE id IN (5, 6); UPDATE films SET revenue = 0 WHERE id = 95")
    sync_once(one, settings)
    expected = expected - {5, 6} | {95}
    assert found("pgvector") == found("faiss") == expected
    execute(database, "DELETE FROM films WHERE id IN (7, 8); INSERT INTO films VALUES (200, 'New', 'one', 1)")
    sync_once(one, settings)
    expected = expected - {7, 8} | {200}
    assert found("pgvector") == found("faiss") == expected


def test_a_process_remembers_the_filters_that_were_asked_last(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = definition(filters={"revenue": "number"})
    make_films(database, films(100))
    execute(database, "UPDATE films SET revenue = id")
    collection, _ = sync_once(one, settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    monkeypatch.setattr(matching, "TEXT_BYTES", 1_000_000)
    monkeypatch.setattr(selectivity, "LOOKED_UP", 0)
    matching._remembered.clear()
    for most in (20, 40, 10, 20):
        hits = search(one, settings, "a story", k=100, where={"revenue": {"lte": most}}, index="faiss")
        assert len(hits) == most
    assert sorted(len(each.matching.ids) for each in matching._remembered.values()) == [10, 20]


def test_filters_that_nothing_meets_are_not_remembered_without_bound(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has the commits of all batches in mind."""
    one = definition(filters={"revenue": "number"})
    make_films(database, films(100))
    collection, _ = sync_once(one, settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    monkeypatch.setattr(selectivity, "LOOKED_UP", 0)
    matching._remembered.clear()

    def remembered() -> int:
        for nothing in range(20):
            where = {"revenue": {"lt": -nothing}}
            assert search(one, settings, "a story", where=where, index="faiss") == []
        return len(matching._remembered)

    monkeypatch.setattr(matching, "MOST_FILTERS", 7)
    assert remembered() == 7
    monkeypatch.setattr(matching, "MOST_REMEMBERED", 10 * matching.BATCH_BYTES)
    assert remembered() == 1


def test_filters_are_right_while_others_commit(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread edits, deletes, adds and rolls back; each search finds what an exact statement finds, asked in
    between two moments in which nothing was committed.
    """
    one = definition(filters={"revenue": "number", "title": "text"}, items_per_batch=7, words={})
    make_films(database, films(100))
    execute(database, "UPDATE films SET revenue = id")
    collection, _ = sync_once(one, settings)
    ensure_words(database, one)
    ensure_filters(database, one)
    build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
    monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", 0)
    monkeypatch.setattr(selectivity, "LOOKED_UP", 0)
    monkeypatch.setattr(matching, "MOST_COMMITTED", 5)
    matching._remembered.clear()
    chance, done, compared = random.Random(3), threading.Event(), Counter[str]()

    def commit() -> None:
        try:
            for turn in range(40):
                some, value = chance.sample(range(1, 130), chance.choice((1, 3, 30))), chance.randint(0, 60)
                execute(
                    database,
                    chance.choice(
                        [
                            "UPDATE films SET revenue = %(value)s WHERE id = ANY (%(some)s)",
                            "DELETE FROM films WHERE id = ANY (%(some)s[:5])",
                            "INSERT INTO films SELECT id, 'New', 'a story', %(value)s FROM unnest(%(some)s) AS id "
                            "ON CONFLICT (id) DO UPDATE SET overview = 'another story'",
                        ]
                    ),
                    {"some": some, "value": value},
                )
                sync_once(one, settings, f"run {turn}")
        finally:
            done.set()

    def exact(most: int) -> tuple[object, set[str]]:
        with database.connect() as connection:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            [(state,)] = connection.execute("SELECT max(committed_at) FROM embeddings.batch").fetchall()
            rows = connection.execute(
                "SELECT item_key FROM embeddings.films WHERE (payload ->> 'revenue')::numeric <= %s", [most]
            ).fetchall()
        return state, {key for (key,) in rows}

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        quiet = 0  # searches after the last commit
        while quiet < 20:
            quiet += done.is_set()
            most, way = chance.choice((5, 20, 40)), chance.choice(("pgvector", "faiss", "words"))
            how: Any = {"mode": "text"} if way == "words" else {"mode": "dense", "index": way}
            before = exact(most)
            hits = search(one, settings, "story number", k=200, where={"revenue": {"lte": most}}, **how)
            if exact(most) == before:
                compared[way] += 1
                assert {hit.item_key for hit in hits} == before[1], (way, most, hits.explanation)

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(commit), pool.submit(ask, 1), pool.submit(ask, 2)]
        for each in working:
            each.result()
    assert all(compared[way] for way in ("pgvector", "faiss", "words"))
