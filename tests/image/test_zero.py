"""Ranges of a disk that are zeroed, reserved, and asked for holes, in each layout: content, space, what is read for it.

Power cuts at all of it: `support/crash.py`, "punching". Through a mount: `ops/test_fallocate.py`.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from fvdfs.cow.fetching import Fetcher
from fvdfs.format.creation import CreateOptions
from fvdfs.image.core import LastExtents
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image
from fvdfs.image.map import image_map, totals
from fvdfs.image.policy import Policy
from fvdfs.image.writing import CHUNKS_PER_SLICE
from fvdfs.store.base import Buffer, Store, next_data
from support import reference
from support.builder import IMAGE, KIB, create, load, read_files
from support.fakes import (
    FaultPlan,
    FaultStore,
    MemoryStore,
    extents_as_mounted,
    write_as_mounted,
)
from support.mounts import MIB, must

SIZE = 192 * KIB
BASE = random.Random(1).randbytes(120 * KIB + 512)
SOME = random.Random(2).randbytes(SIZE)


def over_base(block: int, chunk: int = 0, *, base_size: int = len(BASE), **more: object) -> CreateOptions:
    options: dict[str, object] = {"base_img": "base.raw", "block_size": block, **more}
    if chunk:
        options |= {"compact": True, "chunk_size": chunk, "grow_unit": chunk}
    return CreateOptions(**options)  # type: ignore[arg-type]


LAYOUTS = {
    "flat": CreateOptions(),
    "data file": CreateOptions(data_file="data"),
    "cow": over_base(8 * KIB),
    "cow, blocks of no whole page": over_base(7680),
    "cow, data file": over_base(8 * KIB, data_file="data"),
    "compact": CreateOptions(compact=True, chunk_size=4 * KIB, grow_unit=4 * KIB),
    "compact cow, long blocks": over_base(64 * KIB, 4 * KIB),
    "compact cow, long chunks": over_base(4 * KIB, 16 * KIB),
    "write-through": over_base(8 * KIB, update_base="writethrough"),
    "write-back": over_base(8 * KIB, update_base="writeback"),
    "write-back, compact": over_base(8 * KIB, 16 * KIB, update_base="writeback"),
}
RANGES = {
    "a part of a block": (9 * KIB, 9 * KIB + 700),
    "parts of two": (15 * KIB + 100, 17 * KIB + 1),
    "many blocks": (20 * KIB + 77, 90 * KIB + 1),
    "whole blocks": (64 * KIB, 128 * KIB),
    "across the base's end": (100 * KIB + 3, 150 * KIB + 3),
    "behind it": (130 * KIB, 140 * KIB),
    "all": (0, SIZE),
    "past the disk": (SIZE - 5 * KIB, 1 << 62),
    "nothing": (5000, 5000),
    "behind the disk": (SIZE, SIZE + 4096),
}


@dataclass
class Bench:
    """An image that is open for writing, over stores in memory, and what its disk holds."""

    image: Image
    stores: dict[str, MemoryStore]
    content: bytearray

    @property
    def data(self) -> MemoryStore:
        return self.stores[self.image.header.data_file or IMAGE]

    async def write(self, offset: int, data: bytes) -> None:
        await self.image.write(offset, data)
        self.content[offset : offset + len(data)] = data

    async def zero(self, start: int, stop: int, *, discard: bool = False) -> None:
        await self.image.zero(start, stop, discard=discard)
        end = min(stop, len(self.content))
        self.content[start:end] = bytes(max(0, end - start))

    async def check(self) -> None:
        """It holds that; so does who opens it again; and its extents are right."""
        assert await self.image.read(0, self.image.size) == self.content
        for start, stop, hole in await extents_as_mounted(self.image, 0, self.image.size):
            assert not (hole and any(self.content[start:stop]))

    async def check_closed(self, folder: Path) -> None:
        await self.image.close()
        for name, store in self.stores.items():
            (folder / name).write_bytes(store.data)
        assert reference.check(folder / IMAGE, "fvdfs") == []
        assert b"".join(reference.read_disk(folder / IMAGE)) == self.content


def make(folder: Path, layout: str) -> dict[str, bytes]:
    options = LAYOUTS[layout]
    (folder / "base.raw").write_bytes(BASE)
    create(folder / IMAGE, SIZE, options, base_length=len(BASE) if options.base_img else None)
    return read_files(folder)


@asynccontextmanager
async def opened(
    files: Mapping[str, bytes], *, stored: Callable[[MemoryStore], Store] = lambda store: store, spawn: bool = False
) -> AsyncIterator[Bench]:
    """`stored`: what stands for each store of the image; `spawn`: whether it may work in the background."""
    stores = {name: MemoryStore(data, name) for name, data in files.items()}
    async with trio.open_nursery() as nursery:
        image = await load(
            {name: stored(store) for name, store in stores.items()}, spawn=nursery.start_soon if spawn else None
        )
        await image.begin_writing()
        content = bytearray(BASE if image.header.base_img else b"").ljust(SIZE, b"\0")
        yield Bench(image, stores, content)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_what_is_zeroed_reads_as_zeros(tmp_path: Path, layout: str, where: str, discard: bool) -> None:
    """And nothing else changes: over what was never written, what was, and both; open, and closed."""
    start, stop = RANGES[where]
    async with opened(make(tmp_path, layout)) as bench:
        if discard:
            await bench.write(11 * KIB, SOME[: 30 * KIB])
            await bench.write(118 * KIB, SOME[: 9 * KIB])
            await bench.image.fsync()
        await bench.zero(start, stop, discard=discard)
        await bench.check()
        await bench.image.fsync()
        await bench.write(start // 2, b"again")
        await bench.check()
        updates = bool(bench.image.header.write_updates_base_img)
        await bench.check_closed(tmp_path)
        if updates:
            base = bytes(bench.stores["base.raw"].data)
            assert base == bench.content[: len(base)]
            assert len(base) == len(BASE)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_space_is_given_back(tmp_path: Path, layout: str) -> None:
    """All of it, where a disk is zeroed that was full; what was not there takes none."""
    async with opened(make(tmp_path, layout)) as bench:
        await bench.zero(0, SIZE)
        empty = bench.data.usage()
        await bench.write(0, SOME)
        assert bench.data.usage() >= empty + SIZE - 4 * KIB
        await bench.zero(0, SIZE, discard=True)
        assert bench.data.usage() <= empty
        await bench.write(0, SOME)
        await bench.zero(32 * KIB, 96 * KIB, discard=True)
        assert bench.data.usage() <= empty + SIZE - 56 * KIB
        assert await next_data(bench.image, 40 * KIB, SIZE) >= 88 * KIB
        await bench.check()
        await bench.image.close()


@pytest.mark.parametrize(
    ("layout", "start", "stop", "parts"),
    [
        ("cow", 10 * KIB, 90 * KIB + 512, 2 * KIB + 6 * KIB - 512),
        ("cow", 16 * KIB, 90 * KIB, 6 * KIB),
        ("cow", 16 * KIB, 80 * KIB, 0),
        ("cow", 0, SIZE, 0),
        ("cow", 100 * KIB, 119 * KIB, 4 * KIB + KIB),
        ("cow", 121 * KIB, SIZE, 0),
        ("compact cow, long blocks", 10 * KIB, 90 * KIB, 10 * KIB + len(BASE) - 90 * KIB),
        ("compact cow, long chunks", 5 * KIB, 90 * KIB, KIB + 2 * KIB),
    ],
)
async def test_only_the_ends_of_blocks_are_read_from_the_base(
    tmp_path: Path, layout: str, start: int, stop: int, parts: int
) -> None:
    async with opened(make(tmp_path, layout)) as bench:
        await bench.zero(start, stop)
        assert bench.stores["base.raw"].bytes_read == parts
        await bench.zero(start, stop)
        assert bench.stores["base.raw"].bytes_read == parts, "they are local now"
        await bench.check()
        await bench.image.close()


async def test_a_disk_that_was_never_used_stays_so(tmp_path: Path) -> None:
    """What reads as zeros already takes nothing: no length, no chunk, no commit that says that the image is in use."""
    for layout in ("flat", "data file", "compact"):
        async with opened(make(tmp_path, layout)) as bench:
            before = {name: bytes(store.data) for name, store in bench.stores.items()}
            await bench.zero(0, SIZE)
            assert {name: bytes(store.data) for name, store in bench.stores.items()} == before
            assert bench.image.extent_nowait(0, SIZE) == ((SIZE, True) if layout == "compact" else None)
            assert await bench.image.extent(0, SIZE) == (SIZE, True)
            await bench.check_closed(tmp_path)


async def test_a_chunk_of_the_bases_range_gets_a_place_and_others_none(tmp_path: Path) -> None:
    async with opened(make(tmp_path, "compact cow, long chunks")) as bench:
        await bench.zero(0, SIZE)
        assert bench.image.table is not None
        assert bench.image.table.allocated() == -(-len(BASE) // (16 * KIB))
        await bench.check_closed(tmp_path)


# --- beside others ----------------------------------------------------------------------------------


class Held(MemoryStore):
    """Zeroing, or a write without a task, waits until it may go on."""

    def __init__(self, data: Buffer, name: str) -> None:
        super().__init__(data, name)
        self.holds = ""
        self.begun, self.goes_on = trio.Event(), trio.Event()

    async def _wait(self, call: str) -> None:
        if self.holds == call:
            self.holds = ""
            self.begun.set()
            await self.goes_on.wait()
        await super()._wait(call)

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        if self.holds == "zero":
            self.holds = "pwrite"
        await super().zero(offset, length, writes=writes)


async def held_image(folder: Path, layout: str, nursery: trio.Nursery) -> tuple[Image, Held]:
    """An image whose own file is a `Held`; its fetcher may copy."""
    files = make(folder, layout)
    stores = {name: MemoryStore(data, name) for name, data in files.items()}
    held = stores[IMAGE] = Held(files[IMAGE], IMAGE)
    image = await load(stores, spawn=nursery.start_soon)
    await image.begin_writing()
    return image, held


async def begun(held: Held, kind: str, work: Callable[[], Awaitable[None]], nursery: trio.Nursery) -> None:
    """Have this wait in the middle of a call."""
    held.holds = kind
    nursery.start_soon(work)
    with trio.fail_after(60):
        await held.begun.wait()


async def ends(work: Callable[[], Awaitable[object]], *, waits: bool) -> None:
    """Whether it ends while others wait."""
    with trio.move_on_after(0.05) as scope:
        await work()
    assert scope.cancelled_caught == waits


@pytest.mark.parametrize("first", ["zero", "write"])
async def test_blocks_that_are_not_local_are_filled_by_one_at_a_time(tmp_path: Path, first: str) -> None:
    """A write and a zero in the same block wait for each other; neighbours do not."""

    async def zero() -> None:
        await image.zero(17 * KIB, 20 * KIB)

    async def write() -> None:
        await write_as_mounted(image, 21 * KIB, b"w" * KIB)

    async with trio.open_nursery() as nursery:
        image, held = await held_image(tmp_path, "cow", nursery)
        one, other = (zero, write) if first == "zero" else (write, zero)
        await begun(held, "zero" if first == "zero" else "pwrite", one, nursery)
        await ends(lambda: image.write(24 * KIB, b"n" * 8 * KIB), waits=False)
        await ends(lambda: image.zero(0, 9 * KIB), waits=False)
        assert bytes(await image.read(16 * KIB, 8 * KIB)) == BASE[16 * KIB : 24 * KIB], "no bit before all is stored"
        nursery.start_soon(other)
        await trio.testing.wait_all_tasks_blocked()
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        expected = BASE[16 * KIB : 17 * KIB] + bytes(3 * KIB) + BASE[20 * KIB : 21 * KIB]
        expected += b"w" * KIB + BASE[22 * KIB : 24 * KIB] + b"n" * 8 * KIB
        assert await image.read(16 * KIB, 16 * KIB) == expected
        assert not image._locks
        await image.close()


async def test_zeros_beside_copies_from_the_base(tmp_path: Path) -> None:
    """A copy that was read before never overwrites them; the fetcher asks for no block that is being zeroed."""
    async with trio.open_nursery() as nursery:
        image, held = await held_image(tmp_path, "cow", nursery)
        fetcher = image.start_fetching(copy_on_read=True)
        assert isinstance(fetcher, Fetcher)
        stale = memoryview(bytearray(BASE[: 64 * KIB]))
        await begun(held, "zero", lambda: image.zero(16 * KIB, 32 * KIB), nursery)
        assert await image.store_copy(0, stale) == 48 * KIB, "all but what is claimed"
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await image.store_copy(0, stale) == 0
        await image.zero(70 * KIB, 75 * KIB)
        assert await image.read(0, 80 * KIB) == (
            BASE[: 16 * KIB] + bytes(16 * KIB) + BASE[32 * KIB : 70 * KIB] + bytes(5 * KIB) + BASE[75 * KIB : 80 * KIB]
        )
        await image.close()


@pytest.mark.parametrize("layout", ["cow", "compact cow, long chunks", "compact"])
async def test_a_shrink_waits_for_zeros_and_zeros_for_a_shrink(tmp_path: Path, layout: str) -> None:
    async with trio.open_nursery() as nursery:
        image, held = await held_image(tmp_path, layout, nursery)
        await image.write(0, SOME)
        await begun(held, "zero", lambda: image.zero(8 * KIB, SIZE), nursery)
        nursery.start_soon(lambda: image.resize(100 * KIB, shrink=True))
        await trio.testing.wait_all_tasks_blocked()
        assert image.size == SIZE
        nursery.start_soon(lambda: image.zero(4 * KIB, SIZE))
        nursery.start_soon(lambda: image.zero(150 * KIB, SIZE))
        nursery.start_soon(lambda: image.reserve(99 * KIB, SIZE))
        await trio.testing.wait_all_tasks_blocked()
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert image.size == 100 * KIB
        assert await image.read(0, SIZE) == SOME[: 4 * KIB] + bytes(96 * KIB)
        await image.resize(SIZE)
        assert await image.read(0, SIZE) == (SOME[: 4 * KIB]).ljust(SIZE, b"\0")
        await image.close()


async def test_a_base_of_which_all_is_zeroed_is_let_go(tmp_path: Path) -> None:
    """Also while zeros are under way, in blocks that are local."""
    async with trio.open_nursery() as nursery:
        image, held = await held_image(tmp_path, "cow", nursery)
        await image.zero(0, 100 * KIB)
        await begun(held, "zero", lambda: image.zero(90 * KIB, SIZE), nursery)
        assert not await image.release_base()
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        held.begun, held.goes_on = trio.Event(), trio.Event()
        await image.write(0, SOME)
        await begun(held, "zero", lambda: image.zero(5 * KIB, SIZE - 5), nursery)
        assert await image.release_base()
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert image.bitmap is None
        expected = SOME[: 5 * KIB] + bytes(SIZE - 5 * KIB - 5) + SOME[-5:]
        assert await image.read(0, SIZE) == expected
        await image.close()
        again = await load({IMAGE: MemoryStore(held.data, IMAGE)})
        assert await again.read(0, SIZE) == expected


# --- what fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_each_call_that_fails(tmp_path: Path, layout: str, error: int) -> None:
    """Nothing outside the range changes, and within it each sector is old or zero; then it works."""
    start, stop = 15 * KIB + 100, 150 * KIB + 300
    files = make(tmp_path, layout)
    for nth in range(1, 100):
        plan = FaultPlan(0, error, ("pwrite", "resize", "pread"))
        async with opened(files, stored=lambda store, plan=plan: FaultStore(store, plan)) as bench:  # type: ignore[misc]
            image = bench.image
            await bench.write(118 * KIB, SOME[: 9 * KIB])
            await image.fsync()
            if nth % 2:
                await bench.write(40 * KIB, SOME[: 20 * KIB])
            old = bytes(bench.content)
            plan.nth, plan.calls = nth, 0
            try:
                await image.zero(start, stop, discard=nth % 3 == 0)
            except OSError as caught:
                is_discard = nth % 3 == 0 and error == errno.ENOSPC  # one that takes space
                assert caught.errno in ((error, errno.EOPNOTSUPP) if is_discard else (error,))
            failed, plan.nth = plan.failures > 0, 0
            found = await image.read(0, SIZE)
            assert found[:start] == old[:start]
            assert found[stop:] == old[stop:]
            for at in range(start, stop):
                if found[at]:
                    assert found[at : at + 512 - at % 512] == old[at : at + 512 - at % 512][: len(found[at:])]
                    break
            assert not image._locks
            assert not image.in_use
            await bench.zero(start, stop)
            await bench.check()
            await bench.check_closed(tmp_path)
        if not failed:
            break
    assert nth > 1 or layout in ("flat", "data file", "compact")


@pytest.mark.parametrize("layout", ["flat", "cow", "compact"])
async def test_a_storage_without_holes(tmp_path: Path, layout: str) -> None:
    """Zeros are written only where that was permitted."""
    async with opened(make(tmp_path, layout)) as bench:
        await bench.write(0, SOME)
        bench.stores[IMAGE].can_punch = False
        with pytest.raises(OSError) as caught:
            await bench.image.zero(0, SIZE, discard=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        await bench.check()
        await bench.zero(100, SIZE - 100)
        await bench.check()
        await bench.image.close()


async def test_an_image_that_may_not_be_written(tmp_path: Path) -> None:
    image = await load({name: MemoryStore(data, name, writable=False) for name, data in make(tmp_path, "cow").items()})
    for call in (image.zero(0, 4096), image.reserve(0, 4096), image.reach(SIZE + 4096)):
        with pytest.raises(OSError) as caught:
            await call
        assert caught.value.errno == errno.EROFS
    await image.close()
    async with opened(make(tmp_path, "cow")) as bench:
        bench.image.committer.fail("broken")
        for call in (bench.image.zero(0, 4096), bench.image.reserve(0, 4096), bench.image.reach(SIZE + 4096)):
            with pytest.raises(OSError) as caught:
                await call
            assert caught.value.errno == errno.EIO
        assert bench.stores[IMAGE].bytes_written == 0


@pytest.mark.parametrize("layout", ["cow", "compact cow, long chunks"])
async def test_an_image_that_fails_meanwhile_is_left_alone(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of a long range that come after the failure are not begun."""
    monkeypatch.setattr("fvdfs.image.writing.CHUNKS_PER_SLICE", 1)
    async with trio.open_nursery() as nursery:
        image, held = await held_image(tmp_path, layout, nursery)
        errors: list[int | None] = []

        async def zero() -> None:
            try:
                await image.zero(0, SIZE)
            except OSError as error:
                errors.append(error.errno)

        await begun(held, "zero", zero, nursery)
        image.committer.fail("a flush failed")
        calls = held.calls["pwrite"]
        held.goes_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert held.calls["pwrite"] <= calls + 1
        assert errors == ([errno.EIO] if layout != "cow" else [])
        await image.close()


