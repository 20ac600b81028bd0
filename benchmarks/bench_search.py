"""Filtered searches by PostgreSQL and FAISS: hits, recall@10 and milliseconds for filters of any selectivity.

And items like an item, and recommendations over a history of 500.

    python benchmarks/bench_search.py [--items 100000] [--index hnsw ivfflat] [--queries 100]

Uses made-up vectors of 384 dimensions in clusters, no model, and an embedded server of its own. A search is `search(…)`
as programs call it, sessions and the look at the current model included. What is exact is computed with NumPy.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_store import remove
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.search.hits import Hits
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.search.recommend import recommend
from embeddings_pipeline.store.copy_binary import copy_in, jsonb

DIMENSIONS, LATENT, CLUSTERS, K = 384, 32, 500, 10
PARTS = 1000
ROWS_AT_A_TIME = 50_000
FILTERS = {
    "0.1 %": {"part": {"lt": 1}},
    "1 %": {"part": {"lt": 10}},
    "10 %": {"part": {"lt": 100}},
    "50 %": {"part": {"lt": 500}},
    "100 %": {"part": {"lt": 1000}},
    "1 %, other clusters": {"cluster": {"lt": CLUSTERS // 100}},
    "no filter": None,
}
GOAL_P95, GOAL_SIMILAR, GOAL_RECOMMEND = 50.0, 30.0, 60.0  # milliseconds
HISTORY, TASTES = 500, 3  # items of a history, from so many clusters


class Queries:
    """An encoder whose texts are the numbers of made-up queries."""

    vectors = np.zeros((0, DIMENSIONS), np.float32)

    def __init__(self, profile: Profile) -> None:
        self.dimensions = profile.dimensions

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.vectors[[int(text) for text in texts]]

    encode_queries = encode_documents

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return np.ones(len(texts), np.int64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--index", choices=("hnsw", "ivfflat"), nargs="+", default=["hnsw", "ivfflat"])
    parser.add_argument("--queries", type=int, default=100)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-search-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    settings = Settings(database_url=None, embeddings_state_dir=folder)
    collection = open_collection(definition(arguments.index[0]), settings)
    try:
        tenths = fill(collection, settings, arguments.items, arguments.queries)
        for method in arguments.index:
            measure(collection, definition(method), settings, tenths)
            measure_people(definition(method), settings, arguments.items, arguments.queries)
    finally:
        collection.database.close()
        remove(folder)
    return 0


def definition(method: str) -> CollectionDefinition:
    profile = {"name": "made", "provider": "python", "model": "bench_search:Queries", "dimensions": DIMENSIONS}
    attributes = {
        "name": "bench",
        "source": {"table": "none", "key": ["id"]},
        "columns": ["part", "cluster"],
        "filters": {"part": "number", "cluster": "number"},
        "vectors": {"base": "{part}"},
        "profile": profile,
        "index": {"method": method},
    }
    return CollectionDefinition(CollectionAttributes.model_validate(attributes))


def made_up_clusters(rows: int, seed: int) -> NDArray[np.int64]:
    """The clusters that `made_up` gives."""
    return np.random.default_rng(seed).integers(0, CLUSTERS, rows)


def made_up(rows: int, seed: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Vectors (rows, DIMENSIONS) of length 1 in clusters of a few dimensions, and the cluster of each."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((CLUSTERS, LATENT), np.float32)
    wider = fixed.standard_normal((LATENT, DIMENSIONS), np.float32)
    clusters = random.integers(0, CLUSTERS, rows)  # as `made_up_clusters`
    vectors = np.empty((rows, DIMENSIONS), np.float16)
    for start in range(0, rows, ROWS_AT_A_TIME):
        there = slice(start, start + ROWS_AT_A_TIME)
        latent = centres[clusters[there]]
        latent = latent + 0.7 * random.standard_normal(latent.shape, np.float32)
        wide = latent @ wider + 0.5 * random.standard_normal((len(latent), DIMENSIONS), np.float32)
        vectors[there] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return vectors, clusters


def copy(collection: Collection, vectors: NDArray, clusters: NDArray, parts: NDArray) -> None:
    """The rows of items, texts and vectors, as commits write them."""
    table, rows = collection.model.destination, len(vectors)
    with collection.database.connect() as connection:
        for start in range(0, rows, ROWS_AT_A_TIME):
            numbers = np.arange(start, min(start + ROWS_AT_A_TIME, rows))
            keys = texts_of(str(number) for number in numbers)
            payload = jsonb(texts_of(f'{{"part": {parts[n]}, "cluster": {clusters[n]}}}' for n in numbers))
            names, hashes = np.full(len(numbers), b"base"), np.zeros((len(numbers), 16), np.uint8)
            items = {"item_key": keys, "batch": numbers // 1000, "seen_hash": hashes, "committed_hash": hashes}
            texts = {"item_key": keys, "vector_name": names, "chunk": np.zeros(len(numbers), np.int64)}
            texts |= {"content_hash": hashes, "text": keys, "blank": np.zeros(len(numbers), np.bool_)}
            copy_in(connection, table.tables.item, {**items, "payload": payload})
            copy_in(connection, table.tables.text, texts)
            found = connection.execute(
                "SELECT id FROM embeddings.bench_text ORDER BY id DESC LIMIT %s", [len(numbers)]
            ).fetchall()
            ids = np.array([row[0] for row in found][::-1])
            embeddings = {"text_id": ids, "vector_name": names, "content_hash": hashes, "embedding": vectors[numbers]}
            copy_in(connection, table.identifier, embeddings, storage=table.storage)
    with collection.database.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO embeddings.batch (collection, batch, committed_at) SELECT 'bench', n, now() "
            "FROM generate_series(0, %s) AS n",
            [(rows - 1) // 1000],
        )
        connection.execute("VACUUM ANALYZE")


def texts_of(values: Iterable[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


def exact(vectors: NDArray, queries: NDArray, chosen: NDArray) -> list[float]:
    """Of each query, the cosine of its tenth nearest vector among those chosen; -1 if there are fewer."""
    rows = np.flatnonzero(chosen)
    best = np.full((len(queries), K), -1, np.float32)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        block = vectors[rows[start : start + ROWS_AT_A_TIME]].astype(np.float32)
        scores = np.concatenate([best, queries @ block.T], axis=1)
        best = np.sort(scores, axis=1)[:, -K:]
    lowest: list[float] = best[:, 0].tolist()
    return lowest


def fill(collection: Collection, settings: Settings, rows: int, number: int) -> dict[str, tuple[list[float], int]]:
    """Make the rows and all indexes but the ANN index; of each filter, what `exact` says and how many hits."""
    vectors, clusters = made_up(rows, 1)
    queries = made_up(number, 2)[0].astype(np.float32)
    Queries.vectors = queries
    sys.modules["bench_search"] = sys.modules["__main__"]  # the encoder is this class
    parts = np.random.default_rng(3).permutation(rows) % PARTS
    copy(collection, vectors, clusters, parts)
    began = time.perf_counter()
    ensure_filters(collection.database, collection.definition)
    filtered = time.perf_counter()
    build(collection.database, collection.model.destination, settings.state_dir / "faiss")
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {rows:,} items; seconds to build the filters' "
        f"indexes {filtered - began:.1f}, FAISS {time.perf_counter() - filtered:.1f}"
    )
    values, tenths = {"part": parts, "cluster": clusters}, {}
    for name, where in FILTERS.items():
        chosen = np.ones(rows, bool)
        for column, condition in (where or {}).items():
            chosen &= values[column] < condition["lt"]
        tenths[name] = exact(vectors, queries, chosen), min(K, int(chosen.sum()))
    return tenths


def measure(
    collection: Collection, one: CollectionDefinition, settings: Settings, tenths: dict[str, tuple[list[float], int]]
) -> None:
    """A line for each filter, by PostgreSQL with this ANN index and by FAISS."""
    began, index = time.perf_counter(), one.attributes.index
    ensure_index(collection.database, collection.model.destination, index, ["base"])
    print(f"\n{index.method}, built in {time.perf_counter() - began:.0f} s; load {os.getloadavg()[0]:.1f}\n")
    print(
        "| filter matches | by | how | least hits | recall@10 | first | p50 | p95 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, where in FILTERS.items():
        for by in ("pgvector", "faiss"):
            measure_one(one, settings, name, where, by, *tenths[name])


def measure_one(
    one: CollectionDefinition, settings: Settings, name: str, where: object, index: str, tenth: list[float], there: int
) -> None:
    milliseconds, counts, good, ways, first = list[float](), list[int](), 0, set[str](), 0.0
    for _ in range(2):  # the first round warms the caches
        first = milliseconds[0] if milliseconds else 0.0
        milliseconds.clear()
        for n in range(len(tenth)):
            began = time.perf_counter()
            hits = search(one, settings, str(n), k=K, where=where, index=index)  # type: ignore[arg-type]
            milliseconds.append(1000 * (time.perf_counter() - began))
            counts.append(len(hits))
            good += sum(hit.score >= tenth[n] - 2.0**-10 for hit in hits)
            ways |= {leg.how.split(",")[0] + (" *" if leg.fell_back else "") for leg in hits.explanation.legs}
    p50, p95 = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
    met = "" if p95 <= GOAL_P95 else " **over**"
    recall = good / (2 * there * len(tenth))
    how = "; ".join(sorted(ways))
    print(f"| {name} | {index} | {how} | {min(counts)} | {recall:.3f} | {first:.1f} | {p50:.1f} | {p95:.1f}{met} |")
    sys.stdout.flush()


def measure_people(one: CollectionDefinition, settings: Settings, rows: int, number: int) -> None:
    """A line for each way of asking without a text."""
    clusters, random = made_up_clusters(rows, 1), np.random.default_rng(4)
    histories = []
    for _ in range(number):
        own = np.flatnonzero(np.isin(clusters, random.choice(CLUSTERS, TASTES, replace=False)))
        histories.append([str(item) for item in random.choice(own, min(HISTORY, len(own)), replace=False)])
    print("\n| asked | by | least hits | p50 | p95 |\n|---|---|---|---|---|")
    for by in ("pgvector", "faiss"):
        options: dict[str, Any] = {"k": K, "index": by}
        ways: dict[str, tuple[Callable[[list[str]], Hits], float]] = {
            "similar": (lambda keys, o=options: similar(one, settings, keys[0], **o), GOAL_SIMILAR),
            "recommend, mean": (lambda keys, o=options: recommend(one, settings, history=keys, **o), GOAL_RECOMMEND),
            "recommend, best": (
                lambda keys, o=options: recommend(one, settings, history=keys, strategy="best", **o),
                GOAL_RECOMMEND,
            ),
        }
        for name, (way, goal) in ways.items():
            for _ in range(2):  # the first round warms the caches
                milliseconds, counts = [], []
                for keys in histories:
                    began = time.perf_counter()
                    counts.append(len(way(keys)))
                    milliseconds.append(1000 * (time.perf_counter() - began))
            p50, p95 = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
            met = "" if p95 <= goal else " **over**"
            print(f"| {name} | {by} | {min(counts)} | {p50:.1f} | {p95:.1f}{met} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
