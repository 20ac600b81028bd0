"""Compare our encoders with `SentenceTransformer.encode` in float32 with its defaults, on the same texts.

    python benchmarks/bench_encoder.py movies.csv [--rows 2000] [--columns title overview genres]
        [--encoders openvino-bf16 openvino-f32 openvino-int8 torch]

ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 holds all of them to AVX2, ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI to
AVX-512 without bfloat16. All sides take turns in one process, because machines are noisy; medians are reported, as a
line of JSON for each encoder, with the time that it takes to load (converted before) and the memory of the process.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.processor import has_bf16

ALONE = """
import json, resource, sys, time
began = time.perf_counter()
from pathlib import Path
from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
imported = time.perf_counter()
encoder = load_encoder(BUILT_IN[sys.argv[1]], Settings(embeddings_state_dir=Path(sys.argv[2])))
loaded = time.perf_counter()
encoder.encode_queries(["a man ages backwards"])
asked = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch = "torch" in sys.modules
print(json.dumps({
    "import_s": round(imported - began, 2), "load_s": round(loaded - imported, 2),
    "first_query_s": round(asked - loaded, 3), "peak_mb": round(peak), "torch_imported": torch,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a CSV file with a header")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", nargs="+", default=["title", "overview", "genres"])
    parser.add_argument(
        "--profile", default="minilm", choices=[n for n, p in BUILT_IN.items() if p.provider == "local"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=["openvino-bf16", "openvino-f32", "torch"])
    parser.add_argument("--state", type=Path, help="a state folder; left out: a temporary one")
    arguments = parser.parse_args()

    with arguments.csv.open(newline="", encoding="utf-8") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(arguments.rows), strict=False)]
    texts = [" | ".join(row[column] for column in arguments.columns if row[column]) for row in rows]
    profile = with_model_prompts(replace(BUILT_IN[arguments.profile], device="cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(embeddings_state_dir=arguments.state or Path(temporary))
        began = time.perf_counter()
        load_encoder(profile, settings)
        print(json.dumps({"first_load_s": round(time.perf_counter() - began, 1)}), flush=True)
        command = [sys.executable, "-c", ALONE, arguments.profile, str(settings.state_dir)]
        for _ in range(2):
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)
        chosen = [name for name in arguments.encoders if name != "openvino-bf16" or has_bf16()]
        for report in compared(profile, settings, texts, chosen, arguments.rounds):
            print(json.dumps(report), flush=True)


def compared(
    profile: Profile, settings: Settings, texts: list[str], names: list[str], rounds: int
) -> list[dict[str, Any]]:
    """A report for each encoder."""
    import torch

    from embeddings_pipeline.encoders.local import load_model

    theirs = load_model(profile, torch.device("cpu"))
    encoders = {name: encoder_named(name, profile, settings) for name in names}
    for warm_up in (theirs.encode, *(encoder.encode_documents for encoder in encoders.values())):
        warm_up(texts[:256])
    rates: dict[str, list[float]] = {name: [] for name in ["theirs", *names]}
    cosines: dict[str, float] = {}
    for _ in range(rounds):
        began = time.perf_counter()
        expected = theirs.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        rates["theirs"].append(len(texts) / (time.perf_counter() - began))
        for name, encoder in encoders.items():
            began = time.perf_counter()
            vectors = encoder.encode_documents(texts)
            rates[name].append(len(texts) / (time.perf_counter() - began))
            cosines[name] = round(float((vectors * expected).sum(axis=1).min()), 6)
    reference = statistics.median(rates["theirs"])
    tokens = round(float(next(iter(encoders.values())).count_tokens(texts).mean()), 1)
    return [
        {
            "profile": profile.name,
            "encoder": name,
            "texts": len(texts),
            "tokens_per_text": tokens,
            "sentence_transformers_fp32_texts_per_s": round(reference, 1),
            "ours_texts_per_s": round(statistics.median(rates[name]), 1),
            "ratio": round(statistics.median(rates[name]) / reference, 2),
            "min_cosine": cosines[name],
        }
        for name in names
    ]


def encoder_named(name: str, profile: Profile, settings: Settings) -> Encoder:
    """`torch`, or OpenVINO in a precision, whatever the verdict on this processor was, or with weights in 8 bits."""
    from embeddings_pipeline.encoders.local import LocalEncoder
    from embeddings_pipeline.encoders.openvino import OpenVinoEncoder

    if name == "torch":
        return LocalEncoder(profile)
    encoder = load_encoder(replace(profile, weights="int8") if name == "openvino-int8" else profile, settings)
    if not isinstance(encoder, OpenVinoEncoder):
        raise SystemExit("OpenVINO does not run this model here: see the log")
    return encoder if encoder.profile.weights else encoder.in_precision(name.removeprefix("openvino-"))


if __name__ == "__main__":
    main()
