"""The files and batches of the tests' embedding server: OpenAI's Batch API over real HTTP, with faults on command.

    server.batches.fail("expire")
    server.batches.seconds = 0.5        # from a batch's beginning until it is looked at as completed

A batch is worked off, and billed, when somebody looks at it after that time. Faults are of the next batch, but for
those of FILE_FAULTS, which are of the next file that is read.
"""

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

BATCH_FAULTS = (
    "fail",  # refused as a whole: too many tokens are waiting already
    "expire",  # after half of its texts
    "some",  # every third text is answered with 500
    "missing",  # every third text is not in any file
    "duplicates",  # each answer twice
    "others",  # beside its own, answers that nobody asked for, and lines that are none
    "odd",  # each third answer is one that no server gives
    "nan",  # each third vector is no number
    "lost",  # the server knows nothing of it as soon as it has begun it
    "cut create",  # it begins, and the connection is closed without an answer
    "refused create",  # 500, and it does not begin
    "no credit",  # 429 with insufficient_quota, and it does not begin
)
FILE_FAULTS = (
    "no file",  # 404
    "page file",  # a page of HTML in its place
    "half file",  # half of it, as if that were all
    "cut file",  # the connection is closed in the middle
)
MOST_INPUTS, MOST_BYTES = 50_000, 200_000_000
NO_LINES = (
    "no JSON",
    "[" * 100_000,
    "5",
    '{"custom_id": 7}',
    '{"custom_id": "abc"}',
    '{"custom_id": "' + "00" * 16 + '"}',
)
ODD: tuple[tuple[Any, Any], ...] = (  # status, body
    ("200", {}),
    ([1], {}),
    (10**6, None),
    (200, {"data": [{"index": 0, "embedding": [10**400]}], "usage": {"total_tokens": 10**30}}),
    (404, "<html>"),
    (None, None),
)

NO_BATCH = {"error": {"message": "No such batch.", "code": None}}

Answer = Callable[[Mapping[str, Any]], tuple[int, Any, int]]
"""Request → status, body, and the tokens billed."""


