"""Stores in memory, for tests: plain ones, ones that a power cut hits, ones whose calls fail.

All implement the `Store` protocol of `fvdfs.store.base`:

    MemoryStore   a bytearray; with `slow`, no call is done without waiting; with `fixed_size`, a device
    CrashStore    remembers what is not flushed, and says what a power cut may leave of it
    FaultStore    another store, of which planned calls fail, or end the process

`Disk` is the model to compare with: what a virtual disk holds, and what a power cut may make of it.
"""

from __future__ import annotations

import errno
import functools
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import trio

from fvdfs.image.core import Core, OwnData
from fvdfs.image.image import Image
from fvdfs.image.reading import Reads
from fvdfs.store.base import Buffer, Done, Pending, Stepwise, Store, result_of

SECTOR = 512  # a disk writes this much whole or not at all
UNIT = 4096  # bytes; what a store in memory has, or has not, taken space for
_ZEROS = bytes(UNIT)
READ_ONLY = "a store that is not writable was asked to change"


def start(call: Callable[[], Awaitable[int | None]], done: Done, result: int = 0) -> bool:
    """Start a call; it says its result, or else that is `result`."""

    async def run() -> None:
        try:
            count = await call()
        except OSError as error:
            done(-(error.errno or errno.EIO))
        except Killed:  # `_as_mounted` raises it again
            done(-errno.EIO)
        else:
            done(result if count is None else count)

    trio.lowlevel.spawn_system_task(run)
    return True


async def _as_mounted(image: Image, pending: Pending) -> int:
    """Do what a mount does: start without a task where that is possible, else have a task do it."""
    try:
        result = await result_of(pending.start)
    except OSError:
        for store in (image.data, image.meta):
            if isinstance(store, FaultStore) and store.plan.kill and store.plan.failures:
                raise Killed from None
        raise
    return await pending.finish() if result is None else result


def _file_of_kernel(image: Image) -> Store | None:
    """The data file of a disk that the kernel has: it goes on when the process has been killed."""
    if not image.committer.unseen_writes:
        return None
    data = image.data
    return data.inner if isinstance(data, FaultStore) and data.plan.kill else data


async def write_as_mounted(image: Image, offset: int, data: bytes) -> None:
    assert await _as_mounted(image, image.begin_write(offset, memoryview(bytearray(data)))) == len(data)


async def write_some_way(image: Image, offset: int, data: bytes, number: int) -> None:
    """Write: the kernel does it by itself where it has the disk; else `number` decides how."""
    if (file := _file_of_kernel(image)) is not None:
        await file.pwrite(data, offset)
    elif number % 4 == 3 and image.base_writer is None:
        await copy_in(image, offset, data)
    elif number % 2:
        await write_as_mounted(image, offset, data)
    else:
        await image.write(offset, data)


async def zero_some_way(image: Image, start: int, stop: int, number: int) -> None:
    """Have bytes read as zeros: by the kernel where it has the disk; else `number` says whether to write them."""
    if (file := _file_of_kernel(image)) is not None:
        await file.zero(start, stop - start)
    else:
        await image.zero(start, stop, discard=number % 2 > 0)


async def reserve_some_way(image: Image, start: int, stop: int) -> None:
    """Reserve space for bytes, as a mount does it."""
    if (file := _file_of_kernel(image)) is not None:
        await file.reserve(start, stop - start)
    else:
        await image.reserve(start, stop)


async def extents_as_mounted(image: Image, start: int, stop: int) -> list[tuple[int, int, bool]]:
    """Bytes [start, stop) as extents (start, stop, hole), without gap, as who seeks in the disk finds them."""
    found = []
    while start < stop:
        known = image.extent_nowait(start, stop)
        end, hole = await image.extent(start, stop)
        assert start < end <= stop
        if known is not None:
            assert known[1]
            assert hole
            assert known[0] <= end
        found.append((start, end, hole))
        start = end
    return found


class StoredDisk(Core):
    """A disk whose bytes lie in a store as they are."""

    def __init__(self, store: Store, size: int) -> None:
        self.store = store
        self.own = cast(OwnData, store)
        self.size = size

    def pieces(self, start: int, stop: int, *, down_to: Core | None = None) -> Iterator[tuple[int, int, Store, int]]:
        yield start, stop, self.store, start


