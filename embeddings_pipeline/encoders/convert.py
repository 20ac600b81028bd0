"""The process that makes a model ready for OpenVINO, and compares it with sentence-transformers.

`conversion` starts it (`python -m embeddings_pipeline.encoders.convert PID task.json`), so that whoever wants the model
imports neither torch nor OpenVINO's tools, and outlives what they may do.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embeddings_pipeline.config.model_words import model_words
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import weights_digest
from embeddings_pipeline.encoders.batches import OUT_OF_MEMORY, first_line
from embeddings_pipeline.encoders.comparison import Vectors, likeness, reference
from embeddings_pipeline.encoders.local import KNOWN, PRECISION_TEXTS, READ, LocalEncoder, positions_of
from embeddings_pipeline.encoders.openvino import (
    GRAPH,
    TOKENIZER,
    OpenVinoEncoder,
    Readiness,
    conversion_tools,
    openvino,
)
from embeddings_pipeline.encoders.processor import has_bf16
from embeddings_pipeline.errors import PipelineError, ProfileError
from embeddings_pipeline.forks import end_with_parent, killed_first

KEPT_COSINE = {"bf16": 0.99995, "f32": 0.9999, "i8": 0.99}
"""What vectors of the compared texts must keep, so that others keep 0.9999 as well; in 8 bits, as much as is usual."""
KEPT_LENGTH = {"bf16": 0.01, "f32": 0.01, "i8": 0.05}
LONGEST_COMPARED = 512
T = TypeVar("T")
WORDS = "one of the films that he had seen in a small town by the sea was about two brothers and a lost dog , "


class Refused(Exception):
    """Why a model is not for OpenVINO."""


def answer_to(task: Mapping[str, Any]) -> dict[str, Any]:
    """Readiness, precision and cosine; raises Refused."""
    profile = Profile(**task["profile"])
    torches = LocalEncoder(profile, half=None, threads=task["threads"])
    _check_known(torches)
    texts = _texts(torches.max_length)
    theirs = reference(profile, torches.model, texts)
    tried = _Tried(profile, torches, texts, theirs, task["threads"])
    if task["converted"]:
        folder = Path(task["converted"])
        ready = Readiness(**json.loads((folder / "manifest.json").read_text("utf-8"))["readiness"])
        precision, cosine = _best(tried, folder, ready)
    else:
        ready, precision, cosine = _converted(tried, Path(task["new"]))
    return {"readiness": asdict(ready), "precision": precision, "cosine": cosine}


class _Tried(NamedTuple):
    """A profile, and what a converted model of it is compared with."""

    profile: Profile
    torches: LocalEncoder
    texts: list[str]
    theirs: Vectors
    threads: int


def _check_known(encoder: LocalEncoder) -> None:
    tokenizer = encoder._tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise Refused("it has no tokenizer of the fast kind")
    for module in encoder.model:
        if type(module) not in KNOWN:
            raise Refused(f"its module {type(module).__name__} is none of those that are known to convert")
    if not encoder.tokens_suffice:
        raise Refused("it makes more of a text than its tokens (a chat template, a prompt that pooling leaves out)")


def _converted(tried: _Tried, folder: Path) -> tuple[Readiness, str, float]:
    """Write graph and tokenizer into the folder; the weights in 16 bits, unless that changes the vectors."""
    model = tried.torches.model
    model.truncate_dim = model_words(tried.profile).truncate_dim  # its own, whatever this profile shortens vectors to
    tokenizer: Any = tried.torches._tokenizer
    example = dict(tokenizer(["a short text", "a text that is a little longer"], padding=True, return_tensors="pt"))
    ready = _readiness(tried.torches, tuple(example))
    transformer: Any = model[0]
    graph = graph_of(transformer.model, _Graph(model, tuple(example)), example)
    if tried.profile.weights == "int8":
        _to_int8(graph)
    return ready, *written(graph, tokenizer, folder, partial(_best, tried, folder, ready))


def written(graph: Any, tokenizer: Any, folder: Path, best: Callable[[], T]) -> T:
    """What `best` says of graph and tokenizer in the folder; weights are in 16 bits, unless it refuses those."""
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    _save(graph, folder, compress_to_fp16=True)
    try:
        return best()
    except Refused:
        (folder / GRAPH).with_suffix(".bin").unlink()  # what is loaded from it may still be there
        _save(graph, folder, compress_to_fp16=False)
        return best()


def _save(graph: Any, folder: Path, *, compress_to_fp16: bool) -> None:
    try:
        openvino().save_model(graph, folder / GRAPH, compress_to_fp16=compress_to_fp16)
    except RuntimeError as error:  # it does not say why: `basic_ios::clear: iostream error`
        for file in folder.iterdir():
            file.unlink()
        place = folder.parent.parent
        raise OSError(f"{place} does not hold it: make room there, or set TMPDIR to a folder with more") from error


def graph_of(transformer: Any, module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Any:
    """OpenVINO's graph of a module around a transformer, which takes the inputs of the example. Raises Refused."""
    if not READ.issuperset(example):
        raise Refused(f"it wants {', '.join(sorted(set(example) - READ))} beside tokens")
    convert_model = conversion_tools().convert_model
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            transformer.set_attn_implementation("eager")
            graph = convert_model(module, example_input=tuple(example.values()))
    except Exception as error:
        raise Refused(f"OpenVINO cannot convert it: {first_line(error)}") from error
    if len(graph.inputs) != len(example):
        raise Refused(f"its graph takes {len(graph.inputs)} of the inputs {', '.join(example)}")
    return graph


