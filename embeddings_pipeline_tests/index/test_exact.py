"""Exact search, a block at a time, against the cosines of all vectors at once."""

import numpy as np
import pytest

from embeddings_pipeline.index.exact import nearest, unit
from embeddings_pipeline_tests.support.model_tables import unit_vectors


def blocks(ids, vectors, rows):
    for start in range(0, len(ids), rows):
        yield ids[start : start + rows], vectors[start : start + rows]


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_it_is_what_a_search_of_all_at_once_finds(rows, kind):
    vectors, queries = unit_vectors(100).astype(kind), unit_vectors(5, seed=1)
    ids = np.random.default_rng(0).permutation(1000)[:100]
    scores, found = nearest(queries, blocks(ids, vectors, rows), 10)

    cosines = queries @ vectors.astype(np.float32).T
    order = np.argsort(-cosines, axis=1)[:, :10]
    np.testing.assert_array_equal(found, ids[order])
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, order, 1), atol=1e-6)


def test_a_querys_own_vector_is_left_out():
    vectors = unit_vectors(20)
    ids = np.arange(100, 120)
    _, found = nearest(vectors, blocks(ids, vectors, 6), 3, own=ids)
    assert not (found == ids[:, None]).any() and (found >= 100).all()


def test_fewer_vectors_than_asked_for_are_padded():
    vectors = unit_vectors(3)
    scores, found = nearest(vectors, blocks(np.arange(3), vectors, 2), 5, own=np.arange(3))
    assert (found[:, :2] >= 0).all() and (found[:, 2:] == -1).all() and np.isneginf(scores[:, 2:]).all()


def test_vectors_of_any_length_are_compared_by_cosine():
    vectors = unit_vectors(50)
    stretched = vectors * np.linspace(0.1, 9, 50, dtype=np.float32)[:, None]
    scores, found = nearest(vectors, [(np.arange(50), stretched)], 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(50))
    np.testing.assert_allclose(scores, 1, atol=1e-5)


def test_equal_scores_come_in_the_order_of_their_ids():
    vectors = np.repeat(np.eye(1, 4, dtype=np.float32), 8, axis=0)
    _, found = nearest(vectors[:1], blocks(np.arange(8)[::-1], vectors, 3), 8)
    assert found.tolist() == [list(range(8))]


def test_no_vectors_and_no_queries():
    assert nearest(unit_vectors(2), [], 3)[1].tolist() == [[-1] * 3] * 2
    assert nearest(unit_vectors(2)[:0], [(np.arange(2), unit_vectors(2))], 3)[1].shape == (0, 3)
    assert unit(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert not unit(np.zeros((1, 4), np.float32)).any()
