"""An incremental scan: what was updated since the last one, by `source.updated_at:`, in bounded steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import psycopg
import pyarrow as pa
from psycopg.types.json import Jsonb

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.ledger.quarantine import Quarantine
from embeddings_pipeline.ledger.scan import GONE_SHARE, ScanBase
from embeddings_pipeline.store.halves import is_of_data
from embeddings_pipeline.store.locks import batches_in_commit, lock_batch
from embeddings_pipeline.store.source import OVERLAP, Source
from embeddings_pipeline.store.source_keys import NOTHING, LeftOut, too_long
from embeddings_pipeline.store.source_rows import SCANNED_ROWS, UpdatedRow
from embeddings_pipeline.store.source_sql import Position
from embeddings_pipeline.store.sql import load_sql

T = TypeVar("T")

ROWS_PER_TRANSACTION = 2000  # each may lie in another batch, and take its lock


@dataclass(frozen=True)
class IncrementalScan:
    """What an incremental scan saw, in items that were not yet known to be so."""

    read: int = 0  # rows
    new: int = 0
    changed: int = 0
    gone: int = 0  # no longer meet the collection's `where:`
    refused: int = 0  # as gone, and left for a full scan to judge because they are too many
    caught_up: bool = False

    def __add__(self, later: "IncrementalScan") -> "IncrementalScan":
        """Both together; `caught_up` is the later one's."""
        counts = ("read", "new", "changed", "gone", "refused")
        sums = {name: getattr(self, name) + getattr(later, name) for name in counts}
        return IncrementalScan(**sums, caught_up=later.caught_up)


@dataclass(frozen=True)
class Watermark:
    """How far incremental scans have come. Stored as JSON in the transaction that writes what they saw.

    Once a scan has caught up, the next goes back to `settled`, so that a row that was committed late is still seen.
    """

    column: str  # `updated_at:` as it was declared
    cursor: Position | None  # the next read begins after it
    settled: Position | None  # where a scan had caught up at least an overlap ago
    noted: Position | None  # becomes `settled` when an overlap has passed since `noted_at`
    noted_at: float  # seconds since 1970, by this machine's clock
    gone: int = 0  # items that were gone since the full scan that ended at `gone_since`
    gone_since: str = ""

    def caught_up(self, now: float) -> "Watermark":
        """The watermark after a scan that has read all there is, at `now`."""
        settled, noted, noted_at = self.settled, self.noted, self.noted_at
        if now - noted_at >= OVERLAP.total_seconds() or now < noted_at:  # or the clock was set back
            # Every row of that time that was committed within the overlap has been read, whatever its key.
            settled = Position(noted.updated_at, None) if noted else None
            noted, noted_at = self.cursor, now
        return replace(self, cursor=settled, settled=settled, noted=noted, noted_at=noted_at)

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> "Watermark":
        """What is missing is as in `NO_WATERMARK`: who reads no `updated_at` counts what is gone, and no more."""
        stored = asdict(NO_WATERMARK) | stored
        positions = {n: Position(*stored[n]) if stored[n] else None for n in ("cursor", "settled", "noted")}
        return cls(**{**stored, **positions})


NO_WATERMARK = Watermark(column="", cursor=None, settled=None, noted=None, noted_at=0.0)


