"""A server that speaks OpenAI's protocol for embeddings over real HTTP on loopback, counts what it bills, and fails on
command.

with EmbeddingServer() as server:
    profile = Profile(name="hosted", provider="openai", model="text-embedding-3-small", dimensions=1536, url=server.url)
    server.fail("status", times=3, status=429, headers={"retry-after-ms": "50"})
    ...
    assert server.billed["a text"] == 1

Of itself, from another process (`python -m embeddings_pipeline_tests.support.embedding_server`): it prints its URL, and
GET /counts gives `EmbeddingServer.counts()` as JSON; POST /faults takes what `fail` takes; POST /forget begins to count
anew.

Its files and batches: `batch_server.py`. A token is four bytes of a text. A vector depends on the text, the model and
the number of dimensions alone, so that an answer that is matched with another text is seen. A text with the word POISON
is refused, as one over 8,192 tokens is, and more than 2,048 inputs or 300,000 tokens a request.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import json
import math
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline_tests.support.arrivals import worst_window
from embeddings_pipeline_tests.support.batch_server import BATCH_FAULTS, FILE_FAULTS, Batches, BatchRoutes

MODELS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
MOST_INPUTS, MOST_TOKENS, MOST_TOKENS_TOGETHER = 2048, 8192, 300_000
POISON = "POISON"

FAULTS = (
    "status",  # `status` (429), with `headers` and `body`; nothing is billed
    "close",  # the connection is closed without an answer; nothing is billed
    "silent",  # no answer for `seconds` (60); nothing is billed
    "slow",  # the answer comes in pieces over `seconds` (1)
    "cut",  # the connection is closed in the middle of the answer
    "half",  # half of the JSON, as if that were all
    "html",  # a page, with 200
    "redirect",  # 307 to `location`
    "short",  # an answer too few
    "long",  # an answer too many
    "reorder",  # the last first, each with its own index: a good answer
    "duplicate",  # one index twice
    "dimension",  # vectors that are one number shorter
    "nan",
    "zeros",
    "float",  # numbers instead of base64: a good answer
)


def tokens_of(text: str) -> int:
    """As this server counts them."""
    return max(1, math.ceil(len(text.encode()) / 4))


def vector_of(text: str, model: str, dimensions: int) -> NDArray[np.float32]:
    """The vector that the server gives: unit length, float32 of shape (dimensions,)."""
    digest = hashlib.blake2b(f"{model} {dimensions} {text}".encode(), digest_size=8).digest()
    vector = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(dimensions, dtype=np.float32)
    return vector / np.float32(np.linalg.norm(vector))


class EmbeddingServer:
    """The server, from `with` on. Its attributes may be changed while it runs."""

    def __init__(self, *, latency: float = 0.0, key: str | None = None, models: Mapping[str, int] = MODELS) -> None:
        self.latency, self.key, self.models = latency, key, dict(models)
        self.requests_per_minute: int | None = None  # what it permits, and says in its headers
        self.tokens_per_minute: int | None = None
        self.echo_key = False  # whether a 401 holds the whole key
        self.most_inputs = MOST_INPUTS
        self.batches = Batches(self._answered)
        self.forget()
        self._faults: deque[dict[str, Any]] = deque()
        self._lock = threading.Lock()
        handler = functools.partial(_Handler, self)
        self._http = _Http(("127.0.0.1", 0), handler)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Count from the beginning."""
        self.billed: Counter[str] = Counter()  # how often each text was billed
        self.tokens_billed = 0
        self.requests = 0
        self.refused = 0  # answers that were no 200
        self.headers: list[dict[str, str]] = []  # of the last requests, names in lower case
        self.bodies: deque[dict[str, Any]] = deque(maxlen=20)  # of the last requests
        self.arrivals: list[tuple[float, int, int]] = []  # when, tokens, texts: of what was answered with 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "EmbeddingServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, kind: str, *, times: int = 1, **options: Any) -> None:
        """Answer the next `times` requests with a fault of FAULTS; several calls queue up."""
        assert kind in FAULTS, kind
        with self._lock:
            self._faults.extend({"kind": kind, **options} for _ in range(times))

    def _answered(self, body: Mapping[str, Any]) -> tuple[int, Any, int]:
        """A request of a batch: status, body and tokens, which are billed."""
        try:
            texts, dimensions = _checked(self, body, None if self.key is None else f"Bearer {self.key}")
        except _Refusal as refusal:
            return refusal.status, refusal.body, 0
        tokens = sum(map(tokens_of, texts))
        self.bill(texts, tokens)
        return 200, _answer(body, texts, dimensions, tokens, None), tokens

    def faults_left(self) -> int:
        return len(self._faults)

    def counts(self) -> dict[str, Any]:
        """What it has counted so far."""
        of_batches = self.batches.counts()  # whose lock is taken before ours, where a batch is billed
        with self._lock:
            arrivals = list(self.arrivals)
            first, last = (arrivals[0][0], arrivals[-1][0]) if arrivals else (0.0, 0.0)
            return {
                "requests": self.requests,
                "refused": self.refused,
                "texts": sum(self.billed.values()),
                "distinct": len(self.billed),
                "twice": sum(number > 1 for number in self.billed.values()),
                "tokens": self.tokens_billed,
                "seconds": last - first,
                "worst_minute": worst_window(arrivals, 60.0),
                "faults_left": len(self._faults),
                **of_batches,
            }

    def next_fault(self) -> dict[str, Any] | None:
        with self._lock:
            return self._faults.popleft() if self._faults else None

    def note(self, body: dict[str, Any], headers: Mapping[str, str]) -> None:
        with self._lock:
            self.requests += 1
            self.bodies.append(body)
            self.headers = [*self.headers[-19:], {name.lower(): value for name, value in headers.items()}]

    def note_refused(self) -> None:
        with self._lock:
            self.refused += 1

    def bill(self, texts: Sequence[str], tokens: int) -> None:
        with self._lock:
            self.billed.update(texts)
            self.tokens_billed += tokens
            self.arrivals.append((time.monotonic(), tokens, len(texts)))

    def over_limit(self, tokens: int) -> dict[str, str] | None:
        """The headers of a 429 if this request would be over a limit in the last 60 s; else None."""
        with self._lock:
            since = time.monotonic() - 60
            recent = [(moment, count) for moment, count, _ in self.arrivals if moment > since]
        for limit, used in (
            (self.requests_per_minute, len(recent) + 1),
            (self.tokens_per_minute, sum(count for _, count in recent) + tokens),
        ):
            if limit is not None and used > limit and recent:
                return {"retry-after-ms": str(int(1000 * (recent[0][0] - since)) + 1)}
        return None

    def rate_headers(self) -> dict[str, str]:
        with self._lock:
            since = time.monotonic() - 60
            recent = [(moment, count) for moment, count, _ in self.arrivals if moment > since]
        headers = {}
        for name, limit, used in (
            ("requests", self.requests_per_minute, len(recent)),
            ("tokens", self.tokens_per_minute, sum(count for _, count in recent)),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = f"{60 * used / limit:.3f}s"
        return headers


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever goes away in the middle is no news."""


class _Refusal(Exception):
    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "insufficient_quota" if code == "insufficient_quota" else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Handler(BatchRoutes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, owner: EmbeddingServer, *args: Any) -> None:
        self.owner = owner
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/counts":
            self._json(200, self.owner.counts())
        elif not self.get_of_batches(self.path):
            self._html(404)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/faults":
            fault = json.loads(raw)
            (self.owner.batches.fail if fault["kind"] in BATCH_FAULTS + FILE_FAULTS else self.owner.fail)(**fault)
            self._json(200, {})
        elif self.post_of_batches(self.path, raw):
            pass
        elif self.path == "/forget":
            self.owner.forget()
            self._json(200, {})
        elif urlsplit(self.path).path != "/v1/embeddings":  # a proxy is asked for a whole address
            self._html(404)
        else:
            self._embeddings(json.loads(raw))

    def _embeddings(self, body: dict[str, Any]) -> None:
        owner = self.owner
        owner.note(body, dict(self.headers.items()))
        if owner.latency:
            time.sleep(owner.latency)
        fault = owner.next_fault() or {"kind": None}
        if self._failed_before(fault):
            return
        try:
            texts, dimensions = _checked(owner, body, self.headers.get("Authorization"))
        except _Refusal as refusal:
            self._json(refusal.status, refusal.body)
            return
        tokens = sum(map(tokens_of, texts))
        if (headers := owner.over_limit(tokens)) is not None:
            self._json(429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}, headers)
            return
        owner.bill(texts, tokens)
        answer = _answer(body, texts, dimensions, tokens, fault["kind"])
        self._send(fault, json.dumps(answer).encode(), owner.rate_headers())

    def _failed_before(self, fault: Mapping[str, Any]) -> bool:
        """Whether the fault comes in the place of an answer."""
        match fault["kind"]:
            case "status":
                status = fault.get("status", 429)
                body = fault.get("body", {"error": {"message": f"failed with {status}", "code": None}})
                self._json(status, body, fault.get("headers", {}))
            case "close":
                self._close()
            case "silent":
                time.sleep(fault.get("seconds", 60))
                self._close()
            case "html":
                self._html(200)
            case "redirect":
                self._json(307, {}, {"Location": fault["location"]})
            case _:
                return False
        return True

    def _send(self, fault: Mapping[str, Any], body: bytes, headers: Mapping[str, str]) -> None:
        kind = fault["kind"]
        if kind == "half":
            body = body[: len(body) // 2]
        self._head(200, "application/json", len(body), headers)
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._close()
        elif kind == "slow":
            for start in range(0, len(body), max(1, len(body) // 10)):
                self.wfile.write(body[start : start + max(1, len(body) // 10)])
                time.sleep(fault.get("seconds", 1) / 10)
        else:
            self.wfile.write(body)

    def _json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, "application/json", len(body), headers or {})
        self.wfile.write(body)

    def _html(self, status: int) -> None:
        body = b"<!DOCTYPE html><html><body><h1>It works!</h1></body></html>"
        self._head(status, "text/html", len(body), {})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, length: int, headers: Mapping[str, str]) -> None:
        if status != 200:
            self.owner.note_refused()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _close(self) -> None:
        self.close_connection = True
        self.owner.note_refused()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _checked(owner: EmbeddingServer, body: Mapping[str, Any], authorization: str | None) -> tuple[list[str], int]:
    """The texts and the number of dimensions of a request; _Refusal as OpenAI words it."""
    if owner.key is not None and authorization != f"Bearer {owner.key}":
        said = authorization if owner.echo_key else "sk-***"
        raise _Refusal(401, f"Incorrect API key provided: {said}.", code="invalid_api_key")
    model = body["model"]
    if model not in owner.models:
        raise _Refusal(404, f"The model `{model}` does not exist.", code="model_not_found", param="model")
    dimensions = body.get("dimensions", owner.models[model])
    if dimensions > owner.models[model] or ("dimensions" in body and model == "text-embedding-ada-002"):
        raise _Refusal(400, "This model does not support specifying dimensions.", param="dimensions")
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    if not texts or len(texts) > owner.most_inputs:
        status = 400 if owner.most_inputs == MOST_INPUTS else 413
        raise _Refusal(status, f"Invalid 'input': maximum array length {owner.most_inputs}.", param="input")
    if not all(texts):
        raise _Refusal(400, "Invalid 'input': input cannot be an empty string.", param="input")
    longest = max(map(tokens_of, texts))
    if longest > MOST_TOKENS:
        said = f"This model's maximum context length is {MOST_TOKENS} tokens, however you requested {longest} tokens."
        raise _Refusal(400, said)
    if any(POISON in text for text in texts):
        raise _Refusal(400, "Your input was rejected by the safety system.", code="content_policy_violation")
    if (together := sum(map(tokens_of, texts))) > MOST_TOKENS_TOGETHER:
        said = f"Requested {together} tokens, max {MOST_TOKENS_TOGETHER} tokens per request"
        raise _Refusal(400, said, code="max_tokens_per_request")
    return texts, dimensions


def _answer(
    body: Mapping[str, Any], texts: Sequence[str], dimensions: int, tokens: int, fault: str | None
) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    data = list(_data(body, texts, dimensions, fault))
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}


def _data(body: Mapping[str, Any], texts: Sequence[str], dimensions: int, fault: str | None) -> Iterator[Any]:
    if fault == "short":
        texts = texts[:-1]
    elif fault == "long":
        texts = [*texts, texts[0]]
    numbered = list(enumerate(texts))
    for index, text in reversed(numbered) if fault == "reorder" else numbered:
        vector = vector_of(text, body["model"], dimensions)
        if fault == "nan":
            vector[0] = np.nan
        elif fault == "zeros":
            vector[:] = 0
        elif fault == "dimension":
            vector = vector[:-1]
        base64_wanted = body.get("encoding_format") == "base64" and fault != "float"
        embedding = base64.b64encode(vector.tobytes()).decode() if base64_wanted else vector.tolist()
        yield {"object": "embedding", "index": 0 if fault == "duplicate" else index, "embedding": embedding}


def main() -> None:
    parser = argparse.ArgumentParser(description="A server that speaks OpenAI's protocol for embeddings.")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    with EmbeddingServer(latency=parser.parse_args().latency) as server:
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
