"""Exclusive locks on ranges of blocks, and a gate that keeps all writers out.

Whoever fills blocks that are not local yet (a write that touches such blocks, a copy from the base)
holds their range, so that two of them never complete one block at the same time, and a copy never
overwrites what a guest wrote meanwhile. First come, first served: a request waits for every earlier
one that overlaps it, also for those that still wait, so nobody starves.

Writes and copies pass the gate; a shrink closes it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


class Claim:
    """A range that somebody holds, or waits for."""

    __slots__ = ("done", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.done: trio.Event | None = None  # made by the first who waits


class RangeLock:
    """Ranges are half-open: [start, stop)."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def __bool__(self) -> bool:
        """Whether any range is claimed."""
        return bool(self._claims)

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether someone holds, or waits for, a part of the range."""
        return any(c.start < stop and start < c.stop for c in self._claims)

    def free_until(self, start: int, stop: int) -> int:
        """How far, from `start` on, the range is free of claims."""
        return min((max(start, c.start) for c in self._claims if c.start < stop and start < c.stop), default=stop)

    @asynccontextmanager
    async def hold(self, start: int, stop: int) -> AsyncIterator[None]:
        """Hold the range while the block runs, after all earlier holders that overlap it."""
        before = [c for c in self._claims if c.start < stop and start < c.stop]
        mine = Claim(start, stop)
        self._claims.append(mine)
        try:
            for claim in before:
                if claim in self._claims:
                    if claim.done is None:
                        claim.done = trio.Event()
                    await claim.done.wait()
            yield
        finally:
            self.release(mine)

    def hold_nowait(self, start: int, stop: int) -> Claim | None:
        """Hold the range until `release`; None where somebody else has, or waits for, a part of it."""
        if self.overlaps(start, stop):
            return None
        mine = Claim(start, stop)
        self._claims.append(mine)
        return mine

    def release(self, claim: Claim) -> None:
        """Give up a range."""
        self._claims.remove(claim)
        if claim.done is not None:
            claim.done.set()


class Gate:
    """Many may be inside, until somebody closes it and waits for them to leave."""

    def __init__(self) -> None:
        self._inside = 0
        self.is_closed = False
        """Whether nobody may enter."""
        self._empty = trio.Event()
        self._open = trio.Event()

    def __bool__(self) -> bool:
        """Whether anybody is inside."""
        return self._inside > 0

    async def wait_until_open(self) -> None:
        """Wait for the end of whoever closed it."""
        await self._open.wait()

    def enter(self) -> None:
        """It is open; `leave` must follow."""
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if self.is_closed and not self._inside:
            self._empty.set()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Be inside meanwhile."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Keep all out while the block runs, which begins when the last one has left."""
        self.is_closed = True
        try:
            if self._inside:
                self._empty = trio.Event()
                await self._empty.wait()
            yield
        finally:
            self.is_closed = False
            self._open.set()
            self._open = trio.Event()
