"""A full scan and a sensor's tick over many rows, most of which have not changed; one line of JSON a size.

python benchmarks/bench_scan.py [--rows 100000 --rows 1000000] [--changed 10000]

Rows are synthetic, of about 300 bytes of text, and their vectors random: no model runs. The embedded server is one of
its own below a temporary folder. Each scan runs in a process of its own, whose peak memory is the kernel's.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.ledger import incremental_scan
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.instance.home import project_instance
from embeddings_pipeline.orchestration.instance.liveness import RunWatch
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.copy_binary import copy_in

SOURCE = """
CREATE TABLE movies (
    id bigint PRIMARY KEY, title text NOT NULL, overview text NOT NULL, genres text[], release_year bigint,
    updated_at timestamptz NOT NULL DEFAULT now());
INSERT INTO movies
SELECT n, 'The title of film ' || n, repeat(md5(n::text) || ' ', 8), ARRAY['Drama', 'Comedy'], 1950 + n % 75
FROM generate_series(1, {rows}) AS n;
CREATE INDEX ON movies (updated_at);
ANALYZE movies
"""
COMMITTED = """
UPDATE embeddings.items_item SET committed_hash = seen_hash, payload = '{}';
INSERT INTO embeddings.items_text (item_key, vector_name, chunk, content_hash, text, blank)
SELECT item_key, 'base', 0, decode(md5(item_key), 'hex'), item_key, false
FROM embeddings.items_item ORDER BY batch, item_key;
UPDATE embeddings.batch
SET definition_hash = collection.definition_hash, version = 1, committed_at = now()
FROM embeddings.collection WHERE name = collection;
INSERT INTO embeddings.backfill (collection, fingerprint, batch, complete, file)
SELECT name, fingerprint, batch, true, 'bench.parquet'
FROM embeddings.batch JOIN embeddings.collection ON name = batch.collection;
UPDATE embeddings.collection SET version = 1
"""
WRITES = """
SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_user_tables
WHERE schemaname = 'embeddings' AND (relname LIKE 'items\\_%' OR relname = 'batch')
"""
GOALS = {"seconds": 20.0, "megabytes": 1000, "tick_milliseconds": 300.0}
TICKS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--changed", type=int, default=10_000)
    parser.add_argument("--step", choices=("scan", "tick"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(scan() if arguments.step == "scan" else tick()))
        return 0
    for rows in arguments.rows or [100_000, 1_000_000]:
        print(json.dumps(measure(rows, arguments.changed)), flush=True)
    return 0


def measure(rows: int, changed: int) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="bench-scan-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder), "DAGSTER_HOME": root}
    environment.pop("DATABASE_URL", None)

    def step(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--step", name]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(done.stdout))

    collection = open_bench(Settings(database_url=None, embeddings_state_dir=folder))
    try:
        with collection.database.connect() as connection:
            for statement in SOURCE.format(rows=rows).split(";"):
                connection.execute(statement)  # type: ignore[arg-type]
        first = step("scan")
        commit(collection)
        before = writes(collection)
        nothing = step("scan")
        written = writes(collection) - before
        ticks = step("tick")
        with collection.database.connect() as connection:
            every = max(1, rows // changed)
            connection.execute(
                "UPDATE movies SET overview = overview || 'changed', updated_at = now() WHERE id %% %s = 0", [every]
            )
        incremental = step("tick")
        with collection.database.connect() as connection:  # as if only the full scan had looked
            connection.execute(
                "UPDATE embeddings.items_item SET seen_hash = committed_hash WHERE seen_hash <> committed_hash"
            )
        some = step("scan")
        found = {"changed_found": some["changed"], "batches": len(collection.ledger.dirty_batches())}
    finally:
        collection.database.close()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "rows": rows,
        "first_scan_seconds": first["seconds"],
        "seconds": nothing["seconds"],
        "megabytes": nothing["megabytes"],
        "rows_written": written,
        "tick_milliseconds": ticks["milliseconds"],
        "tick_with_changes_milliseconds": incremental["first_milliseconds"],
        "changed_seconds": some["seconds"],
        **found,
    }


def open_bench(settings: Settings) -> Collection:
    config = CollectionAttributes.model_validate(
        {
            "name": "items",
            "source": {"table": "movies", "key": ["id"], "updated_at": "updated_at"},
            "columns": ["title", "release_year", "genres"],
            "vectors": {"base": "{title} | {overview} | {genres}"},
            "profile": "minilm",
        }
    )
    return open_collection(CollectionDefinition(config), settings)


def commit(collection: Collection) -> None:
    """As if all had been embedded: texts, random vectors, and a ledger that says so."""
    table = collection.model.destination
    with collection.database.connect() as connection:
        for statement in COMMITTED.split(";"):
            connection.execute(statement)  # type: ignore[arg-type]
        ids = np.array([row[0] for row in connection.execute("SELECT id FROM embeddings.items_text ORDER BY id")])
        hashes = connection.execute("SELECT content_hash FROM embeddings.items_text ORDER BY id").fetchall()
        digests = np.frombuffer(b"".join(row[0] for row in hashes), np.uint8).reshape(-1, 16)
        random = np.random.default_rng(0)
        for start in range(0, len(ids), 50_000):
            part = slice(start, start + 50_000)
            vectors = random.standard_normal((len(ids[part]), table.dimension), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            columns = {"text_id": ids[part], "vector_name": np.full(len(ids[part]), b"base")}
            columns |= {"content_hash": digests[part], "embedding": vectors}
            copy_in(connection, table.identifier, columns, storage=table.storage)
    with collection.database.connect(autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def writes(collection: Collection) -> int:
    time.sleep(2)  # the server's statistics arrive a moment late
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(WRITES).fetchone()
    return int(row[0]) if row else -1


def scan() -> dict[str, float]:
    collection = open_bench(load_settings())
    began = time.perf_counter()
    found = collection.ledger.full_scan(collection.source)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"seconds": round(seconds, 2), "megabytes": round(peak), "changed": found.changed}


def tick() -> dict[str, float]:
    """Whole ticks of the sensor, which start no runs here; the median of those that find nothing."""
    incremental_scan.OVERLAP = timedelta(0)  # type: ignore[attr-defined]  # as if the last change were long past
    collection = open_bench(load_settings())
    times, runs = [], RunWatch()
    with project_instance() as instance:
        for _ in range(TICKS):
            began = time.perf_counter()
            evaluate(instance, collection.definition, collection.profile.dimensions, runs)
            times.append(1000 * (time.perf_counter() - began))
    return {"milliseconds": round(float(np.median(times[3:])), 1), "first_milliseconds": round(times[0], 1)}


if __name__ == "__main__":
    sys.exit(main())
