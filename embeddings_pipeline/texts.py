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


def as_text(value: Any) -> str:
    """A JSON value as people write it: lists joined with commas, nothing for null, objects as compact JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(text for text in map(as_text, value) if text)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return str(value)


def parse_row(template_json: str) -> dict[str, Any]:
    """The columns of a row from its JSON; numbers stay as the database wrote them (`12.50`, 20 digits)."""
    return json.loads(template_json, parse_float=str, parse_int=str)


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
    """The same for a JSON document, where such characters are escaped; what needs no cleaning is returned as it is."""
    if "\\u0000" not in document and "\\ud" not in document.lower():
        return document
    return clean(json.dumps(_clean_values(json.loads(document)), ensure_ascii=False))


def _clean_values(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_values(part) for part in value]
    if isinstance(value, dict):
        return {clean(name): _clean_values(part) for name, part in value.items()}
    return value


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


def row_hash(item_key: str, template_json: str, payload_json: str) -> bytes:
    """BLAKE2b-128 over an item's key, template columns and payload, and nothing else of its row."""
    return blake2b(f"{item_key}\x00{template_json}\x00{payload_json}".encode(), digest_size=HASH_BYTES).digest()
