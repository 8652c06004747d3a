"""Where a base has holes: asked for in long steps, and remembered.

Only blocks that are not local are asked about, and their bytes in the base stay the same while it is open, also where
it is written to: what is written there is local before (`writethrough`). So an answer stays true.

To ask a server takes a round trip or more, for each extent. Where asking has taken longer than reading the holes that
it found would have, the next `STRIDE` bytes count as data, unasked.

Asking may fail: what nobody tells is data, and is read.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Awaitable, Callable

import trio

from fvdfs.format.header import round_up

log = logging.getLogger(__name__)

Ask = Callable[[int, int], Awaitable[tuple[int, bool]]]
"""`store.base.Store.extent`."""
MAX_KNOWN = 1 << 12  # extents that are remembered
STRIDE = 16 << 20  # bytes that count as data where asking does not pay; a longer hole counts as one of this length
UNTOLD = 1 << 20  # bytes that count as data where asking failed
WORTH = 1 / 50e6  # seconds that a byte counts for at the least, since others share the server and the way to it
CREDIT = 0.03  # seconds that may be spent in vain
FADING = 0.98  # what an earlier question counts for, beside the next one


class Extents:
    """The extents of a base, or of another source. Offsets and sizes in bytes."""

    def __init__(self, name: str, ask: Ask) -> None:
        """`name`: for messages."""
        self._name = name
        self._ask = ask
        self._starts: list[int] = []
        self._known: dict[int, tuple[int, bool]] = {}
        self._has_failed = False
        self._spent = 0.0
        """Seconds of the last questions, and `_saved` those that reading the holes would have taken."""
        self._saved = 0.0
        self._seconds_per_byte = 0.0

    def was_read(self, size: int, seconds: float) -> None:
        """A read took so long."""
        found, before = seconds / size, self._seconds_per_byte
        self._seconds_per_byte = before * FADING + found * (1 - FADING) if before else found

    def known(self, start: int) -> tuple[int, bool] | None:
        """`at`, where that is remembered."""
        number = bisect.bisect_right(self._starts, start) - 1
        if number >= 0 and (found := self._known[self._starts[number]])[0] > start:
            return found
        return None

    async def at(self, start: int, stop: int) -> tuple[int, bool]:
        """Where the extent that has byte `start`, or what counts as one, ends, and whether it is a hole.

        `stop`: the end of all.
        """
        found = self.known(start)
        if found is None:
            found = await self._asked(start, stop)
        return min(found[0], stop), found[1]

    async def blocks(self, start: int, limit: int, block_size: int, stop: int) -> tuple[int, bool]:
        """Blocks from `start` on that are alike: where they end, and whether they are wholly in a hole.

        Blocks with data end at `limit` at the latest. `stop` as for `at`; at most there the last block is cut.
        """
        end, hole = await self.at(start, stop)
        if hole and (whole := _whole(end, block_size, stop)) > start:
            return whole, True
        while (at := min(round_up(end, block_size), stop)) < limit:
            end, hole = await self.at(at, stop)
            if hole and _whole(end, block_size, stop) > at:
                return at, False
        return limit, False

    async def _asked(self, start: int, stop: int) -> tuple[int, bool]:
        if self._spent > self._saved + CREDIT:
            self._spent = self._saved  # one more question after that
            return self._learn(start, start + STRIDE, hole=False)
        began = trio.current_time()
        try:
            end, hole = await self._ask(start, stop)
        except OSError as error:
            if not self._has_failed:
                log.warning("%s: asking for holes: %s; they are read", self._name, error)
            self._has_failed = True
            return start + UNTOLD, False
        saved = min(end - start, STRIDE) * max(self._seconds_per_byte, WORTH) if hole else 0.0
        self._spent = self._spent * FADING + trio.current_time() - began
        self._saved = self._saved * FADING + saved
        return self._learn(start, end, hole=hole)

    def _learn(self, start: int, end: int, *, hole: bool) -> tuple[int, bool]:
        if len(self._starts) >= MAX_KNOWN:
            self._starts.clear()
            self._known.clear()
        if start not in self._known:
            bisect.insort(self._starts, start)
        self._known[start] = end, hole
        return end, hole


def _whole(end: int, block_size: int, stop: int) -> int:
    """Where the last whole block before `end` ends."""
    return end if end >= stop else end // block_size * block_size
