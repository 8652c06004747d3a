"""What a power cut may leave of an image: every state of it, at every moment, is opened and judged.

A *simulation* runs a scenario, a sequence of steps (some writes and a flush, say), on an image whose files
are `fakes.CrashStore`s. After each step it goes through the moments of that step: the time of each change
and flush of a store. At a moment each sector that is not stable may hold what it held, or what any write
since has left in it, and each file may have any size that it has had since. These choices are
independent of each other, so that their product holds all that a cut can leave, torn writes and any
order of them included. Where the product is small (see `Effort`), all of it is tried; else states in which
one sector or all but one differ from the rest, and random ones. A state that was judged already is not
judged again; its content is only compared with what is legal at the new moment.

A state is judged by `Survivors`: the image is what `reference.check` allows, journal and all; the
reference's reader and the engine's, with their own replays, find the same content; no record of the journal is
bad; opening for writing and closing change nothing of the content, and leave a clean image. `fakes.Disk` says
what the content may be. Scenarios add *facts*: what must hold of the files from some time on (after closing
the header is clean, say).

Of some states the recovery is cut again, at each of its moments: the content must be the same.

`killing` has the process end at each call to a store in turn, which loses nothing, goes on with a new process,
and only then cuts the power.

FVDFS_CRASH_EFFORT scales how many states are tried.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import random
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import trio
from trio.testing import MockClock

from fvdfs.alloc.growth import GrowCommand
from fvdfs.cow.planner import Zeroes
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import Header
from fvdfs.image import table_moving
from fvdfs.image.image import Image
from fvdfs.image.policy import Policy
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import Scheduler
from fvdfs.store.base import Store
from support import reference
from support.builder import IMAGE, KIB, LAYOUTS, Layout, load, read_files
from support.fakes import (
    SECTOR,
    Clock,
    CrashStore,
    Disk,
    DiskWrite,
    FaultPlan,
    FaultStore,
    Killed,
    MemoryStore,
    Resize,
    close,
    extents_as_mounted,
    fsync_some_way,
    read_as_mounted,
    reserve_some_way,
    write_some_way,
    zero_some_way,
)

NEVER = 1 << 60
BASE = "base.raw"
EXHAUSTIVE = 4096  # states of a moment, all of which the largest effort tries
EFFORT = float(os.environ.get("FVDFS_CRASH_EFFORT", "1"))
PATIENCE = 3600.0  # seconds, by a clock that jumps, after which a step is stuck

Files = Mapping[str, bytes | bytearray]


# --- judging what is left -------------------------------------------------------------------------


async def open_for_writing(layout: Layout, stores: Mapping[str, Store]) -> Image:
    """The image over these stores, as after a crash."""
    image = await load(stores)
    await layout.begin_writing(image)
    return image


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Make this the file's content. ext4 would flush a file that was cut to nothing first, each time it is closed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


class Survivors:
    """Looks at files that are left, with both readers, and opens and closes them once more."""

    def __init__(self, layout: Layout, folder: Path, devices: Sequence[str] = ()) -> None:
        """`devices`: the names of files that stand for devices."""
        self.layout = layout
        self.folder = folder
        self.devices = devices
        self.written: dict[str, bytes] = {}
        self.has_leftovers = False
        """Whether somebody else has left something in the storage, as a former owner does on a device."""
        self._closed: dict[tuple[int, bool, bool], bytes] = {}
        """What closed files hold that were good: many states are the same ones once they were opened and closed."""

    def _put(self, files: Files) -> None:
        for name, content in files.items():
            if self.written.get(name) != content:
                self.written[name] = bytes(content)
                overwrite(self.folder / name, content)

    def check(self, *, cut_short: bool = False, closed: bool = True) -> None:
        """`cut_short`: a shrink may have ended in its middle."""
        problems = reference.check(self.folder / IMAGE, "fvdfs")
        cut_short |= self.layout.all_local  # whose bits mean nothing
        allowed = ["'s tail is", "table record out of range"] if cut_short else []
        if not closed:
            allowed.append("clean_shutdown is 0 without a journal")
        problems = [p for p in problems if not any(text in p for text in allowed)]
        assert not problems, problems
        if closed:
            header = reference.Header(self.folder / IMAGE)
            assert header.clean_shutdown, "closed, but not clean"
            assert not header.is_moving, "closed, but its table is still being moved"

    def content(self, files: Files, *, closed: bool, cut_short: bool, strict: bool = False) -> bytes:
        """As `judged`, by a run of trio's of its own."""
        return trio.run(functools.partial(self.judged, files, closed=closed, cut_short=cut_short, strict=strict))

    async def judged(self, files: Files, *, closed: bool, cut_short: bool, strict: bool = False) -> bytes:
        """What they hold. Unless they were `closed`, opens them for writing and closes them.

        `strict`: nothing of it may be strange even before, as after a power cut and no other fault.
        """
        self._put(files)
        found = b"".join(reference.read_disk(self.folder / IMAGE))
        if closed:
            self.check(cut_short=cut_short)
            if not (self.devices or self.has_leftovers):
                self.check_behind()
            return found
        if strict:
            self.check(cut_short=cut_short, closed=False)
        stores = {name: MemoryStore(content, name, fixed_size=name in self.devices) for name, content in files.items()}
        unclean = not reference.Header(self.folder / IMAGE).clean_shutdown
        image = await load(stores)
        assert not (strict and image.committer.journal_is_bad), "the journal holds bad records"
        await image.begin_writing(accept_unclean=self.layout.policy.accept_unclean)
        data = bytes(await image.read(0, image.size))
        await image.close()
        assert data == found, "the readers differ"
        behind = unclean or not (self.devices or self.has_leftovers)
        closed_files = {name: bytes(store.data) for name, store in stores.items()}
        again = self._closed_content(closed_files, cut_short=cut_short, behind=behind)
        assert again == found, "opening and closing changes the disk"
        return found

    def _closed_content(self, files: Files, *, cut_short: bool, behind: bool) -> bytes:
        """What these hold, which is looked at once; `behind`: and so is what is behind their chunks."""
        key = (hash(tuple(files.items())), cut_short, behind)
        if key not in self._closed:
            self._put(files)
            self.check(cut_short=cut_short)
            found = b"".join(reference.read_disk(self.folder / IMAGE))
            if behind:
                self.check_behind()
            self._closed[key] = found
        return self._closed[key]

    def check_behind(self) -> None:
        """What the next one to write would find in a new chunk."""
        with contextlib.closing(reference.Image(self.folder / IMAGE)) as image:
            if image.table:
                image.storage.seek(image.data_start + (max(image.owner, default=-1) + 1) * image.header.chunk_size)
                rest = image.storage.read()
                usable = len(rest) // image.header.chunk_size * image.header.chunk_size if self.devices else len(rest)
                assert not rest[:usable].strip(b"\0"), "a crash has left something behind the highest chunk"


