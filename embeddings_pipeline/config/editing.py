"""Changing one value of a `defs.yaml`: all else in the file stays as it is, to the byte.

The parser says where the value stands, and only that is replaced. Writing the parsed document anew, which ruamel.yaml
does well, still moves comments and spaces.
"""

import os
import shutil
import tempfile
from pathlib import Path

import yaml

from embeddings_pipeline.errors import ConfigurationError


def write_profile(path: Path, collection: str, name: str, *, in_destination: bool = False) -> None:
    """Set `profile:` of the collection's attributes, or of `destination:`. ConfigurationError if it is not one plain
    text there.
    """
    _set(path, collection, _profile_keys(in_destination), name, "the rest of the switch")


def may_write_profile(path: Path, collection: str, name: str, *, in_destination: bool = False) -> bool:
    """Whether `write_profile` can do that."""
    try:
        changed = _rewritten(path.read_text(encoding="utf-8"), collection, _profile_keys(in_destination), name)
    except (OSError, UnicodeDecodeError):
        return False
    return changed is not None and os.access(path.parent, os.W_OK)


def _profile_keys(in_destination: bool) -> list[str]:
    return ["destination", "profile"] if in_destination else ["profile"]


def write_name(path: Path, old: str, new: str) -> None:
    """Set `name:` of the collection `old`, one of those that the file defines, unless that is done. ConfigurationError
    as above.
    """
    if _names(path) >= {new} and old not in _names(path):
        return
    _set(path, old, ["name"], new, "the rest of the renaming")


def _set(path: Path, collection: str | None, keys: list[str], value: str, done: str) -> None:
    by_hand = ConfigurationError(f"{path}: set `{'.'.join(keys)}: {value}` there by hand; {done} is done")
    with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
        text = file.read()
    changed = _rewritten(text, collection, keys, value)
    if changed is None:
        raise by_hand
    try:
        _replace(path, changed)
    except OSError as error:
        raise ConfigurationError(f"{by_hand} ({path} cannot be written: {error.strerror})") from error


def _rewritten(text: str, collection: str | None, keys: list[str], value: str) -> str | None:
    """The text with the value, and nothing else changed; None if that cannot be done."""
    try:
        changed = _changed(text, collection, keys, value)
        wanted = list(yaml.safe_load_all(text))
        _attributes(wanted, collection, keys)[keys[-1]] = value
        return changed if list(yaml.safe_load_all(changed)) == wanted else None  # the value may have had an alias
    except (yaml.YAMLError, KeyError, TypeError, ValueError, StopIteration):
        return None


def _replace(path: Path, text: str) -> None:
    """The new content, or, whatever fails, the old one."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            shutil.copymode(path, file.name)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _names(path: Path) -> set[str]:
    """The collections that the file defines; none if it cannot be read."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        return {document["attributes"]["name"] for document in documents}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return set()


def _attributes(documents: list[dict], collection: str | None, keys: list[str]) -> dict:
    """The mapping that has, or is to have, the last key."""
    section = next(one["attributes"] for one in documents if collection in (None, one["attributes"]["name"]))
    for key in keys[:-1]:
        section = section[key]
    return section


def _changed(text: str, collection: str | None, keys: list[str], value: str) -> str:
    """The text with the value, or with a line for it below `name:`. KeyError or ValueError if it has no place."""
    documents = [_values(node) for node in yaml.compose_all(text, Loader=yaml.SafeLoader)]
    attributes = [_values(one["attributes"]) for one in documents if "attributes" in one]
    section = next(one for one in attributes if collection is None or one["name"].value == collection)
    for key in keys[:-1]:
        section = _values(section[key])
    if (node := section.get(keys[-1])) is not None:
        if not isinstance(node, yaml.ScalarNode) or node.style in ("|", ">"):
            raise ValueError("not a text of one line")
        quote = node.style or ('"' if yaml.safe_load(value) != value else "")  # `no` is a truth value in YAML
        return f"{text[: node.start_mark.index]}{quote}{value}{quote}{text[node.end_mark.index :]}"
    above = section["name"]
    end = text.index("\n", above.end_mark.index) + 1
    line_end = "\r\n" if text[:end].endswith("\r\n") else "\n"
    line = text[text.rfind("\n", 0, above.start_mark.index) + 1 : end]
    indent = line[: len(line) - len(line.lstrip())]
    return f"{text[:end]}{indent}{keys[-1]}: {value}{line_end}{text[end:]}"


def _values(node: yaml.Node) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("not a mapping")
    return {key.value: value for key, value in node.value}
