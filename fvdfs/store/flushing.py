"""The flushes of a file: one at a time, begun before they are asked for where they can be expected.

The kernel tells of a failed flush once. Were two under way, one could take the error of the other, which would seem to
have succeeded. So they wait for each other, whoever asks meanwhile shares the next, and a failure is told to all who
ask from then on.

Who flushes after every single write (a database, a guest's journal) pays for two waits, one after the other. After
`EXPECTED` such pairs the next single write has a flush linked to it (io_uring), which begins the moment the write has
ended: *ahead*. When it is asked for, it is under way already, or over. It counts only where that write is all that
was written since the last flush.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import trio

from fvdfs.store import uring
from fvdfs.store.base import Done, FlushError, result_of
from fvdfs.store.worker import Worker

EXPECTED = 2  # flushes after a single write each; after the next single write, one begins before it is asked for


class Flusher:
    """Of one file; it has to be told of each change."""

    def __init__(self, fd: int, worker: Worker) -> None:
        """`worker` flushes where there is no io_uring."""
        self._fd = fd
        self._worker = worker
        self._busy = False
        self._idle = trio.lowlevel.ParkingLot()
        self._asking: list[Done] = []
        """Who shares the flush under way."""
        self._waiting: list[Done] = []
        """Who shares the next."""
        self._changes = 0  # in all
        self._changes_asked = 0  # of these, when a flush was asked for last
        self._single = 0  # flushes in a row that were asked for after a single change
        self._covers_all = False
        """Whether the last flush began ahead, and covers all changes."""
        self._lost = 0
        """The errno of the first flush that failed."""

    def changed(self) -> None:
        """A write, or another change, has ended."""
        self._changes += 1
        self._covers_all = False

    def start(self, done: Done) -> bool:
        """`Store.start_flush`."""
        self._ask()
        if self._covers_all and not self._busy:
            done(-self._lost)
        elif self._covers_all:
            self._asking.append(done)
        else:
            self._waiting.append(done)
            if not self._busy:
                self._next()
        return True

    async def flush(self) -> None:
        """`Store.flush`. Raises FlushError."""
        try:
            await result_of(self.start)
        except OSError as error:
            raise FlushError(*error.args) from error

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[bool]:
        """For calls that flush: no other flush is under way meanwhile. Tells whether all is flushed already.

        A FlushError that is raised within is told to all who ask from then on. Raises FlushError.
        """
        self._ask()
        while self._busy:
            await self._idle.park()
        if self._lost:
            raise FlushError(self._lost, os.strerror(self._lost))
        self._busy, covered, self._covers_all = True, self._covers_all, False
        try:
            yield covered
        except FlushError as error:
            self._lost = error.errno or errno.EIO
            raise
        finally:
            self._next()

    def _ask(self) -> None:
        """Somebody asks for a flush: learn from it."""
        self._single = self._single + 1 if self._changes == self._changes_asked + 1 else 0
        self._changes_asked = self._changes

    # --- ahead ------------------------------------------------------------------------------------

    @property
    def is_expected(self) -> bool:
        """Whether the next write had better be done by `write_ahead`."""
        return self._single >= EXPECTED and self._changes == self._changes_asked and not self._busy

    def write_ahead(self, ring: uring.Ring, write: uring.Call, written: Callable[[list[int]], None], size: int) -> None:
        """`ring.begin((write,), written)`, of `size` bytes, and a flush at once; `written` calls `changed`."""
        self._busy = True
        changes = self._changes

        def first_ended(result: int) -> None:
            written([result])
            # Whatever else has ended meanwhile may have done so after the flush began.
            self._covers_all = result == size and self._changes == changes + 1

        def ended(results: list[int]) -> None:
            result = results[1]
            if result in uring.NOT_DONE:
                self._covers_all = False
                self._waiting += self._asking
                self._asking, result = [], 0
            self._ended(result)

        ring.begin((write, (uring.FSYNC, self._fd, None, 0)), ended, first_ended)

    # --- when it is asked for ---------------------------------------------------------------------

    def _next(self) -> None:
        """Flush for all who wait, if any do."""
        self._asking, self._waiting = self._waiting, []
        self._busy = bool(self._asking)
        if not self._busy:
            self._idle.unpark_all()
        elif self._lost:
            self._ended(-self._lost)
        else:
            self._covers_all = False
            self._begin()

    def _ended(self, result: int) -> None:
        if result < 0:
            self._lost = self._lost or -result
        asking = self._asking
        self._next()
        with ExitStack() as told:  # all are, though one should raise; one may ask for the next flush
            for done in reversed(asking):
                told.callback(done, -self._lost)

    def _begin(self) -> None:
        ring = uring.ring()
        if ring is None:
            self._worker.start(self._flush_now, self._ended)
            return

        def ended(results: list[int]) -> None:
            if results[0] in uring.NOT_DONE:
                self._worker.start(self._flush_now, self._ended)
            else:
                self._ended(results[0])

        ring.begin(((uring.FSYNC, self._fd, None, 0),), ended)

    def _flush_now(self) -> int:
        os.fdatasync(self._fd)
        return 0
