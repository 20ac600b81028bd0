"""What incremental scans are tested with: a collection with `updated_at`, a tick, and what was seen."""

from typing import Any

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.ledger.incremental_scan import IncrementalScan
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline_tests.support.workbench import definition, run_batch

SOURCE = {"table": "films", "key": ["id"], "updated_at": "updated_at"}


def timed(**source: Any) -> CollectionDefinition:
    return definition(source={**SOURCE, **source})


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
