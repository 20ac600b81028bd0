"""What is wrong with a mapping that pydantic refused, in one line: the key, the value, and what would be right."""

from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from embeddings_pipeline.errors import did_you_mean

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
Where = Sequence[int | str]


def describe_validation_error(error: ValidationError, model: type, document: yaml.Node | None = None) -> str:
    """One mistake in one line: `12: source.table: …`; with the document's YAML node, its line is named.

    `model` is what the attributes were validated as.
    """
    where, words = explain(error, model)
    line = f"{line_of(document, ['attributes', *where])}: " if document is not None else " "
    return f"{line}{'.'.join(map(str, where)) or 'attributes'}: {words}"


def explain(error: ValidationError, model: type) -> tuple[list[int | str], str]:
    """The key of the first mistake, as a path, and what is wrong with it."""
    # A mistyped key is also a missing one: the key that is there says more.
    first = min(error.errors(), key=lambda mistake: mistake["type"] not in UNKNOWN_KEY)
    where = _path(first)
    words = _explained(first, where, model)
    if first["type"] == "missing":
        others = [
            path[-1]
            for mistake in error.errors()
            if mistake["type"] == "missing" and mistake is not first
            for path in [_path(mistake)]
            if path[:-1] == where[:-1] and path != where
        ]
        words += f" Missing too: {', '.join(map(str, others))}." if others else ""
    return where, " ".join(words.split())


def _path(mistake: ErrorDetails) -> list[int | str]:
    where = mistake["loc"]
    return [part for n, part in enumerate(where) if part != "[key]" and not _is_tag(where, n)]


def _is_tag(where: Where, n: int) -> bool:
    """Whether a part is no key, but says which kind of profile was taken for meant."""
    return n > 0 and where[n - 1] == "profile" and where[n] in ("name", "mapping")


def _explained(mistake: ErrorDetails, where: list[int | str], model: type) -> str:
    value, expected = mistake["input"], mistake.get("ctx", {}).get("expected", "")
    match mistake["type"]:
        case "string_type" if where[-1:] == ["profile"]:
            return f"{value!r} is not a profile's name, nor a mapping that describes one"
        case kind if kind in UNKNOWN_KEY:
            known = _fields(model, where[:-1])
            return f"this key is not known{did_you_mean(str(where[-1]), known) or '; known are: ' + ', '.join(known)}"
        case "missing":
            return f"this key is missing. {_fields(model, where[:-1])[str(where[-1])].description or ''}"
        case "literal_error":
            return f"{value!r} is not {expected}"
        case "string_type":
            return f"{value!r} is not text; put it in quotes if it is meant so"
        case "tuple_type":
            return f"{value!r} is not a list; write it as [a, b]"
        case "dict_type" | "model_type" | "model_attributes_type" | "dataclass_type":
            return f"{value!r} is not a mapping; write `key: value` lines below it"
    return str(mistake["msg"]).removeprefix("Value error, ")


def _fields(model: type, where: Where) -> dict[str, FieldInfo]:
    """The keys that a section may have. `where`: the section's path."""
    found: type | None = model
    for part in where:
        field = _fields_of(found).get(str(part))
        if field is not None:  # else the name of a profile
            found = _section(field.annotation)
    return _fields_of(found)


def _fields_of(model: type | None) -> dict[str, FieldInfo]:
    return dict(getattr(model, "__pydantic_fields__", {}))


def _section(annotation: Any) -> type | None:
    """The model in a field's annotation: X of `X | None`, or of `dict[str, X]`."""
    if hasattr(annotation, "__pydantic_fields__"):
        return annotation
    return next((model for part in get_args(annotation) if (model := _section(part)) is not None), None)


def line_of(node: yaml.Node, where: Where) -> int:
    """The line, from 1, of a key in a document, or of the nearest section around it."""
    line = node.start_mark.line + 1
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
