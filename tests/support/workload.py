"""One workload for every layout, and calls to a store failing in turn.

It begins with the replay of an image that was not closed, and ends with closing it. With the first of `FAULTS` each
call fails, with the others one of `STRIDE`, others in each layout; FVDFS_FAULTS=all has each call fail with all.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import trio

from fvdfs.errors import FvdError
from fvdfs.image.image import Image
from fvdfs.store.base import Store
from support.builder import KIB, Layout, read_files
from support.crash import Survivors, open_for_writing
from support.fakes import (
    CALLS,
    SECTOR,
    Clock,
    Disk,
    DiskWrite,
    FaultPlan,
    FaultStore,
    MemoryStore,
    Resize,
    close,
    fsync_some_way,
    reserve_some_way,
    write_some_way,
    zero_some_way,
)

NEVER = 1 << 60


def small(layout: Layout) -> Layout:
    """The layout with a disk of about a sixth."""
    return replace(
        layout,
        size=layout.size // 6 // SECTOR * SECTOR,
        base_length=layout.base_length // 6 | layout.base_length & 1,
    )


class Unreadable(Exception):
    """The workload cannot look at what it did."""


class Workload:
    """The operations, logged in a model; what fails may be half done."""

    def __init__(self, image: Image, disk: Disk, clock: Clock) -> None:
        self.image = image
        self.disk = disk
        self.clock = clock
        self.errors: list[OSError | FvdError] = []
        self.rng = random.Random(1)

    async def write(self, offset: int, length: int, *, zero: bool = False) -> None:
        """Write random bytes; `zero`: have the range read as zeros instead."""
        offset = min(max(0, offset), self.disk.size - 1)
        length = min(length, self.disk.size - offset)
        data = bytes(length) if zero else self.rng.randbytes(length)
        start = self.clock.tick()
        try:
            if zero:
                await zero_some_way(self.image, offset, offset + length, start)
            else:
                await write_some_way(self.image, offset, data, start)
        except OSError as error:
            self.errors.append(error)
            self.disk.writes.append(DiskWrite(start, self.clock.tick(), offset, data, failed=True))
        else:
            self.disk.writes.append(DiskWrite(start, self.clock.tick(), offset, data))

    async def reserve(self, offset: int, length: int) -> None:
        try:
            await reserve_some_way(self.image, offset, offset + length)
        except OSError as error:
            self.errors.append(error)

    async def flush(self) -> None:
        start = self.clock.tick()
        try:
            await fsync_some_way(self.image, start)
        except OSError as error:
            self.errors.append(error)
        else:
            self.disk.flushes.append((start, self.clock.tick()))

    async def _late_flush(self) -> None:
        """A flush that begins while another is at work."""
        await trio.lowlevel.checkpoint()
        await self.flush()

    async def resize(self, size: int) -> None:
        await self.fold()
        start = self.clock.tick()
        try:
            await self.image.resize(size, shrink=True)
        except OSError as error:
            self.errors.append(error)
            await self._half_resized(size)
        else:
            self.disk.resize = Resize(start, self.clock.tick(), size)
        await self.fold()

    async def _half_resized(self, size: int) -> None:
        """A resize has failed. The size is the old or the new one; what it was to cut off may be anything."""
        assert self.image.size in (size, self.disk.size)
        low = min(size, self.disk.size)
        self.disk.sizes |= {size, self.disk.size}
        self.disk.unknown |= set(range(low // SECTOR, self.image.size // SECTOR))
        rest = await self._read(low, self.image.size - low)
        grown = max(0, self.image.size - self.disk.size)
        assert not any(rest[len(rest) - grown :]), "a disk that has grown is not zeros"
        self.disk.content[low:] = rest

    async def _read(self, offset: int, length: int) -> bytes:
        """Try twice. Raises Unreadable."""
        for _ in range(2):
            try:
                return bytes(await self.image.read(offset, length))
            except OSError as error:
                self.errors.append(error)
        raise Unreadable

    async def fold(self) -> None:
        """Close the log of the model, after a look at what failed or overlapped."""
        seen = {}
        for sector in self.disk.unsure():
            seen[sector] = await self._read(sector * SECTOR, SECTOR)
        self.disk.fold(self.clock.tick(), seen)

    async def check(self) -> None:
        """Read all of the disk."""
        start = self.clock.tick()
        try:
            found = await self.image.read(0, self.disk.size)
        except OSError as error:
            self.errors.append(error)
        else:
            self.disk.check_read(0, found, start, self.clock.tick())

    async def first_part(self) -> None:
        header = self.image.header
        block, chunk = header.block_size or 4096, header.chunk_size or 16 * KIB
        base = header.base_img_size
        await self.write(0, 512)
        await self.write(block - 100, 200)
        await self.write(5 * chunk + 100, chunk)
        await self.flush()
        await self.write(base - 700, 1900)
        await self.write(3 * block + 512, 2 * block, zero=True)
        await self.write(block - 100, 300)
        await self.reserve(7 * chunk, 3 * chunk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.write, 9 * chunk, 700)
            nursery.start_soon(self.write, 9 * chunk + 600, 9000)
            nursery.start_soon(self.flush)
        await self.write(0, 20 * KIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.flush)
            nursery.start_soon(self._late_flush)
        await self.check()

    async def second_part(self) -> None:
        size = self.disk.size
        await self.write(size - 5000, 5000)
        await self.write(size - 40 * KIB, 1000)
        await self.write(size - 4000, 3000, zero=True)
        await self.flush()
        await self.write(size // 2, 3000)

    async def run(self) -> None:
        await self.first_part()
        size = self.disk.size
        await self.resize(size - 21 * SECTOR)
        await self.second_part()
        await self.resize(self.disk.size + 30 * SECTOR)
        await self.second_part()
        await self.check()
        await self.fold()

    async def close(self) -> bool:
        """Whether it worked."""
        start = self.clock.tick()
        try:
            await close(self.image)
        except OSError as error:
            self.errors.append(error)
            return False
        if self.image.committer.failed is None:
            self.disk.flushes.append((start, self.clock.tick()))
        return self.image.committer.failed is None


def unclean_image(layout: Layout, folder: Path) -> tuple[dict[str, bytes], bytes]:
    """The files of an image that was written and flushed but not closed, and its content."""
    layout.build(folder)
    stores = {name: MemoryStore(content, name) for name, content in read_files(folder).items()}

    async def main() -> bytes:
        image = await open_for_writing(layout, stores)
        rng = random.Random(2)
        for _ in range(3):
            await image.write(rng.randrange(image.size - 3000), rng.randbytes(3000))
            await image.fsync()
        return bytes(await image.read(0, image.size))

    content = trio.run(main)
    return {name: bytes(store.data) for name, store in stores.items()}, content


STRIDE = 1 if os.environ.get("FVDFS_FAULTS") == "all" else 3
FAULTS = {
    "EIO once": (errno.EIO, False, False),
    "EIO for ever, torn": (errno.EIO, True, True),
    "ENOSPC once": (errno.ENOSPC, False, False),
    "ENOSPC for ever": (errno.ENOSPC, True, False),
    "ENOSPC once, torn": (errno.ENOSPC, False, True),
}


def inject_faults(layout: Layout, fault: str, tmp_path: Path) -> int:
    """Calls fail in turn; how many there were."""
    error, for_ever, torn = FAULTS[fault]
    stride = 1 if fault == next(iter(FAULTS)) else STRIDE
    kinds = CALLS if error == errno.EIO else ("pwrite", "resize")
    built, folder = tmp_path / "built", tmp_path / "left"
    built.mkdir()
    folder.mkdir()
    files, content = unclean_image(layout, built)
    survivors = Survivors(layout, folder)
    first = random.Random(layout.name + fault).randint(1, stride)
    for nth in itertools.count(first, stride):
        plan = FaultPlan(nth, error, kinds, for_ever=for_ever, torn=torn)
        inner = {name: MemoryStore(data, name) for name, data in files.items()}
        try:
            work = trio.run(_run_with_faults, layout, {n: FaultStore(s, plan) for n, s in inner.items()}, content)
            left = {name: store.data for name, store in inner.items()}
            closed = work is not None and work.closed
            found = survivors.content(left, closed=closed, cut_short=work is not None and bool(work.errors))
            if work is None:
                assert found == content
            else:
                _check_after_fault(work, found, error, for_ever)
        except BaseException as caught:
            caught.add_note(f"with call {nth} failing")
            raise
        if not plan.failures:
            break
    return nth - 1


class FaultyWorkload(Workload):
    closed = False


async def _run_with_faults(layout: Layout, stores: Mapping[str, Store], content: bytes) -> FaultyWorkload | None:
    clock = Clock()
    try:
        image = await open_for_writing(layout, stores)
    except (OSError, FvdError):
        return None
    work = FaultyWorkload(image, Disk(content), clock)
    try:
        await work.run()
    except* Unreadable:
        with contextlib.suppress(OSError):
            await close(image)
    else:
        work.closed = await work.close()
    return work


def _check_after_fault(work: FaultyWorkload, found: bytes, error: int, for_ever: bool) -> None:
    """All flushed data is there; after want of space that is over, all data."""
    if error == errno.ENOSPC and not for_ever:
        assert work.image.committer.failed is None, "want of space must not end all writing"
        assert len(work.errors) <= 2
        if not work.closed:
            assert any(e.errno == errno.ENOSPC for e in work.errors if isinstance(e, OSError))
    now = work.clock.tick()
    if work.closed:
        assert len(found) == work.disk.size
        work.disk.check_read(0, found, now, now)
        return
    work.disk.check_cut(found, now)
