"""The time in which the server of a file is away: it was closed, or the network to it is cut.

What becomes of requests meanwhile is the user's choice (`OnLoss`). A request that waits ends when the server is back,
when who asked for it is killed (`Interrupt`), and when the mount ends.
"""

from __future__ import annotations

import errno
import math
import re
import signal
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

import trio

LOOK_INTERVAL = 0.5  # seconds between looks whether who waits is to be killed
_FLAGS, _PENDING = 9 - 3, 31 - 3  # fields of /proc/PID/stat, of which the third follows the name
_EXITING = 4  # PF_EXITING of linux/sched.h
_KILL = 1 << signal.SIGKILL - 1


@dataclass(frozen=True, slots=True)
class OnLoss:
    """What becomes of requests that need a server which is away."""

    REFUSE: ClassVar[OnLoss]
    """As `EIO`, and nothing is opened without it: for commands."""
    EIO: ClassVar[OnLoss]
    """They fail, from ten seconds after the loss on."""
    WAIT: ClassVar[OnLoss]
    """They wait until it is back."""
    opens: bool = True
    """Whether what stands on the server is opened without it."""
    patience: float | None = None
    """Seconds from the loss on for which they wait, then they fail; None: as `EIO`."""

    @property
    def waits(self) -> bool:
        """Whether the user wants them to wait."""
        return self.patience is not None

    @classmethod
    def of(cls, text: str) -> OnLoss:
        """What the user has written: eio, wait, or wait=TIME. Raises ValueError."""
        if text == "eio":
            return cls.EIO
        if text == "wait":
            return cls.WAIT
        found = _WAIT.fullmatch(text)
        if found is None:
            raise ValueError("must be wait, wait=TIME (such as 60s, 5m or 1h) or eio")
        return cls(patience=int(found["count"]) * _UNITS[found["unit"]])


OnLoss.REFUSE, OnLoss.EIO, OnLoss.WAIT = OnLoss(opens=False), OnLoss(), OnLoss(patience=math.inf)
_WAIT = re.compile("wait=(?P<count>[1-9][0-9]{0,5})(?P<unit>[smh]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}  # seconds


class Lost(OSError):
    """The server is away: EIO, which the log has told of already."""


class Interrupt:
    """That who asked for something does not want it any more.

    The kernel says so of some requests. Of direct and asynchronous ones it does not, and has their process wait, even
    where that is to be killed: so it is looked at now and then.
    """

    def __init__(self, pid: int = 0) -> None:
        """`pid`: the thread that asked; 0: not known."""
        self._pid = pid
        self.raised = False
        self.waits: set[trio.CancelScope] = set()
        """Of whoever waits for a server meanwhile."""

    def interrupt(self) -> None:
        """End all waiting for servers."""
        self.raised = True
        for scope in self.waits:
            scope.cancel()

    def look(self) -> None:
        """`interrupt` where the thread has ended, or is to be killed."""
        if self._pid and _is_ending(self._pid):
            self.interrupt()


def _is_ending(thread: int) -> bool:
    try:
        with open(f"/proc/{thread}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return bool(int(fields[_FLAGS]) & _EXITING or int(fields[_PENDING]) & _KILL)


asked_by: ContextVar[Interrupt | None] = ContextVar("asked_by", default=None)
"""Of the request that this task, and all that it starts, works for."""


class Outage:
    """One loss of a server."""

    def __init__(self, reason: str, *, hangs: bool = False, patience: float = math.inf) -> None:
        """`hangs`: the connection stands, and nothing is answered. `patience`: seconds after the loss."""
        self._hangs = hangs
        self.patience = patience
        """For how long who needs the server waits, before he gets an error."""
        self.reason = reason
        """Why the server is away, or why the last attempt to reach it failed."""
        self.since = time.time()
        """Seconds since the epoch."""
        self.until: float | None = None
        """The same; None: it is not over."""
        self.failure = ""
        """Why nobody tries any more to end it."""
        self.ended = trio.Event()
        self._began = trio.current_time()
        self._waiting: set[trio.CancelScope] = set()
        self._is_hopeless = False

    @property
    def is_away(self) -> bool:
        """Whether nobody can be asked, until it ends."""
        return self.until is None and not self._hangs

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return trio.current_time() - self._began

    def end(self, failure: str = "") -> None:
        """The server is back, or nobody tries any more."""
        self.failure = failure
        self.until = time.time()
        self.ended.set()

    def let_go(self) -> None:
        """Have all fail that wait, and all that come: the mount ends."""
        self._is_hopeless = True
        for scope in self._waiting:
            scope.cancel()

    async def wait(self, name: str) -> None:
        """Wait for its end, no longer than `patience`. Raises Lost; OSError, EINTR, where interrupted."""
        interrupt = asked_by.get()
        scope = trio.CancelScope(deadline=self._began + self.patience)
        lists = [self._waiting] + ([interrupt.waits] if interrupt is not None else [])
        for waiting in lists:
            waiting.add(scope)
        if self._is_hopeless or (interrupt is not None and interrupt.raised):
            scope.cancel()
        try:
            with scope:
                while not self.ended.is_set():
                    with trio.move_on_after(LOOK_INTERVAL):
                        await self.ended.wait()
                    if interrupt is not None:
                        interrupt.look()
        finally:
            for waiting in lists:
                waiting.discard(scope)
        if self.ended.is_set() and not self.failure:
            return
        if interrupt is not None and interrupt.raised:
            raise InterruptedError(errno.EINTR, f"{name}: interrupted while its server is away")
        raise Lost(errno.EIO, f"{name}: {self.failure or f'its server is away: {self.reason}'}")
