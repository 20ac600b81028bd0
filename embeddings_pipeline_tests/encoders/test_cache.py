"""The embedding cache, in PostgreSQL and in a real Redis: what it keeps, and what is as good as nothing."""

import logging
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import redis_cache
from embeddings_pipeline.encoders.cache import EmbeddingCache, PostgresCache, open_cache, pack, sweep
from embeddings_pipeline.encoders.redis_cache import PREFIX, RedisCache, open_redis
from embeddings_pipeline.errors import ConfigurationError, OutageError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import redis_server
from embeddings_pipeline_tests.support.redis_server import RedisServer
from embeddings_pipeline_tests.support.workbench import execute

MODEL, OTHER_MODEL = "0123456789ab", "ba9876543210"
DIMENSIONS = 32


def vectors(number: int, dimensions: int = DIMENSIONS, seed: int = 0) -> dict[bytes, NDArray[np.float32]]:
    made = np.random.default_rng(seed).standard_normal((number, dimensions)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return {n.to_bytes(16, "big"): vector for n, vector in enumerate(made)}


@pytest.fixture(scope="module")
def redis(skip_without: Callable[[str, bool], None], open_folder: Path) -> Iterator[RedisServer]:
    skip_without("redis-server", redis_server.is_there())
    folder = open_folder / "redis"
    folder.mkdir()
    with redis_server.redis_server(folder) as server:
        yield server


@pytest.fixture
def in_redis(redis: RedisServer) -> RedisCache:
    redis.client.flushall()
    return open_redis(redis.url, 30)


@pytest.fixture(params=["postgres", "redis"])
def cache(request: pytest.FixtureRequest) -> EmbeddingCache:
    if request.param == "redis":
        in_redis: EmbeddingCache = request.getfixturevalue("in_redis")
        return in_redis
    return PostgresCache(request.getfixturevalue("database"))


class TestWhatIsKept:
    @pytest.mark.parametrize("dimensions", [1, 384, 1536, 5000])
    def test_a_vector_comes_back_as_float16_keeps_it(self, cache: EmbeddingCache, dimensions: int) -> None:
        put = vectors(50, dimensions)
        cache.put(MODEL, put)
        known = cache.known(MODEL, dimensions, [*put, b"x" * 16])
        assert known.keys() == put.keys() == cache.known_hashes(MODEL, dimensions, [*put, b"x" * 16])
        for digest, vector in put.items():
            assert np.array_equal(known[digest], vector.astype(np.float16).astype(np.float32))
            assert known[digest].dtype == np.float32

    def test_another_model_knows_nothing_of_it(self, cache: EmbeddingCache) -> None:
        cache.put(MODEL, vectors(3))
        assert cache.known(OTHER_MODEL, DIMENSIONS, list(vectors(3))) == {}

    def test_what_a_float16_cannot_hold_is_left_out(self, cache: EmbeddingCache) -> None:
        put = vectors(3)
        first, second, third = put
        put[first] = np.full(DIMENSIONS, np.nan, np.float32)
        put[second] = np.full(DIMENSIONS, 1e6, np.float32)
        cache.put(MODEL, put)
        assert set(cache.known(MODEL, DIMENSIONS, list(put))) == {third}

    def test_nothing_is_asked_for_nothing(self, cache: EmbeddingCache) -> None:
        cache.put(MODEL, {})
        assert cache.known(MODEL, DIMENSIONS, []) == {}

    def test_a_vector_of_another_length_is_ignored_and_replaced(self, cache: EmbeddingCache) -> None:
        cache.put(MODEL, vectors(3, 16))
        assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
        assert cache.known_hashes(MODEL, DIMENSIONS, list(vectors(3))) == set()
        cache.put(MODEL, vectors(3))
        assert len(cache.known(MODEL, DIMENSIONS, list(vectors(3)))) == 3

    def test_statistics_and_purge_go_by_model(self, cache: EmbeddingCache) -> None:
        cache.put(MODEL, vectors(3))
        cache.put(OTHER_MODEL, vectors(2))
        counted = {kept.fingerprint: (kept.answers, kept.bytes) for kept in cache.statistics()}
        assert counted == {MODEL: (3, 3 * 68), OTHER_MODEL: (2, 2 * 68)}
        assert cache.purge([MODEL]) == 3
        assert [kept.fingerprint for kept in cache.statistics()] == [OTHER_MODEL]
        assert cache.purge() == 2
        assert cache.statistics() == []

    def test_two_who_write_the_same_do_not_wait_for_each_other_in_a_ring(self, cache: EmbeddingCache) -> None:
        put = vectors(500)
        failed: list[Exception] = []

        def write(order: list[bytes]) -> None:
            try:
                for _ in range(5):
                    cache.put(MODEL, {digest: put[digest] for digest in order})
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=[order]) for order in (list(put), list(put)[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(cache.known(MODEL, DIMENSIONS, list(put))) == 500


class TestInPostgres:
    def test_a_damaged_value_is_ignored(self, database: Database) -> None:
        cache, put = PostgresCache(database), vectors(2)
        cache.put(MODEL, put)
        damage = (
            "UPDATE embeddings.embedding_cache SET embedding = set_byte(embedding, 20, get_byte(embedding, 20) # 1)"
        )
        execute(database, f"{damage} WHERE content_hash = %s", [next(iter(put))])
        assert len(cache.known(MODEL, DIMENSIONS, list(put))) == 1

    def test_a_vector_is_read_beside_its_row(self, database: Database) -> None:
        PostgresCache(database).put(MODEL, vectors(10, 1536))
        toasted = """SELECT pg_relation_size(reltoastrelid) FROM pg_class
                     WHERE oid = 'embeddings.embedding_cache'::regclass"""
        assert execute(database, toasted) == [(0,)]

    def test_what_is_older_than_the_days_is_swept(self, database: Database, settings: Settings) -> None:
        cache = PostgresCache(database)
        cache.put(MODEL, vectors(5))
        old = "UPDATE embeddings.embedding_cache SET written_at = now() - interval '31 days' WHERE content_hash < %s"
        execute(database, old, [(3).to_bytes(16, "big")])
        assert sweep(database, settings.model_copy(update={"embedding_cache_days": 0})) == 0
        assert sweep(database, settings) == 3
        assert cache.statistics()[0].answers == 2

    def test_a_read_only_database_is_still_read(self, database: Database) -> None:
        cache, put = PostgresCache(database), vectors(2)
        cache.put(MODEL, put)
        execute(database, f"ALTER DATABASE {database.parts['dbname']} SET default_transaction_read_only = on")
        database._close_pool()
        assert len(cache.known(MODEL, DIMENSIONS, list(put))) == 2


class TestInRedis:
    def test_an_answer_goes_after_its_days(self, redis: RedisServer, in_redis: RedisCache) -> None:
        in_redis.put(MODEL, vectors(1))
        [key] = redis.client.keys()
        assert 29 * 86_400 < redis.client.ttl(key) <= 30 * 86_400
        open_redis(redis.url, 0).put(MODEL, vectors(1))
        assert redis.client.ttl(key) == -1

    def test_another_programs_keys_are_never_touched(self, redis: RedisServer, in_redis: RedisCache) -> None:
        redis.client.set("another program's", "value")
        in_redis.put(MODEL, vectors(3))
        assert in_redis.purge() == 3
        assert redis.client.get("another program's") == b"value"

    def test_what_another_program_has_under_our_names_is_no_vector(
        self, redis: RedisServer, in_redis: RedisCache
    ) -> None:
        first, second, third = vectors(3)
        redis.client.rpush(f"{PREFIX}{MODEL}:{first.hex()}", "a list")
        redis.client.set(f"{PREFIX}{MODEL}:{second.hex()}", b"x" * 68)
        redis.client.set(f"{PREFIX}no model of ours", "a text")
        in_redis.put(MODEL, {third: vectors(3)[third]})
        assert set(in_redis.known(MODEL, DIMENSIONS, [first, second, third])) == {third}
        assert {kept.fingerprint: kept.answers for kept in in_redis.statistics()} == {MODEL: 2, "no model of ours": 1}
        in_redis.put(MODEL, vectors(3))  # whatever was there
        assert len(in_redis.known(MODEL, DIMENSIONS, [first, second, third])) == 3

    def test_a_redis_that_is_down_is_told_once_and_costs_nothing(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_cache, "LEFT_ALONE_SECONDS", 0.0)
        cache = open_redis(f"redis://:hunter2@127.0.0.1:{redis_server.free_port()}/0", 30)
        for _ in range(3):
            cache.put(MODEL, vectors(3))
            assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
        [warning] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert "127.0.0.1" in warning and "going on without" in warning
        assert "hunter2" not in warning
        with pytest.raises(OutageError, match="EMBEDDING_CACHE_URL"):
            cache.statistics()
        with pytest.raises(OutageError, match="EMBEDDING_CACHE_URL"):
            cache.purge()

    def test_one_that_comes_back_is_used_again(
        self, skip_without: Callable[[str, bool], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        port = redis_server.free_port()
        with redis_server.redis_server(tmp_path, port=port) as first:
            cache = open_redis(first.url, 30)
            cache.put(MODEL, vectors(3))
            first.stop()
            assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
        with redis_server.redis_server(tmp_path, port=port):
            cache.put(MODEL, vectors(3))
            assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}  # left alone for a while
            monkeypatch.setattr(cache, "_left_alone_until", {"read": 0.0, "written": 0.0})
            cache.put(MODEL, vectors(3))
            assert len(cache.known(MODEL, DIMENSIONS, list(vectors(3)))) == 3

    def test_one_that_is_full_is_told_once(
        self, skip_without: Callable[[str, bool], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        with redis_server.redis_server(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as full:
            cache = open_redis(full.url, 30)
            for seed in range(3):
                cache.put(MODEL, vectors(3000, 512, seed))
        assert len([record for record in caplog.records if "OutOfMemory" in record.message]) == 1
        assert len(caplog.records) == 1

    def test_one_that_is_read_only_is_still_read(
        self,
        skip_without: Callable[[str, bool], None],
        tmp_path: Path,
        redis: RedisServer,
        in_redis: RedisCache,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        in_redis.put(MODEL, vectors(3))
        with redis_server.redis_server(tmp_path, "--replicaof", f"127.0.0.1 {redis.port}") as replica:
            redis_server.wait_until(lambda: replica.client.dbsize() == 3)
            cache = open_redis(replica.url, 30)
            cache.put(MODEL, vectors(5))
            assert len(cache.known(MODEL, DIMENSIONS, list(vectors(5)))) == 3
        assert len(caplog.records) == 1 and "ReadOnly" in caplog.records[0].message

    def test_what_is_no_redis_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            answering = threading.Thread(target=_answer_html, args=[listening], daemon=True)
            answering.start()
            cache = open_redis(f"redis://127.0.0.1:{listening.getsockname()[1]}/0", 30)
            assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
            cache.put(MODEL, vectors(3))
        assert len(caplog.records) == 1

    def test_a_password_is_in_the_address(
        self, skip_without: Callable[[str, bool], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        with redis_server.redis_server(tmp_path) as server:
            server.client.config_set("requirepass", "hunter2")
            cache = open_redis(f"redis://:hunter2@127.0.0.1:{server.port}/0", 30)
            cache.put(MODEL, vectors(3))
            assert len(cache.known(MODEL, DIMENSIONS, list(vectors(3)))) == 3
            open_redis(f"redis://:hunter3@127.0.0.1:{server.port}/0", 30).put(MODEL, vectors(3))
        [warning] = [record.message for record in caplog.records]
        assert "hunter" not in warning

    def test_tls_is_spoken_with_whom_the_certificate_names_and_with_nobody_else(
        self, skip_without: Callable[[str, bool], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        skip_without("openssl", shutil.which("openssl") is not None)
        put, made = vectors(3), redis_server.certificate(tmp_path)
        with redis_server.redis_server(tmp_path, certificate=made) as server:
            server.client.config_set("requirepass", "hunter2")
            url = server.url.replace("://", "://:hunter2@")
            cache = open_redis(url, 30)
            cache.put(MODEL, put)
            assert len(cache.known(MODEL, DIMENSIONS, list(put))) == 3
            assert [kept.answers for kept in cache.statistics()] == [3]
            assert not caplog.records
            untrusted, misnamed = url.partition("?")[0], url.replace("127.0.0.1", "localhost")
            in_clear = untrusted.replace("rediss:", "redis:")
            for other in (untrusted, misnamed, in_clear):
                assert open_redis(other, 30).known(MODEL, DIMENSIONS, list(put)) == {}
        warnings = [record.message for record in caplog.records]
        assert [("CERTIFICATE_VERIFY_FAILED" in one, "hunter2" in one) for one in warnings] == [
            (True, False),
            (True, False),
            (False, False),
        ]

    def test_a_server_without_tls_is_told_once(
        self, redis: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_cache, "TIMEOUT_SECONDS", 3.0)
        cache = open_redis(redis.url.replace("redis:", "rediss:"), 30)
        began = time.monotonic()
        cache.put(MODEL, vectors(3))
        assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
        assert time.monotonic() - began < 5.5  # one wait
        assert len(caplog.records) == 1

    def test_an_old_version_that_knows_no_hello_is_used(
        self, skip_without: Callable[[str, bool], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        unknown = ["--rename-command", "HELLO", "", "--rename-command", "CLIENT", ""]
        with redis_server.redis_server(tmp_path, *unknown) as server:
            cache = open_redis(server.url, 30)
            cache.put(MODEL, vectors(3))
            assert len(cache.known(MODEL, DIMENSIONS, list(vectors(3)))) == 3
        assert not caplog.records

    def test_one_that_hangs_is_told_once_and_left_alone(
        self,
        skip_without: Callable[[str, bool], None],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        skip_without("redis-server", redis_server.is_there())
        monkeypatch.setattr(redis_cache, "TIMEOUT_SECONDS", 0.3)
        with redis_server.redis_server(tmp_path) as server:
            cache = open_redis(server.url, 30)
            cache.put(MODEL, vectors(3))
            server.process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            for _ in range(20):
                assert cache.known(MODEL, DIMENSIONS, list(vectors(3))) == {}
                cache.put(MODEL, vectors(3))
            assert time.monotonic() - began < 5  # not 40 waits
        assert len(caplog.records) == 1

    @pytest.mark.parametrize(
        "url",
        [
            "http://host",
            "host:6379",
            "redis://:secret@host:x/0",
            "redis://host:99999",
            "redis://host?a=secret",
            "redis://:secret@host?protocol=7",
            "redis://:secret@host?ssl_ca_certs=/ca.pem",
            "rediss://:secret@host?ssl_cert_reqs=secret",
        ],
    )
    def test_what_is_no_address_is_refused_in_one_line(self, database: Database, url: str) -> None:
        settings = Settings(embedding_cache_url=url)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="EMBEDDING_CACHE_URL") as raised:
            open_cache(database, settings)
        assert "secret" not in str(raised.value)


def _answer_html(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n<html>")


def test_a_packed_value_is_a_checksum_and_two_bytes_a_dimension() -> None:
    assert {len(value) for value in pack(vectors(5)).values()} == {4 + 2 * DIMENSIONS}
