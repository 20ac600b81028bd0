"""Templates, hashes, and the cleaning of what no tokenizer takes."""

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


EACH_ALONE = [  # a template of two columns, and what each of them leaves alone
    ("{a} EUR | {b}", "A EUR", "B"),
    ("€{a} | {b}", "€A", "B"),
    ("{a} €{b}", "A", "€B"),
    ("{a} % {b}", "A %", "B"),
    ("{a} & {b}", "A", "B"),
    ("{a} and {b}", "A", "B"),
    ("{a}x{b} cm", "A", "B cm"),
    ("{a}h{b}min", "Ah", "Bmin"),
    ("{a}°N {b}°E", "A°N", "B°E"),
    ("{a} cm wide, {b}", "A cm wide", "B"),
    ("{a} km/h; {b}", "A km/h", "B"),
    ("{a}'s {b}", "A's", "B"),
    ("{a}-based {b}", "A-based", "B"),
    ('{a}" x {b}"', 'A"', 'B"'),
    ("{a} min. Genre: {b}", "A min", "Genre: B"),
    ("{a} 1,5-fach (e. g.) | {b}", "A 1,5-fach (e. g.)", "B"),
    ("{a} http://x.org/{b}", "A", "http://x.org/B"),
    ("{a} pre-{b}", "A", "pre-B"),
    ("{a} No. {b}", "A", "No. B"),
    ("1. {a} 2. {b}", "1. A", "2. B"),
    ("Title – {a} Genre – {b}", "Title – A", "Genre – B"),
    ("{a} by {b}", "A", "by B"),
    ("{a} #{b}", "A", "#B"),
    ("{a}@{b}", "A", "B"),
    ("{a}.{b}", "A", "B"),
    ("{a}/10 | {b}", "A/10", "B"),
    ("¿{a}? {b}", "¿A?", "B"),
    ("* {a}\n* {b}", "* A", "* B"),
    ("{a}: {b}", "A", "B"),
    ("{a}/{b}", "A", "B"),
    ("{a}{b}", "A", "B"),
    ("T: {a}\nB: {b}", "T: A", "B: B"),
    ("- {a}\n- {b}", "- A", "- B"),
    ("# {a}\n\n## Plot\n{b}", "# A", "## Plot\nB"),
    ("題名：{a}。著者：{b}", "題名：A", "著者：B"),
    ("„{a}“ – {b}", "„A“", "B"),
    ("»{a}« ›{b}‹", "»A«", "›B‹"),
    ("« {a} » {b}", "« A »", "B"),
    ("”{a}” ’{b}’", "”A”", "’B’"),
    ("״{a}״ 「{b}」", "״A״", "「B」"),
    ("\"{a}\" '{b}'", '"A"', "'B'"),
    ("{a} (by {b})", "A", "(by B)"),
    ("({a}, „{b}“)", "(A)", "(„B“)"),
    ("[{a}] {b}", "[A]", "B"),
    ("{a} <{b}>", "A", "<B>"),
    ("**{a}** _{b}_", "**A**", "_B_"),
    ("**T:** {a} **B:** {b}", "**T:** A", "**B:** B"),
    ("== {a} ==\n{b}", "== A ==", "B"),
    ("<h1>{a}</h1><p>{b}</p>", "<h1>A</h1>", "<p>B</p>"),
    ("<div><b>T</b>{a}<br>{b}</div>", "<div><b>T</b>A</div>", "<div>B</div>"),
    ('<a href="{a}">{b}</a>', '<a href="A"></a>', "<a>B</a>"),
    ('<film title="{a}" year="{b}"/>', '<film title="A"/>', '<film year="B"/>'),
    ('{{"a": "{a}", "b": {b}}}', '{"a": "A"}', '{"b": B}'),
    ("{a} [SEP] {b}", "A", "B"),
]


