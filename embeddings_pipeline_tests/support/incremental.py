"""A table of films with the time of their update, and ticks that read it."""

from collections.abc import Iterator
from typing import Any

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.ledger.incremental_scan import IncrementalScan
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition, execute, run_batch

SOURCE = {"table": "films", "key": ["id"], "updated_at": "updated_at"}


def timed(**source: Any) -> CollectionDefinition:
    return definition(source={**SOURCE, **source})


@pytest.fixture
def films_of(database: Database) -> Iterator[Any]:
    """Makes the table `films` with `updated_at` of a type, and a number of films."""
    DeterministicEncoder.reset()

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


def settle(collection: Collection) -> None:
    """Scan and commit everything."""
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, batch, f"run{batch}")
    assert collection.ledger.dirty_batches() == []


def tick(collection: Collection, rows: int = 20_000) -> IncrementalScan:
    return collection.ledger.incremental_scan(collection.source, rows_at_once=rows)


def seen(found: IncrementalScan) -> tuple[int, int, int]:
    return found.new, found.changed, found.gone
