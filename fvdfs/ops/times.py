"""The mtime of a disk while its image is open.

The disk's time is that of its image file, but not everything that changes the one changes the other: data may lie in
another file, and no reader sees copies from the base, the journal or the header. So the time is kept here while the
image is open, and stored in the file at the end. Where writes to the disk do not change the image file at all, the
time is stored soon after a write, and before a flush is answered: a backup after a crash must not take the disk for
unchanged.

With its write-back cache the kernel keeps the time, and sets it before each flush of a file that was written.
"""

from __future__ import annotations

import logging
import os
import time

import trio

from fvdfs.alloc.chunked import Spawn
from fvdfs.store.host import HostFile

log = logging.getLogger(__name__)

STORE_INTERVAL = 0.05  # seconds between two times that a file gets, if no flush comes


class Mtime:
    """The mtime of one disk, in ns."""

    def __init__(self) -> None:
        self.written_ns = 0
        """When the disk was written last."""
        self._is_to_be_stored = False
        self._ns = 0
        self._was_set = False
        """Whether somebody has set the time since the image was opened: the kernel, or a user."""
        self._written_since = False
        """Whether the disk was written since then."""
        self._file: HostFile | None = None
        """The image file, while the image is open."""
        self._spawn: Spawn | None = None
        """Starts a task; None where writes change the image file."""
        self._task_runs = False
        self._storing = trio.Lock()

    @property
    def ns(self) -> int:
        """When the disk was changed last; only while the image is open."""
        return self.written_ns if self._written_since and not self._was_set else self._ns

    @property
    def is_behind(self) -> bool:
        """Whether the file's time does not tell of the last write yet, so that a flush has to wait for `store`."""
        return self._is_to_be_stored or self._storing.locked()

    def begin(self, file: HostFile, mtime_ns: int, spawn: Spawn | None) -> None:
        """The image was opened. `spawn` starts tasks that store the time; None where writes change `file`."""
        self._file, self._ns, self._spawn = file, mtime_ns, spawn
        self._was_set = self._written_since = self._is_to_be_stored = False

    def is_told_by_data(self) -> None:
        """A crash leaves the time in the data file, where whoever looks at the image then looks as well."""
        self._spawn = None

    def set(self, ns: int) -> None:
        """Somebody has set the time: the kernel, or a user."""
        self._ns = ns
        self._was_set, self._written_since = True, False
        self._store_soon()

    def written(self, *, kernel_tells: bool, at_ns: int = 0) -> None:
        """The disk was written, now, or at `at_ns`. `kernel_tells`: the kernel is going to set the time."""
        self.written_ns = max(self.written_ns, at_ns) if at_ns else time.time_ns()
        self._written_since = True
        if not kernel_tells:
            self._ns = self.written_ns
        if not self._is_to_be_stored:
            self._store_soon()

    def _store_soon(self) -> None:
        if self._file is None or self._spawn is None:
            return
        self._is_to_be_stored = True
        if not self._task_runs:
            self._task_runs = True
            self._spawn(self._store_until_done)

    async def _store_until_done(self) -> None:
        try:
            while self._is_to_be_stored:
                await self.store()
                await trio.sleep(STORE_INTERVAL)
        finally:
            self._task_runs = False

    async def store(self) -> None:
        """Store the time in the image file, where it is behind."""
        async with self._storing:
            if self._is_to_be_stored and self._file is not None:
                self._is_to_be_stored = False
                await _store(self._file, self.written_ns if self._written_since else self._ns)

    async def restore(self) -> None:
        """Give the image file the disk's time: copies and metadata have changed the file alone."""
        assert self._file is not None
        await _store(self._file, self.ns)

    async def move(self, file: HostFile, spawn: Spawn | None) -> None:
        """Writes go to this file from now on; the former one keeps the disk's time as it is. `spawn`: as in `begin`."""
        async with self._storing:
            former, self._file, self._spawn = self._file, file, spawn
            self._is_to_be_stored = False
            assert former is not None
            await _store(former, self.ns)

    async def end(self, *, was_writable: bool) -> os.stat_result:
        """The image is being closed; the file's status after that. Raises OSError."""
        async with self._storing:
            assert self._file is not None
            if was_writable:
                await self.restore()
            file, self._file = self._file, None
            self._is_to_be_stored = False
            return await trio.to_thread.run_sync(file.status)


async def _store(file: HostFile, ns: int) -> None:
    try:
        await file.keep_mtime(ns)
    except OSError as error:
        log.warning("%s: its mtime cannot be set: %s", file.name, error.strerror)
