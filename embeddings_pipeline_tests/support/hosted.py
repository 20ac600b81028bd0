"""Profiles of a hosted model on the test server, and what it answers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.hosted import HostedEncoder
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, vector_of

SMALL = "text-embedding-3-small"
KEY = "sk-very-secret-0123456789"
TEXTS = [f"a film about number {n}" for n in range(300)]


def profile(service: EmbeddingServer | None, **others: Any) -> Profile:
    url = {"url": service.url} if service else {}
    defaults = {"name": "test", "provider": "openai", "model": SMALL, "dimensions": 64, "requests_per_minute": 0}
    return Profile(**{**defaults, **url, **others})


@contextlib.contextmanager
def encoding(given: Profile, **settings: Any) -> Iterator[HostedEncoder]:
    encoder = HostedEncoder(given, Settings(**settings))
    try:
        yield encoder
    finally:
        encoder.close()


def expected(texts: Sequence[str], dimensions: int = 64, model: str = SMALL) -> NDArray[np.float32]:
    return np.stack([vector_of(text, model, dimensions) for text in texts])


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)
