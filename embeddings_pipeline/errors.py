"""The errors that a user can cause: each message is one line that names the thing and the remedy."""

import difflib
import reprlib
from typing import Any


class PipelineError(Exception):
    """Base of all errors that this package raises on purpose; shown to people without a traceback."""


class ConfigurationError(PipelineError):
    """A `defs.yaml`, a setting or a template says something that cannot be done."""


class NotFoundError(ConfigurationError):
    """A collection or an item that somebody names is not there."""


class DatabaseError(PipelineError):
    """The pipeline's database cannot be used: unreachable, too old, or without the rights it needs."""


class SourceError(PipelineError):
    """The user's table or query cannot be read as the collection describes it."""


class ProfileError(PipelineError):
    """A profile is unknown, its model cannot be loaded, or it is not the one the vectors were made with."""


class OutageError(PipelineError):
    """Something outside failed that another try may mend (memory, network, a service): no text is at fault."""


class OutOfMemoryError(OutageError):
    """The memory does not suffice to encode one text: the text is too large, while others can be encoded."""


class RefusedError(PipelineError):
    """Something that would lose data was asked for and is done only with an explicit flag."""


class BudgetError(PipelineError):
    """A budget is spent: nothing more was asked of the model, and what it has answered is kept."""


class RunFailed(PipelineError):
    """A run ended in failure; its message is the failed step's."""


class InterruptedRunError(PipelineError):
    """Somebody ended the work; what is committed stays."""


class ModelChangeError(PipelineError):
    """A step of a change of the model that cannot be done now, or whose result was not good enough; nothing changed."""


class StaleRunError(PipelineError):
    """A run worked with a profile that is no longer the current one; its commit was rolled back."""


class StaleDefinitionError(PipelineError):
    """Somebody works with a definition that is not the newest one of its collection; nothing was done.

    `file_changed`: the file that it was read from has another one by now.
    """

    def __init__(self, message: str, *, file_changed: bool = False) -> None:
        super().__init__(message)
        self.file_changed = file_changed


class LakeError(PipelineError):
    """The lake cannot be written or read."""


class VectorIndexError(PipelineError):
    """A FAISS or pgvector index is missing, damaged or belongs to another model."""


def did_you_mean(word: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing if no known word is near."""
    by_lower = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


def profile_command(words: str, collection: str) -> str:
    """A command of `profile` that works whichever other collections there are."""
    return f"embeddings-pipeline profile {words} --collection {collection}"


def unusable(argument: str, value: object, may_be: str) -> ConfigurationError:
    """That an argument of a function has a value that it cannot have."""
    return ConfigurationError(f"{argument} cannot be {shown(value)}: it may be {may_be}")


def shown(value: object) -> str:
    """A value of any kind in a line, shortened."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # an int with more digits than Python writes
        return f"a {type(value).__name__} that is too long to be shown"
