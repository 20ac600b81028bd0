"""How soon `live` brings a change into the answers, and whether it keeps up: the sample catalogue, the real model.

python benchmarks/bench_live.py [--rows 3000] [--inserts 100] [--load-seconds 30] [--rate 200]

An embedded server of its own below a temporary folder, and one `embeddings-pipeline live` beside whom this program
writes. First rows are inserted at random moments: a row counts as searchable when `embeddings.items`, which searches
read, has its vector. Then `--rate` changes are committed each second, one by one: of ten, seven edit a text, two a
column that is only returned, one inserts a row. Last the table is compared with a clean build, and the encoder alone
takes some of the texts, which is as much as the processor can do. One line of JSON.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.database import Database, open_database

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "embeddings_pipeline"]
INSERT = """INSERT INTO movies (id, title, overview, genres, release_year, updated_at)
            SELECT %s, title || ' again', overview || ' Number ' || %s, genres, release_year, now()
            FROM movies WHERE id = %s"""
FOUND = "SELECT item_key FROM embeddings.items WHERE item_key = ANY (%s)"
EDITS = (
    *7 * ["UPDATE movies SET overview = overview || ' Edit ' || %(n)s, updated_at = now() WHERE id = %(id)s"],
    *2 * ["UPDATE movies SET release_year = 1900 + %(n)s %% 100, updated_at = now() WHERE id = %(id)s"],
)
RESULT = """SELECT v.item_key, v.text, t.content_hash, v.payload, v.embedding::real[]
            FROM embeddings.{name} AS v JOIN embeddings.{name}_text AS t USING (item_key, vector_name, chunk)
            ORDER BY 1, 2"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--inserts", type=int, default=100)
    parser.add_argument("--most-seconds", type=float, default=1.2, help="between two inserts")
    parser.add_argument("--load-seconds", type=float, default=30)
    parser.add_argument("--rate", type=int, default=200, help="changes a second")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-live-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder), "DAGSTER_HOME": str(ROOT)}
    environment.pop("DATABASE_URL", None)
    settings = Settings(database_url=None, embeddings_state_dir=folder)
    database = open_database(settings)
    live = None
    try:
        catalogue = excerpt(folder, arguments.rows)
        for command in (["load", str(catalogue), "--table", "movies"], ["sync"]):
            subprocess.run([*PROGRAM, *command], env=environment, cwd=ROOT, check=True, stdout=sys.stderr)
        command = [*PROGRAM, "live", "--json"]
        live = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert live.stdout is not None and json.loads(live.stdout.readline())["event"] == "started"
        told = list[str]()
        reading = threading.Thread(target=told.extend, args=[live.stdout], daemon=True)
        reading.start()
        time.sleep(5)
        result = {"rows": arguments.rows, "idle_percent_of_a_core": idle(live.pid, 10)}
        with database.connect(autocommit=True) as connection:
            keys = [row[0] for row in connection.execute("SELECT id FROM movies")]
        result |= fresh(database, keys, arguments.inserts, arguments.most_seconds)
        print(json.dumps(result), file=sys.stderr, flush=True)  # what there is so far
        result |= load(database, keys, arguments.load_seconds, arguments.rate)
        print(json.dumps(result), file=sys.stderr, flush=True)
        process = psutil.Process(live.pid)
        result["memory_mb"] = round(process.memory_info().rss / 1e6)
        live.send_signal(signal.SIGTERM)
        result["exit_code"] = live.wait(60)
        reading.join(10)
        seconds = arguments.load_seconds + result["lag_at_the_end_seconds"]
        result["texts_a_second_under_load"] = round((embedded(told) - arguments.inserts) / seconds, 1)
        result["texts_a_second_of_the_encoder_alone"] = encoder_alone(database, settings)
        result["equal_to_a_clean_build"] = equal(database, settings)
    finally:
        if live is not None:
            live.kill()
        database.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))
    return 0


def excerpt(folder: Path, rows: int) -> Path:
    """So many rows of the sample catalogue, as a file; its films come again, with other words, if there are too few."""
    path = folder / "movies.csv"
    with (ROOT / "examples" / "movies.csv").open(newline="") as file:
        films = list(csv.DictReader(file))
    with path.open("w", newline="") as written:
        writer = csv.DictWriter(written, list(films[0]))
        writer.writeheader()
        for number in range(rows):
            film, again = films[number % len(films)], number // len(films)
            writer.writerow({**film, "id": number + 1, "overview": film["overview"] + again * f" Told again, {again}."})
    return path


