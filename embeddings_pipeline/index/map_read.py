"""The published map of a collection: where each item lies, what it is called, and what it is coloured by.

chart = open_map(state_dir / "faiss", "items")
shown = chart.points("base", "genres", most=20_000)

On disk, below `<folder>/<collection>/`: `map.json`, which says what the map is of and names its file, and that file,
`map-XXXXXXXX.arrow`. Its rows are in the order of the hashes of keys: the first ones are a sample of all, and each is
found by its key. It is mapped into memory, and only what is asked for is read.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.errors import ConfigurationError, VectorIndexError, did_you_mean
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.index.faiss_read import verify
from embeddings_pipeline.index.snapshot import BUILD_AGAIN

FORMAT = 1
ROWS_AT_A_TIME = 20_000  # of each block but the last
OTHER, NONE = 254, 255  # in the place of a category: one that is less frequent, and no value


def is_number(kind: str) -> bool:
    """Whether values of a filter's type have an order, which colours show."""
    return kind in ("number", "timestamp")


@dataclass(frozen=True)
class Legend:
    """What one column's colours mean."""

    type: str  # of the filter
    categories: list[str] = field(default_factory=list)  # the most frequent first; the file has their places
    counts: list[int] = field(default_factory=list)
    low: float | None = None  # of numbers and times (seconds since 1970): between these nearly all of them lie
    high: float | None = None


@dataclass(frozen=True)
class PlacedVectors:
    """What a map has of one vector name."""

    items: int
    method: str
    variance: float  # what share of the vectors' differences two axes have


@dataclass(frozen=True)
class MapManifest:
    """What a map is of, and how it was made."""

    file: str
    sha256: str
    bytes: int
    fingerprint: str
    database: str
    epoch: str
    version: int
    stamp: str
    method: str  # as declared
    items: int
    left_out: int  # items that are known, and have no vector (yet)
    vectors: dict[str, PlacedVectors]
    legends: dict[str, Legend]
    made_at: str  # ISO 8601, UTC
    seconds: float


@dataclass(frozen=True)
class ShownPoints:
    """Some items of a map, in columns."""

    keys: list[str]
    labels: list[str]
    at: NDArray[np.float32]  # (n, 2)
    colours: NDArray | None  # numbers, or places of categories


def read_map_manifest(folder: Path, collection: str) -> MapManifest | None:
    """What is published; None if nothing is. VectorIndexError if that is damaged. It does not import pyarrow."""
    path = folder / collection / "map.json"
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise VectorIndexError(f"{path} is of another version of embeddings-pipeline; {BUILD_AGAIN}")
        legends = {name: Legend(**each) for name, each in content.pop("legends").items()}
        vectors = {name: PlacedVectors(**each) for name, each in content.pop("vectors").items()}
        return MapManifest(legends=legends, vectors=vectors, **content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VectorIndexError(f"{path} cannot be read: {error.strerror}; {BUILD_AGAIN}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VectorIndexError(f"{path} is damaged: it is no manifest; {BUILD_AGAIN}") from error


class Chart:
    """A published map, read-only; several threads may ask at once."""

    def __init__(self, manifest: MapManifest, batches: list[Any]) -> None:
        self.manifest, self._batches = manifest, batches

    def points(self, vector: str, colour: str | None, most: int) -> ShownPoints:
        """At most so many items that have that vector: a sample, always the same. ConfigurationError names a vector or
        colour that the map has not.
        """
        self._check(vector, colour)
        parts, number = [], 0
        for block in range(len(self._batches)):
            if number >= most:
                break
            part = self._rows(block, vector, colour, most - number)
            parts.append(part)
            number += len(part.keys)
        return _joined(parts)

    def of_keys(self, keys: Sequence[str], vector: str, colour: str | None) -> ShownPoints:
        """Those of the items that are on the map."""
        self._check(vector, colour)
        rows = [row for key in dict.fromkeys(keys) if (row := self._row_of(key)) is not None]
        parts = [self._rows(row // ROWS_AT_A_TIME, vector, colour, 1, row % ROWS_AT_A_TIME) for row in rows]
        return _joined(parts)

    def _check(self, vector: str, colour: str | None) -> None:
        for what, name, known in (("vector", vector, self.manifest.vectors), ("colour", colour, self.manifest.legends)):
            if name is not None and name not in known:
                there = ", ".join(known) or "none"
                raise ConfigurationError(f"the map has no {what} {name!r}; it has {there}{did_you_mean(name, known)}")

    def _rows(self, block: int, vector: str, colour: str | None, most: int, start: int | None = None) -> ShownPoints:
        """At most so many rows of a block that have a point; with `start`, only that row."""
        batch = self._batches[block]
        x, y = (batch[f"{axis} {vector}"].to_numpy() for axis in "xy")
        first = 0 if start is None else start
        rows = first + np.flatnonzero(np.isfinite(x[first : None if start is None else start + 1]))[:most]
        keys, labels = (batch[name].take(_arrow(rows)).to_pylist() for name in ("item_key", "label"))
        colours = None if colour is None else batch[f"colour {colour}"].to_numpy()[rows]
        return ShownPoints(keys, labels, np.stack([x[rows], y[rows]], axis=1), colours)

    def _row_of(self, key: str) -> int | None:
        rows = sum(batch.num_rows for batch in self._batches)
        row = bisect_left(range(rows), _order(key), key=lambda n: _order(self._key(n)))
        return row if row < rows and self._key(row) == key else None

    def _key(self, row: int) -> str:
        block, place = divmod(row, ROWS_AT_A_TIME)
        key: str = self._batches[block]["item_key"][place].as_py()
        return key


def _order(key: str) -> tuple[str, bytes]:
    written = key.encode("utf-8", "surrogatepass")
    return hashlib.md5(written, usedforsecurity=False).hexdigest(), written


def _arrow(rows: NDArray[np.int64]) -> Any:
    import pyarrow as pa

    return pa.array(rows)


def _joined(parts: Sequence[ShownPoints]) -> ShownPoints:
    colours = [part.colours for part in parts if part.colours is not None]
    return ShownPoints(
        [key for part in parts for key in part.keys],
        [label for part in parts for label in part.labels],
        np.concatenate([part.at for part in parts]) if parts else np.zeros((0, 2), np.float32),
        np.concatenate(colours) if colours else None,
    )


def open_map(folder: Path, collection: str) -> Chart | None:
    """The published map, its file verified the first time in a process; None if there is none.

    VectorIndexError names a file that is missing or damaged.
    """
    parent = folder / collection
    with _opening.setdefault(parent, ProcessLock()):
        before = None
        while True:
            manifest = read_map_manifest(folder, collection)
            if manifest is None:
                return None
            opened = _opened.get(parent)
            if opened is not None and opened.manifest == manifest:
                return opened
            try:
                opened = _opened[parent] = _open(parent, manifest)
                return opened
            except VectorIndexError:
                if manifest == before:  # else it was replaced between the two reads
                    raise
                before = manifest


def _open(parent: Path, manifest: MapManifest) -> Chart:
    import pyarrow as pa

    path = parent / manifest.file
    verify(path, manifest.sha256)
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        return Chart(manifest, [file.get_batch(n) for n in range(file.num_record_batches)])
    except (OSError, pa.ArrowInvalid) as error:
        raise VectorIndexError(f"{path} cannot be read: {error}; {BUILD_AGAIN}") from error


# Of this process, by the collection's folder.
_opened: dict[Path, Chart] = {}
_opening: dict[Path, ProcessLock] = {}
