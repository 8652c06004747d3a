"""copy_file_range(2) between the disks of a mount: content, holes, space, and what is safe when."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.copy_range import copy_range
from fvdfs.image.image import Image
from fvdfs.ops.device import Device
from fvdfs.ops.wire import FUSE_COPY_FILE_RANGE, FUSE_COPY_FILE_RANGE_64
from fvdfs.store.base import Pending, Store
from fvdfs.store.host import open_path
from support.builder import IMAGE, create, load, read_files
from support.devices import loop_device
from support.fakes import FaultPlan, FaultStore, MemoryStore
from support.kernel import Kernel, Libfuse, run_device
from support.mounts import MIB, PASSED_THROUGH, mounted, must, needs_passthrough

SIZE = 8 * MIB
BASE_SIZE = 3 * MIB + 512
LAYOUTS = {
    "flat": (),
    "compact": ("--compact", "--chunk-size", "64K"),
    "cow": ("--base", "base.raw", "--block-size", "64K"),
    "cow-compact": ("--base", "base.raw", "--compact", "--chunk-size", "64K", "--block-size", "16K"),
    "cow-qcow2": ("--base", "base.qcow2", "--base-format", "qcow2", "--block-size", "64K"),
    "chain": ("--base", "below.fvd", "--base-format", "fvd", "--block-size", "16K"),
    "data": ("--data-file", "auto"),
    "qcow2": ("--data-file", "auto", "--data-format", "qcow2"),
}


def copy(source: int, at: int, target: int, start: int, length: int) -> int:
    """As a program copies, which goes on after an answer of fewer bytes; the number of bytes."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, at + done, start + done)
        if not count:
            break
        done += count
    return done


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # the mount may be dead
            os.close(descriptor)


def make(folder: Path) -> dict[str, bytearray]:
    """A disk of each layout, and what it holds."""
    chance = random.Random(1)
    (folder / "base.raw").write_bytes(chance.randbytes(MIB) + bytes(MIB) + chance.randbytes(BASE_SIZE - 2 * MIB))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", folder / "base.raw", folder / "base.qcow2"], check=True)
    base = (folder / "base.raw").read_bytes()
    must("convert", folder / "base.raw", folder / "below.fvd")
    for name, options in LAYOUTS.items():
        must("create", folder / f"{name}.fvd", str(SIZE), *options)
    return {name: bytearray(base if "--base" in options else b"") for name, options in LAYOUTS.items()}


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off", "sync=always", "writeback=on,detect_zeroes=on"])
def test_copies_between_disks_of_every_layout(folder: Path, options: str) -> None:
    disks = {name: content.ljust(SIZE, b"\0") for name, content in make(folder).items()}
    chance = random.Random(options)
    places = [0, 512, 4096, 64 << 10, MIB, BASE_SIZE, BASE_SIZE - 700, SIZE - 100_000]
    with mounted(folder, "-o", options) as mount:
        with ExitStack() as stack:
            descriptors = {name: stack.enter_context(opened(mount.raw(name))) for name in LAYOUTS}
            for step in range(150):
                source, target = chance.choice(sorted(LAYOUTS)), chance.choice(sorted(LAYOUTS))
                at, start = (chance.choice(places) + chance.choice((0, 0, 300)) for _ in range(2))
                length = chance.choice((100, 4096, 70_000, MIB, 2 * MIB))
                if step % 3 == 0:
                    data = chance.randbytes(chance.randrange(1, 50_000))
                    assert os.pwrite(descriptors[source], data, at) == len(data)
                    disks[source][at : at + len(data)] = data
                if source == target and abs(at - start) < length:
                    continue
                data = bytes(disks[source][at : at + length])
                assert copy(descriptors[source], at, descriptors[target], start, length) == len(data)
                disks[target][start : start + len(data)] = data
                around = slice(max(0, start - 4096), start + length + 4096)
                found = os.pread(descriptors[target], around.stop - around.start, around.start)
                wrong = [n for n, (a, b) in enumerate(zip(found, disks[target][around], strict=True)) if a != b]
                assert not wrong, (step, source, at, target, start, length, around, wrong[0], wrong[-1], len(wrong))
        mount.remount()
        for name in LAYOUTS:
            assert mount.raw(name).read_bytes().rstrip(b"\0") == disks[name].rstrip(b"\0"), name
    for name in LAYOUTS:
        must("check", folder / f"{name}.fvd")


