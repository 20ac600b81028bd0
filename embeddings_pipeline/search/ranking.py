"""How what comes into question is put in order: likeness, what else counts, and diversity."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

DISLIKED = 0.5  # how much being near to what was disliked counts, against being near to what was liked


def mean_direction(
    liked: NDArray[np.float32],
    weights: NDArray[np.float32],
    disliked: NDArray[np.float32],
    against: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Where the liked ones lie, away from the disliked ones: Rocchio's query [1]. (n, d), (n,), (m, d), (m,) → (d,),
    of length 1, or 0 if they cancel out.

    [1] Rocchio, "Relevance feedback in information retrieval", The SMART Retrieval System, 1971.
    """
    mean = weights @ liked / weights.sum()
    if len(disliked):
        mean = mean - DISLIKED * (against @ disliked / against.sum())
    length = np.linalg.norm(mean)
    direction: NDArray[np.float32] = (mean / length if length > 1e-6 else np.zeros_like(mean)).astype(np.float32)
    return direction


def best_match(
    candidates: NDArray[np.float32],
    liked: NDArray[np.float32],
    weights: NDArray[np.float32],
    disliked: NDArray[np.float32],
) -> NDArray[np.float32]:
    """How near each candidate is to the nearest liked one, less by how near to a disliked one. (c, d) → (c,)."""
    nearest = (candidates @ liked.T * (weights / weights.max())).max(axis=1)
    if len(disliked):
        nearest = nearest - DISLIKED * np.maximum(0, (candidates @ disliked.T).max(axis=1))
    result: NDArray[np.float32] = nearest
    return result


def blended(
    likeness: NDArray[np.float64], values: Mapping[str, NDArray[np.float64]], shares: Mapping[str, float]
) -> NDArray[np.float64]:
    """The scores, from 0 to 1: each column's share of its place among these, and the rest of the likeness. NaN in
    values: none.
    """
    scores = (1 - sum(shares.values())) * np.clip(likeness, 0, 1)
    for column, share in shares.items():
        scores = scores + share * places(values[column])
    return scores


def places(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each value stands among all: 1 the highest, 0 the lowest and none; equal ones share their places."""
    known = np.sort(values[~np.isnan(values)])
    if len(known) < 2:
        return np.where(np.isnan(values), 0.0, 1.0)
    below, upto = np.searchsorted(known, values, "left"), np.searchsorted(known, values, "right")
    return np.where(np.isnan(values), 0.0, (below + upto - 1) / 2 / (len(known) - 1))


def diverse(scores: NDArray[np.float64], vectors: NDArray[np.float32], k: int, diversity: float) -> list[int]:
    """Which `k` to take, in order, by maximal marginal relevance [1]: each time the one whose score is highest, less
    its likeness to the nearest of those that were taken. vectors: (c, d) of length 1, or 0 for what has none.

    [1] Carbonell and Goldstein, "The use of MMR, diversity-based reranking", SIGIR 1998.
    """
    left, taken = np.ones(len(scores), bool), list[int]()
    nearest = np.zeros(len(scores))
    while len(taken) < min(k, len(scores)):
        value = np.where(left, (1 - diversity) * scores - diversity * nearest, -np.inf)
        chosen = int(value.argmax())
        taken.append(chosen)
        left[chosen] = False
        if diversity:
            nearest = np.maximum(nearest, vectors @ vectors[chosen])
    return taken


def matrix(rows: Sequence[NDArray[np.float32] | None], dimension: int) -> NDArray[np.float32]:
    """(n, dimension); zeros for what has no vector."""
    result = np.zeros((len(rows), dimension), np.float32)
    for number, row in enumerate(rows):
        if row is not None:
            result[number] = row
    return result