@pytest.mark.parametrize(("template", "only_a", "only_b"), EACH_ALONE)
def test_a_label_unit_bracket_or_quote_stays_and_goes_with_its_column(template, only_a, only_b):
    assert render(template, a="A", b=None) == only_a
    assert render(template, a="", b="B") == only_b
    assert render(template, a=[], b=" ") == ""
    assert render(template, a="A", b="B") == template.format(a="A", b="B")
    assert render(template, a=0, b=False) == template.format(a="0", b="false")


def test_the_rules_of_the_docs_are_those_of_the_code():
    pairs = [row for row in table_rows("first column empty") if row[2].startswith("`")]
    assert len(pairs) > 15
    for _, _, example, only_b, only_a in pairs:
        template = code(example)
        assert (template, render(template, a="A", b=None)) == (template, code(only_a))
        assert (template, render(template, a=None, b="B")) == (template, code(only_b))
    groups = table_rows("no price")
    assert len(groups) == 3
    lamp = {"title": "Lamp", "price": "12.50", "unit": "piece"}
    for template, full, without_price, without_title in (map(code, row) for row in groups):
        assert render(template, **lamp) == full
        assert render(template, **lamp | {"price": None}) == without_price
        assert render(template, **lamp | {"title": None}) == without_title


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the docs' table with that heading."""
    lines = (Path(__file__).parents[2] / "docs/reference/templates.md").read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if f"| {heading} |" in line) + 2
    rows = takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def code(cell: str) -> str:
    return cell.strip("`").replace("\\n", "\n").replace("\\|", "|")


def test_a_word_between_the_last_two_of_three_columns_is_left_with_none_of_them():
    template = "{a}, {b} and {c}"
    assert render(template, a=None, b=None, c="C") == "C"
    assert render(template, a="A", b=None, c="C") == "A and C"
    assert render(template, a="A", b="B", c=None) == "A, B"


@pytest.mark.parametrize(
    ("template", "full", "only_a", "without_a"),
    [
        ("{a}[ – from {b} EUR]", "A – from B EUR", "A", "from B EUR"),
        ("{a}[, {b} x {c} cm]", "A, B x C cm", "A", "B x C cm"),
        ("[{b} EUR | ]{a}", "B EUR | A", "A", "B EUR"),
        ("[{b}, ]{a}[ ({c})]", "B, A (C)", "A", "B (C)"),
        ("{a}[ – {b}[, {c}]]", "A – B, C", "A", "B, C"),
        ("{a}[ – {b} EUR[ per {c}]]", "A – B EUR per C", "A", "B EUR per C"),
        ("[[{c} – ]#{b}: ]Title {a}", "C – #B: Title A", "Title A", "C – #B"),
        ("{a} [[ by {b}]]", "A [by B]", "A", "[by B]"),
        ("{a} [x] [ {b} ]", "A [x] [ B ]", "A", "[x] [ B ]"),
    ],
)
def test_a_group_is_there_or_not_as_a_whole(template, full, only_a, without_a):
    row = {"a": "A", "b": "B", "c": "C"}
    assert render(template, **row) == full
    assert render(template, **row | {"b": None, "c": None}) == only_a
    assert render(template, **row | {"a": None}) == without_a


def test_a_group_needs_each_of_its_columns_but_not_those_of_a_group_within():
    assert render("{a}[, {b} x {c} cm]", a="A", b="B", c=None) == "A"
    assert render("{a}[ – {b}[, {c}]]", a="A", b="B", c=None) == "A – B"
    assert render("{a}[ – {b}[, {c}]]", a="A", b=None, c="C") == "A"
    assert render("{a}, [{b} EUR | ]{c}", a="A", b=None, c="C") == "A, C"


