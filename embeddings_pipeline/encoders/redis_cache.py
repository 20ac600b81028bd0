"""The embedding cache in Redis, for EMBEDDING_CACHE_URL=redis://… or rediss://…

A cache is never a reason to stop: a Redis that is down, full, read-only, or no Redis at all is told once, and left
alone for a while; the work goes on without it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.encoders.cache import Kept, pack, unpack
from embeddings_pipeline.errors import ConfigurationError, OutageError
from embeddings_pipeline.forks import ProcessLock

log = logging.getLogger(__name__)

PREFIX = "embeddings-pipeline:1:"  # of our keys: then the fingerprint and the content hash; 1: how values are packed
TIMEOUT_SECONDS, CONNECT_SECONDS = 10.0, 3.0
LEFT_ALONE_SECONDS = 60.0  # after it failed
KEYS_AT_ONCE = 1000
DAY_SECONDS = 86_400

_caches: dict[tuple[str, int], "RedisCache"] = {}
_mutex = ProcessLock()


def open_redis(url: str, days: int) -> "RedisCache":
    """The cache at that address, one a process; days: how long an answer is kept, 0: for ever. Connects to nothing yet.

    ConfigurationError if redis-py is missing, or the address is none.
    """
    with _mutex:
        if (url, days) not in _caches:
            _caches[url, days] = RedisCache(_client(url), days)
        return _caches[url, days]


def _client(url: str) -> Any:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise ConfigurationError(
            "EMBEDDING_CACHE_URL names a Redis, for which redis-py is needed: pip install 'embeddings-pipeline[redis]'"
        ) from None
    options = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": CONNECT_SECONDS}
    try:
        # One more try, for a session that the server has closed. Protocol 2, since servers before 6 know no other.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        client = redis.Redis.from_url(url, protocol=2, retry=retry, **options)
        client.connection_pool.make_connection()  # which connects to nothing, but knows its parameters
        return client
    except (ValueError, TypeError, redis.RedisError):  # whose message may repeat a password
        raise ConfigurationError(
            "EMBEDDING_CACHE_URL is no address of a Redis: it looks like redis://user:password@host:6379/0, or "
            "rediss://… with TLS"
        ) from None


class RedisCache:
    """See `EmbeddingCache` for the methods."""

    def __init__(self, client: Any, days: int) -> None:
        self._client, self._days = client, days
        self._left_alone_until, self._told = {"read": 0.0, "written": 0.0}, False

    def known(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        keys = [_key(fingerprint, digest) for digest in hashes]
        values = self._patiently("read", lambda: [v for part in _parts(keys) for v in self._client.mget(part)])
        return {} if values is None else unpack(hashes, values, dimensions)

    def known_hashes(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> set[bytes]:
        return set(self.known(fingerprint, dimensions, hashes))  # whether one is sound is in the value

    def put(
        self, fingerprint: str, vectors: Mapping[bytes, NDArray], connection: psycopg.Connection | None = None
    ) -> None:
        lasting = {"ex": self._days * DAY_SECONDS} if self._days else {}

        def write() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for digest, value in pack(vectors).items():
                pipeline.set(_key(fingerprint, digest), value, **lasting)
            written: list[Any] = pipeline.execute()
            return written

        self._patiently("written", write)

    def statistics(self) -> list[Kept]:
        """OutageError if Redis cannot be used."""
        answers: dict[str, int] = {}
        size: dict[str, int] = {}
        with self._usable():
            for keys in self._each_part():
                pipeline = self._client.pipeline(transaction=False)
                for key in keys:
                    pipeline.strlen(key)
                for key, length in zip(keys, pipeline.execute(raise_on_error=False), strict=True):
                    fingerprint = key[len(PREFIX) :].split(b":")[0].decode(errors="replace")
                    if isinstance(length, int) and length:  # else it is another program's, or gone
                        answers[fingerprint] = answers.get(fingerprint, 0) + 1
                        size[fingerprint] = size.get(fingerprint, 0) + length
        return [Kept(fingerprint, answers[fingerprint], size[fingerprint]) for fingerprint in sorted(answers)]

    def purge(self, fingerprints: Sequence[str] | None = None) -> int:
        """OutageError if Redis cannot be used."""
        chosen = [""] if fingerprints is None else [f"{fingerprint}:" for fingerprint in fingerprints]
        with self._usable():
            return sum(self._client.delete(*keys) for each in chosen for keys in self._each_part(each))

    def _each_part(self, of: str = "") -> Iterator[list[bytes]]:
        """Our keys, some at a time."""
        keys = self._client.scan_iter(match=f"{PREFIX}{of}*", count=KEYS_AT_ONCE)
        while part := list(islice(keys, KEYS_AT_ONCE)):
            yield part

    @contextmanager
    def _usable(self) -> Iterator[None]:
        import redis

        try:
            yield
        except (redis.RedisError, OSError, ValueError) as error:  # ValueError: what answers is no Redis
            raise OutageError(f"{self._place} cannot be used: {_said(error)}; see EMBEDDING_CACHE_URL") from error

    def _patiently(self, what: Literal["read", "written"], work: Callable[[], list[Any]]) -> list[Any] | None:
        """What the work gives; None if Redis fails, or did so a moment ago. One that refuses to be written may be read;
        one that does not answer is left alone altogether.
        """
        import redis

        if time.monotonic() < self._left_alone_until[what]:
            return None
        try:
            return work()
        except (redis.RedisError, OSError, ValueError) as error:  # ValueError: what answers is no Redis
            failed = [what] if isinstance(error, redis.ResponseError) else list(self._left_alone_until)
            self._left_alone_until |= dict.fromkeys(failed, time.monotonic() + LEFT_ALONE_SECONDS)
            if not self._told:
                self._told = True
                log.warning(
                    "warning: %s cannot be %s: %s; going on without the embedding cache, which is tried again each "
                    "minute",
                    *(self._place, what, _said(error)),
                )
            return None

    @property
    def _place(self) -> str:
        """For people: where it is, without user and password."""
        at = self._client.connection_pool.connection_kwargs
        return f"the Redis at {at.get('path') or '{}:{}'.format(at.get('host', 'localhost'), at.get('port', 6379))}"


def _key(fingerprint: str, digest: bytes) -> str:
    return f"{PREFIX}{fingerprint}:{digest.hex()}"


def _parts(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), KEYS_AT_ONCE):
        yield keys[start : start + KEYS_AT_ONCE]


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
