"""The service follows what changes beside it: sessions, models, indexes, definitions, the database."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.model_change.phases import swap
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.serve import readiness, searches
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import current_model
from embeddings_pipeline_tests.support.model_change import backfill_all, begin
from embeddings_pipeline_tests.support.serving import Serving, serving, write_definitions
from embeddings_pipeline_tests.support.workbench import definition, execute, sync_once, wait_until

SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'embeddings-pipeline'
"""


@contextmanager
def asking(service: Serving, **fields: object) -> Iterator[list[str]]:
    """Four clients search until the block ends, for a film each, which has to be found. Yields what they were told."""
    told: list[str] = []
    ended = threading.Event()

    def ask(number: int) -> None:
        while not ended.is_set():
            with service.client() as client:
                query = {"query": f"Film {number} number {number}", "k": 1, **fields}
                answer = client.post("/search", json=query)
            found = answer.json()
            told.append(found["fingerprint"] if answer.status_code == 200 else f"{answer.status_code} {answer.text}")
            if answer.status_code == 200 and found["hits"][0]["item_key"] != str(number):
                told.append(f"{found['hits'][0]['item_key']} instead of {number}")

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(ask, number) for number in (3, 7, 11, 19)]
        try:
            yield told
        finally:
            ended.set()
        for client in clients:
            client.result()


def test_no_search_fails_when_sessions_are_ended(served: Settings, database: Database) -> None:
    with serving(served) as service:
        with asking(service) as told:
            for count in range(1, 11):
                execute(database, SESSIONS)
                wait_until(lambda least=30 * count: len(told) > least)  # type: ignore[misc]
        assert set(told) == {service.get("/collections").json()["collections"][0]["fingerprint"]}
        assert "searches_tried_again_total" in service.get("/metrics").text


def test_no_search_fails_while_the_model_is_changed(served: Settings, one: CollectionDefinition) -> None:
    collection = open_collection(one, served)
    before = collection.model.destination.fingerprint
    change = begin(collection, "other")
    backfill_all(collection)
    after = change.candidate.destination.fingerprint
    with serving(served) as service:
        with asking(service) as told:
            wait_until(lambda: before in told)
            swap(collection, "swap")
            told.append("swapped")
            wait_until(lambda: told.count(after) > 50)
        assert set(told) == {before, after, "swapped"}
        assert before not in told[told.index("swapped") + 8 :]  # those that were under way were answered as they began
        assert service.get("/readyz").json()["ready"]


def test_a_new_faiss_index_answers_without_a_restart(served: Settings, one: CollectionDefinition) -> None:
    collection = open_collection(one, served)
    folder = served.state_dir / "faiss"
    build(collection.database, collection.model.destination, folder)
    with serving(served) as service:
        with asking(service, index="faiss") as told:
            for count in range(1, 4):
                execute(collection.database, "UPDATE films SET overview = overview || '!' WHERE id = %s", [count])
                sync_once(one, served, f"run {count}")
                build(collection.database, collection.model.destination, folder)
                wait_until(lambda least=20 * count: len(told) > least)  # type: ignore[misc]
        assert set(told) == {collection.model.destination.fingerprint}
        answer = service.post("/search", query="Film 1", k=1, index="faiss", explain=True).json()
        [leg] = answer["explanation"]["legs"]
        assert (leg["answered_by"], leg["fell_back"]) == ("faiss", [])


def names(service: Serving) -> set[str]:
    return {each["name"] for each in service.get("/collections").json()["collections"]}


