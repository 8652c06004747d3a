"""Chunks of a full device are used again: what a guest has discarded makes room for what it writes."""

from __future__ import annotations

import errno
import random
import time
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.alloc import chunked
from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.alloc.growth import GrowCommand
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import UNALLOCATED
from fvdfs.image.image import Image
from support.builder import IMAGE, create, load
from support.fakes import CrashStore, MemoryStore

CHUNK, CHUNKS, ROOM = 4096, 32, 8
BASE = b"base" * (CHUNK // 4)


def chunk_of(number: int) -> bytes:
    """Content that no other chunk has."""
    return number.to_bytes(4, "little") * (CHUNK // 4)


async def full_device(tmp_path: Path, *, journal: int | None = None, base_chunks: int = 0) -> tuple[Image, CrashStore]:
    """A compact image, open for writing, on a device that has room for fewer chunks than the disk has."""
    options = CreateOptions(compact=True, chunk_size=CHUNK, grow_unit=CHUNK, journal_size=journal)
    if base_chunks:
        options = CreateOptions(
            compact=True, chunk_size=CHUNK, grow_unit=CHUNK, journal_size=journal, base_img="base", block_size=CHUNK
        )
    header = create(tmp_path / IMAGE, CHUNKS * CHUNK, options, base_length=base_chunks * CHUNK if base_chunks else None)
    content = (tmp_path / IMAGE).read_bytes()[: header.metadata_size] + b"old!" * (ROOM * CHUNK // 4)
    store = CrashStore(content, IMAGE, fixed_size=True)
    image = await load(_stores(store, base_chunks))
    await image.begin_writing()
    return image, store


def _reopened(store: MemoryStore) -> MemoryStore:
    return MemoryStore(store.data, IMAGE, fixed_size=True)


def _stores(store: MemoryStore, base_chunks: int = 0) -> dict[str, MemoryStore]:
    stores = {IMAGE: store}
    if base_chunks:
        stores["base"] = MemoryStore(BASE * base_chunks, "base", writable=False)
    return stores


async def test_what_was_discarded_makes_room(tmp_path: Path) -> None:
    image, store = await full_device(tmp_path)
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    with pytest.raises(OSError, match="no command") as caught:
        await image.write(20 * CHUNK, b"x")
    assert caught.value.errno == errno.ENOSPC
    await image.zero(2 * CHUNK, 5 * CHUNK)
    for chunk in range(20, 23):
        await image.write(chunk * CHUNK + 100, b"new")
        assert await image.read(chunk * CHUNK, CHUNK) == bytes(100) + b"new" + bytes(CHUNK - 103)
    with pytest.raises(OSError) as caught:
        await image.write(23 * CHUNK, b"x")
    assert caught.value.errno == errno.ENOSPC
    for chunk in range(2, 5):
        assert not any(await image.read(chunk * CHUNK, CHUNK))
    assert await image.read(5 * CHUNK, CHUNK) == chunk_of(6)
    await image.close()
    again = await load(_stores(_reopened(store)))
    assert await again.read(20 * CHUNK + 100, 3) == b"new"
    assert await again.read(7 * CHUNK, CHUNK) == chunk_of(8)
    await again.close()


async def test_what_was_written_again_is_kept(tmp_path: Path) -> None:
    image, _ = await full_device(tmp_path)
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.zero(0, 2 * CHUNK)
    await image.write(CHUNK - 1, b"x")
    await image.write(20 * CHUNK, b"y")
    with pytest.raises(OSError) as caught:
        await image.write(21 * CHUNK, b"z")
    assert caught.value.errno == errno.ENOSPC
    assert await image.read(CHUNK - 1, 2) == b"x\0"
    await image.close()


async def test_numbers_that_no_entry_names_are_given_again(tmp_path: Path) -> None:
    """As a crash leaves them, with a lost session's bytes in their places."""
    image, store = await full_device(tmp_path)
    assert image.table is not None
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.committer.checkpoint(clear_journal=True)
    image.table.free([1, 4])
    await image.close()
    image = await load(_stores(_reopened(store)))
    await image.begin_writing()
    for chunk in (20, 21):
        await image.write(chunk * CHUNK + 7, b"new")
        assert await image.read(chunk * CHUNK, CHUNK) == bytes(7) + b"new" + bytes(CHUNK - 10)
    with pytest.raises(OSError) as caught:
        await image.write(22 * CHUNK, b"x")
    assert caught.value.errno == errno.ENOSPC
    await image.close()


async def test_a_chunk_of_the_bases_range_is_kept(tmp_path: Path) -> None:
    """A local block without a chunk is what a lost table entry looks like."""
    image, store = await full_device(tmp_path, base_chunks=4)
    assert image.table is not None
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.zero(2 * CHUNK, 6 * CHUNK)
    for chunk in (20, 21):
        await image.write(chunk * CHUNK, b"new")
    with pytest.raises(OSError) as caught:
        await image.write(22 * CHUNK, b"x")
    assert caught.value.errno == errno.ENOSPC
    assert [image.table[chunk] == UNALLOCATED for chunk in range(8)] == [False] * 4 + [True] * 2 + [False] * 2
    assert not any(await image.read(2 * CHUNK, 4 * CHUNK))
    await image.close()
    again = await load(_stores(_reopened(store), 4))
    assert not any(await again.read(2 * CHUNK, 4 * CHUNK))
    await again.close()


async def test_a_discard_that_takes_space_where_there_is_none(tmp_path: Path) -> None:
    """Blocks of the base get chunks. Nobody asked for space: QEMU would stop the machine at ENOSPC."""
    image, store = await full_device(tmp_path, base_chunks=ROOM + 2)
    with pytest.raises(OSError) as caught:
        await image.zero(0, image.size, discard=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OSError) as caught:
        await image.zero(0, image.size)
    assert caught.value.errno == errno.ENOSPC
    found = await image.read(0, (ROOM + 2) * CHUNK)
    assert all(found[at : at + CHUNK] in (bytes(CHUNK), BASE) for at in range(0, len(found), CHUNK))
    await image.fsync()
    await image.close()
    again = await load(_stores(_reopened(store), ROOM + 2))
    assert await again.read(0, len(found)) == found
    await again.close()


async def test_a_smaller_disk_gives_no_number_twice(tmp_path: Path) -> None:
    image, _ = await full_device(tmp_path)
    for chunk in range(ROOM):
        await image.write(chunk * CHUNK, chunk_of(chunk + 1))
    await image.zero(3 * CHUNK, 6 * CHUNK)
    await image.write(20 * CHUNK, b"x")
    assert image.table is not None
    assert image.table.spare + image.table.unnamed == 2
    await image.resize(2 * CHUNK, shrink=True)
    await image.resize(CHUNKS * CHUNK)
    for chunk in range(2, ROOM):
        await image.write(chunk * CHUNK, chunk_of(100 + chunk))
    with pytest.raises(OSError) as caught:
        await image.write(ROOM * CHUNK, b"x")
    assert caught.value.errno == errno.ENOSPC
    numbers = [image.table[chunk] for chunk in range(CHUNKS) if image.table[chunk] != UNALLOCATED]
    assert len(numbers) == len(set(numbers)) == ROOM
    assert await image.read(0, 2 * CHUNK) == chunk_of(1) + chunk_of(2)
    await image.close()


@pytest.mark.parametrize("base_chunks", [0, 4])
@pytest.mark.parametrize("journal", [None, 0])
@pytest.mark.parametrize("seed", range(3))
async def test_a_power_cut_at_any_time(tmp_path: Path, seed: int, journal: int | None, base_chunks: int) -> None:
    """Each chunk of the disk has what was flushed last, or something of what came since; never what is another's."""
    rng = random.Random(seed)
    image, store = await full_device(tmp_path, journal=journal, base_chunks=base_chunks)
    now = [BASE if chunk < base_chunks else bytes(CHUNK) for chunk in range(CHUNKS)]
    flushed, since = now[:], [[content] for content in now]
    generation, reused = 0, 0
    owners: dict[int, int] = {}
    for step in range(50):
        action, chunk = rng.choice(("write", "write", "write", "zero", "fsync")), rng.randrange(CHUNKS)
        try:
            if action == "write":
                generation += 1
                since[chunk].append(chunk_of(generation))
                await image.write(chunk * CHUNK, chunk_of(generation))
                now[chunk] = chunk_of(generation)
            elif action == "zero":
                end = min(CHUNKS, chunk + rng.randrange(1, 6))
                for number in range(chunk, end):
                    since[number].append(bytes(CHUNK))
                await image.zero(chunk * CHUNK, end * CHUNK, discard=rng.random() < 0.5)
                now[chunk:end] = [bytes(CHUNK)] * (end - chunk)
            else:
                await image.fsync()
                flushed, since = now[:], [[content] for content in now]
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EOPNOTSUPP)
        assert image.table is not None
        for at in range(CHUNKS):
            number = image.table[at]
            if number != UNALLOCATED:
                reused += owners.get(number, at) != at
                owners[number] = at
        assert [bytes(await image.read(at * CHUNK, CHUNK)) for at in range(CHUNKS)] == now
        left = MemoryStore(store.crash(random.Random(step)), IMAGE, fixed_size=True)
        again = await load(_stores(left, base_chunks))
        assert not again.damage
        await again.begin_writing(accept_unclean=True)
        for at in range(CHUNKS):
            found = bytes(await again.read(at * CHUNK, CHUNK))
            for sector in range(0, CHUNK, 512):
                allowed = {content[sector : sector + 512] for content in (flushed[at], *since[at])}
                assert found[sector : sector + 512] in allowed, (seed, step, at)
        await again.close()
    assert generation
    if not base_chunks:
        assert reused, "nothing was used again: the test shows nothing"
    await image.close()


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


async def test_places_are_made_ready_while_the_disk_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, store = await full_device(tmp_path)
    storage = storage_of(image)
    await fill(image)
    await image.zero(0, 8 * CHUNK)
    storage._ahead = 1
    await image.write(20 * CHUNK, b"x")
    assert storage._unnamed
    storage._ahead = 3
    ready, zero = trio.Event(), store.zero

    async def zero_slowly(offset: int, length: int, *, writes: bool = True) -> None:
        await ready.wait()
        await zero(offset, length, writes=writes)

    monkeypatch.setattr(store, "zero", zero_slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage._grow_ahead)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(partial(image.resize, CHUNK, shrink=True))
        await trio.testing.wait_all_tasks_blocked()
        ready.set()
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
    await image.write(20 * CHUNK, chunk_of(77))

    async def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(image.committer, "change_header", full)
        with pytest.raises(OSError, match="full"):
            await image.resize((CHUNKS + 1) * CHUNK)
    for chunk in range(1, ROOM - 1):
        await image.write(chunk * CHUNK, chunk_of(100 + chunk))
    with pytest.raises(OSError):
        await image.write(21 * CHUNK, b"x")
    numbers = numbers_of(image)
    assert len(numbers) == len(set(numbers))
    assert await image.read(20 * CHUNK, CHUNK) == chunk_of(77)
    for chunk in range(1, ROOM - 1):
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
    began = time.process_time()
    for chunk in range(0, 20000, 2):
        storage.zeroed(chunk * 4096, (chunk + 1) * 4096)
    assert time.process_time() - began < 2
