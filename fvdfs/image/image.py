"""One open image: a disk of bytes that can be read, written, made stable and resized.

The parts of an image, and where its bytes are: `core`. What is done with them: reads (`reading`), writes (`writing`),
copies from the base (`copying`), changes of the size (`resizing`), writes to the base (`base_writing`), profiles
(`profiling`). Nothing here waits for a flush but `fsync`, and what changes the metadata: what makes a write durable,
and in which order, is `commit`.

READ, WRITE and FSYNC have one shape, `store.base.Pending`, so that a mount can do most of them without a task.

Nothing here knows about FUSE. Errors of the storage are OSError.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractAsyncContextManager

import trio

from fvdfs.cow.fetching import Fetcher
from fvdfs.cow.locks import Gate, RangeLock
from fvdfs.cow.planner import Geometry
from fvdfs.errors import ImageError, ReadOnlyImage
from fvdfs.format.profile import Extent
from fvdfs.image import passing
from fvdfs.image.base_writing import begin_base_writing
from fvdfs.image.bases import Key
from fvdfs.image.core import Core, LastExtents, close_chain, leave_base
from fvdfs.image.exchange import Other, exchange
from fvdfs.image.profiling import read_profile, record_profile, write_profile
from fvdfs.image.reading import Reads
from fvdfs.image.resizing import Resizer
from fvdfs.image.stacking import Step, stack
from fvdfs.image.writing import PendingWrite, Writes
from fvdfs.store.base import Buffer, Done, Pending, Store

log = logging.getLogger(__name__)


class PendingFsync:
    """An fsync (`store.base.Pending`)."""

    __slots__ = ("_image",)

    def __init__(self, image: Image) -> None:
        self._image = image

    def start(self, done: Done, /) -> bool:
        """Where it takes no more than a flush of the data."""
        return self._image.base_writer is None and self._image.committer.start_commit(done)

    async def finish(self) -> int:
        await self._image.fsync()
        return 0


class Image(Core):
    """An open image; `chain` makes them. Offsets and lengths are bytes of the virtual disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._locks = RangeLock()
        self._gate = Gate()
        self._reads = Reads(self)
        self._resizer = Resizer(self, self._reads, self._gate)
        self._writes = Writes(self, self._reads, self._resizer, self._gate, self._locks)

    @property
    def in_use(self) -> bool:
        """Whether requests are under way."""
        return bool(self._reads) or bool(self._gate)

    # --- requests -------------------------------------------------------------------------------

    def begin_read(self, offset: int, view: memoryview) -> int | Pending:
        """Fill the buffer with the bytes from `offset` on, as far as that needs no waiting.

        The number of bytes, fewer than the buffer has only at the end of the disk; or the read that has to wait, which
        has that result. Raises OSError.
        """
        return self._reads.begin(offset, view)

    def begin_write(self, offset: int, data: memoryview) -> Pending:
        """`write` as a pending request; to be started, it needs a writable buffer."""
        return PendingWrite(self._writes, offset, data)

    def begin_fsync(self) -> Pending:
        """`fsync` as a pending request."""
        return PendingFsync(self)

    async def read(self, offset: int, length: int) -> bytearray:
        """The bytes from `offset` on, fewer than `length` only at the end of the disk. Raises OSError."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        rest = self.begin_read(offset, memoryview(buffer))
        if not isinstance(rest, int):
            await rest.finish()
        return buffer

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; a disk that ends before is grown where the format can.

        Raises OSError: EROFS where the image is not open for writing, EFBIG where it cannot grow,
        ENOSPC where the storage cannot; then nothing but parts of the range itself has changed.
        """
        await PendingWrite(self._writes, offset, memoryview(data)).finish()

    async def zero(self, start: int, stop: int, *, discard: bool = False) -> None:
        """Have bytes [start, stop), as far as the disk reaches, read as zeros, and give their space back.

        A crash leaves each sector old or zero. `discard`: only where that takes no writing of zeros.
        Raises OSError: EROFS where the image is not open for writing, EOPNOTSUPP with `discard` where the storage has
        no other way, or no room for the metadata that it takes; then nothing but parts of the range itself has changed.
        """
        await self._writes.zero(start, stop, discard=discard)

    async def copy(self, source: Image, at: int, start: int, stop: int) -> int:
        """Have the host copy bytes of another disk, or of this, from byte `at` on to bytes [start, stop) of this.

        The number of bytes, the first of them; 0: it takes a read and a write. Raises OSError as `write`.
        """
        return await self._writes.copy(source, source._reads, at, start, stop)

    async def reserve(self, start: int, stop: int) -> None:
        """Have later writes to bytes [start, stop), as far as the disk reaches, find space.

        Raises OSError: EROFS where the image is not open for writing, ENOSPC, EOPNOTSUPP where the storage cannot
        promise that.
        """
        await self._writes.reserve(start, stop)

    async def reach(self, end: int) -> None:
        """Grow the disk to at least `end` bytes, as a write up to there does. Raises OSError as `write`."""
        self._writes.check()
        if self.committer.unseen_writes and end > self.end:
            await passing.reach(self, end)
        while end > self.size:
            await self._resizer.reach(end)
        self.end = max(self.end, end)

    async def fsync(self) -> None:
        """When this returns, every write that was answered before survives a power cut. Raises OSError."""
        if not self.writable:
            return
        if self.base_writer is not None:
            await self.base_writer.flush()
        if self.committer.dirty or self.committer.failed is not None:
            await self.committer.commit()

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Make the disk this long, rounded up to a sector; the new part reads as zeros.

        Raises OSError: EPERM for a smaller size without `shrink`, EFBIG where the table can have no room
        for more chunks, EROFS where the image is not open for writing.
        """
        await self._resizer.resize(size, shrink=shrink)

    async def make_room(self, size: int) -> None:
        """Do what takes time before the disk gets this long, as far as it changes nothing of it. Raises as `resize`."""
        await self._resizer.make_room(size)

    async def fit(self, size: int) -> None:
        """Have an empty image that nobody uses yet be as large as a disk that has grown meanwhile. Raises OSError."""
        if self.size < size:
            await self.begin_writing()
            await self.resize(size)

    async def pass_through(self) -> None:
        """The kernel uses the data by itself from now on (`passing`). Raises OSError."""
        if self.writable:
            await passing.let_write(self)

    def look_at_length(self, length: int) -> None:
        """The data file was seen to have this many bytes (`passing`)."""
        if not self._resizer.lock.locked():
            passing.follow_length(self, length)

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Core.extent`. All files stay open until it has ended."""
        with self._reads.held():
            return await super().extent(start, stop)

    async def extents(self, start: int, stop: int, known: LastExtents) -> list[tuple[int, int, str]]:
        """`Core.extents`; as `extent`."""
        with self._reads.held():
            return await super().extents(start, stop, known)

    # --- the base -------------------------------------------------------------------------------

    def read_base_nowait(self, view: memoryview, start: int) -> bool:
        """Fill the buffer with the base's bytes from `start` on, if that needs no waiting; else say False."""
        return self._reads.read_base_nowait(view, start)

    async def read_base(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the base's bytes from `start` on, and zeros where it has none. Raises OSError."""
        await self._reads.read_base(view, start)

    def is_missing(self, start: int, stop: int) -> bool:
        """Whether all of these bytes are only in the base."""
        return self.bitmap is not None and self.bitmap.none_local(*self.geometry.blocks(start, stop))

    async def read_disk(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the disk's bytes from `start` on; for a read that is under way. Raises OSError."""
        await self._reads.read_disk(view, start)

    async def store_copy(self, start: int, data: memoryview) -> int:
        """`Copies.store_copy`."""
        writes = self._writes
        return await writes.reuse.where_full(functools.partial(writes.copies.store_copy, start, data))

    async def store_hole(self, start: int, stop: int, *, writes: bool) -> tuple[int, int]:
        """`Copies.store_hole`."""
        store = functools.partial(self._writes.copies.store_hole, start, stop, writes=writes)
        return await self._writes.reuse.where_full(store)

    async def base_extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent` of the base, which reads as zeros past its end. Raises OSError."""
        base = self.base
        assert base is not None
        if not isinstance(base, Core):
            return await base.extent(start, stop)
        end, hole = await base.extent(start, min(stop, base.size)) if start < base.size else (stop, True)
        return (stop, True) if hole and end == base.size else (end, hole)

    def start_fetching(self, *, copy_on_read: bool) -> Fetcher | None:
        """Read the base by a fetcher from now on; None where there is no base, or copies cannot be stored."""
        if self.bitmap is None or not self.writable or self.spawn is None:
            return None
        if self.fetcher is None:
            limit = max(0, self.header.max_outstanding_copy_on_read_data)
            self.fetcher = Fetcher(self, self.spawn, copy_on_read=False, max_outstanding=limit)
        self.fetcher.copy_on_read |= copy_on_read
        return self.fetcher

    def share_reads(self) -> None:
        """Others stand on this image: what several of them want of its base at the same time is read once."""
        if self.fetcher is None and self.bitmap is not None and self.spawn is not None and self.is_remote:
            self.fetcher = Fetcher(self, self.spawn, copy_on_read=False, max_outstanding=0)

    async def begin_copies(self) -> None:
        """Others stand on this image: keep what they read of its base. The caller holds the lock for that.

        A failure goes to the log; then the image is only read. Raises nothing.
        """
        try:
            await self.begin_writing()
        except (ImageError, OSError) as error:
            log.warning("%s: what is read of its base is not kept: %s", self.name, error)
            self.share_reads()

    async def release_base(self) -> bool:
        """Close the base if every block is local, which becomes stable first; whether it is so. Raises OSError."""
        bitmap = self.bitmap
        if bitmap is None or not self.writable or self.base_writer is not None or self.committer.failed is not None:
            return False
        async with self._resizer.lock:
            if not bitmap.all_local(0, bitmap.blocks):
                return False
            await self.committer.release_base()
            await self.wait_for_reads()  # later ones find all blocks local
            if self.fetcher is not None:
                await self.fetcher.close()
            self.bitmap, self.fetcher = None, None
            self.geometry = Geometry(0, 0)
            await leave_base(self)
        return True

    async def put_on_top(self, top: Image, name: str, rename: Step, sync: Step) -> float:
        """`stacking.stack`: `top` takes the writes from now on, and what this image was is its base."""
        return await stack(self, top, name, Image, self._resizer.lock, self._gate, rename, sync)

    async def change_base(self, base: Store, key: Key) -> None:
        """Stand on this store, which has this key among bases, from now on. Both have the same content for who asks.

        It is taken over. The former base is let go when no read of it is under way.
        """
        former = self.base
        assert former is not None
        async with self.bases.changing([key]):
            found = self.bases.find(key)
            if found is None:
                self.bases.add(key, base)
            else:
                await base.aclose()
            new = base if found is None else found
            self.bases.enter(new, self)
            self.base = new
        await self._reads.wait_for_base()
        async with self.bases.leaving(former, self) as is_last:
            if is_last and not isinstance(former, Core):
                await former.aclose()

    async def let_source_go(self) -> None:
        """Stand on the template alone from now on; all that is to be copied is here. Raises OSError.

        First that is stable: data, table and bitmap, as before the header says that a base is no longer needed. Then
        the header says that the base's range ends with the base.
        """
        followed = self.followed
        assert followed is not None
        template = followed.base
        assert template is not None
        size = template.size if isinstance(template, Core) else await template.size()
        await self._resizer.end_base_at(size)
        if self.fetcher is not None:
            self.fetcher.copy_on_read = bool(self.header.copy_on_read)

    def without_writers(self) -> AbstractAsyncContextManager[None]:
        """Keep all writers out meanwhile."""
        return self._gate.closed()

    async def exchange(self, other: Other) -> tuple[float, Core]:
        """`exchange.exchange`, which see: go on in other files that show the same; the caller has ended copies."""
        async with self._resizer.lock:
            done = await exchange(self, other, self._gate)
            self._resizer.forget_journal()
        return done

    async def wait_for_reads(self) -> None:
        """Wait for the end of all reads, of this disk and of those above it, that are under way now."""
        for image in (self, *self.bases.above(self)):
            assert isinstance(image, Image)
            await image._reads.wait_for_base()

    # --- profiles -------------------------------------------------------------------------------

    async def read_profile(self) -> list[Extent]:
        """`profiling.read_profile`."""
        return await read_profile(self)

    def record_profile(self) -> bool:
        """`profiling.record_profile`."""
        return record_profile(self)

    # --- opening for writing, closing --------------------------------------------------------------------------

    async def begin_writing(self, *, accept_unclean: bool = False) -> None:
        """Permit writes from now on; the caller holds the locks on the files.

        What a replay rebuilt in memory becomes stable first, before the journal is used again
        (format.md, "Beyond the original"). Raises ReadOnlyImage where the state of the image forbids it
        (`accept_unclean` overrides: a crash without a journal), OSError.
        """
        if self.writable:
            return
        header = self.header
        if self.storage.damage:
            raise ReadOnlyImage(self.name, f"{self.storage.damage}: the image can only be read")
        known = accept_unclean or self.committer.was_ours
        if not header.clean and header.has_metadata and header.journal_region is None and not known:
            raise ReadOnlyImage(
                self.name,
                "clean_shutdown=0 and no journal: it was not closed, and its metadata may be incomplete; "
                "it can be read, and written with -o accept_unclean once you have looked at it",
            )
        await self.committer.recover()
        await passing.recover_length(self)
        if not header.clean:
            await self.storage.clear_behind()
            self.committer.data_written()
        if self.base_may_be_written:
            await begin_base_writing(self, self._locks, self.read, crashed=not header.clean)
        self.committer.in_use(writing=True)
        self.writable = True
        if header.copy_on_read or self.followed is not None:
            self.start_fetching(copy_on_read=True)

    async def stop_writing(self) -> None:
        """Undo `begin_writing`: make all stable and the header clean. No write may be under way.

        Raises OSError; the image has failed, or it can be tried again.
        """
        fetcher, self.fetcher = self.fetcher, None
        if fetcher is not None:
            await fetcher.close()
        if self.base_writer is not None:
            await self.base_writer.close()
            self.base_writer = None
        await write_profile(self)
        await passing.settle(self)
        await self.committer.close()
        self.committer.in_use(writing=False)
        self.writable = False

    async def freeze(self) -> None:
        """`stop_writing`, while writes come: those that wait, or come later, fail with EROFS. Raises OSError.

        Nothing copies from the base any more, nor is anything written to it.
        """
        assert self.fetcher is None
        assert self.base_writer is None
        async with self._resizer.lock:
            await self.committer.commit()  # so that writers wait for little
            async with self._gate.closed():
                await self.stop_writing()

    async def close(self) -> None:
        """`end_writing`, then close all files. Raises OSError of the commit."""
        with trio.CancelScope(shield=True):
            try:
                await self.end_writing()
            finally:
                await close_chain(self)

    async def end_copies(self) -> None:
        if self.bases.before_closing is not None:
            await self.bases.before_closing(self)
        try:
            await self.end_writing()
        except OSError as error:
            log.error("%s: what was read from its base is not kept: %s", self.name, error)

    async def end_writing(self) -> None:
        """Commit everything and make the header clean; nothing is written again. Raises OSError of the commit."""
        with trio.CancelScope(shield=True):
            try:
                await self._resizer.stop()
                if self.fetcher is not None:
                    await self.fetcher.close()
                    await self.release_base()
                await self.storage.stop_growing()
                if self.writable and self.committer.failed is None:
                    await self.stop_writing()
            finally:
                self.writable = False
