"""Two dimensions of many: where the items of a map lie.

What is held in memory is two numbers an item, with UMAP fifty, and blocks of vectors, however many there are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.maps import MapMethod
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.forks import compute
from embeddings_pipeline.index.exact import unit

MEASURED = 200_000  # vectors that the axes are measured on, spread evenly over all
UMAP_DIMENSIONS = 50  # of the axes that UMAP is given
UMAP_FITTED = 50_000  # items that UMAP lays out; each other one is placed among those
UMAP_NEIGHBOURS = 15

# A pass over all vectors: places of items (b,) and vectors (b, d).
Vectors = Callable[[], Iterator[tuple[NDArray[np.int64], NDArray]]]


@dataclass(frozen=True)
class Points:
    """Where the items lie: (n, 2), NaN for one without a vector."""

    at: NDArray[np.float32]
    method: MapMethod
    variance: float  # what share of the vectors' differences the first two axes have


def place_items(method: MapMethod, items: int, count: int, vectors: Vectors) -> Points:
    """A point for each of so many items that has a vector. `count`: of vectors; an item of several is in their middle.

    VectorIndexError if UMAP is asked for and is not installed.
    """
    if not count:
        return Points(np.full((items, 2), np.nan, np.float32), "pca", 0.0)
    umap = _umap() if method == "umap" else None
    axes, middle, shares = _axes(count, vectors, UMAP_DIMENSIONS if umap else 2)
    sums = np.zeros((items, axes.shape[1]), np.float32)
    numbers = np.zeros(items, np.int32)
    for places, block in vectors():
        np.add.at(sums, places, (unit(block).astype(np.float32) - middle) @ axes)
        np.add.at(numbers, places, 1)
    has_vector = numbers > 0
    means = (sums[has_vector] / numbers[has_vector, None]).astype(np.float32)
    if umap is None or len(means) <= UMAP_NEIGHBOURS:
        laid_out, method = _two(means), "pca"
    else:
        laid_out = compute(_lay_out, umap, means)
    at = np.full((items, 2), np.nan, np.float32)
    at[has_vector] = laid_out
    return Points(at, method, round(float(shares[:2].sum()), 4))


def _axes(
    count: int, vectors: Vectors, wanted: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """The directions (d, wanted) in which unit vectors differ most, their middle (d,), and the shares (wanted,)."""
    step, skipped, number = max(1, count // MEASURED), 0, 0
    total: Any = 0.0
    products: Any = 0.0
    for _, block in vectors():
        chosen = unit(block[skipped % step :: step]).astype(np.float32)
        skipped = (skipped - len(block)) % step
        total = total + chosen.sum(axis=0, dtype=np.float64)
        products = products + (chosen.T @ chosen).astype(np.float64)
        number += len(chosen)
    middle = total / number
    values, directions = np.linalg.eigh(products / number - np.outer(middle, middle))
    values, directions = np.maximum(values[::-1], 0)[:wanted], directions[:, ::-1][:, :wanted]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None, :], axis=0)
    directions = directions * np.where(largest < 0, -1, 1)  # else either end may be the left one
    whole = np.trace(products) / number - middle @ middle
    return directions.astype(np.float32), middle.astype(np.float32), values / whole if whole > 0 else values * 0


def _two(means: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first two axes; one that is not there is 0."""
    return np.pad(means[:, :2], ((0, 0), (0, max(0, 2 - means.shape[1]))))


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise VectorIndexError(
            "`map: {method: umap}` needs umap-learn: pip install 'embeddings-pipeline[umap]', or say `method: pca`"
        ) from error
    return umap


def _lay_out(umap: Any, means: NDArray[np.float32]) -> NDArray[np.float32]:
    """By UMAP: the first items, which are a sample of all, and the others among them."""
    reducer = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, random_state=1, n_jobs=1)
    parts = [reducer.fit_transform(means[:UMAP_FITTED])]
    for start in range(UMAP_FITTED, len(means), UMAP_FITTED):
        parts.append(reducer.transform(means[start : start + UMAP_FITTED]))
    return np.concatenate(parts).astype(np.float32)
