"""Texts on their way into a model: a thread tokenises windows of them ahead, and batches are taken of what is there."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

FIRST_TEXTS, MOST_TEXTS = 512, 4096
"""Texts of a window: bounds the memory of their tokens. The first window is a small one, and the next has twice as
many texts, so that the model has work soon.
"""
EVEN_TOKENS, EVEN_LENGTHS = 8_192, 0.75
"""A batch of more than so many tokens has no text that is shorter than this share of its longest: of the rest a large
batch would be padding.
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
    _rest: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        longest_first = np.argsort(-self.lengths, kind="stable")
        self._rest = deque(longest_first[: np.count_nonzero(self.lengths)].tolist())

    def __bool__(self) -> bool:
        """Whether there is more to give out. A text without tokens is not."""
        return bool(self._rest)

    def next_batch(self, most_texts: int | None) -> list[int]:
        """Rows of the longest texts that are left, no more than this and than the budget, of about one length."""
        longest = int(self.lengths[self._rest[0]])
        size = max(1, min(self.budget // longest, most_texts or len(self._rest), len(self._rest)))
        size -= size % self.step if size > self.step else 0
        few = max(1, EVEN_TOKENS // longest)
        for place, row in enumerate(islice(self._rest, few, size), few):
            if self.lengths[row] < EVEN_LENGTHS * longest:
                size = place
                break
        return [self._rest.popleft() for _ in range(size)]

    def halve(self, batch: list[int]) -> None:
        """Take a batch back, and give out half of it at most from now on."""
        self.budget = int(self.lengths[batch[0]]) * len(batch) // 2
        self._rest = deque(sorted([*batch, *self._rest], key=lambda row: -self.lengths[row]))


def windows_of(texts: int) -> list[slice]:
    """The windows of so many texts."""
    slices, start, size = [], 0, FIRST_TEXTS
    while start < texts:
        slices.append(slice(start, min(start + size, texts)))
        start, size = start + size, min(2 * size, MOST_TEXTS)
    return slices


def one_ahead(function: Callable[[T], U], arguments: Sequence[T]) -> Generator[U, None, None]:
    """What `function` gives for each, in order; a thread makes the next one while the one before is used.

    Closed, it waits for what the thread makes.
    """
    if len(arguments) < 2:
        yield from map(function, arguments)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokens") as thread:
        coming = thread.submit(function, arguments[0])
        for following in arguments[1:]:
            made, coming = coming.result(), thread.submit(function, following)
            yield made
        yield coming.result()
