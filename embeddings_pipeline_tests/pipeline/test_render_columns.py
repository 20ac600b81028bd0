"""Templates by columns: the same texts as row by row, whatever the rows and the templates are."""

import json
import random
from typing import Any

import pyarrow as pa
import pytest

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.pipeline import render_columns as columns
from embeddings_pipeline.pipeline.render import render_row, texts_table
from embeddings_pipeline.pipeline.render_columns import RenderedTexts, content_hashes, render_columns
from embeddings_pipeline.store.source_rows import RAW_ITEMS

TEMPLATES = [
    "{a} | {b} | {c}",
    "{a} ({b}, {c} min)",
    "Title: {a}\n\nGenres: {c}. {b}",
    "<film title='{a}'>{b}</film> {a}",
    "{{{a}}}",
]
VALUES: list[Any] = [
    "a text",
    "",
    " ",
    None,
    "  with space around \n",
    "\u200b",
    "\u00a0hard\u00a0",
    "\x1fodd\x1f",
    "\u0600",
    "Ünïcödé",
    "ends oddly\u2028",
    0,
    12.5,
    True,
    ["Drama", "", None, " Comedy "],
    {"deep": [1, None]},
    "\U0001f600",
]


def definition(*templates: str, **others: Any) -> CollectionDefinition:
    attributes = {
        "name": "films",
        "source": {"table": "films", "key": ["id"]},
        "vectors": {f"name{number}": template for number, template in enumerate(templates)},
        **others,
    }
    return CollectionDefinition(CollectionAttributes.model_validate(attributes))


def some_rows(count: int, values: list[Any], ascii_only: bool = False) -> list[str]:
    chance = random.Random(count)
    return [json.dumps({name: chance.choice(values) for name in "abc"}, ensure_ascii=ascii_only) for _ in range(count)]


def assert_same(definition: CollectionDefinition, rows: list[str]) -> None:
    made, row_by_row = render_columns(definition, rows), RenderedTexts.of(render_row(definition, row) for row in rows)
    assert made.text.to_pylist() == row_by_row.text.to_pylist()
    assert made.chunk.equals(row_by_row.chunk)
    assert made.vector_name.equals(row_by_row.vector_name)
    assert made.texts_of_row.tolist() == row_by_row.texts_of_row.tolist()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("few", [1, 16, 10_000])
def test_columns_give_the_texts_that_rows_give(template: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "FEW_ROWS", few)
    for values in (VALUES, ["a text", "another"], ["a text", None], [""]):
        for ascii_only in (False, True):
            assert_same(definition(template), some_rows(200, values, ascii_only))


def test_several_vectors_and_chunks_come_in_the_order_of_the_rows() -> None:
    long = ["some words that are longer than a chunk may be, " * 5, "short", "", None]
    assert_same(definition(*TEMPLATES[:3]), some_rows(100, VALUES))
    assert_same(definition(*TEMPLATES[:3], chunk={"characters": 50, "overlap": 5}), some_rows(100, long))
    assert_same(definition(TEMPLATES[0], chunk={"characters": 2000, "overlap": 5}), some_rows(100, long))


def test_no_rows_give_no_texts() -> None:
    assert_same(definition(TEMPLATES[0]), [])
    table, failed = texts_table(definition(TEMPLATES[0]), RAW_ITEMS.empty_table())
    assert (table.num_rows, failed) == (0, {})


def test_a_template_of_more_columns_than_a_number_has_bits() -> None:
    names = [f"column{number}" for number in range(70)]
    rows = [json.dumps(dict.fromkeys(names, "a text") | {names[n]: None}) for n in range(70)]
    assert_same(definition(" ".join(f"{{{name}}}" for name in names)), rows)


def test_a_row_that_cannot_be_rendered_takes_no_other_along() -> None:
    good, bad = json.dumps({"a": "fine", "b": "x", "c": "y"}), json.dumps({"a": "no b"})
    nested = '{"a": "x", "b": "y", "c": {"d": %s}}' % ("[" * 5000 + "]" * 5000)
    rows = [good, bad, good, nested]
    items = pa.table([list("wxyz"), [b"0" * 16] * 4, rows, ["{}"] * 4], schema=RAW_ITEMS)
    table, failed = texts_table(definition(TEMPLATES[0]), items)
    assert table["item_key"].to_pylist() == ["w", "y"]
    assert table["text"].to_pylist() == ["fine | x | y"] * 2
    assert sorted(failed) == ["x", "z"]
    assert table["content_hash"].combine_chunks().equals(content_hashes(pa.array(["fine | x | y"] * 2)))


def test_rows_that_are_json_only_together_are_none() -> None:
    with pytest.raises(ValueError, match="no JSON document"):
        render_columns(definition(TEMPLATES[0]), ['{"a": 1, "b": 2, "c": 3}, {"a": 4, "b": 5, "c": 6}'])
