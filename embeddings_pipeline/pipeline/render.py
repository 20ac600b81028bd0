"""The second step of a batch: every template of every item becomes a text, or several chunks of one."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embeddings_pipeline.config.chunks import split_chunks
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import clean, clean_json, parse_row
from embeddings_pipeline.errors import LakeError, PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.failed import FailedItem, failed_items, reason_of, with_failed
from embeddings_pipeline.pipeline.figures import TextsRendered
from embeddings_pipeline.pipeline.render_columns import RenderedTexts, content_hashes, render_columns
from embeddings_pipeline.store import lake as files

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 3, 300
ROWS_AT_ONCE = 1000  # whose columns are in memory together, as Python's values


def render_texts(collection: Collection, batch: int, run: str) -> TextsRendered:
    """Render every template of every item of the batch, and write the texts with their hashes to the lake."""
    _, items = collection.newest("raw_items", batch, run)
    # Rows that were read for another definition may hold an older payload: these are not this definition's texts.
    same = (items.schema.metadata or {}).get(files.DEFINITION_HASH) == collection.definition.definition_hash
    table, failed = texts_table(collection.definition, items)
    if failed and not same:  # they may lack a column that the template has had since
        raise LakeError(
            f"collection {collection.definition.name!r}, batch {batch}: its raw_items were read for another "
            "definition; materialize raw_items first, or run `embeddings-pipeline sync`"
        )
    failed = {**failed_items(items), **failed}
    definition_hash = {files.DEFINITION_HASH: collection.definition.definition_hash if same else b""}
    table = with_failed(table, definition_hash, failed)
    collection.lake.write(table, collection.folder("item_texts"), batch, run)
    texts = table.filter(pc.invert(table["blank"]))["text"]
    lengths = pc.utf8_length(texts)
    return TextsRendered(
        texts=len(texts),
        blank=table.num_rows - len(texts),
        characters=pc.sum(lengths).as_py() or 0,
        longest_characters=pc.max(lengths).as_py() or 0,
        sample=[text[:SAMPLE_CHARACTERS] for text in texts[:SAMPLE_TEXTS].to_pylist()],
    )


def texts_table(definition: CollectionDefinition, items: pa.Table) -> tuple[pa.Table, dict[str, FailedItem]]:
    """Every text of these items (RAW_ITEMS), as the lake keeps them; and the rows that cannot be rendered, by key."""
    failed: dict[str, FailedItem] = {}
    rendered = [
        _rendered(definition, items.slice(start, ROWS_AT_ONCE), failed)
        for start in range(0, items.num_rows, ROWS_AT_ONCE)
    ] or [RenderedTexts.of([])]
    payload = items["payload"]
    if pc.any(pc.match_substring(payload, "\\u")).as_py():
        payload = pa.chunked_array([pa.array(map(clean_json, payload.to_pylist()), pa.string())])
    texts_of_item = np.concatenate([block.texts_of_row for block in rendered])
    text = pa.chunked_array([block.text for block in rendered])
    columns = [
        *_repeated([items["item_key"], items["row_hash"], payload], texts_of_item),
        pa.chunked_array([block.vector_name for block in rendered]),
        pa.chunked_array([block.chunk for block in rendered]),
        text,
        pa.chunked_array([content_hashes(block.text) for block in rendered]),
        pc.equal(text, ""),
    ]
    return pa.table(columns, schema=files.ITEM_TEXTS), failed


def _rendered(definition: CollectionDefinition, items: pa.Table, failed: dict[str, FailedItem]) -> RenderedTexts:
    """The texts of some items, by columns, or else row by row; those that cannot be rendered go to `failed`."""
    rows = items["row"].to_pylist()
    try:
        return render_columns(definition, rows)
    except Exception:
        return RenderedTexts.of(_by_row(definition, items, rows, failed))  # which says of each row what is wrong


def _by_row(
    definition: CollectionDefinition, items: pa.Table, rows: Sequence[str], failed: dict[str, FailedItem]
) -> Iterator[list[tuple[str, int, str]]]:
    for number, row in enumerate(rows):
        try:
            yield render_row(definition, row)
        except ItemError as error:
            item_key, row_hash = (items[name][number].as_py() for name in ("item_key", "row_hash"))
            failed[item_key] = FailedItem(row_hash, "render", str(error))
            yield []


def _repeated(columns: Sequence[pa.ChunkedArray], times: NDArray[np.int64]) -> list[pa.ChunkedArray]:
    """Each value so many times."""
    if (times == 1).all():
        return list(columns)
    rows = pa.array(np.repeat(np.arange(len(times)), times))
    return [column.take(rows) for column in columns]


class ItemError(PipelineError):
    """A row that cannot be rendered, while others can."""


def render_row(definition: CollectionDefinition, row_json: str) -> list[tuple[str, int, str]]:
    """Vector name, chunk and text of every text of a row; blank texts too.

    ItemError if that fails for the row, and does not for a harmless one.
    """
    try:
        return _texts(definition, row_json)
    except Exception as error:
        _texts(definition, json.dumps(dict.fromkeys(definition.template_columns, "a plain text")))
        raise ItemError(reason_of(error)) from error


def _texts(definition: CollectionDefinition, row_json: str) -> list[tuple[str, int, str]]:
    chunking = definition.attributes.chunk
    characters, overlap = (chunking.characters, chunking.overlap) if chunking else (None, 0)
    row = parse_row(row_json)
    return [
        (vector_name, chunk, text)
        for vector_name, template in definition.templates.items()
        for chunk, text in enumerate(split_chunks(clean(template.render(row)), characters, overlap))
    ]
