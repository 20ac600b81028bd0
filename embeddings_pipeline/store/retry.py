"""What is tried again, and how long that waits: an outage is waited for, anything else is not (rule 7)."""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psycopg

from embeddings_pipeline.errors import DatabaseError

if TYPE_CHECKING:
    import stamina

log = logging.getLogger(__name__)

OUTAGE_ATTEMPTS = 3
OUTAGE_FIRST_WAIT_SECONDS, OUTAGE_WAIT_FACTOR = 2.0, 4.0  # 2 s, then 8 s


def is_outage(error: Exception) -> bool:
    """Whether a connection or a statement failed since the server ended it or went away; another try may mend that."""
    if isinstance(error, psycopg.OperationalError):
        return error.sqlstate is None or error.sqlstate.startswith(("08", "57P"))  # 08: so say poolers
    return isinstance(error, DatabaseError)


def comes_of_outage(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is an outage."""
    while error is not None:
        if isinstance(error, Exception) and is_outage(error):
            return True
        error = error.__cause__
    return False


def what_it_says(error: psycopg.Error) -> str:
    """One line for people."""
    return f"the database says: {' '.join((error.diag.message_primary or str(error)).split())}"


def outage_attempts(name: str, *kinds: type[Exception]) -> "Iterator[stamina.Attempt]":
    """Attempts of the collection `name` at something that errors of these kinds may stop for a while:

    for attempt in outage_attempts("items", OutageError):
        with attempt:
            ...

    Each wait is told. The last attempt's error is raised.
    """
    import stamina  # a search has no use for it

    attempts = 0

    def waits(error: Exception) -> bool:
        nonlocal attempts
        attempts += 1
        if not isinstance(error, kinds):
            return False
        if attempts < OUTAGE_ATTEMPTS:
            _tell(name, attempts, error)
        return True

    yield from stamina.retry_context(
        on=waits,
        attempts=OUTAGE_ATTEMPTS,
        timeout=None,
        wait_initial=OUTAGE_FIRST_WAIT_SECONDS,
        wait_max=60,
        wait_jitter=0,
        wait_exp_base=OUTAGE_WAIT_FACTOR,
    )


def wait_for_outage(name: str, attempt: int, error: Exception) -> None:
    """Say what failed in the collection `name`, and wait before the next attempt: for work that counts its attempts
    anew whenever it got on, which stamina's loop does not.
    """
    _tell(name, attempt, error)
    time.sleep(_wait_seconds(attempt))


def _tell(name: str, attempt: int, error: Exception) -> None:
    said = what_it_says(error) if isinstance(error, psycopg.Error) else error
    log.warning("collection %r: %s; trying again in %s s", name, said, _wait_seconds(attempt))


def _wait_seconds(attempt: int) -> float:
    return OUTAGE_FIRST_WAIT_SECONDS * OUTAGE_WAIT_FACTOR ** (attempt - 1)
