"""From files to definitions: every `defs.yaml` below a folder, with errors that name file and line."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionAttributes, CollectionDefinition, Reading
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


@dataclass(frozen=True)
class Defined:
    """The collections that are defined, by name, and the files that have a mistake: it stops only their own."""

    collections: dict[str, CollectionDefinition]
    mistakes: dict[Path, ConfigurationError]

    def find(self, name: str | None) -> CollectionDefinition:
        """As `find_collection`; if it is not among those without a mistake, the error of a file that may define it."""
        if self.mistakes and (name or "items") not in self.collections:
            raise self.mistakes[self.likeliest(name)]
        return find_collection(self.collections, name)

    def likeliest(self, name: str | None) -> Path:
        """Of the files that have a mistake, of which there is one at least, that which looks as if it defined `name`,
        else the first.
        """
        named = (path for path in self.mistakes if name is not None and _may_define(path, name))
        return next(named, next(iter(self.mistakes)))

    @property
    def own(self) -> dict[str, CollectionDefinition]:
        """Those without the sample."""
        return {name: each for name, each in self.collections.items() if not is_sample(each)}


def load_collections(folder: Path = PACKAGE_DEFS) -> dict[str, CollectionDefinition]:
    """Every collection defined below `folder`, by name, without Dagster.

    Raises ConfigurationError naming file and line if any has a mistake.
    """
    defined = read_collections(folder)
    for error in defined.mistakes.values():
        raise error
    return defined.collections


def read_collections(folder: Path = PACKAGE_DEFS) -> Defined:
    """Every collection defined below `folder`, and the mistakes of files that do not define one.

    Raises ConfigurationError if there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder; correct EMBEDDINGS_DEFS_DIR, or make it")
    collections: dict[str, CollectionDefinition] = {}
    mistakes: dict[Path, ConfigurationError] = {}
    twice = set()
    for path in definition_files(folder, mistakes):
        try:
            for collection in _read(path):
                if collection.name in collections:
                    other = collections[collection.name].path
                    twice.add(collection.name)
                    raise ConfigurationError(
                        f"{path}: collection {collection.name!r} is also defined in {other}; rename one"
                    )
                collections[collection.name] = collection
        except ConfigurationError as error:
            mistakes[path] = error
    return Defined({name: each for name, each in collections.items() if name not in twice}, mistakes)


def definition_files(folder: Path, mistakes: dict[Path, ConfigurationError] | None = None) -> list[Path]:
    """Every `defs.yaml`, a link to nothing among them. A folder that cannot be looked into is a mistake."""
    noted = {} if mistakes is None else mistakes

    def is_closed(error: OSError) -> None:
        path = Path(error.filename) / "defs.yaml"
        noted[path] = ConfigurationError(f"{path}: its folder cannot be read: {error.strerror}")

    files = []
    for here, folders, names in os.walk(folder, onerror=is_closed):
        if "defs.yaml" in (*folders, *names):
            files.append(Path(here) / "defs.yaml")
        # A ConfigMap that is mounted: `films/defs.yaml` is a link to `films/..2026_11_25/defs.yaml`.
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(files)


def _may_define(path: Path, name: str) -> bool:
    """Whether a file that has a mistake looks as if it defined a collection of that name."""
    with contextlib.suppress(OSError):
        written = re.compile(rf"(^\s*|[{{,]\s*)name:\s*[\"']?{re.escape(name)}\b".encode(), re.MULTILINE)
        return path.parent.name == name or written.search(path.read_bytes()) is not None
    return path.parent.name == name


def _read(path: Path) -> Iterator[CollectionDefinition]:
    try:
        content = path.read_bytes()
        documents = list(yaml.compose_all(content.decode("utf-8-sig"), Loader=yaml.SafeLoader))
        contents = [yaml.SafeLoader("").construct_document(node) for node in documents]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "; indent with spaces" if "\\t" in problem else ""
        raise ConfigurationError(f"{path}{line}: not valid YAML: {problem}{remedy}") from error
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise ConfigurationError(f"{path}: a link to {path.readlink()}, where no file is; mend it") from error
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if not contents:
        raise ConfigurationError(f"{path}:1: the file is empty; `dg scaffold defs {COMPONENT_TYPE}` writes one")
    for node, each in zip(documents, contents, strict=True):
        if mistake := _outline_mistake(node, each):
            raise ConfigurationError(f"{path}:{mistake}")
        if each["type"] != COMPONENT_TYPE:
            continue
        try:
            attributes = CollectionAttributes.model_validate(each.get("attributes") or {})
            yield CollectionDefinition(attributes, path, Reading(content))
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
