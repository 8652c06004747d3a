"""Reading the base once: single flight, copy-on-read, its bounds, and its failures."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fvdfs.cow.fetching import Fetch
from fvdfs.cow.recorder import Recorder
from fvdfs.errors import UsageError
from fvdfs.format.creation import CreateOptions
from fvdfs.format.profile import decode, encode, from_text, to_text
from fvdfs.image.image import Image
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.profile import plan
from fvdfs.prefetch.scheduler import Scheduler
from support.builder import KIB, create, load
from support.fakes import MemoryStore

BLOCK = 64 * KIB
SIZE = 16 * BLOCK + 3 * KIB
CONTENT = random.Random(1).randbytes(SIZE)


class GatedBase(MemoryStore):
    """A base whose reads wait until they are let through, and may fail."""

    def __init__(self) -> None:
        super().__init__(CONTENT, "base.raw", writable=False, slow=True)
        self.gate = trio.Event()
        self.gate.set()
        self.asked: list[tuple[int, int]] = []
        self.was_asked = trio.Event()
        self.bad: range = range(0)
        self.cached = False
        """Whether reads need not wait, and fail at once."""

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        if not self.cached:
            return False
        self._fail_where_bad(buffer, offset)
        self._read(buffer, offset)
        return True

    async def pread(self, buffer: memoryview, offset: int) -> int:
        self.asked.append((offset, offset + len(buffer)))
        self.was_asked.set()
        await self.gate.wait()
        self._fail_where_bad(buffer, offset)
        return await super().pread(buffer, offset)

    def _fail_where_bad(self, buffer: memoryview, offset: int) -> None:
        if self.bad and offset < self.bad.stop and self.bad.start < offset + len(buffer):
            raise OSError(errno.EIO, "a bad sector")


@asynccontextmanager
async def opened(
    tmp_path: Path, *, copy_on_read: bool = True, limit: int = 2_000_000, **options: bool | int
) -> AsyncIterator[tuple[Image, GatedBase]]:
    """An image open for writing, with its base."""
    path = tmp_path / "disk.fvd"
    choice = CreateOptions(base_img="base.raw", block_size=BLOCK, copy_on_read=copy_on_read, **options)  # type: ignore[arg-type]
    create(path, SIZE // 512 * 512, choice, base_length=SIZE)
    base = GatedBase()
    async with trio.open_nursery() as nursery:

        def spawn(work: Callable[[], Awaitable[None]]) -> None:
            nursery.start_soon(work)

        stores = {"disk.fvd": MemoryStore(path.read_bytes(), "disk.fvd"), "base.raw": base}
        image = await load(stores, spawn=spawn)
        await image.begin_writing()
        if image.fetcher is not None:
            image.fetcher._max_outstanding = limit
        yield image, base
        await image.close()


def local(image: Image) -> list[int]:
    """The blocks that are local."""
    assert image.bitmap is not None
    return [block for block in range(image.bitmap.blocks) if image.bitmap.is_local(block)]


async def settle() -> None:
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("size", [512, 65536, 66048, 1 << 20])
def test_large_buffers_begin_on_a_page(size: int) -> None:
    for _ in range(4):
        fetch = Fetch(4096, 4096 + size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(fetch.data))
        assert len(fetch.data) == size
        assert fetch.data == bytes(size)
        assert size < 65536 or address % mmap.PAGESIZE == 0
        fetch.data[:] = b"x" * size


async def test_a_read_is_rounded_out_stored_and_not_repeated(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        assert await image.read(BLOCK + 100, 10) == CONTENT[BLOCK + 100 : BLOCK + 110]
        await settle()
        assert base.asked == [(BLOCK, 2 * BLOCK)]
        assert local(image) == [1]
        assert await image.read(BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]
        assert len(base.asked) == 1


async def test_a_read_that_takes_its_turn_after_a_copy_asks_for_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        late = bytearray(2 * BLOCK)
        pending = image.begin_read(0, memoryview(late))  # when all of it is still in the base
        assert not isinstance(pending, int)
        await image.read(0, 1)
        await settle()
        assert await pending.finish() == len(late)
        assert late == CONTENT[: 2 * BLOCK]
        assert base.asked == [(0, BLOCK), (BLOCK, 2 * BLOCK)]


async def test_reads_in_several_parts_at_the_same_time_share_all_of_them(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base), trio.open_nursery() as nursery:
        base.gate = trio.Event()
        nursery.start_soon(image.read, 0, 1)
        await base.was_asked.wait()
        for _ in range(3):
            nursery.start_soon(image.read, 0, 3 * BLOCK)
        await settle()
        assert base.asked == [(0, BLOCK), (BLOCK, 3 * BLOCK)]
        base.gate.set()


async def test_a_copy_is_stored_after_the_answer_and_its_bit_is_not_reported(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, _base):
        await image.read(0, 1)
        assert local(image) == []
        await settle()
        assert local(image) == [0]
        assert not image.committer.uncommitted
        assert image.bitmap is not None
        assert not image.bitmap.all_committed(0, 1)


async def test_a_write_to_a_copied_block_is_journaled(tmp_path: Path) -> None:
    """Its bit is set in memory only: a crash must not bring the base's bytes back."""
    async with opened(tmp_path) as (image, _base):
        await image.read(0, 1)
        await settle()
        await image.write(0, b"new")
        assert image.committer.uncommitted


