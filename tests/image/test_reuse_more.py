"""Chunks of a full device are used again beside all else that goes on there."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
import trio

from fvdfs.alloc import chunked
from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.alloc.growth import GrowCommand
from fvdfs.format.header import UNALLOCATED
from fvdfs.image.image import Image
from image.test_reuse import CHUNK, CHUNKS, ROOM, chunk_of, full_device


async def fill(image: Image) -> None:
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))


def storage_of(image: Image) -> ChunkedStorage:
    assert isinstance(image.storage, ChunkedStorage)
    return image.storage


def numbers_of(image: Image) -> list[int]:
    assert image.table is not None
    return [image.table[chunk] for chunk in range(image.table.chunks) if image.table[chunk] != UNALLOCATED]


async def test_a_write_of_more_chunks_than_are_ready(tmp_path: Path) -> None:
    image, _ = await full_device(tmp_path)
    await fill(image)
    await image.zero(0, 2 * CHUNK)
    await image.write(20 * CHUNK, b"x")
    await image.zero(2 * CHUNK, 5 * CHUNK)
    await image.write(21 * CHUNK, bytes(range(1, 256)) * 40)  # three chunks
    assert await image.read(21 * CHUNK, 255 * 40) == bytes(range(1, 256)) * 40
    await image.close()


async def test_a_device_grows_where_all_was_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_PER_LOOK", 2 * CHUNK)
    image, store = await full_device(tmp_path)
    monkeypatch.setattr(storage_of(image), "_command", GrowCommand("disk", ("false",), ""))

    async def grow(self: GrowCommand, size: int, device: str) -> None:
        store.extend(b"old!" * (size // 4))

    monkeypatch.setattr(GrowCommand, "grow", grow)
    await fill(image)
    await image.zero(0, 8 * CHUNK)
    await fill(image)
    await image.write(20 * CHUNK, b"x")
    await image.close()


async def test_places_are_made_ready_while_the_disk_shrinks(tmp_path: Path) -> None:
    image, store = await full_device(tmp_path)
    storage = storage_of(image)
    await fill(image)
    await image.zero(0, 8 * CHUNK)
    storage._ahead = 1
    await image.write(20 * CHUNK, b"x")
    assert storage._unnamed
    storage._ahead = 3
    async with trio.open_nursery() as nursery:
        store.slow = True
        nursery.start_soon(storage._grow_ahead)
        await trio.lowlevel.checkpoint()
        await image.resize(CHUNK, shrink=True)
    await image.resize(CHUNKS * CHUNK)
    for chunk in range(1, ROOM):
        await image.write(chunk * CHUNK, chunk_of(100 + chunk))
    numbers = numbers_of(image)
    assert len(numbers) == len(set(numbers))
    for chunk in range(1, ROOM):
        assert await image.read(chunk * CHUNK, CHUNK) == chunk_of(100 + chunk)
    await image.close()


async def test_a_growth_that_fails_gives_no_number_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = await full_device(tmp_path)
    await fill(image)
    await image.zero(CHUNK, 8 * CHUNK)
    await image.write(CHUNK, chunk_of(77))

    async def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(image.committer, "change_header", full)
        with pytest.raises(OSError, match="full"):
            await image.resize((CHUNKS + 1) * CHUNK)
    for chunk in range(2, ROOM):
        await image.write(chunk * CHUNK, chunk_of(100 + chunk))
    with pytest.raises(OSError):
        await image.write(20 * CHUNK, b"x")
    numbers = numbers_of(image)
    assert len(numbers) == len(set(numbers))
    assert await image.read(CHUNK, CHUNK) == chunk_of(77)
    for chunk in range(2, ROOM):
        assert await image.read(chunk * CHUNK, CHUNK) == chunk_of(100 + chunk)
    await image.close()


async def test_a_base_that_hangs_stops_only_who_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = await full_device(tmp_path, base_chunks=2)
    for chunk in range(4, 4 + ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.zero(5 * CHUNK, 8 * CHUNK)
    hangs = trio.Event()

    async def pread(buffer: memoryview, offset: int) -> int:
        await hangs.wait()
        return len(buffer)

    monkeypatch.setattr(image.base, "pread", pread)
    monkeypatch.setattr(image.base, "pread_nowait", lambda buffer, offset: False)
    monkeypatch.setattr(image.base, "start_pread", lambda buffer, offset, done: False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.read, 0, CHUNK)
        await trio.testing.wait_all_tasks_blocked()
        done = []

        async def write(offset: int, data: bytes) -> None:
            await image.write(offset, data)
            done.append(offset)

        nursery.start_soon(write, 20 * CHUNK, b"new")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, 4 * CHUNK, b"again")
        await trio.testing.wait_all_tasks_blocked(0.1)
        hangs.set()
        assert sorted(done) == [4 * CHUNK, 20 * CHUNK]
    await image.close()


async def test_a_copy_of_the_base_uses_discarded_chunks(tmp_path: Path) -> None:
    image, _ = await full_device(tmp_path, base_chunks=2)
    for chunk in range(4, 4 + ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.zero(5 * CHUNK, 8 * CHUNK)
    content = bytes(await image.read(0, 2 * CHUNK))
    assert await image.store_copy(0, memoryview(content)) == 2 * CHUNK
    assert await image.read(0, 2 * CHUNK) == content
    await image.close()


def test_many_discards_take_no_time_each(tmp_path: Path) -> None:
    from array import array

    from fvdfs.alloc.table import Table
    from support.fakes import MemoryStore

    chunks = 1 << 19
    table = Table(array("I", [UNALLOCATED]) * chunks, chunks, 1)
    store = MemoryStore(bytes(10), fixed_size=True)
    storage = ChunkedStorage(
        store,
        table,
        data_offset=0,
        chunk_size=4096,
        grow_unit=4096,
        size=chunks * 4096,
        grow_command=GrowCommand("", (), ""),
        window=10,
        spawn=None,
    )
    began = time.monotonic()
    for chunk in range(0, 20000, 2):
        storage.zeroed(chunk * 4096, (chunk + 1) * 4096)
    assert time.monotonic() - began < 1
