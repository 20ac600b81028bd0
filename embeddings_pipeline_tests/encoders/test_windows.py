"""Texts on their way into a model: what a thread makes ahead, and batches."""

import numpy as np
import pytest

from embeddings_pipeline.encoders.windows import Window, made_ahead, windows_of


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_is_made_ahead_is_in_order_and_ends_when_it_is_closed(at_once: int) -> None:
    begun: list[int] = []

    def square(number: int) -> int:
        begun.append(number)
        return number * number

    assert list(made_ahead(square, range(5), at_once)) == [0, 1, 4, 9, 16]
    assert list(made_ahead(square, [], at_once)) == [] and list(made_ahead(square, [7], at_once)) == [49]
    del begun[:]
    squares = made_ahead(square, range(100), at_once)
    assert [next(squares), next(squares)] == [0, 1]
    squares.close()
    assert begun[-1] <= 2 + at_once


def test_large_batches_have_texts_of_about_one_length_and_small_ones_any() -> None:
    lengths = np.repeat([200, 170, 140, 60, 10], 100)
    small = [(166, 60, 10), (34, 10, 10)]  # a quarter of the budget, and the rest
    window = Window([""] * 500, [None] * 500, lengths, None, budget=40_000)
    batches = []
    while window:
        batches.append([int(lengths[row]) for row in window.next_batch(None)])
    assert [(len(batch), batch[0], batch[-1]) for batch in batches] == [(200, 200, 170), (100, 140, 140), *small]


def test_batches_have_a_multiple_of_texts_while_there_are_as_many() -> None:
    lengths = np.array([100] * 11 + [9] * 30)
    window = Window([""] * 41, [None] * 41, lengths, None, budget=700, step=4)
    batches = []
    while window:
        batches.append(window.next_batch(None))
    assert [len(batch) for batch in batches] == [4, 4, 4, 28, 1]
    assert sorted(row for batch in batches for row in batch) == list(range(41))
    few = Window([""] * 4, [None] * 4, np.array([300] * 4), None, budget=700, step=4)
    assert [len(few.next_batch(None)), len(few.next_batch(None)), bool(few)] == [2, 2, False]


@pytest.mark.parametrize("texts", [0, 1, 512, 513, 40_000])
def test_windows_have_every_text_once(texts: int) -> None:
    places = [place for part in windows_of(texts, 512, 4096) for place in range(texts)[part]]
    assert places == list(range(texts))
    assert all(part.stop - part.start <= 4096 for part in windows_of(texts, 512, 4096))
