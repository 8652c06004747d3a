"""Any operations in any order on an open image, against a model; for every layout.

The image lies in files of a `Files`: in memory, where power cuts can be tried, or real ones. The
model is `fakes.Disk`. FVDFS_STATEFUL_STEPS sets how many operations each layout gets at least;
FVDFS_STATEFUL_SEED has other ones tried.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import seed
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from trio.testing import MockClock

from fvdfs.format.table_room import largest_table
from fvdfs.image.image import Image
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import Scheduler
from fvdfs.store.base import Store, next_data
from fvdfs.store.host import HostFile
from support import reference
from support.builder import IMAGE, KIB, LAYOUTS, Layout, load, read_files
from support.crash import overwrite, quiet
from support.fakes import (
    SECTOR,
    Clock,
    CrashStore,
    Disk,
    DiskWrite,
    FaultPlan,
    FaultStore,
    Killed,
    Resize,
    close,
    extents_as_mounted,
    fsync_some_way,
    look,
    read_as_mounted,
    reserve_some_way,
    write_some_way,
    zero_some_way,
)
from support.stateful import machine_settings

T = TypeVar("T")

STEPS = int(os.environ.get("FVDFS_STATEFUL_STEPS", "500"))
SEED = os.environ.get("FVDFS_STATEFUL_SEED", "")
STEPS_PER_EXAMPLE = 40
MAX_LENGTH = 200 * KIB
MAX_GROWTH = 512 * KIB


class Files(Protocol):
    """Where the files of an image under test lie."""

    clock: Clock
    can_cut: bool
    """Whether power cuts and ends of the process can be tried."""

    def stores(self, *, writable: bool = True) -> Mapping[str, Store]:
        """The files, opened anew."""

    def folder(self) -> Path:
        """A folder that holds the files as they are now."""

    def pace(self, pauses: int | None) -> None:
        """From now on no call is done without waiting, as this seed decides; None: all are."""

    def fold(self) -> None:
        """Cuts before now are no longer asked for."""

    def cut(self, rng: random.Random, at: int) -> None:
        """The power was cut at that time; what is left is stable."""

    def kill(self, nth: int) -> None:
        """The process ends at its n-th call from now on; 0: it does not."""

    def sync(self) -> None:
        """Everything becomes stable."""

    def release(self) -> None:
        """Close what is open."""


class MemoryFiles:
    """Files in memory, of which the top image's can be cut off from power."""

    can_cut = True

    def __init__(self, built: Path, scratch: Path) -> None:
        self.clock = Clock()
        self._plan = FaultPlan(kill=True)
        self._scratch = scratch
        self._inner: dict[str, CrashStore] = {}
        self._written: dict[str, bytes] = {}
        for name, content in read_files(built).items():
            self._inner[name] = CrashStore(content, name, clock=self.clock)

    def stores(self, *, writable: bool = True) -> Mapping[str, Store]:
        self._plan.nth = 0
        for name, store in self._inner.items():
            store.closed = False
            store.writable = writable and name.startswith("disk.")
        return {name: FaultStore(store, self._plan) for name, store in self._inner.items()}

    def folder(self) -> Path:
        for name, store in self._inner.items():
            if self._written.get(name) != bytes(store.data):
                self._written[name] = bytes(store.data)
                overwrite(self._scratch / name, store.data)
        return self._scratch

    def pace(self, pauses: int | None) -> None:
        for store in self._inner.values():
            store.slow = pauses is not None
            store.pauses = random.Random(pauses) if pauses else None

    def fold(self) -> None:
        for store in self._inner.values():
            store.trim()

    def cut(self, rng: random.Random, at: int) -> None:
        for name, store in list(self._inner.items()):
            if store.writable:
                new = CrashStore(store.crash(rng, at), name, clock=self.clock, slow=store.slow, pauses=store.pauses)
                self._inner[name] = new

    def kill(self, nth: int) -> None:
        self._plan.nth, self._plan.calls = nth, 0

    def sync(self) -> None:
        for name, store in list(self._inner.items()):
            self._inner[name] = CrashStore(store.data, name, clock=self.clock, slow=store.slow, pauses=store.pauses)

    def release(self) -> None:
        pass


