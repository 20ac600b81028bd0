"""Which vectors a column can hold, and what is said of the others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_pipeline.store.vector_range import MOST_LOST, NOT_A_VECTOR, out_of_range, why_not


def vectors(*values: float) -> np.ndarray:
    """Vectors of four equal numbers."""
    return np.array([[value] * 4 for value in values], np.float32)


@pytest.mark.parametrize("storage", ["halfvec", "vector"])
def test_what_is_no_vector_is_refused_everywhere(storage) -> None:
    assert why_not(vectors(np.nan, np.inf, 0.0, 1.0), storage) == dict.fromkeys(range(3), NOT_A_VECTOR)


def test_a_float16_holds_neither_large_nor_tiny_numbers() -> None:
    said = why_not(vectors(65_000, 65_600, 1e6, 1e-3, 1e-5, 1e-9, 1e-20), "halfvec")
    assert sorted(said) == [1, 2, 4, 5, 6]
    assert "6.56e+04 at most, are too large for float16: `storage: vector`, or `normalize: true`" in said[1]
    assert "1e-05 at most, are too small" in said[4]


def test_a_vector_of_length_one_may_have_tiny_numbers() -> None:
    long = np.full((1, 1000), 1e-7, np.float32)
    long[0, 0] = 1.0
    assert why_not(long, "halfvec") == {}


def test_a_float32_whose_square_is_not_a_number_cannot_be_compared() -> None:
    said = why_not(vectors(1e-25, 1e-10, 1e10, 1e25), "vector")
    assert sorted(said) == [0, 3] and "2e-25, which no search can compare: `normalize: true`" in said[0]


def test_float16_as_it_was_stored_is_in_range() -> None:
    assert not out_of_range(vectors(1.0, 6e-8).astype(np.float16), "halfvec").any()


@given(st.integers(1, 40), st.floats(-30, 20), st.floats(0, 30), st.integers(0, 2**32))
def test_what_a_float16_loses_of_any_vector(dimension: int, exponent: float, spread: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    exponents = exponent - spread * random.random((20, dimension))
    some = (random.choice([-1, 1], (20, dimension)) * 2.0**exponents).astype(np.float32)
    with np.errstate(over="ignore"):
        lost = np.linalg.norm(some.astype(np.float16).astype(np.float64) - some, axis=1)
    too_much = ~(lost <= MOST_LOST * np.linalg.norm(some.astype(np.float64), axis=1))
    assert (out_of_range(some, "halfvec") == too_much).all()