async def copy_in(image: Image, offset: int, data: bytes) -> None:
    """Write what another disk has stored, by a copy."""
    stop = offset + len(data)
    if stop > image.size:
        await image.reach(stop)
    source = StoredDisk(MemoryStore(bytes(SECTOR) + data), SECTOR + len(data))
    assert await image._writes.copy(source, Reads(source), SECTOR, offset, stop) == len(data)


async def read_as_mounted(image: Image, offset: int, length: int) -> bytearray:
    """Into a buffer that was used before."""
    buffer = bytearray(b"\xa5") * length
    if (file := _file_of_kernel(image)) is not None:
        count = await file.pread(memoryview(buffer), offset)
        end = -(-await file.size() // SECTOR) * SECTOR  # where the file will end once the disk is closed
        return buffer[:count].ljust(min(length, max(0, end - offset)), b"\0")
    found = image.begin_read(offset, memoryview(buffer))
    count = found if isinstance(found, int) else await _as_mounted(image, found)
    assert buffer[count:] == b"\xa5" * (length - count)
    return buffer[:count]


async def fsync_as_mounted(image: Image) -> None:
    await _as_mounted(image, image.begin_fsync())


async def fsync_some_way(image: Image, number: int) -> None:
    """`number` decides how; the size of a disk that the kernel has may be asked for before."""
    if number % 3 == 0:
        await look(image)
    await (fsync_as_mounted(image) if number % 2 else image.fsync())


async def look(image: Image) -> None:
    """Take up the size that the kernel has given to its data file."""
    if (file := _file_of_kernel(image)) is not None:
        image.look_at_length(await file.size())


async def close(image: Image) -> None:
    """Have the kernel give up the data, and close the image."""
    await look(image)
    image.committer.end_unseen_writes(still_used=False)
    await image.close()


class MemoryStore(Stepwise):
    """Bytes in memory. Calls that need not wait do not, unless it is `slow`.

    As in a file of a file system, what was written takes space, a whole `UNIT` each, and is no hole, though it be
    zeros; a unit that was never written, or was zeroed as a whole, is one.
    """

    def __init__(
        self,
        data: Buffer = b"",
        name: str = "memory",
        *,
        writable: bool = True,
        slow: bool = False,
        pauses: random.Random | None = None,
        fixed_size: bool = False,
    ) -> None:
        """A slow call waits one turn of the scheduler, or, with `pauses`, a few as that decides."""
        self.data = bytearray(data)
        self._taken = bytearray(not _ZEROS.startswith(data[at : at + UNIT]) for at in range(0, len(data), UNIT))
        self.name = name
        self.writable = writable
        self.fixed_size = fixed_size
        self.server = "memory"
        self.can_punch = True
        """Whether it can make holes."""
        self.is_remote = False
        self.slow = slow
        self.pauses = pauses
        self.calls: Counter[str] = Counter()
        self.bytes_read = 0
        self.bytes_written = 0
        self.closed = False

    async def _wait(self, call: str) -> None:
        self._count(call)
        for _ in range(self.pauses.randrange(1, 5) if self.pauses else 1):
            await trio.lowlevel.checkpoint()

    def _count(self, call: str) -> None:
        assert not self.closed, f"{call} of a closed store"
        self.calls[call] += 1

    def _read(self, buffer: memoryview, offset: int) -> int:
        data = self.data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self.bytes_read += len(data)
        return len(data)

    def _write(self, data: Buffer, offset: int) -> None:
        assert self.writable, READ_ONLY
        if self.fixed_size and offset + len(data) > len(self.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.bytes_written += len(data)
        self._taken.extend(bytes(max(0, _units(len(self.data)) - len(self._taken))))
        first, end = offset // UNIT, _units(offset + len(data))
        if data:
            self._taken[first:end] = b"\1" * (end - first)

    def _resize(self, size: int) -> None:
        assert self.writable, READ_ONLY
        if self.fixed_size:
            if size > len(self.data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        del self._taken[_units(size) :]
        self._taken.extend(bytes(_units(size) - len(self._taken)))

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        self._count("pread_nowait")
        if self.slow or offset + len(buffer) > len(self.data):
            return False
        self._read(buffer, offset)
        return True

    def start_pread(self, buffer: memoryview, offset: int, done: Done) -> bool:
        return start(functools.partial(self.pread, buffer, offset), done)

    async def pread(self, buffer: memoryview, offset: int) -> int:
        await self._wait("pread")
        return self._read(buffer, offset)

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        return start(functools.partial(self.pwrite, data, offset), done, len(data))

    async def pwrite(self, data: Buffer, offset: int) -> None:
        await self._wait("pwrite")
        self._write(data, offset)

    async def write_out(self, offset: int, length: int) -> None:
        await self._wait("write_out")

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        await self._wait("pwrite")
        if not self.can_punch and not writes:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)
        stop = min(offset + length, len(self.data))
        if offset >= stop:
            return
        taken = self._taken[:]
        self._write(bytes(stop - offset), offset)
        if self.can_punch:
            first, end = _units(offset), _units(stop) if stop == len(self.data) else stop // UNIT
            taken[first:end] = bytes(max(0, end - first))
            self._taken[:] = taken

    async def copy(self, source: Store, where: int, offset: int, length: int) -> None:
        await self.pwrite(await _bytes_of(source, where, length), offset)

    async def reserve(self, offset: int, length: int) -> None:
        await self._wait("pwrite")
        assert self.writable, READ_ONLY

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        await self._wait("extent")
        assert start < stop, "an extent of nothing"
        if self.fixed_size:
            return stop, False
        taken = self._taken.find(1, start // UNIT)
        if taken < 0 or taken * UNIT >= stop:
            return stop, True
        if taken * UNIT > start:
            return taken * UNIT, True
        free = self._taken.find(0, taken)
        return min(stop, (free if free >= 0 else len(self._taken)) * UNIT), False

    def start_flush(self, done: Done) -> bool:
        return start(self.flush, done)

    async def flush(self) -> None:
        await self._wait("flush")

    async def size(self) -> int:
        await self._wait("size")
        return len(self.data)

    async def resize(self, size: int) -> None:
        await self._wait("resize")
        self._resize(size)

    def usage(self) -> int:
        return sum(self._taken) * UNIT

    async def aclose(self) -> None:
        self.closed = True


def _units(size: int) -> int:
    return -(-size // UNIT)


class Clock:
    """Numbers the changes of several stores, and whatever else a test notes, in one order."""

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        """The number of what happens now."""
        self.now += 1
        return self.now


@dataclass(frozen=True, slots=True)
class _Change:
    """A write; without data, a new size `offset`."""

    time: int
    offset: int
    data: bytes | None

    def sectors(self, size: int) -> range:
        """The sectors that differ afterwards, those that are only new zeros left out."""
        end = size if self.data is None else self.offset + len(self.data)
        return range(self.offset // SECTOR, -(-end // SECTOR))

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
        content.extend(bytes(max(0, self.offset - len(content))))
        if self.data is not None:
            content[self.offset : self.offset + len(self.data)] = self.data


@dataclass(frozen=True, slots=True)
class Choices:
    """What a power cut may leave: a size, and in each sector a content, the oldest first; else what is in `old`."""

    old: bytes
    sizes: tuple[int, ...]
    sectors: dict[int, tuple[bytes, ...]]

    def make(self, size: int, sectors: Iterable[tuple[int, bytes]]) -> bytes:
        """The content with these choices."""
        content = bytearray(self.old[:size].ljust(size, b"\0"))
        for sector, data in sectors:
            at = sector * SECTOR
            if at < size:
                content[at : at + SECTOR] = data[: size - at]
        return bytes(content)


class CrashStore(MemoryStore):
    """A store that knows what a power cut may leave of it.

    Stable is what was written before the begin of a flush that has ended. Of what came since, any
    part may have reached the disk, in any order, in whole sectors: each sector holds what it held
    when the flush began or what any later write left in it, and the size is any that the store has
    had since. Stores that share a `clock` can be cut at one moment.
    """

    def __init__(
        self,
        data: Buffer = b"",
        name: str = "memory",
        *,
        clock: Clock | None = None,
        slow: bool = False,
        pauses: random.Random | None = None,
        fixed_size: bool = False,
    ) -> None:
        super().__init__(data, name, slow=slow, pauses=pauses, fixed_size=fixed_size)
        self.clock = clock or Clock()
        self._start = bytearray(data)
        self._changes: list[_Change] = []
        self._flushes: list[tuple[int, int]] = []  # begin and end

    def _write(self, data: Buffer, offset: int) -> None:
        super()._write(data, offset)
        if len(data):
            self._changes.append(_Change(self.clock.tick(), offset, bytes(data)))

    def _resize(self, size: int) -> None:
        super()._resize(size)
        if not self.fixed_size:
            self._changes.append(_Change(self.clock.tick(), size, None))

    def extend(self, data: Buffer) -> None:
        """The device becomes longer at once, and holds this there; it was so at every earlier cut, too."""
        assert self.fixed_size
        self.data.extend(data)
        self._taken.extend(b"\1" * (_units(len(self.data)) - len(self._taken)))
        self._start.extend(data)

    async def flush(self) -> None:
        begin = self.clock.tick()
        await super().flush()
        self._flushes.append((begin, self.clock.tick()))

    def trim(self) -> None:
        """Forget what is stable; cuts before now are no longer asked for."""
        stable = max((begin for begin, _ in self._flushes), default=0)
        for change in self._changes:
            if change.time < stable:
                change.apply(self._start)
        self._changes = [change for change in self._changes if change.time > stable]
        self._flushes.clear()

    def choices(self, at: int) -> Choices:
        """All that a power cut at that time may leave."""
        stable = max((begin for begin, end in self._flushes if end <= at), default=0)
        content = bytearray(self._start)
        for change in self._changes:
            if change.time < stable:
                change.apply(content)
        old = bytes(content)
        sizes = {len(old): None}
        sectors: dict[int, dict[bytes, None]] = {}
        for change in self._changes:
            if not stable < change.time <= at:
                continue
            touched = change.sectors(len(content))
            for sector in touched:
                sectors.setdefault(sector, {_sector(content, sector): None})
            change.apply(content)
            sizes[len(content)] = None
            for sector in touched:
                sectors[sector][_sector(content, sector)] = None
        return Choices(old, tuple(sizes), {s: tuple(found) for s, found in sectors.items() if len(found) > 1})

    def crash(self, rng: random.Random, at: int | None = None) -> bytes:
        """What a power cut may leave; `at`: the time of the cut, by the clock, instead of now."""
        cut = self.clock.now if at is None else at
        stable = max((begin for begin, end in self._flushes if end <= cut), default=0)
        old = bytearray(self._start)
        for change in self._changes:
            if change.time < stable:
                change.apply(old)
        changes = [change for change in self._changes if stable < change.time <= cut]
        kind = rng.choice(("order", "changes", "last changes", "sectors"))
        if kind == "order":
            for change in changes[: rng.randrange(len(changes) + 1)]:
                change.apply(old)
            return bytes(old)
        content = old[:]
        sizes = [len(old)]
        versions: dict[int, list[bytes]] = {}
        for change in changes:
            sectors = change.sectors(len(content))
            for sector in sectors:
                versions.setdefault(sector, [_sector(content, sector)])
            change.apply(content)
            if kind == "sectors" or rng.random() < 0.5:
                sizes.append(len(content))
                for sector in sectors:
                    versions[sector].append(_sector(content, sector))
        size = rng.choice(sizes) if kind == "sectors" else sizes[-1]
        result = old[:size].ljust(size, b"\0")
        for sector, contents in versions.items():
            at_byte = sector * SECTOR
            if at_byte < size:
                version = contents[-1] if kind == "last changes" else rng.choice(contents)
                result[at_byte : at_byte + SECTOR] = version[: size - at_byte]
        return bytes(result)


def _sector(content: bytearray, sector: int) -> bytes:
    return bytes(content[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")


CHANGING = ("pwrite", "resize", "flush")
CALLS = ("pread", "size", *CHANGING)


class Killed(BaseException):
    """The process has been killed; what its stores hold stays."""


@dataclass(slots=True)
class FaultPlan:
    """Which call fails: the n-th, from 1 on, of these kinds, of all stores with this plan together.

    A call and its `_nowait` form are of one kind. `torn`: a write that fails has stored a part of it
    before, from the start on, about half; zeroing a range as well. `kill`: the call and all that follow raise `Killed`.
    """

    nth: int = 0
    error: int = errno.EIO
    kinds: Sequence[str] = CALLS
    for_ever: bool = False
    torn: bool = False
    kill: bool = False
    calls: int = 0
    failures: int = field(default=0, init=False)

    def fails(self, kind: str) -> bool:
        """Count a call; whether it fails."""
        if kind not in self.kinds:
            return False
        self.calls += 1
        for_ever = self.for_ever or self.kill
        if self.nth == 0 or self.calls < self.nth or (self.calls > self.nth and not for_ever):
            return False
        self.failures += 1
        return True


class FaultStore(Stepwise):
    """A store over another one, of which the calls of a plan fail."""

    def __init__(self, inner: Store, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._lost: OSError | None = None

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def writable(self) -> bool:
        return self.inner.writable

    @property
    def fixed_size(self) -> bool:
        return self.inner.fixed_size

    @property
    def server(self) -> str:
        return self.inner.server

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    def _check(self, kind: str) -> None:
        if self.plan.fails(kind):
            if self.plan.kill:
                raise Killed
            raise OSError(self.plan.error, os.strerror(self.plan.error), self.name)

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        self._check("pread")
        return self.inner.pread_nowait(buffer, offset)

    async def pread(self, buffer: memoryview, offset: int) -> int:
        self._check("pread")
        return await self.inner.pread(buffer, offset)

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        return start(functools.partial(self.pwrite, data, offset), done, len(data))

    async def pwrite(self, data: Buffer, offset: int) -> None:
        try:
            self._check("pwrite")
        except OSError:
            if self.plan.torn:
                await self.inner.pwrite(_first_half(data, offset), offset)
            raise
        await self.inner.pwrite(data, offset)

    async def write_out(self, offset: int, length: int) -> None:
        await self.inner.write_out(offset, length)

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        try:
            self._check("pwrite")
        except OSError:
            if self.plan.torn:
                await self.inner.zero(offset, len(_first_half(bytes(length), offset)), writes=writes)
            raise
        await self.inner.zero(offset, length, writes=writes)

    async def copy(self, source: Store, where: int, offset: int, length: int) -> None:
        await self.pwrite(await _bytes_of(source, where, length), offset)

    async def reserve(self, offset: int, length: int) -> None:
        self._check("pwrite")
        await self.inner.reserve(offset, length)

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        self._check("extent")
        return await self.inner.extent(start, stop)

    def start_flush(self, done: Done) -> bool:
        return start(self._flush_ahead, done)

    async def _flush_ahead(self) -> None:
        try:
            await self.flush()
        except OSError as error:
            self._lost = error
            raise

    async def flush(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._check("flush")
        await self.inner.flush()

    async def size(self) -> int:
        self._check("size")
        return await self.inner.size()

    async def resize(self, size: int) -> None:
        self._check("resize")
        await self.inner.resize(size)

    def usage(self) -> int:
        return self.inner.usage()

    async def aclose(self) -> None:
        await self.inner.aclose()


async def _bytes_of(source: Store, where: int, length: int) -> bytearray:
    """What a copy finds there. Raises OSError."""
    buffer = bytearray(length)
    if await source.pread(memoryview(buffer), where) < length:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), source.name)
    return buffer


def _first_half(data: Buffer, offset: int) -> bytes:
    """About half of what is to be written at an offset, up to a sector's end."""
    return bytes(data[: max(0, (offset + len(data) // 2) // SECTOR * SECTOR - offset)])


def trim(stores: Iterable[Store]) -> None:
    """Forget what is stable in all crash stores among these."""
    for store in stores:
        if isinstance(store, CrashStore):
            store.trim()


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class DiskWrite:
    """A write to the disk, between two times. One that failed may have changed any of its sectors."""

    start: int
    end: int
    offset: int
    data: bytes
    failed: bool = False

    def apply(self, value: bytes, sector: int) -> bytes:
        """The sector's content after it."""
        at = self.offset - sector * SECTOR
        if at >= 0:
            return value[:at] + self.data[: SECTOR - at] + value[at + len(self.data) :]
        return self.data[-at : SECTOR - at] + value[len(self.data) + at :]


@dataclass(frozen=True, slots=True)
class Resize:
    """A change of the disk's size, between two times, to `size`."""

    start: int
    end: int
    size: int
    stable: bool = True
    """Whether a cut after its end keeps it; else it takes a flush."""


class Disk:
    """What a virtual disk holds, and what it may hold after a power cut, sector by sector.

    After a cut, a sector holds what it held at the last completed flush, or what some write left in
    it that came later. Sectors are written whole or not at all. Operations are logged with the times
    of their begin and end; those that overlap in time may have happened in any order. `fold` closes
    the log; cuts are asked about after it only.
    """

    def __init__(self, content: Buffer) -> None:
        self.content = bytearray(content)
        self.maybe: dict[int, set[bytes]] = {}
        """Sectors that a cut may leave with something else than what they hold."""
        self.unknown: set[int] = set()
        """Sectors that a cut may leave with anything."""
        self.sizes: set[int] = set()
        """Other sizes that a cut may leave."""
        self.unflushed_sizes: set[int] = set()
        """Those among them that a flush ends."""
        self.writes: list[DiskWrite] = []
        self.flushes: list[tuple[int, int]] = []
        self.resize: Resize | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    def _touched(self, at: int | None = None) -> dict[int, list[DiskWrite]]:
        touched: dict[int, list[DiskWrite]] = {}
        for write in self.writes:
            if at is None or write.start <= at:
                for sector in range(write.offset // SECTOR, -(-(write.offset + len(write.data)) // SECTOR)):
                    touched.setdefault(sector, []).append(write)
        return touched

    def _old(self, sector: int) -> bytes:
        return _sector(self.content, sector)

    def _flushed(self, at: int) -> int:
        """The begin of the last flush that had ended by then; 0: none since the log began."""
        return max((start for start, end in self.flushes if end <= at), default=0)

    def _after_cut(self, sector: int, writes: Sequence[DiskWrite], flushed: int) -> set[bytes]:
        must = [write for write in writes if write.end < flushed and not write.failed]
        found = _values(self._old(sector), sector, writes, must)
        return found if flushed else found | self.maybe.get(sector, set())

    def check_read(self, offset: int, data: Buffer, start: int, end: int) -> None:
        """Whether a read between these times may have had this result."""
        stop = offset + len(data)
        expected = self.content[offset:stop].ljust(len(data), b"\0")
        for sector, writes in self._touched(end).items():
            low, high = max(offset, sector * SECTOR), min(stop, (sector + 1) * SECTOR)
            if low < high:
                must = [w for w in writes if w.end < start and not w.failed]
                part = bytes(data[low - offset : high - offset])
                inside = slice(low - sector * SECTOR, high - sector * SECTOR)
                options = {value[inside] for value in _values(self._old(sector), sector, writes, must)}
                assert part in options, f"bytes {low}..{high} hold what nobody wrote, or no longer could"
                expected[low - offset : high - offset] = part
        assert data == expected, f"bytes {offset}..{stop} differ: the first at {_differ(data, expected, offset)}"

    def unsure(self) -> list[int]:
        """The sectors whose content depends on the order of what was logged, or on what failed."""
        return [
            sector
            for sector, writes in self._touched().items()
            if any(w.failed for w in writes)
            or any(a.start < b.end and b.start < a.end for at, a in enumerate(writes) for b in writes[:at])
        ]

    def fold(self, now: int, seen: dict[int, bytes]) -> None:
        """Close the log; `seen`: what was read, after all of it, of the unsure sectors."""
        flushed = self._flushed(now)
        touched = self._touched()
        after_cut = {sector: self._after_cut(sector, writes, flushed) for sector, writes in touched.items()}
        if flushed:
            self.maybe.clear()
            self.unknown.clear()
        self.unflushed_sizes = self._unflushed_sizes(now)
        for sector, writes in touched.items():
            if sector in seen:
                value = seen[sector]
                must = [write for write in writes if not write.failed]
                assert value in _values(self._old(sector), sector, writes, must), f"sector {sector} after all writes"
            else:
                value = self._old(sector)
                for write in writes:
                    value = write.apply(value, sector)
            self.maybe[sector] = after_cut[sector]
            self._put(sector, value)
        if self.resize is not None:
            self._set_size(self.resize.size)
        self._forget_log()

    def _unflushed_sizes(self, at: int) -> set[int]:
        """The earlier sizes that a cut at that time may leave, after a growth that was not flushed."""
        flushed, resize = self._flushed(at), self.resize
        found = set() if flushed else set(self.unflushed_sizes)
        if resize is not None and resize.end <= at:
            if resize.stable or flushed > resize.end:
                return set()
            found.add(self.size)
        return found

    def _put(self, sector: int, value: bytes) -> None:
        at = sector * SECTOR
        self.content.extend(bytes(max(0, at + SECTOR - len(self.content))))
        self.content[at : at + SECTOR] = value

    def _set_size(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        self.maybe = {sector: values for sector, values in self.maybe.items() if sector * SECTOR < size}
        self.unknown = {sector for sector in self.unknown if sector * SECTOR < size}

    def _forget_log(self) -> None:
        self.writes.clear()
        self.flushes.clear()
        self.resize = None

    def check_cut(self, found: Buffer, at: int) -> None:
        """Whether a cut at that time may have left this."""
        sizes = self.sizes | {self.size}
        unflushed = self._unflushed_sizes(at)
        free = len(found)  # from here on anything may stand
        if self.resize is not None and self.resize.start <= at:
            sizes = {self.resize.size} | (sizes if at < self.resize.end else set())
            if self.resize.size < self.size:
                free = self.resize.size
        sizes |= unflushed
        assert len(found) in sizes, f"{len(found)} bytes after a cut, not one of {sizes}"
        touched = self._touched(at)
        flushed = self._flushed(at)
        expected = self.content[: len(found)]
        expected.extend(bytes(len(found) - len(expected)))
        differ = {sector for sector in touched if sector * SECTOR < len(found)}
        for sector in differ:
            expected[sector * SECTOR : (sector + 1) * SECTOR] = found[sector * SECTOR : (sector + 1) * SECTOR]
        if found != expected:
            for piece in range(0, len(found), 32 * SECTOR):
                if found[piece : piece + 32 * SECTOR] != expected[piece : piece + 32 * SECTOR]:
                    differ.update(range(piece // SECTOR, min(piece // SECTOR + 32, len(found) // SECTOR)))
        for sector in sorted(differ):
            if sector * SECTOR >= free or (sector in self.unknown and not flushed):
                continue
            value = bytes(found[sector * SECTOR : (sector + 1) * SECTOR])
            options = self._after_cut(sector, touched.get(sector, []), flushed)
            what = "flushed" if len(options) == 1 else f"one of {len(options)} contents"
            assert value in options, f"sector {sector} is not what it must be after a cut ({what})"

    def after_cut(self, found: Buffer, *, stable: bool = True) -> None:
        """The disk holds this from now on; without `stable`, another cut may still leave something else."""
        if stable:
            self.maybe.clear()
            self.unknown.clear()
            self.unflushed_sizes.clear()
        else:
            now = max([w.end for w in self.writes] + [end for _, end in self.flushes], default=0)
            flushed = self._flushed(now)
            after_cut = {s: self._after_cut(s, writes, flushed) for s, writes in self._touched().items()}
            self.unflushed_sizes = self._unflushed_sizes(now)
            if flushed:
                self.maybe.clear()
            for sector in range(min(len(found), self.size) // SECTOR):
                if sector not in after_cut and self._old(sector) != found[sector * SECTOR : (sector + 1) * SECTOR]:
                    self.maybe.setdefault(sector, set()).add(self._old(sector))
            for sector, values in after_cut.items():
                self.maybe.setdefault(sector, set()).update(values)
        self.content[:] = found
        self._forget_log()


def _values(old: bytes, sector: int, writes: Sequence[DiskWrite], must: Collection[DiskWrite]) -> set[bytes]:
    """The sector after each part, with all of `must`, of each order of the writes that their times permit."""
    if len(writes) == 1:
        new = writes[0].apply(old, sector)
        return {new} if must else {old, new}
    found: set[bytes] = set()

    def go(value: bytes, done: tuple[DiskWrite, ...]) -> None:
        if all(write in done for write in must):
            found.add(value)
        for write in writes:
            if write in done or any(write.end < other.start for other in done):
                continue
            if all(other in done or other.failed or other.end > write.start for other in writes if other is not write):
                go(write.apply(value, sector), (*done, write))

    go(old, ())
    return found


def _differ(data: Buffer, expected: Buffer, offset: int) -> int:
    return offset + next((at for at, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), len(expected))