def test_definitions_are_read_again(served: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with serving(served) as service:
        other = definition("books", columns=["title"])
        write_definitions(served.defs_dir, other)
        wait_until(lambda: names(service) == {"books", "films"})
        sync_once(other, served)
        assert service.post("/search", collection="books", query="Film 3", k=1).status_code == 200
        path = served.defs_dir / "films" / "defs.yaml"
        path.write_text("type: [")
        wait_until(lambda: "films/defs.yaml" in caplog.text)
        assert service.post("/search", collection="films", query="Film 3", k=1).status_code == 200  # as it was
        path.unlink()
        wait_until(lambda: names(service) == {"books"})
        assert service.post("/search", collection="films", query="Film 3").status_code == 404


def test_a_collection_without_vectors_is_no_failure_of_the_service(served: Settings, tmp_path: Path) -> None:
    write_definitions(served.defs_dir, definition("books"))
    with serving(served) as service:
        answer = service.post("/search", collection="books", query="x")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert service.get("/readyz").json()["ready"]


def test_a_database_that_is_away_is_said_and_waited_for(
    served: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(searches, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(readiness, "LOOK_SECONDS", 0.1)
    away = served.model_copy(update={"database_url": "postgresql://me:s3cret@127.0.0.1:1/nothing"})
    with serving(away, ready=False) as service:
        for _ in range(2):
            answer = service.post("/search", query="x")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
            assert answer.json() == {"error": "the database cannot be used just now"}
            wait_until(lambda: "cannot be used" in caplog.text)
        assert service.get("/readyz").status_code == 503
        assert service.get("/readyz").json() == {"ready": False, "database": False, "schema": False, "models": False}
        assert service.get("/healthz").status_code == 200
        assert 'failures_total{path="/search"} 2.0' in service.get("/metrics").text
    assert "s3cret" not in caplog.text


def test_a_schema_of_another_version_is_not_ready(served: Settings, database: Database) -> None:
    with serving(served) as service:
        execute(database, "DELETE FROM embeddings.schema_migration WHERE version > 1")
        expected = {"ready": False, "database": True, "schema": False, "models": False}
        wait_until(lambda: service.get("/readyz").json() == expected)


def test_a_model_that_cannot_be_loaded_is_not_ready(served: Settings, database: Database) -> None:
    change = """UPDATE embeddings.model SET profile = jsonb_set(profile, '{model}', '"nowhere:Encoder"')"""
    execute(database, change)
    one = definition(profile={**definition().attributes.profile.__dict__, "model": "nowhere:Encoder"})  # type: ignore[union-attr]
    write_definitions(served.defs_dir, one)
    with serving(served, ready=False) as service:
        wait_until(lambda: service.service.readiness.state.schema)
        answer = service.post("/search", query="x")
        assert (answer.status_code, answer.json()["error"]) == (503, "the collection's model cannot be used just now")
        assert not service.get("/readyz").json()["ready"]


def test_without_a_database_the_published_files_answer(
    worded: Settings, database: Database, one: CollectionDefinition
) -> None:
    with database.connect(autocommit=True) as connection:
        model = current_model(connection, one)
    assert model is not None
    build(database, model.destination, worded.state_dir / "faiss", WordsDefinition())
    where = {"revenue": {"lte": 1010}}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/search", {"query": "number 7", "mode": mode, "where": where}) for mode in ("dense", "text", "hybrid")
    ]
    asked.append(("/similar", {"item_key": 7, "where": where}))
    with serving(worded) as service:
        before = [service.post(path, k=3, **fields).json()["hits"] for path, fields in asked]
        [described] = service.get("/collections").json()["collections"]
    away = worded.model_copy(update={"database_url": SecretStr("postgresql://me:s3cret@127.0.0.1:1/nothing")})
    with serving(away, ready=False) as service:
        wait_until(lambda: service.service.readiness.lacks_database)
        for (path, fields), hits in zip(asked, before, strict=True):
            answer = service.post(path, k=3, explain=True, **fields)
            assert answer.status_code == 200, answer.text
            assert {hit["item_key"] for hit in answer.json()["hits"]} == {hit["item_key"] for hit in hits}
            assert "answered from files" in answer.json()["explanation"]["fell_back"][0]
            assert "s3cret" not in answer.text
        began = time.monotonic()
        assert service.post("/recommend", liked=[7]).status_code == 503
        assert service.get("/collections").json()["collections"] == [described]
        assert time.monotonic() - began < 5  # nobody waits for a database that is known to be away
