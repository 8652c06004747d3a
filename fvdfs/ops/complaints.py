"""What the log says of requests that fail: enough to see what is wrong, and not a line for each.

A guest on a failing disk tries again thousands of times a second: a line each time would fill the host's disk. So
would a user who reopens a bad disk in a loop. So complaints of requests are counted by kind, and so is every other
line of the log, in whichever thread (`filtering`): by its text, and by the first name in it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Hashable, Iterator

import trio

log = logging.getLogger(__name__)

LINES = 10  # of a kind in one period
PERIOD = 60.0  # seconds
LONGEST = 1000  # characters of a line: names can have thousands
MOST_KINDS = 10_000  # in one period; there are a few for each image

_OTHERS = "messages of other kinds"


class _Kind:
    """Of lines: how many there were, what to call them, and how bad they are."""

    def __init__(self, name: str, level: int) -> None:
        self.name = name
        self.level = level
        self.count = 0


class Complaints:
    """Lines for the log, each of a kind."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._lock = threading.Lock()
        self._some = trio.Event()
        self._loop: tuple[int, trio.lowlevel.TrioToken] | None = None

    def say(self, line: str, kind: str, *, trace: BaseException | None = None) -> None:
        """Log the line, unless there were so many of its kind."""
        if self._admit(kind, kind, logging.ERROR):
            log.error("%s", line[:LONGEST], exc_info=trace, extra={"admitted": True})

    @contextlib.contextmanager
    def filtering(self) -> Iterator[None]:
        """Count all that is logged meanwhile, too."""
        handlers = list(logging.getLogger().handlers)
        for handler in handlers:
            handler.addFilter(self.filter)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self.filter)
            self._tell()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it; asked by each handler."""
        admitted: bool | None = record.__dict__.get("admitted")
        if admitted is None:
            whom = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
            admitted = record.__dict__["admitted"] = self._admit(
                (record.msg, whom), record.getMessage(), record.levelno
            )
        return admitted

    def _admit(self, key: Hashable, name: str, level: int) -> bool:
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                if len(self._kinds) >= MOST_KINDS:
                    key = name = _OTHERS
                kind = self._kinds.setdefault(key, _Kind(name[:LONGEST], level))
            kind.level = max(kind.level, level)
            kind.count += 1
            admitted = kind.count <= LINES
        if self._loop is None or self._loop[0] == threading.get_ident():
            self._some.set()
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._loop[1].run_sync_soon(lambda: self._some.set())
        return admitted

    async def sum_up(self) -> None:
        """At the end of a period, and when cancelled, say how many were left out. Runs for ever."""
        self._loop = threading.get_ident(), trio.lowlevel.current_trio_token()
        try:
            while True:
                await self._some.wait()
                await trio.sleep(PERIOD)
                self._some = trio.Event()
                self._tell()
        finally:
            self._loop = None
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            kinds, self._kinds = self._kinds, {}
        for kind in kinds.values():
            if kind.count > LINES:
                log.log(kind.level, "%s: %d times more", kind.name, kind.count - LINES, extra={"admitted": True})
