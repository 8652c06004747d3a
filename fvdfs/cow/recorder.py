"""Recording what a machine reads first, for a profile (`format.profile`). Pure."""

from __future__ import annotations

from bitarray import bitarray

from fvdfs.format.header import PAGE, ceil_div, round_up
from fvdfs.format.profile import Extent


class Recorder:
    """Keeps, in order, what is read first of the base's range. Offsets in bytes."""

    def __init__(self, size: int, limit: int) -> None:
        """`size`: bytes of the base's range; `limit`: extents kept; later ones are dropped."""
        self._size = size
        self._limit = limit
        self._seen = bitarray(ceil_div(size, PAGE))
        self.extents: list[Extent] = []

    def touched(self, start: int, stop: int, *, written: bool) -> None:
        """Bytes were read, or written: what is written before it is read is not needed from the base."""
        stop = min(stop, self._size)
        if start >= stop:
            return
        page, end = start // PAGE, ceil_div(stop, PAGE)
        seen = self._seen
        if written:
            page, end = ceil_div(start, PAGE), (end if stop == self._size else stop // PAGE)
            if page < end:
                seen[page:end] = 1
            return
        while (first := seen.find(0, page, end)) >= 0:
            page = seen.find(1, first, end)
            if page < 0:
                page = end
            seen[first:page] = 1
            self._add(first * PAGE, min(page * PAGE, round_up(self._size, PAGE)))

    def _add(self, start: int, stop: int) -> None:
        if self.extents and self.extents[-1][1] == start:
            self.extents[-1] = self.extents[-1][0], stop
        elif len(self.extents) < self._limit:
            self.extents.append((start, stop))
