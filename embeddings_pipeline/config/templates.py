"""From rows to texts: templates, how values are written, and content hashes."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import regex

from embeddings_pipeline.config.template_parser import parse

HASH_BYTES = 16  # BLAKE2b-128
# Part of each definition's hash. Raised with a change of how rows become texts, so that each row is rendered anew; only
# texts that come out otherwise are embedded.
RENDERING_RULES = 2


class Template:
    """A text with `{column}` in it, and nothing else: no attributes, no formats, no code.

    An empty column takes along what belongs to it: label, unit, brackets, quotes, tags and separator. `{a} ({b})`
    without `b` is `{a}`. `{{` and `}}` stand for braces. The rules are in docs/reference/templates.md.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self.columns = tuple(name for name in re.findall(r"\{\{|\}\}|\{([^{}]*)\}", template) if name)
        self._sequence = parse(template)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of one row. `row` has a value for each column of the template (KeyError if not)."""
        values = {}
        for column in self.columns:
            value = row[column]
            values[column] = visible(value if type(value) is str else as_text(value))
        return self.join(values)

    def join(self, values: Mapping[str, str]) -> str:
        """The text of a row whose columns are written out, "" for an empty one."""
        return self._sequence.render(values).strip()

    def layout(self, there: Collection[str]) -> tuple[list[str], list[str]]:
        """What the text of a row is joined from if these columns have values and the others are empty: the literals
        around, and the columns between them, of which there is one less.
        """
        if _MARK in self.template:
            raise ValueError(f"the template has the character {_MARK!r}")
        marked = {name: f"{_MARK}{name}{_MARK}" if name in there else "" for name in self.columns}
        parts = self.join(marked).split(_MARK)
        return parts[::2], parts[1::2]


_MARK = "\x00"  # in no column's name and in no value


class _Number(str):
    """A number of a JSON document, as it is written there."""


def as_text(value: Any) -> str:
    """A JSON value as people write it: lists joined with commas, nothing for null, objects as compact JSON."""
    if isinstance(value, str):
        return str(value)
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(text for text in map(as_text, value) if visible(text))
    return _as_json(value)


def visible(text: str) -> str:
    """A text without white space around it; "" if no character of it can be seen."""
    stripped = text.strip()
    if "!" <= stripped[:1] <= "~":  # which can be seen, as nearly every text's first character
        return stripped
    return "" if _INVISIBLE.fullmatch(text) else stripped


# Signs such as U+0600, before numbers, are format characters and can be seen. U+2800 is Braille without dots.
_INVISIBLE = regex.compile(
    r"[\s\p{Z}\p{Cc}\p{Default_Ignorable_Code_Point}[\p{Cf}--\p{Prepended_Concatenation_Mark}]\u2800]*", regex.V1
)


def _as_json(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_as_json, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_as_json(name)}: {_as_json(part)}' for name, part in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def parse_row(row_json: str) -> dict[str, Any]:
    """The columns of a row from its JSON, cleaned; numbers stay as the database wrote them (`12.50`, 20 digits)."""
    row: dict[str, Any] = _ROWS.decode(clean_json(row_json))
    return row


def parse_rows(rows: Sequence[str]) -> list[dict[str, Any]]:
    """As `parse_row`, for many at once."""
    parsed: list[dict[str, Any]] = _ROWS.decode(f"[{','.join(map(clean_json, rows))}]")
    if len(parsed) != len(rows):
        raise ValueError("a row is no JSON document")
    return parsed


_ROWS = json.JSONDecoder(parse_float=_Number, parse_int=_Number)


def clean(text: str) -> str:
    """Without what neither PostgreSQL nor a tokenizer takes: NUL and lone surrogates become U+FFFD."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_json(document: str) -> str:
    """The same for a JSON document, where such characters are escaped; all else in it stays as it is written."""
    return _ESCAPE.sub(_clean_escape, document) if "\\u" in document else document


# Every escape is matched, so that the second backslash of `\\u0000`, which is text, is not taken for the first.
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.")


def _clean_escape(match: re.Match[str]) -> str:
    escape = match[0].lower()
    lone = len(escape) == 6 and "\\ud800" <= escape <= "\\udfff"
    return "\ufffd" if escape == "\\u0000" or lone else match[0]


def content_hash(text: str) -> bytes:
    """BLAKE2b-128 of a text exactly as it goes to the encoder, less the profile's prompt."""
    return blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def row_hash(item_key: str, row_json: str) -> bytes:
    """BLAKE2b-128 over an item's key, template columns and payload, and nothing else of its row."""
    return blake2b(f"{item_key}\x00{row_json}".encode(), digest_size=HASH_BYTES).digest()


def unreadable_hash(item_key: str) -> bytes:
    """In place of the row hash of an item whose row cannot be read: as long as that is so, nothing has changed."""
    return row_hash(item_key, "unreadable")
