"""Paths that a user writes."""

from pathlib import Path

from embeddings_pipeline.errors import ConfigurationError


def expanded(path: str | Path) -> Path:
    """The path with the user's folder for `~`. ConfigurationError if nothing says which that is."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{path}: no home folder is known; set HOME, or write it in full") from error
