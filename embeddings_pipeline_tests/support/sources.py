"""Tables that tests make, and their rows as a collection reads them."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import Source
from embeddings_pipeline_tests.support.workbench import definition, execute


def source_of(
    database: Database, *, table: str | None = "things", key: Sequence[str] = ("id",), **options: Any
) -> Source:
    """A source over `table` with the template {title} and the payload column title, unless said otherwise."""
    attributes = {"columns": ["title"], "vectors": {"base": "{title}"}}
    attributes |= {name: options.pop(name) for name in ("columns", "vectors") if name in options}
    source = {"key": list(key), **({"table": table} if "query" not in options else {}), **options}
    return Source(definition("things", source=source, **attributes), database)


class SourceRow(NamedTuple):
    """One row of what `Source.read` gives."""

    item_key: str
    row_hash: bytes
    row_json: str
    payload_json: str


def scanned(source: Source) -> dict[str, bytes]:
    with source.connect() as connection:
        parts = [rows.hashes.to_pydict() for rows in source.scan(connection)]
    return {key: row_hash for part in parts for key, row_hash in zip(*part.values(), strict=True)}


def read(source: Source, keys: Sequence[str]) -> dict[str, SourceRow]:
    with source.connect() as connection:
        columns = source.read(connection, keys).table.to_pydict().values()
    return {row[0]: SourceRow(*row) for row in zip(*columns, strict=True)}


def both_ways(source: Source) -> dict[str, SourceRow]:
    """All rows, read by the keys that a scan found: with the same hashes, or the test fails."""
    hashes = scanned(source)
    rows = read(source, list(hashes))
    assert {key: row.row_hash for key, row in rows.items()} == hashes
    return rows


def titles(rows: dict[str, SourceRow]) -> dict[str, Any]:
    return {key: json.loads(row.payload_json)["title"] for key, row in rows.items()}


def make(database: Database, key: str, keys: Sequence[Any]) -> None:
    """The table `things`, anew, with a key of that type, and a title that tells which row it is."""
    execute(
        database, f"DROP TABLE IF EXISTS things; CREATE TABLE things (id {key} PRIMARY KEY, title text, other text)"
    )
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO things VALUES (%s::text::{key}, %s)", [(k, repr(k)) for k in keys])
