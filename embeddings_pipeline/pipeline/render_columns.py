"""Templates rendered a column at a time. What a template leaves out depends only on which columns of a row are empty:
so it is asked once for each such pattern, and the rows that have it are joined from their columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embeddings_pipeline.config.chunks import split_chunks
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.templates import Template, as_text, clean, content_hash, parse_rows, visible
from embeddings_pipeline.store.source_rows import HASH

FEW_ROWS = 16  # that have the same columns: each is rendered by itself


@dataclass(frozen=True)
class RenderedTexts:
    """The texts of some rows, in their order: those of a row by vector name, and the chunks of each."""

    texts_of_row: NDArray[np.int64]  # how many
    vector_name: pa.Array
    chunk: pa.Array
    text: pa.Array

    @classmethod
    def of(cls, rows: Iterable[Sequence[tuple[str, int, str]]]) -> "RenderedTexts":
        """From vector name, chunk and text of each text of each row."""
        rows = list(rows)
        texts = [text for row in rows for text in row]
        names, chunks, values = zip(*texts, strict=True) if texts else ((), (), ())
        counts = np.array([len(row) for row in rows], np.int64)
        return cls(counts, pa.array(names, pa.string()), pa.array(chunks, pa.int64()), pa.array(values, pa.string()))


def render_columns(definition: CollectionDefinition, rows: Sequence[str]) -> RenderedTexts:
    """The texts of rows, each a JSON document. Any error, if one of them cannot be rendered."""
    if not rows:
        return RenderedTexts.of([])
    parsed = parse_rows(rows)
    columns = {name: _visible([row[name] for row in parsed]) for name in definition.template_columns}
    texts = {name: _rendered(template, columns, len(rows)) for name, template in definition.templates.items()}
    by_row = _interleaved(list(texts.values()), len(rows))  # those of one row after the other
    names = _interleaved([pa.repeat(name, len(rows)) for name in texts], len(rows))
    chunking = definition.attributes.chunk
    if chunking is None or (pc.max(pc.utf8_length(by_row)).as_py() or 0) <= chunking.characters:
        counts = np.full(len(rows), len(texts), np.int64)
        return RenderedTexts(counts, names, pa.array(np.zeros(len(by_row), np.int64)), by_row)
    pieces = [split_chunks(text, chunking.characters, chunking.overlap) for text in by_row.to_pylist()]
    of_text = np.array([len(chunks) for chunks in pieces], np.int64)
    numbers = np.concatenate([np.arange(count, dtype=np.int64) for count in of_text])
    chunks = pa.array([chunk for text in pieces for chunk in text], pa.string())
    counts = of_text.reshape(len(rows), len(texts)).sum(axis=1)
    return RenderedTexts(
        counts, names.take(pa.array(np.repeat(np.arange(len(names)), of_text))), pa.array(numbers), chunks
    )


def content_hashes(texts: pa.Array) -> pa.Array:
    """BLAKE2b-128 of each text."""
    digests = b"".join(map(content_hash, texts.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(texts), [None, pa.py_buffer(digests)])


def _visible(values: Sequence[Any]) -> pa.Array:
    """Values of a column as people write them, without white space around them; "" if nothing of one can be seen."""
    texts = [value if type(value) is str else as_text(value) for value in values]
    column = pa.array(texts, pa.string())
    doubtful = np.flatnonzero(~_begin_and_end_visibly(column))
    for row in doubtful:
        texts[row] = visible(texts[row])
    return pa.array(texts, pa.string()) if len(doubtful) else column


def _begin_and_end_visibly(column: pa.Array) -> NDArray[np.bool_]:
    """Of which texts the first and the last character is one of ASCII that can be seen; also of "" it is said so."""
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1)
    empty = offsets[1:] == offsets[:-1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    if not len(data):
        return empty
    ends = np.stack([data[np.minimum(offsets[:-1], len(data) - 1)], data[offsets[1:] - 1]])
    seen: NDArray[np.bool_] = empty | ((ends >= ord("!")) & (ends <= ord("~"))).all(axis=0)
    return seen


def _rendered(template: Template, columns: Mapping[str, pa.Array], rows: int) -> pa.Array:
    """The text of each row."""
    used = {name: columns[name] for name in template.columns}
    there = np.zeros((rows, 1 + len(used)), bool)
    for place, column in enumerate(used.values()):
        there[:, place] = pc.binary_length(column).to_numpy() > 0
    _, pattern_of, counts = np.unique(np.packbits(there, axis=1), axis=0, return_inverse=True, return_counts=True)
    parts, order = [], []
    rare = np.flatnonzero(counts[pattern_of] < FEW_ROWS)
    if len(rare):
        values = zip(*(column.take(pa.array(rare)).to_pylist() for column in used.values()), strict=True)
        texts = [clean(template.join(dict(zip(used, row, strict=True)))) for row in values]
        parts, order = [pa.array(texts, pa.string())], [rare]
    for pattern in np.flatnonzero(counts >= FEW_ROWS):
        chosen = np.flatnonzero(pattern_of == pattern)
        parts.append(_joined(template, used, there[chosen[0]], None if len(chosen) == rows else pa.array(chosen), rows))
        order.append(chosen)
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(order))))


def _joined(
    template: Template, columns: Mapping[str, pa.Array], there: NDArray[np.bool_], chosen: pa.Array | None, rows: int
) -> pa.Array:
    """The texts of the chosen rows (None: of all), which have the same columns."""
    literals, filled = template.layout([name for name, is_there in zip(columns, there[:-1], strict=True) if is_there])
    pieces: list[Any] = [clean(literals[0])]
    for name, literal in zip(filled, literals[1:], strict=True):
        pieces += [columns[name] if chosen is None else columns[name].take(chosen), clean(literal)]
    if not filled:
        return pa.repeat(pieces[0], rows if chosen is None else len(chosen))
    return pc.binary_join_element_wise(*pieces, "")


def _interleaved(columns: Sequence[pa.Array], rows: int) -> pa.Array:
    """The first values of all columns, then the second ones, and so on."""
    if len(columns) == 1:
        return columns[0]
    order = np.arange(rows * len(columns)).reshape(len(columns), rows).T.reshape(-1)
    return pa.concat_arrays(columns).take(pa.array(order))
