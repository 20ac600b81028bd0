"""The asset of what the same people liked, of a collection that declares `interactions:`."""

import time

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.index.cooccurrence import build_cooccurrence
from embeddings_pipeline.orchestration.asset_options import asset_options
from embeddings_pipeline.orchestration.figures import metadata_of
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import failures_kept, open_logged
from embeddings_pipeline.store.interactions import Interactions


def build_cooccurrence_asset(definition: CollectionDefinition) -> dg.AssetsDefinition:
    """The asset `cooccurrence`."""

    @dg.asset(**asset_options(definition, "cooccurrence", {"postgres"}, ["pgvector_table"], partitioned=False))
    def cooccurrence(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """Which items the same people liked, from the table or query that `interactions:` names: `recommend` goes by it
        for items without a vector, and for people without a history. Made anew as a whole, by the first sync and each
        daily refresh.

        Numbers: `people` who liked anything, of whom those who liked more than 1,000 items are `left_out`; `items` that
        were liked; `pairs` of items that are kept.
        """
        started = time.perf_counter()
        with failures_kept(definition, "cooccurrence"):
            collection = open_logged(context, pipeline, definition)
            found = build_cooccurrence(collection.database, Interactions(collection.source))
        return dg.MaterializeResult(metadata={**metadata_of(found), "seconds": round(time.perf_counter() - started, 3)})

    return cooccurrence
