"""What of a disk was used lately, and how much: the order in which a disk that moves is fetched. Pure.

The disk is cut into extents of `EXTENT` bytes. Each request adds its weight to the extents that it reads or writes; a
weight halves in `HALF_LIFE`. That is done by having the weight of new requests grow instead, as time passes, so that
nothing is to be done for extents that rest. Where too many have a weight, the lighter half is forgotten: one pass over
a whole disk leaves what is used again and again.

A request costs no more than to note it. They are added up when time passes; of more than `NOTES` meanwhile the last
ones count. At most `LIMIT` extents and the notes take about 1 MB of memory, whatever the size of the disk; a disk that
was never used takes next to none.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable

from fvdfs.format.header import PAGE
from fvdfs.format.profile import Extent

_SHIFT = 17
EXTENT = 1 << _SHIFT  # bytes; half of what is fetched of a profile at once
LIMIT = 8192  # extents: 1 GiB of a disk
NOTES = 4096  # what is noted until time passes: one for each extent of a request
HALF_LIFE = 60.0  # seconds
_LONG = 300  # half-lives, after which all is as good as forgotten; times `_HEAVY` it is a float
_HEAVY = 1e200  # of one request, when all weights are made small again


class Heat:
    """Of one disk. Offsets and lengths in bytes."""

    __slots__ = ("_begins", "_notes", "_weight", "_weights")

    def __init__(self, begins: Callable[[], object] = lambda: None) -> None:
        """`begins` is called when there is something to add up, once until that is done."""
        self._begins = begins
        self._notes = deque[int]((), NOTES)
        """Bytes that were used, one in each extent."""
        self._weights: dict[int, float] = {}
        self._weight = 1.0
        """Of a request now."""

    def touched(self, start: int, length: int) -> None:
        """Bytes were read or written."""
        if not self._notes:
            self._begins()
        if length <= PAGE:
            self._notes.append(start)
        else:
            stop = start + length
            self._notes.append(start)
            self._notes.extend(range((start // EXTENT + 1) * EXTENT, stop, EXTENT))

    def pass_time(self, seconds: float) -> None:
        """So much time has passed since the last call, or the beginning."""
        self._add_up()
        self._weight *= 2 ** min(seconds / HALF_LIFE, _LONG)
        if self._weight > _HEAVY:
            scaled = ((number, weight / self._weight) for number, weight in self._weights.items())
            self._weights = {number: weight for number, weight in scaled if weight > 0}
            self._weight = 1.0

    def _add_up(self) -> None:
        if not self._notes:
            return
        weights = self._weights
        for number, count in Counter([at >> _SHIFT for at in self._notes]).items():
            weights[number] = weights.get(number, 0.0) + count * self._weight
        self._notes.clear()
        if len(weights) > LIMIT:
            heavy = sorted(weights, key=weights.__getitem__)[-LIMIT // 2 :]
            self._weights = {number: weights[number] for number in heavy}

    def extents(self, size: int, most: int) -> list[Extent]:
        """What of a disk of `size` bytes was used, the hottest first; at most so many extents.

        Extents whose weights are of one power of two are in order of their addresses, so that neighbours make one.
        """
        self._add_up()
        found: list[Extent] = []
        for number in sorted(self._weights, key=lambda number: (-math.frexp(self._weights[number])[1], number)):
            start, stop = number << _SHIFT, min((number + 1) << _SHIFT, size)
            if start >= stop:
                continue
            if found and found[-1][1] == start:
                found[-1] = found[-1][0], stop
            elif len(found) < most:
                found.append((start, stop))
            else:
                break
        return found
