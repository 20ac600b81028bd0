"""A full scan: the entire source, compared with what is committed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from embeddings_pipeline.errors import RefusedError
from embeddings_pipeline.ledger.repair import Repair
from embeddings_pipeline.ledger.scan import GONE_SHARE, ScanBase
from embeddings_pipeline.store.locks import batches_in_commit, lock_batch
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class FullScan:
    """What a full scan saw, in items, compared with what is committed."""

    scanned: int
    new: int
    changed: int
    gone: int
    unchanged: int


class FullScans(ScanBase, Repair):
    """The part of the ledger that reads the entire source."""

    def full_scan(self, source: Source, *, allow_deletes: bool = False) -> FullScan:
        """Compare the entire source with the ledger, and note every item that differs from what is committed.

        Only notes: nothing is committed or deleted, and no item becomes clean (rule 2). RefusedError if more than 20 %
        of what is committed is gone, SourceError for a key that is NULL or comes twice.
        """
        with self._staged(source) as connection:
            result = self._compare(connection, allow_deletes)
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

    def look(self, source: Source, *, everything: bool = False) -> tuple[FullScan, list[str]]:
        """What `full_scan` would say, and the keys that a sync would work on (`everything`: all). Writes nothing."""
        with self._staged(source) as connection:
            result = self._compare(connection, allow_deletes=True)
            parameters = {"collection": self.name, "everything": everything}
            keys = connection.execute(self.tables.statement("scan/pending"), parameters)
            return result, [row[0] for row in keys]

    @contextmanager
    def _staged(self, source: Source) -> Iterator[psycopg.Connection]:
        """A session with the entire source in its table `scan_row`."""
        with source.connect() as reading, self.database.connect(autocommit=True) as connection:
            source.check(reading)
            connection.execute(load_sql("scan/stage"))
            self._stage(connection, (row for rows in source.scan(reading) for row in rows))
            try:
                connection.execute(load_sql("scan/staged"))
            except psycopg.errors.UniqueViolation as error:
                detail = (error.diag.message_detail or "").removeprefix("Key (item_key)=(")
                raise self._key_twice(detail.removesuffix(") is duplicated.")) from error
            yield connection

    def _compare(self, connection: psycopg.Connection, allow_deletes: bool) -> FullScan:
        """RefusedError if too much is gone, unless `allow_deletes`."""
        row = connection.execute(self.tables.statement("scan/compare")).fetchone()
        assert row is not None
        *counts, committed = row
        result = FullScan(*counts)
        if result.gone > GONE_SHARE * committed and not allow_deletes:
            raise RefusedError(
                f"collection {self.name!r}: {result.gone:,} of {committed:,} items are gone from the source, "
                f"more than {GONE_SHARE:.0%}; nothing was deleted. If that is right, sync with --allow-deletes "
                f"(or set allow_deletes on item_ledger in the launchpad)"
            )
        return result
