"""A table of films with the time of their update."""

from collections.abc import Iterator
from typing import Any

import pytest

from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import execute


@pytest.fixture
def films_of(database: Database) -> Iterator[Any]:
    """Makes the table `films` with `updated_at` of a type, and a number of films."""

    def make(number: int, kind: str = "timestamptz", value: str = "now()") -> None:
        execute(
            database,
            f"""CREATE TABLE films (id bigint PRIMARY KEY, title text, overview text, revenue bigint,
                    is_removed boolean NOT NULL DEFAULT false, updated_at {kind})""",
        )
        execute(
            database,
            f"INSERT INTO films SELECT n, 'Film ' || n, 'story ' || n, n, false, {value} "
            f"FROM generate_series(1, {number}) n",
        )

    yield make
