"""OpenAI's Batch API as a server speaks it: a file of texts goes up, a batch is begun, and files of answers come down.

Each text is a request of its own in the file, named by its job and its content hash, so that it is answered, refused or
left by itself, and no answer is taken for another's; that costs no more than several in one. Nothing here knows the
database: `batch_jobs.py` does.
"""

import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.api import EmbeddingApi, RefusedInputsError, ServiceOutageError
from embeddings_pipeline.encoders.outage import is_outage
from embeddings_pipeline.encoders.rate import account_of
from embeddings_pipeline.errors import OutageError, PipelineError, ProfileError

if TYPE_CHECKING:
    from openai.types import Batch

MOST_TEXTS, MOST_BYTES = 50_000, 190_000_000  # of a file: 50,000 inputs and requests, and 200 MB
HOURS = 24  # within which a batch ends
LISTED = 100  # batches that are listed at once
ANSWER_SECONDS = 15.0  # for which a question is waited for: a sensor asks, which has a minute; files have the profile's
JOB = "embeddings_pipeline_job"  # what a batch's metadata call the job that it is
JOB_DIGITS = 8  # of a job, in the name of each of its requests
DIGEST_BYTES = 16
LINES_AT_ONCE = 500  # of a file of answers
NO_API = (404, 405, 501)  # of a server that knows files and batches not at all
NO_REASON = "the server does not say why"
# What JSON leaves as it is, and some take for the end of a line.
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
ENDED = ("completed", "failed", "expired", "cancelled")

T = TypeVar("T")


class NoSuchBatchError(PipelineError):
    """The server has no batch, or no file, of that name."""


@dataclass(frozen=True)
class RemoteBatch:
    """What a server says of a batch."""

    name: str
    state: str
    done: int = 0  # texts
    output_file: str | None = None
    error_file: str | None = None
    errors: str | None = None  # why it failed, in the server's words

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Line(NamedTuple):
    """What became of one text: a vector, or why it has none. `refused`: it was refused, or its answer is of no use, so
    that another job would end the same.
    """

    digest: bytes
    vector: NDArray[np.float32] | None = None
    tokens: int | None = None  # billed
    why: str | None = None
    refused: bool = False


