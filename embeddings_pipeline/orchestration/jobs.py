"""The jobs of a collection, and the definitions that they run in."""

from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile, resolve_profile
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.orchestration.assets import build_assets
from embeddings_pipeline.orchestration.batch_jobs import build_batch_jobs, has_batch_jobs
from embeddings_pipeline.orchestration.checks import build_audit, build_checks
from embeddings_pipeline.orchestration.evaluation import build_evaluation
from embeddings_pipeline.orchestration.interactions import build_cooccurrence_asset
from embeddings_pipeline.orchestration.maps import build_map_asset
from embeddings_pipeline.orchestration.migration_assets import build_migration_assets, build_migration_jobs
from embeddings_pipeline.orchestration.names import AUTOMATION, asset_key, batch_assets, job_name, job_tags
from embeddings_pipeline.orchestration.resources import EXECUTOR, LOGGERS, PIPELINE

LIKED = "For the first sync and each daily refresh: which items the same people liked."
FETCHES = "For the sensor of batch jobs: look at each, and fetch what was answered."


def declared_profile(definition: CollectionDefinition) -> Profile:
    """The profile that the collection or the environment names. ProfileError, with the file, if it is unknown."""
    try:
        return resolve_profile(definition.declared_profile, load_settings())
    except ProfileError as error:
        raise ProfileError(f"{definition.path or definition.name}: {error}") from error


def build_pipeline(definition: CollectionDefinition) -> dg.Definitions:
    """The collection's assets, checks and jobs, without what starts them by itself."""
    profile = declared_profile(definition)
    with_batch_jobs = has_batch_jobs(definition, profile)
    return dg.Definitions(
        assets=[
            *build_assets(definition, profile),
            build_audit(definition),
            *build_migration_assets(definition),
            *build_evaluation(definition),
            *build_map_asset(definition),
            *([build_batch_jobs(definition)] if with_batch_jobs else []),
            *([build_cooccurrence_asset(definition)] if definition.attributes.interactions else []),
        ],
        asset_checks=build_checks(definition, profile),
        jobs=[
            *build_jobs(definition, profile.dimensions, with_batch_jobs=with_batch_jobs),
            *build_migration_jobs(definition),
        ],
        resources={"pipeline": PIPELINE},
        executor=EXECUTOR,
        loggers=LOGGERS,
    )


def build_jobs(definition: CollectionDefinition, dimensions: int, *, with_batch_jobs: bool = False) -> list[Any]:
    """`…_scan`, `…_batches` (partitioned), `…_index` with the quick checks, and `…_audit` with all of them and the
    evaluation; and `…_batch_jobs`, `…_cooccurrence`.
    """

    def select(*names: str) -> dg.AssetSelection:
        return dg.AssetSelection.assets(*(asset_key(definition, name) for name in names))

    def job(name: str, selection: dg.AssetSelection, description: str) -> Any:
        description = f"{description} `{job_name(definition, 'all')}` does it all at once."
        tags = job_tags(definition, AUTOMATION)
        return dg.define_asset_job(job_name(definition, name), selection, description=description, **tags)

    indexes = (asset_key(definition, name) for name in ("pgvector_index", "faiss_index"))
    last = ["audit", *(["evaluation"] if definition.attributes.evaluation else [])]
    return [
        job("scan", select("item_ledger").without_checks(), "Step 1: look for new, changed and vanished items."),
        job(
            "batches",
            select(*batch_assets(dimensions)).without_checks(),
            "Step 2: read, render, embed and commit batches. Its launchpad has `force`, `dry_run` and `limit`.",
        ),
        job(
            "index",
            select("pgvector_index", "faiss_index", *(["map"] if definition.attributes.map.method != "none" else [])),
            "Step 3: bring the indexes and the map up to date, and run the quick checks.",
        ),
        job(
            "audit",
            select(*last) | dg.AssetSelection.checks_for_assets(*indexes),
            "Step 4: compare every copy with the next, and run every check. What disagrees becomes dirty.",
        ),
        *([job("batch_jobs", select("batch_jobs"), FETCHES)] if with_batch_jobs else []),
        *([job("cooccurrence", select("cooccurrence"), LIKED)] if definition.attributes.interactions else []),
    ]
