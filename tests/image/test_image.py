"""The engine over stores in memory: where an interleaving has to be made, and at the limits of the format."""

from __future__ import annotations

import errno
import os
import random
import struct
from pathlib import Path

import pytest
import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.errors import ReadOnlyImage
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import MAX_DISK_SIZE, Header, with_fields
from fvdfs.format.journal import BITMAP_MAGIC
from fvdfs.image.image import Image
from fvdfs.store.base import Buffer, Done
from fvdfs.store.host import open_path
from support.builder import IMAGE, LAYOUTS, create, load, read_files
from support.fakes import SECTOR, CrashStore, MemoryStore, read_as_mounted, write_as_mounted


def test_writes_past_the_end_together_only_grow_the_disk(tmp_path: Path) -> None:
    """The later, nearer one finds the disk grown already; it must not be taken for a cut."""
    LAYOUTS[0].build(tmp_path)
    stores = {name: MemoryStore(content, name, slow=True) for name, content in read_files(tmp_path).items()}

    async def main() -> None:
        image = await load(stores)
        await image.begin_writing()
        end = image.size
        async with trio.open_nursery() as nursery:
            for distance in (5000, 700, 3000, 1):
                nursery.start_soon(image.write, end + distance, bytes([distance % 251]) * 10)
        assert image.size >= end + 5010
        for distance in (5000, 700, 3000, 1):
            assert await image.read(end + distance, 10) == bytes([distance % 251]) * 10
        await image.close()

    trio.run(main)


def test_flushes_that_meet_a_commit_share_the_next(tmp_path: Path) -> None:
    """One that has begun need not cover what was written since; a commit of journal sectors flushes twice."""
    next(layout for layout in LAYOUTS if layout.name == "cow-64k").build(tmp_path)
    stores = {name: MemoryStore(content, name, slow=True) for name, content in read_files(tmp_path).items()}

    async def main() -> None:
        image = await load(stores)
        await image.begin_writing()
        await image.write(0, b"first")
        await image.fsync()  # which has made the header unclean
        flushes = stores[IMAGE].calls["flush"]
        await image.write(1 << 16, b"second")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.fsync)
            while stores[IMAGE].calls["flush"] == flushes:
                await trio.lowlevel.checkpoint()
            await image.write(2 << 16, b"third")
            for _ in range(10):
                nursery.start_soon(image.fsync)
        assert stores[IMAGE].calls["flush"] == flushes + 4
        assert not image.committer.dirty
        await image.close()

    trio.run(main)


def test_growing_keeps_the_records_of_flushes_meanwhile(tmp_path: Path) -> None:
    """It empties the journal, in which such a flush may just have put what it promised."""
    next(layout for layout in LAYOUTS if layout.name == "cow-512").build(tmp_path)
    files = read_files(tmp_path)

    async def grow_and_write(stores: dict[str, MemoryStore]) -> None:
        image = await load(stores)
        await image.begin_writing()

        async def write() -> None:
            await image.write(100_000, b"flushed")
            await image.fsync()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.resize, image.size + 8192)
            nursery.start_soon(write)

    async def read(stores: dict[str, MemoryStore]) -> bytes:
        return bytes(await (await load(stores)).read(100_000, 7))

    for _ in range(20):  # trio's turns are in no order
        stores = {name: MemoryStore(content, name, slow=True) for name, content in files.items()}
        trio.run(grow_and_write, stores)
        left = {name: MemoryStore(store.data, name) for name, store in stores.items()}
        assert trio.run(read, left) == b"flushed"


def test_disk_does_not_outgrow_the_format(tmp_path: Path) -> None:
    """Its header would be refused from then on."""
    LAYOUTS[0].build(tmp_path)
    stores = {name: MemoryStore(content, name) for name, content in read_files(tmp_path).items()}

    async def main() -> None:
        image = await load(stores)
        await image.begin_writing()
        size = image.size
        for attempt in (image.resize(MAX_DISK_SIZE + 1), image.write(MAX_DISK_SIZE - 1, b"ab"), image.resize(1 << 63)):
            with pytest.raises(OSError) as error:
                await attempt
            assert error.value.errno == errno.EFBIG
            assert image.size == size
        await image.write(0, b"still writable")
        await image.close()

    trio.run(main)


