"""So many searches at once, and none for a client that has left."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.serving import Serving, serving
from embeddings_pipeline_tests.support.workbench import execute, wait_until


def under_way(service: Serving) -> int:
    return service.service.searches.under_way


TOOL = {"name": "search", "arguments": {"query": "a story"}}
ASKED: dict[str, dict[str, Any]] = {
    "/search": {"query": "a story"},
    "/mcp": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": TOOL},
}


def leave(service: Serving, path: str = "/search") -> None:
    """Ask, and hang up before there is an answer."""
    accepted = {"Accept": "application/json, text/event-stream"}
    with service.client(timeout=1.0) as client, pytest.raises(httpx.ReadTimeout):
        client.post(path, json=ASKED[path], headers=accepted)


def waiting(database: Database) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    [(count,)] = execute(database, query)
    return int(count)


def test_more_searches_than_may_be_are_told_to_come_again(served: Settings) -> None:
    with serving(served, at_once=3) as service, ThreadPoolExecutor(8) as threads:
        DeterministicEncoder.seconds_per_call = 1.0
        answers = [threads.submit(service.post, "/search", query="a story") for _ in range(8)]
        statuses = sorted(each.result().status_code for each in answers)
        assert statuses == [200] * 3 + [429] * 5
        [refused, *_] = [each.result() for each in answers if each.result().status_code == 429]
        assert refused.headers["Retry-After"] == "1" and refused.json()["error"].startswith("3 searches are under way")
        assert under_way(service) == 0
        DeterministicEncoder.seconds_per_call = 0.0
        assert service.post("/search", query="a story").status_code == 200
        assert 'status="429"} 5.0' in service.get("/metrics").text


@pytest.mark.parametrize("path", ASKED)
def test_what_a_client_waited_for_is_cancelled_when_it_leaves(served: Settings, database: Database, path: str) -> None:
    with serving(served, at_once=2) as service:
        with database.connect() as connection:
            connection.execute("LOCK TABLE embeddings.films_item IN ACCESS EXCLUSIVE MODE")
            leave(service, path)
            wait_until(lambda: under_way(service) == 0, 10)  # though nobody has let go of the table
            assert waiting(database) == 0
        assert service.post("/search", query="a story").status_code == 200
        assert f'requests_total{{path="{path}",status="499"}} 1.0' in service.get("/metrics").text


def test_a_place_is_given_back_only_when_the_search_has_ended(served: Settings) -> None:
    with serving(served, at_once=1) as service:
        DeterministicEncoder.seconds_per_call = 2.0
        began = time.monotonic()
        leave(service)  # after one second of two
        assert under_way(service) == 1
        assert service.post("/search", query="a story").status_code == 429
        wait_until(lambda: under_way(service) == 0, 10)
        assert time.monotonic() - began > 1.5
        DeterministicEncoder.seconds_per_call = 0.0
        assert service.post("/search", query="a story").status_code == 200


def test_those_who_leave_take_no_answer_from_those_who_stay(served: Settings) -> None:
    DeterministicEncoder.seconds_per_call = 0.02
    with serving(served, at_once=64) as service:
        ended = threading.Event()

        def stays(number: int) -> set[int]:
            statuses = set()
            with service.client() as client:
                while not ended.is_set():
                    statuses.add(client.post("/search", json={"query": f"Film {number}"}).status_code)
            return statuses

        def leaves(_: int) -> None:
            with service.client(timeout=0.01) as client:
                for _ in range(40):
                    with pytest.raises(httpx.TimeoutException):
                        client.post("/search", json={"query": "a story"})

        with ThreadPoolExecutor(12) as threads:
            steady = [threads.submit(stays, number) for number in range(6)]
            try:
                list(threads.map(leaves, range(6)))
            finally:
                ended.set()
            assert [each.result() for each in steady] == [{200}] * 6
        wait_until(lambda: under_way(service) == 0, 10)
