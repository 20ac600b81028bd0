"""The component: one `defs.yaml` becomes the assets, checks and jobs of a collection."""

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from embeddings_pipeline.collection import Collection, CollectionConfig, load_collections
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.orchestration.assets import build_assets, build_jobs
from embeddings_pipeline.orchestration.checks import build_checks
from embeddings_pipeline.orchestration.resources import EXECUTOR, PIPELINE
from embeddings_pipeline.orchestration.scaffold import CollectionScaffolder
from embeddings_pipeline.profiles import resolve_profile
from embeddings_pipeline.settings import load_settings


@dg.scaffold_with(CollectionScaffolder)
@dataclass
class EmbeddingCollection(dg.Component):
    """Keeps the embeddings of one table up to date, in PostgreSQL (pgvector) and in FAISS."""

    collection: Collection

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return CollectionConfig

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> "EmbeddingCollection":
        assert isinstance(attributes, CollectionConfig)
        return cls(Collection(attributes, context.path / "defs.yaml"))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return build_definitions(self.collection)


def build_definitions(collection: Collection) -> dg.Definitions:
    """Everything that Dagster knows of one collection."""
    try:
        profile = resolve_profile(collection.config.profile, load_settings())
    except ProfileError as error:
        raise ProfileError(f"{collection.path or collection.name}: {error}") from error
    return dg.Definitions(
        assets=build_assets(collection, profile),
        asset_checks=build_checks(collection),
        jobs=build_jobs(collection, profile.dimensions),
        resources={"pipeline": PIPELINE},
        executor=EXECUTOR,
    )


def definitions_below(folder: Path) -> dg.Definitions:
    """The definitions of every collection below a folder that is not the defs folder of a dg project."""
    return dg.Definitions.merge(*map(build_definitions, load_collections(folder).values()))
