"""From rows to texts: templates, chunks and content hashes."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

HASH_BYTES = 16  # BLAKE2b-128


@dataclass(frozen=True)
class _Part:
    separator: str  # dropped where nothing stands before it
    label: str  # belongs to the column: `Genres: `
    column: str
    suffix: str  # belongs to the column: a closing bracket or quote, the end of the template


class Template:
    """A text with `{column}` in it, and nothing else: no attributes, no formats, no code.

    An empty column takes its label and its separator with it: `{title} ({year}) | {overview}` without a year is
    `title | overview`. `{{` and `}}` stand for braces.
    """

    def __init__(self, template: str) -> None:
        pieces = re.split(r"(\{\{|\}\}|\{[^{}]*\})", template)
        literals, columns = [""], []
        for piece in pieces:
            if piece in ("{{", "}}"):
                literals[-1] += piece[0]
            elif piece.startswith("{") and piece.endswith("}"):
                columns.append(piece[1:-1])
                literals.append("")
            else:
                if "{" in piece or "}" in piece:
                    raise ValueError(f"template {template!r} has a brace without its partner: write {{{{ for a brace")
                literals[-1] += piece
        if not columns or not all(columns):
            raise ValueError(f"template {template!r} needs at least one {{column}}, with a name in its braces")
        self.template = template
        self.columns = tuple(columns)
        self._parts = list(self._split(literals, columns))

    @staticmethod
    def _split(literals: list[str], columns: list[str]) -> Iterator[_Part]:
        before = literals[0]
        for n, column in enumerate(columns):
            after = literals[n + 1]
            if n + 1 == len(columns):
                suffix, rest = after, ""
            else:
                suffix = re.match(r"[)\]}\"'”’»]*", after).group()  # type: ignore[union-attr]
                rest = after[len(suffix) :]
            # The label begins with the first letter, digit or opening bracket; what is before it only separates.
            separator = "" if n == 0 else re.match(r"[^\w(\[{\"'“‘«]*", before).group()  # type: ignore[union-attr]
            yield _Part(separator, before[len(separator) :], column, suffix)
            before = rest

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of one row. `row` has a value for each column of the template (KeyError if not)."""
        text = ""
        for part in self._parts:
            if value := as_text(row[part.column]).strip():
                text += (part.separator if text else "") + part.label + value + part.suffix
        return text.strip()


class _Number(str):
    """A number of a JSON document, as it is written there."""


def as_text(value: Any) -> str:
    """A JSON value as people write it: lists joined with commas, nothing for null, objects as compact JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(text for text in map(as_text, value) if text.strip())
    return _as_json(value)


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
    return json.loads(clean_json(row_json), parse_float=_Number, parse_int=_Number)


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


def split_chunks(text: str, characters: int | None, overlap: int = 0) -> list[str]:
    """Pieces of at most `characters`, cut at white space where there is some; one piece if `characters` is None."""
    if characters is None or len(text) <= characters:
        return [text]
    chunks, start = [], 0
    while start < len(text):
        end = min(start + characters, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end + 1), text.rfind("\n", start, end + 1))
            # A cut before the middle would make many tiny chunks of a text with few spaces.
            end = space if space > start + characters // 2 else end
        chunks.append(text[start:end].strip())
        if end >= len(text):
            break
        start = max(end - overlap, start + 1)
        if overlap and (space := text.find(" ", start, end)) >= 0:
            start = space
    return [chunk for chunk in chunks if chunk]


def content_hash(text: str) -> bytes:
    """BLAKE2b-128 of a text exactly as it goes to the encoder, less the profile's prompt."""
    return blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def row_hash(item_key: str, row_json: str) -> bytes:
    """BLAKE2b-128 over an item's key, template columns and payload, and nothing else of its row."""
    return blake2b(f"{item_key}\x00{row_json}".encode(), digest_size=HASH_BYTES).digest()
