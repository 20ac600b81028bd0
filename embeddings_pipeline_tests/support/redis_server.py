"""A real Redis for a test: `redis-server` of the system's packages, in memory alone, on a free port of loopback.

With a certificate (`certificate(folder)`, which the program openssl makes) it speaks TLS and nothing else.
"""

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


@dataclass(frozen=True)
class Certificate:
    """Of 127.0.0.1, signed by itself: whoever trusts the public file trusts the server."""

    public: Path
    private: Path


@dataclass
class RedisServer:
    """A running server. `client` is the test's own session."""

    process: subprocess.Popen[bytes]
    port: int
    client: redis.Redis
    certificate: "Certificate | None" = None

    @property
    def url(self) -> str:
        if self.certificate is None:
            return f"redis://127.0.0.1:{self.port}/0"
        return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificate.public}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(
    folder: Path, *options: str, port: int | None = None, certificate: Certificate | None = None
) -> Iterator[RedisServer]:
    """Until the block ends; options as on its command line."""
    port = port or free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    if certificate is None:
        command += ["--port", str(port)]
        client = redis.Redis(port=port, protocol=2)
    else:
        command += ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
        command += ["--tls-cert-file", str(certificate.public), "--tls-key-file", str(certificate.private)]
        client = redis.Redis(host="127.0.0.1", port=port, protocol=2, ssl=True, ssl_ca_certs=str(certificate.public))
    with (folder / "redis.log").open("ab") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    server = RedisServer(process, port, client, certificate)
    try:
        wait_until(lambda: _answers(server))
        yield server
    finally:
        server.stop()


def certificate(folder: Path, days: int = 1) -> Certificate:
    """A new one in the folder, good from now on for so many days."""
    made = Certificate(folder / "redis.crt", folder / "redis.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", str(days), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(made.public), "-keyout", str(made.private)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return made


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


def _answers(server: RedisServer) -> bool:
    with suppress(redis.ConnectionError):
        return bool(server.client.ping())
    return False
