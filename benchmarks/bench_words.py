"""Search by meaning, by words and by both: nDCG@10 on a judged collection, milliseconds, and the build of BM25 files.

    python benchmarks/bench_words.py judged FOLDER     documents.csv (id, title, text) and queries.jsonl (id, query,
                                                       relevant: {document: grade}); embeds it with MiniLM
    python benchmarks/bench_words.py latency [--items 100000]   made-up texts and vectors; queries are encoded by MiniLM
    python benchmarks/bench_words.py build [--items 1000000]    made-up texts: seconds, peak memory, seconds to open

Uses an embedded server of its own.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import remove
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.words import FusionDefinition
from embeddings_pipeline.index.bm25_build import _Index
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.search.fusion import fused
from embeddings_pipeline.search.hits import Hit
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import open_database

K, CANDIDATES, SAMPLES = 10, 100, 10_000
FUSIONS = (1, 2, 5, 10, 20, 60, 100)
WORDS = {"language": "english"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("judged").add_argument("folder", type=Path)
    commands.add_parser("latency").add_argument("--items", type=int, default=100_000)
    commands.add_parser("build").add_argument("--items", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores")
    with state_folder() as folder:
        settings = Settings(database_url=None, embeddings_state_dir=folder)
        if arguments.command == "judged":
            judged(settings, arguments.folder)
    return 0


@contextmanager
def state_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bench-words-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        yield folder
    finally:
        remove(folder)


def definition(**others: Any) -> CollectionDefinition:
    attributes: dict[str, Any] = {
        "name": "bench",
        "source": {"table": "documents", "key": ["id"]},
        "vectors": {"base": "{title}. {text}"},
        "words": WORDS,
        "profile": "minilm",
        **others,
    }
    return CollectionDefinition(CollectionAttributes.model_validate(attributes))


# --- nDCG@10 -------------------------------------------------------------------------------------------------------


def judged(settings: Settings, folder: Path) -> None:
    """A line for each way of searching: nDCG@10 with its confidence interval, and what fusion adds to the better leg."""
    one = definition()
    with (folder / "documents.csv").open(encoding="utf-8") as file:
        rows = [(row["id"], row["title"], row["text"]) for row in csv.DictReader(file)]
    database = open_database(settings)
    try:
        with database.connect() as connection:
            connection.execute("CREATE TABLE documents (id text PRIMARY KEY, title text, text text)")
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO documents VALUES (%s, %s, %s)", rows)
        collection = open_collection(one, settings)
        collection.ledger.full_scan(collection.source)
        run_batch(collection, list(collection.ledger.dirty_batches()), "run")
        ensure_words(database, one)
        build(database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
        lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
        queries = [json.loads(line) for line in lines]
        print(f"{len(rows):,} documents, {len(queries)} queries\n")
        tell(one, settings, queries)
    finally:
        database.close()


def tell(one: CollectionDefinition, settings: Settings, queries: Sequence[dict[str, Any]]) -> None:
    elsewhere = settings.model_copy(update={"embeddings_state_dir": settings.state_dir / "elsewhere"})
    (settings.state_dir / "elsewhere").mkdir()
    (settings.state_dir / "elsewhere" / "encoders").symlink_to(settings.state_dir / "encoders")
    os.environ["DATABASE_URL"] = open_database(settings).url
    elsewhere = elsewhere.model_copy(update={"database_url": Settings().database_url})
    ways = {"dense": (settings, "dense"), "text, BM25": (settings, "text"), "text, tsvector": (elsewhere, "text")}
    hits: dict[str, list[list[Hit]]] = {}
    for name, (here, mode) in ways.items():
        hits[name] = [list(search(one, here, query["query"], k=CANDIDATES, mode=mode)) for query in queries]  # type: ignore[arg-type]
    scores = {name: measured(queries, found) for name, found in hits.items()}
    for leg in ("text, BM25", "text, tsvector"):
        for k in FUSIONS:
            joined = [
                fused(dense, text, FusionDefinition(k=k)) for dense, text in zip(hits["dense"], hits[leg], strict=True)
            ]
            scores[f"hybrid of {leg.split()[1]}, k = {k}"] = measured(queries, joined)
    print("| way | nDCG@10 | 95 % | above the better leg | 95 % |\n|---|---|---|---|---|")
    for name, values in scores.items():
        line = f"| {name} | {values.mean():.3f} | {interval(values)} |"
        if name.startswith("hybrid"):
            leg = scores[f"text, {name.split()[2].rstrip(',')}"]
            better = max(scores["dense"], leg, key=lambda each: each.mean())
            line += f" {(values - better).mean():+.3f} | {interval(values - better)} |"
        print(line)
    print(f"\nk by 10-fold cross-validation: {crossed(scores, 'BM25')}; {crossed(scores, 'tsvector')}")


def measured(queries: Sequence[dict[str, Any]], found: Sequence[Sequence[Hit]]) -> NDArray[np.float64]:
    """nDCG@10 of each query."""
    return np.array([ndcg(query["relevant"], hits) for query, hits in zip(queries, found, strict=True)])


def ndcg(relevant: dict[str, float], hits: Sequence[Hit]) -> float:
    """With linear gains, as trec_eval has it."""
    discounts = 1 / np.log2(np.arange(2, K + 2))
    gains = np.array([relevant.get(hit.item_key, 0) for hit in hits[:K]])
    ideal = np.sort(list(relevant.values()))[::-1][:K]
    return float((gains * discounts[: len(gains)]).sum() / (ideal * discounts[: len(ideal)]).sum())


def interval(values: NDArray[np.float64]) -> str:
    """The 95 % confidence interval of the mean, by bootstrap over the queries."""
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (SAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{low:+.3f} … {high:+.3f}" if low < 0 < high or "+" in f"{low:+}" else f"{low:.3f} … {high:.3f}"


def crossed(scores: dict[str, NDArray[np.float64]], leg: str) -> str:
    """nDCG@10 with the k that is best on nine tenths of the queries, measured on the tenth."""
    of_k = {k: scores[f"hybrid of {leg}, k = {k}"] for k in FUSIONS}
    folds = np.random.default_rng(0).permutation(len(of_k[FUSIONS[0]])) % 10
    held_out, chosen = [], []
    for fold in range(10):
        k = max(FUSIONS, key=lambda k: of_k[k][folds != fold].mean())  # noqa: B023
        chosen.append(k)
        held_out.append(of_k[k][folds == fold])
    return f"{leg} {np.concatenate(held_out).mean():.3f} (k of the folds: {sorted(chosen)})"


if __name__ == "__main__":
    sys.exit(main())
