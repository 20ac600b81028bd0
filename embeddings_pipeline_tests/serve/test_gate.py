"""Who is let in, and what happens to requests that are not whole."""

import contextlib
import re
import socket
import time
from typing import Any

import httpx
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.serve import gate, server
from embeddings_pipeline.serve.options import ServeOptions, checked_options, listen
from embeddings_pipeline_tests.support.serving import Serving, serving

KEY = "Schlüssel-£-0123456789"
PATHS = ("/search", "/similar", "/collections", "/metrics", "/mcp", "/nothing")


def test_without_its_key_nobody_is_told_anything(served: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with serving(served, key=KEY) as service, httpx.Client(base_url=service.url, trust_env=False) as client:
        for shown in (
            b"",
            b"Bearer",
            b"Bearer x",
            b"Bearer " + KEY.encode()[:-1],
            KEY.encode(),
            b"Basic eDp5",
            b"\xff",
        ):
            for path in PATHS:
                answer = client.post(path, headers={b"Authorization": shown}, json={"query": "x"})
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert list(answer.json()) == ["error"] and KEY not in answer.text
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        for named, shown in (
            (b"Authorization", b"Bearer " + KEY.encode()),
            (b"Authorization", b"bearer " + KEY.encode("latin-1")),
            (b"X-API-Key", KEY.encode()),
        ):
            assert client.get("/collections", headers={named: shown}).status_code == 200
        assert client.get("/collections", headers={b"X-API-Key": b"\xc3\x9f", b"Host": b"x"}).status_code == 401
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "10.0.0.1:8000"]
)
def test_a_page_that_names_this_machine_as_its_own_host_is_not_answered(served: Settings, host: str) -> None:
    with serving(served) as service, service.client() as client:
        assert client.get("/collections", headers={"Host": host}).status_code == 421
        for local in ("localhost:9", "127.0.0.1", "[::1]:8000", "127.0.0.2"):
            assert client.get("/collections", headers={"Host": local}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", ""])
def test_no_other_address_than_this_machines_own_without_a_key(settings: Settings, host: str) -> None:
    with pytest.raises(ConfigurationError, match="set SERVE_API_KEY") as caught:
        checked_options(host, 8000, 1, settings)
    assert "\n" not in str(caught.value)
    keyed = settings.model_copy(update={"serve_api_key": KEY})
    assert checked_options(host, 8000, 1, keyed).key == KEY
    assert KEY not in f"{keyed} {checked_options(host, 8000, 1, keyed)}"


@pytest.mark.parametrize("key", ["", " ", "a\nb", " key", "key\t", "a\udcffb", "\u200b"])
def test_a_key_that_no_header_carries_is_refused(settings: Settings, key: str) -> None:
    with pytest.raises(ConfigurationError, match=r"SERVE_API_KEY is blank.*openssl rand") as caught:
        checked_options("127.0.0.1", 8000, 1, settings.model_copy(update={"serve_api_key": key}))
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line(settings: Settings) -> None:
    with listen(ServeOptions(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 cannot be used .*--port {port + 1}"):
            listen(ServeOptions(port=port))
    for host in ("203.0.113.1", "no such host", "", "x" * 300):
        with pytest.raises(ConfigurationError, match="name an address of this machine") as caught:
            listen(ServeOptions(host=host))
        assert "\n" not in str(caught.value)


HEAD = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


def said(connection: socket.socket) -> bytes:
    """All that it says until it closes the connection; `closed` if that is nothing."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts) or b"closed"


@pytest.fixture
def hasty(served: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A service that waits for half a second only."""
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.5)
    with serving(served) as service:
        yield service


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b"closed"),
        (b"POST /sea", b"closed"),
        (HEAD[:-2], b"closed"),
        (HEAD, b"408"),
        (HEAD + b'{"query": "x"', b"408"),
        (HEAD.replace(b"100", b"99999999999"), b"413"),
        (b"\x00\xff\x00\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 100_000, b"400"),
    ],
)
def test_half_a_request_is_given_up_and_hinders_nobody(hasty: Serving, sent: bytes, answer: bytes) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
        connection.sendall(sent)
        assert hasty.post("/search", query="a story", k=3).status_code == 200
        first = said(connection)
    assert answer in first[:20] and time.monotonic() - began < 10
    assert not hasty.service.searches.under_way


def test_a_client_that_leaves_within_its_request_leaves_nothing(hasty: Serving) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
            connection.sendall(HEAD + b'{"query": "x"')
    assert hasty.post("/search", query="a story", k=3).status_code == 200
    assert re.search(r'requests_total\{path="/search",status="499"\} 20', hasty.get("/metrics").text)


def test_a_connection_serves_one_request_after_the_other(hasty: Serving) -> None:
    with hasty.client() as client:
        for _ in range(3):
            assert client.post("/search", json={"query": "a story"}).status_code == 200
            time.sleep(0.7)  # it is idle for longer than a request may be half
    assert len(hasty.get("/metrics").text) > 100
