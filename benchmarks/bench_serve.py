"""Searches over HTTP: how many a second, how long each takes, and whether one fails while the model is swapped and
PostgreSQL is killed.

    python benchmarks/bench_serve.py [--items 100000] [--clients 16] [--seconds 20] [--index hnsw]

No model runs: vectors are computed from the numbers in a text, so that a query for a row finds its own row first, but
where the ANN index misses that (`own_row_first`; an index of the other model would find none). An answer of fewer than
ten hits is wrong. The service, the clients and this script are a process each, and the embedded server is one of its
own below a temporary folder. A line of JSON a phase.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from drill_workers import SUBTOPICS, TOPICS
from drill_workers import definition as number_definition

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionDefinition
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.model_change.phases import backfill, expand, swap
from embeddings_pipeline.model_change.state import candidate_profile, incomplete_batches
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.database import Database, open_database

DIMENSIONS = 384
SOURCE = """
CREATE TABLE films (id bigint PRIMARY KEY, title text NOT NULL, updated_at timestamptz NOT NULL DEFAULT now());
INSERT INTO films (id, title)
SELECT n, 'topic ' || n %% %(topics)s || ' sub ' || n / %(topics)s %% %(subtopics)s || ' film ' || n
FROM generate_series(1, %(rows)s) AS n
"""
GOALS = {"searches_per_second": 100, "p99_ms": 250}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--index", choices=("hnsw", "ivfflat"), default="hnsw")
    parser.add_argument("--mode", choices=("dense", "hybrid"), default="dense")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        ask(arguments.ask, arguments.items, arguments.clients)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="bench-serve-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        return measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(arguments: argparse.Namespace, folder: Path) -> int:
    here = Path(__file__).resolve().parent
    os.environ |= {
        "EMBEDDINGS_STATE_DIR": str(folder / "state"),
        "EMBEDDINGS_DEFS_DIR": str(folder / "defs"),
        "PYTHONPATH": str(here),
    }
    os.environ.pop("DATABASE_URL", None)
    (folder / "state").mkdir(mode=0o711)
    (folder / "defs").mkdir()
    one = served(arguments)
    written = {"type": COMPONENT_TYPE, "attributes": one.attributes.model_dump(exclude_defaults=True, mode="json")}
    (folder / "defs" / "defs.yaml").write_text(yaml.safe_dump(written))
    database = open_database(load_settings())
    processes: list[subprocess.Popen[str]] = []
    try:
        fill(database, arguments)
        service = subprocess.Popen(
            [sys.executable, "-m", "embeddings_pipeline", "serve", "--port", "0"],
            cwd=here.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(service)
        assert service.stdout is not None
        address = re.search(r"http://(\S+:\d+)", service.stdout.readline())[1]  # type: ignore[index]
        command = [sys.executable, __file__, "--items", str(arguments.items), "--clients", str(arguments.clients)]
        clients = subprocess.Popen(
            [*command, "--ask", address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here
        )
        processes.append(clients)
        failed = phases(arguments, database, folder, clients)
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
        return 1 if failed else 0
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        database.close()


def served(arguments: argparse.Namespace) -> CollectionDefinition:
    one = number_definition(DIMENSIONS, DIMENSIONS, arguments.index, False)
    if arguments.mode == "dense":
        return one
    return CollectionDefinition(one.attributes.model_copy(update={"words": WordsDefinition()}))


def fill(database: Database, arguments: argparse.Namespace) -> None:
    """The rows, committed and indexed, and a second model with its vectors and its index, ready to take over."""
    settings = load_settings()
    with database.connect() as connection:
        values = {"topics": TOPICS, "subtopics": SUBTOPICS, "rows": arguments.items}
        connection.execute(SOURCE % values)
    one = served(arguments)
    collection = open_collection(one, settings)
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, [batch], "first")
    ensure_index(database, collection.model.destination, one.attributes.index, ["base"])
    if ensure_words(database, one):
        build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
    change = expand(collection, candidate_profile(collection, "second"))
    for _ in backfill(collection, incomplete_batches(collection, change.candidate), "backfill"):
        pass
    ensure_index(database, change.candidate.destination, one.attributes.index, ["base"])
    with database.connect(autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def phases(arguments: argparse.Namespace, database: Database, folder: Path, clients: "subprocess.Popen[str]") -> int:
    """What the clients did while nothing else was done, while the model was swapped, while PostgreSQL was killed."""

    def swapped() -> None:
        one = served(arguments)
        swap(open_collection(one, load_settings()), "swap")

    def killed() -> None:
        postmaster = folder / "state" / "postgres" / "data" / "postmaster.pid"
        os.kill(int(postmaster.read_text().split()[0]), signal.SIGKILL)

    heading = {"date": str(date.today()), "machine": platform.machine(), "cores": os.cpu_count()}
    print(
        json.dumps(
            {
                **heading,
                "items": arguments.items,
                "index": arguments.index,
                "mode": arguments.mode,
                "clients": arguments.clients,
            }
        )
    )
    assert clients.stdin is not None and clients.stdout is not None
    failed = 0
    for name, do in (("warm", None), ("alone", None), ("swap", swapped), ("killed", killed), ("again", None)):
        clients.stdin.write(f"{name}\n")
        clients.stdin.flush()
        time.sleep(arguments.seconds / 4)
        began = time.perf_counter()
        if do is not None:
            do()
        took = time.perf_counter() - began
        time.sleep(max(0.0, 3 * arguments.seconds / 4 - took))
        clients.stdin.write("tell\n")
        clients.stdin.flush()
        told = json.loads(clients.stdout.readline())
        if name != "warm":
            failed += told["failed"] + told["wrong"]
            met = {goal: told[goal] >= at if goal != "p99_ms" else told[goal] <= at for goal, at in GOALS.items()}
            print(json.dumps({**told, "goals_met": met if name in ("alone", "again") else None}), flush=True)
    return failed


def ask(address: str, items: int, number: int) -> None:
    """Ask with so many clients until stdin is closed. A line names a phase; after `tell` that phase is reported."""
    phase = ["before"]
    took: dict[str, list[float]] = {}
    failures: dict[str, list[str]] = {}
    wrong, missed = dict[str, int](), dict[str, int]()

    def client(seed: int) -> None:
        chance, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=60)
        while True:
            row = chance.randint(1, items)
            query = f"topic {row % TOPICS} sub {row // TOPICS % SUBTOPICS} film {row}"
            now, began = phase[0], time.perf_counter()
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/search", json.dumps({"query": query, "k": 10}), headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200:
                    raise OSError(f"{response.status} {answer}")
                best = answer["hits"][0]
                if len(answer["hits"]) != 10:
                    wrong[now] = wrong.get(now, 0) + 1
                missed[now] = missed.get(now, 0) + (best["item_key"] != str(row))
                took.setdefault(now, []).append(1000 * (time.perf_counter() - began))
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                failures.setdefault(now, []).append(repr(error))
                connection.close()

    for seed in range(number):
        threading.Thread(target=client, args=(seed,), daemon=True).start()
    started = time.perf_counter()
    for line in sys.stdin:
        if line.strip() != "tell":
            phase[0], started = line.strip(), time.perf_counter()
            continue
        name, seconds = phase[0], time.perf_counter() - started
        done, failed = sorted(took.get(name, [0.0])), failures.get(name, [])
        told: dict[str, Any] = {
            "phase": name,
            "searches_per_second": round(len(done) / seconds),
            "p50_ms": round(statistics.median(done), 1),
            "p99_ms": round(done[int(0.99 * (len(done) - 1))], 1),
            "longest_ms": round(done[-1], 1),
            "failed": len(failed),
            "wrong": wrong.get(name, 0),
            "own_row_first": round(1 - missed.get(name, 0) / len(done), 4),
            "said": failed[:2],
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    sys.exit(main())
