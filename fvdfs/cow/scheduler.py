"""Whose turn it is to prefetch: the images of one mount share what they may use, fairly.

Each image is a flow. A request is admitted when the link to its base, the local disk, the caps and the
number of jobs permit (`contention.py` decides about the first two). Of those that wait for one link, the
flow that has had the least goes first (start-time fair queueing), so that ten images on one server each
get a tenth, and fifty of them never have more requests under way than one mount may have (`jobs`).

What a profile asks for is what the guest is about to need: it waits for jobs and caps alone.

Nothing runs here while nobody prefetches; the disk's pressure is sampled only while somebody does.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from fvdfs.cow.contention import DiskWatch, LinkWatch, Pacer, State

DEFAULT_JOBS = 4
SAMPLE_INTERVAL = 0.1  # seconds between samples of the disk's pressure
PRESSURE_FILE = "/proc/pressure/io"


def io_pressure() -> float | None:
    """Seconds in which some task has waited for a disk, since the system started; None where nobody counts."""
    try:
        with open(PRESSURE_FILE, encoding="ascii") as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return None


class Link:
    """The way to one server (or disk) that bases are on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.watch = LinkWatch(trio.current_time())
        self.waiting: list[Flow] = []
        self.flows = 0

    # Seen by the fetchers of the images (`fetching.Observer`).

    def foreground_started(self) -> None:
        self.watch.guest_started(trio.current_time())

    def foreground_finished(self, size: int) -> None:
        self.watch.guest_finished(trio.current_time(), size)
        for flow in self.waiting:
            flow.changed.set()


class Flow:
    """One image's part."""

    def __init__(self, link: Link, pacer: Pacer) -> None:
        """`pacer`: the image's own cap."""
        self.link = link
        self.pacer = pacer
        self.served = 0.0
        self.changed = trio.Event()
        self.why = ""
        """What the next request waits for; empty: nothing."""


class Scheduler:
    """One a mount."""

    def __init__(
        self,
        *,
        jobs: int = DEFAULT_JOBS,
        max_rate: float = 0,
        pressure: Callable[[], float | None] = io_pressure,
    ) -> None:
        """`max_rate`: bytes a second of all images together; 0: no cap."""
        self._jobs = jobs
        self._running = 0
        self._sampling: trio.Event | None = None
        self._pacer = Pacer(max_rate)
        self._read_pressure = pressure
        self._links: dict[str, Link] = {}
        self._flows: set[Flow] = set()
        self.disk = DiskWatch()

    def link(self, name: str) -> Link:
        """The link of this name."""
        if name not in self._links:
            self._links[name] = Link(name)
        return self._links[name]

    @contextmanager
    def flow(self, link: Link, pacer: Pacer) -> Iterator[Flow]:
        """Take part in the sharing while the block runs, which also has to run `watch_disk`."""
        flow = Flow(link, pacer)
        flow.served = min((other.served for other in self._flows), default=0.0)
        if not link.flows:
            link.watch.manners.suspect(trio.current_time())  # who knows what has happened there meanwhile
        if not self._flows:
            self.disk = DiskWatch()
        self._flows.add(flow)
        link.flows += 1
        try:
            yield flow
        finally:
            self._flows.remove(flow)
            link.flows -= 1
            self._wake()

    async def watch_disk(self) -> None:
        """Sample the disk's pressure, if nobody else does; until cancelled, or there is nothing to sample."""
        while self._sampling is not None:
            await self._sampling.wait()
        self._sampling = ended = trio.Event()
        try:
            while (stalled := self._read_pressure()) is not None:
                before = self.disk.manners.state
                self.disk.pressure(trio.current_time(), stalled)
                if self.disk.manners.state is not before:
                    self._wake()
                await trio.sleep(SAMPLE_INTERVAL)
        finally:
            self._sampling = None
            ended.set()

    @asynccontextmanager
    async def turn(self, flow: Flow, *, urgent: bool = False) -> AsyncIterator[int]:
        """Wait for a turn; the size that a request should not exceed. The turn lasts while the block runs.

        `urgent`: do not stand back for anybody. The block calls `spend` with what it takes.
        """
        if not urgent:
            await self._wait_in_line(flow)
        while (delay := self._delay(flow, urgent=urgent)) > 0:
            await self._wait(flow, delay)
        self._running += 1
        try:
            yield flow.link.watch.size_limit(trio.current_time())
        finally:
            self._running -= 1
            self._wake()

    def spend(self, flow: Flow, size: int) -> None:
        """The turn takes so many bytes."""
        now = trio.current_time()
        flow.served += size
        flow.pacer.spent(now, size)
        self._pacer.spent(now, size)

    async def _wait_in_line(self, flow: Flow) -> None:
        waiting = flow.link.waiting
        waiting.append(flow)
        try:
            while True:
                delay = self._delay(flow, urgent=False)
                if delay <= 0 and flow is min(waiting, key=lambda other: other.served):
                    return
                await self._wait(flow, delay or math.inf)
        finally:
            waiting.remove(flow)
            for other in waiting:
                other.changed.set()

    async def _wait(self, flow: Flow, delay: float) -> None:
        if flow.changed.is_set():
            flow.changed = trio.Event()
        with trio.move_on_after(delay):
            await flow.changed.wait()

    def _delay(self, flow: Flow, *, urgent: bool) -> float:
        now = trio.current_time()
        delays = {
            "prefetch_max": self._pacer.delay(now),
            "the image's own cap": flow.pacer.delay(now),
            "prefetch_jobs": math.inf if self._running >= self._jobs else 0.0,
        }
        if not urgent:
            delays["others use the base's server"] = flow.link.watch.delay(now)
            delays["others use the disk"] = self.disk.delay(now)
        why = max(delays, key=lambda reason: delays[reason])
        flow.why = why if delays[why] > 0 else ""
        return delays[why]

    def _wake(self) -> None:
        for flow in self._flows:
            flow.changed.set()

    def yielding(self, flow: Flow) -> str:
        """Why prefetching stands back now; empty where it does not."""
        if flow.link.watch.manners.state is State.YIELD:
            return "others use the base's server"
        if self.disk.manners.state is State.YIELD:
            return "others use the disk"
        return ""
