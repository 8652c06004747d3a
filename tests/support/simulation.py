"""A network link, a server and a local disk in virtual time, with images that are prefetched over them.

Everything of fvdfs in it is real: images, prefetchers and their scheduler. Only the stores are not: one
holds what an image's metadata needs, and says of every byte more how long it takes.

    guests ──▶ Image ◀── Prefetcher ◀── Scheduler
                │ ╲                        │ pressure
        base    │  ╲ copies                ▼
    SimulatedLink   SimulatedDisk ─────────┘
         ▲                ▲
         └──── rivals ────┘

A link (and a disk) serves what is asked of it at `rate` bytes a second, in the order of arrival or all
at once, each getting the same share of the rate. The answer takes `latency` seconds more, in which it
serves others. A cap on the rate is a bucket of tokens, as nbdkit's rate filter has: it holds what
`burst` seconds bring, and a request waits until its size is paid.

The pressure of a disk, as /proc/pressure/io would tell it, is the time in which somebody waits for it.

Time is trio's MockClock: it jumps to the next moment in which something happens, so that seconds take as
long as their events do. The order in which trio runs tasks that are ready together is drawn from a
fixed seed: a simulation gives the same numbers each time.
"""

from __future__ import annotations

import errno
import functools
import math
import mmap
import os
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import trio
import trio._core._run
from trio.testing import MockClock

from fvdfs.cow import fetching
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import with_fields
from fvdfs.image.image import Image
from fvdfs.prefetch.manners import Manners, State
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import DEFAULT_JOBS, Link, Scheduler
from fvdfs.store.base import Buffer, Stepwise
from support.builder import IMAGE, KIB, create, load

T = TypeVar("T")

MIB = 1024 * KIB
SEED = 1
HOPS = 2  # programs that a request goes through on its way, and again on the way back
BASE = "base.raw"
DATA = b"\xda" * (8 * MIB)


def simulate(main: Callable[[], Awaitable[T]], seed: int = SEED) -> T:
    """Run it in virtual time."""
    # There is no public way to have trio's order of tasks repeat itself.
    core: Any = trio._core._run
    before = core._ALLOW_DETERMINISTIC_SCHEDULING
    core._ALLOW_DETERMINISTIC_SCHEDULING = True
    core._r.seed(seed)
    try:
        return trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING = before


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """Bytes that were served evenly between two times, asked for at a third."""

    asked: float
    begin: float
    end: float
    size: int


@dataclass(slots=True)
class Log:
    """What one user of a link or a disk got."""

    entries: list[Served] = field(default_factory=list)

    def size(self, begin: float, end: float) -> float:
        """Bytes between two times."""
        total = 0.0
        for entry in self.entries:
            shared = min(end, entry.end) - max(begin, entry.begin)
            if entry.end <= entry.begin:
                total += entry.size if begin <= entry.end < end else 0
            elif shared > 0:
                total += entry.size * shared / (entry.end - entry.begin)
        return total

    def rate(self, begin: float, end: float) -> float:
        """Bytes a second between two times."""
        return self.size(begin, end) / (end - begin)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


# --- what is shared -------------------------------------------------------------------------------


