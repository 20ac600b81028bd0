"""The component: one `defs.yaml` becomes the assets, checks, jobs, sensors and schedules of a collection."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition, Reading
from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.orchestration.alerts import build_alerts
from embeddings_pipeline.orchestration.automation import (
    build_job_for_people,
    build_refresh_jobs,
    build_schedules,
    build_sensor,
)
from embeddings_pipeline.orchestration.batch_jobs import build_batch_sensor, has_batch_jobs
from embeddings_pipeline.orchestration.instance.home import check_home
from embeddings_pipeline.orchestration.jobs import build_pipeline, declared_profile
from embeddings_pipeline.orchestration.live import build_live_job
from embeddings_pipeline.orchestration.names import job_name
from embeddings_pipeline.orchestration.scaffold import CollectionScaffolder

log = logging.getLogger(__name__)


@dg.scaffold_with(CollectionScaffolder)
@dataclass
class EmbeddingCollection(dg.Component):
    """Keeps the embeddings of one table up to date, in PostgreSQL (pgvector) and in FAISS."""

    collection: CollectionDefinition

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return CollectionAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> "EmbeddingCollection":
        assert isinstance(attributes, CollectionAttributes)
        path = context.path / "defs.yaml"
        return cls(CollectionDefinition(attributes, path, Reading(path.read_bytes() if path.is_file() else None)))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return build_definitions(self.collection)


def build_definitions(definition: CollectionDefinition) -> dg.Definitions:
    """Everything that Dagster knows of one collection."""
    pipeline, refresh_jobs = build_pipeline(definition), build_refresh_jobs(definition)
    profile = declared_profile(definition)

    def jobs(*names: str) -> list[Any]:
        asked_for = {job_name(definition, name) for name in names}
        return [job for job in pipeline.jobs or () if job.name in asked_for]

    sensors = [build_sensor(definition, jobs("scan", "batches", "index"), profile.dimensions), build_alerts(definition)]
    if has_batch_jobs(definition, profile):
        own = jobs("batch_jobs", "batches", "migration_backfill")
        sensors.append(build_batch_sensor(definition, own, profile.dimensions))
    automation = dg.Definitions(
        jobs=[*refresh_jobs, build_job_for_people(definition, refresh_jobs[0]), build_live_job(definition)],
        sensors=sensors,
        schedules=build_schedules(definition, refresh_jobs, paid=is_paid(profile)),
    )
    return dg.Definitions.merge(pipeline, automation)


def definitions_below(folder: Path) -> dg.Definitions:
    """The definitions of every collection below a folder that is not the defs folder of a dg project.

    A collection whose `defs.yaml` has a mistake is an asset without a job, which says so; the others are there. Raises
    ConfigurationError or ProfileError if there are no others, or if DAGSTER_HOME is a folder without a dagster.yaml.
    """
    check_home()
    defined = read_collections(folder)
    errors: dict[str, PipelineError] = {path.parent.name: error for path, error in defined.mistakes.items()}
    built: list[dg.Definitions] = []
    for definition in defined.collections.values():
        try:
            built.append(build_definitions(definition))
        except PipelineError as error:
            errors[definition.name] = error
    if errors and not built:
        raise next(iter(errors.values()))
    return dg.Definitions.merge(*built, _not_loaded(errors))


def _not_loaded(errors: Mapping[str, PipelineError]) -> dg.Definitions:
    """What the UI shows in place of collections that cannot be loaded."""
    for error in errors.values():
        log.warning("warning: a collection is not loaded: %s", error)
    specs = [
        dg.AssetSpec(
            [re.sub(r"\W", "_", name), "NOT_LOADED"],
            group_name="not_loaded",
            description=f"This collection is not loaded, and nothing keeps it current: {error}",
        )
        for name, error in errors.items()
    ]
    return dg.Definitions(assets=specs)