async def test_single_flight(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        answers: list[bytearray] = []

        async def read(offset: int) -> None:
            answers.append(await image.read(offset, 100))

        async with trio.open_nursery() as nursery:
            for offset in (0, 50, 1000, BLOCK - 50):
                nursery.start_soon(read, offset)
                await settle()
            base.gate.set()
        assert base.asked == [(0, BLOCK), (BLOCK, 2 * BLOCK)]
        expected = [CONTENT[o : o + 100] for o in (0, 50, 1000, BLOCK - 50)]
        assert sorted(bytes(answer) for answer in answers) == sorted(expected)


async def test_a_block_is_not_read_again_while_it_waits_to_be_stored(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        assert isinstance(image.data, MemoryStore)
        image.data.slow = True
        await image.read(0, 10)
        assert local(image) == []
        assert await image.read(20, 10) == CONTENT[20:30]
        assert len(base.asked) == 1


async def test_a_write_joins_the_read_that_is_under_way(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 0, 10)
            await settle()
            nursery.start_soon(image.write, 100, b"written")
            await settle()
            base.gate.set()
        assert base.asked == [(0, BLOCK)]
        await settle()
        assert await image.read(0, BLOCK) == CONTENT[:100] + b"written" + CONTENT[107:BLOCK]


async def test_a_copy_never_overwrites_a_write(tmp_path: Path) -> None:
    """The block is written between the copy's read and its store; and while the copy waits for the base."""
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 0, 10)
            await settle()
            await image.write(0, bytes(BLOCK))
            base.gate.set()
        await settle()
        assert await image.read(0, BLOCK) == bytes(BLOCK)


async def test_a_claimed_block_is_skipped_and_its_neighbours_are_stored(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, _base), image._locks.hold(2, 3):
        await image.read(BLOCK, 3 * BLOCK)
        await settle()
        assert local(image) == [1, 3]


async def test_a_read_above_the_bound_waits_a_moment(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=2 * BLOCK) as (image, _base):
        assert isinstance(image.data, MemoryStore)
        image.data.slow = True
        for block in range(0, 15, 2):
            assert await image.read(block * BLOCK, 10) == CONTENT[block * BLOCK : block * BLOCK + 10]
        await settle()
        assert local(image) == list(range(0, 15, 2))


async def test_above_the_bound_nothing_is_copied(tmp_path: Path) -> None:
    async with opened(tmp_path, limit=2 * BLOCK) as (image, _base):
        assert isinstance(image.data, MemoryStore)
        pwrite, gate = image.data.pwrite, trio.Event()

        async def gated(data: bytes, offset: int) -> None:
            await gate.wait()
            await pwrite(data, offset)

        image.data.pwrite = gated  # type: ignore[assignment]
        for block in range(4):
            await image.read(block * BLOCK, 10)
        gate.set()
        await settle()
        assert local(image) == [0, 1]
        await image.read(4 * BLOCK, 10)
        await settle()
        assert local(image) == [0, 1, 4]


async def test_a_bad_sector_fails_only_the_reads_that_need_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.bad = range(BLOCK + 4096, BLOCK + 4608)
        assert await image.read(BLOCK, 512) == CONTENT[BLOCK : BLOCK + 512]
        with pytest.raises(OSError) as caught:
            await image.read(BLOCK + 4100, 5)
        assert caught.value.errno == errno.EIO
        await settle()
        assert local(image) == []


async def test_who_joined_a_read_that_fails_asks_for_its_own(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        base.bad = range(512)
        answers: list[bytearray] = []

        async def good() -> None:
            answers.append(await image.read(1000, 24))

        async def bad() -> None:
            with pytest.raises(OSError):
                await image.read(0, 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bad)
            await settle()
            nursery.start_soon(good)
            await settle()
            base.gate.set()
        assert answers == [CONTENT[1000:1024]]


async def test_a_reader_that_is_cancelled_leaves_the_others_their_data(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        answers: list[bytearray] = []

        async def read() -> None:
            answers.append(await image.read(0, 10))

        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await image.read(0, 10)

            nursery.start_soon(cancelled)
            await settle()
            nursery.start_soon(read)
            await settle()
            scope.cancel()
            await settle()
            base.gate.set()
        assert answers == [CONTENT[:10]]


async def test_storage_that_is_full_stops_copying_and_fails_no_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as (image, _base):

        async def full(data: object, offset: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        assert isinstance(image.data, MemoryStore)
        image.data.pwrite = full  # type: ignore[method-assign]
        for block in range(5):
            assert await image.read(block * BLOCK, 10) == CONTENT[block * BLOCK : block * BLOCK + 10]
            await settle()
        assert local(image) == []
        assert len([record for record in caplog.records if "copy-on-read" in record.message]) == 1
        del image.data.pwrite


async def test_zeros_of_the_base_take_no_space(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        assert isinstance(image.data, MemoryStore)
        base.data[: 4 * BLOCK] = bytes(4 * BLOCK)
        written = image.data.bytes_written
        assert await image.read(0, 4 * BLOCK) == bytes(4 * BLOCK)
        await settle()
        assert local(image) == [0, 1, 2, 3]
        assert image.data.bytes_written == written


async def test_an_image_that_has_read_all_of_its_base_lets_it_go(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, _base):
        await image.read(0, image.size)
        meta = image.meta
    assert isinstance(meta, MemoryStore)
    again = await load({"disk.fvd": MemoryStore(meta.data, "disk.fvd")})
    assert again.header.all_data_in_fvd_img == 1
    assert await again.read(0, again.size) == CONTENT[: again.size]
    await again.close()


async def test_without_copy_on_read_nothing_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, copy_on_read=False) as (image, base):
        await image.read(0, 10)
        await settle()
        assert local(image) == []
        assert base.asked == [(0, 10)]


async def test_prefetching_goes_around_what_is_local_and_asks_nothing_twice(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        await image.write(2 * BLOCK, bytes(BLOCK))
        await image.read(5 * BLOCK, 10)
        await settle()
        await Prefetcher(image, Scheduler(pressure=lambda: None)).run()
        seen = bytearray(SIZE)
        for start, stop in base.asked:
            for at in range(start, min(stop, SIZE)):
                seen[at] += 1
        assert set(seen[: 2 * BLOCK]) == {1}
        assert set(seen[2 * BLOCK : 3 * BLOCK]) == {0}
        assert set(seen[3 * BLOCK :]) == {1}
        assert image.header.all_data_in_fvd_img == 1
        assert image.base is None
        assert base.closed
        whole = bytes(await image.read(0, image.size))
        assert whole == CONTENT[: 2 * BLOCK] + bytes(BLOCK) + CONTENT[3 * BLOCK : image.size]


async def test_a_guest_shares_what_prefetching_is_reading(tmp_path: Path) -> None:
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefetcher.run)
            await base.was_asked.wait()
            (probe,) = base.asked
            nursery.start_soon(image.read, probe[0], 10)
            await settle()
            assert base.asked == [probe]
            base.gate.set()
        assert image.base is None


async def test_a_small_read_overtakes_what_is_fetched_behind_much_else(tmp_path: Path) -> None:
    """It asks by itself, and stores nothing; one of more bytes waits, so that few cross the link twice."""
    async with opened(tmp_path) as (image, base):
        assert image.fetcher is not None
        gate = base.gate = trio.Event()
        fetch = image.fetcher.begin_ahead(0, 4 * BLOCK, is_slow=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.fetcher.fill, fetch)
            await base.was_asked.wait()
            base.gate = trio.Event()
            base.gate.set()
            assert await image.read(BLOCK + 5, 10) == CONTENT[BLOCK + 5 : BLOCK + 15]
            assert base.asked == [(0, 4 * BLOCK), (BLOCK + 5, BLOCK + 15)]
            nursery.start_soon(image.read, 0, 2 * BLOCK)
            await settle()
            assert len(base.asked) == 2
            gate.set()
        assert await image.fetcher.store(fetch) == 4 * BLOCK
        assert len(base.asked) == 2


async def test_who_is_told_that_a_read_ends_was_told_that_it_began(tmp_path: Path) -> None:
    """Prefetching may begin to watch in the middle of one."""
    async with opened(tmp_path) as (image, base):
        base.gate = trio.Event()
        link = Scheduler().link("somewhere")
        assert image.fetcher is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 0, 10)
            await settle()
            image.fetcher.observer = link
            base.gate.set()
        assert link.watch._guests == 0


async def test_a_base_that_fails_without_waiting_fails_only_the_bytes_that_it_lacks(tmp_path: Path) -> None:
    """What was added by rounding out is nobody's; and no fetch stays behind that others, or closing, would wait for."""
    async with opened(tmp_path) as (image, base):
        base.cached = True
        base.bad = range(3 * BLOCK + 100, 3 * BLOCK + 101)
        assert await image.read(3 * BLOCK, 100) == CONTENT[3 * BLOCK : 3 * BLOCK + 100]
        with pytest.raises(OSError, match="a bad sector"):
            await image.read(3 * BLOCK, BLOCK)
        base.bad = range(0)
        with trio.fail_after(60):
            assert await image.read(3 * BLOCK, BLOCK) == CONTENT[3 * BLOCK : 4 * BLOCK]
            await settle()
        assert local(image) == [3]


async def test_a_base_that_fails_is_tried_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with opened(tmp_path) as (image, base):
        base.bad = range(3 * BLOCK, 3 * BLOCK + 1)
        prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefetcher.run)
            await trio.sleep(100)
            assert prefetcher.state.value == "failed"
            assert "a bad sector" in prefetcher.reason
            assert set(range(17)) - set(local(image)) == {3}
            assert await image.read(0, 10) == CONTENT[:10]
            base.bad = range(0)
            await trio.sleep(70)
        assert prefetcher.state.value == "done"
        assert image.header.all_data_in_fvd_img == 1


async def test_a_profile_goes_on_when_its_base_answers_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Parts that failed are tried once more at the end; a place that cannot be read keeps nothing else from coming."""
    blocks = [9, 1, 12, 4, 15]
    profile = [(block * BLOCK, (block + 1) * BLOCK) for block in blocks]
    async with opened(tmp_path) as (image, base):
        base.bad = range(SIZE)
        prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None), whole=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(prefetcher.run, profile=profile))
            await trio.sleep(0.5)
            assert prefetcher.state.value == "failed"
            assert "a bad sector; again in 1 s" in prefetcher.reason
            base.bad = range(12 * BLOCK, 12 * BLOCK + 1)
            base.asked.clear()
        assert prefetcher.state.value == "off"
        assert local(image) == sorted({*blocks} - {12})
        assert base.asked.count((12 * BLOCK, 13 * BLOCK)) in (1, 2), "it may be the one that waits, or come at the end"


async def test_pause_and_stop(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with opened(tmp_path) as (image, base):
        prefetcher = Prefetcher(image, Scheduler(pressure=lambda: None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefetcher.run)
            await base.was_asked.wait()
            prefetcher.pause()
            await trio.sleep(1)
            asked = len(base.asked)
            assert prefetcher.state.value == "paused"
            assert prefetcher.reason == "as asked"
            await trio.sleep(100)
            assert len(base.asked) == asked
            await prefetcher.stop()
            assert prefetcher.state.value == "off"
        assert image.bitmap is not None


# --- profiles -------------------------------------------------------------------------------------


def test_a_profile_survives_encoding() -> None:
    extents = [(0, 4096), (1 << 40, (1 << 40) + 8192), (4096, 4097)]
    data, entries = encode(extents, 4096, 100)
    assert entries == 3
    assert decode(data, entries, 4096) == [*extents[:2], (4096, 8192)]
    assert encode(extents, 4096, 25)[1] == 2


def test_nonsense_in_a_profile_is_left_out() -> None:
    data = encode([(4096, 8192)], 4096, 12)[0] + (-5).to_bytes(8, "little", signed=True) + b"\1\0\0\0" + bytes(12)
    assert decode(data, 3, 4096) == [(4096, 8192)]
    assert plan(decode(data, 3, 4096), 6000, 0, 1 << 20) == [(4096, 6000)]
    assert plan([(1 << 62, (1 << 62) + 4096)], 6000, 0, 1 << 20) == []


def test_a_profile_as_text() -> None:
    extents = [(0, 4096), (81920, 90112)]
    assert from_text(to_text(extents), "f") == extents
    for wrong in ("1\n", "a b\n", "-1 5\n", "1 2 3\n", "9" * 30 + " 1\n"):
        with pytest.raises(UsageError, match="line 1"):
            from_text(wrong, "f")


def test_near_extents_are_fetched_together() -> None:
    extents = [(0, 4096), (8192, 12288), (4096, 8192), (1 << 20, (1 << 20) + 4096)]
    assert plan(extents, 1 << 30, 4096, 1 << 20) == [(0, 12288), (1 << 20, (1 << 20) + 4096)]
    assert plan(extents, 1 << 30, 4095, 1 << 20)[0] == (0, 4096)
    assert plan(extents, 1 << 30, 4096, 8192)[0] == (0, 4096)


def test_recorder() -> None:
    recorder = Recorder(10 * 4096 + 512, 3)
    recorder.touched(5000, 5001, written=False)
    recorder.touched(8192, 12288, written=False)
    recorder.touched(0, 20480, written=False)
    assert recorder.extents == [(4096, 12288), (0, 4096), (12288, 20480)]
    recorder.touched(20480, 24576 + 100, written=True)  # all of one page, a part of the next
    recorder.touched(20480, 1 << 30, written=False)
    assert recorder.extents == [(4096, 12288), (0, 4096), (12288, 20480)]  # there is room for three
    recorder = Recorder(10 * 4096 + 512, 9)
    recorder.touched(20480, 20580, written=True)  # too little of a page to spare its base
    recorder.touched(11 * 4096, 12 * 4096, written=False)  # past the base
    assert recorder.extents == []
    recorder.touched(20480, 24576 + 100, written=True)
    recorder.touched(20480, 1 << 30, written=False)
    assert recorder.extents == [(24576, 45056)]


async def test_a_recorded_profile_is_in_the_image(tmp_path: Path) -> None:
    async with opened(tmp_path, copy_on_read=False, profile_room=4096) as (image, _base):
        assert image.record_profile()
        await image.read(9 * BLOCK, 4096)
        await image.read(0, 100)
        meta = image.meta
    assert isinstance(meta, MemoryStore)
    again = await load({"disk.fvd": MemoryStore(meta.data, "disk.fvd"), "base.raw": GatedBase()})
    assert await again.read_profile() == [(9 * BLOCK, 9 * BLOCK + 4096), (0, 4096)]
    assert again.header.clean
    await again.close()


async def test_no_room_no_profile(tmp_path: Path) -> None:
    async with opened(tmp_path, copy_on_read=False) as (image, _base):
        assert not image.record_profile()
