"""Texts on their way into a model: threads tokenise windows of them ahead, and batches are taken of what is there."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

EVEN_TOKENS, EVEN_LENGTHS = 8_192, 0.75
"""A batch of more than so many tokens, and than a quarter of its budget, has no text that is shorter than this share of
its longest: of the rest a large batch would be padding.
"""
T = TypeVar("T")
U = TypeVar("U")


@dataclass(eq=False)
class Window:
    """Texts that are tokenised together, and given out in batches, longest first."""

    texts: list[str]  # without what is surely never read
    tokens: list[Any]  # of each text
    lengths: NDArray[np.int64]  # in tokens, truncated
    counts: list[int] | None  # before truncation, where that is known
    start: int = 0  # the place of its first text
    budget: int = 0  # tokens of one batch, padding included
    step: int = 1  # a batch of more texts has a multiple of so many
    _rest: NDArray[np.int64] = field(init=False)  # rows that are left, longest first

    def __post_init__(self) -> None:
        longest_first = np.argsort(-self.lengths, kind="stable")
        self._rest = longest_first[: np.count_nonzero(self.lengths)]

    def __bool__(self) -> bool:
        """Whether there is more to give out. A text without tokens is not."""
        return len(self._rest) > 0

    def next_batch(self, most_texts: int | None) -> list[int]:
        """Rows of the longest texts that are left, no more than this and than the budget, of about one length."""
        longest = int(self.lengths[self._rest[0]])
        size = max(1, min(self.budget // longest, most_texts or len(self._rest), len(self._rest)))
        size -= size % self.step if size > self.step else 0
        few = max(EVEN_TOKENS, self.budget // 4) // longest
        even = np.count_nonzero(self.lengths[self._rest[:size]] >= EVEN_LENGTHS * longest)
        size = max(1, min(size, max(few, int(even))))
        batch, self._rest = self._rest[:size].tolist(), self._rest[size:]
        return batch

    def halve(self, batch: list[int]) -> None:
        """Take a batch back, and give out half of it at most from now on."""
        self.budget = int(self.lengths[batch[0]]) * len(batch) // 2
        rows = np.concatenate([batch, self._rest])
        self._rest = rows[np.argsort(-self.lengths[rows], kind="stable")]


def windows_of(texts: int, first: int, most: int) -> list[slice]:
    """The windows of so many texts. The first one is small, so that the model has work soon, and the next has twice as
    many texts, up to `most`: that bounds the memory of their tokens.
    """
    slices, start, size = [], 0, first
    while start < texts:
        slices.append(slice(start, min(start + size, texts)))
        start, size = start + size, min(2 * size, most)
    return slices


def made_ahead(function: Callable[[T], U], arguments: Sequence[T], at_once: int) -> Generator[U, None, None]:
    """What `function` gives for each, in order; so many threads make the next ones while the one before is used.

    Closed, it waits for what the threads make.
    """
    if len(arguments) < 2:
        yield from map(function, arguments)
        return
    waiting = iter(arguments)
    with ThreadPoolExecutor(at_once, thread_name_prefix="tokens") as threads:
        coming = deque(threads.submit(function, argument) for argument in islice(waiting, at_once))
        while coming:
            made = coming.popleft().result()
            coming.extend(threads.submit(function, argument) for argument in islice(waiting, 1))
            yield made
