"""Changes of the size of an open image's disk.

What is new reads as zeros before the size says that it is there. A shrink waits for all writers, and gives back
what is past the new end only when nothing on disk, and no read, refers to it any more.

Where a compact image's table has no room for the new size, it takes the front of the journal (`format/table_room.py`):

    1. checkpoint: table and bitmap have all that the journal says
    2. the header gets the journal's new place and size, which lie in one sector of it
    3. the table grows

each stable before the next, so that a crash leaves one of two images that are whole. Only who asks for a size gets
that, and no write past the end: a stray one would take most of the journal. Where the journal is too small, the table
moves (`table_moving.py`).
"""

from __future__ import annotations

import errno

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.cow.locks import Gate
from fvdfs.cow.planner import Geometry
from fvdfs.format.header import MAX_DISK_SIZE, SECTOR, ceil_div, round_up, with_fields
from fvdfs.format.table_room import largest_table, smaller_journal
from fvdfs.image.core import Core
from fvdfs.image.passing import look_at_length, make_whole
from fvdfs.image.reading import Reads
from fvdfs.image.table_moving import move_table


class Resizer:
    """Resizes one image."""

    def __init__(self, core: Core, reads: Reads, gate: Gate) -> None:
        """`gate`: writers pass it."""
        self._core = core
        self._reads = reads
        self._gate = gate
        self.lock = trio.Lock()
        """Held while the size changes, or the base is let go."""
        self._making_room: trio.CancelScope | None = None
        self._stopped = False
        self._journal_cleared = False
        """Whether it holds no records from before this opening."""

    def forget_journal(self) -> None:
        """The image has another journal, whose records nobody has looked at."""
        self._journal_cleared = False

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Make the disk this long, in bytes, rounded up to a sector; the new part reads as zeros.

        Raises OSError: EPERM for a smaller size without `shrink`, EFBIG where the table can have no room
        for more chunks, EROFS where the image is not open for writing.
        """
        core = self._core
        size = round_up(size, SECTOR)
        async with self.lock:
            if not core.writable:
                raise OSError(errno.EROFS, f"{core.name}: not open for writing")
            await look_at_length(core)
            if size < core.size and not shrink:
                raise OSError(errno.EPERM, f"{core.name}: the disk can be cut only where -o shrink is given")
            if size > core.size:
                await self._make_table_room(size)
                await self._grow(size)
            elif size < core.size:
                await self._shrink(size)
            else:
                await make_whole(core)
            core.end = core.size

    async def make_room(self, size: int) -> None:
        """Have room for a disk of so many bytes. Raises OSError: EFBIG, EROFS as `resize`, ECANCELED at its closing."""
        core = self._core
        if not core.writable:
            raise OSError(errno.EROFS, f"{core.name}: not open for writing")
        async with self.lock:
            with trio.CancelScope() as self._making_room:
                if not self._stopped:
                    await self._make_table_room(size)
            if self._stopped:
                raise OSError(errno.ECANCELED, f"{core.name}: it is being closed")

    async def end_base_at(self, size: int) -> None:
        """All is stable, and the base's range ends at this byte, if it went on: what lies behind is local.

        Raises OSError.
        """
        core, size = self._core, round_up(size, SECTOR)
        async with self.lock:
            if core.bitmap is not None and size < core.header.base_size:
                async with self._gate.closed():
                    with trio.CancelScope(shield=True):
                        await self._clear_records()  # none names a block behind the new end then
                        await self._shrink_base_range(size)
                        core.geometry = Geometry(core.header.block_size, core.header.base_size)
                        core.bitmap.shrink(core.header.blocks)
            else:
                await core.committer.checkpoint()

    async def stop(self) -> None:
        """The image is being closed: make no room any more."""
        self._stopped = True
        if self._making_room is not None:
            self._making_room.cancel()
        async with self.lock:
            pass

    async def reach(self, stop: int) -> None:
        """Grow the disk so that it holds bytes up to `stop`, unless somebody has done it meanwhile.

        Raises OSError: EFBIG where the format or the table has no room, ENOSPC where the storage has none, EROFS,
        EIO once the image has failed.
        """
        core = self._core
        async with self.lock:
            if not core.writable:
                raise OSError(errno.EROFS, f"{core.name}: not open for writing")
            if stop > core.size:
                await self._grow(round_up(stop, SECTOR))

    async def _make_table_room(self, size: int) -> None:
        core = self._core
        header = core.header
        chunks = ceil_div(size, header.chunk_size) if header.compact else 0
        if not chunks or chunks <= header.table_capacity:
            return
        most = largest_table(header)
        if size > MAX_DISK_SIZE or chunks > most:
            limit = min(MAX_DISK_SIZE, most * header.chunk_size)
            raise OSError(
                errno.EFBIG,
                f"{core.name}: the chunk table can have room for a disk of {limit} bytes at most; "
                "create a larger image and copy into it (fvdfs convert)",
            )
        journal = smaller_journal(header, chunks)
        if journal is None:
            await move_table(core, self._reads, self._gate, chunks)
        else:
            await core.committer.move_journal(journal.offset, journal.size)
        assert isinstance(core.storage, ChunkedStorage)
        await core.storage.make_table_room(chunks)

    async def _grow(self, size: int) -> None:
        core = self._core
        header = core.header
        if size > MAX_DISK_SIZE:
            raise OSError(errno.EFBIG, f"{core.name}: a disk has at most {MAX_DISK_SIZE} bytes")
        if header.compact and ceil_div(size, header.chunk_size) > header.table_capacity:
            limit = header.table_capacity * header.chunk_size
            raise OSError(
                errno.EFBIG,
                f"{core.name}: the chunk table has room for a disk of {limit} bytes; "
                "enlarge the disk first (fvdfs resize)",
            )
        try:
            await self._grow_to(size)
        except BaseException:
            core.storage.grow_failed(core.size)
            raise
        core.size = size

    async def _grow_to(self, size: int) -> None:
        core = self._core
        await core.storage.grow(size)
        # What is new is zeros on disk, and bits and entries from before an earlier shrink are gone, before they count.
        if core.bitmap is not None:
            core.bitmap.shrink(core.bitmap.blocks)
        core.committer.data_written()
        # The original shrinks a disk and leaves records of what was past its new end.
        await core.committer.checkpoint(clear_journal=not self._journal_cleared)
        self._journal_cleared = True
        await self._shrink_base_range(core.header.virtual_disk_size)
        if not core.committer.unseen_writes:  # else it is as long as its data file, whatever the header says
            await core.committer.change_header(virtual_disk_size=size)

    async def _shrink(self, size: int) -> None:
        async with self._gate.closed():
            with trio.CancelScope(shield=True):  # half of it would be a disk whose end has become zeros
                await self._shrink_to(size)

    async def _shrink_to(self, size: int) -> None:
        core = self._core
        await self._clear_records()
        await self._shrink_header(size)
        core.size = size
        core.geometry = Geometry(core.header.block_size, core.header.base_size)
        if core.bitmap is not None:
            core.bitmap.shrink(core.header.blocks)
        await core.storage.shrink(size)
        await core.committer.checkpoint()
        await self._reads.wait()  # past the new end, perhaps, of places that may soon be another's
        await core.storage.give_back()
        core.committer.data_written()

    async def _clear_records(self) -> None:
        """From here on bits and entries go backwards: old records must not come back. Raises OSError."""
        core = self._core
        if core.header.clean and core.header.has_metadata:
            await core.committer.change_header(clean_shutdown=0)
        await core.committer.checkpoint(clear_journal=True)
        self._journal_cleared = True

    async def _shrink_header(self, size: int) -> None:
        """Shrink the base's range, then the disk: the fields are in different sectors, and no later growth must find
        the first past the second. Raises OSError; the header is then as it was, or the image has failed.
        """
        core = self._core
        header = core.header
        await self._shrink_base_range(size)
        try:
            await core.committer.change_header(virtual_disk_size=size)
        except OSError:
            if core.header.base_img_size != header.base_img_size and core.committer.failed is None:
                await core.committer.restore_header(base_img_size=header.base_img_size, bitmap_size=header.bitmap_size)
            raise

    async def _shrink_base_range(self, size: int) -> None:
        """Have the base provide nothing past this byte, whatever becomes of the disk's size. Raises OSError."""
        core = self._core
        header = core.header
        if header.base_img_size > size:
            region = with_fields(header, base_img_size=size).bitmap_region
            bitmap_size = region.size if region is not None else header.bitmap_size
            await core.committer.change_header(base_img_size=size, bitmap_size=bitmap_size)
