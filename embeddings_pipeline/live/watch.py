"""How `live` sees that rows have changed: by `updated_at`, and by the server's log where that may be followed.

Neither is the truth. What they see is noted as a scan notes it; what they miss, the scans find.
"""

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Protocol

import psycopg

from embeddings_pipeline.ledger.incremental_scan import IncrementalScan
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.change_stream import Changes, follow_changes
from embeddings_pipeline.store.session import TICK_LIMITS
from embeddings_pipeline.store.source_keys import too_long
from embeddings_pipeline.store.source_sql import Position

LOOK_SECONDS = 1.0
LOOK_SHARE = 0.05  # of the time: where a look takes long, as without an index on `updated_at`, there are fewer
LATE_SECONDS = 5.0  # a row that is committed so long after another of a later time is still seen by a look
ROWS_AT_ONCE = 20_000
TYPES_SECONDS = 30.0  # a column's type is looked up again after so long


class Watch(Protocol):
    """What sees changes of a source."""

    deletes: bool  # deleted rows, too

    @property
    def words(self) -> str:
        """How, for people."""

    def look(self, connection: psycopg.Connection) -> tuple[IncrementalScan, bool]:
        """Note what has changed; and whether something may have that only a full scan finds.

        `connection`: to our own database, with the table of `scan/stage`.
        """

    def wait(self, seconds: float) -> None:
        """Until something has changed, for at most so long."""

    def close(self) -> None:
        """Let go of the sessions with the source."""


class UpdatedRows:
    """Looks at `updated_at` each second: at the rows after the last that it saw LATE_SECONDS ago."""

    deletes = False
    words = "updated_at, each second (deleted rows, and edits that leave it as it was, are found by full scans)"

    def __init__(self, collection: Collection, after: Position | None = None) -> None:
        """`after`: how far one before it had come."""
        self._ledger, self._source = collection.ledger, replace(collection.source, limits=TICK_LIMITS)
        self._sessions = ExitStack()
        self._reading = self._sessions.enter_context(self._source.connect(lasting=True))
        with collection.database.session() as connection:
            after = after or self._newest(connection)
        # When we were where: none of these times is compared with a clock of somebody else's.
        self._trail: deque[tuple[float, Position | None]] = deque([(0.0, after)])
        self._noted: dict[str, bytes | None] = {}
        self._types, self._types_at = self._source.check(self._reading), time.monotonic()
        self._next = 0.0

    @property
    def position(self) -> Position | None:
        """After which the next look begins."""
        return self._trail[0][1]

    def look(self, connection: psycopg.Connection) -> tuple[IncrementalScan, bool]:
        total, began = IncrementalScan(), time.monotonic()
        if began < self._next:
            return total, False
        if began - self._types_at > TYPES_SECONDS:
            self._types, self._types_at = self._source.check(self._reading), began
            if self._source.is_ahead(self._reading, self._trail[-1][1]):  # the clock was, for a while
                self._trail = deque([(0.0, self._newest(connection))])
        while len(self._trail) > 1 and self._trail[1][0] <= began - LATE_SECONDS:
            self._trail.popleft()
        after = self._trail[0][1]
        kept: dict[str, bytes | None] = {}
        while True:
            read = partial(self._source.updated_after, self._reading, after, ROWS_AT_ONCE)
            updated = partial(read, types=self._types, until_now=True)
            rows = self._ledger.without_what_stops(connection, updated)
            seen = self._ledger.hashes_of(self._source, self._reading, rows)
            new = {key: row_hash for key, row_hash in seen.items() if self._noted.get(key, b"") != row_hash}
            if new:
                total += self._ledger.note_seen(connection, new)
            kept |= seen
            if rows:
                after = rows[-1].position
            if len(rows) < ROWS_AT_ONCE:
                break
        self._noted = kept
        if after != self._trail[-1][1] and after is not None:
            self._trail.append((began, after))
        self._next = began + max(LOOK_SECONDS, (time.monotonic() - began) / LOOK_SHARE)
        return total, False

    def _newest(self, connection: psycopg.Connection) -> Position | None:
        return self._ledger.without_what_stops(connection, partial(self._source.newest, self._reading))

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self._next - time.monotonic())))

    def close(self) -> None:
        self._sessions.close()


class ToldChanges:
    """Follows the source's log, and reads the rows that it tells of."""

    words = "the server's log (a temporary replication slot)"

    def __init__(self, collection: Collection) -> None:
        self._ledger, self._source = collection.ledger, replace(collection.source, limits=TICK_LIMITS)
        self._sessions = ExitStack()
        self._changes: Changes = self._sessions.enter_context(follow_changes(self._source))
        self._reading = self._sessions.enter_context(self._source.connect(lasting=True))
        self._pending: set[tuple[str, ...]] = set()
        self._everything = True  # what changed before
        self.deletes = self._changes.deletes

    def look(self, connection: psycopg.Connection) -> tuple[IncrementalScan, bool]:
        self._changes.woken.clear()
        keys, everything = self._changes.take()
        self._pending |= keys
        self._everything |= everything
        total, pending = IncrementalScan(), sorted(self._pending)
        for start in range(0, len(pending), ROWS_AT_ONCE):
            part = pending[start : start + ROWS_AT_ONCE]
            item_keys = [key for key in self._source.item_keys(self._reading, part) if not too_long(key)]
            hashes = self._source.look(self._reading, item_keys).hashes.to_pydict()
            seen: dict[str, bytes | None] = dict.fromkeys(item_keys)
            seen |= dict(zip(hashes["item_key"], hashes["row_hash"], strict=True))
            total += self._ledger.note_seen(connection, seen)
            self._pending.difference_update(part)
        everything, self._everything = self._everything, False
        return total, everything

    def wait(self, seconds: float) -> None:
        self._changes.woken.wait(seconds)

    def close(self) -> None:
        self._sessions.close()
