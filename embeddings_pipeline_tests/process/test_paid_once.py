"""A sync with a hosted model, killed at random moments: no text is billed twice but those in flight then (rule 14)."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.process.chaos_hosted import FILMS, LATENCY, kept, kill_often, write_definition
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.forked import start
from embeddings_pipeline_tests.support.workbench import execute, films, make_films

KILLS = int(os.environ.get("EMBEDDINGS_TESTS_KILLS", "5"))


@pytest.fixture
def service(
    database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmbeddingServer]:
    """A server whose profile the collection `films` has, and the table."""
    make_films(database, films(FILMS))
    with EmbeddingServer(latency=LATENCY) as server:
        write_definition(tmp_path / "defs", server)
        monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(tmp_path / "defs"))
        yield server


@pytest.mark.timeout(300 + 30 * KILLS)
def test_each_text_is_billed_once_beyond_what_was_in_flight(database: Database, service: EmbeddingServer) -> None:
    found = kill_often(database, service, KILLS, random.Random(14), say=lambda line: None)
    assert found["kills"] == KILLS and found["texts"] >= FILMS and found["again"] <= found["in flight"]
    spent = execute(database, "SELECT sum(texts) FROM embeddings.embedding_spend")
    # Each answer that was kept; one that was in flight is billed, and not known of.
    assert spent == [(found["billed"] - found["in flight"],)]


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
