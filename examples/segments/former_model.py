"""A stand-in for the model that a table's vectors were made with: 1536 numbers from the words of a text.

It needs no weights, so that the example runs anywhere. If the model that made your vectors can be had, name its
profile instead.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile


class FormerModel:
    """Each word adds to some dimensions that its checksum chooses. An encoder as `provider: python` takes it."""

    def __init__(self, profile: Profile) -> None:
        self.dimensions = profile.dimensions

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (texts, dimensions)."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split() or [""]:
                chosen = np.random.default_rng(zlib.crc32(word.encode()))
                row[chosen.integers(0, self.dimensions, 12)] += chosen.standard_normal(12)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    encode_queries = encode_documents

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Words (texts,)."""
        return np.array([len(text.split()) for text in texts], np.int64)
