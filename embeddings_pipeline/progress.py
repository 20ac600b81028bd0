"""How much of a long step is done, told by whoever does it to whoever listens in this process.

with counting(lambda texts: bar.advance(texts)):
    ...                       # anywhere within: count(256)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[str, int, int], None]
"""Called as (phase, done, total), in texts or rows; total 0: not known."""


def silent(phase: str, done: int, total: int) -> None:
    """For work that nobody watches."""


_listener: ContextVar[Callable[[int], None]] = ContextVar("progress", default=lambda number: None)


def count(number: int) -> None:
    """So many texts (or rows) more are done."""
    _listener.get()(number)


@contextmanager
def counting(listener: Callable[[int], None]) -> Iterator[None]:
    """Have `listener` called with every number that is counted within."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
