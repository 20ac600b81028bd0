"""The embedding cache: what models have answered, by fingerprint and content hash.

It is in PostgreSQL, or in Redis if EMBEDDING_CACHE_URL names one. `encoders/answers.py` asks and fills it; nothing else
does. A value is a checksum of four bytes, then the vector's float16s, little-endian: one that is damaged, or of another
length, is as good as none, and is replaced.
"""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.schema import has_schema
from embeddings_pipeline.store.sql import load_sql

CHECKSUM_BYTES = 4
ROWS_AT_ONCE = 10_000  # deleted in one statement


class EmbeddingCache(Protocol):
    """Where answers are kept. Implementations are safe to call from several threads."""

    def known(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Content hash → vector, of those that are there and sound."""

    def known_hashes(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> set[bytes]:
        """As `known`, without reading the vectors."""

    def put(
        self, fingerprint: str, vectors: Mapping[bytes, NDArray], connection: psycopg.Connection | None = None
    ) -> None:
        """Keep these answers; those that a float16 cannot hold are left out.

        `connection`: of the pipeline's database, for a cache that is there, which then writes in its transaction.
        """

    def statistics(self) -> "list[Kept]":
        """What is kept, by fingerprint."""

    def purge(self, fingerprints: Sequence[str] | None = None) -> int:
        """Forget everything, or what these models have answered; how many answers that were."""


@dataclass(frozen=True)
class Kept:
    """What is kept of one model's answers."""

    fingerprint: str
    answers: int
    bytes: int
    first_at: datetime | None = None  # written; None if the cache does not know
    last_at: datetime | None = None


def open_cache(database: Database, settings: Settings) -> EmbeddingCache:
    """The cache that the settings name. ConfigurationError if EMBEDDING_CACHE_URL is no address of a Redis."""
    if url := revealed(settings.embedding_cache_url):
        from embeddings_pipeline.encoders.redis_cache import open_redis

        return open_redis(url, settings.cache_days)
    return PostgresCache(database)


class PostgresCache:
    """The table embeddings.embedding_cache; see `EmbeddingCache` for the methods."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        if not hashes:
            return {}
        parameters = {"fingerprint": fingerprint, "hashes": list(hashes)}
        with self._database.session() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(load_sql("cache/known"), parameters).fetchall()
        return unpack([digest for digest, _ in rows], [value for _, value in rows], dimensions)

    def known_hashes(self, fingerprint: str, dimensions: int, hashes: Sequence[bytes]) -> set[bytes]:
        size = CHECKSUM_BYTES + 2 * dimensions
        parameters = {"fingerprint": fingerprint, "hashes": list(hashes), "bytes": size}
        with self._database.session() as connection:
            return {row[0] for row in connection.execute(load_sql("cache/known_hashes"), parameters)}

    def put(
        self, fingerprint: str, vectors: Mapping[bytes, NDArray], connection: psycopg.Connection | None = None
    ) -> None:
        if packed := pack(vectors):
            parameters = {"fingerprint": fingerprint, "hashes": list(packed), "embeddings": list(packed.values())}
            with self._database.session() if connection is None else nullcontext(connection) as session:
                session.execute(load_sql("cache/put"), parameters)

    def statistics(self) -> list[Kept]:
        with self._database.session() as connection:
            return [Kept(*row) for row in connection.execute(load_sql("cache/statistics"))]

    def purge(self, fingerprints: Sequence[str] | None = None) -> int:
        chosen = None if fingerprints is None else list(fingerprints)
        return self._delete("cache/purge", {"fingerprints": chosen})

    def sweep(self, days: int) -> int:
        """Forget what was written more than so many days ago; how many answers that were."""
        return self._delete("cache/sweep", {"days": days})

    def _delete(self, statement: str, parameters: Mapping[str, object]) -> int:
        """Some rows a transaction, so that none is long."""
        deleted = 0
        while True:
            with self._database.session() as connection:
                rows = connection.execute(load_sql(statement), {**parameters, "rows": ROWS_AT_ONCE}).rowcount
            deleted += rows
            if rows < ROWS_AT_ONCE:
                return deleted


def sweep(database: Database, settings: Settings) -> int:
    """Forget what the table keeps longer than `settings.cache_days`; how many answers that were. Redis does so itself.

    The table may have some though Redis is used now.
    """
    if not has_schema(database):
        return 0
    with database.session() as connection:
        connection.execute(load_sql("cache/sweep_claims"))
    return PostgresCache(database).sweep(settings.cache_days) if settings.cache_days else 0


def in_batch_jobs(database: Database, fingerprint: str, hashes: Sequence[bytes]) -> set[bytes]:
    """Of these texts, those whose answers are to come from batch jobs."""
    parameters = {"fingerprint": fingerprint, "hashes": list(hashes)}
    with database.session() as connection:
        return {row[0] for row in connection.execute(load_sql("cache/in_jobs"), parameters)}


def model_users(database: Database) -> dict[str, list[str]]:
    """Fingerprint → `collection (profile)`, of the models that collections have."""
    users: dict[str, list[str]] = {}
    if not has_schema(database):
        return users
    with database.session() as connection:
        for fingerprint, collection, profile in connection.execute(load_sql("cache/models")):
            users.setdefault(fingerprint, []).append(f"{collection} ({profile})")
    return users


def pack(vectors: Mapping[bytes, NDArray]) -> dict[bytes, bytes]:
    """Content hash → value, of the vectors that are finite in float16."""
    if not vectors:
        return {}
    with np.errstate(over="ignore"):  # infinite in float16: left out
        halves = np.stack(list(vectors.values())).astype("<f2")
    finite = np.isfinite(halves).all(axis=1)
    values = (row.tobytes() for row in halves[finite])
    hashes = (digest for digest, fits in zip(vectors, finite, strict=True) if fits)
    return {digest: _checksum(value) + value for digest, value in zip(hashes, values, strict=True)}


def unpack(
    hashes: Sequence[bytes], values: Sequence[bytes | None], dimensions: int
) -> dict[bytes, NDArray[np.float32]]:
    """Content hash → vector, of the values that are sound."""
    size = CHECKSUM_BYTES + 2 * dimensions
    sound = {
        digest: value
        for digest, value in zip(hashes, values, strict=True)
        if value is not None and len(value) == size and _checked(value)
    }
    if not sound:
        return {}
    rows = np.frombuffer(b"".join(sound.values()), np.uint8).reshape(len(sound), size)
    matrix = np.ascontiguousarray(rows[:, CHECKSUM_BYTES:]).view("<f2").astype(np.float32)
    finite = np.asarray(np.isfinite(matrix).all(axis=1))
    return {digest: vector for digest, vector, fits in zip(sound, matrix, finite, strict=True) if fits}


def _checked(value: bytes) -> bool:
    return _checksum(memoryview(value)[CHECKSUM_BYTES:]) == value[:CHECKSUM_BYTES]


def _checksum(halves: bytes | memoryview) -> bytes:
    return zlib.crc32(halves).to_bytes(CHECKSUM_BYTES, "little")
