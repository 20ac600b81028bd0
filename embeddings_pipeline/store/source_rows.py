"""What is read of a row of the source, and its key."""

import json
from typing import NamedTuple


class ScannedRow(NamedTuple):
    """What a scan keeps of a row."""

    item_key: str
    row_hash: bytes
    reason: str | None = None  # why it cannot be read
    is_item: bool = True  # False: no item can have its key. `item_key` is what is shown, `row_hash` the key's SHA-256


class Position(NamedTuple):
    """A place in the order in which rows were updated: what `updated_at` says, as text, and the item's key."""

    updated_at: str
    item_key: str | None  # None: after all rows of that time


class UpdatedRow(NamedTuple):
    """A row as an incremental read sees it."""

    item_key: str
    row_hash: bytes | None  # None: it does not meet the collection's `where:`
    position: Position
    ahead: bool  # its `updated_at` is later than the source's clock


class SourceRow(NamedTuple):
    """One row of the source, as far as the collection looks at it."""

    item_key: str
    row_hash: bytes
    row_json: str  # template columns and payload
    payload_json: str
    reason: str | None = None  # why the row cannot be read: its JSON is empty then, and its hash a mark


def split_key(item_key: str, columns: int) -> list[str]:
    """The key columns' values as texts: the inverse of how an item key is made."""
    return [item_key] if columns == 1 else json.loads(item_key)


def is_key(item_key: str, columns: int) -> bool:
    """Whether a key of the ledger can be one of the source, whose key columns may have been others before."""
    if columns == 1:
        return True
    try:
        values = json.loads(item_key)
    except ValueError:
        return False
    return isinstance(values, list) and len(values) == columns and all(isinstance(value, str) for value in values)
