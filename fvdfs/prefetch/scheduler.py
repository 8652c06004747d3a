"""Whose turn it is to prefetch: the images of one mount share what they may use, fairly.

Each image is a flow. A request gets its turn when the link to its base, the local disk, the caps and the number
of jobs permit (`linkwatch.py` and `diskwatch.py` decide about the first two). Among those that may go, the flow
that was served least goes first (start-time fair queueing): ten images on one server each get a tenth, and
fifty together never have more requests under way than `jobs`.

Disks that follow their machine from another host do not stand back for others (`window.py`). They share their link
fairly, too, and have caps, and jobs of their own.

What a profile asks for the guest is about to need: it goes before all others, and waits only for jobs and
caps.

Nothing runs here, and no pressure is sampled, while nobody prefetches.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from fvdfs.prefetch.diskwatch import DiskWatch
from fvdfs.prefetch.linkwatch import LinkWatch
from fvdfs.prefetch.manners import State
from fvdfs.prefetch.pacing import Pacer, Stopwatch
from fvdfs.prefetch.window import Window

DEFAULT_JOBS = 4  # requests of one mount under way
FOLLOWING_JOBS = 4  # times as many for disks that follow: with less, small pieces of data would not fill a link
SLACK = 8 << 20  # bytes that a flow may have fallen behind the others and still catch up
SAMPLE_INTERVAL = 0.1  # seconds between samples of the disk's pressure
LAG_INTERVAL = 0.02  # seconds between looks at how long this program waits for a processor
LAG_WEIGHT = 0.02  # of one look in the average
CLOCK_TICK = 0.001  # seconds by which every wait may be longer: the resolution of timers


def no_pressure() -> None:
    """For where the kernel does not count how long others wait for a disk."""


class Link:
    """The link to one server, or disk, that bases are on."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed` is called when a guest's read has ended."""
        self.watch = LinkWatch(trio.current_time())
        self.window = Window()
        self.reading = Stopwatch()
        """Of all images together: while they share a link, what one gets does not tell how fast it is."""
        self.flows = 0
        self.turns = 0
        self._changed = changed

    # Seen by the fetchers of the images (`fetching.Observer`).

    def foreground_started(self) -> None:
        self.watch.guest_started(trio.current_time())

    def foreground_finished(self, size: int) -> None:
        self.watch.guest_finished(trio.current_time(), size)
        if self.flows:
            self._changed()


class Flow:
    """What one image takes part with."""

    def __init__(self, link: Link, pacer: Pacer, follows: bool) -> None:
        """`pacer`: the image's own cap. `follows`: its disk is on the way to this host."""
        self.link = link
        self.follows = follows
        self.pacer = pacer
        self.served = 0.0


class _Waiter:
    """A request that waits for its turn."""

    __slots__ = ("changed", "flow", "granted", "urgent")

    def __init__(self, flow: Flow, urgent: bool) -> None:
        self.flow = flow
        self.urgent = urgent
        self.granted = False
        self.changed = trio.Event()


