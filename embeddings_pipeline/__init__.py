"""Keeps the embeddings of a table up to date, in PostgreSQL (pgvector) and in FAISS."""

__version__ = "0.1.0"

__all__ = ["EmbeddingCollection"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    # Loaded on demand: `import dagster` costs a second, and status and search do without it.
    if name == "EmbeddingCollection":
        from embeddings_pipeline.orchestration.component import EmbeddingCollection

        return EmbeddingCollection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