@contextmanager
def quiet() -> Iterator[None]:
    """No messages of the package; it says much about what is left of an image."""
    logger = logging.getLogger("fvdfs")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- layouts --------------------------------------------------------------------------------------

_BLOCKS = {512: 512, 4096: 1024, 7680: 1536, 8192: 2048, 12 * KIB: 6 * KIB, 64 * KIB: 5 * KIB, 1024 * KIB: 12 * KIB}
_CHUNKS = {4096: 4096, 8192: 4096, 16 * KIB: 4096, 64 * KIB: 8192}
_SHRINK = 40


def tiny(layout: Layout) -> Layout:
    """The layout with a disk, blocks and chunks so small that a few writes touch all kinds of places."""

    def small(options: CreateOptions) -> CreateOptions:
        return replace(
            options,
            block_size=_BLOCKS.get(options.block_size, 0),
            chunk_size=_CHUNKS.get(options.chunk_size, 0),
            grow_unit=8192 if options.compact else 0,
            journal_size=4096 if options.journal_size else options.journal_size,
            detect_holes=1500 if options.detect_holes else 0,
            profile_room=4096 if options.base_img else 0,
        )

    return replace(
        layout,
        size=layout.size // _SHRINK // SECTOR * SECTOR,
        base_length=layout.base_length // _SHRINK & ~1 | layout.base_length & 1,
        options=small(layout.options),
        chain=tuple(small(options) for options in layout.chain),
        hole_size=4 * KIB,
    )


@dataclass(frozen=True)
class Subject:
    """An image to be simulated: a layout, perhaps with one of its files on a device."""

    layout: Layout
    device: str = ""
    """The name of the file that stands for a device."""

    @property
    def name(self) -> str:
        return f"{self.layout.name}-on-device" if self.device else self.layout.name

    def build(self, folder: Path) -> dict[str, bytes]:
        """Its files, which are made in this empty folder."""
        self.layout.build(folder)
        header = reference.Header(folder / IMAGE)
        if self.device:
            path = folder / self.device
            start = header.metadata_size if self.device == IMAGE else 0
            # What nobody has written is not zeros. The disk is, where the image without a table must be.
            size = self.layout.size if not header.chunks else 3 * header.chunk_size
            rest = bytearray(random.Random(self.name).randbytes(size + 5 * SECTOR))
            if not header.chunks:
                rest[header.base_img_size : size] = bytes(size - header.base_img_size)
            path.write_bytes(path.read_bytes()[:start] + rest)
        return read_files(folder)


def _subjects() -> Iterator[Subject]:
    for layout in map(tiny, LAYOUTS):
        yield Subject(layout)
    by_name = {layout.name: tiny(layout) for layout in LAYOUTS}
    for name in ("plain", "cow-7680", "cow-no-journal", "compact-4k", "compact-cow-512-4k"):
        yield Subject(by_name[name], IMAGE)
    for name in ("cow-data-file", "compact-data-file", "compact-cow-data-file"):
        yield Subject(by_name[name], "disk.data")
    writing_base = {"cow-7680": "writethrough", "compact-cow-data-file": "writethrough", "cow-512": "writeback"}
    for name, mode in writing_base.items():
        layout = by_name[name]
        options = replace(layout.options, update_base=mode)
        # Whole sectors: the last one of a base that ends inside it, and grows, is not written at once.
        length = layout.base_length // SECTOR * SECTOR
        yield Subject(replace(layout, name=f"{name}-{mode}", options=options, base_length=length))


SUBJECTS = tuple(_subjects())


# --- how much -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How many states are tried."""

    states: int
    """Of a moment."""
    second_cuts: int
    """Recoveries that are cut again, after a step."""
    kills: int
    """Each so many-th call to a store ends the process."""

    @classmethod
    def scaled(cls, factor: float) -> Effort:
        return cls(
            states=max(4, min(EXHAUSTIVE, round(8 * factor))),
            second_cuts=max(1, round(factor)),
            kills=max(1, round(8 / factor)),
        )


@dataclass
class Counts:
    """What was tried."""

    moments: int = 0
    exhausted: int = 0
    """Moments of which every state was tried."""
    states: int = 0
    """Different ones."""
    checks: int = 0
    """States at a moment."""
    second_cuts: int = 0
    second_states: int = 0
    kills: int = 0
    faults: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# --- the simulation -------------------------------------------------------------------------------

_SIZE = -1


