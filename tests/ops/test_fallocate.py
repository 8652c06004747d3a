"""FALLOCATE and LSEEK: what a kernel may ask, and what is answered; and what shows of them in a mount."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.ops.filesystem import Sync
from fvdfs.ops.wire import FALLOCATE, FUSE_FALLOCATE, FUSE_LSEEK, IN_HEADER, LSEEK
from fvdfs.store.host import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    PUNCH,
    ZERO_RANGE,
    HostFile,
    fallocate,
)
from support import reference
from support.builder import KIB
from support.fsx import seek
from support.kernel import Kernel
from support.mounts import MIB, PASSED_THROUGH, Mount, mounted, must, needs_passthrough
from support.served import BASE, SIZE, Served, failing

MODES = {
    "punch": PUNCH,
    "zero, keep size": ZERO_RANGE,
    "zero": FALLOC_FL_ZERO_RANGE,
    "allocate": 0,
    "allocate, keep size": FALLOC_FL_KEEP_SIZE,
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(folder, monkeypatch)


async def refused(call: Awaitable[object]) -> int | None:
    """With which errno."""
    with pytest.raises(OSError) as caught:
        await call
    return caught.value.errno


# --- messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [Sync.FLUSH, Sync.ALWAYS])
@modes
def test_each_mode(served: Served, mode: int, sync: Sync) -> None:
    """Inside the disk; over its end, which only those without KEEP_SIZE move; and behind it."""

    async def work(kernel: Kernel, fh: int) -> None:
        image = served.entry.image
        assert image is not None
        content = bytearray(BASE.ljust(SIZE, b"\0"))
        end = SIZE
        for offset, length in ((5000, 100_000), (SIZE - 700, 700 + 1000), (SIZE + 9000, 512), (1 << 22, 1)):
            await kernel.fallocate(fh, mode, offset, length)
            stop = offset + length
            if not mode & FALLOC_FL_KEEP_SIZE:
                end = max(end, stop)
                content.extend(bytes(end - len(content)))
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                content[offset:stop] = bytes(len(content[offset:stop]))
            assert image.end == end
            assert await image.read(0, end) == content
            assert image.committer.dirty == (sync is Sync.FLUSH) or end == SIZE
        assert served.libfuse.requests == []

    served.run(work, sync=sync)


@pytest.mark.parametrize("mode", [PUNCH, FALLOC_FL_ZERO_RANGE])
def test_always_makes_them_durable_before_they_are_answered(served: Served, mode: int) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        for offset in range(0, len(BASE), 300_000):
            await kernel.fallocate(fh, mode, offset + 100, 70_000)
            left = b"".join(reference.read_disk(served.folder / "a.fvd"))
            assert not any(left[offset + 100 : offset + 70_100])
            assert left[offset + 70_100 : offset + 80_000] == BASE[offset + 70_100 : offset + 80_000]

    served.run(work, sync=Sync.ALWAYS)


def test_what_cannot_be(served: Served) -> None:
    """Handles that nobody has, other modes, other ways to seek, places that no disk has."""

    async def work(kernel: Kernel, fh: int) -> None:
        image = served.entry.image
        assert image is not None
        assert await refused(kernel.fallocate(fh + 1, PUNCH, 0, 512)) == errno.EBADF
        assert await refused(kernel.seek(fh + 1, 0, os.SEEK_DATA)) == errno.EBADF
        for mode in (FALLOC_FL_PUNCH_HOLE, 8 | 1, 8, 32, 64, 1 << 31, PUNCH | ZERO_RANGE):
            assert await refused(kernel.fallocate(fh, mode, 0, 512)) == errno.EOPNOTSUPP
        for whence in (0, 1, 2, 5, 1 << 31):
            assert await refused(kernel.seek(fh, 0, whence)) == errno.EINVAL
        for offset, length in ((1 << 62, 1 << 62), ((1 << 63) - 1, 1), (0, 1 << 63), (1 << 63, 5), ((1 << 64) - 5, 9)):
            for mode in (0, FALLOC_FL_ZERO_RANGE):
                assert await refused(kernel.fallocate(fh, mode, offset, length)) == errno.EFBIG
            if offset:
                await kernel.fallocate(fh, PUNCH, offset, length)
                await kernel.fallocate(fh, FALLOC_FL_KEEP_SIZE, offset, length)
        for offset in (SIZE, SIZE + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert await refused(kernel.seek(fh, offset, whence)) == errno.ENXIO
        assert image.size == SIZE
        assert await kernel.read(fh, 0, 100_000) == BASE[:100_000]
        await kernel.fallocate(fh, PUNCH, 0, (1 << 63) - 1)
        assert not any(await image.read(0, SIZE))

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


def test_a_message_that_is_cut_short_is_refused(served: Served) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        whole = {FUSE_FALLOCATE: FALLOCATE.pack(fh, 0, SIZE, PUNCH), FUSE_LSEEK: LSEEK.pack(fh, 0, os.SEEK_DATA)}
        for opcode, message in whole.items():
            for length in range(IN_HEADER.size, len(message)):
                answer = await kernel.message(kernel.send_message(opcode, message[:length]))
                assert answer == (errno.EINVAL, b"")
            for declared in (0, len(message) - 1, len(message) + 1, 2**32 - 1):
                answer = await kernel.message(kernel.send_message(opcode, message, declared))
                assert answer == (errno.EINVAL, b"")
        assert await kernel.read(fh, 0, 100_000) == BASE[:100_000]

    served.run(work)


def test_a_handle_that_only_reads(served: Served) -> None:
    """The kernel asks nothing of the kind; and where there is no writer, nothing may be written."""

    async def work(kernel: Kernel, fh: int) -> None:
        for mode in MODES.values():
            assert await refused(kernel.fallocate(fh, mode, 0, 512)) == errno.EROFS
            assert await refused(kernel.fallocate(fh, mode, SIZE, 512)) == errno.EROFS
        assert await kernel.seek(fh, 0, os.SEEK_DATA) == 0
        assert await kernel.seek(fh, 0, os.SEEK_HOLE) == len(BASE)

    served.run(work, flags=os.O_RDONLY)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP])
@modes
def test_an_error_reaches_who_asked(
    served: Served, caplog: pytest.LogCaptureFixture, mode: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log tells of it, but for what is a plain answer. What was not to move the end leaves no false size behind."""

    async def work(kernel: Kernel, fh: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for call in ("zero", "reserve"):
                patch.setattr(HostFile, call, failing(code))
            answer = await refused(kernel.fallocate(fh, mode, len(BASE) + 5, SIZE))
        assert answer == (errno.EOPNOTSUPP if (mode, code) == (PUNCH, errno.ENOSPC) else code)
        logged = any(": fallocate: " in record.getMessage() for record in caplog.records)
        assert logged == (answer != errno.EOPNOTSUPP)
        assert served.entry.misjudged == (not mode & FALLOC_FL_KEEP_SIZE)
        assert await kernel.read(fh, 0, 100_000) == BASE[:100_000]
        await kernel.fallocate(fh, mode, len(BASE) + 5, 100)

    served.run(work)


def test_holes_of_an_image_over_a_base(served: Served) -> None:
    """Read from the metadata alone where that tells; else a task asks the files."""

    async def work(kernel: Kernel, fh: int) -> None:
        data, hole = os.SEEK_DATA, os.SEEK_HOLE
        assert await kernel.seek(fh, 0, hole) == len(BASE)
        assert await refused(kernel.seek(fh, len(BASE), data)) == errno.ENXIO
        assert await kernel.seek(fh, SIZE - 1, hole) == SIZE - 1
        await kernel.fallocate(fh, PUNCH, 64 * KIB, 128 * KIB)
        assert await kernel.seek(fh, 0, hole) == 64 * KIB
        assert await kernel.seek(fh, 64 * KIB, data) == 192 * KIB
        assert await kernel.seek(fh, 100 * KIB + 1, hole) == 100 * KIB + 1
        await kernel.write(fh, 128 * KIB, bytes(4096))
        assert await kernel.seek(fh, 64 * KIB, data) == 128 * KIB, "zeros that were written may be data"
        assert await kernel.seek(fh, 128 * KIB, hole) == 132 * KIB

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


def test_what_a_writer_may_keep_back_is_data(served: Served) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        await kernel.fallocate(fh, PUNCH, 0, SIZE)
        for at in (0, 1, 100_000, SIZE - 1):
            assert await kernel.seek(fh, at, os.SEEK_DATA) == at
            assert await kernel.seek(fh, at, os.SEEK_HOLE) == SIZE
        assert await refused(kernel.seek(fh, SIZE, os.SEEK_DATA)) == errno.ENXIO

    served.run(work)


@pytest.mark.parametrize("how", ["failed", "asking fails"])
def test_a_disk_that_nobody_can_judge_is_data(served: Served, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        image = served.entry.image
        assert isinstance(image, Image)
        await kernel.fallocate(fh, PUNCH, 0, SIZE)
        await kernel.fsync(fh)
        assert await refused(kernel.seek(fh, 0, os.SEEK_DATA)) == errno.ENXIO
        if how == "failed":
            image.committer.fail("broken")
            assert await refused(kernel.fallocate(fh, PUNCH, 0, 512)) == errno.EIO
        else:
            monkeypatch.setattr(Core, "extent", failing(errno.EIO))
        assert await kernel.seek(fh, 5, os.SEEK_DATA) == 5
        assert await kernel.seek(fh, 5, os.SEEK_HOLE) == SIZE

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


def test_a_search_that_hangs_keeps_nobody_waiting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        begun, goes_on = trio.Event(), trio.Event()
        extent = HostFile.extent

        async def waiting(file: HostFile, start: int, stop: int) -> tuple[int, bool]:
            begun.set()
            await goes_on.wait()
            return await extent(file, start, stop)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostFile, "extent", waiting)
            slow = kernel.send(FUSE_LSEEK, LSEEK.pack(fh, 0, os.SEEK_HOLE)[IN_HEADER.size :])
            with trio.fail_after(60):
                await begun.wait()
        kernel.interrupt(slow)
        assert await kernel.write(fh, 4096, b"meanwhile") == 9
        assert await kernel.seek(fh, SIZE - 1, os.SEEK_HOLE) == SIZE - 1
        assert slow not in kernel.answers
        goes_on.set()
        assert int.from_bytes(await kernel.answer(slow), "little") == len(BASE)

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


# --- mounts -------------------------------------------------------------------------------------------

LAYOUTS = {
    "flat": [],
    "cow": ["--base", "base.raw", "--base-format", "raw", "--block-size", "64K"],
    "compact": ["--compact", "--chunk-size", "64K"],
    "passed through": ["--data-file", "auto"],
}
layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=needs_passthrough if "through" in name else ()) for name in LAYOUTS]
)