class RealFiles:
    """Real files of the host, or block devices, in a folder."""

    can_cut = False

    def __init__(self, built: Path, scratch: Path) -> None:
        self.clock = Clock()
        self._folder = scratch
        self._open: list[HostFile] = []
        for name, content in read_files(built).items():
            (scratch / name).write_bytes(content)

    def stores(self, *, writable: bool = True) -> Mapping[str, Store]:
        found = {}
        for path in self._folder.iterdir():
            write = writable and path.name.startswith("disk.")
            fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
            found[path.name] = HostFile(fd, path.name, write)
        self.release()
        self._open = list(found.values())
        return found

    def folder(self) -> Path:
        return self._folder

    def pace(self, pauses: int | None) -> None:
        pass

    def fold(self) -> None:
        pass

    def cut(self, rng: random.Random, at: int) -> None:
        raise NotImplementedError

    def kill(self, nth: int) -> None:
        raise NotImplementedError

    def sync(self) -> None:
        pass

    def release(self) -> None:
        for file in self._open:
            file.close()
        self._open = []


# --- operations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """An offset: near the `index`-th border between some units, as far as the disk reaches."""

    unit: str
    index: int
    delta: int


@dataclass(frozen=True)
class Op:
    """A read, write, zero, reserve or flush; `data` is the seed of what is written, 0: zeros."""

    kind: str
    place: Place = Place("byte", 0, 0)
    length: int = 0
    data: int = 0

    @property
    def payload(self) -> bytes:
        return random.Random(self.data).randbytes(self.length) if self.data else bytes(self.length)

    @property
    def changes(self) -> bool:
        """Whether it gives bytes another content."""
        return self.kind in ("write", "zero")


UNITS = ("byte", "sector", "block", "chunk", "base", "end")
deltas = st.one_of(st.just(0), st.integers(-600, 600), st.sampled_from((-SECTOR, SECTOR, -4096, 4096, -1, 1)))
places = st.builds(Place, st.sampled_from(UNITS), st.integers(0, 4 << 20), deltas)
lengths = st.one_of(
    st.integers(1, 1500),
    st.builds(lambda count, unit: count * unit, st.integers(1, 9), st.sampled_from((SECTOR, 4096, 7680))),
    st.integers(1, 32 * KIB),
    st.integers(1, MAX_LENGTH),
)
payloads = st.integers(0, 1 << 30)
writes = st.builds(Op, st.just("write"), places, lengths, payloads)
zeros = st.builds(Op, st.just("zero"), places, st.one_of(lengths, st.integers(1, 1 << 21)))
reserves = st.builds(Op, st.just("reserve"), places, lengths)
reads = st.builds(Op, st.just("read"), places, lengths)
flushes = st.just(Op("flush"))
changes = st.one_of(writes, writes, zeros)
operations = st.one_of(writes, writes, zeros, reads, flushes, st.one_of(reads, reserves))
sequences = st.lists(operations, min_size=2, max_size=8)
at_once = st.lists(st.lists(operations, min_size=1, max_size=2), min_size=2, max_size=3)
"""Several tasks, each with one or two operations."""
sizes = st.one_of(st.integers(1, 40), st.integers(1, 250), st.sampled_from((8, 16, 128)))  # sectors