def states(
    stores: Mapping[str, CrashStore], at: int, limit: int, rng: random.Random
) -> tuple[bool, Iterator[dict[str, bytes]]]:
    """What a cut at that time may leave in these files: whether it is all of it, and the states."""
    found = {name: store.choices(at) for name, store in stores.items()}
    keys: list[tuple[str, int]] = []
    options: list[Sequence[int] | Sequence[bytes]] = []
    for name, choices in found.items():
        if len(choices.sizes) > 1:
            keys.append((name, _SIZE))
            options.append(choices.sizes)
        for sector, contents in choices.sectors.items():
            keys.append((name, sector))
            options.append(contents)
    counts = [len(each) for each in options]
    whole = math.prod(counts) <= limit

    def make(chosen: Sequence[int]) -> dict[str, bytes]:
        sizes = {name: choices.sizes[0] for name, choices in found.items()}
        sectors: dict[str, list[tuple[int, bytes]]] = {name: [] for name in found}
        for (name, sector), values, number in zip(keys, options, chosen, strict=True):
            value = values[number]
            if isinstance(value, int):
                sizes[name] = value
            else:
                sectors[name].append((sector, value))
        return {name: choices.make(sizes[name], sectors[name]) for name, choices in found.items()}

    if whole:
        return True, map(make, itertools.product(*map(range, counts)))
    return False, map(make, itertools.islice(_some(counts, rng), limit))


