"""What was done, handed on each minute in a thread of its own: nothing waits for who is told."""

import logging
import threading
from collections.abc import Callable, Mapping

from embeddings_pipeline.live.done import Done

log = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0  # what is left may take so long at the end


class MinuteReports:
    """Calls `report` with what was done since it was called last; what it fails on is kept for the next minute."""

    def __init__(self, report: Callable[[Mapping[str, Done]], None], line: Callable[[str], None]) -> None:
        self._report, self._line = report, line
        self._kept: dict[str, Done] = {}
        self._mutex, self._woken = threading.Lock(), threading.Event()
        self._closed = self._told = False
        self._thread: threading.Thread | None = None

    def add(self, done: Mapping[str, Done]) -> None:
        """Report this soon."""
        self._keep(done)
        self._woken.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="live reports", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Report what is left, if that does not take too long."""
        self._closed = True
        self._woken.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _keep(self, done: Mapping[str, Done]) -> None:
        with self._mutex:
            for name, each in done.items():
                self._kept.setdefault(name, Done()).add(each)

    def _run(self) -> None:
        closed = False
        while not closed:
            self._woken.wait()
            self._woken.clear()
            closed = self._closed
            with self._mutex:
                kept, self._kept = self._kept, {}
            try:
                if kept:
                    self._report(kept)
                self._told = False
            except Exception as error:  # where it goes may be away for a while
                log.debug("what was done could not be reported", exc_info=True)
                if not self._told:
                    said = " ".join(str(error).split())[:200]
                    self._line(f"warning: Dagster cannot be told what was done, and is told later: {said}")
                self._told = True
                self._keep(kept)
