"""A search with FAISS finds what was committed after its index was built, and nothing that has gone since."""

import threading

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.lag import faiss_standing, indexes_due
from embeddings_pipeline.index import faiss_delta
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index, read_manifest
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.standing import Standing
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import lock_batch
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    definition,
    execute,
    films,
    later,
    make_films,
    run_batch,
    sync_once,
)

QUERIES = ("walruses", "a story about number 7", "film", "friends", "lamp")


@pytest.fixture
def indexed(database: Database, settings: Settings) -> Collection:
    """100 films with both indexes."""
    make_films(database, films(100))
    collection, _ = sync_once(definition(), settings)
    ensure_index(database, collection.model.destination, collection.definition.attributes.index, ["base"])
    build(database, collection.model.destination, settings.state_dir / "faiss")
    return collection


def assert_same(settings: Settings, k: int = 12) -> None:
    """FAISS and PostgreSQL, which compares all here, find the same."""
    for query in QUERIES:
        by_faiss, by_postgres = (search(definition(), settings, query, k=k, index=i) for i in ("faiss", "pgvector"))
        assert by_faiss == by_postgres, query
        assert len(by_faiss) == k


def test_what_is_inserted_edited_and_deleted_after_the_build_is_so_in_a_search(
    database: Database, settings: Settings, indexed: Collection
) -> None:
    execute(database, "INSERT INTO films VALUES (200, 'Walruses', 'in winter', 1), (201, 'Lamp', 'light', 1)")
    execute(database, "UPDATE films SET overview = 'lamp and friends' WHERE id IN (7, 8)")
    execute(database, "DELETE FROM films WHERE id IN (1, 2)")
    sync_once(definition(), settings)
    assert faiss_standing(indexed) is Standing.BEHIND
    assert_same(settings)
    assert search(definition(), settings, "walruses", k=1, index="faiss")[0].item_key == "200"
    assert not indexes_due(indexed)


def test_those_that_are_nearest_may_all_have_gone(
    database: Database, settings: Settings, indexed: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many as a search asks for, and their successors are far away.
    execute(database, "UPDATE films SET title = 'Lamp', overview = 'light' WHERE id <= 15")
    sync_once(definition(), settings)
    for query in ("a story about number 7", "Film 3"):
        by_faiss, by_postgres = (
            search(definition(), settings, query, k=2, index=i)  # type: ignore[arg-type]
            for i in ("faiss", "pgvector")
        )
        assert by_faiss == by_postgres


def test_a_text_that_was_in_quarantine_at_the_build_is_found_once_it_has_its_vector(
    database: Database, settings: Settings, indexed: Collection
) -> None:
    DeterministicEncoder.fail_on = "poison"
    execute(database, "UPDATE films SET overview = 'poison and walruses' WHERE id = 5")
    sync_once(definition(), settings)
    build(database, indexed.model.destination, settings.state_dir / "faiss")
    DeterministicEncoder.fail_on = None
    later(database, 3600)
    for batch in indexed.ledger.work():
        run_batch(indexed, batch, "mended")
    assert search(definition(), settings, "poison and walruses", k=1, index="faiss")[0].item_key == "5"
    assert_same(settings)


def test_a_generation_is_due_when_searches_wait_for_what_came_after_it(
    database: Database, settings: Settings, indexed: Collection
) -> None:
    execute(database, "UPDATE films SET overview = 'x' || id WHERE id <= 10")
    sync_once(definition(), settings)
    assert not indexes_due(indexed)
    execute(database, "UPDATE films SET overview = 'y' WHERE id = 11")
    sync_once(definition(), settings)
    assert indexes_due(indexed)
    build(database, indexed.model.destination, settings.state_dir / "faiss")
    assert not indexes_due(indexed) and faiss_standing(indexed) is Standing.CURRENT
    execute(
        database, "UPDATE embeddings.collection SET version = version + %s", [faiss_delta.GROWN_COMMITS + 1]
    )  # nobody knows for ever what it is of
    assert indexes_due(indexed)


def test_a_commit_that_is_under_way_when_a_build_begins_is_in_it_or_after_it(
    database: Database, settings: Settings, indexed: Collection
) -> None:
    folder, table = settings.state_dir / "faiss", indexed.model.destination
    with database.connect() as slow:
        lock_batch(slow, "films", 3)
        [(early,)] = slow.execute(
            """INSERT INTO embeddings.films_text (item_key, vector_name, chunk, content_hash, text, blank)
               VALUES ('1', 'base', 99, '', 'early', false) RETURNING id"""
        ).fetchall()
        slow.execute(
            f"INSERT INTO embeddings.{table.name} SELECT {early}, 'base', '', embedding FROM embeddings.films LIMIT 1"
        )  # type: ignore[arg-type]
        execute(database, "UPDATE films SET overview = 'newer' WHERE id = 1")
        run_batch(indexed, 0, "newer")
        building = threading.Thread(target=lambda: build(database, table, folder))
        building.start()
        building.join(1)
        assert building.is_alive()
        slow.commit()
        building.join(30)
    manifest = read_manifest(folder, "films")
    assert manifest is not None and manifest.newest_text > early
    assert early in open_index(folder, "films").ids("base")
