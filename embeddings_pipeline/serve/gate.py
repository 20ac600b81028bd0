"""What each request has to pass before anything reads it, and who ends it when its client has left.

One ASGI layer around the whole service: the key, the host that a browser was led to, the size and slowness of a body,
and figures of what was answered.
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embeddings_pipeline.serve.answers import Failure
from embeddings_pipeline.serve.looks import FILES
from embeddings_pipeline.serve.metrics import LEFT, Metrics

LARGEST_BODY = 4 << 20  # a condition may have 100,000 values
BODY_SECONDS = 10.0  # in which a body has to come
# What tells nothing of what is kept here.
OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json", "/docs/oauth2-redirect", *FILES})
OPEN_FOLDER = "/static-offline-docs/"
SEARCHES = {"/search", "/similar", "/recommend", "/map", "/collections"}
NAMED = OPEN | SEARCHES | {"/metrics", "/mcp"}  # with figures of their own
LOCAL_NAMES = ("localhost", "")


class _LeftError(Exception):
    """The client has left before its request was whole."""


@dataclass(eq=False)
class Refusal(Exception):
    """Why a request is not let in."""

    failure: Failure
    headers: tuple[tuple[str, str], ...] = ()


class Gate:
    """The layer; `key`: what requests have to show, None for requests of this machine alone."""

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = None if key is None else _written(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, answer = time.perf_counter(), _Sent(send)
        try:
            self._check(scope)
            body = await _body(scope, receive)
            await _while_client_stays(self._app, scope, body, receive, answer)
        except Refusal as refusal:
            response = refusal.failure.answer()
            response.headers.update(dict(refusal.headers))
            await response(scope, receive, answer)
        except _LeftError:
            answer.status = LEFT
        finally:
            path = scope["path"] if scope["path"] in NAMED else "other"
            self._metrics.answered(path, answer.status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])  # of several with one name, the last
        if self._keys is None:
            if not _is_local(headers.get(b"host", b"")):
                raise Refusal(Failure(421, "this service is for programs of its own machine: ask 127.0.0.1"))
        elif not _is_open(scope["path"]) and not _matches(self._shown(headers), self._keys):
            wanted = "this service wants its key: send the header `Authorization: Bearer KEY`"
            raise Refusal(Failure(401, wanted), (("WWW-Authenticate", "Bearer"),))

    @staticmethod
    def _shown(headers: dict[bytes, bytes]) -> bytes:
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        return shown.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _written(key: str) -> tuple[bytes, ...]:
    """What clients may send for a key: what is not ASCII is UTF-8 with some, Latin-1 with others."""
    latin = key.encode("latin-1", "ignore")
    return (key.encode(), latin) if latin.decode("latin-1") == key else (key.encode(),)


def _matches(shown: bytes, keys: Iterable[bytes]) -> bool:
    """In a time that says nothing of how much of it was right."""
    same = [hmac.compare_digest(shown, key) for key in keys]
    return any(same)


def _is_local(host: bytes) -> bool:
    """Whether a request names this machine: a browser that a page led here names that page's host."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    try:
        return name in LOCAL_NAMES or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Sent:
    """Passes an answer on, and knows its status and whether it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.whole = 500, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Refusal if it is too large or does not come."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = Refusal(Failure(413, f"the body is longer than {LARGEST_BODY >> 20} MiB"), (("Connection", "close"),))
    if declared.isdigit() and int(declared[:20]) > LARGEST_BODY:
        raise too_large
    parts, length = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _LeftError
                parts.append(message.get("body", b""))
                length += len(parts[-1])
                if length > LARGEST_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        slow = f"the body did not come within {BODY_SECONDS:.0f} s"
        raise Refusal(Failure(408, slow), (("Connection", "close"),)) from None


async def _while_client_stays(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, answer: _Sent) -> None:
    """Have the request answered. _LeftError if the client leaves before that: then it is cancelled."""
    left = asyncio.ensure_future(_leaving(receive))
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.shield(left)
        return {"type": "http.disconnect"}

    answering = asyncio.ensure_future(app(scope, replay, answer))
    try:
        await asyncio.wait({answering, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and not answer.whole:
            answering.cancel()
            await asyncio.wait({answering})
            raise _LeftError
        await answering
    finally:
        answering.cancel()
        left.cancel()


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
