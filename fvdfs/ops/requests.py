"""WRITE and FSYNC to an open disk, with what a mount does beside: it records the mtime, and whether the kernel's
cached size may be wrong.

Both are `store.base.Pending`.
"""

from __future__ import annotations

from collections.abc import Callable

from fvdfs.image.image import Image
from fvdfs.ops.inodes import Entry
from fvdfs.store.base import Done


class Write:
    """`Image.write`."""

    __slots__ = ("_beyond", "_entry", "_pending", "_written")

    def __init__(
        self, entry: Entry, image: Image, offset: int, data: memoryview, written: Callable[[Entry], None]
    ) -> None:
        """`written` is told that it was successful."""
        self._entry = entry
        self._written = written
        self._pending = image.begin_write(offset, data)
        self._beyond = offset + len(data) > image.end

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
