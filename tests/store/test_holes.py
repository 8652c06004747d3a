"""Files and devices of the host: zeroed, reserved, asked for holes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fvdfs.store.base import next_data
from fvdfs.store.host import HostFile, open_path
from support.devices import loop_device
from support.mounts import MIB

KIB = 1 << 10
DATA = random.Random(1).randbytes(MIB)
RANGES = [(0, 512), (512, 1024), (5, 6), (4096, 8192), (100, 9000), (4095, 12289), (MIB - 700, MIB), (0, MIB), (7, 7)]


@contextmanager
def opened(path: Path) -> Iterator[HostFile]:
    file = open_path(str(path), writable=True)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def without_holes(point: Path) -> Iterator[Path]:
    """A file system that knows no fallocate(2)."""
    point.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


async def check_zeroed(file: HostFile, *, writes: bool) -> None:
    """Zero each range of a full file, by itself."""
    for start, stop in RANGES:
        await file.pwrite(DATA, 0)
        await file.zero(start, stop - start, writes=writes)
        found = memoryview(bytearray(MIB))
        assert await file.pread(found, 0) == MIB
        assert found == DATA[:start] + bytes(stop - start) + DATA[stop:], (start, stop)
        await file.flush()


@pytest.mark.parametrize("writes", [False, True])
async def test_a_file(tmp_path: Path, writes: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with opened(path) as file:
        await check_zeroed(file, writes=writes)
        await file.zero(0, MIB, writes=writes)
        assert path.stat().st_blocks == 0
        for offset in (MIB - 100, MIB, 1 << 40):
            await file.zero(offset, 5 * MIB, writes=writes)
        assert path.stat().st_size == MIB, "it gets no longer"


async def test_a_file_system_without_holes(tmp_path: Path) -> None:
    with without_holes(tmp_path / "point") as point:
        path = point / "file"
        path.write_bytes(DATA)
        with opened(path) as file:
            await check_zeroed(file, writes=True)
            await file.pwrite(DATA, 0)
            with pytest.raises(OSError) as caught:
                await file.zero(0, MIB, writes=False)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert path.read_bytes() == DATA
            await file.zero(MIB - 100, 5 * MIB)
            assert path.read_bytes() == DATA[:-100] + bytes(100), "it gets no longer"
            with pytest.raises(OSError) as caught:
                await file.reserve(0, 4096)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert await file.extent(0, MIB) == (MIB, False), "where nobody can say, all is data"


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_device(tmp_path: Path, claimed: bool) -> None:
    """At any byte; also one that is claimed, with unwritten data in memory: it is busy then, until that is written."""
    backing = tmp_path / "backing"
    backing.write_bytes(DATA)
    with loop_device(backing) as device, opened(device) as file:
        if claimed:
            file.claim_device()
        await check_zeroed(file, writes=True)
        await file.pwrite(DATA, 0)
        await file.zero(4096, 512 * KIB, writes=False)  # a loop device gives back the space of its file
        await file.flush()
        assert backing.stat().st_blocks * 512 <= MIB - 512 * KIB
        await file.reserve(0, MIB)
        assert await file.extent(0, MIB) == (MIB, False), "a device tells nothing"


async def test_what_was_reserved(tmp_path: Path) -> None:
    """It takes space, past the end as well, and is a hole all the same."""
    path = tmp_path / "file"
    path.write_bytes(DATA[:4096])
    with opened(path) as file:
        await file.reserve(0, 0)
        await file.reserve(0, MIB)
        status = path.stat()
        assert (status.st_size, status.st_blocks * 512 >= MIB) == (4096, True)
        assert path.read_bytes() == DATA[:4096]
        await file.resize(MIB)
        assert await file.extent(4096, MIB) == (MIB, True)
        with pytest.raises(OSError) as caught:
            await file.reserve(0, 1 << 60)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)


async def test_extents_of_a_file(tmp_path: Path) -> None:
    """Also of what has not left the memory of the host yet, and past the end."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 16 * MIB)
    with opened(path) as file:
        assert await file.extent(0, 16 * MIB) == (16 * MIB, True)
        await file.pwrite(b"x" * 8192, 4 * MIB)
        await file.pwrite(b"y", 12 * MIB - 1)
        ends = [4 * MIB, 4 * MIB + 8192, 12 * MIB - 4096, 12 * MIB, 16 * MIB]
        for start, stop, hole in zip([0, *ends], ends, [True, False] * 2 + [True], strict=False):
            assert await file.extent(start, 20 * MIB) == (stop if stop < 16 * MIB else 20 * MIB, hole)
            assert await file.extent(start, start + 512) == (start + 512, hole)
        assert await next_data(file, 0, 16 * MIB) == 4 * MIB
        assert await next_data(file, 5 * MIB, 6 * MIB) == 6 * MIB
        assert await next_data(file, 12 * MIB, 16 * MIB) == 16 * MIB
        assert await file.extent(16 * MIB, 17 * MIB) == (17 * MIB, True)
        await file.zero(4 * MIB, 8192)
        assert await next_data(file, 0, 16 * MIB) == 12 * MIB - 4096
