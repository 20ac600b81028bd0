"""What the endpoints and the agents' tools do: the one place that asks for searches."""

from functools import partial
from typing import Any

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.index.faiss_read import read_manifest
from embeddings_pipeline.search.arguments import Mode, why_no_mode
from embeddings_pipeline.search.from_files import known_outage, outage_behind
from embeddings_pipeline.serve.maps import MapRequest
from embeddings_pipeline.serve.metrics import Metrics
from embeddings_pipeline.serve.readiness import Readiness
from embeddings_pipeline.serve.requests import RecommendRequest, SearchRequest, SimilarRequest
from embeddings_pipeline.serve.searches import Searches
from embeddings_pipeline.serve.served import Served
from embeddings_pipeline.store.database import open_database_to_read
from embeddings_pipeline.store.models import current_model, shadow_models

MODES: dict[str, Mode] = {"Meaning": "dense", "Words": "text", "Both": "hybrid"}


class Service:
    """One process's service, between `start` and `close`."""

    def __init__(self, settings: Settings, at_once: int) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.served = Served(settings.defs_dir)
        self.readiness = Readiness(self.served, settings)
        self.searches = Searches(at_once, tried_again=self.metrics.tried_again)
        self.metrics.count_under_way(lambda: self.searches.under_way)

    def start(self) -> None:
        self.readiness.start()

    def close(self) -> bool:
        """Whether all has ended; if not, a thread still searches for somebody who has left, and may be killed."""
        self.readiness.close()
        return self.searches.close()

    async def ask(self, request: SearchRequest | SimilarRequest | RecommendRequest) -> dict[str, Any]:
        """What is found; while there is no database, what the published files say, asked once. Raises what searches
        raise, and TooManyError.
        """
        asked = partial(request.answer, self.served, self.settings)
        return await self.searches.run(asked, patient=not self.readiness.lacks_database)

    async def show(self, request: MapRequest) -> dict[str, Any]:
        """Points of a map, which lies in a file: with a database or without."""
        return await self.searches.run(partial(request.answer, self.served, self.settings))

    async def collections(self) -> dict[str, Any]:
        """What may be searched, and by what it may be filtered; without a database, by the published files."""
        described = await self.searches.run(self._collections, patient=not self.readiness.lacks_database)
        return {"collections": described}

    def _collections(self) -> list[dict[str, Any]]:
        collections = [definition for _, definition in sorted(self.served.collections.items())]
        if known_outage(self.settings) is None:
            try:
                with open_database_to_read(self.settings).session() as connection:
                    return [_described(each, self.settings, *_models(connection, each)) for each in collections]
            except (DatabaseError, psycopg.OperationalError) as error:
                if outage_behind(self.settings, error) is None:
                    raise
        return [_described(each, self.settings, *_model_of_files(each, self.settings), []) for each in collections]


def _models(
    connection: psycopg.Connection, definition: CollectionDefinition
) -> tuple[str | None, str | None, list[str]]:
    """Profile and fingerprint of the current model, and the profiles of the others."""
    model = current_model(connection, definition)
    if model is None:
        return None, None, []
    shadows = [each.profile.name for each in shadow_models(connection, definition)]
    return model.profile.name, model.destination.fingerprint, shadows


def _model_of_files(definition: CollectionDefinition, settings: Settings) -> tuple[str | None, str | None]:
    manifest = read_manifest(settings.state_dir / "faiss", definition.name)
    if manifest is None:
        return None, None
    return resolve_profile(definition.declared_profile, settings).name, manifest.fingerprint


def _described(
    definition: CollectionDefinition,
    settings: Settings,
    profile: str | None,
    fingerprint: str | None,
    others: list[str],
) -> dict[str, Any]:
    attributes = definition.attributes
    return {
        "name": definition.name,
        "columns": list(attributes.columns),
        "filters": {name: each.model_dump(exclude_defaults=True) for name, each in attributes.filters.items()},
        "vectors": list(attributes.vectors),
        "profile": profile,
        "fingerprint": fingerprint,
        "modes": _modes(definition, settings),
        "models": [
            {"label": profile or "no model yet", "fields": {}},
            {"label": "FAISS", "fields": {"index": "faiss"}},
            *({"label": each, "fields": {"profile": each}} for each in others),
        ],
    }


def _modes(definition: CollectionDefinition, settings: Settings) -> list[dict[str, Any]]:
    """The ways of looking; the last one if a reranker is named, or switched on."""
    modes: list[dict[str, Any]] = [
        {"label": label, "fields": {"mode": mode, "rerank": False}, "why_not": why_no_mode(definition, mode)}
        for label, mode in MODES.items()
    ]
    if settings.enable_reranker or settings.rerank_model:
        modes.append({"label": "Reranked", "fields": {"rerank": True}, "why_not": None})
    return modes