def idle(pid: int, seconds: float) -> float:
    """What the process takes of a core while nothing changes."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return round(100 * (after.user + after.system - before.user - before.system) / seconds, 2)


def fresh(database: Database, keys: list[int], inserts: int, most_seconds: float) -> dict[str, Any]:
    """Seconds from each commit until the row was there."""
    chance, waiting, seconds = random.Random(0), dict[str, float](), list[float]()
    made, next_insert = 0, time.monotonic()
    with database.connect(autocommit=True) as connection:
        while len(seconds) < inserts:
            if made < inserts and time.monotonic() >= next_insert:
                key = 9_000_000 + made
                connection.execute(INSERT, [key, str(made), chance.choice(keys)])
                waiting[str(key)] = time.monotonic()
                made += 1
                next_insert = time.monotonic() + chance.uniform(0, most_seconds)
            for (found,) in connection.execute(FOUND, [list(waiting)]).fetchall():
                seconds.append(time.monotonic() - waiting.pop(found))
            time.sleep(0.02)
    ordered = sorted(seconds)
    return {
        "inserts": inserts,
        "median_seconds": round(statistics.median(ordered), 2),
        "p99_seconds": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "within_3_seconds": sum(value <= 3 for value in ordered),
    }


def load(database: Database, keys: list[int], seconds: float, rate: int) -> dict[str, Any]:
    """So many changes a second; how long after the last one everything was committed."""
    chance, number = random.Random(1), 0
    began = time.monotonic()
    with database.connect(autocommit=True) as connection:
        while (now := time.monotonic() - began) < seconds:
            for _ in range(int(now * rate) - number):
                number += 1
                edit = chance.choice((*EDITS, INSERT))
                if edit == INSERT:
                    connection.execute(edit, [9_500_000 + number, str(number), chance.choice(keys)])
                else:
                    connection.execute(edit, {"n": number, "id": chance.choice(keys)})
            time.sleep(0.005)
        last = 9_900_000
        connection.execute(INSERT, [last, "last", chance.choice(keys)])
        ended = time.monotonic()
        dirty = "SELECT count(*) FROM embeddings.items_item WHERE seen_hash IS DISTINCT FROM committed_hash"
        while not connection.execute(FOUND, [[str(last)]]).fetchall() or connection.execute(dirty).fetchone() != (0,):
            time.sleep(0.05)
    return {"changes": number, "load_seconds": seconds, "lag_at_the_end_seconds": round(time.monotonic() - ended, 2)}


def embedded(told: list[str]) -> int:
    """How many texts `live` has encoded in all."""
    done = [event for event in map(json.loads, told) if event["event"] == "done"]
    return sum(each["embedded"] for event in done for each in event["collections"].values())


def encoder_alone(database: Database, settings: Settings) -> float:
    """Texts a second, of texts as they are now, with nobody else at work."""
    with database.connect() as connection:
        texts = [
            row[0] for row in connection.execute("SELECT text FROM embeddings.items_text ORDER BY id DESC LIMIT 600")
        ]
    encoder = open_collection(load_collections()["items"], settings).encoder()
    encoder.encode_documents(texts[:100])
    began = time.perf_counter()
    encoder.encode_documents(texts[100:])
    return round((len(texts) - 100) / (time.perf_counter() - began), 1)


def equal(database: Database, settings: Settings) -> bool:
    """Whether the table is what a clean build of the same source is."""
    items = load_collections()["items"]
    clean = open_collection(CollectionDefinition(items.attributes.model_copy(update={"name": "clean"})), settings)
    clean.ledger.full_scan(clean.source)
    for batch in clean.ledger.dirty_batches():
        run_batch(clean, [batch], "clean")
    with database.connect() as connection:
        ours, theirs = (
            connection.execute(RESULT.format(name=name)).fetchall()  # type: ignore[arg-type]
            for name in ("items", "clean")
        )
    same = [row[:4] for row in ours] == [row[:4] for row in theirs]
    vectors = (np.array([row[4] for row in rows]) for rows in (ours, theirs))
    return same and bool(np.allclose(*vectors, atol=5e-3))


if __name__ == "__main__":
    sys.exit(main())