class SimulatedLink:
    """Serves bytes; `transfer` returns when they are there."""

    def __init__(
        self,
        rate: float,
        latency: float = 0.0,
        *,
        fair: bool = False,
        cap: float = 0.0,
        burst: float = 2.0,
        overhead: float = 0.0,
        late: float = 0.0,
        seed: int = SEED,
    ) -> None:
        """`fair`: serve all at once, else in order. `cap`: bytes a second; 0: none. `overhead`: seconds a request.

        `late`: on the way there and back each program has to wait for a processor, half of the time, up to so long.
        """
        self.rate = rate
        self.latency = latency
        self.logs: dict[str, Log] = {}
        self.under_way = 0
        self._fair = fair
        self._cap = cap
        self._burst = burst
        self._overhead = overhead
        self._late = late
        self._rng = random.Random(seed)
        self._tokens = cap * burst
        self._tokens_at = -math.inf
        self._free_at = -math.inf
        self._busy = 0.0
        self._busy_since = 0.0
        self._shared_work = 0.0  # bytes that each transfer has got which was there all the time
        self._shared_at = 0.0
        self._sharing = 0
        self._changed = trio.Event()

    def become(self, *, rate: float | None = None, cap: float | None = None) -> None:
        """From now on it has another rate, or cap."""
        self._share_work(0)
        if rate is not None:
            self.rate = rate
        if cap is not None:
            self._pay(trio.current_time(), 0)
            self._cap, self._tokens = cap, min(self._tokens, cap * self._burst)

    async def _hop(self) -> None:
        """Programs on the way wait for a processor."""
        for _ in range(HOPS):
            await self._wait_for_processor()

    async def _wait_for_processor(self) -> None:
        if self._late and self._rng.random() < 0.5:
            await trio.sleep(self._rng.uniform(0, self._late))

    def log(self, who: str) -> Log:
        """What this user got."""
        return self.logs.setdefault(who, Log())

    async def transfer(self, size: int, who: str) -> None:
        """Wait until so many bytes are served."""
        await self._hop()
        asked = trio.current_time()
        if not self.under_way:
            self._busy_since = asked
        self.under_way += 1
        try:
            begin = await self._serve(asked, size)
            self.log(who).entries.append(Served(asked, begin, trio.current_time(), size))
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._busy += trio.current_time() - self._busy_since
        await trio.sleep(self.latency)
        await self._hop()

    def pressure(self) -> float:
        """Seconds in which somebody has waited, in all."""
        return self._busy + (trio.current_time() - self._busy_since if self.under_way else 0.0)

    async def _serve(self, now: float, size: int) -> float:
        paid = self._pay(now, size)
        if not self._fair:
            begin = max(now, paid, self._free_at)
            self._free_at = begin + self._overhead + size / self.rate
            await trio.sleep_until(self._free_at)
            return begin
        await trio.sleep_until(paid)
        begin = trio.current_time()
        await self._share(size + self._overhead * self.rate)
        return begin

    def _pay(self, now: float, size: int) -> float:
        """When the cap lets it go."""
        if not self._cap:
            return now
        earned = self._cap * (now - self._tokens_at) if self._tokens_at > -math.inf else 0.0
        self._tokens = min(self._cap * self._burst, self._tokens + earned) - size
        self._tokens_at = now
        return now + max(0.0, -self._tokens) / self._cap

    async def _share(self, size: float) -> None:
        self._share_work(0)
        goal = self._shared_work + size
        self._share_work(1)
        try:
            while (left := goal - self._shared_work) > 1e-6 * size:
                changed = self._changed
                with trio.move_on_after(left * self._sharing / self.rate):
                    await changed.wait()
                self._advance()
        finally:
            self._share_work(-1)

    def _share_work(self, more: int) -> None:
        """From now on so many more take part."""
        self._advance()
        self._sharing += more
        if more:
            self._changed.set()
            self._changed = trio.Event()

    def _advance(self) -> None:
        now = trio.current_time()
        if self._sharing:
            self._shared_work += self.rate * (now - self._shared_at) / self._sharing
        self._shared_at = now


class NbdkitLink(SimulatedLink):
    """As nbdkit's rate filter: a request takes the tokens there are, and sleeps until the rest should be there.

    Then it tries again. Small requests overtake large ones, and who wakes up late lets tokens gather.
    """

    async def _serve(self, now: float, size: int) -> float:
        missing = float(size)
        while True:
            self._pay(trio.current_time(), 0)
            if self._tokens >= missing:
                self._tokens -= missing
                return now
            missing -= self._tokens
            self._tokens = 0.0
            await trio.sleep(missing / self._cap)
            await self._wait_for_processor()


class SimulatedDisk(SimulatedLink):
    """A local disk: a link without a way to it, whose users are seen by the kernel's pressure.

    Others are those whose name is `rival`.
    """

    def __init__(self, rate: float, *, fair: bool = False) -> None:
        super().__init__(rate, fair=fair)
        self._others = 0.0  # seconds in which somebody has waited while others used it
        self._looked = 0.0
        self._served = 0

    def pressure(self) -> float:
        """As `fvdfs.prefetch.pressure` tells it."""
        waited, served = super().pressure(), len(self.log("rival").entries)
        if served > self._served:
            self._others += waited - self._looked
        self._looked, self._served = waited, served
        return self._others


