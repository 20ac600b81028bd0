"""Exact search: the cosines of queries with every vector there is, a block at a time.

What an approximate index finds is measured against it, and small collections are served by it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

TIE = 2.0**-10  # scores that differ by less may stand in either order: float16 has 11 significant bits
SAME = 1e-5  # what sums of float32 differ by when they are added in another order


def nearest(
    queries: NDArray, blocks: Iterable[tuple[NDArray, NDArray]], k: int, *, own: NDArray | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` vectors nearest to each query (q, d) of length 1, in constant memory whatever the number of blocks.

    blocks: ids (b,) and vectors (b, d) of any length, float16 or float32. `own`: an id (q,) for each query, which is
    left out. Returns cosines (q, k), best first, and ids (q, k); if there are fewer than `k`, the rest is -inf and -1.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for block_ids, block in blocks:
        here = queries @ unit(block.astype(np.float32, copy=False)).T
        if own is not None:
            here[block_ids[None, :] == own[:, None]] = -np.inf
        all_scores = np.concatenate([scores, here], axis=1)
        all_ids = np.concatenate([ids, np.where(np.isneginf(here), -1, block_ids)], axis=1)
        best = np.argpartition(all_scores, -k, axis=1)[:, -k:]
        scores, ids = np.take_along_axis(all_scores, best, 1), np.take_along_axis(all_ids, best, 1)
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def unit(vectors: NDArray) -> NDArray:
    """The vectors (n, d) at length 1; those that are, but for their float16 rounding, bit for bit as they came."""
    wide = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    if not len(lengths) or np.abs(lengths - 1).max() <= TIE:
        return vectors
    return (wide / np.where(lengths > 0, lengths, 1)[:, None]).astype(vectors.dtype)
