"""What a session with PostgreSQL needs before it is of use: of our own database, and of a source."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors, sql

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.sql import load_sql

APPLICATION_NAME = "embeddings-pipeline"
CONNECT_SECONDS = 10
SILENCE_SECONDS = 10  # from the end that a statement should have come to, until its server counts as gone
PROBE_SECONDS, SILENT_PROBES = 60, 3  # of a server that reads on for long: whether it answers somebody new

# A server that vanished without a word is noticed while we wait for it after a minute …
NETWORK: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "application_name": APPLICATION_NAME,
}
# … and while we send, after these milliseconds. Batches on their way into our own database may have to wait longer.
OUR_NETWORK = NETWORK | {"tcp_user_timeout": 300_000, "client_encoding": "utf8"}
SOURCE_NETWORK = NETWORK | {"tcp_user_timeout": 60_000}


def end_what_runs(connection: psycopg.Connection) -> None:
    """Cancel a statement that goes on though we were interrupted, and close the connection. psycopg does so itself for
    KeyboardInterrupt, and for nothing else: Dagster interrupts by an exception of its own.
    """
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=CONNECT_SECONDS)
        connection.close()


_busy: dict[psycopg.Connection, int] = {}  # sessions by the thread that uses them, or has them used
_works_for = threading.local()


@contextmanager
def working_for(thread: int) -> Iterator[None]:
    """Within it this thread uses sessions for another one: what ends the statements of that ends its own too."""
    _works_for.thread = thread
    try:
        yield
    finally:
        del _works_for.thread


@contextmanager
def used_here(connection: psycopg.Connection) -> Iterator[None]:
    """Within it this thread uses the session: see `end_statements`."""
    _busy[connection] = getattr(_works_for, "thread", threading.get_ident())
    try:
        yield
    finally:
        del _busy[connection]


def end_statements(threads: Collection[int]) -> None:
    """Cancel what these threads wait for: nothing else ends that when the thread that waits for them is interrupted."""
    for connection, thread in list(_busy.items()):
        if thread in threads:
            with contextlib.suppress(psycopg.Error):
                connection.cancel_safe(timeout=CONNECT_SECONDS)


# --- our own database --------------------------------------------------------------------------------------------


def lifting_limits() -> str:
    """The statement after which no limit of time of the role's or the server's ends a session."""
    return load_sql("session/limits")


def set_up(connection: psycopg.Connection) -> None:
    """UTC, read committed, no limit of time, and pgvector's schema in the search path."""
    connection.execute(f"{lifting_limits()};\n{load_sql('session/ours')}")


def check_encoding(connection: psycopg.Connection, name: str) -> None:
    """DatabaseError if the database cannot hold every text."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseError(
            f"{name} has the encoding {encoding}, which cannot hold every text: name one that an administrator makes "
            "with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0; the source may stay where it is (`source.url:`)"
        )


def check_lasts(connection: psycopg.Connection, connect_another: Callable[[], psycopg.Connection], name: str) -> None:
    """DatabaseError if a pooler lends each transaction another process of the server: no session of ours would last.

    For a session on which nothing was set yet, since another program might get what is set.
    """
    first = _backend(connection)
    with contextlib.suppress(psycopg.OperationalError), connect_another() as other:  # perhaps too many are connected
        with other.transaction():
            taken = _backend(other)
            lasts = taken != first and _backend(connection) == first
        if not lasts:
            raise DatabaseError(
                f"{name}: a pooler lends its sessions by the transaction, and the pipeline's locks and temporary "
                "tables need sessions that last: name the server itself, or a pooler with `pool_mode = session`, in "
                "DATABASE_URL"
            )


def _backend(connection: psycopg.Connection) -> int:
    name = _parameters(connection)["application_name"]
    cursor = connection.execute(sql.SQL(load_sql("session/backend")).format(application_name=sql.Literal(name)))
    cursor.nextset()
    [(pid,)] = cursor.fetchall()
    return int(pid)


def _parameters(connection: psycopg.Connection) -> dict[str, str]:
    """What the session was made with, but for its password. psycopg's `get_parameters` needs a home folder."""
    given = {each.keyword.decode(): each.val.decode() for each in connection.pgconn.info if each.val is not None}
    given.pop("password", None)
    return given


