"""Compare our reranking with `CrossEncoder.predict` with its defaults, on the same pairs.

    python benchmarks/bench_rerank.py movies.csv [--pairs 200] [--columns title overview]

The model is a cross-encoder of MiniLM's shape (6 layers, 384 dimensions) with MiniLM's tokenizer and random weights,
which are as fast as others. ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 holds both to AVX2. They take turns in one
process, because machines are noisy; medians are reported, as a line of JSON for each.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.reranking import reranker_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.cross_encoder import load_cross_encoder

QUERY = "two brothers look for their father in a town by the sea"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a CSV file with a header")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--columns", nargs="+", default=["title", "overview"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with arguments.csv.open(newline="", encoding="utf-8") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(arguments.pairs), strict=False)]
    texts = [" | ".join(row[column] for column in arguments.columns if row[column]) for row in rows]
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_cross_encoder(Path(temporary) / "model", arguments.layers)
        began = time.perf_counter()
        ours = load_cross_encoder(
            reranker_profile(str(folder), device="cpu"), Settings(embeddings_state_dir=Path(temporary) / "state")
        )
        first_load = round(time.perf_counter() - began, 1)
        theirs = CrossEncoder(str(folder), device="cpu")
        pairs = [(QUERY, text) for text in texts]
        lengths = [len(ids) for ids in theirs.tokenizer(pairs, truncation=True)["input_ids"]]
        print(json.dumps({"first_load_s": first_load, "tokens": round(float(np.mean(lengths)), 1)}), flush=True)
        sides = {
            ours.runs_on: lambda: ours.score(QUERY, texts),
            "CrossEncoder.predict": lambda: theirs.predict(pairs, show_progress_bar=False),
        }
        compared(sides, len(texts), arguments.rounds)


def random_cross_encoder(folder: Path, layers: int) -> Path:
    """A cross-encoder of MiniLM's shape, saved."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_weights(BUILT_IN["minilm"]), model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def compared(sides: dict[str, Callable[[], np.ndarray]], pairs: int, rounds: int) -> None:
    """A line for each side: pairs a second, times the last side's, and how far its scores are from those."""
    scores = {name: score() for name, score in sides.items()}  # and warms it up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, score in sides.items():
            began = time.perf_counter()
            score()
            seconds[name].append(time.perf_counter() - began)
    [*_, last] = sides
    for name, times in seconds.items():
        report = {
            "runs_on": name,
            "pairs_per_s": round(pairs / statistics.median(times), 1),
            "ms": round(1000 * statistics.median(times)),
            "times_theirs": round(statistics.median(seconds[last]) / statistics.median(times), 2),
            "difference": round(float(np.abs(scores[name] - scores[last]).max()), 6),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
