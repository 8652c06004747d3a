"""An image takes over all that it needs of its base, and lets go of it.

It is what prefetching does (`prefetch/prefetcher.py`), but at once, without regard to others, while nobody has the
image open. The order is that of `Committer.release_base`: copies, bits and table are stable before the header says that
the base is no longer needed. What the image shows never changes. An end at any moment loses copies at most, and the
next call goes on with those that were kept.
"""

from __future__ import annotations

from fvdfs.cow.extents import Extents
from fvdfs.errors import UsageError
from fvdfs.image.image import Image
from fvdfs.image.policy import Policy
from fvdfs.layers.merging import PIECE, Progress, opened_to_merge


async def flatten(path: str, policy: Policy, progress: Progress) -> None:
    """Flatten an image that nobody has open. Raises UsageError where it has no base, ImageBusy, ImageError, OSError."""
    async with opened_to_merge(path, policy) as (image, file):
        if image.bitmap is None:
            raise UsageError(f"{path}: stands on nothing, and so is flat already")
        mtime_ns = file.status().st_mtime_ns
        await _copy(image, progress)
        if not await image.release_base():
            raise UsageError(f"{path}: writes to its base (-o allow_base_write), and cannot let go of it")
        await image.end_writing()
        await file.keep_mtime(mtime_ns)


async def _copy(image: Image, progress: Progress) -> None:
    """Copy all blocks that are missing. Raises OSError."""
    block_size, base_size = image.base_range()
    extents = Extents(image.name, image.base_extent)
    at = 0
    while True:
        start, stop = image.missing(at, PIECE)
        if start >= stop:
            return
        at, hole = await extents.blocks(start, stop, block_size, base_size)
        if hole:
            at, _ = await image.store_hole(start, at, writes=True)
        else:
            data = bytearray(at - start)
            await image.read_base(memoryview(data), start)
            await image.store_copy(start, memoryview(data))
        progress(at, base_size)
