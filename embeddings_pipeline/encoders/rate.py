"""How many requests and tokens a minute go to a hosted model: a token bucket in PostgreSQL, one for each model of an
account, which all runs, workers and machines on one database share.

The statements are in sql/rate.sql. A request takes its share before it is sent, in one short transaction, and is told
how long to wait; nobody holds a transaction or a lock while waiting, and of a process one request asks at a time. Times
are the database's. What the server itself permits, as its headers say, counts where it is less.

pyrate-limiter has a bucket in PostgreSQL too, and does not serve here. It keeps a row for each unit of weight, so a
million tokens a minute are a million rows; it locks the whole table, and whoever does not get that lock at once is
refused and asks again and again; and it gives out a whole minute's in its first second.
"""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import errors

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.api import ServiceOutageError
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.database import Database, one_line, open_database, was_used
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

REQUESTS_PER_MINUTE = 500  # if nobody says otherwise
SHARE_AT_ONCE = 0.0099  # of a minute's tokens: larger requests are spaced, see sql/schema/0010_hosted.sql
AHEAD = 1.0  # seconds by which a request is taken before it is due, so that a query waits for no longer queue
LONGEST_SLEEP = 10.0  # before the bucket is asked again

_NOT_OURS = (  # who only searches may not write here, or has a database without these tables
    errors.InsufficientPrivilege,
    errors.ReadOnlySqlTransaction,
    errors.UndefinedFunction,
    errors.InvalidSchemaName,
)


class Rate:
    """The bucket of a profile's account. Its methods block: call them in a thread."""

    def __init__(self, profile: Profile, settings: Settings, url: str, key: str) -> None:
        """`url` and `key` make the account; neither is kept."""
        self._who, self._settings = f"Profile {profile.name}", settings
        self.account = account_of(url, key)
        self._requests, self._tokens = rates(profile, settings)
        self._server: dict[str, float] = {}  # what the headers said: limit-requests, limit-tokens
        self._database: Database | None = None
        self._is_shared = True

    @property
    def limits_requests(self) -> bool:
        """Whether it is worth while to send few."""
        return bool(self._requests or self._server.get("limit-requests"))

    @property
    def most_tokens(self) -> float:
        """Of one request."""
        return tokens_a_request(
            _least(self._requests, self._server.get("limit-requests")),
            _least(self._tokens, self._server.get("limit-tokens")),
        )

    def take(self, model: str, tokens: float) -> float:
        """Take a request and its tokens: how many seconds to wait before it is sent, or, below zero, before asking
        again. ServiceOutageError if the database fails."""
        if not (self._requests or self._tokens or self._server):
            return 0.0
        limits = {"requests_per_minute": self._requests, "tokens_per_minute": self._tokens}
        row = self._execute("rate/take", {"model": model, "tokens": tokens, "most_wait": AHEAD, **limits})
        return float(row[0]) if row else 0.0

    def settle(self, model: str, more_tokens: float, headers: Mapping[str, str], closed: float | None = None) -> None:
        """What an answer said: how many tokens more were billed than taken, the server's limits, and how long it says
        to wait."""
        said = {
            f"{what}-{kind}": value
            for what in ("limit", "remaining")
            for kind in ("requests", "tokens")
            if (value := _number(headers.get(f"x-ratelimit-{what}-{kind}"))) is not None
        }
        self._server = {name: value for name, value in said.items() if name.startswith("limit") and value > 0}
        if not (self._server or closed or (self._tokens and more_tokens)):
            return
        values = {
            "model": model,
            "more_tokens": more_tokens,
            "tokens_per_minute": self._tokens,
            "limit_requests": self._server.get("limit-requests"),
            "limit_tokens": self._server.get("limit-tokens"),
            "left_requests": said.get("remaining-requests"),
            "left_tokens": said.get("remaining-tokens"),
            "closed": closed,
        }
        self._execute("rate/settle", values)

    def _execute(self, statement: str, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        if not self._is_shared:
            return None
        try:
            if self._database is None:
                if not was_used(self._settings):  # nobody is there to share it with
                    return None
                self._database = open_database(self._settings)
            with self._database.session() as connection:
                return connection.execute(load_sql(statement), {"account": self.account, **values}).fetchone()
        except _NOT_OURS as error:
            self._is_shared = False
            said = error.diag.message_primary
            log.warning("%s: no rate is shared with others, for this user may not: %s", self._who, said)
            return None
        except (psycopg.Error, DatabaseError) as error:
            raise ServiceOutageError(f"{self._who}: the rate cannot be asked for: {one_line(error)}") from error


def account_of(url: str, key: str) -> str:
    """Whom a server bills: tells addresses and keys apart, and holds neither."""
    return hashlib.blake2b(f"{url}\0{key}".encode(), digest_size=8).hexdigest()


async def taken(rate: Rate, turn: asyncio.Lock, model: str, tokens: float) -> None:
    """Take a request and its tokens, and wait until they are due. Of a process, one request asks at a time."""
    async with turn:
        while (wait := await asyncio.to_thread(rate.take, model, tokens)) < 0:
            await asyncio.sleep(min(max(0.05, -wait - AHEAD / 2), LONGEST_SLEEP))
    if wait > 0:
        await asyncio.sleep(wait)


def rates(profile: Profile, settings: Settings) -> tuple[float | None, float | None]:
    """Requests and tokens a minute that a profile may send; None: no limit."""
    return (
        _first(profile.requests_per_minute, settings.embedding_requests_per_minute, REQUESTS_PER_MINUTE),
        _first(profile.tokens_per_minute, settings.embedding_tokens_per_minute),
    )


def tokens_a_request(requests: float | None, tokens: float | None) -> float:
    """How many tokens go in one request at these limits a minute: few, so that the rate is even, but so many that the
    permitted requests suffice for the permitted tokens.
    """
    return tokens * max(SHARE_AT_ONCE, 1 / requests if requests else 0.0) if tokens else float("inf")


def _least(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit), default=None)


def _first(*limits: int | None) -> float | None:
    """The first that is given, as a number; 0 is none."""
    limit = next((limit for limit in limits if limit is not None), 0)
    return float(limit) or None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
