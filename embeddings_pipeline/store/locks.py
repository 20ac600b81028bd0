"""Every lock that the pipeline takes: the advisory ones by their keys, and those that exclude others from a table.

Every transaction takes them in one order: batches' locks, ascending; rows of `embeddings.model`; the collection's row
of `embeddings.collection`. The collection's own lock is never held together with a batch's. A swap, which holds that
row and then excludes others from the view and the tables, waits for each of these only as long as `exclusively` says.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import psycopg
from psycopg import errors, sql

from embeddings_pipeline.errors import ModelChangeError, OutageError, PipelineError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.sql import load_sql

SCHEMA_KEY = 0x656D6265_64646E67  # "embeddng": of whoever makes or upgrades the schema
SCANNING, INDEXING = -1, -2  # chores of a collection, as claims
COLLECTION = -1  # in a batch's place: the collection's own lock
BUDGET = -2  # as well: of who claims texts under the collection's budget
LOCK_TIMEOUT_MS = 100  # of a statement that excludes others; nobody waits longer behind it, and at first a tenth of it
OLD_MS = 40  # a transaction of that age may last: nobody queues for a lock behind it …
PATIENCE_SECONDS, OLDEST_MS = 10, 1280  # … but if there always is one, that age doubles each time
VACUUM_TIMEOUT_MS = 1200  # if the role may not set `deadlock_timeout`, an autovacuum gives way after a second
LONG_TRIES = 2  # of that length for what may be an autovacuum, or a person's VACUUM, which does not give way
DEADLOCK_TIMEOUT_MS = 50  # shorter than that, or an autovacuum would never give way
LOCK_SECONDS = 600  # tries to get such a lock for so long
GIVE_WAY_SECONDS = 60.0
RUN_LOCK_SECONDS, RUN_LOCK_AGAIN_SECONDS = 15.0, 2.0  # a run's lock is looked after so often; and while it is not held

T = TypeVar("T")


# --- advisory locks ----------------------------------------------------------------------------------------------


def lock_schema(connection: psycopg.Connection) -> None:
    """Until the transaction ends nobody else makes or upgrades the schema."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [SCHEMA_KEY])


def lock_batch(connection: psycopg.Connection, collection: str, batch: int) -> None:
    """Take a batch's lock until the transaction ends."""
    failpoint("batch.lock", batch=batch)
    connection.execute("SELECT pg_advisory_xact_lock(%s, %s::integer)", [_key(f"embeddings/{collection}", 4), batch])


def lock_collection(connection: psycopg.Connection, collection: str) -> None:
    """Take the collection's own lock until the transaction ends."""
    lock_batch(connection, collection, COLLECTION)


def lock_budget(connection: psycopg.Connection, collection: str) -> None:
    """Until the transaction ends nobody else claims texts under the collection's budget."""
    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", [_key(f"embeddings/{collection}", 4), BUDGET])


def batches_in_commit(connection: psycopg.Connection, collection: str) -> set[int]:
    """The batches that a commit is working on now: their locks are held."""
    rows = connection.execute(load_sql("locks/held_batches"), {"lock_class": _key(f"embeddings/{collection}", 4)})
    return {row[0] for row in rows if row[0] < 1 << 31}  # COLLECTION and BUDGET are listed as 2^32 - 1 and - 2


def claim(connection: psycopg.Connection, collection: str, work: int) -> bool:
    """Take a piece of work (a batch, or one of the chores below) for this session until `let_go`, unless another has.

    Only `live` asks, so that of many the first one does it. Nobody waits; a commit takes its batch's lock beside it.
    """
    row = connection.execute("SELECT pg_try_advisory_lock(%s, %s::integer)", [_claims(collection), work]).fetchone()
    return row == (True,)


def let_go(connection: psycopg.Connection, collection: str, work: int) -> None:
    """End a claim of this session."""
    connection.execute("SELECT pg_advisory_unlock(%s, %s::integer)", [_claims(collection), work])


def _claims(collection: str) -> int:
    return _key(f"live/{collection}", 4)


@contextmanager
def run_lock(database: Database, run_id: str) -> Iterator[None]:
    """Hold the session lock that says this run is alive. PostgreSQL lets it go when the process dies, however it dies.

    If the session is lost (a server that is started again, a firewall) while the process lives, it is taken again
    seconds later. A `sync` holds it from before its run is created; the run's own resource then finds it taken, and
    that is fine.
    """
    lock = _RunLock(database, run_id)
    lock.take()
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(RUN_LOCK_SECONDS if lock.held else RUN_LOCK_AGAIN_SECONDS):
            with contextlib.suppress(PipelineError, psycopg.Error):  # until the next round
                lock.take()
        lock.let_go()

    keeping = threading.Thread(target=keep, name=f"run lock {run_id[:8]}", daemon=True)
    keeping.start()
    try:
        yield
    finally:
        ended.set()
        keeping.join(timeout=RUN_LOCK_AGAIN_SECONDS)  # it may be waiting for a server that does not answer


class _RunLock:
    """A run's lock and the session that holds it."""

    def __init__(self, database: Database, run_id: str) -> None:
        self._database, self._run_id = database, run_id
        self._session: psycopg.Connection | None = None
        self.held = False

    def take(self) -> None:
        """Take the lock, or see that it is still held; with a new session if that one was lost."""
        try:
            if self._session is None:
                name = f"embeddings-pipeline run {self._run_id[:8]}"
                self._session = self._database.connect(autocommit=True, application_name=name)
            if self.held:
                self._session.execute("SELECT 1")
            else:
                row = self._session.execute("SELECT pg_try_advisory_lock(%s)", [_run_key(self._run_id)]).fetchone()
                self.held = row == (True,)
        except psycopg.Error:
            self.let_go()
            raise

    def let_go(self) -> None:
        session, self._session, self.held = self._session, None, False
        if session is not None:
            session.close()


