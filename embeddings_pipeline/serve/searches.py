"""Searches in threads, of an asynchronous program: so many at once, and none goes on for a client that has left.

A thread cannot be ended. What it waits for in PostgreSQL is cancelled, again and again until the search ends; its
answer is dropped, and its place among those that may be under way is given back only then.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import psycopg

from embeddings_pipeline.errors import DatabaseError, PipelineError
from embeddings_pipeline.store.retry import is_outage
from embeddings_pipeline.store.session import end_statements

THREADS = 8  # with more of them at once, some wait for Python's lock far longer than others
PATIENCE_SECONDS = 10.0  # for a database that restarts
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts, and between two cancellations

T = TypeVar("T")


class TooManyError(PipelineError):
    """As many searches are under way as may be."""


class LeftError(PipelineError):
    """Nobody waits for the answer."""


class Searches:
    """Runs searches; `under_way` is how many have a place at the moment."""

    def __init__(self, at_once: int, *, tried_again: Callable[[], None] = lambda: None) -> None:
        self.at_once = at_once
        self.under_way = 0
        self._tried_again = tried_again
        self._mutex = threading.Lock()
        self._threads = ThreadPoolExecutor(min(at_once, THREADS), thread_name_prefix="search")
        self._endings = ThreadPoolExecutor(2, thread_name_prefix="end-search")
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, ask: Callable[[], T], *, patient: bool = True) -> T:
        """What `ask` returns, called in a thread; if `patient`, again, if it lost its database on the way and that
        comes back.

        TooManyError at once if there is no place. A task that is cancelled while it waits ends the search.
        """
        with self._mutex:
            if self.under_way >= self.at_once:
                raise TooManyError(f"{self.at_once} searches are under way, and more are not begun: try again")
            self.under_way += 1
        search = _Search(ask, self._tried_again, patient=patient)
        try:
            running = self._threads.submit(search)
        except BaseException:
            self._give_back()
            raise
        running.add_done_callback(lambda _: self._give_back())
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            search.left = True
            ending = asyncio.ensure_future(self._end(search))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise

    async def _end(self, search: "_Search[Any]") -> None:
        pause, loop = FIRST_PAUSE, asyncio.get_running_loop()
        while await loop.run_in_executor(self._endings, search.cancel_statement):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _give_back(self) -> None:
        with self._mutex:
            self.under_way -= 1

    def close(self) -> bool:
        """Begin none any more. Whether none is under way: if not, a thread still works, and may be killed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._endings.shutdown(wait=False, cancel_futures=True)
        return not self.under_way


class _Search(Generic[T]):
    """One search, and the thread that works on it."""

    def __init__(self, ask: Callable[[], T], tried_again: Callable[[], None], *, patient: bool) -> None:
        self.left, self._patient = False, patient
        self._ask, self._tried_again = ask, tried_again
        self._began = time.monotonic()
        self._mutex = threading.Lock()  # held while a statement is cancelled: the thread's next search is another's
        self._thread: int | None = None

    def __call__(self) -> T:
        with self._mutex:
            if self.left:
                raise LeftError("whoever asked has left")
            self._thread = threading.get_ident()
        try:
            return patiently(self._ask, self._began, self._goes_on)
        finally:
            with self._mutex:
                self._thread = None

    def _goes_on(self) -> bool:
        """Whether it is to be tried again, which is counted."""
        if self.left or not self._patient:
            return False
        self._tried_again()
        return True

    def cancel_statement(self) -> bool:
        """Cancel what its thread waits for in PostgreSQL; whether it is still at work."""
        with self._mutex:
            if self._thread is None:
                return False
            end_statements([self._thread])
            return True


def patiently(ask: Callable[[], T], began: float, goes_on: Callable[[], bool] = lambda: True) -> T:
    """What `ask` returns, which only reads: after a lost session it is called once more, and so on while the database
    restarts. `began`: by `time.monotonic()`.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return ask()
        except (PipelineError, psycopg.Error) as error:
            is_late = time.monotonic() - began > PATIENCE_SECONDS
            if is_late or not lost_database(error) or not goes_on():
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def lost_database(error: BaseException | None) -> bool:
    """Whether a session was lost, or could not be had, so that another attempt may go well."""
    if isinstance(error, DatabaseError):
        error = error.__cause__
    return isinstance(error, psycopg.OperationalError) and is_outage(error)
