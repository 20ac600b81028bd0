"""What Dagster loads: every collection below `defs/`, or below the folder that EMBEDDINGS_DEFS_DIR names."""

from pathlib import Path

import dagster as dg

from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.orchestration.component import definitions_below
from embeddings_pipeline.orchestration.housekeeping import build_housekeeping
from embeddings_pipeline.orchestration.instance.workers import fork_runs


@dg.definitions
def defs() -> dg.Definitions:
    settings = load_settings()
    fork_runs()
    if settings.embeddings_defs_dir is not None or read_collections(settings.defs_dir).mistakes:
        collections = definitions_below(settings.defs_dir)
    else:
        collections = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(collections, build_housekeeping())
