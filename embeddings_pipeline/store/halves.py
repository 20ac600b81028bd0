"""Which of many items something fails for by themselves: found by halves, so that the others go on without them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import psycopg
from psycopg import errors

T = TypeVar("T")

MOST_FAILURES = 1000
"""If more items fail, it is not they that are at fault."""
OF_DATA = ("22", "54", "XX000", "XX001", "P0001")
"""SQLSTATEs: data that cannot be processed, more than PostgreSQL can hold, a damaged row (also as an internal error, as
`invalid memory alloc request size` is), what a function raises.
"""
OF_ANY_VALUE = ("22000", "XX000", "XX001", "P0001")
"""Those of them that no value need be to blame for: a column of another size, a damaged table, what a function raises.
"""


def by_halves(
    work: Callable[[list[str]], T],
    keys: Sequence[str],
    is_theirs: Callable[[Exception], bool],
    *,
    most: int = MOST_FAILURES,
) -> tuple[list[T], dict[str, Exception]]:
    """What `work` gives for all keys together, else for parts of them; and the error of each key that fails alone.

    An error that `is_theirs` does not call one of the items', or that too many of them have, is raised.
    """
    results: list[T] = []
    failed: dict[str, Exception] = {}
    parts = [list(keys)]
    while parts:
        part = parts.pop()
        try:
            results.append(work(part))
        except Exception as error:
            if not is_theirs(error) or len(failed) >= most:
                raise
            if len(part) == 1:
                failed[part[0]] = error
                continue
            half = len(part) // 2
            parts += [part[half:], part[:half]]
    return results, failed


def is_of_data(error: BaseException | None) -> bool:
    """Whether the database refused a value, and will do so again; an outage is never that."""
    if isinstance(error, psycopg.Error):
        if error.sqlstate is None:  # psycopg refused it before it was sent
            return isinstance(error, psycopg.DataError)
        return isinstance(error, errors.CheckViolation) or error.sqlstate.startswith(OF_DATA)
    return isinstance(error, UnicodeError)


def is_of_its_value(error: BaseException | None) -> bool:
    """Whether it is certain that a value is to blame, even if each of several is refused."""
    return is_of_data(error) and not (isinstance(error, psycopg.Error) and error.sqlstate in OF_ANY_VALUE)
