"""What was refused or failed, kept in the database until the same step goes well."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

import psycopg

from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.activity import under_way
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.retry import is_outage, what_it_says
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class Failure:
    """A step that failed, and has not gone well since."""

    step: str  # scan, pgvector_index, faiss_index, map, audit; sync: what is none of these
    reason: str
    failed_at: datetime
    age_seconds: float


def failures(database: Database, collection: str) -> list[Failure]:
    """What failed of a collection and is not mended, the oldest first."""
    with database.session() as connection:
        rows = connection.execute(load_sql("health/failures"), {"collection": collection}).fetchall()
    return [Failure(*row) for row in rows]


@dataclass(frozen=True)
class Waiting:
    """Batches that were tried, and are not committed."""

    batches: int
    attempts: int  # the most
    next_try: datetime | None  # by itself, the first; a `sync` tries at once
    reason: str | None  # why the one that was tried last failed


def waiting(database: Database, collection: str) -> Waiting:
    """What waits for its next try, without what is tried for the first time at this moment."""
    parameters = {"collection": collection, "working": bool(under_way(database, collection))}
    with database.session() as connection:
        row = connection.execute(load_sql("health/waiting"), parameters).fetchone()
    assert row is not None
    batches, attempts, next_try, reason = row
    return Waiting(batches, attempts or 0, next_try, reason)


@contextmanager
def failure_kept(database: Database, collection: str, step: str) -> Iterator[None]:
    """Keep why a step fails, for `status` and the check of coverage; if it goes well, forget why it failed before."""
    try:
        yield
    except (PipelineError, psycopg.Error) as error:
        reason = what_it_says(error) if isinstance(error, psycopg.Error) else str(error)
        if not is_outage(error):  # else the database is what failed
            with suppress(PipelineError, psycopg.Error):
                note_failure(database, collection, step, reason)
        raise
    with suppress(PipelineError, psycopg.Error), database.session() as connection:
        connection.execute(load_sql("health/mended"), {"collection": collection, "step": step})


def note_failure(database: Database, collection: str, step: str, reason: str) -> None:
    """Keep why a step failed; nothing is kept of a collection that the database does not know."""
    parameters = {"collection": collection, "step": step, "reason": clean(reason)}
    with database.session() as connection:
        connection.execute(load_sql("health/note_failure"), parameters)
