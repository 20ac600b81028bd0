"""The collections that are served: their definitions, read again when a file changes."""

import logging
from pathlib import Path

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import definition_files, read_collections, without_sample
from embeddings_pipeline.errors import ConfigurationError, NotFoundError, did_you_mean

log = logging.getLogger(__name__)

# Of each file: its path, when it was written, and its size; what a link points to counts.
_State = tuple[tuple[Path, int, int], ...]


class Served:
    """The collections below a folder. A file that gets a mistake leaves what was read from it before in force."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state: _State | None = None
        self._collections: dict[str, CollectionDefinition] = {}
        self.refresh()

    @property
    def collections(self) -> dict[str, CollectionDefinition]:
        """By name; a later change makes another mapping."""
        return self._collections

    def refresh(self) -> None:
        """Read them again if a file has changed. ConfigurationError, once, if the folder is gone."""
        state = self._look()
        if state == self._state:
            return
        self._state = state
        defined = read_collections(self._folder)
        for mistake in defined.mistakes.values():
            log.warning("warning: %s", mistake)
        kept = {name: each for name, each in self._collections.items() if each.path in defined.mistakes}
        self._collections = without_sample({**kept, **defined.collections})

    def find(self, name: str | None) -> CollectionDefinition:
        """The collection of that name; without one, the only one or `items`."""
        collections = self._collections
        if name is None and (len(collections) == 1 or "items" in collections):
            return collections["items"] if "items" in collections else next(iter(collections.values()))
        known = ", ".join(sorted(collections)) or "none"
        if name is None:
            raise ConfigurationError(f"say in `collection` which one is meant: there are {known}")
        if name not in collections:
            raise NotFoundError(f"there is no collection {name!r}; there are {known}{did_you_mean(name, collections)}")
        return collections[name]

    def _look(self) -> _State:
        state = []
        for path in definition_files(self._folder):
            try:
                status = path.stat()  # of what a link points to
                state.append((path, status.st_mtime_ns, status.st_size))
            except OSError:
                state.append((path, 0, 0))
        return tuple(state)
