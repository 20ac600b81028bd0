"""Building ANN indexes in PostgreSQL: taking turns, memory, deadlines, and saying what a build waits for."""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import psycopg
from psycopg import errors

from embeddings_pipeline.errors import PipelineError, VectorIndexError
from embeddings_pipeline.store.database import Database, one_line
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.indexes import NEW, AnnIndex, IndexChange, drop_index
from embeddings_pipeline.store.locks import exclusively
from embeddings_pipeline.store.session import end_what_runs
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

SAY_AFTER_SECONDS = 10.0
REMOVE_SECONDS = 10.0  # for each step of the removal of what a failed build has left
MOST_MEMORY = 2 << 30  # bytes for a build on a server that is not ours
LEAST_MEMORY_KB = 1024


class IndexBuilder:
    """Applies changes of a destination's indexes in one session, until a deadline (`time.monotonic()`)."""

    def __init__(
        self, database: Database, connection: psycopg.Connection, destination: Destination, deadline: float
    ) -> None:
        self.database, self.connection, self.destination = database, connection, destination
        self.deadline, self.memory = deadline, _memory_limit(database)

    def apply(self, changes: Sequence[IndexChange]) -> dict[str, float]:
        """Do them in order; the seconds of each build, by the name that the index has in the end."""
        seconds: dict[str, float] = {}
        for change in changes:
            if change.action == "create":
                began = time.perf_counter()
                self._build(change)
                seconds[change.index.name.removesuffix(NEW)] = round(time.perf_counter() - began, 3)
            else:
                self._execute(change)
        return seconds

    def _build(self, change: IndexChange) -> None:
        memory = min(self.memory, change.memory)
        try:
            try:
                with self._saying_what_it_waits_for():
                    self._execute(change, memory)
            except errors.DiskFull:
                # A parallel build keeps its graph in /dev/shm, of which a container has 64 MB: build it in one process.
                self._execute(drop_index(change.index))
                self.connection.execute("SET max_parallel_maintenance_workers = 0")
                self._execute(change, memory)
                self.connection.execute("RESET max_parallel_maintenance_workers")
        except BaseException:
            self._remove(change.index)
            raise
        there = self.destination.layout(self.connection).indexes
        if not any(index.valid for index in there if index.name == change.index.name):
            raise VectorIndexError(
                f"index {change.index.schema}.{change.index.name} was built and is not valid; run "
                f"`embeddings-pipeline sync` again"
            )

    def _remove(self, index: AnnIndex) -> None:
        """Take away what a failed build has left. If that fails too, it is told, and the next build does it."""
        end_what_runs(self.connection)
        try:
            if not self.connection.closed:
                self._drop(self.connection, index)
                return
            with self.database.connect(autocommit=True) as connection:  # the server ends such a build in a second
                wait_for_turn(connection, self.destination.name, time.monotonic() + REMOVE_SECONDS)
                self._drop(connection, index)
        except (PipelineError, psycopg.Error) as error:
            log.warning(
                "collection %r: a failed build has left the index %s.%s, which is of no use and could not be removed "
                "(%s); the next sync removes it",
                *(self.destination.collection, index.schema, index.name, one_line(error)),
            )

    def _drop(self, connection: psycopg.Connection, index: AnnIndex) -> None:
        connection.execute(load_sql("pgvector/removal"), {"milliseconds": round(REMOVE_SECONDS * 1000)})
        try:
            connection.execute(drop_index(index).statement)
        except errors.DiskFull:  # there is no room to note its steps; this one needs none
            at_once = drop_index(index, concurrently=False).statement
            tables = self.destination.drop_relations
            exclusively(self.database, tables, lambda _: None, [at_once], seconds=REMOVE_SECONDS)

    def _execute(self, change: IndexChange, memory: int = 0) -> None:
        milliseconds = max(1, round((self.deadline - time.monotonic()) * 1000))
        parameters = {"milliseconds": milliseconds, "memory": max(memory // 1024, LEAST_MEMORY_KB)}
        self.connection.execute(load_sql("pgvector/session"), parameters)
        self.connection.execute(change.statement)

    @contextlib.contextmanager
    def _saying_what_it_waits_for(self) -> Iterator[None]:
        """A concurrent build waits for every older transaction, whatever table it is about: say whose."""
        done, pid = threading.Event(), self.connection.info.backend_pid

        def watch() -> None:
            while not done.wait(SAY_AFTER_SECONDS):
                with contextlib.suppress(PipelineError, psycopg.Error):
                    with self.database.connect(autocommit=True) as connection:
                        row = connection.execute(
                            load_sql("pgvector/waits_for"), {"pid": pid, "seconds": SAY_AFTER_SECONDS}
                        ).fetchone()
                    if row:
                        blocker, name, age = row
                        log.warning(
                            "collection %r: the new index waits for a transaction that %s has had open for %s; end "
                            "it, or SELECT pg_terminate_backend(%s)",
                            *(self.destination.collection, name, age, blocker),
                        )
                        return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()


def _memory_limit(database: Database) -> int:
    if database.embedded:
        return max(MOST_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    return MOST_MEMORY


def wait_for_turn(connection: psycopg.Connection, name: str, deadline: float) -> None:
    """Take the advisory lock of a destination's name for index builds, which the session holds to its end.

    By asking again and again: a session that waits in `pg_advisory_lock` holds a snapshot, for whose end the builder,
    CREATE INDEX CONCURRENTLY, would wait in turn.
    """
    key = int.from_bytes(blake2b(f"index {name}".encode(), digest_size=8).digest(), "big", signed=True)
    while connection.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone() != (True,):
        if time.monotonic() > deadline:
            raise errors.QueryCanceled("another process is still building indexes on this table")
        time.sleep(random.uniform(0.1, 0.4))
