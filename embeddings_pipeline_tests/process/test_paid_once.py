"""A sync with a hosted model, killed at random moments: no text is billed twice but those in flight then (rule 14)."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders.pace import MOST
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.forked import start
from embeddings_pipeline_tests.support.workbench import committed, execute, films, make_films, wait_until

KILLS = int(os.environ.get("EMBEDDINGS_TESTS_KILLS", "5"))
FILMS, INPUTS = 600, 10  # inputs: of a request


@pytest.fixture
def service(database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose profile the collection `films` has, and the table."""
    make_films(database, films(FILMS))
    with EmbeddingServer(latency=0.05) as server:
        profile = {
            "name": "hosted",
            "provider": "openai",
            "model": "text-embedding-3-small",
            "dimensions": 1536,
            "url": server.url,
            "batch_size": INPUTS,
            "requests_per_minute": 0,
        }
        attributes = {
            "name": "films",
            "source": {"table": "films", "key": ["id"]},
            "vectors": {"base": "{title} | {overview}"},
            "items_per_batch": 200,
            "profile": profile,
        }
        defs = tmp_path / "defs" / "films" / "defs.yaml"
        defs.parent.mkdir(parents=True)
        defs.write_text(yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}))
        monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs.parents[1]))
        yield server


def kept(database: Database) -> set[bytes]:
    return {bytes(row[0]) for row in execute(database, "SELECT content_hash FROM embeddings.embedding_cache")}


@pytest.mark.timeout(300 + 30 * KILLS)
def test_each_text_is_billed_once_beyond_what_was_in_flight(database: Database, service: EmbeddingServer) -> None:
    chance, in_flight = random.Random(14), Counter[bytes]()
    for kill in range(KILLS):
        billed = sum(service.billed.values())
        process = start(["sync"])
        more = chance.randint(1, max(2, 2 * (FILMS - billed) // (KILLS - kill)))
        wait_until(lambda: process.exitcode is not None or sum(service.billed.values()) >= billed + more, pause=0.002)  # noqa: B023
        time.sleep(chance.random() * 0.06)
        process.kill()
        process.join()
        time.sleep(0.1)  # what the server has begun, it bills
        lost = {content_hash(text) for text in list(service.billed)} - kept(database)
        in_flight.update(lost)
        assert len(lost) <= MOST * INPUTS
    process = start(["sync"])
    process.join(120)
    assert process.exitcode == 0
    assert len(committed(database)) == FILMS
    for text, number in service.billed.items():
        assert number <= 1 + in_flight[content_hash(text)], text
    spent = execute(database, "SELECT sum(texts), sum(tokens) FROM embeddings.embedding_spend")[0]
    assert spent[0] == FILMS  # each answer that was kept; one that was in flight is billed, and not known of


def test_two_syncs_at_once_pay_for_no_text_twice(database: Database, service: EmbeddingServer) -> None:
    start(["sync"]).join(120)  # registers the collection, and embeds
    execute(database, "UPDATE films SET overview = overview || ' anew'")
    service.forget()
    processes = [start(["sync"]) for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    films_texts = [text for text in service.billed if text.startswith("Film")]
    assert len(films_texts) == FILMS
    assert max(service.billed[text] for text in films_texts) == 1


@pytest.mark.parametrize("point", ["answer.arrived", "answer.kept"])
def test_killed_between_an_answer_and_its_use(
    database: Database, service: EmbeddingServer, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("EMBEDDINGS_FAILPOINTS", f"{point}=kill")
    process = start(["sync"])
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    time.sleep(0.1)
    lost = {content_hash(text) for text in list(service.billed)} - kept(database)
    assert bool(kept(database)) == (point == "answer.kept")
    monkeypatch.delenv("EMBEDDINGS_FAILPOINTS")
    process = start(["sync"])
    process.join(120)
    assert process.exitcode == 0
    twice = {content_hash(text) for text, number in service.billed.items() if number > 1}
    assert twice <= lost
