"""The first step of a batch: its rows as they are in the source now."""

import pyarrow as pa

from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, with_failed
from embeddings_pipeline.pipeline.figures import ItemsRead
from embeddings_pipeline.store import lake as files


def read_items(collection: Collection, batch: int, run: str) -> ItemsRead:
    """Read the batch's rows by key and write them to the lake, with the reasons of those that cannot be read."""
    keys = collection.ledger.item_keys(batch)
    with collection.source.connect() as connection:
        rows = collection.source.read(connection, keys)
    failed = {row.item_key: FailedItem(row.row_hash, "read", row.reason) for row in rows if row.reason is not None}
    readable = [row[:4] for row in rows if row.reason is None]
    columns = [list(column) for column in zip(*readable, strict=True)] or [[], [], [], []]
    table = pa.table(columns, schema=files.RAW_ITEMS)
    table = with_failed(table, {files.DEFINITION_HASH: collection.definition.definition_hash}, failed)
    collection.lake.write(table, collection.folder("raw_items"), batch, run)
    return ItemsRead(rows=len(rows), gone=len(keys) - len(rows))
