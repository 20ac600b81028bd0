"""Asset checks of a whole collection: coverage, integrity, index parity. They run with the indexes."""

import math
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
        """Every item has its current vectors: none missing, none stale, no vector without an item (orphan). Counted in
        the data itself. If it fails, run `embeddings-pipeline sync`.
        """
        with failures():
            opened = pipeline.open(collection)
            found = coverage(opened.database, opened.active)
        whole = found.missing == found.stale == found.orphans == 0
        counts = f"{found.items:,} items, {found.missing:,} missing, {found.stale:,} stale, {found.orphans:,} orphans"
        # Rounded down: 100 % is said only of what is whole.
        coverage_percent = math.floor(found.share * 10_000) / 100
        return _result(whole, counts, {**vars(found), "coverage_percent": coverage_percent})

    @dg.asset_check(asset=table, name="integrity")
    def integrity_check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        """Every vector can be right: the model's dimension, finite, of unit length, and not all the same. If it fails,
        run `embeddings-pipeline sync --force`.
        """
        with failures():
            opened = pipeline.open(collection)
            found = integrity(opened.database, opened.active)
        wrong = f"{found.wrong_dimension:,} of another dimension, {found.not_finite:,} not finite"
        counts = f"{found.vectors:,} vectors: {wrong}, {found.not_unit:,} not of unit length"
        return _result(found.sound, counts + (", all the same" if found.all_equal else ""), vars(found))

    @dg.asset_check(asset=index, name="index_parity")
    def parity_check(pipeline: PipelineResource) -> dg.AssetCheckResult:
        """The FAISS index holds exactly the table's vectors, and finds what an exact search in the table finds. An
        index that is behind the table passes: it is built again with the next sync.
        """
        with failures():
            opened = pipeline.open(collection)
            faiss_index = open_index(opened.settings.state_dir / "faiss", collection.name)
            found = check_parity(opened.database, opened.active.table, faiss_index)
        if not found.comparable:
            return _result(True, "the index is behind the table; the next sync builds it again", {"current": False})
        ids = f"{found.in_index:,} vectors, {found.missing_in_index:,} missing, {found.not_in_table:,} not in the table"
        searches = f"{found.sampled - found.differing:,} of {found.sampled:,} searches as exact ones"
        metadata = {name: value for name, value in vars(found).items() if name != "comparable"}
        return _result(found.ok, f"{ids}; {searches}", {**metadata, "current": True})

    return [coverage_check, integrity_check, parity_check]


def _result(passed: bool, description: str, metadata: Mapping[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=bool(passed), description=description, metadata=dict(metadata))
