"""A full scan: the entire source, compared with what is committed."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.ledger.quarantine import Quarantine
from embeddings_pipeline.ledger.repair import Repair
from embeddings_pipeline.ledger.scan import GONE_SHARE, ScanBase
from embeddings_pipeline.ledger.work import Work
from embeddings_pipeline.store.halves import MOST_FAILURES, is_of_data
from embeddings_pipeline.store.locks import batches_in_commit, lock_batch
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.source_keys import LeftOut
from embeddings_pipeline.store.source_rows import ScannedRow, SourceRows
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted

log = logging.getLogger(__name__)

SHOWN_ROWS = 3
FEW_UNREADABLE = 10
"""So many items may become unreadable at once, whatever share of all that is."""


@dataclass(frozen=True)
class FullScan:
    """What a full scan saw, in items, compared with what is committed."""

    scanned: int
    new: int
    changed: int
    gone: int
    unchanged: int


@dataclass(frozen=True)
class _Failed:
    """The rows of a scan that are not what they should be."""

    unreadable: dict[str, str] = field(default_factory=dict)  # item key → reason
    unusable: list[ScannedRow] = field(default_factory=list)  # whose keys no item can have


class FullScans(ScanBase, Repair, Quarantine, Work):
    """The part of the ledger that reads the entire source."""

    def full_scan(self, source: Source, *, allow_deletes: bool = False) -> FullScan:
        """Compare the entire source with the ledger, and note every item that differs from what is committed.

        Only notes: nothing is committed or deleted, and no item becomes clean (rule 2). A row that cannot be read is
        there, with a mark for its hash; one with a key that no item can have is told, and in quarantine as long as it
        is there. RefusedError if more than 20 % of what is committed is gone, or can no longer be read; SourceError for
        a key that is NULL or comes twice.
        """
        with self._staged(source) as (connection, failed):
            result = self._compare(connection, allow_deletes)
            if not allow_deletes:
                self._judge_unreadable(connection, failed.unreadable)
            self.note_unusable_keys(connection, failed.unusable)
            self._insert_new(connection)
            # A commit that looked at the source before our snapshot and commits after the comparison would hide a
            # change from it. It holds its batch's lock now, so such batches are compared again, under that lock.
            in_flight = batches_in_commit(connection, self.name)
            differing = {row[0] for row in connection.execute(self.tables.statement("scan/batches"))}
            suspect = self.tables.statement("scan/suspect")
            for batch in sorted(differing | in_flight):
                with connection.transaction():
                    lock_batch(connection, self.name, batch)
                    connection.execute(suspect, {"batch": batch})
            if in_flight:  # such a commit may also have deleted an item that is back
                self._insert_new(connection)
            connection.execute(load_sql("scan/finished"), {"collection": self.name, "scanned": result.scanned})
        if self.definition.attributes.destination is not None:
            self.repair()  # other programs may have emptied the column of a row
        return result

    def look(self, source: Source, *, everything: bool = False) -> tuple[FullScan, dict[int, list[str]]]:
        """What `full_scan` would say, and the batches that a sync would work on, with the keys of their rows
        (`everything`: all batches). Writes nothing.
        """
        with self._staged(source) as (connection, _):
            if not self.tables.are_made(connection):
                keys = [row[0] for row in connection.execute(load_sql("scan/staged_keys"))]
                size = self.definition.attributes.items_per_batch
                parts = {number // size: keys[number : number + size] for number in range(0, len(keys), size)}
                return FullScan(scanned=len(keys), new=len(keys), changed=0, gone=0, unchanged=0), parts
            result = self._compare(connection, allow_deletes=True)
            parameters = {
                "collection": self.name,
                "definition_hash": self.definition.definition_hash,
                "items_per_batch": self.definition.attributes.items_per_batch,
                "batches": [*self.work(), *self.damaged_batches()],
                "everything": everything,
            }
            batches: dict[int, list[str]] = {}
            for batch, item_key in connection.execute(self.tables.statement("scan/pending"), parameters):
                batches.setdefault(batch, []).append(item_key)
            return result, batches

    @contextmanager
    def _staged(self, source: Source) -> Iterator[tuple[psycopg.Connection, "_Failed"]]:
        """A session with the entire source in its table `scan_row`; and the rows that are not what they should be."""
        failed = _Failed()

        def stage(scan: Iterator[SourceRows]) -> None:
            for rows in scan:
                failed.unreadable.update(rows.unreadable)
                failed.unusable.extend(rows.unusable)
                self._stage(connection, rows.hashes)

        with source.connect() as reading, self.database.connect(autocommit=True) as connection:
            source.check(reading)
            self.make_stage(connection)
            try:
                known = self.left_out(connection) if self.tables.are_made(connection) else LeftOut()
                with connection.transaction():
                    stage(source.scan(reading, known))
            except SourceError as error:
                if not is_of_data(error.__cause__):
                    raise
                failed = _Failed()
                stage(source.scan_by_key(reading))
            self._tell_unusable(connection, failed.unusable)
            try:
                connection.execute(load_sql("scan/staged"))
            except psycopg.errors.UniqueViolation as error:
                detail = (error.diag.message_detail or "").removeprefix("Key (item_key)=(")
                raise self.key_twice(detail.removesuffix(") is duplicated.")) from error
            yield connection, failed

    def _tell_unusable(self, connection: psycopg.Connection, unusable: Sequence[ScannedRow]) -> None:
        """SourceError if no item can have the key of any row, or of too many: then `source.key:` is to blame."""
        if not unusable:
            return
        shown, _, reason, _ = unusable[0]
        (others,) = connection.execute("SELECT EXISTS (SELECT FROM scan_row)").fetchone() or (False,)
        if len(unusable) > MOST_FAILURES or (len(unusable) > 1 and not others):
            raise SourceError(
                f"collection {self.name!r}: {counted(len(unusable), 'row')} have keys that no item can have, as the "
                f"one with the key {shown}: {reason}; choose another `source.key:` in "
                f"{self.definition.path or 'defs.yaml'}"
            )
        for row in unusable[:SHOWN_ROWS]:
            log.warning(
                "warning: collection %r: the row with the key %s is left out: %s", self.name, row.item_key, row.reason
            )
        if (more := len(unusable) - SHOWN_ROWS) > 0:
            log.warning("warning: collection %r: %s more, see `quarantine list`", self.name, counted(more, "such row"))

    def _judge_unreadable(self, connection: psycopg.Connection, unreadable: Mapping[str, str]) -> None:
        """RefusedError if the vectors of too many items would go because their rows can no longer be read (rule 8)."""
        if len(unreadable) <= FEW_UNREADABLE:
            return
        parameters = {"unreadable": list(unreadable)}
        row = connection.execute(self.tables.statement("scan/no_longer_read"), parameters).fetchone()
        lost, committed = row or (0, 0)
        if lost > max(FEW_UNREADABLE, GONE_SHARE * committed):
            item_key, reason = next(iter(unreadable.items()))
            raise RefusedError(
                f"collection {self.name!r}: {lost:,} of {counted(committed, 'item')} can no longer be read from the "
                f"source, more than {GONE_SHARE:.0%}, as the one with the key ({item_key}): {reason}; nothing was "
                "changed. Correct the rows or `source:`, or sync with --allow-deletes, which puts them into quarantine"
            )

    def _compare(self, connection: psycopg.Connection, allow_deletes: bool) -> FullScan:
        """RefusedError if too much is gone, unless `allow_deletes`."""
        row = connection.execute(self.tables.statement("scan/compare")).fetchone()
        assert row is not None
        *counts, committed = row
        result = FullScan(*counts)
        if result.gone > GONE_SHARE * committed and not allow_deletes:
            raise RefusedError(
                f"collection {self.name!r}: {result.gone:,} of {counted(committed, 'item')} are gone from the source, "
                f"more than {GONE_SHARE:.0%}; nothing was deleted. If that is right, sync with --allow-deletes "
                f"(or set allow_deletes on item_ledger in the launchpad)"
            )
        return result
