"""What of a disk was used lately, and how much: the order in which a disk that moves is fetched. Pure.

The disk is cut into extents of `EXTENT` bytes. Each request adds its weight to the extents that it reads or writes; a
weight halves in `HALF_LIFE`. That is done by having the weight of new requests grow instead, as time passes, so that
nothing is to be done for extents that rest.

Whoever reads a disk from its beginning to its end, such as a backup, says nothing about what its machine will use next.
So passes are told from other requests (`_Passes`): of one that has come far, an extent counts once, and little, however
many requests there are for it. What others use of it counts as ever.

Where too many extents have a weight, the lighter half is forgotten: a pass over a whole disk leaves what is used again
and again.

A request costs no more than to note it. They are added up when time passes; of more than `NOTES` meanwhile the last
ones count. At most `LIMIT` extents and the notes take about 1 MB of memory, whatever the size of the disk; a disk that
was never used takes next to none.
"""

from __future__ import annotations

import math
from collections import deque
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
LONG_PASS = 64  # extents, 8 MiB, after which a pass over neighbours is one
PASSED = 1 / 16  # what an extent of such a pass counts, as a part of one request
_AHEAD = 16  # extents that requests of one pass are apart at most, where several are under way
_BACK = 8  # extents that are to be passed anew for each that was met again
_PASSES = 128  # that are told apart
_WINDOW = (1 << 2 * _AHEAD) - 1


class _Pass:
    """Over neighbouring extents, upwards."""

    __slots__ = ("last", "length", "seen", "stop")

    def __init__(self, number: int) -> None:
        self.last = number
        """The extent of its last request."""
        self.stop = number + 1
        """Behind the highest one."""
        self.seen = 1
        """Of the extents before `stop`, which it had; the lowest bit is the highest extent."""
        self.length = 1
        """Extents that it had, less what speaks against a pass; no more than counts."""


class _Passes:
    """Requests that go over the disk in the order of its addresses, told from others by what comes after what."""

    __slots__ = ("_by_place",)

    def __init__(self) -> None:
        self._by_place: dict[int, _Pass] = {}
        """By `stop // _AHEAD`; the one that went on last is the last."""

    def share(self, number: int) -> float:
        """How much of a request the next one, for this extent, counts."""
        by_place, place = self._by_place, number // _AHEAD
        for at in (place, place + 1, place - 1):
            found = by_place.get(at)
            if found is not None and -_AHEAD <= number - found.stop < _AHEAD:
                return self._go_on(at, found, number)
        by_place[(number + 1) // _AHEAD] = _Pass(number)
        if len(by_place) > _PASSES:
            del by_place[next(iter(by_place))]
        return 1.0

    def _go_on(self, at: int, found: _Pass, number: int) -> float:
        is_long = found.length > LONG_PASS
        ahead = number + 1 - found.stop
        if number == found.last or not ahead:
            return 0.0 if is_long else 1.0
        if ahead > 0:
            found.seen = (found.seen << ahead | 1) & _WINDOW
            found.stop += ahead
            del self._by_place[at]
            self._by_place[found.stop // _AHEAD] = found
        elif found.seen >> -ahead & 1:
            found.last, found.length = number, max(0, found.length - _BACK)
            return 1.0  # it was there before: this is hardly a pass
        else:
            found.seen |= 1 << -ahead
        found.last, found.length = number, min(found.length + 1, 4 * LONG_PASS)
        return PASSED if is_long else 1.0


class Heat:
    """Of one disk. Offsets and lengths in bytes."""

    __slots__ = ("_begins", "_notes", "_passes", "_weight", "_weights")

    def __init__(self, begins: Callable[[], object] = lambda: None) -> None:
        """`begins` is called when there is something to add up, once until that is done."""
        self._begins = begins
        self._notes = deque[int]((), NOTES)
        """Bytes that were used, one in each extent."""
        self._weights: dict[int, float] = {}
        self._passes = _Passes()
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
        weights, share = self._weights, self._passes.share
        for number in [at >> _SHIFT for at in self._notes]:
            if counts := share(number):
                weights[number] = weights.get(number, 0.0) + counts * self._weight
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