class BatchApi:
    """The server of a profile, from `with` on. ProfileError, OutageError of its methods as `EmbeddingApi` has them."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        self.profile = profile
        self._api = EmbeddingApi(profile, settings)
        self._enabled = settings.embedding_enabled is not False
        self._runner = asyncio.Runner()

    @property
    def account(self) -> str:
        return account_of(self._api.url, self._api.secret)

    @property
    def place(self) -> str:
        return self._api.place

    def __enter__(self) -> Self:
        if not self._enabled:
            raise ProfileError(
                f"Profile {self.profile.name}: EMBEDDING_ENABLED=false forbids every request to {self.place}; unset it "
                "to go on"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _apart(self._runner.run, self._api.close())
        _apart(self._runner.close)

    def line(self, job: str, digest: bytes, text: str) -> bytes:
        """A text as the file of a job has it; `text` with its prompt."""
        request = {
            "custom_id": f"{job[:JOB_DIGITS]}-{digest.hex()}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": self._api.body(self.profile.model, [text]),
        }
        line = json.dumps(request, ensure_ascii=False)
        for end, escaped in LINE_ENDS.items():
            line = line.replace(end, escaped)
        return line.encode() + b"\n"

    def upload(self, path: Path) -> str:
        """The server's name for the file."""

        async def send() -> str:
            with path.open("rb") as file:
                made = await self._api.connected().files.create(
                    file=(path.name, file, "application/jsonl"), purpose="batch", extra_headers=self._api.headers
                )
            return _name(made.id)

        return self._said(send(), "files")

    def create(self, input_file: str, job: str) -> RemoteBatch:
        """Begin a batch of a file. After an outage it may have begun all the same: `find` says."""

        async def begin() -> RemoteBatch:
            batch = await self._api.connected().batches.create(
                input_file_id=input_file,
                endpoint="/v1/embeddings",
                completion_window="24h",
                metadata={JOB: job},
                extra_headers=self._api.headers,
                timeout=ANSWER_SECONDS,
            )
            return self._remote(batch)

        return self._said(begin(), "batches")

    def find(self, job: str, input_file: str | None, since: datetime) -> RemoteBatch | None:
        """The batch that was begun as this job, by its metadata, which not every server keeps, or by its file, which no
        other has; those from before `since` are not looked at.
        """

        async def search() -> RemoteBatch | None:
            listed = self._api.connected().batches.list(
                limit=LISTED, extra_headers=self._api.headers, timeout=ANSWER_SECONDS
            )
            async for batch in listed:
                if (batch.created_at or math.inf) < since.timestamp():
                    return None
                if (batch.metadata or {}).get(JOB) == job or batch.input_file_id == input_file:
                    return self._remote(batch)
            return None

        return self._said(search(), "batches")

    def look(self, name: str) -> RemoteBatch:
        """What the server says of a batch; NoSuchBatchError if it knows none of that name."""

        async def look() -> RemoteBatch:
            batches, headers = self._api.connected().batches, self._api.headers
            return self._remote(await batches.retrieve(name, extra_headers=headers, timeout=ANSWER_SECONDS))

        return self._said(look(), "batches", name)

    def cancel(self, name: str) -> RemoteBatch:
        """Have the server end a batch; what it has answered until then stays, and is paid for."""

        async def end() -> RemoteBatch:
            batches, headers = self._api.connected().batches, self._api.headers
            return self._remote(await batches.cancel(name, extra_headers=headers, timeout=ANSWER_SECONDS))

        return self._said(end(), "batches", name)

    def download(self, name: str, path: Path) -> None:
        """Write a file of answers to `path`; NoSuchBatchError if the server has it no longer."""

        async def receive() -> None:
            files = self._api.connected().files.with_streaming_response
            async with files.content(name, extra_headers=self._api.headers) as response:
                await response.stream_to_file(path)

        self._said(receive(), "files", name)

    def read(self, path: Path, job: str) -> Iterator[list[Line]]:
        """The lines of a file of answers, some at a time; what is no line of the job's is left out."""
        with path.open("rb") as file:
            while lines := list(islice(file, LINES_AT_ONCE)):
                yield [each for line in lines if (each := self._read(line, job)) is not None]

    def _read(self, line: bytes, job: str) -> Line | None:
        try:
            said = json.loads(line)
            of, _, digits = said["custom_id"].partition("-")
            digest = bytes.fromhex(digits)
            response = said.get("response") or {}
            status, body, error = response.get("status_code"), response.get("body"), said.get("error")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut, or another's
            return None
        if of != job[:JOB_DIGITS] or len(digest) != DIGEST_BYTES:
            return None
        if type(status) is not int:
            return Line(digest, why=self._api.clean(_in_words(error)))
        try:
            if status != 200:
                raise self._refusal(status, body)
            answer = self._api.answer_of(body, 1)
        except RefusedInputsError as refusal:
            return Line(digest, why=str(refusal), refused=True)
        except PipelineError as failure:  # not the text's fault
            billed = failure.billed if isinstance(failure, ServiceOutageError) else None
            return Line(digest, tokens=billed, why=str(failure), refused=status == 200)
        return Line(digest, answer.vectors[0], answer.tokens)

    def _refusal(self, status: int, body: Any) -> Exception:
        import httpx2
        import openai

        said = body.get("error", body) if isinstance(body, Mapping) else body
        response = httpx2.Response(status, request=httpx2.Request("POST", self._api.url))
        return self._api.refusal(openai.APIStatusError("", response=response, body=said), self.profile.model)

    def _said(self, work: Coroutine[Any, Any, T], what: str, name: str | None = None) -> T:
        """What the server answers, or its error in our words; `name`: of the batch or file that it is asked for."""
        import httpx2
        import openai

        try:
            return _apart(self._runner.run, work)
        except openai.APIStatusError as error:
            if error.status_code == 404 and name is not None:
                if isinstance(error.body, Mapping):
                    raise NoSuchBatchError(f"{self.place} knows no {name}") from None
                raise OutageError(
                    f"Profile {self.profile.name}: {self.place}/{what} answered 404 with what is no answer of its API"
                ) from None
            if error.status_code in NO_API:
                raise ProfileError(
                    f"Profile {self.profile.name}: {self.place} answered {error.status_code} to /{what}: it has no "
                    "Batch API; leave `api: batch` out"
                ) from None
            refused = self._api.refusal(error, self.profile.model)
            if isinstance(refused, RefusedInputsError):
                raise ProfileError(f"Profile {self.profile.name}: {self.place} refuses the batch: {refused}") from None
            raise refused from None
        except (openai.APIConnectionError, httpx2.TransportError) as error:
            raise self._api.unreachable(error) from None
        except OSError as error:
            if not is_outage(error):  # of our own file
                raise
            raise self._api.unreachable(error) from None
        except (openai.OpenAIError, httpx2.HTTPError, ValueError, AttributeError, TypeError) as error:  # half, a page
            raise OutageError(
                f"Profile {self.profile.name}: {self.place}/{what} gave an answer that cannot be read "
                f"({type(error).__name__})"
            ) from None

    def _remote(self, batch: "Batch") -> RemoteBatch:
        said = [f"{each.code}: {each.message}" for each in (batch.errors.data if batch.errors else None) or ()]
        counts = batch.request_counts
        done = sum(getattr(counts, name, None) or 0 for name in ("completed", "failed"))
        words = self._api.clean("; ".join(said)) or None
        files = (batch.output_file_id or None, batch.error_file_id or None)
        return RemoteBatch(_name(batch.id), _name(batch.status), done, *files, words)


@contextmanager
def room_for_file(collection: str | None) -> Iterator[Path]:
    """A folder for a file of texts or answers; OutageError if it cannot be written there."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        raise OutageError(
            f"collection {collection!r}: the file of a batch job cannot be written to the system's temporary folder: "
            f"{error.strerror or type(error).__name__}; make room there, or set TMPDIR to a folder that has it"
        ) from error


def _name(value: Any) -> str:
    """What a server calls a file, a batch or a state; ValueError if it is no name."""
    if not (isinstance(value, str) and value):
        raise ValueError("no name")
    return value


def _in_words(error: Any) -> str:
    """What the file says of a request that has no response."""
    said = [error.get("code"), error.get("message")] if isinstance(error, Mapping) else [error]
    return ": ".join(str(each) for each in said if each) or NO_REASON


def _apart(call: Callable[..., T], *arguments: Any) -> T:
    """The call's result; from a thread of its own if an event loop runs in this one, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call(*arguments)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *arguments).result()
