"""What is tried again, and how long that waits: an outage is waited for, anything else is not (rule 7)."""

from collections.abc import Iterator

import psycopg
import stamina

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.database import one_line

OUTAGE_ATTEMPTS = 3
OUTAGE_FIRST_WAIT_SECONDS, OUTAGE_WAIT_FACTOR = 2.0, 4.0  # 2 s, then 8 s


def is_outage(error: Exception) -> bool:
    """Whether a connection or a statement failed since the server ended it or went away; another try may mend that."""
    if isinstance(error, psycopg.OperationalError):
        return error.sqlstate is None or error.sqlstate.startswith(("08", "57P"))  # 08: so say poolers
    return isinstance(error, DatabaseError)


def what_it_says(error: psycopg.Error) -> str:
    """One line for people."""
    return f"the database says: {error.diag.message_primary or one_line(error)}"


def outage_attempts(*also: type[Exception]) -> Iterator[stamina.Attempt]:
    """Attempts at something that an outage of the database, or an error of the kinds `also`, may stop:

    for attempt in outage_attempts():
        with attempt:
            ...

    The last attempt's error is raised. stamina logs each wait.
    """
    yield from stamina.retry_context(
        on=lambda error: is_outage(error) or isinstance(error, also),
        attempts=OUTAGE_ATTEMPTS,
        timeout=None,
        wait_initial=OUTAGE_FIRST_WAIT_SECONDS,
        wait_max=60,
        wait_jitter=0,
        wait_exp_base=OUTAGE_WAIT_FACTOR,
    )