def run_locked(connection: psycopg.Connection, run_id: str) -> bool:
    """Whether some process holds the run's liveness lock."""
    row = connection.execute("SELECT pg_try_advisory_lock_shared(%s)", [_run_key(run_id)]).fetchone()
    free = bool(row and row[0])
    if free:
        connection.execute("SELECT pg_advisory_unlock_shared(%s)", [_run_key(run_id)])
    return not free


@contextmanager
def job_lock(database: Database, job: str) -> Iterator[bool]:
    """Within it nobody else works on this batch job; False if somebody does already. It ends with the process."""
    with database.connect(autocommit=True, application_name=f"embeddings-pipeline job {job[:8]}") as connection:
        row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_key(f"job/{job}", 8)]).fetchone()
        yield row == (True,)


def _run_key(run_id: str) -> int:
    return _key(f"run/{run_id}", 8)


def _key(name: str, size: int) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=size).digest(), "big", signed=True)


# --- locks on tables ---------------------------------------------------------------------------------------------
# Loops, and not `retry.py`: each try depends on what was seen before it, and stamina warns of every try, of which there
# are several a second.


@dataclass(frozen=True)
class Exclusive:
    """How a transaction that excludes others went."""

    tries: int
    locked_ms: float  # from the first statement that excludes others to the end: its own waiting, and the removal of
    # files after the locks are released, included
    transaction_ms: float  # all of it


def exclusively(
    database: Database,
    relations: Sequence[sql.Identifier],
    prepare: Callable[[psycopg.Connection], Any],
    statements: Sequence[sql.Composed],
    *,
    seconds: float | None = None,
) -> Exclusive:
    """One transaction: what `prepare` does, and then statements that exclude others from `relations`.

    Waits first until no longer transaction holds a lock there, since whoever came after would wait behind us; then
    tries, with a short `lock_timeout`, again and again. If slow queries follow one another without end, it tries
    among them after a while, more rarely and with a longer one. `prepare` keeps VACUUM out of the tables among them
    (`vacuum_lock`), by a lock that neither readers nor writers wait for. ModelChangeError after `seconds`
    (LOCK_SECONDS).
    """
    seconds = LOCK_SECONDS if seconds is None else seconds
    started = time.monotonic()
    tries = long_tries = 0
    with database.connect(autocommit=True) as connection:
        names = [relation.as_string(connection) for relation in relations]
        while True:
            waited = time.monotonic() - started
            old = min(OLDEST_MS, OLD_MS * 2 ** int(waited / PATIENCE_SECONDS))
            parameters = {"relations": names, "milliseconds": old, "young_unseen": old > OLD_MS}
            [held] = connection.execute(load_sql("locks/holders"), parameters).fetchall()
            older, vacuums, unseen, perhaps_vacuums = held
            if not older:
                tries += 1
                long_tries += perhaps_vacuums > 0
                long = vacuums > 0 or 0 < long_tries <= LONG_TRIES
                with contextlib.suppress(errors.LockNotAvailable, errors.DeadlockDetected):
                    entered = time.perf_counter()
                    with connection.transaction():
                        _short_waits(connection, long)
                        prepare(connection)
                        connection.execute(f"SET LOCAL lock_timeout = {min(LOCK_TIMEOUT_MS, old // 4)}")
                        began = time.perf_counter()
                        for statement in statements:
                            connection.execute(statement)
                    locked, transaction = (1000 * (time.perf_counter() - since) for since in (began, entered))
                    return Exclusive(tries, round(locked, 2), round(transaction, 2))
            if waited > seconds:
                whose = "; GRANT pg_read_all_stats TO the pipeline's role lets it see whose" if unseen else ""
                raise ModelChangeError(
                    f"{', '.join(names)} could not be locked within {seconds:.0f} s: long transactions hold it (see "
                    f"pg_stat_activity{whose}); nothing was changed, try again"
                )
            failed_among_others = not older and old > OLD_MS
            time.sleep(random.uniform(0.5, 1) if failed_among_others else random.uniform(0.01, 0.05))


def vacuum_lock(table: sql.Identifier) -> sql.Composed:
    """Keeps VACUUM and the like out until the transaction ends; an autovacuum gives way to it."""
    return sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(table)


def _short_waits(connection: psycopg.Connection, long: bool) -> None:
    connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL deadlock_timeout = {DEADLOCK_TIMEOUT_MS}")
    except errors.InsufficientPrivilege:
        if long:
            connection.execute(f"SET LOCAL lock_timeout = {VACUUM_TIMEOUT_MS}")


def giving_way(work: Callable[[], T]) -> T:
    """Do a transaction again, for about a minute, while a program of the user's holds rows that it writes."""
    deadline = time.monotonic() + GIVE_WAY_SECONDS
    while True:
        try:
            return work()
        except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
            if time.monotonic() > deadline:
                raise OutageError(
                    f"rows of the destination are held by another transaction for more than {GIVE_WAY_SECONDS:.0f} s "
                    f"(see pg_stat_activity); end it, and sync again: {str(error).splitlines()[0]}"
                ) from error
            time.sleep(random.uniform(0.1, 0.5))