def _to_int8(graph: Any) -> None:
    """Have the weights of matrix products in 8 bits: whole numbers from -127 to 127, and a scale for each output."""
    ops = import_module("openvino.opset13")
    for product in graph.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        weights = product.input_value(1).get_node()
        if weights.get_type_name() == "Convert":
            weights = weights.input_value(0).get_node()
        if weights.get_type_name() != "Constant" or len(weights.shape) != 2:
            continue
        numbers = weights.get_data().astype(np.float32)
        inputs = 1 if product.get_attributes()["transpose_b"] else 0
        largest = np.abs(numbers).max(axis=inputs, keepdims=True)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        whole = ops.convert(ops.constant(np.rint(numbers / scale).astype(np.int8)), "f32")
        product.input(1).replace_source_output(ops.multiply(whole, ops.constant(scale)).output(0))


def _readiness(encoder: LocalEncoder, inputs: tuple[str, ...]) -> Readiness:
    tokenizer: Any = encoder._tokenizer
    dimensions = encoder.model.get_embedding_dimension()
    if dimensions is None:
        raise Refused("it does not say how many dimensions it gives")
    length = model_words(encoder.profile).max_length  # its own, whatever this profile has it read
    if encoder.profile.max_length is None and encoder.max_length != length:
        raise Refused(f"it reads {encoder.max_length} tokens, and its files say {length}")
    return Readiness(
        inputs=inputs,
        dimensions=dimensions,
        positions=positions_of(encoder.model),
        max_length=length,
        truncation_side=tokenizer.truncation_side,
        padding_side=tokenizer.padding_side,
        pad_token=tokenizer.pad_token_id,
        pad_type=tokenizer.pad_token_type_id,
    )