# --- sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadLimits:
    """How long a statement that reads a source may wait for a lock, and take in all; None: for ever."""

    lock_seconds: int
    statement_seconds: int | None = None


RUN_LIMITS = ReadLimits(lock_seconds=120)
TICK_LIMITS = ReadLimits(lock_seconds=5, statement_seconds=30)
"""Of a sensor's tick, for which Dagster waits a minute."""


@contextmanager
def reading(connection: psycopg.Connection, limits: ReadLimits, *, some_rows_do: bool) -> Iterator[None]:
    """A read-only transaction on a source. Nothing that it sets outlives it.

    some_rows_do: row-level security may hide rows; else the server raises an error where it would.
    """
    connection.isolation_level, connection.read_only = psycopg.IsolationLevel.READ_COMMITTED, True
    statement = sql.SQL(load_sql("session/source")).format(
        row_security=sql.Literal("on" if some_rows_do else "off"),
        lock_timeout=sql.Literal(str(1000 * limits.lock_seconds)),
        statement_timeout=sql.Literal(str(1000 * (limits.statement_seconds or 0))),
    )
    try:
        with _watched(connection, limits), connection.transaction():
            try:
                connection.execute(statement)
                yield
            except BaseException:
                end_what_runs(connection)
                raise
    finally:
        if not connection.closed:
            connection.isolation_level = connection.read_only = None  # others use the session too


@contextmanager
def _watched(connection: psycopg.Connection, limits: ReadLimits) -> Iterator[None]:
    """Ends a read whose server is gone behind something that goes on taking what is said to it, as a tunnel or a proxy
    does: no keepalive looks behind that.
    """
    info = connection.info
    address = {**SOURCE_NETWORK, **_parameters(connection), "host": info.host, "port": info.port}
    done = threading.Event()
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        watching = threading.Thread(
            target=_watch, args=(line, {**address, "password": info.password}, limits, done), daemon=True
        )
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()


def _watch(line: socket.socket, address: dict[str, Any], limits: ReadLimits, done: threading.Event) -> None:
    if limits.statement_seconds is not None:  # after which the server ends it, if it is there
        if done.wait(limits.statement_seconds + SILENCE_SECONDS):
            return
    else:
        silent = 0
        while silent < SILENT_PROBES:
            if done.wait(PROBE_SECONDS):
                return
            silent = 0 if _answers(address) else silent + 1
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _answers(address: dict[str, Any]) -> bool:
    """Whether a server says anything to somebody new, and be it that it has no room."""
    try:
        psycopg.connect(**address).close()
    except errors.ConnectionTimeout:
        return False
    except psycopg.Error:
        return True
    return True


def what_to_do(error: psycopg.Error, limits: ReadLimits) -> str | None:
    """What ended a read, and the remedy; None if it is nothing that these sessions bring about."""
    if isinstance(error, errors.InsufficientPrivilege) and error.diag.source_function == "check_enable_rls":
        said = f"{error.diag.message_primary}" + (f" ({error.diag.message_hint})" if error.diag.message_hint else "")
        return (
            f"row-level security would hide rows from the pipeline's role, and these would count as gone: {said}; an "
            "administrator runs ALTER ROLE … BYPASSRLS, or, if the rows that the role sees are the collection, declare "
            "`row_security: true` under `source:`"
        )
    if isinstance(error, errors.LockNotAvailable):
        return (
            f"another session has locked the source for more than {limits.lock_seconds} s (ALTER TABLE, VACUUM FULL or "
            "the like: see pg_stat_activity there); nothing was changed, it is read again next time"
        )
    if isinstance(error, errors.QueryCanceled) and limits.statement_seconds:
        return (
            f"the source did not answer within {limits.statement_seconds} s; an index on `source.updated_at:` makes it "
            "faster, and full scans find every change meanwhile"
        )
    return None
