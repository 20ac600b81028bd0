"""Batch jobs whose processes are killed while they submit, look and fetch: each text is billed once (rule 14)."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_jobs import GRACE_SECONDS
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.forked import start
from embeddings_pipeline_tests.support.workbench import committed, execute, films, make_films

KILLS = int(os.environ.get("EMBEDDINGS_TESTS_KILLS", "5"))
FILMS = 1200  # in two runs, so in two jobs
POINTS = ("prepared", "sent", "submitted", "uploaded", "begun", "looked", "kept", "fetched", "done")


@pytest.fixture
def service(database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose profile the collection `films` has, and the table."""
    make_films(database, films(FILMS))
    with EmbeddingServer() as server:
        model = {"provider": "openai", "model": "text-embedding-3-small", "dimensions": 64}
        attributes = {
            "name": "films",
            "source": {"table": "films", "key": ["id"]},
            "vectors": {"base": "{title} | {overview}"},
            "items_per_batch": 100,
            "profile": {"name": "hosted", "url": server.url, "requests_per_minute": 0, **model},
        }
        defs = tmp_path / "defs" / "films" / "defs.yaml"
        defs.parent.mkdir(parents=True)
        defs.write_text(yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}))
        monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs.parents[1]))
        yield server


def pass_time(database: Database) -> None:
    """As if enough had passed for what is not certain yet."""
    statement = "UPDATE embeddings.batch_job SET asked_at = asked_at - make_interval(secs => %s)"
    execute(database, statement, [GRACE_SECONDS])
    execute(database, "UPDATE embeddings.batch SET next_try = NULL")


def go_on(database: Database, service: EmbeddingServer) -> None:
    """Sync until all is committed, with the time that it takes; each text was billed once."""
    for _ in range(6):
        pass_time(database)
        process = start(["sync", "--api", "batch"])
        process.join(120)
        assert process.exitcode == 0
        if len(committed(database)) == FILMS:
            break
    of_films = {text: number for text, number in service.billed.items() if text.startswith("Film")}
    assert (len(committed(database)), len(of_films)) == (FILMS, FILMS)
    assert set(of_films.values()) == {1}
    spent = "SELECT sum(answered), sum(billed_tokens) FROM embeddings.batch_job"
    assert execute(database, spent)[0][0] == FILMS
    assert execute(database, "SELECT count(*) FROM embeddings.embedding_claim") == [(0,)]


def test_killed_at_each_step(database: Database, service: EmbeddingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job is killed until it is submitted, the second one at all that follows."""
    for point in POINTS:
        pass_time(database)
        monkeypatch.setenv("EMBEDDINGS_FAILPOINTS", f"batch_job.{point}=kill")
        process = start(["sync", "--api", "batch"])
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, point
    monkeypatch.delenv("EMBEDDINGS_FAILPOINTS")
    go_on(database, service)


@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_at_random_moments(database: Database, service: EmbeddingServer) -> None:
    chance = random.Random(12)
    service.batches.seconds = 0.3
    for _ in range(KILLS):
        process = start(["sync", "--api", "batch"])
        process.join(chance.uniform(0.5, 4))
        process.kill()
        process.join()
        time.sleep(0.1)
        pass_time(database)
    go_on(database, service)


def test_two_syncs_at_once_submit_no_text_twice(database: Database, service: EmbeddingServer) -> None:
    start(["sync", "--limit", "1"]).join(120)  # registers the collection
    processes = [start(["sync", "--api", "batch"]) for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    go_on_but_one = {text: number for text, number in service.billed.items() if text.startswith("Film")}
    assert set(go_on_but_one.values()) <= {1}
    submitted = execute(database, "SELECT sum(texts) FROM embeddings.batch_job")
    assert submitted == [(FILMS - 1,)]
