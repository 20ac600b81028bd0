"""Templates, chunks, hashes, and the cleaning of what no tokenizer takes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_pipeline.config.chunks import split_chunks
from embeddings_pipeline.config.templates import (
    Template,
    clean,
    clean_json,
    content_hash,
    parse_row,
    row_hash,
)


def render(template: str, **row: object) -> str:
    return Template(template).render(row)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"a": "A", "b": "B", "c": "C"}, "A | B | C"),
        ({"a": None, "b": "B", "c": "C"}, "B | C"),
        ({"a": "A", "b": "", "c": "C"}, "A | C"),
        ({"a": "A", "b": "B", "c": " \n\t"}, "A | B"),
        ({"a": None, "b": None, "c": "C"}, "C"),
        ({"a": None, "b": "\u00a0", "c": ""}, ""),
    ],
)
def test_an_empty_column_takes_its_separator_with_it(row, text):
    assert render("{a} | {b} | {c}", **row) == text


@pytest.mark.parametrize(
    ("year", "genres", "text"),
    [
        ("1999", "Drama", "Heat (1999). Genres: Drama."),
        (None, "Drama", "Heat. Genres: Drama."),
        ("1999", None, "Heat (1999)"),
        (None, [], "Heat"),
    ],
)
def test_an_empty_column_takes_its_label_and_brackets_with_it(year, genres, text):
    assert render("{title} ({year}). Genres: {genres}.", title="Heat", year=year, genres=genres) == text


def test_a_first_column_that_is_empty_leaves_no_label_and_no_separator():
    assert render("Title: {title} | Plot: {plot}", title=" ", plot="A heist") == "Plot: A heist"
    assert render('"{title}" {plot}', title=None, plot="A heist") == "A heist"


def test_doubled_braces_stand_for_braces():
    assert render("{{{title}}} {{x}}", title="Heat") == "{Heat} {x}"


@pytest.mark.parametrize("template", ["", "no column", "{}", "{title", "title}", "{title}}", "{a{b}}", "{{title}}"])
def test_a_template_that_cannot_be_rendered_is_refused_and_shown(template):
    with pytest.raises(ValueError, match="template") as error:
        Template(template)
    assert repr(template) in str(error.value)


@pytest.mark.parametrize(
    "inside", ["title.__class__", "0", "title!r", "title:>10", "title[0]", " title ", "__import__"]
)
def test_what_stands_in_braces_is_a_column_name_and_nothing_is_evaluated(inside):
    template = Template(f"{{{inside}}}")
    assert template.columns == (inside,)
    assert template.render({inside: "x"}) == "x"
    with pytest.raises(KeyError):
        template.render({"title": "Heat"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12.50", "12.50"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("1e400", "1e400"),
        ('"1999-12-31"', "1999-12-31"),
        ('"2024-02-29T12:00:00+00:00"', "2024-02-29T12:00:00+00:00"),
        ("true", "true"),
        ("false", "false"),
        ("0", "0"),
        ("null", ""),
        ("[]", ""),
        ('["Drama", null, " ", "Sci-Fi"]', "Drama, Sci-Fi"),
        ("[1, 2.50, true]", "1, 2.50, true"),
        ("[[1, 2], [3]]", "1, 2, 3"),
        ('{"a": 1, "b": [2.50, null, "ü"], "c": {"d": false}}', '{"a": 1, "b": [2.50, null, "ü"], "c": {"d": false}}'),
        ('[{"name": "x", "id": 12345678901234567890}]', '{"name": "x", "id": 12345678901234567890}'),
    ],
)
def test_values_are_written_as_people_write_them_and_numbers_as_the_database_did(value, text):
    assert Template("{v}").render(parse_row(f'{{"v": {value}}}')) == text


@given(st.text(st.characters(codec=None), max_size=300), st.integers(1, 60), st.data())
def test_chunks_lose_nothing_and_none_is_longer_than_asked(text, characters, data):
    overlap = data.draw(st.integers(0, characters // 2))
    text = text.strip()
    chunks = split_chunks(text, characters, overlap)
    assert all(len(chunk) <= characters for chunk in chunks)
    assert all(chunk in text for chunk in chunks)
    place = 0
    for chunk in chunks:  # each begins before or where what is covered ends, but for white space
        start = (
            next(n for n in range(len(text)) if text.startswith(chunk, n) and (n >= place or n + len(chunk) > place))
            if chunk
            else 0
        )
        assert text[place:start].strip() == ""
        place = max(place, start + len(chunk))
    assert text[place:].strip() == ""


@given(st.lists(st.text("abcd", min_size=1, max_size=9), min_size=1, max_size=80), st.integers(20, 60))
def test_without_overlap_words_are_never_cut(words, characters):
    chunks = split_chunks(" ".join(words), characters)
    assert " ".join(chunks).split() == words


def test_a_megabyte_of_text_is_cut_in_no_time_and_overlaps_as_asked():
    text = "word " * 200_000
    chunks = split_chunks(text.strip(), 1000, 100)
    assert len(chunks) < 1200
    assert chunks[1].startswith(chunks[0][-90:].split(" ", 1)[1][:40])
    assert len(split_chunks("x" * 1_000_000, 1000)) == 1000


def test_without_chunking_there_is_one_text_blank_or_not():
    assert split_chunks("", None) == [""]
    assert split_chunks("", 50) == [""]
    assert split_chunks("short", 50, 10) == ["short"]


def test_equal_texts_have_equal_hashes_and_one_character_makes_another():
    assert content_hash("Heat") == content_hash("Heat")
    assert len({content_hash(text) for text in ("Heat", "heat", "Heat ", "", "H\u0065\u0301at")}) == 5
    assert len(content_hash("")) == 16


def test_the_row_hash_tells_key_and_row_apart():
    assert row_hash("1", '{"a":2}') == row_hash("1", '{"a":2}')
    assert len({row_hash("1", "2"), row_hash("12", ""), row_hash("", "12"), row_hash("1", "3")}) == 4


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("a\x00b", "a\ufffdb"),
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("fine 😀 שלום", "fine 😀 שלום"),
    ],
)
def test_clean_replaces_nul_and_lone_surrogates_and_nothing_else(broken, text):
    assert clean(broken) == text
    clean(broken).encode()


@pytest.mark.parametrize(
    ("document", "cleaned"),
    [
        ('{"a": "x\\u0000y"}', '{"a": "x\ufffdy"}'),
        ('{"a": "\\uD800 \\udc00"}', '{"a": "\ufffd \ufffd"}'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "\\ud83d\\ude00"}'),
        ('{"a": "\\\\u0000 \\\\\\u0000"}', '{"a": "\\\\u0000 \\\\\ufffd"}'),
        ('{"\\u0000": 12.50, "b": 12345678901234567890.10}', '{"\ufffd": 12.50, "b": 12345678901234567890.10}'),
        ('{"a": 1.50}', '{"a": 1.50}'),
    ],
)
def test_clean_json_replaces_the_same_in_escapes_and_keeps_numbers(document, cleaned):
    assert clean_json(document) == cleaned


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda part: st.lists(part, max_size=3)))
def test_clean_json_of_what_is_clean_means_the_same(value):
    document = json.dumps({"v": value})
    if "\\u0000" not in document:
        assert json.loads(clean_json(document)) == json.loads(document)
    clean_json(document).encode()
