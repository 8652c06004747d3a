"""Holes of the base become local unread; what is written meanwhile stays, and no zeros are written in vain."""

from __future__ import annotations

import errno
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fvdfs.format.creation import CreateOptions
from fvdfs.image import copying
from fvdfs.image.image import Image
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import Scheduler
from fvdfs.store.base import Buffer
from support.builder import KIB, create, load
from support.fakes import UNIT, MemoryStore

BLOCK = 64 * KIB
SIZE = 40 * BLOCK + 3 * 512
DATA = range(20 * BLOCK + UNIT, 22 * BLOCK)
"""All else is a hole of the base."""
BASE = bytes(DATA.start) + random.Random(2).randbytes(len(DATA)) + bytes(SIZE - DATA.stop)
DATA_BLOCKS = [20, 21]


class Base(MemoryStore):
    """A base that notes what it is asked, and may be slow to say where its holes are."""

    def __init__(self, *, writable: bool = False) -> None:
        super().__init__(BASE, "base.raw", writable=writable, slow=True)
        self.asked: list[int] = []
        self.gate: trio.Event | None = None
        self.error = 0

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        self.asked.append(start)
        if self.gate is not None:
            await self.gate.wait()
        if self.error:
            raise OSError(self.error, "no")
        return await super().extent(start, stop)


@asynccontextmanager
async def opened(
    tmp_path: Path,
    *,
    device: bool = False,
    garbage: bool = False,
    compact: bool = False,
    copy_on_read: bool = False,
    update_base: str = "",
) -> AsyncIterator[tuple[Image, Base]]:
    """An image open for writing, with its base; `garbage`: its storage holds something already."""
    path = tmp_path / "disk.fvd"
    options = CreateOptions(
        base_img="base.raw",
        base_img_fmt="raw",
        block_size=BLOCK,
        copy_on_read=copy_on_read,
        update_base=update_base,
        compact=compact,
        chunk_size=BLOCK if compact else 0,
        grow_unit=BLOCK if compact else 0,
    )
    header = create(path, SIZE, options, base_length=SIZE)
    content = bytearray(path.read_bytes())
    if garbage or device:
        room = SIZE if not compact else 2 * SIZE
        content += (b"\xaa" if garbage else b"\0") * (header.metadata_size + room - len(content))
    base = Base(writable=bool(update_base))
    async with trio.open_nursery() as nursery:

        def spawn(work: Callable[[], Awaitable[None]]) -> None:
            nursery.start_soon(work)

        stores = {"disk.fvd": MemoryStore(content, "disk.fvd", fixed_size=device), "base.raw": base}
        image = await load(stores, spawn=spawn)
        await image.begin_writing()
        yield image, base
        await image.close()


def missing(image: Image) -> list[int]:
    """The blocks that are not local."""
    assert image.bitmap is not None
    return [block for block in range(image.bitmap.blocks) if not image.bitmap.is_local(block)]


async def prefetch(image: Image) -> Prefetcher:
    prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None))
    await prefetcher.run()
    return prefetcher


async def check(image: Image, expected: bytes) -> None:
    assert await image.read(0, SIZE) == expected


@pytest.mark.parametrize("compact", [False, True])
async def test_a_hole_is_made_local_around_what_others_have(tmp_path: Path, compact: bool) -> None:
    async with opened(tmp_path, compact=compact) as (image, base):
        assert isinstance(image.data, MemoryStore)
        await image.write(5 * BLOCK, b"x" * BLOCK)
        written = image.data.bytes_written
        async with image._locks.hold(3, 4):
            assert await image.store_hole(0, 20 * BLOCK, writes=True) == (20 * BLOCK, 18 * BLOCK)
        assert missing(image) == [3, *range(20, 41)]
        assert image.data.bytes_written == written
        assert base.bytes_read == 0
        await check(image, BASE[: 5 * BLOCK] + b"x" * BLOCK + BASE[6 * BLOCK :])


async def test_only_whole_blocks_and_the_last_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, _base):
        await image.store_hole(100, 3 * BLOCK + 100, writes=True)
        await image.store_hole(39 * BLOCK + 1, SIZE, writes=True)
        assert missing(image) == [0, *range(3, 40)]
        await image.store_hole(0, 0, writes=True)
        await image.store_hole(SIZE, SIZE + BLOCK, writes=True)


