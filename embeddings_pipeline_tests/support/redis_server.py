"""A real Redis for a test: `redis-server` of the system's packages, in memory alone, on a free port of loopback."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from embeddings_pipeline_tests.support.workbench import wait_until


def is_there() -> bool:
    return shutil.which("redis-server") is not None


@dataclass
class RedisServer:
    """A running server. `client` is the test's own session."""

    process: subprocess.Popen[bytes]
    port: int
    client: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(folder: Path, *options: str, port: int | None = None) -> Iterator[RedisServer]:
    """Until the block ends; options as on its command line."""
    port = port or free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with (folder / "redis.log").open("ab") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    server = RedisServer(process, port, redis.Redis(port=port))
    try:
        wait_until(lambda: _answers(server))
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


def _answers(server: RedisServer) -> bool:
    with suppress(redis.ConnectionError):
        return bool(server.client.ping())
    return False
