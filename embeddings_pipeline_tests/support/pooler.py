"""Programs between a client and PostgreSQL: a pooler, and a network that may fall silent."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.urls import url_of

ENCRYPTION = {80877103, 80877104}  # what a client asks for before its startup message: SSLRequest, GSSENCRequest
ANSWERED = b"QScf"  # Query, Sync, CopyDone, CopyFail: what ReadyForQuery follows


@dataclass
class _Session:
    """A session with the server, and what the server said when it began."""

    socket: socket.socket
    file: BinaryIO
    hello: bytes


class Pooler:
    """Lends a session of the server for one transaction, as PgBouncer does with `pool_mode = transaction`; or, with
    `by_session`, for as long as a client stays.

    One user and one database. `freeze` lets it take in what comes and pass nothing on, as a network that is gone.
    """

    def __init__(self, database: Database, *, by_session: bool = False, port: int = 0) -> None:
        parts = database.parts
        self._server = f"{parts['host']}/.s.PGSQL.{parts.get('port', 5432)}"
        self._by_session = by_session
        self._idle: list[_Session] = []
        self._mutex = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = url_of(parts | {"host": "127.0.0.1", "port": str(self._listener.getsockname()[1])})
        threading.Thread(target=self._accept, daemon=True).start()

    def database(self, database: Database) -> Database:
        """The database as it is reached through the pooler."""
        return replace(database, url=self.url, server=None)

    def freeze(self) -> None:
        self._flows.clear()

    def close(self) -> None:
        self._flows.set()
        self._listener.close()
        for session in self._idle:
            session.socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client, client.makefile("rb") as file:
            startup = _startup(client, file)
            session = self._take(startup)
            self._flows.wait()
            client.sendall(session.hello)
            held: _Session | None = session
            if not self._by_session:
                self._give(session)
                held = None
            while True:
                kind, message = _message(file)
                self._flows.wait()
                if kind == b"X":
                    break
                held = held or self._take(startup)
                held.socket.sendall(message)
                if kind in ANSWERED and self._answer(client, held) and not self._by_session:
                    self._give(held)
                    held = None

    def _answer(self, client: socket.socket, session: _Session) -> bool:
        """Pass on what the server answers; whether the transaction has ended."""
        while True:
            kind, reply = _message(session.file)
            self._flows.wait()
            client.sendall(reply)
            if kind in b"GZ":  # the client goes on with its COPY, or with its next statement
                return reply[5:6] == b"I" and kind == b"Z"

    def _take(self, startup: bytes) -> _Session:
        with self._mutex:
            if self._idle:
                return self._idle.pop()
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._server)
        server.sendall(startup)
        file, hello, kind = server.makefile("rb"), b"", b""
        while kind != b"Z":
            kind, message = _message(file)
            hello += message
            if kind == b"E":
                raise EOFError
        return _Session(server, file, hello)

    def _give(self, session: _Session) -> None:
        with self._mutex:
            self._idle.append(session)


def _startup(client: socket.socket, file: BinaryIO) -> bytes:
    while True:
        length = file.read(4)
        message = length + file.read(struct.unpack("!I", length)[0] - 4)
        if struct.unpack("!I", message[4:8])[0] not in ENCRYPTION:
            return message
        client.sendall(b"N")


def _message(file: BinaryIO) -> tuple[bytes, bytes]:
    head = file.read(5)
    if len(head) < 5:
        raise EOFError
    return head[:1], head + file.read(struct.unpack("!I", head[1:])[0] - 4)


@contextmanager
def pooler(database: Database, *, by_session: bool = False) -> Iterator[Pooler]:
    made = Pooler(database, by_session=by_session)
    try:
        yield made
    finally:
        made.close()
