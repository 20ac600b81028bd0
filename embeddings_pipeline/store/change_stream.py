"""Which rows of a source change, as its server's log says: logical replication by a temporary slot.

with follow_changes(source) as changes:
    while changes.wait(1):
        keys, everything = changes.take()

Needs `wal_level=logical`, a role that may replicate, and a publication of the table, which the user makes. The slot
ends with its session, however that ends, so that it never holds back the source's log; what changed before it was made
is found by scans. What the log says is read as it comes, and only the keys are kept: rows are read when they are asked
for.
"""

import contextlib
import logging
import select
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from psycopg import pq, sql

from embeddings_pipeline.config.definition import SourceDefinition
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.source_sql import relation_of
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.store.urls import without_secrets

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # the server counts us as gone after wal_sender_timeout, a minute
MOST_KEYS = 100_000  # kept; of more changes than that a full scan makes less work
EPOCH = 946_684_800  # 2000-01-01, from which PostgreSQL counts


class NotFollowedError(PipelineError):
    """The source's changes cannot be followed; the message says what it would take."""


class Changes:
    """What has changed since it was last asked."""

    def __init__(self, columns: tuple[str, ...], relations: frozenset[int]) -> None:
        self.deletes = True  # whether deleted rows are told of, too
        self.failed: Exception | None = None  # what has ended it
        self.woken = threading.Event()
        self._columns, self._relations = columns, relations
        self._names: dict[int, list[str]] = {}  # of a relation's columns
        self._keys: set[tuple[str, ...]] = set()
        self._everything = False
        self._mutex = threading.Lock()

    def take(self) -> tuple[set[tuple[str, ...]], bool]:
        """Of rows that were inserted, updated or deleted the values of the key columns; and whether any other may have
        been.
        """
        with self._mutex:
            taken = self._keys, self._everything
            self._keys, self._everything = set(), False
        if self.failed is not None:
            raise self.failed
        return taken

    def message(self, data: bytes) -> None:
        """Take in one message of pgoutput, protocol version 1."""
        kind, body = data[:1], _Bytes(data[1:])
        if kind == b"R":
            oid, _, _, _ = body.integer(4), body.text(), body.text(), body.integer(1)
            columns = []
            for _ in range(body.integer(2)):
                body.integer(1)
                columns.append(body.text())
                body.integer(8)
            self._names[oid] = columns
        elif kind == b"T":
            count = body.integer(4)
            body.integer(1)
            if self._relations.intersection(body.integer(4) for _ in range(count)):
                self._note(None)
        elif kind in b"IUD" and (oid := body.integer(4)) in self._relations:
            names = self._names[oid]
            while part := body.take(1):
                row = dict(zip(names, body.tuple(), strict=True))
                if part == b"N" or self.deletes:  # else it does not say which row was there before
                    self._note(self._key(row))

    def _key(self, row: Mapping[str, str | None]) -> tuple[str, ...] | None:
        """The values of the key columns; None if the log does not say each."""
        values = [row.get(column) for column in self._columns]
        key = tuple(value for value in values if value is not None)
        return key if len(key) == len(values) else None

    def _note(self, key: tuple[str, ...] | None) -> None:
        with self._mutex:
            if key is None or len(self._keys) >= MOST_KEYS:
                self._everything = True
            else:
                self._keys.add(key)
        self.woken.set()