class Scheduler:
    """Gives turns to the images of one mount."""

    def __init__(
        self,
        *,
        jobs: int = DEFAULT_JOBS,
        max_rate: float = 0,
        pressure: Callable[[], float | None] = no_pressure,
    ) -> None:
        """`max_rate`: bytes a second of all images together, 0: no cap. `pressure`: see `pressure.py`."""
        self._jobs = jobs
        self._running = {False: 0, True: 0}  # True: of disks that follow
        self._sampling: trio.Event | None = None
        self._lag = 0.0
        self._pacer = Pacer(max_rate)
        self._read_pressure = pressure
        self._links: dict[str, Link] = {}
        self._flows: set[Flow] = set()
        self._waiting: list[_Waiter] = []
        self._served = 0.0  # bytes that the flow with the last turn had been served
        self.disk = DiskWatch()
        self.storing = Stopwatch()

    def link(self, name: str) -> Link:
        """The link of this name."""
        if name not in self._links:
            self._links[name] = Link(self._dispatch)
        return self._links[name]

    @contextmanager
    def flow(self, link: Link, pacer: Pacer, *, follows: bool = False) -> Iterator[Flow]:
        """Take part in the sharing while the block runs, which also has to run `watch`."""
        flow = Flow(link, pacer, follows)
        flow.served = min((other.served for other in self._flows), default=0.0)
        if not link.flows:
            link.watch.look(trio.current_time())  # others may have come meanwhile
        if not self._flows:
            self.disk = DiskWatch()
        self._flows.add(flow)
        link.flows += 1
        try:
            yield flow
        finally:
            self._flows.remove(flow)
            link.flows -= 1

    async def watch(self) -> None:
        """Sample the disk's pressure and our own delays, if nobody else does; until cancelled."""
        while self._sampling is not None:
            await self._sampling.wait()
        self._sampling = ended = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_lag)
                while (stalled := self._read_pressure()) is not None:
                    before = self.disk.manners.state
                    self.disk.pressure(trio.current_time(), stalled)
                    if self.disk.manners.state is not before:
                        self._dispatch()
                    await trio.sleep(SAMPLE_INTERVAL)
        finally:
            self._sampling = None
            ended.set()

    async def _watch_lag(self) -> None:
        """Measure how late this program runs, for so late it also sees the answers that it times."""
        while True:
            due = trio.current_time() + LAG_INTERVAL
            await trio.sleep_until(due)
            late = max(0.0, trio.current_time() - due - CLOCK_TICK)
            self._lag += (late - self._lag) * LAG_WEIGHT
            for link in self._links.values():
                link.watch.lag = link.window.lag = self._lag

    @asynccontextmanager
    async def turn(self, flow: Flow, *, urgent: bool = False) -> AsyncIterator[int]:
        """Wait for a turn, which lasts while the block runs; yields the largest size for its request, in bytes.

        `urgent`: do not stand back for anybody. The block calls `spend` with what it takes.
        """
        await self._wait(flow, urgent)
        try:
            yield flow.link.window.size if flow.follows else flow.link.watch.size_limit(trio.current_time())
        finally:
            self._end_turn(flow)

    async def _wait(self, flow: Flow, urgent: bool) -> None:
        waiter = _Waiter(flow, urgent)
        # A flow has no claim to what it did not ask for.
        flow.served = max(flow.served, self._served - SLACK)
        self._waiting.append(waiter)
        try:
            while True:
                self._dispatch()
                if waiter.granted:
                    return
                with trio.move_on_after(self._delay(waiter)):
                    await waiter.changed.wait()
        except BaseException:
            if waiter.granted:
                self._end_turn(flow)
            else:
                self._waiting.remove(waiter)
            raise

    def _end_turn(self, flow: Flow) -> None:
        self._running[flow.follows] -= 1
        flow.link.turns -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        """Give turns to those that may have one now."""
        while self._waiting:
            ready = [waiter for waiter in self._waiting if self._delay(waiter) <= 0]
            if not ready:
                return
            waiter = min(ready, key=lambda waiter: (not waiter.urgent, waiter.flow.served))
            self._waiting.remove(waiter)
            self._running[waiter.flow.follows] += 1
            waiter.granted = True
            waiter.flow.link.turns += 1
            waiter.changed.set()
            self._served = max(self._served, waiter.flow.served)
            # A turn counts at once, so that flows that were served alike take turns.
            waiter.flow.served += 1

    def _delay(self, waiter: _Waiter) -> float:
        """Seconds until the request may go; infinite: not before something ends."""
        follows = waiter.flow.follows
        if self._running[follows] >= self._jobs * (FOLLOWING_JOBS if follows else 1):
            return math.inf
        now = trio.current_time()
        delay = max(self._pacer.delay(now), waiter.flow.pacer.delay(now))
        if waiter.urgent:
            return delay
        if follows:
            return math.inf if waiter.flow.link.window.is_full(waiter.flow.link.turns) else delay
        return max(delay, waiter.flow.link.watch.delay(now, waiter.flow.link.turns), self.disk.delay(now))

    def spend(self, flow: Flow, size: int) -> None:
        """The turn reads so many bytes."""
        now = trio.current_time()
        self.disk.took(now)
        flow.served += size
        flow.pacer.spent(now, size)
        self._pacer.spent(now, size)

    def sent(self, flow: Flow) -> None:
        """The turn's request is under way, and may be a small one."""
        if flow.follows:
            self._dispatch()

    def yielding(self, flow: Flow) -> str:
        """Why prefetching stands back now; empty where it does not."""
        if flow.follows:
            return ""
        if flow.link.watch.manners.state is State.YIELD:
            return "others use the base's server"
        if self.disk.manners.state is State.YIELD:
            return "others use the disk"
        return ""