class IncrementalScans(ScanBase, Quarantine):
    """The part of the ledger that reads what was updated."""

    def incremental_scan(self, source: Source, *, seconds: float = 5.0, rows_at_once: int = 20_000) -> IncrementalScan:
        """Read what was updated since the last time, for at most about `seconds`, and note what differs.

        Only notes, as `full_scan` does. Needs `source.updated_at:`. Rows that no longer meet `where:` are gone; if
        those are more than 20 % of what is committed, that is left to a full scan, which refuses.
        """
        started = time.monotonic()
        total = IncrementalScan()
        with source.connect() as reading, self.database.connect(autocommit=True) as connection:
            self.make_stage(connection)
            mark = self._watermark(connection, source, reading)
            while True:
                updated = partial(source.updated_after, reading, mark.cursor, rows_at_once)
                rows = self.without_what_stops(connection, updated)
                last = max((n for n, row in enumerate(rows) if not row.ahead), default=-1)
                all_read = len(rows) < rows_at_once or last < 0
                for start in range(0, max(1, len(rows)), ROWS_PER_TRANSACTION):
                    part = rows[start : start + ROWS_PER_TRANSACTION]
                    passed = min(start + len(part) - 1, last)
                    if passed >= 0:
                        mark = replace(mark, cursor=rows[passed].position)
                    at_end = all_read and start + ROWS_PER_TRANSACTION >= len(rows)
                    mark = mark.caught_up(time.time()) if at_end else mark
                    seen = self.hashes_of(source, reading, part)
                    noted, mark = self._note(connection, seen, mark)
                    total += replace(noted, read=len(part), caught_up=at_end)
                if total.caught_up or time.monotonic() - started > seconds:
                    return total

    def without_what_stops(self, connection: psycopg.Connection, read: Callable[[LeftOut], T]) -> T:
        """What `read` gives; without the rows that full scans leave out, if one of them stops it."""
        try:
            return read(NOTHING)
        except SourceError as error:
            if not is_of_data(error.__cause__):
                raise
            return read(self.left_out(connection))

    def _watermark(self, connection: psycopg.Connection, source: Source, reading: psycopg.Connection) -> Watermark:
        """Where the last scan ended; a new one an overlap ago, if there is none, if it is of another column, or if the
        source's clock was ahead for a while.
        """
        column = self.definition.attributes.source.updated_at
        assert column is not None
        mark = self._stored_watermark(connection)
        if mark.column != column or source.is_ahead(reading, mark.cursor):
            newest = self.without_what_stops(connection, partial(source.newest, reading))
            mark = Watermark(column, newest, newest, newest, time.time())
        return mark

    def _stored_watermark(self, connection: psycopg.Connection) -> Watermark:
        query = "SELECT watermark FROM embeddings.scan WHERE collection = %s"
        row = connection.execute(query, [self.name]).fetchone()
        return Watermark.parse(row[0]) if row and row[0] else NO_WATERMARK

    def hashes_of(
        self, source: Source, reading: psycopg.Connection, rows: Sequence[UpdatedRow]
    ) -> dict[str, bytes | None]:
        """Item key → row hash; None for items that no row of the source has any more that meets `where:`."""
        seen: dict[str, bytes | None] = {}
        for row in rows:
            if too_long(row.item_key):  # full scans tell it
                continue
            if seen.get(row.item_key) is not None and row.row_hash is not None:
                raise self.key_twice(row.item_key)
            seen[row.item_key] = row.row_hash or seen.get(row.item_key)
        # Another row of that key, an older or a newer one, may still meet it.
        doubtful = [item_key for item_key, row_hash in seen.items() if row_hash is None]
        read = source.look(reading, doubtful).hashes.to_pydict()
        return {**seen, **dict(zip(read["item_key"], read["row_hash"], strict=True))}

    def note_seen(self, connection: psycopg.Connection, seen: Mapping[str, bytes | None]) -> IncrementalScan:
        """Note what differs of what somebody has seen of some items (as `hashes_of` has it), as a scan does.

        `connection`: a session with the table of `scan/stage`, committed by the statement.
        """
        total, keys = IncrementalScan(), list(seen)
        for start in range(0, len(keys), ROWS_PER_TRANSACTION):
            part = {key: seen[key] for key in keys[start : start + ROWS_PER_TRANSACTION]}
            total += replace(self._note(connection, part, None)[0], read=len(part))
        return total

    def _note(
        self, connection: psycopg.Connection, seen: Mapping[str, bytes | None], mark: Watermark | None
    ) -> tuple[IncrementalScan, Watermark]:
        """Write what was seen, and how far we have come; what was new in it, and the watermark as written.

        `mark` None: nothing is said of how far we have come, only of how much is gone.

        A commit holds its batch's lock and then wants the collection's, so never is one taken here under the other.
        """
        with connection.transaction():
            connection.execute("TRUNCATE scan_row")
            rows = [list(seen), list(seen.values())]
            self._stage(connection, pa.table(rows, schema=SCANNED_ROWS))
            connection.execute("ANALYZE scan_row")
        new = self._insert_new(connection)
        refused, write = 0, self._write_watermark if mark else self._write_gone
        mark = mark or self._stored_watermark(connection)
        if None in seen.values():
            mark, refused = self._judge_gone(connection, mark)
        elif write == self._write_gone:
            write = _write_nothing
        # As in `full_scan`: batches that a commit works on are compared under their lock, after it has ended.
        in_flight = batches_in_commit(connection, self.name)
        with connection.transaction():
            parameters: dict[str, Any] = {"in_flight": list(in_flight)}
            batches = [row[0] for row in connection.execute(self.tables.statement("incremental/batches"), parameters)]
            for batch in batches:
                lock_batch(connection, self.name, batch)
            suspect = self.tables.statement("incremental/suspect")
            suspected = connection.execute(suspect, {"batches": batches}).fetchall()
            failpoint("incremental_scan.suspected")
            if not in_flight:
                write(connection, mark)
        if in_flight:  # such a commit may also have deleted an item that is back
            with connection.transaction():
                new += self._insert_new(connection)
                write(connection, mark)
        gone = sum(hash_seen is None for hash_seen, _ in suspected)
        changed = sum(hash_seen is not None and not never for hash_seen, never in suspected)
        return IncrementalScan(new=new, changed=changed, gone=gone, refused=refused), mark

    def _judge_gone(self, connection: psycopg.Connection, mark: Watermark) -> tuple[Watermark, int]:
        """Leave gone items to a full scan if they are too many since the last one; the watermark that counts them,
        and how many were refused.
        """
        statement = self.tables.statement("incremental/gone")
        gone, scanned, scanned_at = connection.execute(statement, {"collection": self.name}).fetchone() or (0, 0, "")
        before = mark.gone if mark.gone_since == scanned_at else 0
        if before + gone > GONE_SHARE * scanned:
            connection.execute("DELETE FROM scan_row WHERE row_hash IS NULL")
            return mark, gone
        return replace(mark, gone=before + gone, gone_since=scanned_at), 0

    def _write_watermark(self, connection: psycopg.Connection, mark: Watermark) -> None:
        values = {"collection": self.name, "watermark": Jsonb(asdict(mark))}
        connection.execute(load_sql("incremental/watermark"), values)

    def _write_gone(self, connection: psycopg.Connection, mark: Watermark) -> None:
        gone = Jsonb({"gone": mark.gone, "gone_since": mark.gone_since})
        connection.execute(load_sql("incremental/gone_counted"), {"collection": self.name, "gone": gone})


def _write_nothing(connection: psycopg.Connection, mark: Watermark) -> None:
    """Nothing was gone, and nobody has come any further."""