def test_record_that_was_skipped_stays_so(tmp_path: Path) -> None:
    """Also after the disk has grown to where the record leads, and another crash."""
    layout = next(layout for layout in LAYOUTS if layout.name == "cow-64k")
    layout.build(tmp_path)
    files = read_files(tmp_path)
    header = Header.decode(files[IMAGE], IMAGE)
    raw = bytearray(files[IMAGE])
    raw[: len(header.encode())] = with_fields(header, clean_shutdown=0).encode()
    sectors = header.virtual_disk_size // SECTOR + 1
    at = header.journal_offset + 4096  # where it is not soon overwritten
    raw[at : at + 16] = struct.pack("<IIq", BITMAP_MAGIC, sectors, 0)
    files[IMAGE] = bytes(raw)
    stores = {name: MemoryStore(content, name) for name, content in files.items()}

    async def main() -> None:
        image = await load(stores)
        await image.begin_writing()
        await image.resize(image.size + SECTOR)
        await image.write(0, b"written")
        before = await image.read(0, image.size)
        await image.fsync()
        again = await load({name: MemoryStore(store.data, name) for name, store in stores.items()})
        assert not again.header.clean
        assert await again.read(0, again.size) == before
        assert before[:7] == b"written"
        assert before[7 : header.base_img_size] == files["base.raw"][7 : header.base_img_size]

    trio.run(main)


def test_file_where_its_offsets_end(tmp_path: Path) -> None:
    """A damaged chunk table may lead anywhere; past the end of any file are zeros, as past the end of this one."""
    path = tmp_path / "file"
    path.write_bytes(b"content")

    async def main() -> None:
        file = open_path(str(path), writable=True)
        buffer = memoryview(bytearray(SECTOR))
        for offset in ((1 << 63) - SECTOR - 1, (1 << 63) - SECTOR, (1 << 63) - 1, 1 << 63, 1 << 93):
            assert not file.pread_nowait(buffer, offset)
            assert await file.pread(buffer, offset) == 0
        assert await file.pread(buffer, 0) == 7
        with pytest.raises(OSError) as error:
            await file.resize(1 << 63)
        assert error.value.errno == errno.EFBIG
        assert await file.size() == 7
        await file.aclose()

    trio.run(main)


