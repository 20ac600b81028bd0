"""The process that makes a cross-encoder ready for OpenVINO, and compares it with sentence-transformers.

`conversion` starts it, as it starts `convert` for encoders.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer

from embeddings_pipeline.config.reranking import Reranker
from embeddings_pipeline.encoders.convert import LONGEST_COMPARED, WORDS, Refused, fastest, graph_of, main, written
from embeddings_pipeline.encoders.cross_encoder import OpenVinoCrossEncoder
from embeddings_pipeline.encoders.cross_encoder_torch import COMPARED, KEPT_SCORE, difference, load_model
from embeddings_pipeline.encoders.openvino import Readiness
from embeddings_pipeline.forks import end_with_parent, killed_first

Pairs = Sequence[tuple[str, str]]


class _Tried(NamedTuple):
    """A model, and what a converted one is compared with."""

    profile: Reranker
    model: CrossEncoder
    pairs: Pairs
    theirs: NDArray[np.float32]
    threads: int


def answer_to(task: Mapping[str, Any]) -> dict[str, Any]:
    """Readiness and precision; raises Refused."""
    profile = Reranker(**task["profile"])
    torch.set_num_threads(task["threads"])
    model = load_model(profile, torch.device("cpu"))
    _check_known(model)
    pairs = _pairs(model.max_seq_length)
    theirs = np.asarray(model.predict(list(pairs), show_progress_bar=False), np.float32)
    tried = _Tried(profile, model, pairs, theirs, task["threads"])
    if task["converted"]:
        folder = Path(task["converted"])
        ready = Readiness(**json.loads((folder / "manifest.json").read_text("utf-8"))["readiness"])
        precision, _ = _best(tried, folder, ready)
    else:
        folder = Path(task["new"])
        ready, graph = _converted(model)
        precision, _ = written(graph, model.tokenizer, folder, partial(_best, tried, folder, ready))
    return {"readiness": asdict(ready), "precision": precision}


def _check_known(model: CrossEncoder) -> None:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise Refused("it has no tokenizer of the fast kind")
    for module in model:
        if type(module) not in (Transformer, Dense):
            raise Refused(f"its module {type(module).__name__} is none of those that are known to convert")
    if model.default_prompt_name is not None:
        raise Refused("it puts a prompt before what it reads")


def _converted(model: CrossEncoder) -> tuple[Readiness, Any]:
    tokenizer: Any = model.tokenizer
    pairs = [("a short", "text"), ("a text", "that is a little longer")]
    example = dict(tokenizer(pairs, padding=True, return_tensors="pt"))
    ready = Readiness(
        inputs=tuple(example),
        dimensions=1,
        positions=getattr(model.config, "max_position_embeddings", None),
        max_length=model.max_seq_length,
        truncation_side=tokenizer.truncation_side,
        padding_side=tokenizer.padding_side,
        pad_token=tokenizer.pad_token_id,
        pad_type=tokenizer.pad_token_type_id,
    )
    return ready, graph_of(model.model, _Graph(model, tuple(example)), example)


class _Graph(torch.nn.Module):
    """The whole model as a function of tensors, with what `predict` does to its scores."""

    def __init__(self, model: CrossEncoder, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        features: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        for module in self.model:
            features = module(features)
        activated: torch.Tensor = self.model.activation_fn(features["scores"])  # type: ignore[misc]
        return activated.reshape(-1, 1)


def _best(tried: _Tried, folder: Path, ready: Readiness) -> tuple[str, float]:
    """The fastest precision that keeps the scores, and how far they are from sentence-transformers' own."""

    def attempt(precision: str) -> float:
        encoder = OpenVinoCrossEncoder(tried.profile, folder, ready, precision, tried.threads)
        _check_tokens(encoder, tried)
        ours = [encoder.score(query, [text])[0] for query, text in tried.pairs]
        far, most = difference(np.array(ours, np.float32), tried.theirs), KEPT_SCORE[precision]
        if not far <= most:
            raise Refused(f"its scores are {far:.2g} from those of sentence-transformers, and may be {most}")
        return far

    return fastest(attempt)


def _check_tokens(encoder: OpenVinoCrossEncoder, tried: _Tried) -> None:
    """Refused if the tokenizer that was written reads a pair otherwise than the model's own."""
    for query, text in tried.pairs:
        encoder._query = query
        [(ids, types)] = encoder._tokens([text]).tokens
        theirs = tried.model.preprocess([(query, text)])
        same_types = types is None or types.tolist() == theirs["token_type_ids"][0].tolist()
        if ids.tolist() != theirs["input_ids"][0].tolist() or not same_types:
            raise Refused("its tokenizer gives other tokens without transformers")


def _pairs(longest: int | None) -> Pairs:
    """Pairs of few tokens, of as many as are compared, of more than are read; and of which the query alone is long."""
    most = min(longest or LONGEST_COMPARED, LONGEST_COMPARED)
    words = WORDS.split() * (4 + most // 8)
    text = " ".join(words[: most + 50])
    lengths = (1, 5, 34, most // 2, most - 8)
    pairs = [(" ".join(words[:5]), " ".join(words[n : n + length])) for n, length in enumerate(lengths)]
    return [*COMPARED, *pairs, ("a lost dog", text), (text, "a lost dog"), (text, text)]


if __name__ == "__main__":
    killed_first()
    end_with_parent(int(sys.argv[1]))  # which alone wants the answer
    main(Path(sys.argv[2]), answer_to)