class SimulatedFile(Stepwise):
    """A store of a size, of which only the first bytes are really there; others read as some data, or as zeros."""

    def __init__(
        self, data: Buffer, size: int, name: str, server: SimulatedLink | None, who: str, *, writable: bool
    ) -> None:
        """`server`: what reads and writes of the other bytes take their time from."""
        self.data = bytearray(data)
        self.name = name
        self.writable = writable
        self.fixed_size = False
        self.server = f"simulated {id(server)}"
        self.is_remote = server is not None
        self.fails: Callable[[int, int], bool] = lambda start, stop: False
        """Whether a request for these bytes fails."""
        self.holes: Callable[[int], bool] = lambda start: False
        """Whether what is read from there on is zeros, which a server has at once."""
        self.attempts: list[tuple[float, int, int]] = []
        """Time, offset and size of the requests that failed."""
        self.max_under_way = 0
        self._size = size
        self._link = server
        self._who = who
        self._under_way = 0

    async def _take(self, offset: int, size: int) -> None:
        if self.fails(offset, offset + size):
            self.attempts.append((trio.current_time(), offset, size))
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)
        if self._link is None or offset < len(self.data):
            await trio.lowlevel.checkpoint()
            return
        self._under_way += 1
        self.max_under_way = max(self.max_under_way, self._under_way)
        try:
            hole = not self.writable and self.holes(offset)
            await self._link.transfer(4096 if hole else size, "guest" if size <= 4096 else self._who)
        finally:
            self._under_way -= 1

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        return False

    async def pread(self, buffer: memoryview, offset: int) -> int:
        if self._link is not None and not self.writable:
            await self._take(offset, len(buffer))
            content = b"\0" if self.holes(offset) else DATA[:1]
            if buffer[:1] != content:  # else it is full of that already
                buffer[:] = content * len(buffer)
        else:
            await trio.lowlevel.checkpoint()
        data = self.data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return max(0, min(len(buffer), self._size - offset))

    async def pwrite(self, data: Buffer, offset: int) -> None:
        await trio.lowlevel.checkpoint()  # into memory
        kept = memoryview(data)[: max(0, len(self.data) - offset)]
        self.data[offset : offset + len(kept)] = kept
        self._size = max(self._size, offset + len(data))

    async def write_out(self, offset: int, length: int) -> None:
        await self._take(offset, length)

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        await self.pwrite(bytes(length), offset)

    async def reserve(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        await trio.lowlevel.checkpoint()
        return stop, False

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def size(self) -> int:
        return self._size

    async def resize(self, size: int) -> None:
        self._size = size

    def usage(self) -> int:
        return self._size

    async def aclose(self) -> None:
        pass


@functools.cache
def _data_file() -> int:
    file = os.memfd_create("data")
    os.write(file, DATA)
    return file


def _new_buffer(size: int) -> memoryview:
    """As `fetching._new_buffer`, but large ones hold DATA from the start: to fill them took half of a simulation."""
    if not fetching.ALIGNED_SIZE <= size <= len(DATA):
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(_data_file(), size, mmap.MAP_PRIVATE))


# --- who takes part -------------------------------------------------------------------------------


@dataclass(slots=True)
class Guest:
    """Reads of a guest: when each was sent, and how long it took."""

    reads: list[tuple[float, float]] = field(default_factory=list)
    errors: int = 0

    def latencies(self, begin: float, end: float) -> list[float]:
        """Of the reads that were sent between two times."""
        return [took for at, took in self.reads if begin <= at < end]


