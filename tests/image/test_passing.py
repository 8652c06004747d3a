"""Data that the kernel writes by itself. What a power cut may leave of it, `test_crash` tries (`passed-through`)."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import HEADER_SPACE, SECTOR, Header, with_fields
from fvdfs.image.image import Image
from fvdfs.store.base import Done
from support.builder import load
from support.fakes import MemoryStore

SIZE = 16 * SECTOR
HEADER = new_header(SIZE, None, CreateOptions(data_file="data"))
CONTENT = random.Random(1).randbytes(SIZE)


async def opened() -> tuple[Image, MemoryStore, MemoryStore]:
    """An image that the kernel writes, and its stores."""
    meta = MemoryStore(HEADER.encode().ljust(HEADER_SPACE, b"\0"), "disk")
    data = MemoryStore(CONTENT, HEADER.data_file)
    image = await load({"disk": meta, HEADER.data_file: data}, "disk")
    await image.begin_writing()
    await image.pass_through()
    return image, meta, data


async def test_whoever_still_writes_leaves_it_unclean() -> None:
    image, meta, data = await opened()
    await data.pwrite(b"a" * 700, SIZE)
    image.look_at_length(SIZE + 700)
    image.committer.end_unseen_writes(still_used=True)
    await image.close()
    header = Header.decode(bytes(meta.data), "disk")
    assert not header.clean
    assert header.virtual_disk_size <= len(data.data)


async def test_closing_flushes_what_was_written_while_a_flush_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mount ends, the kernel may not have waited for that one."""
    image, _, data = await opened()
    under_way: list[Done] = []

    def hold(done: Done) -> bool:
        under_way.append(done)
        return True

    monkeypatch.setattr(data, "start_flush", hold)
    assert image.begin_fsync().start(lambda _: None)
    await data.pwrite(b"later", 0)
    image.committer.end_unseen_writes(still_used=False)
    under_way.pop()(0)
    flushes = data.calls["flush"]
    await image.end_writing()
    assert data.calls["flush"] > flushes
    await image.close()


@pytest.mark.parametrize("call", ["fsync", "resize"])
async def test_data_that_somebody_cuts(call: str) -> None:
    image, _, data = await opened()
    data.data = data.data[: SIZE // 2]
    image.look_at_length(SIZE // 2)
    assert "was cut" in image.damage
    calls: dict[str, Callable[[], Awaitable[None]]] = {
        "fsync": image.fsync,
        "resize": lambda: image.resize(2 * SIZE),
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
