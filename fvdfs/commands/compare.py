"""`fvdfs compare`: whether two disks have the same content, whatever their formats.

Neither holes are read, nor what lies for both at the same place of the same file: two disks on one base are told apart
by what is their own. Pieces of the rest are read from both, several at a time. What a disk lacks at its end counts as
zeros.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from fvdfs import daemon
from fvdfs.commands.convert import PIECE, UNIT, Permission, Progress, in_workers, open_source, permitted
from fvdfs.commands.sides import Side, Stored, fill, stored
from fvdfs.commands.terminal import progress_bar
from fvdfs.cow.extents import Extents
from fvdfs.errors import UsageError, named
from fvdfs.format.header import round_up
from fvdfs.store.references import BASE_FORMATS

SAME, DIFFERENT = 0, 1
"""Exit codes, as those of `qemu-img compare`, which has 2 and more for what could not be compared."""
RUNS_PER_TURN = 10_000  # runs that are looked at before others get their turn


@dataclass(frozen=True, slots=True)
class Found:
    """What a comparison has shown. Bytes."""

    sizes: tuple[int, int]
    first_difference: int | None
    """Where the disks differ first; None: nowhere, or not looked for, as with `is_strict` and two sizes."""
    read: int
    """What was read of both, to find that out."""
    is_strict: bool

    @property
    def is_same(self) -> bool:
        return self.first_difference is None and (not self.is_strict or self.sizes[0] == self.sizes[1])


def run(
    names: Sequence[str], formats: Sequence[str], *, strict: bool, as_json: bool, options: Sequence[str], secret: str
) -> int:
    """Compare the two, with a progress bar, and say what was found; the exit code. Raises as `compare`."""
    permission = permitted(options, secret)
    for option, file_format in zip(("-f", "-F"), formats, strict=True):
        if file_format and file_format not in BASE_FORMATS:
            raise UsageError(f"{option} {file_format}: is not known; known are {', '.join(BASE_FORMATS)}")
    with progress_bar() as progress:
        found, remarks = daemon.run_loop(functools.partial(compare, names, formats, strict, permission, progress))
    for remark in remarks:
        daemon.complain(remark)
    if as_json:
        facts = {"identical": found.is_same, "first_difference": found.first_difference}
        print(json.dumps({**facts, "sizes": found.sizes, "read": found.read}))
    else:
        print(_in_words(found, names))
    return SAME if found.is_same else DIFFERENT


def _in_words(found: Found, names: Sequence[str]) -> str:
    sizes = f"{names[0]} has {found.sizes[0]} bytes, {names[1]} {found.sizes[1]}"
    if found.first_difference is not None:
        return f"the disks differ, first at byte {found.first_difference}"
    if not found.is_same:
        return f"the disks differ in size: {sizes}"
    if found.sizes[0] != found.sizes[1]:
        return f"the disks are the same, but for zeros at the end: {sizes}"
    return "the disks are the same"


async def compare(
    names: Sequence[str], formats: Sequence[str], strict: bool, permission: Permission, progress: Progress
) -> tuple[Found, list[str]]:
    """What a comparison of these two shows; remarks for the user. Empty formats: by name, as for `convert`.

    `strict`: disks of two sizes differ, and are not looked into. Raises ImageError, UsageError, OSError.
    """
    remarks: list[str] = []
    async with AsyncExitStack() as opened:
        sides: list[Side] = []
        for name, file_format in zip(names, formats, strict=True):
            with named(name):
                side, more = await open_source(name, file_format, permission)
            opened.push_async_callback(_close, side)
            sides.append(side)
            remarks += more
        sizes = sides[0].size, sides[1].size
        if strict and sizes[0] != sizes[1]:
            return Found(sizes, None, 0, strict), remarks
        first, read = await first_difference(sides, names, progress)
    return Found(sizes, first, read, strict), remarks


async def _close(side: Side) -> None:
    with trio.CancelScope(shield=True):
        await side.close()


class _Half:
    """One of the two disks, with zeros behind its end."""

    def __init__(self, side: Side, name: str) -> None:
        self._side = side
        self._name = name
        self.extents = Extents(name, self._extent)

    async def _extent(self, start: int, stop: int) -> tuple[int, bool]:
        size = self._side.size
        if start >= size:
            return stop, True
        with named(self._name):
            end, hole = await self._side.extent(start, min(stop, size))
        return (stop, True) if hole and end >= size else (end, hole)

    async def fill(self, buffer: bytearray, start: int, length: int) -> None:
        """Have a buffer begin with these bytes of the disk. Raises OSError."""
        inside = max(0, min(length, self._side.size - start))
        count = 0
        if inside:
            began = trio.current_time()
            with named(self._name):
                count = await fill(self._side, memoryview(buffer)[:inside], start)
            self.extents.was_read(inside, trio.current_time() - began)
        if count < length:
            buffer[count:length] = bytes(length - count)


async def first_difference(sides: Sequence[Side], names: Sequence[str], progress: Progress) -> tuple[int | None, int]:
    """The first byte in which two disks differ, if any, and how many bytes were read for it.

    `names`: of the disks, for messages. Raises ImageError, OSError.
    """
    size = max(side.size for side in sides)
    halves = [_Half(side, name) for side, name in zip(sides, names, strict=True)]
    parts = _apart(sides[0], sides[1], size)
    looking = trio.Lock()
    at = stop = read = 0  # [at, stop): what is left of the part that is looked into
    first = size

    async def next_piece() -> tuple[int, int, list[bool]] | None:
        """The next piece to read, and whether each disk has a hole there; None: there is none before `first`."""
        nonlocal at, stop
        async with looking:
            while at < first:
                if at >= stop:
                    await trio.lowlevel.checkpoint()
                    at, stop = next(parts, (size, size))
                    progress(at, size)
                    continue
                start, limit = at, min(at + PIECE, stop)
                found = [await half.extents.blocks(start, limit, UNIT, stop) for half in halves]
                at = min(end for end, _ in found)
                progress(at, size)
                holes = [hole for _, hole in found]
                if not all(holes):
                    return start, at, holes
        return None

    async def work() -> None:
        nonlocal first, read
        buffers = bytearray(PIECE), bytearray(PIECE)
        while (piece := await next_piece()) is not None:
            start, end, holes = piece
            length = end - start
            for half, buffer, hole in zip(halves, buffers, holes, strict=True):
                if hole:
                    buffer[:length] = bytes(length)
                else:
                    await half.fill(buffer, start, length)
                    read += length
            if (at := _differs_at(*buffers, length)) is not None:
                first = min(first, start + at)
            await trio.lowlevel.checkpoint()

    await in_workers(work)
    return (first if first < size else None), read


def _apart(one: Side, other: Side, size: int) -> Iterator[tuple[int, int]]:
    """The parts of bytes [0, size), in whole units, that the two do not have in the same place, in order.

    Some are empty: others get their turn then.
    """
    runs = stored(one, size), stored(other, size)
    at = start = stop = 0
    ends = [Stored(0, None), Stored(0, None)]
    for number in itertools.count(1):
        if at == size:
            break
        ends = [next(run) if end.stop == at else end for run, end in zip(runs, ends, strict=True)]
        end = min(ends[0].stop, ends[1].stop)
        apart = ends[0].place != ends[1].place
        if (apart and at > stop) or not number % RUNS_PER_TURN:
            yield start, stop
            start = stop = max(stop, at // UNIT * UNIT) if apart else stop
        if apart:
            stop = min(round_up(end, UNIT), size)
        at = end
    yield start, stop


def _differs_at(one: bytearray, other: bytearray, length: int) -> int | None:
    """The first of so many bytes in which two buffers differ.

    Not by comparing memoryviews, which takes a hundred times as long.
    """
    if one == other or one[:length] == other[:length]:
        return None
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
