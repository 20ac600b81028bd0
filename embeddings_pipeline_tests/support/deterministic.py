"""A small, fast encoder for tests of the plumbing: words are hashed into N dimensions.

Equal texts give equal vectors and texts that share words are similar, in every process. Use it with
`Profile(name="test", provider="python", model="embeddings_pipeline_tests.support.deterministic:DeterministicEncoder",
dimensions=32)`.
"""

import functools
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile

_DIMENSIONS_PER_WORD = 8


class DeterministicEncoder:
    """See `Encoder`. The class attributes are hooks for tests; `reset` puts them back.

    | hook | effect |
    |---|---|
    | texts_encoded | how often each text was encoded, as a document or a query |
    | calls | number of calls to `encode_documents` and `encode_queries` |
    | fail_on | a call with a text that contains this marker raises `error` |
    | nan_on | a text that contains this marker gets a vector of NaN |
    | seconds_per_call | each call sleeps this long |
    """

    texts_encoded: ClassVar[Counter[str]] = Counter()
    calls: ClassVar[int] = 0
    fail_on: ClassVar[str | None] = None
    error: ClassVar[type[BaseException]] = ValueError
    nan_on: ClassVar[str | None] = None
    seconds_per_call: ClassVar[float] = 0.0
    _counting: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def reset(cls) -> None:
        cls.texts_encoded = Counter()
        cls.calls, cls.fail_on, cls.error, cls.nan_on, cls.seconds_per_call = 0, None, ValueError, None, 0.0

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @property
    def dimensions(self) -> int:
        return self.profile.dimensions

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self.profile.document_prompt or "")

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self.profile.query_prompt or "")

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """A token is a word."""
        return np.array([len(((self.profile.document_prompt or "") + text).split()) for text in texts], dtype=np.int64)

    def _encode(self, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        cls = type(self)
        with cls._counting:
            cls.calls += 1
            cls.texts_encoded.update(texts)
        if cls.seconds_per_call:
            time.sleep(cls.seconds_per_call)
        for text in texts:
            if cls.fail_on is not None and cls.fail_on in text:
                raise cls.error(f"a text holds {cls.fail_on!r}")
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in (prompt + text).lower().split() or [""]:
                places, signs = _places(word, self.dimensions)
                np.add.at(vector, places, signs)
            if not vector.any():  # words that cancel each other out
                vector[0] = 1.0
            if cls.nan_on is not None and cls.nan_on in text:
                vector[:] = np.nan
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class SlowEncoder(DeterministicEncoder):
    """For another process, whose hooks nobody reaches: a query that begins with `slowly` takes three seconds."""

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        time.sleep(3.0 if texts[0].startswith("slowly") else 0.0)
        return super().encode_queries(texts)


@functools.lru_cache(maxsize=50_000)
def _places(word: str, dimensions: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=5 * _DIMENSIONS_PER_WORD).digest()
    numbers = np.frombuffer(digest, dtype="<u4", count=_DIMENSIONS_PER_WORD)
    signs = np.frombuffer(digest, dtype=np.uint8, offset=4 * _DIMENSIONS_PER_WORD)
    return (numbers % dimensions).astype(np.int64), np.where(signs & 1, 1, -1).astype(np.float32)