def _some(counts: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Choices of one in each of so many: what differs in little from all the oldest, or the newest, and random ones."""
    oldest, newest = [0] * len(counts), [count - 1 for count in counts]
    yield oldest
    yield newest
    sizes = list(range(len(counts)))
    rng.shuffle(sizes)
    for at in sizes:
        one = oldest[:]
        one[at] = newest[at]
        yield one
        one = newest[:]
        one[at] = oldest[at]
        yield one
        yield [rng.randrange(count) for count in counts]
        cut = rng.randrange(len(counts))
        yield oldest[:cut] + newest[cut:]
        yield newest[:cut] + oldest[cut:]
    while True:
        yield [rng.randrange(count) for count in counts]


@dataclass(frozen=True)
class _Grower(GrowCommand):
    """Makes a device longer, by what was there before."""

    store: CrashStore

    async def grow(self, size: int, device: str) -> None:
        self.store.extend(random.Random(size).randbytes(size))


@dataclass
class Fact:
    """What holds of the files that a cut leaves, from some time on."""

    since: int
    check: Callable[[Files], None]
    until: int = NEVER


class Simulation:
    """An image under way, its model, and what was found out about it so far."""

    def __init__(self, subject: Subject, files: Mapping[str, bytes], folder: Path, effort: Effort, counts: Counts):
        """`files`: of a closed image. `folder`: where states are put, to be looked at."""
        self.subject = subject
        self.layout = subject.layout
        self.effort = effort
        self.counts = counts
        self.clock = Clock()
        self.files = files
        self.plan = FaultPlan(kill=True)
        self.stores: dict[str, CrashStore] = {}
        self.devices = (subject.device,) if subject.device else ()
        writes_base = bool(self.layout.options.update_base)
        for name, data in files.items():
            if name.startswith("disk.") or (writes_base and name == BASE):
                self.stores[name] = CrashStore(data, name, clock=self.clock, fixed_size=name in self.devices)
        self.survivors = Survivors(self.layout, folder, self.devices)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        self.disk = Disk(b"".join(reference.read_disk(folder / IMAGE)))
        self.facts: list[Fact] = []
        self.known: dict[tuple[int, bool], bytes] = {}
        self.rng = random.Random(subject.name)
        self.cuts = True
        self.strict = True
        """Whether no state may be strange (`Survivors.content`)."""
        self.cut_short = False
        """Whether what is behind the end of bitmap and table means nothing, and need not be clear."""
        self.image: Image
        self.nursery: trio.Nursery

    # --- steps ---

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it, with a nursery for what the image does in the background."""

        async def main() -> None:
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as self.nursery:
                    await work()

        trio.run(main, clock=MockClock(autojump_threshold=0))

    def step(self, *works: Callable[[], Awaitable[None]], cut_short: bool = False) -> None:
        """Run these, one after the other, and go through the moments since."""
        start = self.clock.now

        async def main() -> None:
            for work in works:
                await work()

        self.run(main)
        if self.cuts:
            self.cut_all(start, cut_short=cut_short)
        self.run(self._fold)

    async def _fold(self) -> None:
        seen = {}
        for sector in self.disk.unsure():
            seen[sector] = bytes(await self.image.read(sector * SECTOR, SECTOR))
        self.disk.fold(self.clock.tick(), seen)
        for store in self.stores.values():
            store.trim()

    # --- what steps are made of ---

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self.nursery.start_soon(work)

    async def open(self, *, fetch: bool = False, zeroes: Zeroes = Zeroes.OFF) -> None:
        """Open it for writing; `fetch`: blocks may be copied from its base."""
        stores: dict[str, Store] = {}
        for name, data in self.files.items():
            store = self.stores.get(name)
            if store is not None:
                store.closed = False
                stores[name] = FaultStore(store, self.plan)
            else:
                stores[name] = MemoryStore(data, name, writable=False)
        spawn = self.spawn if fetch else None
        self.image = image = await load(stores, policy=Policy(zeroes=zeroes), spawn=spawn)
        if self.devices:
            image.storage._command = _Grower(IMAGE, ("grow",), "", self.stores[self.devices[0]])
        await self.layout.begin_writing(image)

    def write(self, offset: int, length: int, *, zeros: bool = False) -> Callable[[], Awaitable[None]]:
        """A write of random bytes, or of zeros."""

        async def work() -> None:
            at = min(max(0, offset), self.disk.size - 1)
            count = min(length, self.disk.size - at)
            data = bytes(count) if zeros else self.rng.randbytes(count)
            start = self.clock.tick()
            with self._logged(start, at, data):
                await write_some_way(self.image, at, data, start)

        return work

    def zero(self, offset: int, length: int) -> Callable[[], Awaitable[None]]:
        """Have a range read as zeros, without writing them; it may reach past the end of the disk."""

        async def work() -> None:
            at = min(offset, self.disk.size - 1)
            start = self.clock.tick()
            with self._logged(start, at, bytes(min(length, self.disk.size - at))):
                await zero_some_way(self.image, at, at + length, start)

        return work

    @contextmanager
    def _logged(self, start: int, at: int, data: bytes) -> Iterator[None]:
        """A change of the disk, from that time on until now."""
        self.disk.writes.append(DiskWrite(start, NEVER, at, data))
        yield
        logged = next(n for n, write in enumerate(self.disk.writes) if write.start == start)
        self.disk.writes[logged] = DiskWrite(start, self.clock.tick(), at, data)

    def reserve(self, offset: int, length: int) -> Callable[[], Awaitable[None]]:
        """Reserve space, which changes nothing of what the disk holds."""
        return lambda: reserve_some_way(self.image, offset, offset + length)

    async def extents_are_right(self) -> None:
        """What is said to be a hole reads as zeros. Nothing else may be under way."""
        for at, stop, hole in await extents_as_mounted(self.image, 0, self.image.size):
            assert not (hole and any(await self.image.read(at, stop - at))), f"bytes {at}..{stop} are no hole"

    async def flush(self) -> None:
        start = self.clock.tick()
        await fsync_some_way(self.image, start)
        self.disk.flushes.append((start, self.clock.tick()))

    def together(self, *works: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """All these at once."""

        async def work() -> None:
            async with trio.open_nursery() as nursery:
                for each in works:
                    nursery.start_soon(each)

        return work

    def read(self, offset: int, length: int) -> Callable[[], Awaitable[None]]:
        """A read, whose result must be right."""

        async def work() -> None:
            start = self.clock.tick()
            data = await read_as_mounted(self.image, offset, length)
            self.disk.check_read(offset, data, start, self.clock.tick())

        return work

    def watch(self, offset: int, length: int) -> Callable[[], Awaitable[None]]:
        """Reads, again and again for a while."""

        async def work() -> None:
            for _ in range(24):
                await self.read(offset, length)()
                await trio.lowlevel.checkpoint()

        return work

    def resize(self, change: int, *beside: Callable[[], Awaitable[None]]) -> None:
        """A step of its own; these are done at the same time."""
        size = self.disk.size + change
        start = self.clock.tick()

        async def work() -> None:
            self.disk.resize = Resize(start, NEVER, size)
            await self.image.resize(size, shrink=True)
            self.disk.resize = Resize(start, self.clock.tick(), size)
            assert not self.image.committer.unseen_writes or await self.image.data.size() == size

        self.step(self.together(work, *beside), cut_short=change < 0)
        self.run(self.read(0, self.disk.size))

    def append(self, change: int, length: int, *, missing: int = 0) -> Callable[[], Awaitable[None]]:
        """Make the disk longer by writing that much, up to so many bytes before its end; not twice in a step."""

        async def work() -> None:
            size = self.disk.size + change
            at = size - missing - length
            data = self.rng.randbytes(length)
            start = self.clock.tick()
            stable = not self.image.committer.unseen_writes
            for end in (NEVER, None):
                done = self.clock.tick() if end is None else end
                self.disk.resize = Resize(start, done, size, stable)
                log = [write for write in self.disk.writes if write.start != start]
                self.disk.writes = [*log, DiskWrite(start, done, at, data)]
                if end:
                    await write_some_way(self.image, at, data, start)

        return work

    async def costs_nothing(self) -> None:
        """After a flush: blocks that a crash would show need no record to be written again."""
        assert not self.image.committer.uncommitted, "a block that is committed is going to be journaled again"

    def stored_once(self, write: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """The write, which must be one write to one store: what it touches has its place already."""

        async def work() -> None:
            before = sum(store.calls["pwrite"] for store in self.stores.values())
            await write()
            assert sum(store.calls["pwrite"] for store in self.stores.values()) == before + 1, "not stored once"

        return work

    async def close(self) -> None:
        start = self.clock.tick()
        await close(self.image)
        self.disk.flushes.append((start, self.clock.tick()))
        self.fact(_is_clean)

    def fact(self, check: Callable[[Files], None]) -> Fact:
        """From now on this holds after any cut."""
        self.facts.append(Fact(self.clock.now, check))
        return self.facts[-1]

    def forget_facts(self) -> None:
        """They hold no longer: the image is about to change."""
        for fact in self.facts:
            fact.until = min(fact.until, self.clock.now)

    # --- cuts ---

    def cut_all(self, since: int, *, cut_short: bool) -> None:
        """Cut the power at each moment from then on."""
        # One run for all states: to begin one takes as long as to judge a state.
        trio.run(self._cut_all, since, cut_short or self.cut_short, clock=MockClock(autojump_threshold=0))

    async def _cut_all(self, since: int, cut_short: bool) -> None:
        seconds = 0
        for at in range(since, self.clock.now + 1):
            whole, found = states(self.stores, at, self.effort.states, self.rng)
            self.counts.moments += 1
            self.counts.exhausted += whole
            facts = [fact for fact in self.facts if fact.since <= at < fact.until]
            seen: set[int] = set()
            for number, state in enumerate(found):
                try:
                    left = {**self.files, **state}
                    key = hash(tuple(state.values()))
                    if key in seen:
                        continue
                    seen.add(key)
                    self.counts.checks += 1
                    new = (key, cut_short) not in self.known
                    content = await self._judge(left, key, cut_short=cut_short)
                    self.disk.check_cut(content, at)
                    for fact in facts:
                        fact.check(left)
                    if new and seconds < self.effort.second_cuts and self.rng.random() < 0.2:
                        seconds += 1
                        await self._cut_recovery(left, content, cut_short=cut_short)
                except BaseException as error:
                    error.add_note(f"{self.subject.name}: cut at {at}, state {number}")
                    raise

    async def _judge(self, left: Files, key: int, *, cut_short: bool) -> bytes:
        if (key, cut_short) not in self.known:
            self.counts.states += 1
            self.known[key, cut_short] = await self.survivors.judged(
                left, closed=False, cut_short=cut_short, strict=self.strict
            )
        return self.known[key, cut_short]

    async def _cut_recovery(self, left: Files, content: bytes, *, cut_short: bool) -> None:
        """Cut the power while this state is opened and closed: the content stays."""
        clock = Clock()
        crash_stores: dict[str, CrashStore] = {}
        stores: dict[str, Store] = {}
        for name, data in left.items():
            if name in self.stores:
                stores[name] = crash_stores[name] = CrashStore(data, name, clock=clock, fixed_size=name in self.devices)
            else:
                stores[name] = MemoryStore(data, name, writable=False)

        await close(await open_for_writing(self.layout, stores))
        for at in range(clock.now + 1):
            self.counts.second_cuts += 1
            for state in states(crash_stores, at, self.effort.states, self.rng)[1]:
                again = {**left, **state}
                before = self.counts.states
                found = await self._judge(again, hash(tuple(state.values())), cut_short=cut_short)
                self.counts.second_states += self.counts.states - before
                assert found == content, f"another cut at {at} of the recovery changes the disk"


def _header(files: Files) -> Header:
    return Header.decode(bytes(files[IMAGE][: 8 * KIB]), IMAGE)


def _is_left_alone(name: str, start: int, before: Files) -> Callable[[Files], None]:
    """What stands in this file from that byte on stays."""

    def check(files: Files) -> None:
        assert files[name][start:] == before[name][start:], "bytes behind the disk were changed"

    return check


def _is_clean(files: Files) -> None:
    assert _header(files).clean, "closed, but not clean"


# --- scenarios ------------------------------------------------------------------------------------


def writing(sim: Simulation) -> None:
    """Writes at all kinds of places, and flushes; two sessions."""
    header = _header(sim.files)
    block, chunk = header.block_size or 1024, header.chunk_size or 4096
    sim.step(sim.open)
    sim.step(sim.write(block - 100, 200), sim.flush)
    sim.step(sim.stored_once(sim.write(block - 100, 200)), sim.costs_nothing, sim.flush)
    sim.step(sim.write(2 * chunk - 300, 700), sim.write(block - 50, 100), sim.flush)
    if header.base_img_size:
        sim.step(sim.write(header.base_img_size - 700, 1500))
    sim.step(sim.together(sim.write(4 * chunk, 700), sim.flush, sim.write(4 * chunk + 600, 1000)), sim.flush)
    sim.step(sim.write(sim.disk.size - 600, 600))
    sim.step(sim.close)
    sim.forget_facts()
    sim.step(sim.open)
    sim.step(sim.write(3 * chunk + 100, 600))
    sim.step(sim.flush, sim.write(0, 512))
    sim.step(sim.flush)
    sim.step(sim.close)


def resizing(sim: Simulation) -> None:
    """Shrinking and growing, with writes between."""
    sim.step(sim.open)
    size = sim.disk.size
    sim.step(sim.write(size - 3000, 1000), sim.flush)
    sim.step(sim.write(size - 400, 400), sim.write(5000, 300))
    sim.resize(-21 * SECTOR)
    sim.step(sim.write(sim.disk.size - 600, 600), sim.flush)
    sim.resize(30 * SECTOR)
    sim.step(sim.write(size - 3000, 1000), sim.flush, sim.write(sim.disk.size - 100, 100))
    sim.resize(-3 * SECTOR)
    sim.resize(2 * SECTOR)
    sim.step(sim.close)


def appending(sim: Simulation) -> None:
    """Writes past the end, flushed or not, between changes of the size."""
    sim.step(sim.open)
    sim.step(sim.append(5 * SECTOR, 700, missing=100), sim.flush)
    sim.step(sim.append(2 * SECTOR, 300, missing=100))
    sim.step(sim.write(sim.disk.size - 90, 80), sim.append(9 * SECTOR, 2000))
    sim.resize(3 * SECTOR)
    for change in (-4, 0, 2):
        sim.step(sim.append(2 * SECTOR, 200, missing=300))
        sim.resize(change * SECTOR)
    sim.step(sim.flush, sim.append(4 * SECTOR, 1000), sim.flush)
    for missing in (0, 511):
        sim.step(sim.append(3 * SECTOR, 700, missing=missing))
        sim.step(sim.close)
        sim.forget_facts()
        sim.step(sim.open)
    sim.step(sim.close)


def zeroing(sim: Simulation) -> None:
    """Zeros that give back their space, and zeros that are not stored."""
    for zeroes in (Zeroes.PUNCH, Zeroes.ON):
        sim.step(lambda zeroes=zeroes: sim.open(zeroes=zeroes))  # type: ignore[misc]
        sim.step(sim.write(1000, 1500), sim.flush)
        sim.step(sim.write(1300, 700, zeros=True), sim.flush)
        sim.step(sim.write(9000, 600, zeros=True), sim.flush)
        sim.step(sim.close)
        sim.forget_facts()


def punching(sim: Simulation) -> None:
    """Ranges that become zeros: parts of blocks and chunks, many of them, all that is left, beside flushes."""
    header = _header(sim.files)
    block, chunk = header.block_size or 1024, header.chunk_size or 4096
    base, size = header.base_img_size, sim.disk.size
    sim.step(sim.open)
    if sim.devices and not header.compact:
        sim.fact(_is_left_alone(sim.devices[0], header.data_offset + size, sim.files))
    watch = sim.watch(block, 3 * block)  # on both sides: one of them comes next, whatever the order
    sim.step(sim.together(watch, sim.zero(block + 100, max(block, 2 * chunk)), watch), sim.flush)
    if base or not header.compact:
        sim.step(sim.stored_once(sim.zero(2 * block - 200, 150)), sim.flush)
    sim.step(sim.write(2 * chunk - 300, 700), sim.flush, sim.reserve(chunk, 3 * chunk))
    sim.step(sim.together(sim.zero(2 * chunk - 700, 900), sim.flush, sim.read(2 * chunk - 700, 900)))
    far = max(0, base // block - 2) * block
    sim.step(sim.together(sim.zero(far + 100, 200), sim.write(far + 400, 100), sim.zero(far + 10, 20)))
    if base:
        sim.step(sim.zero(base - block - 300, 2 * block), sim.extents_are_right, sim.flush)
    sim.step(sim.together(sim.write(4 * chunk, 600), sim.zero(4 * chunk + 600, 2 * chunk), sim.flush))
    sim.step(sim.close)
    sim.facts = [fact for fact in sim.facts if fact.check is not _is_clean]
    sim.step(sim.open)
    sim.step(sim.write(size - 600, 600), sim.zero(size - 9 * SECTOR, size))
    sim.step(sim.zero(0, size - chunk), sim.extents_are_right, sim.flush, sim.write(chunk, 600))
    sim.step(sim.close)


def copying(sim: Simulation) -> None:
    """Copy-on-read, a profile of it, prefetching to the end of it, letting go of the base."""
    header = _header(sim.files)
    block = header.block_size
    far = min(7, header.base_img_size // block - 1) * block

    async def reads() -> None:
        """What is read is copied after the answer."""
        fetcher = sim.image.start_fetching(copy_on_read=True)
        assert fetcher is not None
        await sim.read(2 * block, 100)()
        await sim.read(4 * block, block)()
        await trio.sleep(1)

    async def records() -> None:
        assert sim.image.record_profile()

    expected: list[object] = []

    def profile_is_good(files: Files) -> None:
        h = _header(files)
        if h.prefetch_profile_entries:
            at = h.prefetch_profile_offset
            assert files[IMAGE][at : at + 12 * h.prefetch_profile_entries] == expected[0], "the profile is not there"

    def has_profile(files: Files) -> None:
        assert _header(files).prefetch_profile_entries, "the profile is gone"

    async def look_at_profile() -> None:
        now = bytes(sim.stores[IMAGE].data)
        h = _header({IMAGE: now})
        expected.append(now[h.prefetch_profile_offset :][: 12 * h.prefetch_profile_entries])
        assert expected[0]
        sim.fact(has_profile)

    # A session that only reads: nothing but the profile is stable after it.
    sim.step(lambda: sim.open(fetch=True))
    start = sim.clock.now
    sim.run(records)
    sim.run(sim.read(2 * block, 2 * block))
    sim.run(sim.close)
    sim.run(look_at_profile)
    sim.facts.append(Fact(start, profile_is_good))
    sim.cut_all(start, cut_short=False)
    sim.run(sim._fold)
    sim.facts = [fact for fact in sim.facts if fact.check is not _is_clean]

    sim.step(lambda: sim.open(fetch=True))
    sim.step(reads, sim.write(4 * block + 10, 500), sim.flush)
    sim.step(reads, sim.write(2 * block, 100), sim.flush)
    sim.step(sim.write(2 * block, 100), sim.costs_nothing, sim.flush)

    async def settle() -> None:
        """Copies are made, and what is pending is in pages, not in the journal."""
        await trio.sleep(1)
        await sim.image.committer.checkpoint()

    sim.step(sim.read(far, 100), settle)
    sim.step(sim.write(far, 100), sim.costs_nothing, sim.flush)
    sim.step(sim.write(6 * block + 50, 100), sim.flush)

    sim.fact(_journal_fits)

    async def prefetch() -> None:
        prefetcher = Prefetcher(sim.image, Scheduler(pressure=lambda: None), rng=random.Random(0))
        await prefetcher.run()
        assert sim.image.bitmap is None, "the base is still needed"
        sim.fact(_lets_go)

    sim.step(sim.write(block, 100), sim.together(prefetch, sim.write(6 * block, 700)), sim.flush)
    sim.step(sim.write(3 * block + 100, 700), sim.flush)
    sim.step(sim.close)


def closing(sim: Simulation) -> None:
    """Closing while copies are under way: they are stored first; as nothing is missing then, the base is let go of."""

    async def reads_all() -> None:
        fetcher = sim.image.start_fetching(copy_on_read=True)
        assert fetcher is not None
        await sim.read(0, sim.image.header.base_img_size)()

    async def has_all() -> None:
        sim.fact(_lets_go)

    sim.step(lambda: sim.open(fetch=True))
    sim.step(sim.write(600, 700), sim.flush)
    sim.fact(_journal_fits)
    sim.step(reads_all, sim.close, has_all)


def leftovers(sim_of: Callable[[], Simulation]) -> None:
    """A file that is longer than its image: what is there must not show when the image grows."""
    for grows_at_once in (False, True):
        first = sim_of()
        header = _header(first.files)
        name = header.data_file or IMAGE
        end = header.data_offset if header.compact else header.data_offset + header.virtual_disk_size
        left = {**first.files, name: first.files[name].ljust(end, b"\0") + random.Random(name).randbytes(9 * KIB)}
        sim = Simulation(first.subject, left, first.survivors.folder, first.effort, first.counts)
        sim.survivors.has_leftovers = True
        sim.step(sim.open)
        if not grows_at_once:
            sim.step(sim.write(700, 100), sim.flush)
        sim.resize(13 * SECTOR)
        sim.step(sim.write(sim.disk.size - 900, 100), sim.flush)
        sim.step(sim.close)


def unused(sim_of: Callable[[], Simulation]) -> None:
    """A new image of the original, which has no storage yet: it must never look as if that had been cut off."""
    first = sim_of()
    header = _header(first.files)
    name = header.data_file or IMAGE
    files = {**first.files, name: first.files[name][: header.data_offset]}
    sim = Simulation(first.subject, files, first.survivors.folder, first.effort, first.counts)
    sim.step(sim.open)
    sim.step(sim.write(700, 100), sim.flush)
    sim.step(sim.close)


def outgrowing(sim_of: Callable[[], Simulation]) -> None:
    """A disk that gets larger than its chunk table has room for: that moves, and data begins later."""
    for grows_at_once in (False, True):
        sim = sim_of()
        header = _header(sim.files)
        chunk = header.chunk_size
        size = (header.table_capacity + 3) * chunk

        async def writes(sim: Simulation = sim, chunk: int = chunk) -> None:
            """Old chunks and new ones, and flushes, while the old ones get other places."""
            for number in (0, 8, 1, 2):
                await sim.write(number * chunk + 300, 700)()
                if number % 2:
                    await sim.flush()

        async def writes_late(sim: Simulation = sim, chunk: int = chunk) -> None:
            """To a new chunk, when the table was written to its new place."""
            vars(sim.image.committer).pop("flush_metadata")
            await sim.write(3 * chunk + 100, 300)()
            await sim.image.committer.flush_metadata()

        sim.step(sim.open)
        sim.step(sim.write(2 * chunk - 300, 700), sim.flush, sim.write(5 * chunk + 100, 900))
        if grows_at_once:
            sim.step(sim.close)
            sim.forget_facts()
            sim.step(sim.open)
        vars(sim.image.committer)["flush_metadata"] = writes_late
        with mock.patch.object(table_moving, "PART", chunk if grows_at_once else table_moving.PART):
            sim.resize(size - sim.disk.size, writes, sim.watch(2 * chunk - 300, 700))
        sim.step(sim.write(size - 2 * chunk - 500, 1000), sim.flush, sim.write(chunk - 200, 300))
        sim.step(sim.write(9 * chunk, 100), sim.close)
        sim.forget_facts()
        sim.step(sim.open)
        sim.step(sim.write(size - 100, 100), sim.flush)
        sim.resize(5 * SECTOR - size)
        sim.step(sim.write(700, 100), sim.close)


def cut_elsewhere(sim_of: Callable[[], Simulation]) -> None:
    """A disk that the original has made smaller: the base's range, bits, entries, records and storage stay.

    None of it may show when the disk grows again.
    """
    first = sim_of()
    header = _header(first.files)
    size = header.virtual_disk_size - 41 * SECTOR
    if header.has_base:
        size = min(size, header.base_img_size - 5 * SECTOR)
    first.cuts = False
    first.step(first.open)
    first.step(first.write(size - 700, 1500), first.flush, first.write(size + 3 * SECTOR, 900), first.flush)
    first.step(first.write(500, 100), first.flush, first.close)
    left = {**first.files, **{name: bytes(store.data) for name, store in first.stores.items()}}
    smaller = replace(_header(left), virtual_disk_size=size).encode()
    left[IMAGE] = smaller + left[IMAGE][len(smaller) :]
    for grows_at_once in (False, True):
        sim = Simulation(first.subject, left, first.survivors.folder, first.effort, first.counts)
        sim.cut_short, sim.strict = True, False
        sim.survivors.has_leftovers = True
        sim.step(sim.open)
        if not grows_at_once:
            sim.step(sim.write(size - 600, 100), sim.flush, sim.write(3000, 100))
        sim.resize(64 * SECTOR)
        sim.step(sim.write(size + 900, 100), sim.flush)
        sim.step(sim.close)
        assert grows_at_once or _header({IMAGE: bytes(sim.stores[IMAGE].data)}).base_img_size <= size


def _journal_fits(files: Files) -> None:
    """Once the base is no longer needed no record speaks of its blocks."""
    header = _header(files)
    journal = files[IMAGE][header.journal_offset :][: header.journal_size]
    if header.all_data_in_fvd_img:
        assert struct.pack("<I", reference.BITMAP_RECORD) not in journal, "records of a bitmap that is gone"


def _lets_go(files: Files) -> None:
    assert _header(files).all_data_in_fvd_img, "the base is needed again"


def writing_base(sim: Simulation) -> None:
    """Writes that reach the base as well."""
    header = _header(sim.files)
    through = header.write_updates_base_img == "writethrough"

    def base_has(content: bytes) -> Callable[[Files], None]:
        def check(files: Files) -> None:
            assert files[BASE][: len(content)] == content, "the base lacks what was written to it"

        return check

    async def base_is_written() -> None:
        """Now it holds the disk."""
        found = bytes(sim.stores[BASE].data[: header.base_img_size])
        for write in sim.disk.writes:
            part = write.data[: max(0, header.base_img_size - write.offset)]
            assert found[write.offset : write.offset + len(part)] == part, "the base was not written"
        sim.fact(base_has(found))

    async def base_has_all() -> None:
        """All earlier steps have reached it."""
        assert sim.stores[BASE].data[: header.base_img_size] == sim.disk.content[: header.base_img_size]

    for offset, length in ((100, 700), (3000, 900)):
        sim.step(sim.open)
        sim.step(sim.write(offset, length), sim.flush, *([base_is_written] if through else []))
        sim.forget_facts()
        sim.step(sim.write(offset + 300, 100), sim.flush, sim.write(header.base_img_size - 600, 600), sim.flush)
        sim.step(sim.zero(offset + 400, 3 * header.block_size), sim.flush, *([base_is_written] if through else []))
        sim.step(sim.close, base_is_written, base_has_all)
        sim.forget_facts()


def recovering(sim_of: Callable[[], Simulation]) -> None:
    """Recovery of an image whose journal holds a record that is bad: somebody else left it there."""
    first = sim_of()
    header = _header(first.files)
    if header.journal_region is None:
        return
    block, chunk = header.block_size or 1024, header.chunk_size or 4096
    first.cuts = False
    first.step(first.open)
    first.step(first.write(block - 100, 200), first.flush, first.write(2 * chunk - 300, 700), first.flush)
    left = {**first.files, **{name: bytes(store.data) for name, store in first.stores.items()}}
    bad = struct.pack("<IIq", reference.BITMAP_RECORD, 1, 1 << 40).ljust(SECTOR, b"\0")
    at = header.journal_offset + header.journal_size - SECTOR
    left[IMAGE] = left[IMAGE][:at] + bad + left[IMAGE][at + SECTOR :]

    def journal_is_good(files: Files) -> None:
        assert files[IMAGE][at : at + 4] != bad[:4], "the bad record is still there"

    sim = Simulation(first.subject, left, first.survivors.folder, first.effort, first.counts)
    sim.strict = False

    async def opened() -> None:
        sim.fact(journal_is_good)

    sim.step(sim.open, opened)
    sim.step(sim.write(block + 50, 200), sim.flush)


def killing(sim_of: Callable[[], Simulation]) -> None:
    """The process ends at each call, a new one goes on with what it left, then the power is cut."""
    nth = 1
    while True:
        sim = sim_of()
        header = _header(sim.files)
        block, chunk = header.block_size or 1024, header.chunk_size or 4096
        sim.cuts = False
        sim.run(sim.open)
        sim.plan.nth, sim.plan.calls = nth, 0

        async def work(sim: Simulation = sim, block: int = block, chunk: int = chunk) -> None:
            await sim.write(block - 100, 200)()
            await sim.flush()
            await sim.write(2 * chunk - 300, 700)()
            await sim.zero(block - 100, 200)()
            await sim.flush()
            await sim.write(5 * chunk, 700)()
            if sim.layout.passed_through:
                await sim.append(2 * SECTOR, 300)()
            await sim.close()

        killed = False
        try:
            sim.run(work)
        except* Killed:
            killed = True
        sim.plan.nth = 0
        if not killed:
            return
        sim.counts.kills += 1
        left = {**sim.files, **{name: bytes(store.data) for name, store in sim.stores.items()}}
        found = sim.survivors.content(left, closed=False, cut_short=False, strict=True)
        now = sim.clock.tick()
        try:
            sim.disk.check_cut(found, now)
            sim.disk.after_cut(found, stable=False)
            sim.facts.clear()
            sim.cuts = True
            sim.step(sim.open)
            if sim.counts.kills % 2:
                sim.step(sim.flush)  # of what the other process has left
            sim.step(sim.write(block - 100, 200), sim.write(3 * chunk, 400), sim.flush)
        except BaseException as error:
            error.add_note(f"{sim.subject.name}: killed at call {nth}")
            raise
        nth += sim.effort.kills


SCENARIOS: dict[str, Callable[[Callable[[], Simulation]], None]] = {
    "writing": lambda sim_of: writing(sim_of()),
    "resizing": lambda sim_of: resizing(sim_of()),
    "appending": lambda sim_of: appending(sim_of()),
    "zeroing": lambda sim_of: zeroing(sim_of()),
    "punching": lambda sim_of: punching(sim_of()),
    "copying": lambda sim_of: copying(sim_of()),
    "writing to the base": lambda sim_of: writing_base(sim_of()),
    "closing": lambda sim_of: closing(sim_of()),
    "leftovers": leftovers,
    "unused": unused,
    "outgrowing": outgrowing,
    "cut elsewhere": cut_elsewhere,
    "recovering": recovering,
    "killing": killing,
}


def _outgrows_alike(subject: Subject, other: Subject) -> bool:
    """Whether their tables move in the same way; sizes of blocks and chunks make no difference but in time."""
    kinds = [
        (
            each.device,
            layout.options.compact,
            layout.options.journal_size,
            layout.options.data_file,
            layout.base_length > 0,
        )
        for each, layout in ((subject, subject.layout), (other, other.layout))
    ]
    return kinds[0] == kinds[1]


def applies(scenario: str, subject: Subject) -> bool:
    """Whether the scenario says something about the image."""
    options = subject.layout.options
    if scenario == "writing to the base" or options.update_base:
        return scenario == "writing to the base" and bool(options.update_base)
    if scenario in ("appending", "zeroing"):
        return subject.layout.passed_through == (scenario == "appending")
    if scenario == "outgrowing":
        return options.compact and subject == next(filter(functools.partial(_outgrows_alike, subject), SUBJECTS))
    if scenario == "leftovers":
        return not subject.device
    if scenario == "unused":
        return not (subject.device or options.compact or subject.layout.all_local)
    if scenario == "cut elsewhere":
        return not subject.layout.all_local
    if scenario in ("copying", "closing"):
        return bool(options.base_img) and not subject.layout.all_local
    return True


def simulate(subject: Subject, scratch: Path, effort: Effort, scenarios: Sequence[str] = tuple(SCENARIOS)) -> Counts:
    """Run the scenarios that apply; `scratch`: an empty folder."""
    counts = Counts()
    built, left = scratch / "built", scratch / "left"
    built.mkdir()
    left.mkdir()
    files = subject.build(built)
    with quiet():
        for name in scenarios:
            if applies(name, subject):
                try:
                    SCENARIOS[name](lambda: Simulation(subject, files, left, effort, counts))
                except BaseException as error:
                    error.add_note(f"scenario: {name}")
                    raise
    return counts
