"""Which vectors can be kept and compared: finite, longer than zero, and of numbers that the column's type can hold.

pgvector computes a cosine from sums of squares in float32, which are zero for a vector shorter than 1e-19 and infinite
for one longer than 1.8e19: its score would be NaN. A float16 holds 65,504 at most, and few digits below 6e-5.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 1e-15, 1e18  # lengths of float32 vectors whose cosine is a number
MOST_LOST = 2.0**-10  # of a vector's length, by float16; half of it is usual
LARGEST, TINIEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_subnormal)

NOT_A_VECTOR = "the model gave a vector that is not finite, or zero"


def usable(vectors: NDArray) -> NDArray[np.bool_]:
    """Which rows of `vectors` (n, d) are finite and longer than zero."""
    return _sound(_lengths(vectors))


def why_not(vectors: NDArray, storage: Literal["halfvec", "vector"]) -> dict[int, str]:
    """Row → why it cannot be kept, for the rows of `vectors` (n, d) that cannot."""
    lengths = _lengths(vectors)
    sound = _sound(lengths)
    reasons = {int(row): NOT_A_VECTOR for row in np.flatnonzero(~sound)}
    doubtful = _outside(vectors, lengths, storage) & sound
    return reasons | {int(row): _reason(vectors[row], float(lengths[row]), storage) for row in np.flatnonzero(doubtful)}


def out_of_range(vectors: NDArray, storage: Literal["halfvec", "vector"]) -> NDArray[np.bool_]:
    """Which rows of `vectors` (n, d) are finite and longer than zero, and yet not what the column's type can hold."""
    lengths = _lengths(vectors)
    return _outside(vectors, lengths, storage) & _sound(lengths)


def _sound(lengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    sound: NDArray[np.bool_] = np.isfinite(lengths) & (lengths > 0)
    return sound


def _outside(vectors: NDArray, lengths: NDArray[np.float64], storage: str) -> NDArray[np.bool_]:
    outside: NDArray[np.bool_]
    with np.errstate(all="ignore"):
        if storage == "vector":
            outside = (lengths < SHORTEST) | (lengths > LONGEST)
        elif vectors.dtype == np.float16:
            outside = np.zeros(len(vectors), bool)
        else:
            # A float16 loses half of MOST_LOST of a number, and half of TINIEST of one below 6e-5: of most vectors
            # their length says enough.
            surely_kept = vectors.shape[1] ** 0.5 * TINIEST / MOST_LOST
            outside = ~((lengths >= surely_kept) & (lengths <= LARGEST))
            some = vectors[outside]
            lost = _lengths(some.astype(np.float16).astype(np.float32) - some)
            outside[outside] = ~(lost <= MOST_LOST * lengths[outside])
    return outside


def _reason(vector: NDArray, length: float, storage: str) -> str:
    if storage == "vector":
        return f"its vector has the length {length:.3g}, which no search can compare: `normalize: true` in the profile"
    largest = float(np.abs(vector).max())
    what = "large" if largest > LARGEST else "small"
    return (
        f"its vector's numbers, {largest:.3g} at most, are too {what} for float16: `storage: vector`, or "
        "`normalize: true` in the profile"
    )


def _lengths(vectors: NDArray) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        lengths: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return lengths
