"""From files to definitions: every `defs.yaml` below a folder, with errors that name file and line."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.mistakes import describe_validation_error, line_of
from embeddings_pipeline.config.settings import PACKAGE_DEFS
from embeddings_pipeline.errors import ConfigurationError, did_you_mean

DOCUMENT_KEYS = ("type", "attributes", "template_vars_module", "requirements", "post_processing")  # Dagster's


def find_collection(collections: Mapping[str, CollectionDefinition], name: str | None) -> CollectionDefinition:
    """The collection of that name; without a name, the only one or `items`. ConfigurationError if there is none.

    The sample counts only if it is named, or alone.
    """
    if not collections:
        raise ConfigurationError(
            f"no collection is defined yet: `dg scaffold defs {COMPONENT_TYPE} NAME --table TABLE` proposes one"
        )
    if name is None:
        own = without_sample(collections)
        if len(own) == 1 or "items" in own:
            return own["items"] if "items" in own else next(iter(own.values()))
        raise ConfigurationError(f"say with --collection which collection: {' or '.join(sorted(own))}")
    if name in collections:
        return collections[name]
    known = ", ".join(sorted(collections)) or "none"
    raise ConfigurationError(f"there is no collection {name!r}; defined are: {known}{did_you_mean(name, collections)}")


def without_sample(collections: Mapping[str, CollectionDefinition]) -> dict[str, CollectionDefinition]:
    """One's own collections; the sample, films that `load` has put into the table `movies`, if there are no others."""
    own = {name: one for name, one in collections.items() if not is_sample(one)}
    return own or dict(collections)


def is_sample(collection: CollectionDefinition) -> bool:
    """Whether it is the one that the package brings, as it brings it."""
    return collection.path == PACKAGE_DEFS / "items" / "defs.yaml" and collection.attributes.source.table == "movies"


def load_collections(folder: Path = PACKAGE_DEFS) -> dict[str, CollectionDefinition]:
    """Every collection defined below `folder`, by name, without Dagster.

    Raises ConfigurationError naming file and line.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder; correct EMBEDDINGS_DEFS_DIR, or make it")
    collections: dict[str, CollectionDefinition] = {}
    for path in sorted(folder.rglob("defs.yaml")):
        for collection in _read(path):
            if collection.name in collections:
                other = collections[collection.name].path
                raise ConfigurationError(
                    f"{path}: collection {collection.name!r} is also defined in {other}; rename one"
                )
            collections[collection.name] = collection
    return collections


def _read(path: Path) -> Iterator[CollectionDefinition]:
    try:
        documents = list(yaml.compose_all(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader))
        contents = [yaml.SafeLoader("").construct_document(node) for node in documents]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "; indent with spaces" if "\\t" in problem else ""
        raise ConfigurationError(f"{path}{line}: not valid YAML: {problem}{remedy}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if not contents:
        raise ConfigurationError(f"{path}:1: the file is empty; `dg scaffold defs {COMPONENT_TYPE}` writes one")
    for node, content in zip(documents, contents, strict=True):
        if mistake := _outline_mistake(node, content):
            raise ConfigurationError(f"{path}:{mistake}")
        if content["type"] != COMPONENT_TYPE:
            continue
        try:
            yield CollectionDefinition(CollectionAttributes.model_validate(content.get("attributes") or {}), path)
        except ValidationError as error:
            mistake = describe_validation_error(error, CollectionAttributes, node)
            raise ConfigurationError(f"{path}:{mistake}") from error


def _outline_mistake(node: yaml.Node, content: Any) -> str | None:
    """What is wrong with a document before its attributes are looked at; nothing in another component's document."""
    if not isinstance(content, dict) or "type" not in content:
        mistyped = did_you_mean("type", content) if isinstance(content, dict) else ""
        return f"{line_of(node, [])}: type: this key is missing{mistyped}; a collection has `type: {COMPONENT_TYPE}`"
    kind = str(content["type"])
    if kind != COMPONENT_TYPE:
        near = kind.startswith("embeddings_pipeline") or difflib.get_close_matches(kind, [COMPONENT_TYPE], cutoff=0.8)
        return (
            f"{line_of(node, ['type'])}: type: {kind!r} is not known; did you mean {COMPONENT_TYPE!r}?"
            if near
            else None
        )
    for key in content:
        if key not in DOCUMENT_KEYS:
            return f"{line_of(node, [key])}: {key}: this key is not known{did_you_mean(str(key), DOCUMENT_KEYS)}"
    if twice := _key_twice(node):
        return f"{twice.start_mark.line + 1}: {twice.value}: this key stands there twice; YAML would take the last one"
    return None


def _key_twice(node: yaml.Node) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                return key
            seen.add(key.value)
            if (found := _key_twice(value)) is not None:
                return found
    return None
