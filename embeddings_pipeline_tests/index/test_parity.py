"""The FAISS index compared with the model table: ids, scores and what searches find."""

import numpy as np

from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline_tests.support.model_tables import add_vectors, make_collection, remove_vectors, unit_vectors


def test_parity_counts_both_directions(database, folder, table):
    build(database, table, folder)
    opened = open_index(folder, "things")
    parity = check_parity(database, table, opened)
    assert parity.ok and (parity.in_index, parity.in_table, parity.sampled, parity.recall_at_10) == (500, 500, 50, 1)

    add_vectors(database, table, unit_vectors(3, seed=9), first_id=600)
    remove_vectors(database, table, [1, 2])
    assert not check_parity(database, table, opened).comparable  # of another version
    with database.connect() as connection:  # as if a vector had been changed behind the version's back
        connection.execute("UPDATE embeddings.collection SET stamp = %s", [opened.manifest.stamp])
    parity = check_parity(database, table, opened)
    assert not parity.ok and (parity.missing_in_index, parity.not_in_table) == (3, 2)


def test_parity_sees_vectors_that_differ(database, folder, table):
    build(database, table, folder)
    with database.connect() as connection:
        connection.execute(
            f"UPDATE embeddings.{table.name} a SET embedding = b.embedding FROM embeddings.{table.name} b "
            "WHERE b.text_id = 501 - a.text_id"
        )
    parity = check_parity(database, table, open_index(folder, "things"))
    assert not parity.ok and parity.missing_in_index == parity.not_in_table == 0
    assert parity.differing and parity.score_error > 0.01


def test_parity_accepts_ties(database, folder):
    table = make_collection(database)
    add_vectors(database, table, np.repeat(unit_vectors(3), 40, axis=0))
    build(database, table, folder)
    assert check_parity(database, table, open_index(folder, "things")).ok