@contextmanager
def full_disk(folder: Path, layout: str, *options: str) -> Iterator[tuple[Mount, int]]:
    """A disk of 4 MiB that is full of data, and stable; open for writing."""
    passes = layout == "passed through"
    (folder / "base.raw").write_bytes(b"base" * (MIB // 2))
    must("create", folder / "a.fvd", "4M", *LAYOUTS[layout])
    mount_options = ",".join([*([PASSED_THROUGH] if passes else []), *options])
    with mounted(folder, *(["-o", mount_options] if mount_options else []), passes="a" if passes else "") as mount:
        with open(mount.raw("a"), "r+b", buffering=0) as file:
            file.write(b"data" * MIB)
            os.fsync(file.fileno())
        disk = os.open(mount.raw("a"), os.O_RDWR | os.O_DIRECT)
        try:
            yield mount, disk
        finally:
            with suppress(OSError):  # of a mount that was killed, or a test that has closed it
                os.close(disk)


@layouts
def test_what_shows_of_them(folder: Path, layout: str) -> None:
    """Content, space, times, holes; at once and after the next mount."""
    with full_disk(folder, layout) as (mount, disk):
        content = bytearray(b"data" * MIB)
        before = os.fstat(disk)
        for mode, start, stop in ((PUNCH, MIB, 2 * MIB), (ZERO_RANGE, 3 * MIB + 5, 3 * MIB + 600_000)):
            time.sleep(0.02)
            assert fallocate(disk, mode, start, stop - start)
            content[start:stop] = bytes(stop - start)
            after = os.fstat(disk)
            assert after.st_mtime_ns > before.st_mtime_ns
            assert after.st_ctime_ns > before.st_ctime_ns
            assert after.st_blocks <= before.st_blocks + 8
            assert mount.raw("a").read_bytes() == content
            before = after
        assert before.st_blocks * 512 <= 3 * MIB + 64 * KIB
        assert seek(disk, 0, os.SEEK_HOLE) == MIB
        assert seek(disk, MIB, os.SEEK_DATA) == 2 * MIB
        assert fallocate(disk, FALLOC_FL_ZERO_RANGE, 4 * MIB - 512, 1024)
        content[-512:] = bytes(1024)
        assert os.fstat(disk).st_size == 4 * MIB + 512
        assert fallocate(disk, 0, 4 * MIB, 2048)
        content.extend(bytes(1536))
        assert os.fstat(disk).st_size == 4 * MIB + 2048
        assert not fallocate(disk, 8, 0, 4096)
    # Closed and opened again, by another process.
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == content
        assert mount.raw("a").stat().st_blocks * 512 <= 3 * MIB + 64 * KIB
    assert reference.check(folder / "a.fvd", "fvdfs") == []


@layouts
def test_a_hole_that_was_flushed_survives_kill(folder: Path, layout: str) -> None:
    with full_disk(folder, layout) as (mount, disk):
        content = bytearray(b"data" * MIB)
        for start, stop in ((100, 5000), (MIB, 3 * MIB), (4 * MIB - 4096, 4 * MIB)):
            assert fallocate(disk, PUNCH, start, stop - start)
            content[start:stop] = bytes(stop - start)
        os.fsync(disk)
        mount.kill()
        with suppress(OSError):
            os.close(disk)
        assert b"".join(reference.read_disk(folder / "a.fvd")) == content
        mount.mount()
        assert mount.raw("a").read_bytes() == content


@pytest.mark.parametrize("writeback", ["on", "off"])
def test_no_write_is_hidden_in_a_hole(folder: Path, writeback: str) -> None:
    """What the kernel may still gather is data; once the writer has gone, only what was written."""
    with full_disk(folder, "flat", f"writeback={writeback}") as (mount, disk):
        assert fallocate(disk, PUNCH, 0, 4 * MIB)
        assert seek(disk, 0, os.SEEK_DATA) is None
        cached = os.open(mount.raw("a"), os.O_RDWR)
        os.pwrite(cached, b"x", 2 * MIB)
        assert seek(disk, 2 * MIB, os.SEEK_DATA) == 2 * MIB
        assert seek(disk, 0, os.SEEK_DATA) == 0
        assert seek(disk, 0, os.SEEK_HOLE) == 4 * MIB
        os.close(cached)
        deadline = time.monotonic() + 20
        while seek(disk, 0, os.SEEK_DATA) != 2 * MIB:  # its RELEASE comes after the close
            assert time.monotonic() < deadline
        assert seek(disk, 2 * MIB, os.SEEK_HOLE) == 2 * MIB + 4096


def test_a_disk_that_can_only_be_read(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder, "--read-only") as mount:
        disk = os.open(mount.raw("a"), os.O_RDONLY)
        try:
            with pytest.raises(OSError) as caught:
                fallocate(disk, PUNCH, 0, 4096)
            assert caught.value.errno == errno.EBADF
            assert seek(disk, 0, os.SEEK_DATA) is None
            assert seek(disk, 5, os.SEEK_HOLE) == 5
        finally:
            os.close(disk)
