"""Keeps the embeddings of a table up to date, in PostgreSQL (pgvector) and in FAISS.

For programs:

    from embeddings_pipeline import open_collection

    with open_collection("items") as items:
        for hit in items.search("a man ages backwards", k=5):
            print(hit.score, hit.item["title"])

Each folder is a room, and imports only rooms below it: cli, serve, orchestration, live, model_change, search, health,
pipeline, ledger, index, encoders, store, config. docs/architecture.md has the rules that the code cites by number
("rule 3"), the words, what each room owns, and a table of questions ("what makes a batch dirty?") with the place of
each answer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embeddings_pipeline.errors import (
        ConfigurationError,
        DatabaseError,
        LakeError,
        ModelChangeError,
        NotFoundError,
        OutageError,
        OutOfMemoryError,
        PipelineError,
        ProfileError,
        RefusedError,
        SourceError,
        StaleRunError,
        VectorIndexError,
    )
    from embeddings_pipeline.front_door import CollectionClient, open_collection
    from embeddings_pipeline.orchestration.component import EmbeddingCollection
    from embeddings_pipeline.orchestration.sync import SyncResult
    from embeddings_pipeline.search.hits import Hit, Hits

__version__ = "0.1.0"

__all__ = [
    "CollectionClient",
    "ConfigurationError",
    "DatabaseError",
    "EmbeddingCollection",
    "Hit",
    "Hits",
    "LakeError",
    "ModelChangeError",
    "NotFoundError",
    "OutOfMemoryError",
    "OutageError",
    "PipelineError",
    "ProfileError",
    "RefusedError",
    "SourceError",
    "StaleRunError",
    "SyncResult",
    "VectorIndexError",
    "open_collection",
]

_MODULES = {
    "CollectionClient": "front_door",
    "EmbeddingCollection": "orchestration.component",
    "Hit": "search.hits",
    "Hits": "search.hits",
    "SyncResult": "orchestration.sync",
    "open_collection": "front_door",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    # Loaded on demand: `import dagster` costs a second, and status and search do without it.
    if name in __all__:
        return getattr(import_module(f"embeddings_pipeline.{_MODULES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
