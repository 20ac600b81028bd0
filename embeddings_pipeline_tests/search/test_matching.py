"""What a process remembers of filters is what is committed."""

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.pgvector import ensure_index
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
    monkeypatch.setattr(matching, "MOST_REMEMBERED", 50)
    monkeypatch.setattr(selectivity, "LOOKED_UP", 0)
    matching._remembered.clear()
    for most in (20, 40, 10, 20):
        hits = search(one, settings, "a story", k=100, where={"revenue": {"lte": most}}, index="faiss")
        assert len(hits) == most
    assert sorted(len(each.matching.ids) for each in matching._remembered.values()) == [10, 20]
