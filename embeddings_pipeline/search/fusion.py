"""Two rankings made one: reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from collections.abc import Sequence

from embeddings_pipeline.config.words import FusionDefinition
from embeddings_pipeline.search.hits import Hit

LEAST_CANDIDATES, MOST_CANDIDATES = 50, 100  # of each leg, unless more are asked for


def candidates(k: int) -> int:
    """How many items each leg is asked for, so that the best `k` of both together are among them."""
    return max(k, min(max(LEAST_CANDIDATES, 5 * k), MOST_CANDIDATES))


def fused(dense: Sequence[Hit], text: Sequence[Hit], fusion: FusionDefinition) -> list[Hit]:
    """The items of both, best first, each with its fused score, and the text of the leg that it stands higher in.

    Equal scores: the higher rank by vectors first, then the key.
    """
    scores: dict[str, float] = {}
    ranks: dict[str, tuple[int, Hit]] = {}  # of the leg that an item stands higher in
    by_vectors = {hit.item_key: rank for rank, hit in enumerate(dense, 1)}
    for leg, weight in ((dense, fusion.weights.dense), (text, fusion.weights.text)):
        for rank, hit in enumerate(leg, 1):
            scores[hit.item_key] = scores.get(hit.item_key, 0.0) + weight / (fusion.k + rank)
            if hit.item_key not in ranks or rank < ranks[hit.item_key][0]:
                ranks[hit.item_key] = (rank, hit)
    last = len(dense) + 1
    order = sorted(scores, key=lambda key: (-scores[key], by_vectors.get(key, last), key))
    return [_with_score(ranks[key][1], scores[key]) for key in order]


def _with_score(hit: Hit, score: float) -> Hit:
    return Hit(hit.item_key, score, hit.item, hit.text, hit.vector_name, hit.chunk)
