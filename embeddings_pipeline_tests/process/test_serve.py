"""`serve` as a process: its start, its end, its port, and a PostgreSQL that is killed under it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.schema import ensure_schema
from embeddings_pipeline_tests.support.command_line import PROJECT, run_process
from embeddings_pipeline_tests.support.serving import write_definitions
from embeddings_pipeline_tests.support.workbench import PROFILE, definition, films, make_films, sync_once, wait_until


@pytest.fixture
def environment(open_folder: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A deployment of its own with 25 films, on an embedded server of its own."""
    folder = open_folder / f"serve-{os.getpid()}-{abs(hash(tmp_path)) % 10_000}"
    folder.mkdir(mode=0o711)
    settings = Settings(database_url=None, embeddings_state_dir=folder)
    database = open_database(settings)
    ensure_schema(database)
    make_films(database, films(25))
    slow = definition(profile={**PROFILE, "model": "embeddings_pipeline_tests.support.deterministic:SlowEncoder"})
    sync_once(slow, settings)
    write_definitions(tmp_path / "defs", slow)
    database.close()
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "DAGSTER_HOME") if name in os.environ}
    yield {
        **kept,
        "EMBEDDINGS_STATE_DIR": str(folder),
        "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"),
        "PYTHONWARNINGS": "ignore",
    }


@contextmanager
def started(environment: dict[str, str], *options: str) -> Iterator[tuple["subprocess.Popen[str]", httpx.Client]]:
    command = [sys.executable, "-m", "embeddings_pipeline", "serve", "--port", "0", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=PROJECT, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            address = re.match(r"serving on (http://127\.0\.0\.1:\d+) ", process.stdout.readline())
            assert address, process.stderr
            with httpx.Client(base_url=address[1], timeout=60, trust_env=False) as client:
                wait_until(lambda: client.get("/readyz").status_code == 200)
                yield process, client
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_well_once_requests_under_way_are_answered(environment: dict[str, str], number: int) -> None:
    with started(environment) as (process, client), ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(client.post, "/search", json={"query": f"slowly {n}"}) for n in range(4)]
        wait_until(lambda: "searches_under_way 4.0" in client.get("/metrics").text)
        process.send_signal(number)
        assert [each.result().status_code for each in answers] == [200] * 4
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_a_second_one_on_its_port_is_one_line(environment: dict[str, str]) -> None:
    with started(environment) as (_, client):
        port = str(client.base_url.port)
        done = run_process(("serve", "--port", port), environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(rf"error: port {port} on 127\.0\.0\.1 cannot be used .*\n", done.stderr)
        assert client.post("/search", json={"query": "a story"}).status_code == 200


def test_what_cannot_be_served_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    for arguments, changed, line in (
        (("--host", "0.0.0.0"), {}, "set SERVE_API_KEY"),
        ((), {"SERVE_API_KEY": " "}, "SERVE_API_KEY is blank"),
        ((), {"EMBEDDINGS_STATE_DIR": str(tmp_path / "new")}, "nothing is there yet"),
        ((), {"EMBEDDINGS_DEFS_DIR": str(tmp_path / "none")}, "there is no such folder"),
    ):
        done = run_process(("serve", "--port", "0", *arguments), environment | changed)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith("error: ") and line in done.stderr


def test_no_search_fails_when_postgresql_is_killed(environment: dict[str, str]) -> None:
    folder = Path(environment["EMBEDDINGS_STATE_DIR"])
    with started(environment) as (process, client), ThreadPoolExecutor(4) as threads:
        statuses: list[int] = []
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                statuses.append(client.post("/search", json={"query": "a story", "k": 3}).status_code)

        asking = [threads.submit(ask) for _ in range(4)]
        try:
            for count in range(1, 4):
                wait_until(lambda least=100 * count: len(statuses) > least)  # type: ignore[misc]
                postmaster = int((folder / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
                os.kill(postmaster, signal.SIGKILL)
                before = len(statuses)
                wait_until(lambda least=before + 50: len(statuses) > least)  # type: ignore[misc]
        finally:
            ended.set()
        for each in asking:
            each.result()
        assert set(statuses) == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
