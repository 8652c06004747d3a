"""Writes that reach the base of an open image as well, where the image asks for it and the mount allows it.

What is written when, `cow.writethrough` says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fvdfs.cow.locks import RangeLock
from fvdfs.cow.writethrough import MODES, WriteBack, WriteThrough
from fvdfs.image.core import Core
from fvdfs.store.base import Store

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

    async def copy(first: int, end: int) -> None:
        await _write_back(image, base, writer, locks, read, first, end)

    writer = WriteBack(base, image.bitmap.blocks, image.header.block_size, copy, image.name)
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
) -> None:
    """Copy local blocks to the base. Raises OSError."""
    async with locks.hold(first, end):
        start = first * image.geometry.block_size
        stop = min(end * image.geometry.block_size, image.geometry.base_size)
        if start < stop:  # else: the disk has shrunk since it was written
            await base.pwrite(await read(start, stop - start), start)
        writer.copied(first, end)
