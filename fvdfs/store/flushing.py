"""The flushes of a file, begun before they are asked for where they can be expected.

Who flushes after every single write (a database, a guest's journal) pays for two waits, one after the other. After
`EXPECTED` such pairs the next single write has a flush linked to it (io_uring), which begins the moment the write has
ended: *ahead*. When it is asked for, it is under way already, or over. It counts only where that write is all that
was written since the last flush.

The kernel tells of a failed flush once. So one that failed ahead is kept, and told to all who ask from then on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import trio

from fvdfs.store import uring
from fvdfs.store.base import Done, FlushError, result_of
from fvdfs.store.worker import Worker

EXPECTED = 2  # flushes after a single write each; after the next single write, one begins before it is asked for


class _Ahead:
    """A flush that begins with the write before it."""

    def __init__(self) -> None:
        self.covers_all = False
        """Whether that write is the only one, and nothing was written since."""
        self._result: int | None = None
        self._waiting: list[Done] = []

    def tell(self, done: Done) -> None:
        """Tell the result, at once if it is there."""
        if self._result is None:
            self._waiting.append(done)
        else:
            done(self._result)

    def end(self, result: int) -> None:
        self._result = result
        self.covers_all &= result >= 0
        for done in self._waiting:
            done(result)


class Flusher:
    """What a file does about flushes; it has to be told of each change."""

    def __init__(self, fd: int, worker: Worker) -> None:
        """`worker` flushes where there is no io_uring."""
        self._fd = fd
        self._worker = worker
        self._changes = 0  # since a flush was asked for
        self._single = 0  # flushes in a row that came after a single change
        self._ahead: _Ahead | None = None
        self._lost = 0  # errno of a flush that failed ahead

    def changed(self) -> None:
        """A write, or another change, has ended."""
        self._changes += 1
        if self._ahead is not None:
            self._ahead.covers_all = False

    @property
    def is_expected(self) -> bool:
        """Whether the next write had better be done by `write_ahead`."""
        return self._single >= EXPECTED and self._ahead is None

    def write_ahead(self, ring: uring.Ring, write: uring.Call, written: Callable[[list[int]], None], size: int) -> None:
        """`ring.begin((write,), written)`, of `size` bytes, and a flush at once; `written` calls `changed`."""
        self._ahead = ahead = _Ahead()

        def first_ended(result: int) -> None:
            written([result])
            ahead.covers_all = result == size and self._changes == 1

        def ended(results: list[int]) -> None:
            result = min(results[1], 0)
            if result and result not in uring.NOT_DONE:
                self._lost = -result
            ahead.end(result)

        ring.begin((write, (uring.FSYNC, self._fd, None, 0)), ended, first_ended)

    def start(self, done: Done) -> bool:
        """`Store.start_flush`."""
        ahead = self._ahead
        if ahead is None or not ahead.covers_all or self._lost:
            return False
        self.ask()

        def ended(result: int) -> None:
            if self._ahead is ahead:
                self._ahead = None
            if result in uring.NOT_DONE:
                self._flush(done)
            else:
                done(result)

        ahead.tell(ended)
        return True

    async def flush(self) -> None:
        """`Store.flush`."""
        if not await self.is_covered():
            await result_of(self._flush)

    async def is_covered(self) -> bool:
        """Somebody asks for a flush: whether one that began ahead, and has ended now, is enough. Raises FlushError."""
        self.ask()
        return await self.settled()

    def ask(self) -> None:
        """Somebody asks for a flush: learn from it."""
        self._single = self._single + 1 if self._changes == 1 else 0
        self._changes = 0

    async def settled(self) -> bool:
        """Wait for a flush ahead, and say whether it covers all changes. Raises FlushError where one has failed."""
        ahead = self._ahead
        if ahead is not None:
            over = trio.Event()
            ahead.tell(lambda _: over.set())
            if not over.is_set():  # a checkpoint costs a turn of the event loop
                await over.wait()
            if self._ahead is ahead:
                self._ahead = None
        if self._lost:
            raise FlushError(self._lost, os.strerror(self._lost))
        return ahead is not None and ahead.covers_all

    def _flush(self, done: Done) -> bool:
        flushed = functools.partial(self._flushed, done)
        ring = uring.ring()
        if ring is None:
            return self._worker.start(self._flush_now, flushed)

        def ended(results: list[int]) -> None:
            if results[0] in uring.NOT_DONE:
                self._worker.start(self._flush_now, flushed)
            else:
                flushed(results[0])

        ring.begin(((uring.FSYNC, self._fd, None, 0),), ended)
        return True

    def _flushed(self, done: Done, result: int) -> None:
        """Answer a flush: its error may have been told to one ahead that was under way meanwhile."""
        if result < 0 or self._ahead is None:
            done(result or -self._lost)
        else:
            self._ahead.tell(lambda _: done(-self._lost))

    def _flush_now(self) -> int:
        os.fdatasync(self._fd)
        return 0