@needs_passthrough
def test_disks_that_are_passed_through(folder: Path) -> None:
    for name in "ab":
        must("create", folder / f"{name}.fvd", str(SIZE), "--data-file", "auto")
    content = random.Random(2).randbytes(SIZE)
    (folder / "a.fvd.data").write_bytes(content)
    (folder / "b.fvd.data").write_bytes(bytes(SIZE))
    with mounted(folder, "-o", PASSED_THROUGH, passes="b") as mount:
        with opened(mount.raw("a")) as source, opened(mount.raw("b"), os.O_RDWR | os.O_DIRECT) as target:
            before = os.fstat(target).st_mtime_ns
            assert copy(source, 4096, target, SIZE - 8192, 2 * MIB) == 2 * MIB  # past its end
            assert os.fstat(target).st_size == SIZE - 8192 + 2 * MIB
            assert os.fstat(target).st_mtime_ns > before
            assert mount.raw("b").read_bytes()[SIZE - 8192 :] == content[4096 : 4096 + 2 * MIB]
            os.fsync(target)
            assert copy(source, 0, target, 2 * SIZE, 100) == 100
            assert copy(source, 0, target, 0, 700) == 700
            assert os.fstat(target).st_size == 2 * SIZE + 100, "it does not end where the last write has"
        mount.passes = ""  # its size is no longer one of those
        mount.remount()
        expected = bytearray(bytes(SIZE - 8192) + content[4096 : 4096 + 2 * MIB]).ljust(2 * SIZE, b"\0")
        expected[:700] = content[:700]
        assert mount.raw("b").read_bytes() == expected + content[:100].ljust(512, b"\0")


