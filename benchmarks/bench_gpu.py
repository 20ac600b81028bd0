"""Our encoder on a GPU beside `SentenceTransformer.encode` in float16 on the same card.

    python benchmarks/bench_gpu.py [--models minilm bge-small] [--texts 50000] [--batch-sizes 32 128 512 2048]
    python benchmarks/bench_gpu.py --device cpu --texts 100     # proves that it runs; its figures say nothing

The models have the shape of all-MiniLM-L6-v2 and of bge-small-en-v1.5, with random weights: those are as fast as any
others, and nothing is fetched (the tokenizer is that of the MiniLM that is installed). Texts are as long as films'
descriptions, about 80 tokens, and some of them several hundred. Both sides take turns in one process after a warm-up,
in each round with texts that neither has seen, as it is in use; medians are reported, as a line of JSON for each model.
The best batch size of the peer counts. Exit code 77: no GPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.batches import lowest_cosine
from embeddings_pipeline.encoders.local import LocalEncoder

NO_GPU = 77
WIDTH = 384
SHAPES = {
    "minilm": {"layers": 6, "pooling": "mean", "max_length": 256},
    "bge-small": {"layers": 12, "pooling": "cls", "max_length": 512},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128, 512, 2048], help="of the peer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use is here: nothing is measured", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            profile = model_of(name, Path(temporary) / name, arguments.device)
            print(json.dumps(compared(profile, arguments.texts, arguments.batch_sizes, arguments.rounds)), flush=True)
    return 0


def model_of(name: str, folder: Path, device: str) -> Profile:
    """A sentence-transformers model of that shape, in the folder."""
    shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_weights(BUILT_IN["minilm"])))
    tokenizer.model_max_length = shape["max_length"]
    tokenizer.save_pretrained(folder / "transformer")
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 12}
    config = BertConfig(num_hidden_layers=shape["layers"], vocab_size=len(tokenizer), initializer_range=0.05, **size)
    BertModel(config).save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(WIDTH, shape["pooling"]), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.max_seq_length = shape["max_length"]
    model.save(str(folder / "model"))
    return Profile(name=name, provider="local", model=str(folder / "model"), dimensions=WIDTH, device=device)


def texts_of(number: int, tokenizer: Any, seed: int = 0) -> list[str]:
    """Different texts whose lengths are spread as those of descriptions are: half of them between 50 and 105 tokens."""
    rng = np.random.default_rng(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    lengths = np.clip(rng.lognormal(np.log(72), 0.55, number), 4, 600).astype(int)
    drawn = iter(rng.integers(len(words), size=lengths.sum()).tolist())
    return [" ".join(words[place] for place in islice(drawn, length)) for length in lengths.tolist()]


def compared(profile: Profile, number: int, batch_sizes: list[int], rounds: int) -> dict[str, Any]:
    """Both sides' medians, and how near their vectors are."""
    on_gpu = profile.device != "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    theirs = SentenceTransformer(profile.model, device=profile.device, model_kwargs={"dtype": dtype})
    ours = LocalEncoder(profile, half="auto" if on_gpu else None, pipelined=True)
    texts = texts_of(number, theirs.tokenizer)
    tokens = int(np.minimum(ours.count_tokens(texts), ours.max_length or sys.maxsize).sum())
    ours.encode_documents(texts)
    for size in batch_sizes:
        theirs.encode(texts[: 4 * size], batch_size=size, show_progress_bar=False)
    our_seconds: list[float] = []
    their_seconds: dict[int, list[float]] = {size: [] for size in batch_sizes}
    for seed in range(1, rounds + 1):
        texts = texts_of(number, theirs.tokenizer, seed)
        began = time.perf_counter()
        vectors = ours.encode_documents(texts)
        our_seconds.append(time.perf_counter() - began)
        torch.backends.cuda.enable_cudnn_sdp(True)  # as it comes; our encoder forbids it for this process
        for size in batch_sizes:
            began = time.perf_counter()
            expected = theirs.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
            their_seconds[size].append(time.perf_counter() - began)
        torch.backends.cuda.enable_cudnn_sdp(False)
    rates = {size: number / statistics.median(seconds) for size, seconds in their_seconds.items()}
    rate, best = number / statistics.median(our_seconds), max(rates, key=lambda size: rates[size])
    return {
        "device": torch.cuda.get_device_name(profile.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "model": profile.name,
        "texts": number,
        "tokens_per_text": round(tokens / number, 1),
        "attention": ours.attention,
        "precision": str(ours.half or torch.float32).removeprefix("torch.") + (" whole" if ours.whole_in_half else ""),
        "tokens_per_pass": ours.tokens_per_batch,
        "ours_texts_per_s": round(rate),
        "ours_tokens_per_s": round(rate * tokens / number),
        "sentence_transformers_texts_per_s": {size: round(each) for size, each in rates.items()},
        "sentence_transformers_tokens_per_s": round(rates[best] * tokens / number),
        "ratio": round(rate / rates[best], 2),
        "min_cosine": round(lowest_cosine(vectors, expected), 6),
        "mean_cosine_of_neighbours": round(float((vectors[1:] * vectors[:-1]).sum(axis=1).mean()), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
