"""Forks of a process that has searched before: gunicorn's `--preload`, uwsgi, Celery.

A child has its parent's memory, and of its threads only the one that forked. So a lock that another thread held is
never free again; and OpenMP (in torch and in FAISS), which keeps a team of threads for each thread that it has worked
for, waits for ever for a team that stayed behind. `ProcessLock` begins anew in the child, and `compute` gives the work
of the one surviving thread to a new one, whose team is its own. OpenVINO's threads are started with its model, which a
child therefore loads anew, and leaves its parent's alone.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

PR_SET_PDEATHSIG = 1
HOLD_SECONDS = 60  # a fork waits so long for the pass of a model that is under way

P = ParamSpec("P")
T = TypeVar("T")


class ProcessLock:
    """A re-entrant lock of this process: a forked child finds it free, whoever held it.

    `ended_first`: a fork waits until whoever holds it has let go of it, for what would be left half done in the child.
    """

    def __init__(self, *, ended_first: bool = False) -> None:
        self._lock = threading.RLock()
        _locks.add(self)
        if ended_first:
            _ended_first.add(self)

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def hold(self) -> bool:
        """Before a fork, for a while; whether it is held."""
        return self._lock.acquire(timeout=HOLD_SECONDS)

    def begin_anew(self) -> None:
        """In a child: nobody holds it."""
        self._lock = threading.RLock()


@dataclass
class _Child:
    """What a forked process knows: the thread that it began with, and the one that computes for it."""

    survivor: int | None = None  # None: this process was not forked
    computing: ThreadPoolExecutor | None = None


_child = _Child()
_locks: "weakref.WeakSet[ProcessLock]" = weakref.WeakSet()
_ended_first: "weakref.WeakSet[ProcessLock]" = weakref.WeakSet()
_held: list[ProcessLock] = []  # while this process forks
_left_alone: "weakref.WeakSet[object]" = weakref.WeakSet()


def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns, which may use OpenMP; it is called in a thread for which that works."""
    if threading.get_ident() != _child.survivor:
        return function(*args, **kwargs)
    if _child.computing is None:
        _child.computing = ThreadPoolExecutor(1, thread_name_prefix="forked")
    return _child.computing.submit(function, *args, **kwargs).result()


def left_alone_in_children(thing: object) -> None:
    """Have a forked child never destroy it, nor what it holds: that would wait for threads which it has not got."""
    _left_alone.add(thing)


def end_with_parent(parent: int) -> None:
    """Have this process killed when the thread that started it is gone, however that went. Linux alone knows how.

    `parent`: its process, which may have gone before this was asked for.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def killed_first() -> None:
    """Have the kernel kill this process, and no other, when memory runs out: its parent goes on without it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _before() -> None:
    _held.extend(lock for lock in list(_ended_first) if lock.hold())


def _in_parent() -> None:
    while _held:
        _held.pop().__exit__(None, None, None)


def _in_child() -> None:
    _held.clear()
    _child.survivor, _child.computing = threading.get_ident(), None
    for lock in list(_locks):
        lock.begin_anew()
    for thing in list(_left_alone):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
