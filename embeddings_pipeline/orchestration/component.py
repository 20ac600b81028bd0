"""The component: one `defs.yaml` becomes the assets, checks, jobs, sensors and schedules of a collection."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.orchestration.alerts import build_alerts
from embeddings_pipeline.orchestration.automation import (
    build_job_for_people,
    build_refresh_jobs,
    build_schedules,
    build_sensor,
)
from embeddings_pipeline.orchestration.jobs import build_pipeline, declared_profile
from embeddings_pipeline.orchestration.names import job_name
from embeddings_pipeline.orchestration.scaffold import CollectionScaffolder


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
        return cls(CollectionDefinition(attributes, context.path / "defs.yaml"))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return build_definitions(self.collection)


def build_definitions(definition: CollectionDefinition) -> dg.Definitions:
    """Everything that Dagster knows of one collection."""
    pipeline, refresh_jobs = build_pipeline(definition), build_refresh_jobs(definition)
    dimensions = declared_profile(definition).dimensions
    asked_for = {job_name(definition, job) for job in ("scan", "batches", "index")}
    jobs = [job for job in pipeline.jobs or () if job.name in asked_for]
    automation = dg.Definitions(
        jobs=[*refresh_jobs, build_job_for_people(definition, refresh_jobs[0])],
        sensors=[build_sensor(definition, jobs, dimensions), build_alerts(definition)],
        schedules=build_schedules(definition, refresh_jobs),
    )
    return dg.Definitions.merge(pipeline, automation)


def definitions_below(folder: Path) -> dg.Definitions:
    """The definitions of every collection below a folder that is not the defs folder of a dg project."""
    return dg.Definitions.merge(*map(build_definitions, load_collections(folder).values()))