class _Graph(torch.nn.Module):
    """The whole model as a function of tensors: transformer, pooling, and whatever comes after it."""

    def __init__(self, model: SentenceTransformer, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        features: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        for module in self.model:
            features = module(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors if self.model.truncate_dim is None else vectors[:, : self.model.truncate_dim]


def _best(tried: _Tried, folder: Path, ready: Readiness) -> tuple[str, float]:
    """The fastest precision that keeps the vectors, and their lowest cosine. Refused if none does."""

    def attempt(precision: str) -> float:
        encoder = OpenVinoEncoder(tried.profile, folder, ready, precision, tried.threads)
        _check_tokens(encoder, tried)
        return _kept(encoder, tried)

    return fastest(attempt, ("i8",) if tried.profile.weights else None)


def fastest(attempt: Callable[[str], T], precisions: Sequence[str] | None = None) -> tuple[str, T]:
    """The fastest precision that an attempt does not refuse, and what that gives. Refused if there is none.

    `precisions`: which to try; None: those that this processor has.
    """
    reasons = []
    for precision in precisions or (("bf16", "f32") if has_bf16() else ("f32",)):
        try:
            return precision, attempt(precision)
        except (Refused, PipelineError, RuntimeError) as error:
            reasons.append(f"{first_line(error)} ({precision})")
    raise Refused("; ".join(reasons))


def _check_tokens(encoder: OpenVinoEncoder, tried: _Tried) -> None:
    """Refused if the tokenizer that was written reads a text otherwise than the model's own."""
    tokenizer: Any = tried.torches._tokenizer
    for use in (tried.torches._documents, tried.torches._queries):
        prompted = [use.prompt + text for text in tried.texts]
        ours = encoder._tokenize(tried.texts, use.prompt, counted=True)
        theirs = tokenizer(prompted, truncation=True, verbose=False)["input_ids"]
        if [ids.tolist() for ids, _ in ours.tokens] != theirs:
            raise Refused("its tokenizer gives other tokens without transformers")
        counts = [len(ids) for ids in tokenizer(prompted, verbose=False)["input_ids"]]
        if ours.counts != counts or (use is tried.torches._documents and encoder._count(prompted) != counts):
            raise Refused("its tokenizer counts otherwise without transformers")


def _kept(encoder: OpenVinoEncoder, tried: _Tried) -> float:
    """The lowest cosine. Refused if that, or a vector's length, is not kept."""
    texts, theirs, least = tried.texts, tried.theirs, KEPT_COSINE[encoder.precision]
    lowest = min(likeness(encoder, texts, theirs))
    if not lowest >= least:
        raise Refused(f"the cosine to sentence-transformers' vectors is {lowest}, and must be {least}")
    if not encoder.profile.normalize:
        ours, wanted = (np.linalg.norm(v, axis=1) for v in (encoder.encode_documents(texts), theirs.documents))
        if not np.allclose(ours, wanted, rtol=KEPT_LENGTH[encoder.precision]):
            raise Refused("its vectors are not as long as those of sentence-transformers")
    return lowest


def _texts(longest: int | None) -> list[str]:
    """Texts of a token, of as many as are compared, of many lengths between, and one that is longer than is read."""
    most = min(longest or LONGEST_COMPARED, LONGEST_COMPARED)
    lengths = [1, 2, 3, 5, 8, 13, 34, 89, most - 2, most + 50]
    words = WORDS.split() * (4 + most // 8)
    return [*PRECISION_TEXTS, *(" ".join(words[n : n + length]) for n, length in enumerate(lengths) if length > 0)]


def main(file: Path, answer_to: Callable[[Mapping[str, Any]], dict[str, Any]] = answer_to) -> None:
    """Do what the file asks for, and write the answer where it says."""
    task = json.loads(file.read_text("utf-8"))
    try:
        answer = answer_to(task)
    except Refused as error:
        out_of_memory = any(words in str(error) for words in OUT_OF_MEMORY)
        answer = {"reason": str(error), "lasting": not out_of_memory, "out_of_memory": out_of_memory}
    except ProfileError as error:  # torch will say the same
        answer = {"reason": str(error)}
    except OSError as error:
        answer = {"reason": f"its files cannot be read or written: {error}"}
    if not _is_as_it_was(Path(task["profile"]["model"]), task["weights"]):
        answer = {"changed": True}
    Path(task["answer"]).write_text(json.dumps(answer), "utf-8")


def _is_as_it_was(model: Path, digest: str) -> bool:
    try:
        return weights_digest(model) == digest
    except OSError:
        return False


if __name__ == "__main__":
    killed_first()
    end_with_parent(int(sys.argv[1]))  # which alone wants the answer
    main(Path(sys.argv[2]))
