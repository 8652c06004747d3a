"""Copies of bytes from one disk to another, or within one (copy_file_range(2)).

What is stored in a file of this host, the host copies to where the other disk has it; on some file systems (XFS,
btrfs) the files then share the space (reflinks). A hole becomes one, except a short one among data. The rest, such as
what only a base at a server has, is read and written. Each part is a write like any other.
"""

from __future__ import annotations

from fvdfs.image.core import damaged_layers
from fvdfs.image.image import Image

LONGEST = 64 << 20  # bytes that are copied before it is answered, about: a program that is killed meanwhile waits
_PIECE = 1 << 20  # bytes that are read and written at a time; and of the shortest hole of a file that is looked for


async def copy_range(source: Image, at: int, target: Image, start: int, length: int) -> int:
    """Copy `length` bytes, as far as the source has them, from its byte `at` to byte `start` of the target.

    The number of bytes, the first of them: it may be fewer, then there is more to copy, or the next call says what has
    failed. Raises OSError as `Image.read` and `Image.write`.
    """
    begin, stop = at, min(at + length, source.end)
    try:
        while at < stop and at - begin < LONGEST:
            at += await _copy_piece(source, at, target, start + at - begin, min(stop - at, LONGEST))
    except OSError:
        if at == begin:
            raise
    return at - begin


async def _copy_piece(source: Image, at: int, target: Image, start: int, length: int) -> int:
    end, hole = await _extent(source, at, at + length)
    stop = start + end - at
    await target.reach(stop)
    if hole:
        await target.zero(start, stop)
        return end - at
    count = await target.copy(source, at, start, stop)
    if not count:
        data = await source.read(at, min(end - at, _PIECE))
        await target.write(start, data)
        count = len(data)
    return count


async def _extent(source: Image, start: int, stop: int) -> tuple[int, bool]:
    """As `Image.extent`; data may go on behind the end, and have short holes."""
    known = source.extent_nowait(start, stop)
    if known is not None:
        return known
    if next(damaged_layers(source), None) is not None:  # what a file lacks is no hole: a read says so
        return stop, False
    end, hole = await source.extent(start, stop)
    return (end, True) if hole and end - start >= _PIECE else (min(stop, max(end, start + _PIECE)), False)