PAIRS = [
    "()",
    "[]",
    "„“",
    "„”",
    "“”",
    "«»",
    "»«",
    "‚‘",
    '""',
    "''",
    "「」",
    "（）",
    ("**", "**"),
    ("`", "`"),
    ("<b>", "</b>"),
]
SEPARATORS = [" | ", ", ", "; ", " – ", " / ", "\n", "\n\n", " · ", "、"]
LABELS = ["", "Genre: ", "Year = ", "#", "€", "Release date: "]
UNITS = ["", " EUR", " cm wide", " %", "°", "′", " Stück (netto)"]


@st.composite
def fields(draw):
    """The text of a column's value with what belongs to it, and that with the column's name in its place."""
    pairs = draw(st.lists(st.sampled_from(PAIRS), max_size=2))
    opening, closing = "".join(pair[0] for pair in pairs), "".join(pair[-1] for pair in reversed(pairs))
    pattern = draw(st.sampled_from(LABELS)) + opening + "VALUE" + closing + draw(st.sampled_from(UNITS))
    value = draw(st.sampled_from(["Heat", "0", 0, False, 12.5, "a (b", "", None, [], "\u200b", " \ufeff\u00ad"]))
    empty = value is None or value == [] or (isinstance(value, str) and value not in ("Heat", "0", "a (b"))
    return pattern, value, empty


@given(st.lists(fields(), min_size=1, max_size=6), st.data())
def test_what_belongs_to_a_column_is_there_exactly_if_the_column_is(parts, data):
    template, expected = "", ""
    for n, (pattern, value, empty) in enumerate(parts):
        separator = data.draw(st.sampled_from(SEPARATORS)) if n else ""
        template += separator + pattern.replace("VALUE", f"{{c{n}}}")
        if not empty:
            expected += (separator if expected else "") + pattern.replace("VALUE", json.dumps(value).strip('"'))
    row = {f"c{n}": value for n, (_, value, _) in enumerate(parts)}
    assert render(template, **row) == expected.strip()


COLUMNS = st.sampled_from(["{a}", "{b}", "{c}"])
PIECES = [
    *"()[]<>\"'„“”«»*_`|,.:;=-–/#€% \n",
    "a",
    "word",
    "{a}",
    "{b}",
    "{c}",
    "<b>",
    "</b>",
    "<br>",
    "**",
    "{{",
    "}}",
    "[SEP]",
]


@given(st.lists(COLUMNS | st.sampled_from(PIECES), max_size=25).map("".join))
def test_a_full_row_renders_the_template_as_it_is_and_an_empty_one_nothing(template):
    try:
        parsed = Template(template)
    except ValueError:
        return
    assert parsed.render(dict.fromkeys("abc")) == ""
    text = parsed.render({"a": "A", "b": "B", "c": "C"})
    full = re.sub(r"\{\{|\}\}|\{(.)\}", lambda found: found[1].upper() if found[1] else found[0][0], template).strip()
    assert text == full or without_brackets(text) == without_brackets(full)


def without_brackets(text: str) -> str:
    """A text without what a group takes away: its brackets, and separators where nothing is beside it."""
    return re.sub(r"\W", "", text)


@pytest.mark.parametrize(
    "invisible",
    ["\u200b", "\ufeff", "\xad", "\u2060\u200d", "\u3164", "\u115f", "\u180e", "\u2800", "\u034f", "\u202e", "\ufe0f",
     "\U000e0041", "\x1b\x7f", "\u2028", " \u200b\t\u3000 ", ["\u200b", None, " "]],
)  # fmt: skip
def test_what_cannot_be_seen_is_blank(invisible):
    assert render("Title: {title} | {plot}", title=invisible, plot="A heist") == "A heist"
    assert render("{title}", title=invisible) == ""
    assert render("{tags}", tags=["Drama", invisible, "Heist"]) == "Drama, Heist"


@pytest.mark.parametrize("seen", ["\u0600", "\ufffd", "…", ".", "👨\u200d👩", "a\u200b", "\u0301"])
def test_what_can_be_seen_is_kept_as_it_is(seen):
    assert render("{title}", title=seen) == seen


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
