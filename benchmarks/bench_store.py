"""Vectors into PostgreSQL by COPY, and FAISS from the table: the median of three, as one line of JSON.

python benchmarks/bench_store.py [--vectors 100000] [--dimension 384] [--storage halfvec]

Uses random vectors, no model, and an embedded server of its own below a temporary folder.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline.store.schema import ensure_schema

REPEATS = 3
GOAL_ROWS_A_SECOND = 80_000
GOAL_FAISS_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--storage", choices=("halfvec", "vector"), default="halfvec")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="bench-store-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    with tempfile.TemporaryDirectory(prefix="bench-faiss-") as faiss_folder:
        database = open_database(Settings(database_url=None, embeddings_state_dir=folder))
        try:
            ensure_schema(database)
            result = measure(database, Path(faiss_folder), arguments.vectors, arguments.dimension, arguments.storage)
        finally:
            database.close()
            remove(folder)
    print(json.dumps(result))
    return 0


def measure(database: Database, folder: Path, rows: int, dimension: int, storage: str) -> dict[str, object]:
    vectors = np.random.default_rng(0).standard_normal((rows, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = TableDestination("bench", "0123456789ab", dimension, storage)  # type: ignore[arg-type]
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO embeddings.collection (name, fingerprint, definition_hash) VALUES ('bench', %s, '')",
            [table.fingerprint],
        )
        table.tables.create(connection)
    columns = {
        "text_id": np.arange(rows),
        "vector_name": np.full(rows, b"base"),
        "content_hash": np.random.default_rng(1).integers(0, 256, (rows, 16), np.uint8),
        "embedding": vectors,
    }
    copying = []
    for _ in range(REPEATS):
        with database.connect() as connection:  # each time into a new table, as a first commit does
            connection.execute(f"DROP TABLE IF EXISTS embeddings.{table.name} CASCADE")
            table.create(connection)
        with database.connect(autocommit=True) as connection:
            connection.execute("CHECKPOINT")
        began = time.perf_counter()
        with database.connect() as connection:
            copy_in(connection, table.identifier, columns, storage=table.storage)
        copying.append(time.perf_counter() - began)  # committed, fsync included

    building, opening = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        manifest = build(database, table, folder)
        building.append(time.perf_counter() - began)
        began = time.perf_counter()
        index = open_index(folder, "bench")
        opening.append(time.perf_counter() - began)
    searching = []
    for query in vectors[:50]:
        began = time.perf_counter()
        index.search("base", query[None], 10)
        searching.append(time.perf_counter() - began)
    began = time.perf_counter()
    parity = check_parity(database, table, index)
    checked = time.perf_counter() - began

    copy_rows, faiss_seconds = rows / statistics.median(copying), statistics.median(building)
    goals_apply = (rows, dimension, storage) == (100_000, 384, "halfvec")
    return {
        "benchmark": "store",
        "vectors": rows,
        "dimension": dimension,
        "storage": storage,
        "copy_rows_per_second": round(copy_rows),
        "copy_goal_met": copy_rows >= GOAL_ROWS_A_SECOND if goals_apply else None,
        "faiss_from_table_seconds": round(faiss_seconds, 3),
        "faiss_goal_met": faiss_seconds <= GOAL_FAISS_SECONDS if goals_apply else None,
        "faiss_open_seconds": round(statistics.median(opening), 3),
        "faiss_search_ms": round(1000 * statistics.median(searching), 2),
        "faiss_index_type": manifest.vectors["base"].index_type,
        "faiss_recall_at_10": manifest.recall_at_10,
        "faiss_bytes": manifest.bytes,
        "parity_ok": parity.ok,
        "parity_seconds": round(checked, 3),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "repeats": REPEATS,
    }


def remove(folder: Path) -> None:
    """Delete the server's folder once the server, which ends a moment after its last user, has gone."""
    deadline = time.monotonic() + 60
    while any(folder.rglob("postmaster.pid")) and time.monotonic() < deadline:
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
