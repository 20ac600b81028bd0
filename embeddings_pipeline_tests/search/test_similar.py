"""Items like an item, several vectors at once, and what a search says of itself."""

import asyncio
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline import open_collection
from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once

TWO = {"base": "{overview}", "title": "{title}"}


def test_items_like_an_item_without_itself_and_without_an_encoder(database: Database, settings: Settings) -> None:
    make_films(
        database,
        [(1, "Lamp", "a light for the desk", 0), (2, "Lamp", "a light for a desk", 0), (3, "Sea", "walruses", 0)],
    )
    sync_once(definition(), settings)
    calls = DeterministicEncoder.calls
    for key in (1, "1"):
        assert [hit.item_key for hit in similar(definition(), settings, key)] == ["2", "3"]
    assert [hit.item_key for hit in similar(definition(), settings, 3, k=1)] != ["3"]
    assert DeterministicEncoder.calls == calls


def test_a_key_of_several_columns_is_a_list_or_as_a_hit_has_it(database: Database, settings: Settings) -> None:
    make_films(database, [(n, f'Lamp "{n}" é', "a light", 0) for n in (1, 2)])
    one = definition(source={"table": "films", "key": ["id", "title"]})
    sync_once(one, settings)
    [by_list] = similar(one, settings, [1, 'Lamp "1" é'])
    [by_text] = similar(one, settings, by_list.item_key)
    assert by_list.item["title"] == 'Lamp "2" é' and by_text.item["title"] == 'Lamp "1" é'


def test_an_item_that_is_not_there_or_has_no_vector_is_told(database: Database, settings: Settings) -> None:
    make_films(database, [(1, "Lamp", "a light", 0), (2, "", "", 0)])
    sync_once(definition(), settings)
    with pytest.raises(ConfigurationError, match="has no item '9'"):
        similar(definition(), settings, 9)
    with pytest.raises(
        ConfigurationError, match="item '2' has no vector base to compare others with: its text is blank"
    ):
        similar(definition(), settings, 2)
    nothings: list[Any] = [None, "", 1.5, [], {"id": 1}, True]
    for nothing in nothings:
        with pytest.raises(ConfigurationError, match="item_key cannot be"):
            similar(definition(), settings, nothing)


def test_an_item_counts_by_the_nearest_of_several_vectors(database: Database, settings: Settings) -> None:
    make_films(database, [(1, "Lamp", "walruses in winter", 0), (2, "Sea", "a lamp", 0), (3, "Other", "nothing", 0)])
    one = definition(vectors=TWO)
    sync_once(one, settings)
    separate = {name: {hit.item_key: hit for hit in search(one, settings, "lamp", vectors=name)} for name in TWO}
    both = search(one, settings, "lamp", vectors=["base", "title"])
    assert both[0].item_key == "1" and both[0].vector_name == "title"
    for hit in both:
        assert hit.score == max(separate[name][hit.item_key].score for name in TWO)
    assert [leg.vector_name for leg in both.explanation.legs] == ["base", "title"]
    wrong: Any
    for wrong in ("titel", ["base", "titel"]):
        with pytest.raises(ConfigurationError, match=re.escape("(did you mean 'title'?)")):
            search(one, settings, "lamp", vectors=wrong)
    for wrong in ([], [3], 3, "", {"base": 1}):
        with pytest.raises(ConfigurationError, match="vectors cannot be"):
            search(one, settings, "lamp", vectors=wrong)


def test_a_search_says_what_it_did(database: Database, settings: Settings) -> None:
    make_films(database, films(5))
    sync_once(definition(), settings)
    explanation = search(definition(), settings, "Film 3", k=2).explanation
    [leg] = explanation.legs
    assert (explanation.profile, leg.answered_by, leg.how, leg.fell_back) == ("test", "pgvector", "all compared", ())
    assert next(iter(leg.ranks)) == "3" and leg.ranks["3"][0] == 1
    assert {"encode", "search"} == set(explanation.milliseconds)


@pytest.mark.parametrize("query", ["x " * 50_000, "🎬 🎞️", "\"' & | ! :* \\", "кино 映画"])
def test_any_text_can_be_asked(database: Database, settings: Settings, query: str) -> None:
    make_films(database, films(5))
    sync_once(definition(), settings)
    assert len(search(definition(), settings, query, k=5)) == 5


@pytest.mark.parametrize("k", [0, -1, 10_000, True, "10", 1.5, None, pytest.param(10**5000, id="long")])
def test_a_number_of_items_that_cannot_be_is_named(settings: Settings, k: Any) -> None:
    for ask in (search, similar) if k is not None else (similar,):
        with pytest.raises(ConfigurationError, match=r"k cannot be .*: it may be a whole number from 1 to 1000"):
            ask(definition(), settings, "1", k=k)


def test_an_async_program_searches_in_threads_while_its_loop_goes_on(
    database: Database, project: Settings, tmp_path: Path
) -> None:
    make_films(database, films(20))
    sync_once(definition(), project)
    config = definition().attributes.model_dump(exclude_defaults=True, mode="json")
    (tmp_path / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    ticks = 0

    async def tick(ended: asyncio.Event) -> None:
        nonlocal ticks
        while not ended.is_set():
            await asyncio.sleep(0.01)
            ticks += 1

    async def main() -> list[list[str]]:
        ended = asyncio.Event()
        ticking = asyncio.create_task(tick(ended))
        with open_collection("films", defs_dir=tmp_path) as client:
            searches = [asyncio.to_thread(client.search, f"Film {n % 20 + 1}", 3) for n in range(60)]
            alike = [asyncio.to_thread(client.similar, n % 20 + 1, 3) for n in range(60)]
            found = await asyncio.gather(*searches, *alike)
        ended.set()
        await ticking
        return [[hit.item_key for hit in hits] for hits in found]

    threads_before = threading.active_count()
    DeterministicEncoder.seconds_per_call = 0.05
    try:
        found = asyncio.run(main())
    finally:
        DeterministicEncoder.reset()
    assert all(len(set(keys)) == 3 for keys in found)
    assert ticks > 5  # no search was on the loop, which went on for half a second
    assert threading.active_count() - threads_before < 60  # half as many as searches


def test_no_session_is_held_while_a_model_works(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    sync_once(definition(), settings)
    DeterministicEncoder.seconds_per_call = 4.0
    try:
        asking = [threading.Thread(target=search, args=(definition(), settings, "a story")) for _ in range(20)]
        for thread in asking:
            thread.start()
        time.sleep(0.7)
        assert similar(definition(), settings, 1)
        assert all(thread.is_alive() for thread in asking)
        for thread in asking:
            thread.join()
    finally:
        DeterministicEncoder.reset()
    assert execute(database, "SELECT count(*) > 0 FROM embeddings.films") == [(True,)]