async def test_a_journal_that_names_places_past_the_storage_makes_the_image_read_only(tmp_path: Path) -> None:
    """Cut after a crash: what its journal showed is lost, and writing would make that final."""
    path = tmp_path / "disk.fvd"
    header = create(path, 64 * 4096, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    store = MemoryStore(path.read_bytes(), "disk.fvd")
    image = await load({"disk.fvd": store})
    await image.begin_writing()
    await image.write(0, b"x" * 16 * 4096)
    await image.fsync()
    store.data = store.data[: header.metadata_size + 10 * 4096]
    again = await load({"disk.fvd": store})
    with pytest.raises(ReadOnlyImage, match="past the end of the storage"):
        await again.begin_writing()
    assert "past the end" in again.damage


async def test_a_read_of_several_places_that_fails_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Whatever the version of Python makes of errors of several tasks."""
    path = tmp_path / "disk.fvd"
    create(path, 64 * 4096, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    store = MemoryStore(path.read_bytes(), "disk.fvd", slow=True)
    image = await load({"disk.fvd": store})
    await image.begin_writing()
    for chunk in (3, 1, 5):
        await image.write(chunk * 4096, b"x" * 4096)

    async def fails(buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "a bad sector")

    store.pread = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="a bad sector"):
        await image.read(0, 64 * 4096)


async def test_past_the_end_of_a_base_that_has_shrunk_are_zeros(tmp_path: Path) -> None:
    """Whatever the buffer held before."""
    create(tmp_path / "base.fvd", 40 * 4096, CreateOptions())
    overlay = CreateOptions(base_img="base.fvd", base_img_fmt="fvd")
    create(tmp_path / "disk.fvd", 64 * 4096, overlay, base_length=64 * 4096)
    stores = {name: MemoryStore(content, name) for name, content in read_files(tmp_path).items()}
    image = await load(stores, "disk.fvd")
    for first in (30, 39, 40, 50):
        assert await read_as_mounted(image, first * 4096 + 10, 8000) == bytes(8000)


class HeldFlush(MemoryStore):
    """A flush that has begun with the write ends when the test says so."""

    def __init__(self, data: Buffer, name: str) -> None:
        super().__init__(data, name)
        self.waiting: list[Done] = []

    def start_flush(self, done: Done) -> bool:
        self.waiting.append(done)
        return True


async def image_with_held_flush(tmp_path: Path) -> tuple[Image, HeldFlush]:
    """Its first sector is committed."""
    next(layout for layout in LAYOUTS if layout.name == "cow-512").build(tmp_path)
    stores: dict[str, MemoryStore] = {name: HeldFlush(content, name) for name, content in read_files(tmp_path).items()}
    image = await load(stores)
    await image.begin_writing()
    await image.write(0, b"a" * SECTOR)
    await image.fsync()
    store = stores[IMAGE]
    assert isinstance(store, HeldFlush)
    return image, store


async def test_an_fsync_without_a_task_covers_what_was_written_before_it(tmp_path: Path) -> None:
    image, store = await image_with_held_flush(tmp_path)
    told: list[int] = []
    await image.write(0, b"b" * SECTOR)
    assert image.begin_fsync().start(told.append)
    assert image.committer.dirty
    store.waiting.pop()(0)
    assert told == [0]
    assert not image.committer.dirty

    await image.write(0, b"c" * SECTOR)
    assert image.begin_fsync().start(told.append)
    await image.write(0, b"d" * SECTOR)
    store.waiting.pop()(0)
    assert told == [0, 0]
    assert image.committer.dirty, "the last write is not covered"
    flushes = store.calls["flush"]
    await image.fsync()
    assert store.calls["flush"] == flushes + 1
    await image.close()


async def test_an_fsync_without_a_task_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    image, store = await image_with_held_flush(tmp_path)
    told: list[int] = []
    await image.write(0, b"b" * SECTOR)
    assert image.begin_fsync().start(told.append)
    store.waiting.pop()(-errno.ENOSPC)
    assert told == [-errno.EIO]
    assert image.committer.dirty
    flushes = store.calls["flush"]
    with pytest.raises(OSError, match=r"a flush of .* failed"):
        await image.fsync()
    assert store.calls["flush"] == flushes
    await image.close()


async def test_what_is_more_than_a_flush_needs_a_task(tmp_path: Path) -> None:
    image, store = await image_with_held_flush(tmp_path)
    told: list[int] = []
    await image.write(40 * SECTOR, b"b" * SECTOR)  # a block that is not local yet
    assert image.committer.uncommitted
    fsync = image.begin_fsync()
    assert not fsync.start(told.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.fsync)
        while image.committer.uncommitted:
            await trio.lowlevel.checkpoint()
        assert not fsync.start(told.append), "a commit is under way"
    image.base_writer = Unused()
    assert not fsync.start(told.append), "the base is written"
    image.base_writer = None
    image.committer.failed = "broken"
    assert not fsync.start(told.append)
    assert not store.waiting
    assert not told


class Unused:
    """A writer to the base that nobody calls."""

    async def wrote(self, first: int, end: int, offset: int, data: Buffer) -> None:
        raise AssertionError

    async def flush(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


class FailsOnce(MemoryStore):
    """Of calls that are started, the next one fails."""

    error = 0
    raises = False
    """Instead of telling."""

    def start_pread(self, buffer: memoryview, offset: int, done: Done) -> bool:
        return self._fail(done) or super().start_pread(buffer, offset, done)

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        return self._fail(done) or super().start_pwrite(data, offset, done)

    def _fail(self, done: Done) -> bool:
        """At once, which is allowed, too."""
        error, self.error = self.error, 0
        if error and self.raises:
            raise OSError(error, os.strerror(error))
        if error:
            done(-error)
        return error != 0


@pytest.mark.parametrize("raises", [False, True])
async def test_what_failed_without_a_task_is_answered_so_and_not_done_again(tmp_path: Path, raises: bool) -> None:
    """And holds up nobody: a shrink waits for all writes and reads."""
    create(tmp_path / "disk.fvd", 64 * 4096, CreateOptions(base_img="base.raw", block_size=4096), base_length=64 * 4096)
    store = FailsOnce((tmp_path / "disk.fvd").read_bytes(), "disk.fvd", slow=True)
    store.raises = raises
    image = await load({"disk.fvd": store, "base.raw": MemoryStore(bytes(64 * 4096))})
    await image.begin_writing()
    await write_as_mounted(image, 0, b"a" * 4096)
    calls = store.calls.copy()
    store.error = errno.ENOSPC
    with pytest.raises(OSError) as caught:
        await write_as_mounted(image, 4096, b"b" * 4096)  # a block that is not local
    assert caught.value.errno == errno.ENOSPC
    assert not image.in_use
    assert not image._locks
    store.error = errno.EIO
    with pytest.raises(OSError) as caught:
        await read_as_mounted(image, 0, 4096)
    assert caught.value.errno == errno.EIO
    assert not image.in_use
    assert (store.calls["pread"], store.calls["pwrite"]) == (calls["pread"], calls["pwrite"])
    assert await read_as_mounted(image, 0, 4096) == b"a" * 4096
    with trio.fail_after(60):
        await image.resize(4096, shrink=True)
        await image.close()


async def device_image(tmp_path: Path, chunks: int) -> tuple[Image, CrashStore]:
    """A compact image on a device that held something before, open for writing."""
    path = tmp_path / "disk.fvd"
    header = create(path, chunks * 4096, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    content = path.read_bytes()[: header.metadata_size] + b"old!" * (chunks * 1024)
    store = CrashStore(content, "disk.fvd", fixed_size=True)
    image = await load({"disk.fvd": store})
    await image.begin_writing()
    return image, store


async def test_what_a_crash_may_leave_on_a_device_is_bounded(tmp_path: Path) -> None:
    image, store = await device_image(tmp_path, 64)
    assert isinstance(image.storage, ChunkedStorage)
    image.storage.window = 5
    for chunk in range(60):
        await image.write(chunk * 4096, b"x" * 4096)
        left = MemoryStore(store.crash(random.Random(chunk)), "disk.fvd", fixed_size=True)
        again = await load({"disk.fvd": left})
        assert again.table is not None
        assert again.table.highest >= chunk - 5
        if not again.header.clean:
            behind = again.header.data_offset + (again.table.highest + 1) * 4096
            assert isinstance(again.storage, ChunkedStorage)
            again.storage.window = 5
            await again.begin_writing()
            assert left.data[behind : behind + 5 * 4096] == bytes(min(5 * 4096, len(left.data) - behind))
        await again.close()


async def test_what_a_shrink_frees_on_a_device_reads_as_zeros_when_its_numbers_come_again(tmp_path: Path) -> None:
    image, store = await device_image(tmp_path, 64)
    await image.write(0, b"x" * 64 * 4096)
    await image.resize(10 * 4096, shrink=True)
    await image.close()
    start = image.header.data_offset
    assert bytes(store.data[start : start + 10 * 4096]) == b"x" * 10 * 4096
    assert not any(store.data[start + 10 * 4096 : start + 64 * 4096])


async def apart(tmp_path: Path, **changes: int) -> tuple[Image, CrashStore]:
    """A compact image whose data file has a leftover behind its one chunk in use, with these fields of its header."""
    path = tmp_path / "disk.fvd"
    options = CreateOptions(compact=True, chunk_size=4096, grow_unit=4096, data_file="data")
    create(path, 64 * 4096, options)
    stores = {name: CrashStore(content, name) for name, content in read_files(tmp_path).items()}
    image = await load(stores)
    await image.begin_writing()
    await image.write(0, b"a" * 4096)
    await image.close()
    header = with_fields(image.header, **changes).encode()
    meta = CrashStore(header + bytes(stores[IMAGE].data[len(header) :]), IMAGE)
    assert bytes(stores["data"].data).rstrip(b"\0") == b"a" * 4096, "there is no leftover yet"
    store = CrashStore(bytes(stores["data"].data) + b"left" * 4096, "data")
    image = await load({IMAGE: meta, "data": store})
    await image.begin_writing()
    return image, store


async def test_what_a_recovery_clears_is_stable_when_the_image_is_closed(tmp_path: Path) -> None:
    image, store = await apart(tmp_path, clean_shutdown=0)
    await image.close()
    for seed in range(8):
        assert store.crash(random.Random(seed)).rstrip(b"\0") == b"a" * 4096


async def test_what_a_shrink_gives_back_is_stable_when_the_image_is_closed(tmp_path: Path) -> None:
    image, store = await apart(tmp_path)
    await image.write(4096, b"b" * 20 * 4096)
    await image.resize(4096, shrink=True)
    await image.close()
    for seed in range(8):
        assert store.crash(random.Random(seed)).rstrip(b"\0") == b"a" * 4096


async def test_a_shrink_that_failed_does_not_give_back_what_is_in_use_again(tmp_path: Path) -> None:
    path = tmp_path / "disk.fvd"
    create(path, 64 * 4096, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    store = MemoryStore(path.read_bytes(), "disk.fvd")
    image = await load({"disk.fvd": store})
    await image.begin_writing()
    await image.write(0, b"a" * 20 * 4096)
    await image.fsync()
    checkpoint = image.committer.checkpoint
    calls = 0

    async def fails(*, clear_journal: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "no space")
        await checkpoint(clear_journal=clear_journal)

    image.committer.checkpoint = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space"):
        await image.resize(10 * 4096, shrink=True)
    image.committer.checkpoint = checkpoint  # type: ignore[method-assign]
    await image.resize(64 * 4096)
    await image.write(30 * 4096, b"b" * 15 * 4096)
    await image.write(50 * 4096, b"c" * 4096)
    await image.resize(50 * 4096, shrink=True)
    expected = b"a" * 10 * 4096 + bytes(20 * 4096) + b"b" * 15 * 4096 + bytes(5 * 4096)
    assert await image.read(0, image.size) == expected
    await image.close()
