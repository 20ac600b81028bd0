"""Named places in the code where a test, or the environment, can make something happen.

    failpoint("commit.second_look")

does nothing unless that name has an action. A test gives it one in its own process:

    with at_failpoint("commit.second_look", lambda: edit_a_row()): ...

and another process takes them from its environment, separated by commas: `kill` ends the process as SIGKILL does,
`fail` raises, and `sleep:SECONDS` waits.

    EMBEDDINGS_FAILPOINTS="commit.second_look=kill,backfill.write=sleep:2"
"""

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_actions: dict[str, Callable[..., Any]] = {}


def failpoint(name: str, **told: Any) -> None:
    """Do what is asked for at this name; `told` goes to the action of a test."""
    if name in _actions:
        _actions[name](**told)
    elif name in (asked := _asked(os.environ.get("EMBEDDINGS_FAILPOINTS", ""))):
        what, _, seconds = asked[name].partition(":")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "sleep":
            time.sleep(float(seconds))
        else:
            raise RuntimeError(f"failpoint {name}: {what}")


@contextmanager
def at_failpoint(name: str, action: Callable[..., Any]) -> Iterator[None]:
    """Call the action whenever this process passes the failpoint, until the block ends."""
    before = _actions.get(name)
    _actions[name] = action
    try:
        yield
    finally:
        if before is None:
            del _actions[name]
        else:
            _actions[name] = before


@functools.cache
def _asked(text: str) -> dict[str, str]:
    return dict(part.strip().split("=", 1) for part in text.split(",") if part.strip())
