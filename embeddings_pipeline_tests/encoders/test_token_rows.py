"""Rows of tokens are those that the tokenizer gives, padded as transformers pads them, whatever version it is of."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer

from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.device import Link, padded
from embeddings_pipeline.encoders.token_rows import Padding, TokenRows

FOLDER = resolve_weights(BUILT_IN["minilm"])
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TEXTS = ["", "a", "A shark keeps a small town away from its beach.", "word " * 300, "海の映画 🎬"]


class EarlyExit:
    """A tokenizer that does not look beyond what it keeps of a text, as tokenizers 0.23.1 and 0.23.2 do not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
        most = self._tokenizer.truncation
        if most is None:
            return self._tokenizer.encode_batch_fast(texts)
        return self._tokenizer.encode_batch_fast([" ".join(text.split()[: most["max_length"]]) for text in texts])


def rows(tokenizer: Any, max_length: int | None = 64, side: str = "right") -> TokenRows:
    return TokenRows(tokenizer, INPUTS, max_length, "right", Padding(side, 0, 0))


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.mark.parametrize("max_length", [64, None])
def test_texts_are_counted_whole_by_a_tokenizer_that_does_not_tell_the_rest(max_length: int | None) -> None:
    told = rows(tokenizer(), max_length).read(TEXTS)
    asked = rows(EarlyExit(tokenizer()), max_length).read(TEXTS)
    assert told.counts == asked.counts == [2, 3, 13, 302, 7]
    assert told.lengths == asked.lengths == [min(count, max_length or count) for count in told.counts]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_inputs_are_those_of_transformers(side: str, pairs: bool) -> None:
    theirs = AutoTokenizer.from_pretrained(str(FOLDER), padding_side=side)
    ours = rows(tokenizer(), 64, side)
    queries = ["a small town"] * len(TEXTS)
    read = ours.read_pairs(queries[0], TEXTS, None) if pairs else ours.read(TEXTS)
    settings = {"truncation": True, "max_length": 64, "padding": True, "return_tensors": "np"}
    expected = theirs(queries, TEXTS, **settings) if pairs else theirs(TEXTS, **settings)
    for inputs in ours.padded(read.tokens), padded(ours, read.tokens, Link(torch.device("cpu"))):
        assert list(inputs) == list(INPUTS)
        assert all(np.array_equal(inputs[name], expected[name]) for name in INPUTS)
