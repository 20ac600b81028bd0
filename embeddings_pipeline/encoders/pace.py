"""How many requests a process has under way at once: more while answers are quick, half as many if they are too many.

Additive increase, multiplicative decrease, as TCP does it: https://www.rfc-editor.org/rfc/rfc5681
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FIRST, LEAST, MOST = 16.0, 8.0, 64.0
SLOW = 3.0  # times the quickest answer: then the server is busy, and more at once would only wait there


class Pace:
    """Slots for requests, in one event loop."""

    def __init__(self) -> None:
        self.at_once = FIRST
        self._under_way = 0
        self._free = asyncio.Condition()
        self.turn = asyncio.Lock()  # to ask for the rate
        self._quickest = float("inf")
        self._lowered = 0.0  # when, by the monotonic clock

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the slots, waited for."""
        async with self._free:
            await self._free.wait_for(lambda: self._under_way < int(self.at_once))
            self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            async with self._free:
                self._free.notify_all()

    def quick(self, seconds: float) -> None:
        """A good answer came after so long."""
        self._quickest = min(self._quickest * 1.01, seconds)  # forgets slowly: requests may grow
        if seconds <= SLOW * self._quickest and self._under_way >= int(self.at_once):
            self.at_once = min(MOST, self.at_once + 1 / self.at_once)

    def too_many(self, began: float) -> None:
        """A request that was sent at `began` (monotonic) was refused as one too many.

        Of those that were under way together one counts: they were sent before the number was lowered.
        """
        if began > self._lowered:
            self.at_once, self._lowered = max(LEAST, self.at_once / 2), time.monotonic()