class _Bytes:
    """Reads a message from its front."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def integer(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def text(self) -> str:
        end = self._data.index(b"\0", self._at)
        value = self._data[self._at : end].decode()
        self._at = end + 1
        return value

    def tuple(self) -> list[str | None]:
        """The values of a row as texts; None for NULL, a long value that did not change, and what is no text."""
        values: list[str | None] = []
        for _ in range(self.integer(2)):
            written = self.take(self.integer(4)) if self.take(1) == b"t" else None
            try:
                values.append(None if written is None else written.decode())
            except UnicodeDecodeError:
                values.append(None)
        return values


@contextmanager
def follow_changes(source: Source) -> Iterator[Changes]:
    """Follow the source's table until the block ends. NotFollowedError if that is not possible, SourceError if the
    source cannot be reached.
    """
    definition = source.definition.attributes.source
    with source.connect() as connection:
        changes, publication = _prepare(source, definition, connection)
        address = {
            parameter.keyword.decode(): parameter.val.decode()
            for parameter in connection.pgconn.info
            if parameter.val is not None
        }
        address |= {
            "host": connection.info.host,
            "port": str(connection.info.port),
            "replication": "database",
            "password": connection.info.password,
            "options": "-c DateStyle=ISO -c IntervalStyle=postgres "
            "-c TimeZone=UTC -c bytea_output=hex -c extra_float_digits=1 -c client_encoding=UTF8",
        }
    try:
        replication = psycopg.connect(autocommit=True, **address)  # type: ignore[arg-type]
    except psycopg.OperationalError as error:
        said = without_secrets(_line(error), address)
        raise NotFollowedError(f"{source}: its server takes no replication session: {said}") from error
    ended = threading.Event()
    with contextlib.closing(replication):
        _start(replication.pgconn, publication, source)
        reading = threading.Thread(target=_read, args=(replication.pgconn, changes, ended), daemon=True)
        reading.start()
        try:
            yield changes
        finally:
            ended.set()
            reading.join()


def _prepare(source: Source, definition: SourceDefinition, connection: psycopg.Connection) -> tuple[Changes, str]:
    """What is to be followed, and by which publication."""
    if definition.table is None:
        raise NotFollowedError(f"{source}: its source is a query, whose rows no log tells of")
    table = sql.Literal(relation_of(definition).as_string(connection))
    key = list(definition.key)
    statement = sql.SQL(load_sql("changes/possible")).format(table=table)
    row = connection.execute(statement, {"key": key}).fetchone()
    if row is None:
        raise NotFollowedError(f"{source}: there is no table {definition.table!r}")
    level, may, kind, has_key, publication = row
    name = relation_of(definition).as_string(connection)
    if kind not in ("r", "p"):
        raise NotFollowedError(f"{source}: {definition.table!r} is no table, so that no log tells of its rows")
    if level != "logical":
        raise NotFollowedError(f"{source}: its server has wal_level={level}, and logical replication needs logical")
    if not may:
        user = connection.info.user
        raise NotFollowedError(f"{source}: the role {user!r} may not replicate: ALTER ROLE {user} REPLICATION")
    if publication is None:
        raise NotFollowedError(f"{source}: no publication has all of {name}: CREATE PUBLICATION … FOR TABLE {name}")
    relations = connection.execute(sql.SQL(load_sql("changes/partitions")).format(table=table)).fetchall()
    changes = Changes(tuple(key), frozenset(oid for (oid,) in relations))
    changes.deletes = has_key
    return changes, publication


def _start(pgconn: pq.abc.PGconn, publication: str, source: Source) -> None:
    slot = f"embeddings_{uuid.uuid4().hex}"
    quoted = '"{}"'.format(publication.replace('"', '""')).replace("'", "''")
    commands = [
        f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT",
        f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '1', publication_names '{quoted}')",
    ]
    for command in commands:
        result = pgconn.exec_(command.encode())
        if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COPY_BOTH):
            said = " ".join((result.error_message or b"").decode(errors="replace").split())
            raise NotFollowedError(f"{source}: no replication slot: {said.removeprefix('ERROR:').strip()}")


def _read(pgconn: pq.abc.PGconn, changes: Changes, ended: threading.Event) -> None:
    """Take in what the log says until `ended`, and tell the server how far we are."""
    position, answered = 0, 0.0
    try:
        while not ended.is_set():
            length, data = pgconn.get_copy_data(1)
            if length > 0:
                message = bytes(data)
                if message[:1] == b"w":
                    position = max(position, *struct.unpack("!QQ", message[1:17]))
                    changes.message(message[25:])
                elif message[:1] == b"k":
                    position = max(position, struct.unpack("!Q", message[1:9])[0])
                    answered = 0.0 if message[17] else answered
            elif length < 0:
                raise psycopg.OperationalError(pgconn.get_error_message("utf-8") or "the replication session has ended")
            else:
                select.select([pgconn.socket], [], [], 0.5)
                pgconn.consume_input()
            if time.monotonic() - answered > ANSWER_SECONDS:
                answered = time.monotonic()
                now = int((time.time() - EPOCH) * 1_000_000)
                pgconn.put_copy_data(struct.pack("!cQQQqB", b"r", position, position, position, now, 0))
                pgconn.flush()
    except Exception as error:
        changes.failed = error
        changes.woken.set()
        with contextlib.suppress(psycopg.Error):
            pgconn.finish()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