@pytest.mark.parametrize("layout", ["flat", "compact", "cow"])
def test_holes_are_copied_as_holes(folder: Path, layout: str) -> None:
    (folder / "base.raw").write_bytes(b"base" * (BASE_SIZE // 4))
    for name in "ab":
        must("create", folder / f"{name}.fvd", "3G", *LAYOUTS[layout])
    with mounted(folder) as mount, opened(mount.raw("a")) as source, opened(mount.raw("b")) as target:
        os.pwrite(source, b"x" * MIB, 1 << 30)
        os.pwrite(target, b"y" * 8 * MIB, 2 << 30)
        os.fsync(target)
        assert os.stat(folder / "b.fvd").st_blocks * 512 >= 8 * MIB
        assert copy(source, 4 * MIB, target, 4 * MIB, (3 << 30) - 4 * MIB) == (3 << 30) - 4 * MIB
        os.fsync(target)
        assert os.stat(folder / "b.fvd").st_blocks * 512 < 4 * MIB
        assert os.pread(target, MIB, 1 << 30) == b"x" * MIB
        assert not any(os.pread(target, 8 * MIB, 2 << 30))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.xfs"), reason="needs root, and mkfs.xfs")
@pytest.mark.parametrize("layout", ["flat", "compact", "data"])
def test_on_xfs_a_copy_takes_no_space(tmp_path: Path, layout: str) -> None:
    file, xfs = tmp_path / "xfs", tmp_path / "mnt"
    xfs.mkdir()
    with file.open("wb") as room:
        room.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", file], check=True)
    with loop_device(file) as device:
        subprocess.run(["mount", device, xfs], check=True)
        try:
            _copy_on_xfs(xfs, layout)
        finally:
            subprocess.run(["umount", xfs], check=True)


def _copy_on_xfs(xfs: Path, layout: str) -> None:
    def free() -> int:
        os.sync()
        status = os.statvfs(xfs)
        return status.f_bavail * status.f_frsize

    folder = xfs / "images"
    folder.mkdir()
    for name in "ab":
        must("create", folder / f"{name}.fvd", str(100 * MIB), *LAYOUTS[layout])
    with mounted(folder) as mount:
        with opened(mount.raw("a")) as source, opened(mount.raw("b")) as target:
            for at in range(0, 100 * MIB, MIB):
                os.pwrite(source, random.Random(at).randbytes(MIB), at)
            os.fsync(source)
            before = free()
            assert copy(source, 0, target, 0, 100 * MIB) == 100 * MIB
            os.pwrite(source, b"later", 50 * MIB)
            os.fsync(target)
            assert before - free() < 8 * MIB, "the bytes were copied"
        mount.remount()
        with mount.raw("b").open("rb") as disk:
            for at in range(0, 100 * MIB, MIB):
                assert disk.read(MIB) == random.Random(at).randbytes(MIB)


def test_a_copy_to_a_disk_that_is_open_for_durable_writes_survives(folder: Path) -> None:
    """The kernel sends no FSYNC after one."""
    for name in "ab":
        must("create", folder / f"{name}.fvd", str(SIZE), *LAYOUTS["compact"])
    with mounted(folder, "-o", "writeback=off") as mount:
        with opened(mount.raw("a")) as source, opened(mount.raw("b"), os.O_WRONLY | os.O_DSYNC) as target:
            os.pwrite(source, b"x" * MIB, 0)
            assert copy(source, 0, target, MIB, MIB) == MIB
            mount.kill()
        mount.mount()
        assert mount.raw("b").read_bytes() == bytes(MIB) + b"x" * MIB + bytes(SIZE - 2 * MIB)


def test_what_a_damaged_disk_has_lost_is_not_copied_as_zeros(folder: Path) -> None:
    for name in "ab":
        must("create", folder / f"{name}.fvd", str(SIZE), *LAYOUTS["compact"])
    with mounted(folder) as mount, opened(mount.raw("a")) as disk:
        os.pwrite(disk, b"x" * 4 * MIB, 0)
    with (folder / "a.fvd").open("r+b") as file:
        file.truncate(Header.decode(file.read(HEADER_SPACE), "a").data_offset + 2 * MIB)
    with mounted(folder) as mount, opened(mount.raw("a"), os.O_RDONLY) as source, opened(mount.raw("b")) as target:
        with pytest.raises(OSError, match="Input/output error"):
            copy(source, 0, target, 0, 4 * MIB)
        assert not os.pread(target, 4 * MIB, 0).strip(b"x\0")


# --- in the process ---------------------------------------------------------------------------------


class Copier:
    """Answers COPY_FILE_RANGE alone, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def begin_copy(self, *arguments: int) -> Pending:
        self.asked.append(arguments)
        return self

    def start(self, _: object) -> bool:
        return False

    async def finish(self) -> int:
        return 1 << 20

    def agreed(self, *, writeback: bool) -> None: ...

    def exchanged(self, request: bytes, answer: bytes) -> None: ...

    def answered(self, *_: object) -> None: ...

    def error_number(self, error: OSError, *_: object) -> int:
        return error.errno or errno.EIO


def test_both_forms_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = Copier()

    async def work(kernel: Kernel, device: Device, libfuse: Libfuse) -> None:
        body = struct.pack("=7Q", 3, 4096, 7, 5, 8192, 1 << 40, 0)
        assert await kernel.answer(kernel.send(FUSE_COPY_FILE_RANGE, body)) == struct.pack("=II", 1 << 20, 0)
        assert await kernel.answer(kernel.send(FUSE_COPY_FILE_RANGE_64, body)) == struct.pack("=Q", 1 << 20)
        assert copier.asked == [(5, 8192, 3, 4096, 1 << 40)] * 2
        unknown = struct.pack("=7Q", 3, 4096, 7, 5, 8192, 1 << 40, 1)
        assert await kernel.message(kernel.send(FUSE_COPY_FILE_RANGE_64, unknown)) == (errno.EOPNOTSUPP, b"")
        assert await kernel.message(kernel.send(FUSE_COPY_FILE_RANGE_64, body[:-8])) == (errno.EINVAL, b"")
        assert not libfuse.requests

    run_device(copier, work, monkeypatch)  # type: ignore[arg-type]


async def open_compact(folder: Path, *, slow: bool = False, plan: FaultPlan | None = None) -> Image:
    create(folder / IMAGE, 64 * 4096, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    store = MemoryStore(read_files(folder)[IMAGE], IMAGE, slow=slow)
    image = await load({IMAGE: FaultStore(store, plan) if plan else store})
    await image.begin_writing()
    return image


async def test_a_shrink_that_waits_for_copies_lets_them_end(tmp_path: Path) -> None:
    """One that waits for the shrink must not be among the reads that the shrink waits for."""
    image = await open_compact(tmp_path, slow=True)
    await image.write(0, b"x" * 16 * 4096)

    async def copy_later(start: int) -> None:
        await image.copy(image, 0, start, start + 4096)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy_later, 30 * 4096)
            nursery.start_soon(lambda: image.resize(50 * 4096, shrink=True))
            for _ in range(20):
                nursery.start_soon(copy_later, 40 * 4096)
                await trio.lowlevel.checkpoint()
    assert image.size == 50 * 4096
    assert await image.read(40 * 4096, 4096) == b"x" * 4096
    await image.close()


async def test_a_base_stays_open_while_it_is_copied_from(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 8192)
    create(tmp_path / IMAGE, 8192, CreateOptions(base_img="base.raw", block_size=4096), base_length=8192)
    stores = {name: MemoryStore(content, name) for name, content in read_files(tmp_path).items()}
    source = await load(stores)
    await source.begin_writing()
    (tmp_path / "other").mkdir()
    target = await open_compact(tmp_path / "other")
    waiting = trio.Event()
    base = stores["base.raw"]
    read = base.pread

    async def slow_read(buffer: memoryview, offset: int) -> int:
        await waiting.wait()
        return await read(buffer, offset)

    base.pread = slow_read  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:

        async def copy_it() -> None:
            assert await target.copy(source, 0, 4096, 4096 + 8192) == 8192

        nursery.start_soon(copy_it)
        await wait_all_tasks_blocked()
        await source.write(0, b"l" * 8192)
        nursery.start_soon(source.release_base)
        await wait_all_tasks_blocked()
        assert not base.closed
        waiting.set()
    assert base.closed
    assert await target.read(4096, 8192) == b"b" * 8192
    await source.close()
    await target.close()


async def test_what_was_copied_before_a_failure_is_told(tmp_path: Path) -> None:
    """The kernel drops its pages of just these bytes."""
    plan = FaultPlan()
    image = await open_compact(tmp_path, plan=plan)
    for chunk in (0, 2, 1):  # each in a piece of its own
        await image.write(chunk * 4096, bytes([chunk]) * 4096)
    plan.kinds, plan.nth, plan.calls = ("pwrite",), 2, 0
    assert await copy_range(image, 0, image, 10 * 4096, 3 * 4096) == 4096
    assert await image.read(10 * 4096, 4096) == bytes(4096)
    await image.close()


async def test_what_a_host_cannot_copy(tmp_path: Path) -> None:
    """A part of the file may have been copied; nothing is made up."""
    (tmp_path / "a").write_bytes(b"a" * 100)
    (tmp_path / "b").write_bytes(b"")
    source, target = open_path(str(tmp_path / "a"), writable=False), open_path(str(tmp_path / "b"), writable=True)
    await target.copy(source, 10, 5000, 90)
    assert (tmp_path / "b").read_bytes() == bytes(5000) + b"a" * 90
    refused: list[tuple[Store, int]] = [(source, 50), (source, (1 << 63) - 10), (MemoryStore(b"m" * 100), 0)]
    for store, where in refused:
        with pytest.raises(OSError) as refusal:
            await target.copy(store, where, 0, 100)
        assert refusal.value.errno == errno.EOPNOTSUPP
    source.may_hang, source.server = True, "another"
    with pytest.raises(OSError) as refusal:
        await target.copy(source, 0, 0, 100)
    assert refusal.value.errno == errno.EOPNOTSUPP
    await source.aclose()
    await target.aclose()
