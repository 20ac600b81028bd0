"""The measures are those of the field's papers, and a difference is told from chance."""

import math

import numpy as np
import pytest

from embeddings_pipeline.search.measures import HIT_RATE, MRR, NDCG, RECALL, difference, figure, measured


def test_measures_are_as_their_definitions_say() -> None:
    relevant = [{"a": 3, "b": 1, "c": 2}, {"x": 1}, {"y": 1}]
    deep = [f"n{n}" for n in range(10)]
    values = measured(relevant, [["b", "z", "a"], [*deep, "x"], []])
    gained = 1 / math.log2(2) + 3 / math.log2(4)
    best = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert values[NDCG].tolist() == pytest.approx([gained / best, 0, 0])
    assert values[RECALL].tolist() == pytest.approx([2 / 3, 1, 0])
    assert values[MRR].tolist() == pytest.approx([1, 1 / 11, 0])
    assert values[HIT_RATE].tolist() == [1, 0, 0]


def test_the_order_of_a_search_counts_whatever_the_keys_are() -> None:
    """trec_eval orders ties by key, backwards; what a search returned first stays first."""
    relevant = [{"é": 1}, {"é": 1}, {"é": 1}]
    assert measured(relevant, [["é", "a", "z"], ["a", "é", "z"], ["z", "a", "é"]])[MRR].tolist() == pytest.approx(
        [1, 1 / 2, 1 / 3]
    )


def test_recall_counts_a_hundred_items_and_no_more() -> None:
    ranking = [f"n{n}" for n in range(101)]
    values = measured([{"n99": 1, "n100": 1}], [ranking])
    assert values[RECALL].tolist() == [0.5]


def test_an_interval_holds_the_mean_and_narrows_with_more_queries() -> None:
    random = np.random.default_rng(1)
    widths = []
    for queries in (20, 2000):
        told = figure(random.random(queries))
        assert told.low is not None and told.high is not None and told.low < told.mean < told.high
        widths.append(told.high - told.low)
    assert widths[1] < widths[0] / 5
    assert widths[1] == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 2000), rel=0.1)


def test_the_paired_test_tells_a_steady_gain_from_noise() -> None:
    random = np.random.default_rng(1)
    before = random.random(100)
    steady, noise = difference(before + 0.02, before), difference(before + random.normal(0, 0.2, 100), before)
    assert steady.mean == pytest.approx(0.02) and steady.p is not None and steady.p < 0.001
    assert noise.p is not None and noise.p > 0.05 and noise.low is not None and noise.low < 0 < noise.high  # type: ignore[operator]
    assert difference(before, before).p == 1


def test_one_query_has_a_mean_and_no_more() -> None:
    one = np.array([0.5])
    assert (figure(one).mean, figure(one).low, difference(one, one).p) == (0.5, None, None)
