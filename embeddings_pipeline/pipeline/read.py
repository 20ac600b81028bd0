"""The first step of a batch: its rows as they are in the source now."""

from embeddings_pipeline.config.templates import unreadable_hash
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, with_failed
from embeddings_pipeline.pipeline.figures import ItemsRead
from embeddings_pipeline.store import lake as files


def read_items(collection: Collection, batch: int, run: str) -> ItemsRead:
    """Read the batch's rows by key and write them to the lake, with the reasons of those that cannot be read."""
    keys = collection.ledger.item_keys(batch)
    with collection.source.connect() as connection:
        rows = collection.source.read(connection, keys)
    failed = {key: FailedItem(unreadable_hash(key), "read", reason) for key, reason in rows.unreadable.items()}
    table = with_failed(rows.table, {files.DEFINITION_HASH: collection.definition.definition_hash}, failed)
    collection.lake.write(table, collection.folder("raw_items"), batch, run)
    read = table.num_rows + len(failed)
    return ItemsRead(rows=read, gone=len(keys) - read)
