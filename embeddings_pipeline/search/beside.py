"""Two things of one search at once: words are looked for while a model encodes, if no other search is under way."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from embeddings_pipeline.encoders.processor import share_of_cores
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.session import end_statements, working_for

T = TypeVar("T")

_under_way = Counter[int]()  # hybrid searches, by process
_threads: dict[int, ThreadPoolExecutor] = {}  # by process: a forked one has none of its parent's
_mutex = ProcessLock()


@contextmanager
def search_alone() -> Iterator[bool]:
    """A search; whether it began while no other of this process was under way, so that there are threads for two."""
    process = os.getpid()
    with _mutex:
        _under_way[process] += 1
        is_alone = _under_way[process] == 1
    try:
        yield is_alone
    finally:
        with _mutex:
            _under_way[process] -= 1


@contextmanager
def beside(ask: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Within it `ask` is called in another thread; what it is given waits for the answer, or for the error. If no
    thread was free until then, it is asked in this one. An error within it ends the statements of both.
    """
    asker = threading.get_ident()

    def work() -> T:
        with working_for(asker):
            return ask()

    future: Future[T] = _pool().submit(work)
    try:
        yield lambda: ask() if future.cancel() else future.result()
    except BaseException:
        while not future.cancel() and not future.done():
            end_statements([asker])
            wait([future], timeout=0.1)
        raise


def _pool() -> ThreadPoolExecutor:
    with _mutex:
        if os.getpid() not in _threads:
            _threads.clear()
            _threads[os.getpid()] = ThreadPoolExecutor(share_of_cores(), thread_name_prefix="words")
        return _threads[os.getpid()]
