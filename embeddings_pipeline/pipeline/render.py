"""The second step of a batch: every template of every item becomes a text, or several chunks of one."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from embeddings_pipeline.config.chunks import split_chunks
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import clean, clean_json, content_hash, parse_row
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.figures import TextsRendered
from embeddings_pipeline.store import lake as files

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 3, 300


def render_texts(collection: Collection, batch: int, run: str) -> TextsRendered:
    """Render every template of every item of the batch, and write the texts with their hashes to the lake."""
    _, items = collection.newest("raw_items", batch, run)
    columns: dict[str, list[Any]] = {name: [] for name in files.ITEM_TEXTS.names}
    for item in items.to_pylist():
        payload = clean_json(item["payload"])
        for vector_name, chunk, text in render_row(collection.definition, item["row"]):
            values = (item["item_key"], item["row_hash"], payload, vector_name, chunk, text, content_hash(text))
            for column, value in zip(columns.values(), (*values, not text), strict=True):
                column.append(value)
    table = pa.table(columns, schema=files.ITEM_TEXTS)
    # Rows that were read for another definition may hold an older payload: these are not this definition's texts.
    same = (items.schema.metadata or {}).get(files.DEFINITION_HASH) == collection.definition.definition_hash
    table = table.replace_schema_metadata(
        {files.DEFINITION_HASH: collection.definition.definition_hash if same else b""}
    )
    collection.lake.write(table, collection.folder("item_texts"), batch, run)
    lengths = [len(text) for text in columns["text"] if text]
    return TextsRendered(
        texts=len(lengths),
        blank=sum(columns["blank"]),
        characters=sum(lengths),
        longest_characters=max(lengths, default=0),
        sample=[text[:SAMPLE_CHARACTERS] for text in filter(None, columns["text"][:SAMPLE_TEXTS])],
    )


def render_row(definition: CollectionDefinition, row_json: str) -> Iterator[tuple[str, int, str]]:
    """Vector name, chunk and text of every text of a row; blank texts too."""
    chunking = definition.attributes.chunk
    characters, overlap = (chunking.characters, chunking.overlap) if chunking else (None, 0)
    row = parse_row(row_json)
    for vector_name, template in definition.templates.items():
        for chunk, text in enumerate(split_chunks(clean(template.render(row)), characters, overlap)):
            yield vector_name, chunk, text
