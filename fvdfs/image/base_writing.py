"""Writes that reach the base of an open image as well, where the image asks for it and the mount allows it.

What is written when, `cow.writethrough` says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fvdfs.cow.locks import RangeLock
from fvdfs.cow.writethrough import MODES, WriteBack, WriteThrough
from fvdfs.image.core import Core
from fvdfs.store.base import Store, next_data

COPY_SIZE = 1 << 20  # bytes of owed blocks that are copied at a time, about; shorter holes are copied as data
HOLE_SIZE = 64 << 20  # bytes that get a hole in the base at a time, while others wait for these blocks

Read = Callable[[int, int], Awaitable[bytearray]]
"""`Image.read`."""


async def begin_base_writing(image: Core, locks: RangeLock, read: Read, *, crashed: bool) -> None:
    """From now on. `crashed`: the image was not closed, and owes the base all that is local. Raises OSError."""
    mode = image.header.write_updates_base_img
    base = image.base
    if image.bitmap is None or mode not in MODES or base is None or isinstance(base, Core):
        return
    if mode == "writethrough":
        image.base_writer = WriteThrough(base)
        return

    async def copy(first: int, end: int) -> int:
        return await _write_back(image, base, writer, locks, read, first, end)

    writer = WriteBack(base, image.bitmap.blocks, copy, image.name)
    if crashed:
        for first, end, local in image.bitmap.block_runs(0, image.bitmap.blocks):
            if local:
                writer.owe(first, end)
    await image.committer.change_header(clean_shutdown=0)
    if image.spawn is not None:
        image.spawn(writer.run)
    image.base_writer = writer


async def _write_back(
    image: Core, base: Store, writer: WriteBack, locks: RangeLock, read: Read, first: int, end: int
) -> int:
    """Copy some of these blocks, which are local, to the base: where that ended. Raises OSError."""
    block_size = image.header.block_size
    limit = min(end, first + max(1, HOLE_SIZE // block_size))
    start, stop = _bytes_of(image, first, limit)
    data = await next_data(image, start, stop)
    if data < stop:
        limit = min(limit, first + max(1, COPY_SIZE // block_size, (data - start) // block_size))
    async with locks.hold(first, limit):
        start, stop = _bytes_of(image, first, limit)
        if await next_data(image, start, stop) == stop:
            await base.zero(start, stop - start)
        else:
            for at in range(start, stop, COPY_SIZE):
                await base.pwrite(await read(at, min(COPY_SIZE, stop - at)), at)
        writer.copied(first, limit)
    return limit


def _bytes_of(image: Core, first: int, end: int) -> tuple[int, int]:
    """Those of blocks; none where the disk has shrunk since they were written."""
    start, stop = first * image.header.block_size, min(end * image.header.block_size, image.geometry.base_size)
    return start, max(start, stop)
