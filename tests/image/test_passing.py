"""Data that the kernel writes by itself: what a power cut may leave of it, at any moment."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import HEADER_SPACE, SECTOR, Header, with_fields
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image
from fvdfs.image.policy import Policy
from support.fakes import Clock, CrashStore, MemoryStore

SIZE = 16 * SECTOR
HEADER = new_header(SIZE, None, CreateOptions(data_file="data"))
CONTENT = random.Random(1).randbytes(SIZE)


class Disk:
    """An image over stores that can be cut, and what of it must survive a cut at each time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.meta = CrashStore(HEADER.encode().ljust(HEADER_SPACE, b"\0"), "meta", clock=self.clock)
        self.data = CrashStore(CONTENT, "data", clock=self.clock)
        self.image: Image
        self.flushed = CONTENT
        self.promises: list[tuple[int, frozenset[int], bytes]] = []
        """From a time on: the sizes that the disk may have, in bytes, and what it begins with."""

    async def open(self) -> None:
        self.image = await loaded(self.meta, self.data)
        await self.image.begin_writing()
        await self.image.pass_through()
        self.stable()

    def stable(self) -> None:
        """From now on the disk is as it is now."""
        self.flushed = bytes(self.data.data)
        self.promise()

    def promise(self, *sizes: int) -> None:
        """From now on the disk has what was flushed last, or any size up to one of these, and is not changed before."""
        every = (len(self.flushed), len(self.data.data), *sizes)
        found = frozenset(-(-size // SECTOR) * SECTOR for size in every)
        self.promises.append((self.clock.tick(), found, self.flushed[: min(every)]))

    async def write(self, data: bytes, offset: int) -> None:
        """As the kernel does, past what was flushed."""
        self.promise(offset + len(data))
        await self.data.pwrite(data, offset)
        self.image.look_at_length(len(self.data.data))

    async def fsync(self) -> None:
        await self.image.fsync()
        self.stable()

    async def truncate(self, size: int) -> None:
        self.promise(size)
        await self.image.resize(size, shrink=True)
        self.stable()

    async def close(self) -> None:
        self.image.committer.end_unseen_writes(still_used=False)
        await self.image.close()


async def loaded(meta: MemoryStore, data: MemoryStore) -> Image:
    header = Header.decode(bytes(meta.data), "disk").with_length(len(data.data))
    raw = bytes(meta.data[:HEADER_SPACE])
    return await load_image("disk", header, raw, meta, data, None, Policy())


async def work(disk: Disk) -> None:
    await disk.open()
    await disk.write(b"a" * 700, SIZE)
    await disk.fsync()
    await disk.write(b"b" * 5000, SIZE + 700)
    await disk.fsync()
    await disk.truncate(SIZE // 2)
    await disk.write(b"c" * 300, SIZE // 2)
    await disk.truncate(SIZE)
    await disk.write(b"d", SIZE)
    await disk.close()


async def test_a_power_cut_at_any_moment() -> None:
    """The disk is as long as what was flushed, holds it, and does not look cut; also after a second power cut."""
    disk = Disk()
    await work(disk)
    header = Header.decode(bytes(disk.meta.data), "disk")
    assert (header.clean, header.virtual_disk_size) == (True, len(disk.data.data))
    rng = random.Random(2)
    for at in range(disk.promises[0][0], disk.clock.now + 1):
        _, sizes, content = [promise for promise in disk.promises if promise[0] <= at][-1]
        for _ in range(30):
            meta, data = disk.meta.crash(rng, at), disk.data.crash(rng, at)
            clock = Clock()
            stores = [CrashStore(meta, "meta", clock=clock), CrashStore(data, "data", clock=clock)]
            await judge(stores, sizes, content)
            again = rng.randrange(clock.now + 1)
            await judge([MemoryStore(store.crash(rng, again)) for store in stores], sizes, content)


async def judge(stores: list[MemoryStore] | list[CrashStore], sizes: frozenset[int], content: bytes) -> None:
    meta, data = stores
    image = await loaded(meta, data)
    assert image.damage == ""
    assert min(sizes) <= image.size <= max(sizes), sizes
    expected = await image.read(0, image.size)
    assert expected[: len(content)] == content
    await image.begin_writing()
    assert image.header.clean
    assert await image.read(0, image.size + 1) == expected
    await image.close()
    header = Header.decode(bytes(meta.data), "disk")
    assert (header.clean, header.virtual_disk_size, len(data.data)) == (True, image.size, image.size)


async def test_whoever_still_writes_leaves_it_unclean() -> None:
    disk = Disk()
    await disk.open()
    await disk.write(b"a" * 700, SIZE)
    disk.image.committer.end_unseen_writes(still_used=True)
    await disk.image.close()
    header = Header.decode(bytes(disk.meta.data), "disk")
    assert not header.clean
    assert header.virtual_disk_size <= len(disk.data.data)


@pytest.mark.parametrize("call", ["fsync", "resize"])
async def test_data_that_somebody_cuts(call: str) -> None:
    disk = Disk()
    await disk.open()
    disk.data.data = disk.data.data[: SIZE // 2]
    disk.image.look_at_length(SIZE // 2)
    assert "was cut" in disk.image.damage
    calls: dict[str, Callable[[], Awaitable[None]]] = {
        "fsync": disk.image.fsync,
        "resize": lambda: disk.image.resize(2 * SIZE),
    }
    with pytest.raises(OSError) as caught:
        await calls[call]()
    assert caught.value.errno == errno.EIO


def test_the_length_counts_where_the_image_was_not_closed() -> None:
    def size(storage: int, **fields: int | str) -> int:
        return with_fields(HEADER, **fields).with_length(storage).virtual_disk_size

    assert size(SIZE + 1) == SIZE
    assert size(SIZE + 1, clean_shutdown=0) == SIZE + SECTOR
    assert size(SIZE + SECTOR, clean_shutdown=0) == SIZE + SECTOR
    assert size(SIZE - 1, clean_shutdown=0) == SIZE
    assert size(SIZE + 1, clean_shutdown=0, data_file="") == SIZE
    assert size(SIZE + 1, clean_shutdown=0, data_file_fmt="qcow2") == SIZE
    compact = new_header(SIZE, None, CreateOptions(data_file="data", compact=True, chunk_size=4096))
    assert with_fields(compact, clean_shutdown=0).with_length(2 * SIZE) == with_fields(compact, clean_shutdown=0)
