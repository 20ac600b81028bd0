"""Asset checks of a whole collection: coverage, integrity, index parity. They run with the indexes."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from embeddings_pipeline.collection import Collection
from embeddings_pipeline.coverage import coverage, integrity
from embeddings_pipeline.index.faiss_index import check_parity, open_index
from embeddings_pipeline.orchestration.assets import asset_key, failures
from embeddings_pipeline.orchestration.resources import PipelineResource


def build_checks(collection: Collection) -> list[dg.AssetChecksDefinition]:
    """Checks on pgvector_index and faiss_index: the assets that come after the last batch has landed."""
    table, index = asset_key(collection, "pgvector_index"), asset_key(collection, "faiss_index")

    @dg.asset_check(asset=table, name="coverage")
    def coverage_check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        """Every item has its current vectors: none missing, none stale, no vector without an item. Counted in the data
        itself. If it fails, run a sync.
        """
        with failures():
            opened = pipeline.open(collection)
            found = coverage(opened.database, opened.active)
        whole = found.missing == found.stale == found.orphans == 0
        return _result(whole, {**vars(found), "coverage": round(found.share, 6)})

    @dg.asset_check(asset=table, name="integrity")
    def integrity_check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        """Every vector can be right: the model's dimension, finite, of unit length, and not all the same."""
        with failures():
            opened = pipeline.open(collection)
            found = integrity(opened.database, opened.active)
        return _result(found.sound, vars(found))

    @dg.asset_check(asset=index, name="index_parity")
    def parity_check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        """The FAISS index holds exactly the ids of the table, and finds what an exact search in the table finds."""
        with failures():
            opened = pipeline.open(collection)
            faiss_index = open_index(opened.settings.state_dir / "faiss", collection.name)
            found = check_parity(opened.database, opened.active.table, faiss_index)
        # An index that is behind is not wrong: it is built when no batch is dirty.
        return _result(found.ok or not found.comparable, {**vars(found), "current": found.comparable})

    return [coverage_check, integrity_check, parity_check]


def _result(passed: bool, metadata: Mapping[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=bool(passed), metadata=dict(metadata))
