"""Is a definition still what its file says? Whoever acts on one looks first, and steps aside if it is not."""

from typing import Any

import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import StaleDefinitionError


def check_as_read(definition: CollectionDefinition) -> None:
    """StaleDefinitionError if the file that it was read from says something else of the collection by now, or is gone.

    Comments, and other collections of the file, do not count. A file that cannot be read just now says nothing.
    """
    then, path = definition.reading.content, definition.path
    if then is None or path is None:
        return
    try:
        now = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StaleDefinitionError(
            f"collection {definition.name!r}: defs.yaml has changed: reload the definitions ({path} is gone)"
        ) from None
    except OSError:
        return
    if now != then and _documents(now, definition.name) != _documents(then, definition.name):
        raise StaleDefinitionError(
            f"collection {definition.name!r}: defs.yaml has changed: reload the definitions ({path} was written after "
            "this process had read it)",
            file_changed=True,
        )


def _documents(content: bytes, name: str) -> list[Any] | None:
    """What a file says of a collection; all that it says, if none is called so; None if that is not YAML."""
    try:
        documents = list(yaml.safe_load_all(content.decode("utf-8-sig")))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return [document for document in documents if _name(document) == name] or documents


def _name(document: Any) -> Any:
    attributes = document.get("attributes") if isinstance(document, dict) else None
    return attributes.get("name") if isinstance(attributes, dict) else None
