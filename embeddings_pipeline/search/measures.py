"""How good rankings are, how sure that is, and whether one is better than another.

nDCG@10 divides an item's grade by the logarithm of its rank, as trec_eval does (linear gain) [1]; recall@100 is the
share of the relevant items that are among the first hundred; MRR the mean of 1 / rank of the first relevant one; the
hit rate the share of queries with a relevant one among the first ten. They are trec_eval's own, by ir-measures.

Intervals are percentiles of means over queries drawn again (bootstrap); whether two ways differ is tested by exchanging
their values of a query at random, the same queries for both (a paired randomisation test, two-sided) [2].

[1] Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 20(4), 2002.
[2] Smucker, Allan and Carterette, "A comparison of statistical significance tests for information retrieval
evaluation", CIKM 2007.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NDCG, RECALL, MRR, HIT_RATE = "ndcg_at_10", "recall_at_100", "mrr", "hit_rate_at_10"
WORDS = {NDCG: "nDCG@10", RECALL: "recall@100", MRR: "MRR", HIT_RATE: "hit rate@10"}
DEPTH = 100  # items of a ranking that count
CONFIDENCE = 0.95
RESAMPLES = 9999
MOST_VALUES = 5_000_000  # drawn at a time, which bounds the memory
SEED = 0  # the same values give the same interval

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A mean over queries, and its interval of 95 %, which a single query does not have."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Figure):
    """A mean difference over the same queries; `p`: how often chance alone gives one as large."""

    p: float | None


def measured(relevant: Sequence[Mapping[str, int]], rankings: Sequence[Sequence[str]]) -> dict[str, Values]:
    """The value of each measure for each query. `relevant`: item keys with grades of 1 or more; `rankings`: item keys,
    best first, whose order counts and nothing else.
    """
    import ir_measures
    from ir_measures import RR, R, Success, nDCG

    names = {nDCG @ 10: NDCG, R @ DEPTH: RECALL, RR: MRR, Success @ 10: HIT_RATE}
    judged = {str(n): dict(grades) for n, grades in enumerate(relevant)}
    # trec_eval orders by score, and equal ones by key: the rank as score leaves the order as it is.
    run = {str(n): {key: -float(rank) for rank, key in enumerate(ranking)} for n, ranking in enumerate(rankings)}
    values = {name: np.zeros(len(relevant)) for name in names.values()}
    for metric in ir_measures.iter_calc(list(names), judged, run):
        values[names[metric.measure]][int(metric.query_id)] = metric.value
    return values


def figure(values: Values) -> Figure:
    """The mean, with its interval."""
    return Figure(float(np.mean(values)), *_interval(values))


def difference(values: Values, others: Values) -> Difference:
    """How much higher the first are than the others, query by query."""
    low, high = _interval(values - others)
    return Difference(float(np.mean(values - others)), low, high, _chance(values, others))


def _interval(values: Values) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_batch(values),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _chance(values: Values, others: Values) -> float | None:
    if len(values) < 2:
        return None
    from scipy.stats import permutation_test

    def mean_difference(a: Values, b: Values, axis: int) -> Values:
        return np.asarray(np.mean(a - b, axis=axis))

    tested = permutation_test(
        (values, others),
        mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(values),
        rng=np.random.default_rng(SEED),
    )
    return float(tested.pvalue)


def _batch(values: Values) -> int:
    return max(1, MOST_VALUES // len(values))
