"""A column of a file that `load` reads, whatever the file's format."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FileColumn:
    """A name, and values as PostgreSQL reads them; NUL is not taken out yet."""

    name: str
    type: str | None
    """The type of PostgreSQL that the file says; None if it says nothing, as a CSV does."""
    texts: Callable[[str], list[str | None]]
    """The values for a column of that type of PostgreSQL."""