class Machine(RuleBasedStateMachine):
    """One image, from its creation on. Subclasses say which."""

    layout: Layout
    files_class: Callable[[Path, Path], Files]
    built: Path
    scratch: Path
    counts: Counter[str]
    content: bytes

    def __init__(self) -> None:
        super().__init__()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.files = self.files_class(self.built, self.scratch)
        self.disk = Disk(self.content)
        self.image = self._open()
        self.limit = self.disk.size + MAX_GROWTH
        self.cut_short = self.layout.all_local
        """Whether the tails of bitmap and table may be set: a shrink was cut short, or the bits mean nothing."""

    def teardown(self) -> None:
        self.files.release()

    # --- steps of rules ---

    def _trio(self, work: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Run it, with a nursery for what the image does in the background, in a time that passes by itself."""

        async def main() -> T:
            async with trio.open_nursery() as self.nursery:
                return await work(*arguments)
            raise AssertionError("not reached")

        return trio.run(main, clock=MockClock(autojump_threshold=0))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self.nursery.start_soon(work)

    def _open(self) -> Image:
        async def main() -> Image:
            image = await load(self.files.stores(), spawn=self._spawn)
            await self.layout.begin_writing(image)
            return image

        return self._trio(main)

    def _close(self) -> None:
        self._trio(close, self.image)

    def _check_closed(self) -> None:
        folder = self.files.folder()
        problems = reference.check(folder / IMAGE, "fvdfs")
        tails_may_be_set = self.cut_short or (self.image.bitmap is None and bool(self.image.header.base_img))
        assert [problem for problem in problems if not (tails_may_be_set and "'s tail is" in problem)] == []
        found = b"".join(reference.read_disk(folder / IMAGE))
        self.disk.check_read(0, found, 0, 1)
        assert len(found) == self.disk.size

    def _offset(self, place: Place, size: int) -> int:
        header = self.image.header
        units = {
            "byte": 1,
            "sector": SECTOR,
            "block": header.block_size or 4096,
            "chunk": header.chunk_size or 64 * KIB,
            "base": header.base_img_size or size,
            "end": size,
        }
        unit = units[place.unit] or 1
        border = place.index % (size // unit + 1) * unit if unit < size else unit
        return min(max(0, border + place.delta), size - 1)

    async def _do(self, op: Op, size: int) -> None:
        """Do it, inside a disk of that size, and log it. Reads may reach past the end."""
        self.counts[op.kind] += 1
        offset = self._offset(op.place, size)
        start = self.files.clock.tick()
        if op.changes:
            data = op.payload[: size - offset]
            at = len(self.disk.writes)
            self.disk.writes.append(DiskWrite(start, 1 << 60, offset, data))
            if op.kind == "write":
                await write_some_way(self.image, offset, data, start)
            else:
                await zero_some_way(self.image, offset, offset + len(data), start)
            done = DiskWrite(start, self.files.clock.tick(), offset, data)
            at = next(i for i, w in enumerate(self.disk.writes) if w.start == start)
            self.disk.writes[at] = done
        elif op.kind == "flush":
            await fsync_some_way(self.image, start)
            self.disk.flushes.append((start, self.files.clock.tick()))
        elif op.kind == "reserve":
            await reserve_some_way(self.image, offset, offset + op.length)
        else:
            data = bytes(await read_as_mounted(self.image, offset, op.length))
            self.disk.check_read(offset, data, start, self.files.clock.tick())
            resize = self.disk.resize
            ends = {self.disk.size} | ({resize.size} if resize else set())
            assert len(data) in {max(0, min(op.length, end - offset)) for end in ends}

    async def _in_turn(self, ops: Sequence[Op]) -> None:
        for op in ops:
            await self._do(op, self.disk.size)

    async def _together(self, tasks: Sequence[Sequence[Op]], size: int) -> None:
        async def in_turn(ops: Sequence[Op]) -> None:
            for op in ops:
                await self._do(op, size)

        async with trio.open_nursery() as nursery:
            for ops in tasks:
                nursery.start_soon(in_turn, ops)

    async def _resize(self, size: int, *, write: bytes = b"") -> None:
        """Change the size, and log it; growing may be impossible. With `write`, growing by a write at the end."""
        old = self.disk.size
        assert self.disk.resize is None
        self.counts["grow" if size > old else "shrink"] += 1
        start = self.files.clock.tick()
        stable = not (write and self.image.committer.unseen_writes)
        self.disk.resize = Resize(start, 1 << 60, size)
        try:
            if write:
                self.disk.writes.append(DiskWrite(start, 1 << 60, size - len(write), write))
                await write_some_way(self.image, size - len(write), write, 2)
                self.disk.writes[-1] = DiskWrite(start, self.files.clock.tick(), size - len(write), write)
            else:
                await self.image.resize(size, shrink=size < old)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert self.layout.options.compact
            assert size > old
            self.counts["too big"] += 1
            self.disk.resize = None
            if write:
                self.disk.writes.pop()
            assert self.image.size == old
        else:
            self.disk.resize = Resize(start, self.files.clock.tick(), size, stable)
            await look(self.image)
            assert self.image.size == size

    async def _settled(self) -> None:
        """Close the log: everything in it is done."""
        seen: dict[int, bytes] = {}
        for sector in self.disk.unsure():
            seen[sector] = bytes(await self.image.read(sector * SECTOR, SECTOR))
        self.disk.fold(self.files.clock.tick(), seen)
        self.files.fold()

    def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            await work()
            await self._settled()

        self._trio(main)

    def _after_cut(self, at: int, *, stable: bool) -> None:
        """Look at what is left, by both readers, and open it again."""

        async def read() -> bytes:
            image = await load(self.files.stores(writable=False))
            data = bytes(await image.read(0, image.size))
            await image.close()
            return data

        found = self._trio(read)
        folder = self.files.folder()
        assert b"".join(reference.read_disk(folder / IMAGE)) == found, "the readers differ"
        self.disk.check_cut(found, at)
        self.disk.after_cut(found, stable=stable)
        self.image = self._open()

    @contextmanager
    def _dying(self, nth: int) -> Iterator[None]:
        """The process ends at the n-th call, if not before."""
        self.files.kill(nth)
        try:
            yield
        except* Killed:
            pass
        except* OSError as group:  # what other tasks still saw of it
            if "Killed" not in repr(group) and "since an earlier error" not in repr(group):
                raise
        finally:
            self.files.kill(0)

    async def _prefetch(self, ops: Sequence[Sequence[Op]], *, stop: bool) -> None:
        """Prefetch while operations go on, until all is local, or they are done."""
        self.counts["prefetch"] += 1
        prefetcher = Prefetcher(self.image, Scheduler(pressure=lambda: None), rng=random.Random(0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefetcher.run)
            await self._together(ops, self.disk.size)
            if stop:
                await prefetcher.stop()
        if not stop:
            self.counts["finish"] += 1
            assert self.image.bitmap is None
            assert self.image.header.all_data_in_fvd_img

    # --- rules ---

    @initialize(pauses=st.sampled_from((None, None, 0, 1, 2)))
    def start(self, pauses: int | None) -> None:
        self.files.pace(pauses)

    @rule(op=operations)
    def one(self, op: Op) -> None:
        self._run(lambda: self._in_turn([op]))

    @rule(ops=sequences)
    def several(self, ops: Sequence[Op]) -> None:
        self._run(lambda: self._in_turn(ops))

    @rule(ops=at_once, pauses=st.integers(0, 1 << 16))
    def together(self, ops: Sequence[Sequence[Op]], pauses: int) -> None:
        self.files.pace(pauses)
        self._run(lambda: self._together(ops, self.disk.size))

    @rule(place=places, length=lengths)
    def extents(self, place: Place, length: int) -> None:
        """What is a hole reads as zeros, and every byte that is none is found."""
        self.counts["extents"] += 1
        start = self._offset(place, self.disk.size)
        stop = min(start + length, self.disk.size) if length % 2 else self.disk.size

        async def main() -> None:
            await look(self.image)
            for at, end, hole in await extents_as_mounted(self.image, start, stop):
                assert not (hole and any(self.disk.content[at:end])), f"bytes {at}..{end} are no hole"
            content = self.disk.content[start:stop]
            first = start + len(content) - len(content.lstrip(b"\0"))
            assert await next_data(self.image, start, stop) <= first

        self._trio(main)

    @rule(ops=st.lists(changes, min_size=2, max_size=5), place=places, pauses=st.integers(0, 1 << 16))
    def together_at_one_place(self, ops: Sequence[Op], place: Place, pauses: int) -> None:
        self.files.pace(pauses)
        near = [[Op(op.kind, Place(place.unit, place.index, op.place.delta), op.length, op.data)] for op in ops]
        self._run(lambda: self._together([*near, [Op("flush")]], self.disk.size))

    @rule(more=sizes)
    def grow(self, more: int) -> None:
        size = min(self.disk.size + more * SECTOR, self.limit)
        if size > self.disk.size:
            self._run(lambda: self._resize(size))

    @rule(more=sizes, data=payloads, overlap=st.integers(0, 5000))
    def grow_by_write(self, more: int, data: int, overlap: int) -> None:
        size = min(self.disk.size + more * SECTOR, self.limit)
        if size > self.disk.size:
            length = min(size, size - self.disk.size + overlap if data % 2 else 1 + data % (size - self.disk.size))
            payload = random.Random(data).randbytes(length)
            self._run(lambda: self._resize(size, write=payload))

    @precondition(lambda self: self.layout.options.compact)
    @rule(write=st.booleans())
    def grow_too_much(self, write: bool) -> None:
        self.counts["too big"] += 1
        header = self.image.header
        chunks = header.table_capacity if write else largest_table(header)
        size = chunks * header.chunk_size + SECTOR

        async def main() -> None:
            with pytest.raises(OSError, match="chunk table") as caught:
                if write:
                    await self.image.write(size - 1, b"x")
                else:
                    await self.image.resize(size)
            assert caught.value.errno == errno.EFBIG
            assert self.image.size == self.disk.size

        self._trio(main)

    @rule(less=sizes, more=sizes, ops=st.lists(operations, max_size=3))
    def shrink_and_grow(self, less: int, more: int, ops: Sequence[Op]) -> None:
        size = max(self.disk.size - less * SECTOR, SECTOR)
        if size < self.disk.size:
            self._run(lambda: self._resize(size))
        self._run(lambda: self._in_turn(ops))
        self.grow(more)

    @rule(
        ops=at_once,
        change=st.one_of(sizes, sizes.map(lambda size: -size)),
        pauses=st.integers(0, 1 << 16),
    )
    def together_with_resize(self, ops: Sequence[Sequence[Op]], change: int, pauses: int) -> None:
        size = min(max(self.disk.size + change * SECTOR, SECTOR), self.limit)
        if size == self.disk.size:
            return
        self.files.pace(pauses)

        async def main() -> None:
            common = min(size, self.disk.size)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._together, ops, common)
                nursery.start_soon(self._resize, size)

        self._run(main)

    @rule()
    def remount(self) -> None:
        self.counts["remount"] += 1
        self._close()
        self.disk.flushes.append((self.files.clock.tick(), self.files.clock.tick()))
        self.disk.fold(self.files.clock.tick(), {})
        self._check_closed()
        self.image = self._open()

    @rule(ops=st.lists(reads, min_size=1, max_size=4))
    def read_only(self, ops: Sequence[Op]) -> None:
        self.counts["read-only"] += 1
        self._close()

        async def main() -> None:
            self.image = await load(self.files.stores(writable=False))
            await self._in_turn(ops)
            with pytest.raises(OSError, match="not open for writing"):
                await self.image.write(0, b"x")
            await self.image.fsync()
            await self.image.close()

        self._trio(main)
        self.image = self._open()
        self.disk.flushes.append((self.files.clock.tick(), self.files.clock.tick()))
        self.disk.fold(self.files.clock.tick(), {})

    @precondition(lambda self: self.files.can_cut)
    @rule(
        ops=st.one_of(sequences.map(lambda ops: [ops]), at_once), when=st.integers(0, 1000), how=st.integers(0, 1 << 30)
    )
    def power_cut(self, ops: Sequence[Sequence[Op]], when: int, how: int) -> None:
        self.counts["power cut"] += 1
        before = self.files.clock.tick()
        if len(ops) > 1:
            self.files.pace(how)
        self._trio(self._together, ops, self.disk.size)
        at = before + (self.files.clock.now - before) * when // 1000
        self.files.cut(random.Random(how), at)
        self._after_cut(at, stable=True)

    @precondition(lambda self: self.files.can_cut)
    @rule(
        change=st.one_of(sizes, sizes.map(lambda size: -size)),
        write=st.booleans(),
        when=st.integers(0, 1000),
        how=st.integers(0, 1 << 30),
    )
    def power_cut_in_resize(self, change: int, write: bool, when: int, how: int) -> None:
        size = min(max(self.disk.size + change * SECTOR, SECTOR), self.limit)
        if size == self.disk.size:
            return
        self.counts["power cut"] += 1
        payload = random.Random(how).randbytes(100 + how % 3000) if write and size > self.disk.size else b""
        before = self.files.clock.tick()
        self._trio(lambda: self._resize(size, write=payload[: size - self.disk.size]))
        at = before + (self.files.clock.now - before) * when // 1000
        self.files.cut(random.Random(how), at)
        self.cut_short |= change < 0
        self._after_cut(at, stable=True)

    @precondition(lambda self: self.files.can_cut)
    @rule(when=st.integers(0, 1000), how=st.integers(0, 1 << 30))
    def power_cut_in_close(self, when: int, how: int) -> None:
        self.counts["power cut"] += 1
        before = self.files.clock.tick()
        self._close()
        at = before + (self.files.clock.now - before) * when // 1000
        self.files.cut(random.Random(how), at)
        self._after_cut(at, stable=True)

    @precondition(lambda self: self.image.bitmap is not None)
    @rule(ops=at_once, stop=st.sampled_from((True, True, True, False)), pauses=st.integers(0, 1 << 16))
    def prefetch(self, ops: Sequence[Sequence[Op]], stop: bool, pauses: int) -> None:
        self.files.pace(pauses)
        self._run(lambda: self._prefetch(ops, stop=stop))

    @precondition(lambda self: self.files.can_cut and self.image.bitmap is not None)
    @rule(ops=at_once, when=st.integers(0, 1000), how=st.integers(0, 1 << 30), stop=st.booleans())
    def power_cut_in_prefetch(self, ops: Sequence[Sequence[Op]], when: int, how: int, stop: bool) -> None:
        self.counts["power cut"] += 1
        before = self.files.clock.tick()
        self.files.pace(how)
        self._trio(lambda: self._prefetch(ops, stop=stop))
        at = before + (self.files.clock.now - before) * when // 1000
        self.files.cut(random.Random(how), at)
        self._after_cut(at, stable=True)

    @precondition(lambda self: self.files.can_cut and self.image.bitmap is not None)
    @rule(ops=at_once, nth=st.integers(1, 60), pauses=st.integers(0, 1 << 16))
    def kill_in_prefetch(self, ops: Sequence[Sequence[Op]], nth: int, pauses: int) -> None:
        self.counts["kill"] += 1
        self.files.pace(pauses)
        with self._dying(nth):
            self._trio(lambda: self._prefetch(ops, stop=False))
        self._after_cut(self.files.clock.tick(), stable=False)

    @precondition(lambda self: self.files.can_cut)
    @rule(ops=sequences, nth=st.integers(1, 25), closes=st.booleans())
    def kill(self, ops: Sequence[Op], nth: int, closes: bool) -> None:
        """The process ends; what it had written goes on to wait in the host's memory."""
        self.counts["kill"] += 1

        async def main() -> None:
            await self._in_turn(ops)
            if closes:
                await close(self.image)

        with self._dying(nth):
            self._trio(main)
        if self.image.committer.unseen_writes:  # the kernel goes on
            self._trio(self._in_turn, [op for op in ops if op.changes])
        self._after_cut(self.files.clock.tick(), stable=False)

    @precondition(lambda self: self.files.can_cut)
    @rule(change=st.one_of(sizes, sizes.map(lambda size: -size)), nth=st.integers(1, 12))
    def kill_in_resize(self, change: int, nth: int) -> None:
        size = min(max(self.disk.size + change * SECTOR, SECTOR), self.limit)
        if size == self.disk.size:
            return
        self.counts["kill"] += 1
        with self._dying(nth):
            self._trio(self._resize, size)
        self.files.sync()
        self.cut_short |= change < 0
        self._after_cut(self.files.clock.tick(), stable=True)


# --- tests ----------------------------------------------------------------------------------------


def run(layout: Layout, files_class: Callable[[Path, Path], Files], tmp_path: Path, steps: int) -> None:
    """Run the machine until it has done so many operations."""
    built = tmp_path / "built"
    scratch = tmp_path / "scratch"
    built.mkdir()
    layout.build(built)
    counts: Counter[str] = Counter()
    members = {
        "layout": layout,
        "files_class": files_class,
        "built": built,
        "scratch": scratch,
        "counts": counts,
        "content": b"".join(reference.read_disk(built / IMAGE)),
    }
    machine: type[Machine] = type("LayoutMachine", (Machine,), members)
    profile = machine_settings(steps // STEPS_PER_EXAMPLE // 2, STEPS_PER_EXAMPLE)
    number = 0
    while counts.total() < steps:
        chosen = seed(zlib.crc32(f"{SEED} {layout.name} {number}".encode()))(machine)
        with quiet():
            run_state_machine_as_test(chosen, settings=profile)
        number += 1
    print(f"{layout.name}: {counts.total()} operations: {dict(counts)}")
    assert counts.total() >= steps


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_in_memory(layout: Layout, tmp_path: Path) -> None:
    run(layout, MemoryFiles, tmp_path, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS[::5], LAYOUTS[-1]], ids=lambda layout: layout.name)
def test_real_files(layout: Layout, tmp_path: Path) -> None:
    run(layout, RealFiles, tmp_path, STEPS // 4)
