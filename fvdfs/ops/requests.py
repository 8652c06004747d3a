"""WRITE, FALLOCATE, LSEEK and FSYNC to an open disk, with what a mount does beside: it records the mtime, and whether
the kernel's cached size may be wrong.

All are `store.base.Pending`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from fvdfs.image.image import Image
from fvdfs.ops.inodes import Entry
from fvdfs.ops.passthrough import Passthrough
from fvdfs.store.base import Done, Pending
from fvdfs.store.host import FALLOC_FL_KEEP_SIZE, PUNCH, ZERO_RANGE

SEEK_PATIENCE = 5.0  # seconds; until LSEEK is answered the kernel has all writes to the disk wait
_PLAIN = 0
_FALLOCATIONS = frozenset({PUNCH, ZERO_RANGE, ZERO_RANGE & ~FALLOC_FL_KEEP_SIZE, _PLAIN, FALLOC_FL_KEEP_SIZE})
"""The modes of fallocate(2) that a disk knows."""


class InTask:
    """What takes a task."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[], Awaitable[int | None]]) -> None:
        """`work`: says its result, or else that is 0."""
        self._work = work

    def start(self, done: Done, /) -> bool:
        return False

    async def finish(self) -> int:
        return await self._work() or 0


class Write:
    """`Image.write`, or another change of the disk's bytes."""

    __slots__ = ("_beyond", "_entry", "_pending", "_written")

    def __init__(self, entry: Entry, pending: Pending, written: Callable[[Entry], None], *, beyond: bool) -> None:
        """`written` is told that it was successful; `beyond`: whether it goes past the end of the disk."""
        self._entry = entry
        self._written = written
        self._pending = pending
        self._beyond = beyond

    def start(self, done: Done, /) -> bool:
        def ended(result: int) -> None:
            if result >= 0:
                self._written(self._entry)
            else:
                self._failed()
            done(result)

        try:
            return self._pending.start(ended)
        except BaseException:
            self._failed()
            raise

    async def finish(self) -> int:
        try:
            count = await self._pending.finish()
            self._written(self._entry)
            await self._make_durable()
        except Exception:
            self._failed()
            raise
        return count

    async def _make_durable(self) -> None:
        """That is for an fsync to do."""

    def _failed(self) -> None:
        """The kernel may have kept what could not be written, and believe that the disk is longer by it."""
        self._entry.cached = None
        self._entry.misjudged |= self._beyond


class DurableWrite(Write):
    """`Image.write`, and `Image.fsync`."""

    def start(self, done: Done, /) -> bool:
        return False

    async def _make_durable(self) -> None:
        image = self._entry.image
        assert image is not None
        await image.fsync()
        await self._entry.mtime.store()


async def fallocate(entry: Entry, image: Image, mode: int, offset: int, length: int) -> None:
    """fallocate(2) on a disk. Raises OSError: EOPNOTSUPP for an unknown mode; as `Image.zero` and `reserve`."""
    if mode not in _FALLOCATIONS:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if isinstance(entry.passthrough, Passthrough):
        await entry.passthrough.fallocate(mode, offset, length)
        return
    stop, size, allocates = offset + length, image.size, mode in (_PLAIN, FALLOC_FL_KEEP_SIZE)
    if allocates:
        await image.reserve(offset, stop)  # before it grows: it may be refused
    if not mode & FALLOC_FL_KEEP_SIZE:
        await image.reach(stop)
        if allocates and stop > size:
            await image.reserve(max(offset, size), stop)
    if not allocates:
        await image.zero(offset, stop, discard=mode == PUNCH)


def seek(
    entry: Entry, image: Image, offset: int, whence: int, kernels_size: Callable[[], Awaitable[int]] | None
) -> int | Pending:
    """SEEK_DATA or SEEK_HOLE on a disk: the place, or a pending request for it.

    All is data where the kernel may hold writes that have not come here, of an image that is damaged, and where its
    files cannot say, or do not in time: whoever reads it is told why. `kernels_size` says how long the disk is with
    those writes; None: they are never past the end. (It could be made to hand them over. But a thread that waits for
    that waits for our own answers, and nothing can end it: a `kill -9` would leave it, and the mount, for ever.)

    Raises OSError: ENXIO past the end, or where no data follows.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    entry.look()
    end = image.end
    held_back = entry.cached_writers and not isinstance(entry.passthrough, Passthrough)
    if held_back and kernels_size is not None:

        async def find_end() -> int:
            size = max(image.end, await kernels_size())
            return _place(offset, size, whence, (size, False))

        return InTask(find_end)
    if held_back or image.damage or offset >= end:
        return _place(offset, end, whence, (end, False))
    known = image.extent_nowait(offset, end)
    if known is not None and (whence == os.SEEK_HOLE or known[0] == end):
        return _place(offset, end, whence, known)

    async def find() -> int:
        return _place(offset, end, whence, await _extent_in_time(image, offset, end))

    return InTask(find)


async def _extent_in_time(image: Image, start: int, stop: int) -> tuple[int, bool]:
    """`Image.extent`. All is data where the files cannot say, or take longer than `SEEK_PATIENCE`."""
    found, ended = [(stop, False)], trio.Event()

    async def find() -> None:
        with suppress(OSError):
            found[0] = await image.extent(start, stop)
        ended.set()

    if image.spawn is None:
        await find()
    else:
        image.spawn(find)
        with trio.move_on_after(SEEK_PATIENCE):
            await ended.wait()
    return found[0]


def _place(offset: int, end: int, whence: int, extent: tuple[int, bool]) -> int:
    """What lseek(2) answers where this extent begins at `offset`. Raises OSError(ENXIO)."""
    stop, hole = extent
    if offset >= end:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    if hole is (whence == os.SEEK_HOLE):
        return offset
    if stop >= end and whence == os.SEEK_DATA:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return stop


class Fsync:
    """`Image.fsync`, and the file's mtime."""

    __slots__ = ("_entry", "_pending")

    def __init__(self, entry: Entry, image: Image) -> None:
        entry.look()
        self._entry = entry
        self._pending = image.begin_fsync()

    def start(self, done: Done, /) -> bool:
        return not self._entry.mtime.is_behind and self._pending.start(done)

    async def finish(self) -> int:
        result = await self._pending.finish()
        await self._entry.mtime.store()
        return result