async def test_many_small_ranges_are_committed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As writes are: what is pending does not grow for ever."""
    monkeypatch.setattr("fvdfs.image.commit.MAX_PENDING", 4)
    async with opened(make(tmp_path, "cow")) as bench:
        for block in range(0, 14, 2):
            await bench.zero(block * 8 * KIB, (block + 1) * 8 * KIB)
        assert bench.stores[IMAGE].calls["flush"]
        await bench.check_closed(tmp_path)


# --- much at once -----------------------------------------------------------------------------------

TIB = 1 << 40


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


class Endless(MemoryStore):
    """A sparse file of any length, of which only the first bytes are kept."""

    KEPT = 64 << 20

    def __init__(self, data: Buffer, name: str) -> None:
        super().__init__(data, name)
        self.length = len(data)
        self.zeroed: list[tuple[int, int]] = []

    async def size(self) -> int:
        return self.length

    async def resize(self, size: int) -> None:
        await self._wait("resize")
        self.length = size
        self._resize(min(size, self.KEPT))

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        self.zeroed.append((offset, length))
        if offset < len(self.data):
            await super().zero(offset, length, writes=writes)
        else:
            await self._wait("pwrite")


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (CreateOptions(), 1),
        (CreateOptions(compact=True, chunk_size=MIB, grow_unit=MIB), 0),
        (CreateOptions(compact=True, chunk_size=64 * KIB, grow_unit=MIB), 0),
        (CreateOptions(base_img="base.raw", block_size=64 * KIB), 1),
        (CreateOptions(base_img="base.raw", block_size=64 * KIB, compact=True, chunk_size=MIB, grow_unit=MIB), 64),
    ],
    ids=["flat", "compact", "compact, small chunks", "cow", "compact cow"],
)
async def test_a_whole_disk_of_1_tib(tmp_path: Path, options: CreateOptions, calls: int) -> None:
    """In few calls to the storage, none of which copies or reads; others get their turns, at each slice at least."""
    create(tmp_path / IMAGE, TIB, options, base_length=TIB if options.base_img else None)
    own, base = Endless((tmp_path / IMAGE).read_bytes(), IMAGE), Endless(b"", "base.raw")
    image = await load({IMAGE: own, "base.raw": base})
    await image.begin_writing()
    turns = Turns()
    slices = TIB // (CHUNKS_PER_SLICE * options.chunk_size) if options.compact else 1
    written = own.bytes_written
    trio.lowlevel.add_instrument(turns)
    try:
        with trio.fail_after(60):
            await image.zero(0, TIB)
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert len(own.zeroed) == calls
    assert turns.count >= slices - 1
    assert base.bytes_read == 0
    assert own.bytes_written - written < 128 << 20
    if image.bitmap is not None:
        assert image.bitmap.next_missing(0) is None
    assert await image.extent(0, TIB) == (TIB, True)
    await image.close()


@pytest.mark.parametrize("crashed", [False, True], ids=["closed", "after a crash"])
@pytest.mark.parametrize("chunk", [0, MIB], ids=["flat", "compact"])
async def test_holes_go_to_a_base_as_holes(tmp_path: Path, chunk: int, crashed: bool) -> None:
    """In few calls, and nothing is written for them; short ones are written with what is beside them."""
    size = 100 * MIB
    (tmp_path / "base.raw").write_bytes(b"b" * size)
    create(tmp_path / IMAGE, size, over_base(64 * KIB, chunk, update_base="writeback"), base_length=size)
    stores = {name: MemoryStore(data, name) for name, data in read_files(tmp_path).items()}
    image, base = await load(stores), stores["base.raw"]
    await image.begin_writing()
    await image.zero(MIB + 100, size)
    await image.write(80 * MIB, b"d" * 3 * MIB)
    await image.zero(81 * MIB, 81 * MIB + 4 * KIB)
    content = bytearray(b"b" * (MIB + 100)).ljust(size, b"\0")
    content[80 * MIB : 83 * MIB] = b"d" * 3 * MIB
    content[81 * MIB : 81 * MIB + 4 * KIB] = bytes(4 * KIB)
    if crashed:
        await image.fsync()
        stores = {name: MemoryStore(store.data, name) for name, store in stores.items()}
        image, base = await load(stores), stores["base.raw"]
        await image.begin_writing()
    await image.close()
    assert base.data == content
    assert base.calls["pwrite"] <= 12
    assert base.usage() <= 7 * MIB


# --- space that is reserved -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_what_is_reserved_changes_nothing(tmp_path: Path, layout: str) -> None:
    async with opened(make(tmp_path, layout)) as bench:
        await bench.write(11 * KIB, SOME[: 30 * KIB])
        for start, stop in RANGES.values():
            await bench.image.reserve(start, stop)
        await bench.check()
        if bench.image.table is not None:
            assert bench.image.table.allocated() == bench.image.table.chunks
        await bench.check_closed(tmp_path)


async def test_what_is_reserved_is_flushed(tmp_path: Path) -> None:
    async with opened(make(tmp_path, "flat")) as bench:
        await bench.write(0, SOME)
        await bench.image.fsync()
        assert not bench.image.committer.dirty
        await bench.image.reserve(0, SIZE)
        assert bench.image.committer.dirty
        await bench.image.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EOPNOTSUPP])
async def test_space_that_cannot_be_reserved(tmp_path: Path, error: int) -> None:
    plan = FaultPlan(0, error, ("pwrite",))
    files = make(tmp_path, "compact")
    async with opened(files, stored=lambda store: FaultStore(store, plan)) as bench:
        await bench.write(0, SOME[: 9 * KIB])
        plan.nth, plan.calls, plan.for_ever = 1, 0, True
        with pytest.raises(OSError) as caught:
            await bench.image.reserve(0, SIZE)
        assert caught.value.errno == error
        plan.nth = 0
        await bench.check()
        await bench.check_closed(tmp_path)


async def test_reaching(tmp_path: Path) -> None:
    """As a write does: whole sectors, an end within the last, and no further than the format goes."""
    async with opened(make(tmp_path, "compact")) as bench:
        image = bench.image
        await image.reach(SIZE - 1)
        assert (image.size, image.end) == (SIZE, SIZE)
        await image.reach(SIZE + 700)
        assert (image.size, image.end) == (SIZE + 1024, SIZE + 700)
        for end in (1 << 50, 1 << 63, (1 << 64) + 5):
            with pytest.raises(OSError) as caught:
                await image.reach(end)
            assert caught.value.errno == errno.EFBIG
        assert image.size == SIZE + 1024
        bench.content.extend(bytes(1024))
        await bench.check()
        await image.close()


# --- holes ------------------------------------------------------------------------------------------


async def test_holes_through_a_chain(tmp_path: Path) -> None:
    """Each layer has its own: what none of them stores is a hole, and what a layer zeroed hides the data below."""
    base = bytearray(BASE)
    base[32 * KIB : 64 * KIB] = bytes(32 * KIB)
    (tmp_path / "base.raw").write_bytes(base)
    create(tmp_path / "base0.fvd", SIZE - 8 * KIB, over_base(4 * KIB, 8 * KIB), base_length=len(base))
    options = CreateOptions(base_img="base0.fvd", base_img_fmt="fvd", block_size=8 * KIB)
    create(tmp_path / IMAGE, SIZE, options, base_length=SIZE - 8 * KIB)
    stores = {name: MemoryStore(data, name) for name, data in read_files(tmp_path).items()}
    middle = await load(stores, "base0.fvd")
    await middle.begin_writing()
    await middle.write(40 * KIB, b"m" * 4 * KIB)
    await middle.zero(96 * KIB, 112 * KIB)
    await middle.close()
    for store in stores.values():
        store.closed = False
    image = await load(stores)
    await image.begin_writing()
    await image.zero(8 * KIB, 16 * KIB)
    await image.write(SIZE - 4 * KIB, b"t" * 4 * KIB)
    await image.zero(40 * KIB + 8 * KIB, 56 * KIB)
    data = [(at // KIB, end // KIB) for at, end, hole in await extents_as_mounted(image, 0, SIZE) if not hole]
    assert data == [(0, 8), (16, 32), (40, 44), (64, 96), (112, 120), (188, 192)]
    assert image.extent_nowait(48 * KIB, SIZE) is None
    await image.close()


async def test_a_long_sparse_disk_is_walked_at_once(tmp_path: Path) -> None:
    """2 TiB, of which two places are used: some calls, whatever the size."""
    create(tmp_path / IMAGE, 2 * TIB, CreateOptions(compact=True, chunk_size=MIB, grow_unit=MIB))
    store = MemoryStore((tmp_path / IMAGE).read_bytes(), IMAGE)
    image = await load({IMAGE: store})
    await image.begin_writing()
    await image.write(TIB, b"x")
    await image.write(2 * TIB - 1, b"y")
    calls = store.calls["extent"]
    found = await extents_as_mounted(image, 0, 2 * TIB)
    used = [(at, stop) for at, stop, hole in found if not hole]
    assert used == [(TIB, TIB + 4096), (2 * TIB - 4096, 2 * TIB)]
    assert store.calls["extent"] - calls < 12
    await image.close()


@pytest.mark.parametrize(
    "options",
    [CreateOptions(data_file="data"), CreateOptions(data_file="data", compact=True, chunk_size=MIB, grow_unit=MIB)],
    ids=["flat", "compact"],
)
async def test_a_map_of_a_long_disk_asks_for_each_extent_once(tmp_path: Path, options: CreateOptions) -> None:
    """Not for each of its cells."""
    size = 64 * MIB
    create(tmp_path / IMAGE, size, options)
    stores = {name: MemoryStore(data, name) for name, data in read_files(tmp_path).items()}
    image = await load(stores)
    await image.begin_writing()
    await image.write(20 * MIB - 4 * KIB, b"x" * 4 * MIB)
    await image.write(50 * MIB, b"y" * 8 * KIB)
    data = stores["data"]
    before = data.calls["extent"]
    found = await image_map(image)
    assert totals(found) == {"stored": 4 * MIB + 8 * KIB, "base": 0, "hole": size - 4 * MIB - 8 * KIB}
    for number, (stored, base, hole) in enumerate(found["cells"]):
        at = number * found["cell_size"]
        used = [(20 * MIB - 4 * KIB, 24 * MIB - 4 * KIB), (50 * MIB, 50 * MIB + 8 * KIB)]
        parts = [min(stop, at + found["cell_size"]) - max(start, at) for start, stop in used]
        assert stored == sum(part for part in parts if part > 0)
        assert stored + base + hole == min(size, at + found["cell_size"]) - at
    assert data.calls["extent"] - before < 12
    await image.close()


async def test_a_hole_that_is_known_ends_where_copies_are_stored(tmp_path: Path) -> None:
    """A walk along a disk that is open, as a merge makes it."""
    async with opened(make(tmp_path, "cow"), spawn=True) as bench:
        image, known = bench.image, LastExtents()
        await bench.zero(0, 8 * KIB)
        assert await image.extents(0, 8 * KIB, known) == [(0, 8 * KIB, "hole")]
        assert await image.store_copy(32 * KIB, memoryview(BASE)[32 * KIB : 48 * KIB]) == 16 * KIB
        assert await image.extents(32 * KIB, 48 * KIB, known) == [(32 * KIB, 48 * KIB, "stored")]
        await image.close()


@pytest.mark.parametrize("asked_of", ["base", "own"])
async def test_files_stay_open_while_they_are_asked_for_holes(tmp_path: Path, asked_of: str) -> None:
    """The base, which is let go meanwhile, and the disk's own, which counts as in use until the answer."""
    asked, answers = trio.Event(), trio.Event()

    class Asked(MemoryStore):
        async def extent(self, start: int, stop: int) -> tuple[int, bool]:
            asked.set()
            await answers.wait()
            return await super().extent(start, stop)

    files = make(tmp_path, "cow")
    kinds = (Asked, MemoryStore) if asked_of == "base" else (MemoryStore, Asked)
    base, own = kinds[0](files["base.raw"], "base.raw"), kinds[1](files[IMAGE], IMAGE)
    image = await load({IMAGE: own, "base.raw": base})
    await image.begin_writing()
    if asked_of == "own":
        await image.write(0, SOME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.extent, 0, SIZE)
        await asked.wait()
        assert image.in_use
        if asked_of == "base":
            await image.write(0, SOME)
            nursery.start_soon(image.release_base)
            await trio.testing.wait_all_tasks_blocked()
            assert not base.closed
        answers.set()
    assert base.closed == (asked_of == "base")
    assert not image.in_use
    await image.close()


