"""Rows from the source into the committed table, with an encoder that costs nothing; one line of JSON a size.

python benchmarks/bench_path.py [--rows 100000 --rows 1000000] [--steps] [--backfill own|column] [--profile FILE]

Rows are synthetic, of about 300 bytes of text. Without an ANN index; the time ends with the last commit. `--steps`: the
scan and `run_batch`, without Dagster. `--backfill`: what a second model's backfill writes a second, into its own table,
or into a column of the source's own table that has an IVFFlat index on the current model's. The embedded server is one
of its own below a temporary folder, and what is measured is a process of its own, whose peak memory is the kernel's.
"""

import argparse
import cProfile
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.model_change.phases import backfill, expand
from embeddings_pipeline.model_change.state import candidate_profile, incomplete_batches
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.database import open_database

SOURCE = """
CREATE TABLE movies (
    id bigint PRIMARY KEY, title text NOT NULL, overview text NOT NULL, genres text[], release_year bigint,
    updated_at timestamptz NOT NULL DEFAULT now());
INSERT INTO movies
SELECT n, 'The title of film ' || n, repeat(md5(n::text) || ' ', 8), ARRAY['Drama', 'Comedy'], 1950 + n % 75
FROM generate_series(1, {rows}) AS n;
ANALYZE movies
"""
COLUMN = """
CREATE EXTENSION IF NOT EXISTS vector;
ALTER TABLE movies ADD COLUMN embedding halfvec({dimensions})
"""
COLUMN_INDEX = """
SET maintenance_work_mem = '1GB';
CREATE INDEX ON movies USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = {lists});
VACUUM ANALYZE movies
"""
GOALS = {"path": 25_000, "own": 60_000, "column": 12_000}  # rows a second
CURRENT_OF_COLUMN = 1536  # dimensions of the model whose column has the index


class FreeEncoder:
    """Some vector for each text, by its place."""

    def __init__(self, profile: Profile) -> None:
        self.dimensions = profile.dimensions
        vectors = np.random.default_rng(0).standard_normal((4096, profile.dimensions), np.float32)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._vectors[np.arange(len(texts)) % len(self._vectors)]

    encode_queries = encode_documents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--backfill", choices=("own", "column"))
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--step", choices=("sync", "steps", "backfill"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(profiled(arguments)))
        return 0
    for rows in arguments.rows or [100_000, 1_000_000]:
        print(json.dumps(measure(rows, arguments)), flush=True)
    return 0


def measure(rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="bench-path-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder)}
    environment.pop("DATABASE_URL", None)
    command = [sys.executable, __file__]
    command += ["--backfill", arguments.backfill] if arguments.backfill else []
    database = open_database(Settings(database_url=None, embeddings_state_dir=folder))

    def execute(statements: str) -> None:
        with database.connect(autocommit=True) as connection:
            for statement in statements.split(";"):
                connection.execute(statement)  # type: ignore[arg-type]

    def step(name: str, *others: str) -> dict[str, Any]:
        execute("CHECKPOINT")
        done = subprocess.run(
            [*command, "--step", name, *others], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return dict(json.loads(done.stdout))

    profile = ["--profile", str(arguments.profile)] if arguments.profile else []
    try:
        execute(SOURCE.format(rows=rows))
        if arguments.backfill:
            if arguments.backfill == "column":
                execute(COLUMN.format(dimensions=CURRENT_OF_COLUMN))
            step("steps")
            if arguments.backfill == "column":
                execute(COLUMN_INDEX.format(lists=round(rows**0.5)))
            result = step("backfill", *profile)
        else:
            result = step("steps" if arguments.steps else "sync", *profile)
    finally:
        database.close()
        shutil.rmtree(folder, ignore_errors=True)
    what = arguments.backfill or "path"
    met = result["rows_per_second"] >= GOALS[what]
    return {"benchmark": what, "dagster": not (arguments.steps or arguments.backfill), **result, "goal_met": met}


def definition(destination: str | None) -> CollectionDefinition:
    def profile(name: str, dimensions: int) -> dict[str, Any]:
        return {"provider": "python", "model": "bench_path:FreeEncoder", "dimensions": dimensions, "revision": name}

    attributes: dict[str, Any] = {
        "name": "items",
        "source": {"table": "movies", "key": ["id"]},
        "columns": ["title", "release_year", "genres"],
        "vectors": {"base": "{title} | {overview} | {genres}"},
        "profiles": {"first": profile("first", 384), "second": profile("second", 384)},
        "profile": "first",
        "index": {"method": "none"},
    }
    if destination == "column":
        attributes["profiles"]["first"] = profile("first", CURRENT_OF_COLUMN)
        del attributes["profile"], attributes["index"]
        attributes["destination"] = {"table": "movies", "column": "embedding", "profile": "first"}
    return CollectionDefinition(CollectionAttributes.model_validate(attributes))


def profiled(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.profile:
        return measured(arguments)
    profile = cProfile.Profile()
    try:
        return profile.runcall(measured, arguments)
    finally:
        profile.dump_stats(arguments.profile)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The step in this process: rows, seconds of its parts, rows a second, and peak memory."""
    one, settings = definition(arguments.backfill), load_settings()
    seconds: dict[str, float] = {}
    if arguments.step == "sync":
        from embeddings_pipeline.orchestration.sync import sync

        began, ended = time.perf_counter(), 0.0

        def progress(phase: str, done: int, total: int) -> None:
            nonlocal ended
            if phase == "indexing":
                ended = time.perf_counter()

        result = sync(one, settings, progress=progress)
        rows, seconds["sync"] = result.embedded, ended - began
        seconds["index_and_checks"] = time.perf_counter() - ended
        took = seconds["sync"]
    elif arguments.step == "steps":
        began = time.perf_counter()
        collection = open_collection(one, settings)
        collection.ledger.full_scan(collection.source)
        seconds["scan"] = time.perf_counter() - began
        rows = run_batch(collection, collection.ledger.dirty_batches(), "run").vectors_written
        took = time.perf_counter() - began
    else:
        collection = open_collection(one, settings)
        change = expand(collection, candidate_profile(collection, "second"))
        wanted = incomplete_batches(collection, change.candidate)
        began = time.perf_counter()
        rows = sum(done.vectors_written for _, done in backfill(collection, wanted, "backfill"))
        took = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "rows": rows,
        "seconds": round(took, 2),
        "rows_per_second": round(rows / took),
        "megabytes": round(usage.ru_maxrss / 1000),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
