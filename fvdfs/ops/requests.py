"""WRITE and FSYNC to an open disk, with what a mount does beside: it keeps the time of change, and whether the kernel
may believe what is not so.

Both are `store.base.Pending`.
"""

from __future__ import annotations

from collections.abc import Callable

from fvdfs.image.image import Image
from fvdfs.ops.inodes import Entry
from fvdfs.store.base import Done


class Write:
    """`Image.write`; with `stable`, durable when it has ended."""

    __slots__ = ("_beyond", "_done", "_entry", "_image", "_pending", "_stable", "_written")

    def __init__(
        self,
        entry: Entry,
        image: Image,
        offset: int,
        data: memoryview,
        *,
        stable: bool,
        written: Callable[[Entry], None],
    ) -> None:
        """`written` is told that it was successful."""
        self._entry = entry
        self._image = image
        self._stable = stable
        self._written = written
        self._pending = image.begin_write(offset, data)
        self._beyond = offset + len(data) > image.end
        self._done: Done | None = None

    def start(self, done: Done, /) -> bool:
        if self._stable:
            return False
        self._done = done
        return self._pending.start(self._started_has_ended)

    def _started_has_ended(self, result: int) -> None:
        assert self._done is not None
        if result >= 0:
            self._written(self._entry)
        else:
            self._failed()
        self._done(result)

    async def finish(self) -> int:
        try:
            count = await self._pending.finish()
            self._written(self._entry)
            if self._stable:
                await self._image.fsync()
                await self._entry.change_time.store()
        except Exception:
            self._failed()
            raise
        return count

    def _failed(self) -> None:
        """The kernel may have kept what could not be written, and believe that the disk is longer by it."""
        self._entry.cached = None
        self._entry.misjudged |= self._beyond


class Fsync:
    """`Image.fsync`, and the file's time of change."""

    __slots__ = ("_entry", "_pending")

    def __init__(self, entry: Entry, image: Image) -> None:
        self._entry = entry
        self._pending = image.begin_fsync()

    def start(self, done: Done, /) -> bool:
        return not self._entry.change_time.is_behind and self._pending.start(done)

    async def finish(self) -> int:
        result = await self._pending.finish()
        await self._entry.change_time.store()
        return result
