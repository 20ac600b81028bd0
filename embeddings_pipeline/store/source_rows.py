"""What is read of the rows of a source, and their keys."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from embeddings_pipeline.config.templates import unreadable_hash
from embeddings_pipeline.store.source_sql import Position

HASH = pa.binary(16)
RAW_ITEMS = pa.schema([("item_key", pa.string()), ("row_hash", HASH), ("row", pa.string()), ("payload", pa.string())])
SCANNED_ROWS = pa.schema([("item_key", pa.string()), ("row_hash", HASH)])


class ScannedRow(NamedTuple):
    """A row of a scan that is told by itself: it cannot be read, or no item can have its key."""

    item_key: str
    row_hash: bytes
    reason: str | None = None
    is_item: bool = True  # False: no item can have its key. `item_key` is what is shown, `row_hash` the key's SHA-256


def scanned_rows(keys: Sequence[str], hashes: Sequence[bytes]) -> pa.Table:
    """SCANNED_ROWS of lists, which pyarrow itself converts with pandas imported, if that is installed."""
    written = [key.encode() for key in keys]
    offsets = np.zeros(len(keys) + 1, np.int32)
    np.cumsum([len(key) for key in written], out=offsets[1:])
    texts = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(written))]
    columns = [
        pa.Array.from_buffers(pa.string(), len(keys), texts),
        pa.Array.from_buffers(HASH, len(keys), [None, pa.py_buffer(b"".join(hashes))]),
    ]
    return pa.Table.from_arrays(columns, schema=SCANNED_ROWS)


@dataclass(frozen=True)
class SourceRows:
    """Rows of the source as columns, as far as the collection looks at them."""

    table: pa.Table  # RAW_ITEMS: row is template columns and payload; of a scan, SCANNED_ROWS
    unreadable: Mapping[str, str] = field(default_factory=dict)  # item key → why: these rows are not in the table
    unusable: Sequence[ScannedRow] = ()  # nor are these, whose keys no item can have

    @property
    def hashes(self) -> pa.Table:
        """Key and hash of every item; those that cannot be read have a mark for their hash."""
        marks = [list(self.unreadable), [unreadable_hash(item_key) for item_key in self.unreadable]]
        readable = self.table.select(SCANNED_ROWS.names)
        return pa.concat_tables([readable, pa.table(marks, schema=SCANNED_ROWS)]) if self.unreadable else readable


def joined(parts: Iterable[SourceRows], schema: pa.Schema) -> SourceRows:
    """Several parts as one."""
    tables, unreadable = [schema.empty_table()], dict[str, str]()
    for part in parts:
        tables.append(part.table)
        unreadable |= part.unreadable
    return SourceRows(pa.concat_tables(tables), unreadable)


class UpdatedRow(NamedTuple):
    """A row as an incremental read sees it."""

    item_key: str
    row_hash: bytes | None  # None: it does not meet the collection's `where:`
    position: Position
    ahead: bool  # its `updated_at` is later than the source's clock


def is_key(item_key: str, columns: int) -> bool:
    """Whether a key of the ledger can be one of several columns of the source, which may have been others before."""
    try:
        values = json.loads(item_key)
    except ValueError:
        return False
    return isinstance(values, list) and len(values) == columns and all(isinstance(value, str) for value in values)
