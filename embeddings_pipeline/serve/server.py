"""The process: uvicorn on a socket of ours, connections that say nothing closed, requests answered before it ends."""

import asyncio
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.serve.app import make_app
from embeddings_pipeline.serve.gate import BODY_SECONDS
from embeddings_pipeline.serve.options import ServeOptions, listen
from embeddings_pipeline.serve.service import Service
from embeddings_pipeline.store.database import join_database, open_database_to_read

MOST_CONNECTIONS = 500
KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep an idle connection: who closes first, never fails
END_SECONDS = 30  # for requests under way when it is to end
SAME_LINE_SECONDS = 60.0
SWITCH_SECONDS = 0.001  # after which a thread hands Python's lock on: the event loop waits for searches less long


class Protocol(H11Protocol):
    """HTTP as uvicorn has it; a connection that begins a request, or none at all, has only so long to send its head."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # it is there
            self._forget_head()
        elif self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(BODY_SECONDS, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Server(uvicorn.Server):
    """uvicorn's server; a signal ends it well, and is not raised again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # no other gets signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class OncePerMinute(logging.Filter):
    """Lets the same line through once a minute: searches repeat their warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        line, now = record.getMessage(), time.monotonic()
        for old in [each for each, at in self._told.items() if now - at > SAME_LINE_SECONDS]:
            del self._told[old]
        return self._told.setdefault(line, now) == now or record.exc_info is not None


def run_server(options: ServeOptions, settings: Settings, started: Callable[[str], None]) -> bool:
    """Serve until SIGTERM or SIGINT; `started` is told the address. Whether all has ended: if not, a thread is stuck.

    ConfigurationError if the port is taken, DatabaseError if there was never an embedded database.
    """
    listening = listen(options)
    sys.setswitchinterval(SWITCH_SECONDS)
    with listening:
        open_database_to_read(settings)
        use = join_database(settings)
        try:
            service = Service(settings, options.at_once)
            started(address_of(listening))
            make_server(make_app(service, options.key)).run(sockets=[listening])
            return service.close()
        finally:
            use.leave()


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return _Server(config)
