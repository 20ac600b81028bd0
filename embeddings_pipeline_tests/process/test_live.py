"""`embeddings-pipeline live` as a process: it says what it does, is ended and killed, and leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.live.watch import UpdatedRows
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.live.test_follow import insert, texts, with_updates, write
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import committed, execute, films, make_films, sync_once, wait_until

LOCKS = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


@dataclass
class Live:
    """The process, and the events that it has told."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


@contextmanager
def live(*arguments: str, failpoints: str = "") -> Iterator[Live]:
    """The process, from its first line on."""
    command = [sys.executable, "-m", "embeddings_pipeline", "live", "--json", *arguments]
    environment = {**os.environ, "EMBEDDINGS_FAILPOINTS": failpoints}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=PROJECT, env=environment, **pipes) as process:
        one = Live(process)

        def read() -> None:
            for line in process.stdout or ():
                one.events.append(json.loads(line))

        reading = threading.Thread(target=read)
        reading.start()
        try:
            wait_until(lambda: bool(one.told("started")) or process.poll() is not None)
            yield one
        finally:
            process.kill()
            reading.join()


@pytest.fixture
def there(database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """25 films, synced, and their definition as a file."""
    DeterministicEncoder.reset()
    write(tmp_path / "defs", with_updates())
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(tmp_path / "defs"))
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    sync_once(read_collections(tmp_path / "defs").find("films"), project)
    return database


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_is_ended_by_a_signal_and_dagster_knows_what_it_did(
    there: Database, instance: dg.DagsterInstance, end: signal.Signals
) -> None:
    with live() as one:
        insert(there, 100, "walruses")
        wait_until(lambda: "100" in texts(there))
        one.process.send_signal(end)
        assert one.process.wait(60) == 0
    assert one.told("started")[0]["collections"] == {"films": UpdatedRows.words}
    assert one.told("done")[-1]["collections"]["films"]["inserted"] == 1
    for asset in ("raw_items", "item_texts", "embeddings_32", "pgvector_table"):
        assert instance.get_materialized_partitions(asset_key(with_updates(), asset)) == {"000002"}
    records = instance.fetch_materializations(asset_key(with_updates(), "pgvector_table"), limit=1).records
    assert records[0].asset_materialization and records[0].asset_materialization.metadata["inserted"].value == 1
    assert execute(there, "SELECT count(*) FROM embeddings.activity") == [(0,)]


def test_killed_in_a_commit_it_leaves_nothing_and_the_next_one_goes_on(there: Database) -> None:
    with live(failpoints="commit.second_look=kill") as one:
        insert(there, 100, "walruses")
        assert one.process.wait(60) == -signal.SIGKILL
    assert "100" not in texts(there)
    wait_until(lambda: execute(there, LOCKS) == [(0,)])
    execute(there, "UPDATE embeddings.batch SET next_try = next_try - interval '1 minute'")  # an attempt was noted
    with live() as one:
        wait_until(lambda: "100" in texts(there))


def test_two_processes_under_load_one_of_them_killed_end_as_a_clean_build(
    there: Database, project: Settings, tmp_path: Path
) -> None:
    one = read_collections(tmp_path / "defs").find("films")
    with live() as first, live() as second:
        for n in range(60):
            execute(there, "UPDATE films SET overview = %s, at = now() WHERE id = %s", [f"v{n}", 1 + n % 25])
            if n % 10 == 0:
                insert(there, 1000 + n)
            if n == 30:
                first.process.kill()
        expected = {str(1 + n % 25): f"v{n}" for n in range(60)}
        wait_until(lambda: all(texts(there)[key].endswith(f"| {value}") for key, value in expected.items()), 90)
        # A look may come after all this, though batches that were dirty before had the last texts.
        wait_until(lambda: {str(1000 + n) for n in range(0, 60, 10)} <= texts(there).keys(), 90)
        wait_until(lambda: not open_collection(one, project).ledger.dirty_items(), 90)
        assert second.process.poll() is None
    clean = with_updates(name="clean")
    sync_once(clean, project)
    assert committed(there) == committed(there, "clean")


def test_it_does_nothing_when_there_is_nothing_to_do(there: Database) -> None:
    with live() as one:
        process = psutil.Process(one.process.pid)
        threading.Event().wait(5)  # what a start leaves behind
        before = process.cpu_times()
        threading.Event().wait(10)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.3  # of 10 s; the goal is 0.1
    assert not one.told("done")


def test_what_it_cannot_follow_is_one_line_and_exit_code_1(there: Database, tmp_path: Path) -> None:
    write(tmp_path / "defs", with_updates(source={"table": "films", "key": ["id"]}))
    with live() as one:
        assert one.process.stderr
        stderr = one.process.stderr.read()
        one.process.wait(60)
    assert one.process.returncode == 1
    assert stderr.count("\n") == 1 and "cannot be followed" in stderr
