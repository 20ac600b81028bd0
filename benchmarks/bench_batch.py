"""A backfill by the Batch API against the tests' own server, with `sync --api batch` killed at random moments.

    python benchmarks/bench_batch.py                                 # 20,000 texts, 10 kills
    python benchmarks/bench_batch.py --texts 200000 --kills 20 --seconds 8

The server is a process of its own and counts what it bills; a batch there takes a few seconds. What takes minutes by
the clock until it is certain (whether a batch began) is made older instead. The database is an embedded one in a
temporary folder, with Dagster's beside it. At the end each text is committed, and the server says how often it was
billed.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_jobs import GRACE_SECONDS
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.schema import ensure_schema

PROJECT = Path(__file__).resolve().parents[1]
SERVER = [sys.executable, "-m", "embeddings_pipeline_tests.support.embedding_server"]
SYNC = [sys.executable, "-m", "embeddings_pipeline", "sync", "--api", "batch"]
FIRST_SECONDS = 4.0  # of a sync, before which it is not killed: it would only import
POINTS = ("prepared", "sent", "uploaded", "begun", "submitted", "looked", "kept", "fetched", "done")


def make_table(database: Database, texts: int) -> None:
    with database.connect() as connection:
        connection.execute(
            """CREATE TABLE films AS
               SELECT n AS id, 'Film ' || n AS title, 'A story about number ' || n || ' and its friends' AS overview
               FROM generate_series(1, %s) AS n""",
            [texts],
        )
        connection.execute("ALTER TABLE films ADD PRIMARY KEY (id)")


def write_definition(folder: Path, url: str) -> None:
    model = {"provider": "openai", "model": "text-embedding-3-small", "dimensions": 64}
    attributes = {
        "name": "films",
        "source": {"table": "films", "key": ["id"]},
        "vectors": {"base": "{title} | {overview}"},
        "profile": {"name": "bench", "url": url, "requests_per_minute": 0, **model},
        "index": {"method": "none"},
    }
    file = folder / "films" / "defs.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}))


def counts(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.replace("/v1", "/counts")) as answer:
        result: dict[str, Any] = json.loads(answer.read())
        return result


def one(database: Database, query: str) -> Any:
    with database.connect() as connection:
        row = connection.execute(query).fetchone()  # type: ignore[call-overload]
    return row[0] if row else None


def pass_time(database: Database) -> None:
    with database.connect() as connection:
        connection.execute(
            "UPDATE embeddings.batch_job SET asked_at = asked_at - make_interval(secs => %s)", [GRACE_SECONDS]
        )
        connection.execute("UPDATE embeddings.batch SET next_try = NULL")


def sync(environment: dict[str, str], seconds: float | None = None, point: str | None = None) -> int:
    """The exit code of a sync, which is killed after so long, or at a failpoint."""
    told = {"EMBEDDINGS_FAILPOINTS": f"batch_job.{point}=kill"} if point else {}
    with subprocess.Popen(
        SYNC, cwd=PROJECT, env={**environment, **told}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, said = process.communicate(timeout=seconds)
            if process.returncode not in (0, -signal.SIGKILL):
                print(said.strip())
        except subprocess.TimeoutExpired:
            process.kill()
    return process.returncode


@contextmanager
def deployment(texts: int) -> Iterator[tuple[Database, str, dict[str, str]]]:
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(SERVER, stdout=subprocess.PIPE, text=True) as server:
        Path(folder).chmod(0o711)  # as root, PostgreSQL runs as another user
        state = Path(folder) / "state"
        database = open_database(Settings(embeddings_state_dir=state))
        try:
            ensure_schema(database)
            make_table(database, texts)
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            write_definition(Path(folder) / "defs", url)
            own = {"EMBEDDINGS_STATE_DIR": str(state), "EMBEDDINGS_DEFS_DIR": str(Path(folder) / "defs")}
            yield database, url, {**os.environ, **own, "DAGSTER_HOME": str(PROJECT)}
        finally:
            database.close()
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=12.0, help="after which a sync is killed at the latest")
    given = parser.parse_args()
    chance, began = random.Random(12), time.perf_counter()
    with deployment(given.texts) as (database, url, environment):
        kills = committed = 0
        for place in itertools.count():  # a sync may also end before it comes to a point
            at_work = kills < given.kills
            point = POINTS[place // 2] if place % 2 and place // 2 < len(POINTS) and at_work else None
            seconds = chance.uniform(FIRST_SECONDS, given.seconds) if at_work and point is None else None
            code = sync(environment, seconds, point)
            kills += code == -signal.SIGKILL
            committed = one(database, "SELECT CASE WHEN to_regclass('embeddings.films') IS NOT NULL THEN 1 ELSE 0 END")
            committed = committed and one(database, "SELECT count(*) FROM embeddings.films")
            where = f"at {point}" if point else "at random" if seconds else "not to be killed"
            jobs = one(database, "SELECT count(*) FROM embeddings.batch_job")
            billed = counts(url)["distinct"]
            told = f"{jobs} jobs, {billed:,} texts billed, {committed:,} committed"
            print(f"{kills} kills, {where}: exit {code}; {told}", flush=True)
            pass_time(database)
            if committed == given.texts:
                break
        end, counted = time.perf_counter(), counts(url)
        print(
            f"batch API: {given.texts:,} texts, killed {kills} times before all was committed, {jobs} jobs, "
            f"{end - began:.0f} s; the server billed {counted['distinct']:,} texts, {counted['twice']} of them twice"
        )


if __name__ == "__main__":
    main()
