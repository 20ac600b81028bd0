"""How fast the embedding cache gives what it knows, from PostgreSQL and from Redis, and how much memory that takes.

    python benchmarks/bench_cache.py [--texts 100000] [--dimensions 1536] [--redis redis://127.0.0.1:6379/0]

It makes an embedded PostgreSQL of its own in a temporary folder, writes the answers, and asks for all of them in groups
of a thousand, as the pipeline does. `--redis` names a server that may be emptied of the cache's keys.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.cache import EmbeddingCache, PostgresCache
from embeddings_pipeline.encoders.redis_cache import open_redis
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.schema import ensure_schema

GROUP = 1000
MODEL = "0123456789ab"


def groups(texts: int, dimensions: int) -> Iterator[dict[bytes, NDArray[np.float32]]]:
    random = np.random.default_rng(0)
    for start in range(0, texts, GROUP):
        vectors = random.standard_normal((min(GROUP, texts - start), dimensions)).astype(np.float32)
        yield {(start + n).to_bytes(16, "big"): vector for n, vector in enumerate(vectors)}


def measure(name: str, cache: EmbeddingCache, texts: int, dimensions: int) -> None:
    seconds = 0.0
    for group in groups(texts, dimensions):
        began = time.perf_counter()
        cache.put(MODEL, group)
        seconds += time.perf_counter() - began
    print(f"{name}: {texts / seconds:,.0f} texts/s written")
    hits, began = 0, time.perf_counter()
    for start in range(0, texts, GROUP):
        hashes = [(start + n).to_bytes(16, "big") for n in range(min(GROUP, texts - start))]
        hits += len(cache.known(MODEL, dimensions, hashes))
    seconds = time.perf_counter() - began
    assert hits == texts, f"{hits} hits"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name}: {texts / seconds:,.0f} hits/s; {peak:,} MB at most, in this process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=1536)
    parser.add_argument("--redis")
    options = parser.parse_args()
    if options.redis:
        cache = open_redis(options.redis, 1)
        measure("Redis", cache, options.texts, options.dimensions)
        cache.purge([MODEL])
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(Settings(embeddings_state_dir=Path(folder)))
        try:
            ensure_schema(database)
            measure("PostgreSQL", PostgresCache(database), options.texts, options.dimensions)
        finally:
            database.close()


if __name__ == "__main__":
    main()
