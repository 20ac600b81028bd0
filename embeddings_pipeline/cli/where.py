"""Conditions as people type them: `release_year>=2000`, and as JSON."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import ConfigurationError

OPERATORS = {"=": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def where_of_words(definition: CollectionDefinition, words: Sequence[str]) -> dict[str, Any] | None:
    """The condition that all of these make together, as `search` takes it; None without any. ConfigurationError."""
    if not words:
        return None
    return {"and": [_condition(definition, each) for each in words]}


def _condition(definition: CollectionDefinition, words: str) -> Any:
    if words.lstrip().startswith("{"):
        return _parsed(words, words)
    match = re.fullmatch(r"\s*(.+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*", words, re.DOTALL)
    if not match:
        raise ConfigurationError(
            f"--where {words!r} is no condition: write 'column>=value' with one of {' '.join(OPERATORS)}, or JSON"
        )
    column, operator, written = match.groups()
    kind = definition.attributes.filters.get(column)
    value = _value(kind.type if kind else "text", written, words)
    if isinstance(value, list):
        return {"not": {column: {"any": value}}} if operator == "!=" else {column: value}
    return {column: {OPERATORS[operator]: value}}


def _value(kind: str, written: str, words: str) -> Any:
    """What is written behind the operator: as JSON, if that says more than the bare words do."""
    if written == "null":
        return None
    if written.startswith(("[", '"')):
        return _parsed(written, words)
    if kind == "boolean" and written in ("true", "false"):
        return written == "true"
    if kind == "number":
        try:
            return Decimal(written)
        except InvalidOperation:
            return written  # which is told like any other value of a wrong type
    return written


def _parsed(text: str, words: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"--where {words!r} is no JSON: {error}") from None