@pytest.mark.parametrize(("device", "compact"), [(False, False), (True, False), (True, True)])
async def test_where_zeros_have_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: bool, compact: bool
) -> None:
    """In steps, so that a prefetcher can make way; and not for a guest's read."""
    monkeypatch.setattr(copying, "ZERO_STEP", 8 * BLOCK)
    async with opened(tmp_path, device=device, compact=compact, garbage=True) as (image, _base):
        assert await image.store_hole(0, 20 * BLOCK, writes=False) == (0, 0)
        assert len(missing(image)) == 41
        for end in (8, 16, 20):
            assert (await image.store_hole(0, 20 * BLOCK, writes=True))[0] == end * BLOCK
            assert missing(image) == list(range(end, 41))
        await check(image, BASE)
        assert (await prefetch(image)).copied == len(DATA_BLOCKS) * BLOCK
        await check(image, BASE)


async def test_a_write_to_a_hole_that_is_being_made_local(tmp_path: Path) -> None:
    async with opened(tmp_path, garbage=True) as (image, _base):
        assert isinstance(image.data, MemoryStore)
        pwrite, gate = image.data.pwrite, trio.Event()

        async def gated(data: Buffer, offset: int) -> None:
            if not any(data):
                await gate.wait()
            await pwrite(data, offset)

        image.data.pwrite = gated  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(image.store_hole, 0, 20 * BLOCK, writes=True))
            await wait_all_tasks_blocked()
            nursery.start_soon(image.write, 4 * BLOCK + 10, b"written")
            await wait_all_tasks_blocked()
            gate.set()
        await check(image, BASE[: 4 * BLOCK + 10] + b"written" + BASE[4 * BLOCK + 17 :])


async def test_prefetching_reads_data_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        prefetcher = await prefetch(image)
        assert prefetcher.copied == base.bytes_read == len(DATA_BLOCKS) * BLOCK
        assert base.asked == [0, 21 * BLOCK, 22 * BLOCK]  # of block 20 it is known that a part of it is data
        assert image.base is None
        await check(image, BASE)


async def test_a_base_that_tells_nothing_is_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.error = errno.EIO
        await prefetch(image)
        assert base.bytes_read == SIZE
        assert image.base is None
        await check(image, BASE)


async def test_one_read_of_a_hole_has_all_of_it_local_and_is_not_kept_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path, copy_on_read=True) as (image, base):
        base.gate = trio.Event()
        assert await image.read(2 * BLOCK, 10) == bytes(10)
        await wait_all_tasks_blocked()
        assert missing(image) == [0, 1, *range(3, 41)]
        assert base.asked == [2 * BLOCK]
        assert await image.read(30 * BLOCK, 10) == bytes(10)
        await wait_all_tasks_blocked()
        assert base.asked == [2 * BLOCK]  # one at a time
        base.gate.set()
        await wait_all_tasks_blocked()
        assert missing(image) == [0, 1, *range(20, 30), *range(31, 41)]
        assert await image.read(20 * BLOCK, 3000) == BASE[20 * BLOCK : 20 * BLOCK + 3000]
        await wait_all_tasks_blocked()
        assert base.asked == [2 * BLOCK]


async def test_closing_does_not_wait_for_an_answer_about_holes(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with opened(tmp_path, copy_on_read=True) as (image, base):
            base.gate = trio.Event()
            await image.read(2 * BLOCK, 10)
            await wait_all_tasks_blocked()
    assert base.asked == [2 * BLOCK]


async def test_a_profile_asks_only_after_zeros(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        profile = [(20 * BLOCK, 21 * BLOCK), (3 * BLOCK, 4 * BLOCK), (7 * BLOCK, 8 * BLOCK), (1 * BLOCK, 2 * BLOCK)]
        prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None, jobs=1), whole=False)
        await prefetcher.run(profile=profile)
        assert set(base.asked) <= {3 * BLOCK, 7 * BLOCK, BLOCK}
        assert not set(range(7, 21)) & set(missing(image))
        await check(image, BASE)


async def test_what_is_written_to_the_base_is_no_hole_there(tmp_path: Path) -> None:
    """What was asked before stays true for all that is not local."""
    expected = bytearray(BASE)
    async with opened(tmp_path, update_base="writethrough") as (image, base):
        fetcher = image.start_fetching(copy_on_read=False)
        assert fetcher is not None
        assert await fetcher.extents.at(0, SIZE) == (DATA.start, True)
        for at in (4 * BLOCK + 100, 9 * BLOCK):
            await image.write(at, b"new" * 100)
            expected[at : at + 300] = b"new" * 100
        await prefetch(image)
        await check(image, bytes(expected))
        await image.fsync()
        assert base.data == expected
        assert missing(image) == []
