"""The map of a collection, made from its model table and published whole: see `map_read`.

made = ensure_map(database, table, state_dir / "faiss", definition)
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.filters import FilterDefinition
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.index.faiss_publish import HashingWriter, build_folder, publish_files, write_file
from embeddings_pipeline.index.filters import expression_of
from embeddings_pipeline.index.items_file import blocks_of
from embeddings_pipeline.index.map_points import Points, place_items
from embeddings_pipeline.index.map_read import (
    FORMAT,
    NONE,
    OTHER,
    ROWS_AT_A_TIME,
    Legend,
    MapManifest,
    PlacedVectors,
    is_number,
    read_map_manifest,
)
from embeddings_pipeline.index.snapshot import TableVersion, current_version, snapshot, vector_counts
from embeddings_pipeline.index.standing import Standing, standing
from embeddings_pipeline.store.copy_binary import copy_blocks
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination

CATEGORIES = 10  # that have a colour of their own
LONGEST_LABEL = 80
LATEST = timedelta(hours=20)  # a map that has been behind its table for so long is made anew
SHARE = 60  # … or for so many times what it took: making maps takes a sixtieth of the time at most


@dataclass(frozen=True)
class MadeMap:
    """The map that is there now."""

    manifest: MapManifest
    reason: str  # why it was made; empty if it was there


def ensure_map(database: Database, table: Destination, folder: Path, definition: CollectionDefinition) -> MadeMap:
    """Make the map if it is missing, damaged, of another model or of other rules, or has been behind its table for a
    while. Whatever fails, and wherever the process is killed, the map before stays.

    VectorIndexError if it cannot be made or written.
    """
    reason, manifest = why_made(database, folder, definition, SHARE)
    if manifest is not None and not reason:
        return MadeMap(manifest, "")
    parent = folder / table.collection
    try:
        with build_folder(parent) as building:
            manifest = _write_map(database, table, building, definition)
            failpoint("map.publish")
            _publish(database, table, folder, building, manifest)
            manifest = read_map_manifest(folder, table.collection) or manifest
    except OSError as error:
        raise VectorIndexError(
            f"the map of {table.collection!r} cannot be written to {parent}: {error.strerror or error}; the one before "
            "stays. Make room there or correct its rights, then run `embeddings-pipeline sync`"
        ) from error
    return MadeMap(manifest, reason)


def why_made(
    database: Database, folder: Path, definition: CollectionDefinition, share: float | None = None
) -> tuple[str, MapManifest | None]:
    """Why the map is to be made, empty if it is not, and what is there. `share`: it is made sooner if that is quick."""
    try:
        manifest = read_map_manifest(folder, definition.name)
    except VectorIndexError:
        return "it was damaged", None
    if manifest is None or not (folder / definition.name / manifest.file).is_file():
        return "there was none", None
    with database.session() as connection:
        stands = standing(connection, definition.name, manifest)
    if stands in (Standing.OTHER_MODEL, Standing.FOREIGN):
        return f"the one before was {stands}", manifest
    if _rules(definition) != (manifest.method, [(name, each.type) for name, each in manifest.legends.items()]):
        return "`map:` or the filters have changed", manifest
    age = datetime.now(UTC) - datetime.fromisoformat(manifest.made_at)
    longest = LATEST if share is None else min(LATEST, share * timedelta(seconds=manifest.seconds))
    if stands is Standing.BEHIND and not timedelta() <= age < longest:
        return "the one before was behind the table", manifest
    return "", manifest


def _rules(definition: CollectionDefinition) -> tuple[str, list[tuple[str, str]]]:
    filters = definition.attributes.filters
    columns = definition.attributes.map.columns(filters)
    return definition.attributes.map.method, [(name, filters[name].type) for name in columns]


def _publish(database: Database, table: Destination, folder: Path, building: Path, manifest: MapManifest) -> None:
    """Make it the map, unless another process has published one of a newer version meanwhile."""

    def is_newer() -> bool:
        try:
            published = read_map_manifest(folder, table.collection)
        except VectorIndexError:
            return True
        if published is None or published.version <= manifest.version:
            return True
        with database.session() as connection:
            return standing(connection, table.collection, published) not in (Standing.CURRENT, Standing.BEHIND)

    content = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2)
    publish_files(folder / table.collection, building / manifest.file, "map.json", content, is_newer)


def _write_map(database: Database, table: Destination, folder: Path, definition: CollectionDefinition) -> MapManifest:
    """The file, in `folder`; its manifest."""
    began = time.perf_counter()
    with snapshot(database, table) as connection:
        now = current_version(connection, table, "map")
        [(items, pending)] = connection.execute(table.statement("map/counts")).fetchall()
        counts = vector_counts(connection, table)
        placed = {
            name: place_items(
                definition.attributes.map.method, items, counts.get(name, 0), partial(_vectors, connection, table, name)
            )
            for name in definition.attributes.vectors
        }
        colours = _Colours(connection, table, definition)
        name = f"map-{secrets.token_hex(4)}.arrow"
        write = partial(_write_rows, connection, table, definition, placed, colours)
        digest, size = write_file(folder / name, write)
    shown = np.zeros(items, bool)
    for points in placed.values():
        shown |= np.isfinite(points.at[:, 0])
    return MapManifest(
        file=name,
        sha256=digest,
        bytes=size,
        **_of(now),
        method=definition.attributes.map.method,
        items=int(shown.sum()),
        left_out=int(pending + items - shown.sum()),
        vectors={
            vector: PlacedVectors(int(np.isfinite(points.at[:, 0]).sum()), points.method, points.variance)
            for vector, points in placed.items()
        },
        legends=colours.legends(),
        made_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        seconds=round(time.perf_counter() - began, 3),
    )


def _of(version: TableVersion) -> dict[str, Any]:
    return {**vars(version), "fingerprint": str(version.fingerprint)}


def _vectors(
    connection: psycopg.Connection, table: Destination, name: str
) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
    query = table.statement("map/vectors", vector_name=sql.Literal(name))
    columns = {"place": "bigint", "embedding": table.storage}
    for block in copy_blocks(connection, query, columns, dimension=table.dimension):  # type: ignore[arg-type]
        yield block["place"], block["embedding"]


class _Colours:
    """What the columns of points become: a number each, or the place of a category."""

    def __init__(self, connection: psycopg.Connection, table: Destination, definition: CollectionDefinition) -> None:
        filters, rules = definition.attributes.filters, definition.attributes.map
        self.kinds = {column: filters[column] for column in rules.columns(filters)}
        self._categories: dict[str, dict[str, int]] = {}  # column → category → its number of items
        self._numbers: dict[str, list[NDArray[np.float64]]] = {}
        for column, kind in self.kinds.items():
            if is_number(kind.type):
                self._numbers[column] = []
                continue
            statement = table.statement("map/categories", value=_value(column, kind))
            rows = connection.execute(statement, {"most": CATEGORIES}).fetchall()
            self._categories[column] = dict(rows)

    def selected(self) -> sql.Composable:
        """The columns of `map/items`."""
        return sql.SQL("").join(sql.SQL(", {}").format(_value(column, kind)) for column, kind in self.kinds.items())

    def column(self, name: str, values: Sequence[Any]) -> NDArray:
        """What becomes of a block of values."""
        if name in self._numbers:
            numbers = np.array([np.nan if value is None else value for value in values], np.float64)
            self._numbers[name].append(numbers[np.isfinite(numbers)])
            return numbers
        places = {category: place for place, category in enumerate(self._categories[name])}
        return np.array([places.get(value, OTHER) if value else NONE for value in values], np.uint8)

    def legends(self) -> dict[str, Legend]:
        """After all values are through."""
        legends = {}
        for column, kind in self.kinds.items():
            if column in self._categories:
                categories = self._categories[column]
                legends[column] = Legend(kind.type, list(categories), list(categories.values()))
                continue
            numbers = np.concatenate([np.zeros(0), *self._numbers[column]])
            low, high = np.quantile(numbers, (0.02, 0.98), method="nearest").tolist() if len(numbers) else (None, None)
            legends[column] = Legend(kind.type, low=low, high=high)
        return legends


def _value(column: str, kind: FilterDefinition) -> sql.Composable:
    """What a point is coloured by: a number, seconds since 1970, or a text; of several texts the first."""
    payload = sql.Identifier("item", "payload")
    compared = expression_of(kind, payload, sql.Literal(column), sql.Literal(kind.separator))
    forms = {
        "number": "CASE WHEN abs({0}) < 1e300 THEN ({0})::float8 END",
        "timestamp": "CASE WHEN isfinite({0}) THEN extract(epoch FROM {0})::float8 END",
        "boolean": "({0})::text",
        "text": "left({0}, 80)",
        "texts": "left(({0})[1], 80)",
    }
    return sql.SQL(forms[kind.type]).format(compared)


def _label(definition: CollectionDefinition) -> sql.Composable:
    """What a point is called: its first column of the payload, else its key."""
    columns = definition.attributes.columns[:1]
    named = [sql.SQL("nullif(btrim(item.payload ->> {}), ''), ").format(sql.Literal(column)) for column in columns]
    return sql.SQL("left(coalesce({}item.item_key), {})").format(sql.SQL("").join(named), sql.Literal(LONGEST_LABEL))


def _write_rows(
    connection: psycopg.Connection,
    table: Destination,
    definition: CollectionDefinition,
    placed: Mapping[str, Points],
    colours: _Colours,
    writer: HashingWriter,
) -> None:
    import pyarrow as pa

    fields = [("item_key", pa.string()), ("label", pa.string())]
    fields += [
        (f"colour {column}", pa.float64() if is_number(kind.type) else pa.uint8())
        for column, kind in colours.kinds.items()
    ]
    fields += [(f"{axis} {name}", pa.float32()) for name in placed for axis in "xy"]
    schema = pa.schema(fields)
    types = ["text", "text", *("float8" if is_number(kind.type) else "text" for kind in colours.kinds.values())]
    statement = table.statement("map/items", label=_label(definition), coloured=colours.selected())
    with pa.ipc.new_file(pa.PythonFile(writer, mode="w"), schema) as file:
        start = 0
        for rows in _blocks(connection, statement, types):
            keys, labels, *values = (list(column) for column in zip(*rows, strict=True))
            coloured = [colours.column(name, each) for name, each in zip(colours.kinds, values, strict=True)]
            at = [points.at[start : start + len(rows), axis] for points in placed.values() for axis in (0, 1)]
            columns = [keys, labels, *map(pa.array, coloured), *map(pa.array, at)]
            file.write_batch(pa.record_batch(columns, schema=schema))
            start += len(rows)


def _blocks(
    connection: psycopg.Connection, statement: sql.Composed, types: Sequence[str]
) -> Iterator[list[tuple[Any, ...]]]:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        yield from blocks_of(copy.rows(), ROWS_AT_A_TIME)
