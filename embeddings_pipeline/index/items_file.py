"""What a generation holds beside vectors and words: its items with their payload, and their texts. With them a search
is answered while the database cannot be reached.

Two Arrow files, mapped into memory: `items.arrow` in the order of keys, `texts.arrow` in the order of the texts' ids.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.index.faiss_publish import HashingWriter, write_file
from embeddings_pipeline.index.faiss_read import ItemFiles, Manifest, read_manifest, verify
from embeddings_pipeline.index.snapshot import BUILD_AGAIN
from embeddings_pipeline.store.destination.base import Destination

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_A_TIME = 20_000
MOST_CONDITIONS = 100  # of which it is remembered which items meet them: a bit each
ITEMS, TEXTS = "items.arrow", "texts.arrow"


def write_items(connection: psycopg.Connection, table: Destination, folder: Path) -> ItemFiles:
    """Write the files into `folder`: of the committed items in the session's snapshot, and their texts with vectors."""
    import pyarrow as pa

    schemas = {
        ITEMS: pa.schema([("item_key", pa.string()), ("payload", pa.string())]),
        TEXTS: pa.schema(
            [
                ("id", pa.int64()),
                ("item", pa.int64()),
                ("vector_name", pa.string()),
                ("chunk", pa.int64()),
                ("text", pa.string()),
            ]
        ),
    }
    statements = {
        ITEMS: ("faiss/items", ["text", "text"]),
        TEXTS: ("faiss/item_texts", ["int8", "int8", "text", "int8", "text"]),
    }
    files, rows, size = {}, {}, 0
    for name, (statement, types) in statements.items():
        with connection.cursor() as cursor, cursor.copy(table.statement(statement)) as copy:
            copy.set_types(types)
            rows[name] = 0

            def write(writer: HashingWriter, name: str = name, given: Any = copy) -> None:
                with pa.ipc.new_file(pa.PythonFile(writer, mode="w"), schemas[name]) as file:
                    for block in blocks_of(given.rows(), ROWS_AT_A_TIME):
                        file.write_batch(
                            pa.record_batch(list(map(list, zip(*block, strict=True))), schema=schemas[name])
                        )
                        rows[name] += len(block)

            files[name], written = write_file(folder / name, write)
        size += written
    return ItemFiles(rows[ITEMS], rows[TEXTS], size, files)


def blocks_of(rows: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """The rows, so many at a time."""
    rest = iter(rows)
    while block := list(islice(rest, size)):
        yield block


@dataclass(frozen=True)
class ItemText:
    """A text of a generation, with its item."""

    item_key: str
    payload: str | None  # JSON
    text: str
    vector_name: str
    chunk: int


class _Rows:
    """The rows of a file of `write_items`, whose blocks have the same length but for the last."""

    def __init__(self, batches: "list[pa.RecordBatch]") -> None:
        self._batches = batches

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def numbers(self, column: str) -> NDArray[np.int64]:
        parts = [batch[column].to_numpy() for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def texts(self, column: str) -> Iterator[str | None]:
        for batch in self._batches:
            yield from batch[column].to_pylist()

    def value(self, column: str, row: int) -> Any:
        block, place = divmod(row, ROWS_AT_A_TIME)
        return self._batches[block][column][place].as_py()


class ItemsIndex:
    """The items of a generation, read-only; several threads may ask at once."""

    def __init__(self, manifest: Manifest, items: _Rows, texts: _Rows) -> None:
        self.manifest = manifest
        self._items, self._texts = items, texts
        self._ids, self._item_of = texts.numbers("id"), texts.numbers("item")
        self._met: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()  # by condition, a bit each item
        self._mutex = ProcessLock()

    def text(self, text_id: int) -> ItemText | None:
        """The text of that id; None if it is not here."""
        row = int(np.searchsorted(self._ids, text_id))
        if row == len(self._ids) or self._ids[row] != text_id:
            return None
        item = (self._items.value(column, int(self._item_of[row])) for column in ("item_key", "payload"))
        return ItemText(*item, *(self._texts.value(column, row) for column in ("text", "vector_name", "chunk")))

    def texts_where(self, condition: str, meets: Callable[[str | None], bool]) -> NDArray[np.int64]:
        """The ids of the texts of those items whose payload, as JSON, meets a condition. `condition`: what names it,
        since it takes seconds to read a million payloads, and the last ones are remembered.
        """
        number = len(self._items)
        with self._mutex:
            met = self._met.get(condition)
        if met is None:
            met = np.packbits(np.fromiter((meets(payload) for payload in self._items.texts("payload")), bool, number))
        with self._mutex:
            self._met[condition] = met
            self._met.move_to_end(condition)
            if len(self._met) > MOST_CONDITIONS:
                self._met.popitem(last=False)
        ids: NDArray[np.int64] = self._ids[np.unpackbits(met, count=number).astype(bool)[self._item_of]]
        return ids

    def texts_of(self, item_key: str, vector_name: str) -> list[int] | None:
        """The ids of an item's texts of that name; None if there is no such item."""
        row = bisect_left(range(len(self._items)), item_key, key=lambda n: self._items.value("item_key", n))
        if row == len(self._items) or self._items.value("item_key", row) != item_key:
            return None
        rows = np.flatnonzero(self._item_of == row).tolist()
        return [int(self._ids[n]) for n in rows if self._texts.value("vector_name", n) == vector_name]


def open_items(folder: Path, collection: str) -> ItemsIndex | None:
    """The current generation's, its checksums verified the first time in a process; None if it has none.

    VectorIndexError names a file that is missing or damaged.
    """
    parent = folder / collection
    with _opening.setdefault(parent, ProcessLock()):
        manifest = read_manifest(folder, collection)
        if manifest is None or manifest.items is None:
            return None
        opened = _opened.get(parent)
        if opened is None or opened.manifest != manifest:
            opened = _opened[parent] = _open(parent / manifest.generation, manifest, manifest.items)
        return opened


def _open(generation: Path, manifest: Manifest, described: ItemFiles) -> ItemsIndex:
    for file, expected in described.files.items():
        verify(generation / file, expected)
    return ItemsIndex(manifest, _mapped(generation / ITEMS), _mapped(generation / TEXTS))


def _mapped(path: Path) -> _Rows:
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        return _Rows([file.get_batch(n) for n in range(file.num_record_batches)])
    except (OSError, pa.ArrowInvalid) as error:
        raise VectorIndexError(f"{path} cannot be read: {error}; {BUILD_AGAIN}") from error


# Of this process, by the collection's folder.
_opened: dict[Path, ItemsIndex] = {}
_opening: dict[Path, ProcessLock] = {}
