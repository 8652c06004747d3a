"""Planning: which bytes of a request lie where, and what a write has to do first.

A request is planned by the bitmap as it is when the request begins, and then executed from the plan
alone (format.md, "Reads, writes, copies"). Offsets and lengths are bytes of the virtual disk.

The base's range ends at `base_size` (base_img_size): what is at or past it is in own storage,
whatever the base has there now. The last block may reach past it. So a write

- wholly at or past `base_size` touches no bit;
- across it sets the bits of the blocks it touches before it;
- whose first or last block is covered only in part and is not local is completed from the base, up
  to `base_size` and never further.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from fvdfs.cow.bitmap import Bitmap

ZERO_UNIT = 64 << 10
_ZEROS = bytes(ZERO_UNIT)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What planning has to know of an image with a base; bytes."""

    block_size: int
    base_size: int

    def blocks(self, start: int, stop: int) -> tuple[int, int]:
        """The blocks [first, end) of the base's range that bytes [start, stop) touch; may be empty."""
        if stop > self.base_size:
            stop = self.base_size
        if start >= stop:
            return 0, 0
        size = self.block_size
        return start // size, (stop + size - 1) // size


def read_runs(geometry: Geometry, bitmap: Bitmap, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    """Bytes [start, stop) as runs (start, stop, local); the rest of each run is in the base."""
    first, end = geometry.blocks(start, stop)
    at = start
    tail_local = stop > geometry.base_size
    for _, run_end, local in bitmap.block_runs(first, end):
        run_stop = min(run_end * geometry.block_size, geometry.base_size, stop)
        if run_end == end and local and tail_local:
            run_stop = stop
        if at < run_stop:
            yield at, run_stop, local
            at = run_stop
    if at < stop:
        yield at, stop, True


@dataclass(slots=True)  # not frozen: that would triple what it costs to make one
class WritePlan:
    """What a write does.

    Bytes [start, stop) are stored: those from the base in `head` and `tail` (None: nothing), with
    the request's own between them. Afterwards blocks [first, end), which may be none, are local.
    """

    start: int
    stop: int
    head: tuple[int, int] | None
    tail: tuple[int, int] | None
    first: int
    end: int
    missing: bool = True
    """Whether some of these blocks are not local yet."""


def plan_write(geometry: Geometry, bitmap: Bitmap | None, start: int, stop: int) -> WritePlan:
    """How to store bytes [start, stop); without a bitmap there is no base."""
    first, end = geometry.blocks(start, stop)
    if bitmap is None or first == end or bitmap.all_local(first, end):
        return WritePlan(start, stop, None, None, first, end, False)
    size = geometry.block_size
    head = tail = None
    if start > first * size and not bitmap.is_local(first):
        head = first * size, start
    last_stop = min(end * size, geometry.base_size)
    if stop < last_stop and not bitmap.is_local(end - 1):
        tail = stop, last_stop
    return WritePlan(head[0] if head else start, tail[1] if tail else stop, head, tail, first, end)


class Zeroes(enum.Enum):
    """What becomes of zeros that a guest writes."""

    OFF = "off"
    """They are data like any other."""
    ON = "on"
    """They are not stored where zeros are read already."""
    PUNCH = "punch"
    """Their space is given back, too."""


def zero_runs(start: int, data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """The bytes from `start` on as runs (start, stop, whether all are zero), cut at aligned 64 KiB."""
    stop = start + len(data)
    at = run_start = start
    run_zero: bool | None = None
    while at < stop:
        end = min(stop, at // ZERO_UNIT * ZERO_UNIT + ZERO_UNIT)
        zero = _ZEROS.startswith(data[at - start : end - start])  # to compare views is a hundred times slower
        if zero is not run_zero:
            if run_zero is not None:
                yield run_start, at, run_zero
            run_start, run_zero = at, zero
        at = end
    if run_zero is not None:
        yield run_start, stop, run_zero
