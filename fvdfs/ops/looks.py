"""Looks at files that may be on a share that hangs: what takes too long is not waited for.

A *look* is a call about one thing (its key, a path for example), done in a thread. Whoever wants to know waits for it,
but not longer than `PATIENCE`, and then uses what was known before; the look goes on, and its result is taken up when
it ends. There is one look at a thing at a time, so that a share that hangs costs one thread for each thing on it,
however many ask. Whoever asks while a look is under way gets the next one, since the thing may have changed.

A few threads share the work. When all of them are at looks that take long, another thread takes over the rest. No task
waits for the end of a look: one that never ends keeps nobody from ending.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar, cast

import outcome
import trio

from fvdfs.store.paths import PATIENCE

THREADS = 4
"""For looks that are answered soon."""
MOST_THREADS = 256
"""With those that hang. Few do for each share: later ones do not begin (`Walker.enter`)."""
LONG = 0.1  # seconds that a look takes before another thread goes on with the others

T = TypeVar("T")


def late(path: bytes) -> OSError:
    """The error (EIO) for whom a look has taken too long, and who knows nothing from before."""
    reason = f"no answer within {PATIENCE:g} s; only what was known before is shown"
    return OSError(errno.EIO, f"{os.fsdecode(path)}: {reason}")


class Look(Generic[T]):
    """A call about one thing."""

    def __init__(
        self, key: Hashable, call: Callable[[], Any], then: Callable[[Any], T] | None, behind: Look[T] | None
    ) -> None:
        self.key = key
        self.behind = behind
        """The look at the same thing that has to end before this one begins."""
        self.next: Look[T] | None = None
        self.asked = time.monotonic()
        self.begun = 0.0
        """When it has begun; 0 before."""
        self.thread = 0
        """The thread that does it."""
        self.ended = trio.Event()
        self._call = call
        self._then = then
        self._found: outcome.Outcome[Any] | None = None
        self._result: outcome.Outcome[T] | None = None

    def run(self) -> None:
        """Make the call. In a thread."""
        self.thread = threading.get_ident()
        self.begun = time.monotonic()
        self._found = outcome.capture(self._call)

    def end(self) -> None:
        """Take up what it has found. In the event loop."""
        assert self._found is not None
        self._result = outcome.capture(self._take_up, self._found)
        self.behind = None
        self.ended.set()

    def _take_up(self, found: outcome.Outcome[Any]) -> T:
        value = found.unwrap()
        return cast(T, value) if self._then is None else self._then(value)

    @property
    def result(self) -> T:
        """What it has found, once it has ended; raises what it has raised."""
        assert self._result is not None
        result = self._result
        if isinstance(result, outcome.Error):
            raise result.error  # for each who asks: an outcome can be unwrapped once
        assert isinstance(result, outcome.Value)
        return cast(T, result.value)


class Looks:
    """All looks of one event loop."""

    def __init__(self) -> None:
        self._last: dict[Hashable, Look[Any]] = {}
        self._queue: deque[Look[Any]] = deque()
        self._threads: dict[object, Look[Any] | None] = {}
        self._progress = 0.0  # when a look has last ended

    def begin(
        self, key: Hashable, call: Callable[[], Any], then: Callable[[Any], T] | None = None, *, threads: int = THREADS
    ) -> Look[T]:
        """A look at this thing that begins now or later; `then` makes the result of it, in the event loop.

        It gets a thread of its own unless `threads` are at work.
        """
        last = self._last.get(key)
        if last is not None and not last.begun:
            return last
        look = self._last[key] = Look(key, call, then, last)
        if last is None:
            self._put(look, threads)
        else:
            last.next = look
        return look

    def _put(self, look: Look[Any], threads: int) -> None:
        self._queue.append(look)
        if len(self._threads) < threads:
            self._start_thread()

    async def wait(self, looks: Sequence[Look[Any]], patience: float = PATIENCE) -> None:
        """Until each has ended, or is overdue: has been under way for longer than `patience` seconds."""
        for look in looks:
            while not look.ended.is_set() and not self._overdue(look, patience):
                self._take_over()
                with trio.move_on_after(LONG):
                    await look.ended.wait()

    def _overdue(self, look: Look[Any], patience: float) -> bool:
        now = time.monotonic()
        under_way = look.behind or look
        if under_way.begun:
            return now - under_way.begun > patience
        return now - max(self._progress, look.asked) > patience  # every thread hangs

    def _take_over(self) -> None:
        """Have another thread go on where all that there are take long."""
        if self._queue and len(self._threads) < MOST_THREADS:
            before = time.monotonic() - LONG
            if all(look is not None and look.begun and look.begun < before for look in self._threads.values()):
                self._start_thread()

    def _start_thread(self) -> None:
        number = object()
        self._threads[number] = None
        token = trio.lowlevel.current_trio_token()
        trio.lowlevel.start_thread_soon(functools.partial(self._work, number, token), outcome.Outcome.unwrap)

    def _work(self, number: object, token: trio.lowlevel.TrioToken) -> None:
        try:
            while self._queue:
                try:
                    look = self._queue.popleft()
                except IndexError:
                    break
                self._threads[number] = look
                look.run()
                token.run_sync_soon(self._look_ended, look)
            token.run_sync_soon(self._thread_ended, number)
        except trio.RunFinishedError:
            return

    def _look_ended(self, look: Look[Any]) -> None:
        self._progress = time.monotonic()
        if look.next is not None:
            self._put(look.next, THREADS)
        else:
            del self._last[look.key]
        look.end()
        if look.next is not None:
            look.next.behind = None

    def _thread_ended(self, number: object) -> None:
        del self._threads[number]
        if self._queue and not self._threads:
            self._start_thread()
