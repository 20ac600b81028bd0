"""The query path: what is there is found, and never with another model's vectors."""

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, ProfileError
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once


def test_an_item_unlike_all_others_is_found_beside_many_alike(database: Database, settings: Settings) -> None:
    alike = [(n, "Down tent", f"light model {n % 7}", 0) for n in range(1, 2001)]
    make_films(database, [*alike, (2001, "Sauna bucket", "cedar wood", 0)])
    one = definition(items_per_batch=5000)
    collection, _ = sync_once(one, settings)
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    [hit] = search(one, settings, "sauna bucket made of cedar", k=1)
    assert hit.item["title"] == "Sauna bucket"


def test_several_chunks_of_an_item_are_one_hit(database: Database, settings: Settings) -> None:
    make_films(database, [(1, "Long", "same words again " * 20, 0), (2, "Other", "nothing alike", 0)])
    one = definition(chunk={"characters": 60})
    sync_once(one, settings)
    assert [hit.item_key for hit in search(one, settings, "same words again", k=2)] == ["1", "2"]


def test_vectors_of_other_weights_answer_no_query(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    sync_once(definition(), settings)
    execute(database, "DELETE FROM embeddings.backfill")
    execute(database, "UPDATE embeddings.collection SET fingerprint = 'another'")
    execute(database, "UPDATE embeddings.model SET fingerprint = 'another'")
    with pytest.raises(ProfileError, match="its vectors were made with"):
        search(definition(), settings, "a story")


@pytest.mark.parametrize(("query", "k"), [("", 1), (" \n", 1), ("x", 0), ("x", 5000)])
def test_a_query_that_cannot_be_asked_is_named(database: Database, settings: Settings, query: str, k: int) -> None:
    with pytest.raises(ConfigurationError):
        search(definition(), settings, query, k=k)
