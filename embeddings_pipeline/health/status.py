"""What `status` shows of a collection."""

from dataclasses import asdict
from typing import Any

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.index.faiss_read import is_current, read_manifest
from embeddings_pipeline.index.pgvector import describe_indexes
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import collection_state


def collection_status(definition: CollectionDefinition, database: Database, settings: Settings) -> dict[str, Any]:
    """Counts from the data itself, the current model and the indexes. Nothing is written, no model loaded."""
    ledger = Ledger(definition, database)
    model = ledger.current()
    empty: dict[str, Any] = {"generation": None, "vectors": 0, "current": False}
    if model is None:
        return {
            "collection": definition.name,
            "profile": None,
            "fingerprint": None,
            "items": 0,
            "vectors": 0,
            "coverage": 0.0,
            "missing": 0,
            "stale": 0,
            "orphans": 0,
            "quarantined": 0,
            "dirty_batches": 0,
            "pgvector_index": [],
            "faiss": empty,
            "last_scan": None,
            "definition": None,
        }
    covered = coverage(database, model)
    with database.connect(autocommit=True) as connection:
        state = collection_state(connection, definition.name)
        indexes = describe_indexes(connection, model.destination)
    assert state is not None
    try:
        manifest = read_manifest(settings.state_dir / "faiss", definition.name)
    except VectorIndexError:  # damaged: the next sync builds it again
        manifest = None
    faiss = empty
    if manifest is not None:
        current = is_current(manifest, model.destination.fingerprint, state.epoch, state.version)
        faiss = {"generation": manifest.generation, "vectors": manifest.count, "current": current}
    return {
        "collection": definition.name,
        "profile": model.profile.name,
        "fingerprint": model.destination.fingerprint,
        "items": covered.items,
        "vectors": covered.vectors,
        "coverage": round(covered.share, 6),
        "missing": covered.missing,
        "stale": covered.stale,
        "orphans": covered.orphans,
        "quarantined": covered.quarantined,
        "dirty_batches": len(ledger.dirty_batches()),
        "pgvector_index": [asdict(index) for index in indexes],
        "faiss": faiss,
        "last_scan": state.full_scan_at,
        "definition": ledger.definition_notice(),
    }
