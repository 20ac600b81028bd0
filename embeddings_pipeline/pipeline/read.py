"""The first step of a batch: its rows as they are in the source now."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from embeddings_pipeline.config.templates import unreadable_hash
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, with_failed
from embeddings_pipeline.pipeline.figures import ItemsRead
from embeddings_pipeline.store import lake as files
from embeddings_pipeline.store.source_rows import SourceRows

BYTES_TOGETHER = 32 << 20  # of rows that are in memory


def read_items(collection: Collection, batches: Sequence[int], run: str) -> dict[int, ItemsRead]:
    """Read the rows of batches by key and write them to the lake, a file each, with the reasons of those that cannot be
    read. The first batch shows how many of the others are read together, by what its rows take in memory.
    """
    keys, done, together = collection.ledger.keys_of_batches(batches), dict[int, ItemsRead](), 1
    with collection.source.connect() as connection:
        while left := batches[len(done) :]:
            chosen = left[:together]
            rows = collection.source.read(connection, [key for batch in chosen for key in keys[batch]])
            done |= {batch: _written(collection, batch, run, keys[batch], rows) for batch in chosen}
            together = max(1, BYTES_TOGETHER * len(chosen) // max(1, rows.table.nbytes))
    return done


def _written(collection: Collection, batch: int, run: str, keys: Sequence[str], rows: SourceRows) -> ItemsRead:
    """Write what was read of one batch."""
    own = rows.table.filter(pc.is_in(rows.table["item_key"], value_set=pa.array(keys, pa.string())))
    unreadable = {key: rows.unreadable[key] for key in keys if key in rows.unreadable} if rows.unreadable else {}
    failed = {key: FailedItem(unreadable_hash(key), "read", reason) for key, reason in unreadable.items()}
    table = with_failed(own, {files.DEFINITION_HASH: collection.definition.definition_hash}, failed)
    collection.lake.write(table, collection.folder("raw_items"), batch, run)
    read = table.num_rows + len(failed)
    return ItemsRead(rows=read, gone=len(keys) - read)
