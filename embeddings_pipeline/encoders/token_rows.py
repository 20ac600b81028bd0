"""Texts as the rows of token numbers that a local model reads: one tokenizer, its truncation, its padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from embeddings_pipeline.forks import ProcessLock

FEW = 40
"""Tokens of a text that a tokenizer is asked about once."""
Row = tuple[NDArray[np.int64], NDArray[np.int64] | None]
"""Of a text: numbers of its tokens, and their types for a model that reads them."""


class Tokens(NamedTuple):
    """Texts as the model reads them, truncated."""

    tokens: list[Any]  # of each text, in the form that the encoder's `_start` takes
    lengths: list[int]
    counts: list[int] | None  # of each text's tokens before truncation; None: this encoder does not say


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
        self.inputs, self.padding = tuple(inputs), padding
        self._tokenizer = tokenizer
        self._max_length, self._truncation_side = max_length, truncation_side
        self._own = tokenizer.num_special_tokens_to_add(False)  # in a row, and in each piece of the rest
        self._type = self._ask_type()
        self._tells_rest = self._ask_rest()

    def read(self, texts: list[str]) -> Tokens:
        """Each text's row, truncated, and how many tokens it has in all."""
        with self.lock:
            self._truncate(self._max_length)
            encodings = self._tokenizer.encode_batch_fast(texts)
        counts = [self._with_rest(encoding) for encoding in encodings] if self._tells_rest else self.count(texts)
        return Tokens(self._rows_of(encodings, alone=True), list(map(len, encodings)), counts)

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
        return Tokens(self._rows_of(pairs, alone=False), list(map(len, pairs)), list(map(len, alone)))

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
        there = places >= width - lengths[:, None] if self.padding.side == "left" else places < lengths[:, None]
        inputs: dict[str, NDArray[np.int64]] = {}
        for name in self.inputs:
            if name == "attention_mask":
                inputs[name] = there.astype(np.int64)
                continue
            filled, column = (self.padding.token, 0) if name == "input_ids" else (self.padding.type, 1)
            inputs[name] = np.full(there.shape, filled, np.int64)
            inputs[name][there] = np.concatenate([row[column] for row in rows])
        return inputs

    def _ask_type(self) -> int | None:
        """The type of every token of a text alone; None: they differ, or the model reads none."""
        self._truncate(None)
        types = set(self._tokenizer.encode("a a a").type_ids) if "token_type_ids" in self.inputs else set()
        return types.pop() if len(types) == 1 else None

    def _ask_rest(self) -> bool:
        """Whether the pieces of a truncated text are all of it: in tokenizers 0.23.1 and 0.23.2 they are not."""
        text = "a " * FEW
        self._truncate(None)
        whole = len(self._tokenizer.encode(text))
        self._truncate(self._own + FEW // 4)
        return self._with_rest(self._tokenizer.encode_batch_fast([text])[0]) == whole

    def _with_rest(self, encoding: Encoding) -> int:
        """How many tokens the text has of which this is the beginning."""
        return len(encoding) + sum(len(piece) - self._own for piece in encoding.overflowing)

    def _truncate(self, max_length: int | None) -> None:
        self._tokenizer.no_padding()
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length, direction=self._truncation_side)

    def _rows_of(self, encodings: list[Encoding], *, alone: bool) -> list[Row]:
        """A row of each, all views of one array: Python turns each text's numbers into a list, and does no more."""
        lengths = list(map(len, encodings))
        ends = np.cumsum(lengths).tolist()
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64, sum(lengths))
        if "token_type_ids" not in self.inputs:
            return [(ids[part], None) for part in parts]
        if alone and self._type is not None:
            types = np.full(max(lengths, default=0), self._type)
            return [(ids[part], types[:length]) for part, length in zip(parts, lengths, strict=True)]
        types = np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.int64, len(ids))
        return [(ids[part], types[part]) for part in parts]
