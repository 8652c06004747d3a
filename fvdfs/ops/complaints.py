"""What the log says of requests that fail: enough to see what is wrong, and not a line for each.

A guest on a failing disk asks again and again, thousands of times a second, and would fill the host's disk.
"""

from __future__ import annotations

import logging
from collections import Counter

import trio

log = logging.getLogger(__name__)

LINES = 10  # of a kind in one period
PERIOD = 60.0  # seconds
LONGEST = 1000  # characters of a line: names can have thousands


class Complaints:
    """Lines for the log, each of a kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._some = trio.Event()

    def say(self, line: str, kind: str, *, trace: BaseException | None = None) -> None:
        """Log the line, unless there were so many of its kind."""
        self._counts[kind] += 1
        self._some.set()
        if self._counts[kind] <= LINES:
            log.error("%s", line[:LONGEST], exc_info=trace)

    async def sum_up(self) -> None:
        """At the end of a period, and when cancelled, say how many were left out. Runs for ever."""
        try:
            while True:
                await self._some.wait()
                await trio.sleep(PERIOD)
                self._some = trio.Event()
                self._tell()
        finally:
            self._tell()

    def _tell(self) -> None:
        for kind, count in self._counts.items():
            if count > LINES:
                log.error("%s: %d times more", kind, count - LINES)
        self._counts.clear()
