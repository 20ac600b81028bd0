"""A table with vectors, and the folder of its FAISS generations."""

import pytest

from embeddings_pipeline_tests.support.model_tables import (
    add_vectors,
    make_collection,
    unit_vectors,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "faiss"


@pytest.fixture
def table(database):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(500))
    return table