class Batches:
    """Files and batches by their names. `answer` answers and bills one request."""

    def __init__(self, answer: Answer) -> None:
        self.seconds = 0.0
        self.latency = 0.0  # of what is asked, but for files
        self.most_tokens: int | None = None  # that wait together
        self.nameless = False  # whether what it makes has no name
        self.served = True  # else as a server that has no Batch API
        self.pages = False  # whether a page is all that it answers
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.uploads = 0
        self._answer = answer
        self._faults: deque[str] = deque()
        self._file_faults: deque[str] = deque()
        self._lock = threading.RLock()
        self._number = itertools.count(1)

    def fail(self, kind: str, *, times: int = 1) -> None:
        """The next `times` batches, or files, have this fault; several calls queue up."""
        assert kind in BATCH_FAULTS + FILE_FAULTS, kind
        (self._file_faults if kind in FILE_FAULTS else self._faults).extend([kind] * times)

    def counts(self) -> dict[str, Any]:
        with self._lock:
            states = [batch["status"] for batch in self.batches.values()]
            return {"batches": len(states), "uploads": self.uploads, "states": states}

    def upload(self, content: bytes) -> dict[str, Any]:
        with self._lock:
            name = f"file-{next(self._number)}"
            self.files[name] = content
            self.uploads += 1
        told = {"object": "file", "purpose": "batch", "filename": "texts.jsonl", "status": "processed"}
        return {**told, "id": None if self.nameless else name, "bytes": len(content), "created_at": int(time.time())}

    def content(self, name: str) -> tuple[bytes | None, str | None]:
        """A file's bytes, and its fault."""
        with self._lock:
            fault = self._file_faults.popleft() if self._file_faults else None
            return (None if fault == "no file" else self.files.get(name)), fault

    def create(self, body: Mapping[str, Any]) -> tuple[int, Any, bool]:
        """Status, answer, and whether the connection is closed instead."""
        with self._lock:
            fault = self._faults.popleft() if self._faults else None
            if fault == "refused create":
                return 500, {"error": {"message": "The server had an error.", "code": None}}, False
            if fault == "no credit":
                return 429, {"error": {"message": "You exceeded your quota.", "code": "insufficient_quota"}}, False
            if body["input_file_id"] not in self.files:
                return 400, {"error": {"message": f"No such file: {body['input_file_id']}", "code": None}}, False
            batch = {
                **body,
                "id": f"batch_{next(self._number)}",
                "object": "batch",
                "created_at": int(time.time()),
                "status": "in_progress",
                "begun": time.monotonic(),
                "tokens": sum(tokens_of_line(line) for line in self.files[body["input_file_id"]].splitlines()),
            }
            waiting = [other["tokens"] for other in self.batches.values() if other["status"] == "in_progress"]
            if self.most_tokens is not None and sum(waiting) + batch["tokens"] > self.most_tokens:
                fault = "fail"
            batch["fault"] = fault
            if fault != "lost":
                self.batches[batch["id"]] = batch
            shown = _shown(batch) | ({"id": None} if self.nameless else {})
            return 200, shown, fault == "cut create"

    def look(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            batch = self.batches.get(name)
            if batch is None:
                return None
            if batch["status"] == "in_progress" and time.monotonic() >= batch["begun"] + self.seconds:
                self._work_off(batch)
            return _shown(batch)

    def listed(self, after: str | None, limit: int) -> dict[str, Any]:
        with self._lock:
            newest = list(reversed(self.batches.values()))
        names = [batch["id"] for batch in newest]
        start = names.index(after) + 1 if after in names else 0
        page = newest[start : start + limit]
        more = start + limit < len(newest)
        return {"object": "list", "data": [_shown(batch) for batch in page], "has_more": more}

    def cancel(self, name: str) -> tuple[int, Any]:
        """Status and answer."""
        with self._lock:
            batch = self.batches.get(name)
            if batch is None:
                return 404, NO_BATCH
            if batch["status"] != "in_progress" or time.monotonic() >= batch["begun"] + self.seconds:
                return 400, {"error": {"message": "Cannot cancel a batch that has ended.", "code": None}}
            self._work_off(batch, "cancelled")
            return 200, _shown(batch)

    def forget(self, name: str) -> None:
        """As if the server had lost a batch."""
        self.batches.pop(name)

    # --- working it off -----------------------------------------------------------------------------------------

    def _work_off(self, batch: dict[str, Any], ends: str = "completed") -> None:
        content, fault = self.files[batch["input_file_id"]], batch["fault"]
        requests = [json.loads(line) for line in content.splitlines()]
        error = _wrong_with(requests, content)
        if fault == "fail":
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for this model."}
        if error:
            batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
            return
        ends = "expired" if fault == "expire" else ends
        until = len(requests) if ends == "completed" else (len(requests) + 1) // 2
        output: list[str] = []
        errors: list[str] = []
        for place, request in enumerate(requests):
            if place >= until:
                code = {"code": f"batch_{ends}", "message": f"This request was not executed: {ends}."}
                errors.append(_line(request, None, None, code))
            elif not (fault == "missing" and place % 3 == 0):
                self._work_off_one(request, fault if place % 3 == 0 or fault == "duplicates" else None, output, errors)
        if fault == "others":
            _, answer, _ = self._answer({**requests[0]["body"], "input": ["another's"]})
            output += [_line({"custom_id": f"{job}{'00' * 16}"}, 200, answer) for job in ("", "0123abcd-")]
            output += NO_LINES
        counted = (
            len(output)
            - (2 + len(NO_LINES) if fault == "others" else 0)
            - (len(output) // 2 if fault == "duplicates" else 0)
        )
        batch |= {
            "status": ends,
            "output_file_id": self._file(output),
            "error_file_id": self._file(errors),
            "request_counts": {"total": len(requests), "completed": counted, "failed": len(errors)},
        }

    def _work_off_one(
        self, request: Mapping[str, Any], fault: str | None, output: list[str], errors: list[str]
    ) -> None:
        if fault == "some":
            errors.append(_line(request, 500, {"error": {"message": "The server had an error."}}))
            return
        status, body, _ = self._answer(request["body"])
        if fault == "nan" and status == 200:
            body["data"][0]["embedding"] = [float("nan")] * 8
        if fault == "odd":
            status, body = ODD[len(output) // 3 % len(ODD)]
        line = _line(request, status, body)
        (output if status == 200 else errors).extend([line] * (2 if fault == "duplicates" else 1))

    def _file(self, lines: list[str]) -> str | None:
        if not lines:
            return None
        name = f"file-{next(self._number)}"
        self.files[name] = "".join(f"{line}\n" for line in lines).encode()
        return name


class BatchRoutes:
    """What a handler of requests does for /v1/files and /v1/batches; each says whether it was for it."""

    owner: Any
    headers: Any
    wfile: Any
    _json: Callable[..., None]
    _head: Callable[..., None]
    _html: Callable[[int], None]
    _close: Callable[[], None]

    def get_of_batches(self, path: str) -> bool:
        parts, batches = urlsplit(path), self.owner.batches
        where = parts.path.strip("/").split("/")
        if not self._is_for_batches(where):
            return False
        if where[1:2] == ["batches"]:
            time.sleep(batches.latency)
        match where[1:]:
            case ["batches"]:
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                self._json(200, batches.listed(query.get("after"), int(query.get("limit", 20))))
            case ["batches", name]:
                self._found(batches.look(name))
            case ["files", name, "content"]:
                self._content(*batches.content(name))
        return True

    def post_of_batches(self, path: str, raw: bytes) -> bool:
        where, batches = path.strip("/").split("/"), self.owner.batches
        if not self._is_for_batches(where):
            return False
        match where[1:]:
            case ["files"]:
                self._json(200, batches.upload(file_of(raw, self.headers["Content-Type"])))
            case ["batches"]:
                status, answer, is_cut = batches.create(json.loads(raw))
                if is_cut:
                    self._close()
                else:
                    self._json(status, answer)
            case ["batches", name, "cancel"]:
                self._json(*batches.cancel(name))
        return True

    def _is_for_batches(self, where: list[str]) -> bool:
        if where[0] != "v1" or where[1] not in ("files", "batches") or not self.owner.batches.served:
            return False
        if self.owner.key is not None and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            self._json(401, {"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}})
            where[1:] = []  # answered
        elif self.owner.batches.pages:
            self._html(200)
            where[1:] = []
        return True

    def _found(self, value: Any) -> None:
        self._json(404 if value is None else 200, value or NO_BATCH)

    def _content(self, content: bytes | None, fault: str | None) -> None:
        if content is None:
            self._json(404, {"error": {"message": "No such file.", "code": None}})
            return
        if fault == "page file":
            self._html(200)
            return
        sent = content[: len(content) // 2] if fault else content
        self._head(200, "application/octet-stream", len(content if fault == "cut file" else sent), {})
        self.wfile.write(sent)
        if fault == "cut file":
            self._close()


def _wrong_with(requests: list[dict[str, Any]], content: bytes) -> dict[str, str] | None:
    names = {request["custom_id"] for request in requests}
    if len(names) < len(requests):
        return {"code": "duplicate_custom_id", "message": "The custom_id's are not unique."}
    if len(requests) > MOST_INPUTS or len(content) > MOST_BYTES:
        return {"code": "too_many_tasks", "message": f"At most {MOST_INPUTS} inputs and {MOST_BYTES} bytes."}
    return None


def _line(request: Mapping[str, Any], status: int | None, body: Any, error: Any = None) -> str:
    response = None if status is None else {"status_code": status, "request_id": "req", "body": body}
    return json.dumps({"id": "batch_req", "custom_id": request["custom_id"], "response": response, "error": error})


def _shown(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("begun", "fault", "tokens")}


def tokens_of_line(line: bytes) -> int:
    """As `EmbeddingServer` counts them: a token is four bytes of a text."""
    return sum(-(-len(text.encode()) // 4) for text in json.loads(line)["body"]["input"])


def file_of(body: bytes, content_type: str) -> bytes:
    """The one file of a form."""
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    for part in body.split(boundary):
        head, _, rest = part.partition(b"\r\n\r\n")
        if b"filename=" in head:
            return rest.removesuffix(b"\r\n")
    return b""