class Machine:
    """A mount: its scheduler, and the images in it; `machine` makes one."""

    def __init__(
        self,
        nursery: trio.Nursery,
        link: SimulatedLink,
        disk: SimulatedDisk | None,
        scheduler: Scheduler,
    ) -> None:
        self.link = link
        self.disk = disk
        self.scheduler = scheduler
        self._nursery = nursery

    def start(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run it beside, until the machine ends."""
        self._nursery.start_soon(functools.partial(work, *arguments))

    @property
    def watch(self) -> Link:
        """What the scheduler knows of the link."""
        return self.scheduler.link(f"simulated {id(self.link)}")

    async def open(self, size: int, *, block_size: int = 64 * KIB, who: str = "prefetch", **fields: int) -> Image:
        """An image of which nothing is local; `fields` of its header differ from the defaults.

        The original's rule is off but for an image whose `fields` ask for it.
        """
        fields = {"prefetch_throttle_time": 0, **fields}
        raw = _new_image(size, block_size, tuple(sorted(fields.items())))
        own = SimulatedFile(raw, len(raw), who, self.disk, who, writable=True)
        base = SimulatedFile(b"", size, f"base of {who}", self.link, who, writable=False)
        image = await load({IMAGE: own, BASE: base}, spawn=self._nursery.start_soon)
        image.name = who
        await image.begin_writing(accept_unclean=False)
        return image

    def prefetch(self, image: Image, *, seed: int = SEED, delay: float = 0, follows: bool = False) -> Prefetcher:
        """Start to prefetch it."""
        prefetcher = Prefetcher(image, self.scheduler, follows=follows, rng=random.Random(seed))
        self._nursery.start_soon(functools.partial(prefetcher.run, delay=delay))
        return prefetcher

    async def guest(
        self, image: Image, guest: Guest, region: tuple[int, int], *, depth: int = 1, think: float = 0
    ) -> None:
        """Read 4 KiB at random places of the region, `depth` at a time, each `think` seconds after the last."""
        rng = random.Random(SEED)

        async def reader() -> None:
            while True:
                at = rng.randrange(region[0] // 4096, region[1] // 4096) * 4096
                begin = trio.current_time()
                try:
                    await image.read(at, 4096)
                except OSError:
                    guest.errors += 1
                guest.reads.append((begin, trio.current_time() - begin))
                await trio.sleep(max(think, 1e-5))

        async with trio.open_nursery() as nursery:
            for _ in range(depth):
                nursery.start_soon(reader)


@asynccontextmanager
async def machine(
    link: SimulatedLink,
    *,
    disk: SimulatedDisk | None = None,
    jobs: int = DEFAULT_JOBS,
    max_rate: float = 0,
    psi: bool = True,
) -> AsyncIterator[Machine]:
    """A mount while the block runs, inside `simulate`; `psi`: whether the kernel tells the disk's pressure."""
    with mock.patch.object(fetching, "_new_buffer", _new_buffer):
        async with trio.open_nursery() as nursery:
            pressure = disk.pressure if disk is not None and psi else lambda: None
            yield Machine(nursery, link, disk, Scheduler(jobs=jobs, max_rate=max_rate, pressure=pressure))
            nursery.cancel_scope.cancel()


async def rival(
    link: SimulatedLink,
    begin: float,
    end: float,
    depth: int = 1,
    *,
    size: int = MIB,
    think: float = 0,
    on: float = math.inf,
    off: float = 0,
    who: str = "rival",
) -> None:
    """Another client: reads of `size`, `depth` at a time, between two times; with pauses where `on` is finite."""

    async def client() -> None:
        await trio.sleep_until(begin)
        while (now := trio.current_time()) < end:
            if (now - begin) % (on + off) >= on if math.isfinite(on) else False:
                await trio.sleep_until(begin + ((now - begin) // (on + off) + 1) * (on + off))
                continue
            await link.transfer(size, who)
            if think:
                await trio.sleep(think)

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(client)


async def starve(longest: float, seed: int = SEED) -> None:
    """Have this program lose its processor again and again, for up to so many seconds, as under endless loops."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    rng = random.Random(seed)
    while True:
        await trio.sleep(rng.expovariate(1 / (2 * longest)))
        clock.jump(rng.uniform(0, longest))


@functools.cache
def _new_image(size: int, block_size: int, fields: tuple[tuple[str, int], ...]) -> bytes:
    """The metadata of a new image whose base is as large as it is."""
    options = CreateOptions(base_img=BASE, base_img_fmt="raw", block_size=block_size, journal_size=64 * KIB)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / IMAGE
        header = create(path, size, options, base_length=size)
        raw = path.read_bytes()
    new = with_fields(header, **dict(fields)).encode()
    return new + raw[len(new) :]


class States:
    """The states that a controller passes through."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, State]] = []

    async def watch(self, manners: Callable[[], Manners], interval: float = 0.01) -> None:
        """Take down its state, for ever."""
        while True:
            state = manners().state
            if not self.changes or self.changes[-1][1] is not state:
                self.changes.append((trio.current_time(), state))
            await trio.sleep(interval)

    def spans(self, end: float) -> Iterator[tuple[float, float, State]]:
        """Begin, end and state."""
        ends = [at for at, _ in self.changes[1:]] + [end]
        for (begin, state), stop in zip(self.changes, ends, strict=True):
            yield begin, stop, state

    def share(self, state: State, begin: float, end: float) -> float:
        """Of the time between two times."""
        spans = ((max(start, begin), min(stop, end)) for start, stop, was in self.spans(end) if was is state)
        return sum(max(0.0, stop - start) for start, stop in spans) / (end - begin)
