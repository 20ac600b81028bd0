"""Texts as the rows of token numbers that a local model reads: one tokenizer, its truncation, its padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from embeddings_pipeline.forks import ProcessLock

Row = tuple[NDArray[np.int64], NDArray[np.int64] | None]
"""Of a text: numbers of its tokens, and their types for a model that reads them."""


class Tokens(NamedTuple):
    """Texts as the model reads them, truncated."""

    tokens: list[Any]  # of each text, in the form that the encoder's `_start` takes
    lengths: list[int]
    counts: list[int] | None  # of each text's tokens before truncation; None: this tokenizer does not say


@dataclass(frozen=True)
class Padding:
    """What rows are filled up with to one length."""

    side: str
    token: int
    type: int


class TokenRows:
    """A fast tokenizer. Safe to use from several threads, while transformers uses the same one under `lock`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        inputs: Sequence[str],
        max_length: int | None,
        truncation_side: str,
        padding: Padding,
    ) -> None:
        """`inputs`: which of input_ids, attention_mask and token_type_ids the model reads. `max_length`: None: all."""
        self.lock = ProcessLock(ended_first=True)
        self._tokenizer, self._inputs, self._padding = tokenizer, tuple(inputs), padding
        self._max_length, self._truncation_side = max_length, truncation_side

    def read(self, texts: list[str]) -> Tokens:
        """Each text's row, truncated, and how many tokens it has in all."""
        with self.lock:
            self._truncate(self._max_length)
            encodings = self._tokenizer.encode_batch_fast(texts)
            own = self._tokenizer.num_special_tokens_to_add(False)  # in the row, and in each piece of the rest
        lengths = [len(encoding) for encoding in encodings]
        counts = [
            length + sum(len(piece) - own for piece in encoding.overflowing)
            for length, encoding in zip(lengths, encodings, strict=True)
        ]
        return Tokens([self._row(encoding) for encoding in encodings], lengths, counts)

    def read_pairs(self, first: str, seconds: list[str], characters: int | None) -> Tokens:
        """The rows of pairs of texts, as the model's own tokenizer reads them, and how many tokens each second text has
        in all. The first one is tokenised once; `characters`: as many of it as surely suffice, if tokens are not long.
        """
        most = self._max_length
        with self.lock:
            self._truncate(None)
            query = self._tokenizer.encode(first[:characters], add_special_tokens=False)
            if most is not None and len(query) < 2 * most:
                query = self._tokenizer.encode(first, add_special_tokens=False)
            alone = self._tokenizer.encode_batch_fast(seconds, add_special_tokens=False)
            self._truncate(most)
            pairs = [self._tokenizer.post_process(query, text) for text in alone]
        return Tokens([self._row(pair) for pair in pairs], list(map(len, pairs)), list(map(len, alone)))

    def count(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, of which nothing is truncated."""
        with self.lock:
            self._truncate(None)
            return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(texts)]

    def padded(
        self, rows: Sequence[Row], width: int | None = None, height: int | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """The model's inputs: a row a text, as long as the longest or `width`; the last one again up to `height`."""
        rows = [*rows, *[rows[-1]] * ((height or len(rows)) - len(rows))]
        lengths = np.array([len(ids) for ids, _ in rows])
        places, width = np.arange(width or lengths.max()), int(width or lengths.max())
        there = places >= width - lengths[:, None] if self._padding.side == "left" else places < lengths[:, None]
        inputs: dict[str, NDArray[np.int64]] = {}
        for name in self._inputs:
            if name == "attention_mask":
                inputs[name] = there.astype(np.int64)
                continue
            filled, column = (self._padding.token, 0) if name == "input_ids" else (self._padding.type, 1)
            inputs[name] = np.full(there.shape, filled, np.int64)
            inputs[name][there] = np.concatenate([row[column] for row in rows])
        return inputs

    def _truncate(self, max_length: int | None) -> None:
        self._tokenizer.no_padding()
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length, direction=self._truncation_side)

    def _row(self, encoding: Encoding) -> Row:
        types = np.array(encoding.type_ids, np.int64) if "token_type_ids" in self._inputs else None
        return np.array(encoding.ids, np.int64), types
