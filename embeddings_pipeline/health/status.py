"""What `status` shows of a collection."""

from dataclasses import asdict
from typing import Any

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.index.faiss_read import read_manifest
from embeddings_pipeline.index.pgvector import describe_indexes
from embeddings_pipeline.index.standing import Standing, standing, why_foreign
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import collection_identity, collection_state

NO_FAISS: dict[str, Any] = {"generation": None, "vectors": 0, "current": False, "standing": Standing.MISSING.value}


def empty_status(definition: CollectionDefinition) -> dict[str, Any]:
    """What `collection_status` says of a collection of which nothing is there."""
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
        "quarantined_items": 0,
        "dirty_batches": 0,
        "pgvector_index": [],
        "faiss": dict(NO_FAISS),
        "last_scan": None,
        "definition": None,
        "database": None,
    }


def collection_status(definition: CollectionDefinition, database: Database, settings: Settings) -> dict[str, Any]:
    """Counts from the data itself, the current model and the indexes. Nothing is written, no model loaded."""
    ledger = Ledger(definition, database)
    model = ledger.current()
    if model is None:
        return empty_status(definition)
    covered = coverage(database, model)
    with database.connect(autocommit=True) as connection:
        state = collection_state(connection, definition.name)
        indexes = describe_indexes(connection, model.destination)
        faiss = _faiss_status(connection, definition.name, settings)
        identity = collection_identity(connection, definition.name)
    assert state is not None
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
        "quarantined_items": covered.quarantined_items,
        "dirty_batches": len(ledger.dirty_batches()),
        "pgvector_index": [asdict(index) for index in indexes],
        "faiss": faiss,
        "last_scan": state.full_scan_at,
        "definition": ledger.definition_notice(),
        "database": {"name": database.name_and_host, "id": identity.database, "epoch": identity.epoch},
    }


def _faiss_status(connection: psycopg.Connection, collection: str, settings: Settings) -> dict[str, Any]:
    """The current generation, and what it is to the database; a foreign one with the reason."""
    try:
        manifest = read_manifest(settings.state_dir / "faiss", collection)
    except VectorIndexError:  # damaged: the next sync builds it again
        return NO_FAISS
    stands = standing(connection, collection, manifest)
    if manifest is None:
        return NO_FAISS
    of = {"database": manifest.database, "epoch": manifest.epoch, "current": stands is Standing.CURRENT}
    why = {"foreign": why_foreign(connection, manifest)} if stands is Standing.FOREIGN else {}
    return {
        "generation": manifest.generation,
        "vectors": manifest.count,
        **of,
        "standing": stands.value,
        **why,
    }
