"""What full and incremental scans share: the rows they saw, staged, and the batches that new items go to."""

from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.copy_binary import columns_of, copy_in
from embeddings_pipeline.store.locks import lock_collection
from embeddings_pipeline.store.sql import load_sql

GONE_SHARE = 0.2
"""A scan that misses more than this share of what is committed is refused (rule 8)."""

ANALYZE_FROM = 1000  # new items


class ScanBase(LedgerBase):
    """Scans only suspect: nothing is committed or deleted here, and no item becomes clean (rule 2)."""

    def make_stage(self, connection: psycopg.Connection) -> None:
        """Make the temporary table `scan_row` of a session, in which scans put what they see."""
        connection.execute(load_sql("scan/stage"))

    def _stage(self, connection: psycopg.Connection, rows: pa.Table) -> None:
        """Put what a scan saw, item key and row hash, into its temporary table `scan_row`."""
        copy_in(connection, sql.Identifier("scan_row"), columns_of(rows))

    def _insert_new(self, connection: psycopg.Connection) -> int:
        """Give new items of `scan_row` their batch; how many there are."""
        per_batch = self.definition.attributes.items_per_batch
        with connection.transaction():
            lock_collection(connection, self.name)
            query = "SELECT last_batch, last_batch_size FROM embeddings.collection WHERE name = %s"
            row = connection.execute(query, [self.name]).fetchone()
            assert row is not None
            last_batch, size = row
            if size >= per_batch:
                last_batch, size = last_batch + 1, 0
            parameters = {"last_batch": last_batch, "last_batch_size": size, "items_per_batch": per_batch}
            inserted = connection.execute(self.tables.statement("scan/insert_new"), parameters).rowcount
            if inserted:
                last = last_batch + (size + inserted - 1) // per_batch
                size = (size + inserted - 1) % per_batch + 1
                added: dict[str, Any] = {"collection": self.name, "first": last_batch, "last": last, "size": size}
                connection.execute(load_sql("scan/batches_added"), added)
                if inserted >= ANALYZE_FROM:
                    connection.execute(sql.SQL("ANALYZE {}").format(self.tables.item))
        return inserted

    def key_twice(self, item_key: str) -> SourceError:
        """What is to be said of a key that the source has more than once."""
        key = ", ".join(self.definition.attributes.source.key)
        return SourceError(
            f"collection {self.name!r}: the source has the key ({item_key}) more than once; `source.key:` ({key}) must "
            "identify a row"
        )
