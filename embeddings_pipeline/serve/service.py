"""What the endpoints and the agents' tools do: the one place that asks for searches."""

from functools import partial
from typing import Any

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.search.arguments import Mode, why_no_mode
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
        """What may be searched, and by what it may be filtered."""
        self.readiness.check_database()
        return {"collections": await self.searches.run(self._collections)}

    def _collections(self) -> list[dict[str, Any]]:
        with open_database_to_read(self.settings).session() as connection:
            collections = sorted(self.served.collections.items())
            return [_described(connection, each, self.settings) for _, each in collections]


def _described(connection: psycopg.Connection, definition: CollectionDefinition, settings: Settings) -> dict[str, Any]:
    attributes, model = definition.attributes, current_model(connection, definition)
    shadows = shadow_models(connection, definition) if model else []
    return {
        "name": definition.name,
        "columns": list(attributes.columns),
        "filters": {name: each.model_dump(exclude_defaults=True) for name, each in attributes.filters.items()},
        "vectors": list(attributes.vectors),
        "profile": model.profile.name if model else None,
        "fingerprint": model.destination.fingerprint if model else None,
        "modes": _modes(definition, settings),
        "models": [
            {"label": model.profile.name if model else "no model yet", "fields": {}},
            {"label": "FAISS", "fields": {"index": "faiss"}},
            *({"label": each.profile.name, "fields": {"profile": each.profile.name}} for each in shadows),
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