# --- stores of the host, and of QEMU --------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--compact", "--chunk-size", "64K"]], ids=["flat", "compact"])
async def test_the_hosts_file_system_gets_its_space_back(folder: Path, options: list[str]) -> None:
    (folder / "base.raw").write_bytes(BASE)
    must("create", folder / "a.fvd", "8M", *options)
    image = await open_image(str(folder / "a.fvd"), Policy(), write=True)
    await image.write(0, b"x" * 8 * MIB)
    await image.fsync()
    full = (folder / "a.fvd").stat().st_blocks * 512
    await image.zero(MIB + 5, 7 * MIB + 5, discard=True)
    await image.fsync()
    assert (folder / "a.fvd").stat().st_blocks * 512 <= full - 6 * MIB + 64 * KIB
    assert await next_data(image, MIB + 4096, 8 * MIB) == 7 * MIB
    assert await image.read(0, 8 * MIB) == b"x" * (MIB + 5) + bytes(6 * MIB) + b"x" * (MIB - 5)
    await image.close()


async def test_a_data_file_of_another_format(folder: Path) -> None:
    """Its daemon discards."""
    (folder / "base.raw").write_bytes(BASE)
    options = ["-b", "base.raw", "--block-size", "64K", "--data-file", "data.qcow2", "--data-format", "qcow2"]
    must("create", folder / "a.fvd", "4M", *options)
    policy = Policy(roots=(str(folder),))
    image = await open_image(str(folder / "a.fvd"), policy, write=True)
    content = bytearray(BASE.ljust(4 * MIB, b"\0"))
    await image.write(MIB, SOME * 8)
    content[MIB : MIB + len(SOME * 8)] = SOME * 8
    await image.fsync()
    full = (folder / "data.qcow2").stat().st_blocks * 512
    for start, stop in ((64 * KIB, 110 * KIB), (MIB, 2 * MIB + 64 * KIB), (3 * MIB, 4 * MIB)):
        await image.zero(start, stop, discard=True)
        content[start:stop] = bytes(stop - start)
    await image.zero(5000, 30_000)
    content[5000:30_000] = bytes(25_000)
    assert await image.read(0, 4 * MIB) == content
    for start, stop, hole in await extents_as_mounted(image, 0, 4 * MIB):
        assert not (hole and any(content[start:stop]))
    with pytest.raises(OSError) as caught:
        await image.reserve(MIB, 2 * MIB)
    assert caught.value.errno == errno.EOPNOTSUPP
    await image.close()
    assert (folder / "data.qcow2").stat().st_blocks * 512 <= full - 900 * KIB
    again = await open_image(str(folder / "a.fvd"), policy, write=False)
    assert await again.read(0, 4 * MIB) == content
    await again.close()
