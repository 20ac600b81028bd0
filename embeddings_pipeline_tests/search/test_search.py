"""The query path: what is there is found, and never with another model's vectors."""

from decimal import Decimal

import pytest

from embeddings_pipeline.cli.search import print_hit
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, ProfileError
from embeddings_pipeline.index.faiss_build import build
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


def test_equal_ones_come_in_the_order_of_their_keys_whatever_is_asked(database: Database, settings: Settings) -> None:
    alike = [(n, "Tent", "light", 0) for n in (30, 4, 100, 12, 7, 55, 1)]
    make_films(database, [*alike, (2, "Sauna bucket", "cedar wood", 0)])
    one = definition(items_per_batch=2)
    collection, _ = sync_once(one, settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    for k in (1, 3, 7, 8):
        expected = ["1", "100", "12", "30", "4", "55", "7", "2"][:k]
        for index in ("pgvector", "faiss"):
            found = search(one, settings, "a light tent", k=k, index=index)  # type: ignore[arg-type]
            assert [hit.item_key for hit in found] == expected, (k, index)


def test_a_hit_has_its_nearest_text_and_numbers_with_all_digits(database: Database, settings: Settings) -> None:
    make_films(database, [(1, "Lamp", "same words again " * 20 + "the end of it", 0), (2, "Other", "nothing", 0)])
    execute(database, "ALTER TABLE films ADD price numeric DEFAULT 12.50, ADD big numeric, ADD ratio double precision")
    execute(database, "UPDATE films SET big = 12345678901234567890.123456789, ratio = 0.1")
    one = definition(columns=["price", "big", "ratio", "revenue"], chunk={"characters": 60})
    collection, _ = sync_once(one, settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    for index in ("pgvector", "faiss"):
        [hit] = search(one, settings, "the end of it", k=1, index=index)  # type: ignore[arg-type]
        assert hit.text.endswith("the end of it") and len(hit.text) <= 60
        big, price = Decimal("12345678901234567890.123456789"), Decimal("12.50")
        assert hit.item == {"price": price, "big": big, "ratio": Decimal("0.1"), "revenue": 0}
        assert str(hit.item["price"]) == "12.50"


def test_both_indexes_give_the_same_scores_in_the_same_order(database: Database, settings: Settings) -> None:
    make_films(database, [(n, f"lamp {n}", "", 0) for n in range(1, 41)])
    one = definition()
    collection, _ = sync_once(one, settings)
    build(database, collection.model.destination, settings.state_dir / "faiss")
    for query in ("lamp", "lamp 7", "a light"):
        by_postgres, by_faiss = (search(one, settings, query, k=40, index=i) for i in ("pgvector", "faiss"))
        assert by_postgres == by_faiss


def test_numbers_of_any_length_and_shape_are_read(database: Database, settings: Settings) -> None:
    make_films(database, [(1, "Lamp", "light", 0)])
    execute(database, "ALTER TABLE films ADD n numeric, ADD tiny numeric, ADD ratios real[], ADD offer jsonb")
    execute(database, "UPDATE films SET n = (10::numeric ^ 5000), tiny = 0.00000001, ratios = '{1.5,2}'")
    execute(database, """UPDATE films SET offer = '{"price": 12.50}'""")
    one = definition(columns=["n", "tiny", "ratios", "offer"])
    sync_once(one, settings)
    [hit] = search(one, settings, "lamp")
    assert len(str(hit.item["n"])) == 5001 and str(hit.item["tiny"]) == "0.00000001"
    print_hit(hit, one.attributes.columns)


def test_vectors_of_other_weights_answer_no_query(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    sync_once(definition(), settings)
    execute(database, "DELETE FROM embeddings.backfill")
    execute(database, "UPDATE embeddings.collection SET fingerprint = 'another'")
    execute(database, "UPDATE embeddings.model SET fingerprint = 'another'")
    with pytest.raises(ProfileError, match="its vectors were made with"):
        search(definition(), settings, "a story")


@pytest.mark.parametrize(("query", "k"), [("", 1), (" \n", 1), ("\u200b\u00ad", 1), ("x", 0), ("x", 5000)])
def test_a_query_that_cannot_be_asked_is_named(database: Database, settings: Settings, query: str, k: int) -> None:
    with pytest.raises(ConfigurationError):
        search(definition(), settings, query, k=k)
