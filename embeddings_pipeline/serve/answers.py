"""What goes back: JSON with every digit, and of errors a status and one line, never a traceback or a place in here."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import simplejson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from embeddings_pipeline.errors import (
    BudgetError,
    ConfigurationError,
    DatabaseError,
    NotFoundError,
    OutageError,
    PipelineError,
    ProfileError,
    VectorIndexError,
)
from embeddings_pipeline.serve.searches import TooManyError
from embeddings_pipeline.store.retry import what_it_says

log = logging.getLogger(__name__)

BUSY_SECONDS, OUTAGE_SECONDS, BUDGET_SECONDS = 1, 5, 600  # what `Retry-After` says
ALTERNATIVE = re.compile(r"(function|list|union)[\w-]*\[.*\]")  # which pydantic tried, beside fields' names
MOST_MISTAKES = 3  # that one answer names
# What a client can do nothing about: the log has the whole line.
OUTAGES: tuple[tuple[type[Exception], str, int], ...] = (
    (DatabaseError, "the database cannot be used just now", OUTAGE_SECONDS),
    (psycopg.Error, "the database cannot be used just now", OUTAGE_SECONDS),
    (ProfileError, "the collection's model cannot be used just now", OUTAGE_SECONDS),
    (OutageError, "the collection's model cannot be asked just now", OUTAGE_SECONDS),
    (BudgetError, "the budget for the collection's model is spent", BUDGET_SECONDS),
    (VectorIndexError, "FAISS's files cannot be used just now: ask with `index` left out", OUTAGE_SECONDS),
    (PipelineError, "this cannot be answered just now", OUTAGE_SECONDS),
)
ERRORS = (PipelineError, psycopg.Error)


class Answer(Response):
    """JSON with every digit of a number; what JSON has no form for, such as a time, as text."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content).encode("utf-8", "backslashreplace")


def as_json(content: Any) -> str:
    return simplejson.dumps(content, ensure_ascii=False, default=str, use_decimal=True, ignore_nan=True)


@dataclass(frozen=True)
class Failure:
    """A status, one line for the client, and after how many seconds another try makes sense."""

    status: int
    line: str
    retry_after: int | None = None

    def answer(self) -> Answer:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return Answer({"error": self.line}, self.status, headers)


def failure_of(error: Exception) -> Failure:
    """What a client is told of an error. What the operator has to know besides goes to the log."""
    if isinstance(error, TooManyError):
        return Failure(429, _line(error), BUSY_SECONDS)
    if isinstance(error, NotFoundError):
        return Failure(404, _line(error))
    if isinstance(error, ConfigurationError):
        return Failure(422, _line(error))
    for kind, line, seconds in OUTAGES:
        if isinstance(error, kind):
            log.error("error: %s", what_it_says(error) if isinstance(error, psycopg.Error) else _line(error))
            return Failure(503, line, seconds)
    return Failure(500, "something went wrong here: the server's log says what")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


async def on_error(request: Request, error: Exception) -> Response:
    return failure_of(error).answer()


async def on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with that method."""
    assert isinstance(error, HTTPException)
    line = f"{request.method} {request.url.path}: {error.detail.lower()}; /docs says what there is"
    return Answer({"error": " ".join(line.split())}, error.status_code, error.headers)


async def on_mistakes(request: Request, error: Exception) -> Response:
    """A body that is not what it may be."""
    assert isinstance(error, RequestValidationError)
    return Failure(422, told_mistakes(error.errors())).answer()


def told_mistakes(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic found, in one line."""
    told = list(dict.fromkeys(map(_mistake, mistakes)))
    more = f"; and {len(told) - MOST_MISTAKES} more" if len(told) > MOST_MISTAKES else ""
    return "; ".join(told[:MOST_MISTAKES]) + more


def _mistake(mistake: Mapping[str, Any]) -> str:
    parts = (str(part) for part in mistake["loc"] if part != "body")
    where = ".".join(part[:50] for part in parts if not ALTERNATIVE.fullmatch(part))
    if mistake["type"] == "json_invalid":
        return f"the body is not JSON: {mistake['ctx']['error']} at character {where}"
    if not where:
        return "the body has to be a JSON object, sent as `Content-Type: application/json`"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    return " ".join(f"{where}: {mistake['msg'].removeprefix('Value error, ')}".split())
