"""Who is at work on a collection, and how far: noted while it lasts, so that `status` can tell it from anywhere."""

import getpass
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

import psycopg

from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_lock, run_locked
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted

LIVE = "live"  # what a process is called that follows changes as they come
TELL_SECONDS = 2.0  # between two notes of how far it is …
PHASE_SECONDS = 0.5  # … and, if it has come to another phase


@dataclass(frozen=True)
class Activity:
    """Work that is under way."""

    id: str
    collection: str
    what: str
    who: str
    started_at: datetime
    phase: str
    done: int  # texts
    total: int  # 0: not known


@contextmanager
def activity(
    database: Database, collection: str, what: str, who: str | None = None, run_id: str | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Note that this process is at work, until the block ends or the process does: `progress(phase, done, total)`.

    `run_id`: of a run that holds its lock already. Work goes on if it cannot be noted.
    """
    number = run_id or f"activity {uuid.uuid4()}"
    last, told = "", time.monotonic() - TELL_SECONDS

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last, told
        if time.monotonic() - told < (TELL_SECONDS if phase == last else PHASE_SECONDS):
            return
        last, told = phase, time.monotonic()
        _execute(database, "tell_activity", {"id": number, "phase": phase, "done": done, "total": total})

    def note() -> None:
        _forget_dead(database, collection)
        _execute(
            database,
            "begin_activity",
            {"id": number, "collection": collection, "what": what, "who": who or this_process()},
        )

    try:
        if run_id is not None:
            note()
            yield progress
        else:
            with run_lock(database, number):
                note()
                yield progress
    finally:
        _execute(database, "end_activities", {"ids": [number]})


def under_way(database: Database, collection: str) -> list[Activity]:
    """Who is at work on a collection now, the longest first. Writes nothing."""
    return [each for each, alive in _activities(database, collection) if alive]


def described(each: Activity) -> str:
    """For people: `sync by anna@host, process 4711, since 12:00:01 UTC: embedding, 300 of 1,200 texts`."""
    far = f", {each.done:,} of {counted(each.total, 'text')}" if each.total else ""
    return f"{each.what} by {each.who}, since {each.started_at:%H:%M:%S %Z}: {each.phase}{far}"


def this_process() -> str:
    """Whose process this is, for people: `anna@host, process 4711`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"


def _activities(database: Database, collection: str) -> list[tuple[Activity, bool]]:
    with database.session() as connection:
        rows = connection.execute(load_sql("health/activities"), {"collection": collection}).fetchall()
        return [(Activity(*row), run_locked(connection, row[0])) for row in rows]


def _forget_dead(database: Database, collection: str) -> None:
    with suppress(PipelineError, psycopg.Error):
        dead = [each.id for each, alive in _activities(database, collection) if not alive]
        if dead:
            _execute(database, "end_activities", {"ids": dead})


def _execute(database: Database, statement: str, parameters: dict[str, object]) -> None:
    """What is told of the work must not stop it."""
    cleaned = {name: clean(value) if isinstance(value, str) else value for name, value in parameters.items()}
    with suppress(PipelineError, psycopg.Error), database.session() as connection:
        connection.execute(load_sql(f"health/{statement}"), cleaned)
