"""Compare our encoder with `SentenceTransformer.encode` in float32 with its defaults, on the same texts.

    python benchmarks/bench_encoder.py movies.csv [--rows 2000] [--columns title overview genres]

Both sides take turns in one process, because machines are noisy; medians are reported, as one line of JSON.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.local import LocalEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a CSV file with a header")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", nargs="+", default=["title", "overview", "genres"])
    parser.add_argument(
        "--profile", default="minilm", choices=[n for n, p in BUILT_IN.items() if p.provider == "local"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    with arguments.csv.open(newline="", encoding="utf-8") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(arguments.rows), strict=False)]
    texts = [" | ".join(row[column] for column in arguments.columns if row[column]) for row in rows]

    profile = BUILT_IN[arguments.profile]
    encoder = LocalEncoder(profile)
    theirs = SentenceTransformer(
        str(resolve_weights(profile)), device=str(encoder.device), model_kwargs={"dtype": torch.float32}
    )
    theirs.max_seq_length = profile.max_length
    for warm_up in (encoder.encode_documents, theirs.encode):
        warm_up(texts[:64])

    rates: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        expected = theirs.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        rates["theirs"].append(len(texts) / (time.perf_counter() - started))
        started = time.perf_counter()
        vectors = encoder.encode_documents(texts)
        rates["ours"].append(len(texts) / (time.perf_counter() - started))

    reference, ours = statistics.median(rates["theirs"]), statistics.median(rates["ours"])
    report = {
        "profile": profile.name,
        "texts": len(texts),
        "tokens_per_text": round(float(encoder.count_tokens(texts).mean()), 1),
        "device": str(encoder.device),
        "half": str(encoder.half),
        "sentence_transformers_fp32_texts_per_s": round(reference, 1),
        "ours_texts_per_s": round(ours, 1),
        "ratio": round(ours / reference, 2),
        "min_cosine": round(float((vectors * expected).sum(axis=1).min()), 6),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
