"""The second step of a batch: every template of every item becomes a text, or several chunks of one."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from embeddings_pipeline.config.chunks import split_chunks
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import clean, clean_json, content_hash, parse_row
from embeddings_pipeline.errors import LakeError, PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, failed_items, reason_of, with_failed
from embeddings_pipeline.pipeline.figures import TextsRendered
from embeddings_pipeline.store import lake as files

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 3, 300


def render_texts(collection: Collection, batch: int, run: str) -> TextsRendered:
    """Render every template of every item of the batch, and write the texts with their hashes to the lake."""
    _, items = collection.newest("raw_items", batch, run)
    # Rows that were read for another definition may hold an older payload: these are not this definition's texts.
    same = (items.schema.metadata or {}).get(files.DEFINITION_HASH) == collection.definition.definition_hash
    rows = zip(*(items[name].to_pylist() for name in ("item_key", "row_hash", "row", "payload")), strict=True)
    table, failed = texts_table(collection.definition, rows)
    if failed and not same:  # they may lack a column that the template has had since
        raise LakeError(
            f"collection {collection.definition.name!r}, batch {batch}: its raw_items were read for another "
            "definition; materialize raw_items first, or run `embeddings-pipeline sync`"
        )
    failed = {**failed_items(items), **failed}
    definition_hash = {files.DEFINITION_HASH: collection.definition.definition_hash if same else b""}
    table = with_failed(table, definition_hash, failed)
    collection.lake.write(table, collection.folder("item_texts"), batch, run)
    texts = table["text"].to_pylist()
    lengths = [len(text) for text in texts if text]
    return TextsRendered(
        texts=len(lengths),
        blank=len(texts) - len(lengths),
        characters=sum(lengths),
        longest_characters=max(lengths, default=0),
        sample=[text[:SAMPLE_CHARACTERS] for text in filter(None, texts[:SAMPLE_TEXTS])],
    )


def texts_table(
    definition: CollectionDefinition, rows: Iterable[tuple[str, bytes, str, str]]
) -> tuple[pa.Table, dict[str, FailedItem]]:
    """Every text of these rows (item key, row hash, row and payload as JSON), as the lake keeps them; and the rows that
    cannot be rendered, by item key.
    """
    columns: dict[str, list[Any]] = {name: [] for name in files.ITEM_TEXTS.names}
    failed: dict[str, FailedItem] = {}
    for item_key, row_hash, row, payload in rows:
        try:
            texts, cleaned = render_row(definition, row), clean_json(payload)
        except ItemError as error:
            failed[item_key] = FailedItem(row_hash, "render", str(error))
            continue
        for vector_name, chunk, text, digest in texts:
            values = (item_key, row_hash, cleaned, vector_name, chunk, text, digest, not text)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return pa.table(columns, schema=files.ITEM_TEXTS), failed


class ItemError(PipelineError):
    """A row that cannot be rendered, while others can."""


def render_row(definition: CollectionDefinition, row_json: str) -> list[tuple[str, int, str, bytes]]:
    """Vector name, chunk, text and content hash of every text of a row; blank texts too.

    ItemError if that fails for the row, and does not for a harmless one.
    """
    try:
        return [(*text, content_hash(text[2])) for text in _texts(definition, row_json)]
    except Exception as error:
        list(_texts(definition, json.dumps(dict.fromkeys(definition.template_columns, "a plain text"))))
        raise ItemError(reason_of(error)) from error


def _texts(definition: CollectionDefinition, row_json: str) -> Iterator[tuple[str, int, str]]:
    chunking = definition.attributes.chunk
    characters, overlap = (chunking.characters, chunking.overlap) if chunking else (None, 0)
    row = parse_row(row_json)
    for vector_name, template in definition.templates.items():
        for chunk, text in enumerate(split_chunks(clean(template.render(row)), characters, overlap)):
            yield vector_name, chunk, text
