"""Segments with vectors in a column of the user's own table: the collection, and what is looked at after each step."""

from typing import Any

import numpy as np

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.model_change import OTHER, WIDE, commit_all
from embeddings_pipeline_tests.support.workbench import PROFILE, by_name, execute
from embeddings_pipeline_tests.support.workbench import definition as plain_definition

WIDEST = {**PROFILE, "name": "widest", "dimensions": 320}


def definition(**attributes: Any) -> CollectionDefinition:
    defaults = {
        "name": "segments",
        "source": {"table": "segments", "key": ["id"]},
        "columns": ["video"],
        "vectors": {"base": "{words}"},
        "profile": None,
        "profiles": by_name(PROFILE, WIDE, WIDEST, OTHER),
        "destination": {"table": "segments", "profile": "wide"},
    }
    return plain_definition(**{**defaults, **attributes})


def words(number: int) -> str:
    return f"segment {number} says something about topic {number % 7}"


def as_text(vector: Any) -> str:
    return "[" + ",".join(map(str, vector.tolist())) + "]"


def sync(one: CollectionDefinition, settings: Settings, run: str = "run") -> Collection:
    collection = open_collection(one, settings)
    commit_all(collection, run)
    return open_collection(one, settings)


def columns(database: Database) -> list[str]:
    query = """SELECT attname || ' ' || format_type(atttypid, atttypmod) FROM pg_attribute
               WHERE attrelid = 'segments'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY 1"""
    return [row[0] for row in execute(database, query)]


def indexes(database: Database) -> list[str]:
    query = "SELECT indexdef FROM pg_indexes WHERE tablename = 'segments' AND indexdef NOT LIKE '%UNIQUE%' ORDER BY 1"
    return [row[0] for row in execute(database, query)]


def assert_current(collection: Collection) -> None:
    """Each row's column has what the current model makes of its words, and each model's view what that one makes."""
    encoder = collection.encoder()
    for text, vector in execute(collection.database, "SELECT words, embedding::real[] FROM segments"):
        assert vector is not None, text
        assert np.allclose(vector, encoder.encode_documents([text])[0], atol=1e-3)
    for model in [collection, *collection.shadow_models()]:
        view = model.model.destination.name
        rows = execute(
            collection.database,
            f"SELECT text, vector.embedding::real[] FROM embeddings.segments_text JOIN embeddings.{view} AS vector "
            "ON text_id = id",
        )
        assert len(rows) == execute(collection.database, "SELECT count(*) FROM segments")[0][0]
        made = model.encoder().encode_documents([text for text, _ in rows])
        assert np.allclose([vector for _, vector in rows], made, atol=1e-3)
    found = coverage(collection.database, collection.model)
    assert (found.missing, found.stale, found.orphans) == (0, 0, 0)
    assert audit(collection).agree


def backfill_all(collection: Collection) -> None:
    for _, backfilled in phases.backfill(collection, collection.ledger.batches(), "backfill"):
        assert backfilled.complete
