"""`-o sync`: when a write of a guest becomes durable. Seen in what a killed mount leaves, and in how often it flushes.

Flushes are counted with strace, which shows each fdatasync of the process that serves the mount, where it does them by
system calls of its own; and by a device, which counts what arrives there.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import reference
from support.devices import loop_device
from support.mounts import MIB, Mount, fvdfs, mounted, must

BASE = b"base" * (MIB // 4)
LAYOUTS = {
    "cow": ["--block-size", "4K"],
    "compact": ["--compact", "--block-size", "64K", "--chunk-size", "64K"],
    "no journal": ["--block-size", "4K", "--journal-size", "none"],
}


@contextmanager
def counting_flushes(pid: int, trace: Path) -> Iterator[Callable[[], int]]:
    """Count the flushes of a process: how many there were up to now.

    Its beginning is a flush itself: the program that counts inherits open disks, and closes them.
    """
    command = ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync", "-e", "signal=none", "-o", str(trace)]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not all(
            re.search(r"TracerPid:\t[1-9]", Path(task, "status").read_text())
            for task in Path(f"/proc/{pid}/task").iterdir()
        ):
            assert tracer.poll() is None, "strace cannot attach"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield lambda: len(re.findall(r"(?:fdatasync|fsync)\(\d+", trace.read_text()))
    finally:
        tracer.terminate()
        tracer.wait(60)


def new_image(folder: Path, layout: str) -> Path:
    (folder / "base.raw").write_bytes(BASE)
    must("create", folder / "a.fvd", "2M", "--base", "base.raw", "--base-format", "raw", *LAYOUTS[layout])
    return folder / "a.fvd"


def write_here_and_there(disk: int, content: bytearray, *, flush: bool = False) -> int:
    """Twenty writes, each the start of an answered promise if they are flushed; how many."""
    for number in range(20):
        at = number * 97_003 % (2 * MIB - 5000)
        data = b"%04d" % number * 700
        assert os.pwrite(disk, data, at) == len(data)
        content[at : at + len(data)] = data
        if flush:
            os.fsync(disk)
    return 20


@contextmanager
def opened(mount: Mount) -> Iterator[int]:
    """The disk; the mount may be dead when it is closed."""
    disk = os.open(mount.raw("a"), os.O_RDWR)
    try:
        yield disk
    finally:
        with suppress(OSError):
            os.close(disk)


def content_of(image: Path) -> bytes:
    """The disk as an independent reader sees it, the journal replayed."""
    return b"".join(reference.read_disk(image))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_always_makes_each_write_durable_before_it_returns(folder: Path, tmp_path: Path, layout: str) -> None:
    image = new_image(folder, layout)
    content = bytearray(BASE + bytes(MIB))
    with mounted(folder, "-o", "sync=always,accept_unclean,io_uring=off") as mount:
        with opened(mount) as disk:
            with counting_flushes(mount.pid, tmp_path / "trace") as flushes:
                writes = write_here_and_there(disk, content)
                assert flushes() >= 2 * writes, "data, then what names it"
            mount.kill()
        assert content_of(image) == content
        assert [problem for problem in reference.check(image, "fvdfs") if "clean_shutdown" not in problem] == []
        mount.mount()
        assert mount.raw("a").read_bytes() == content
        # What overwrites local blocks has nothing to name, and is flushed all the same.
        with opened(mount) as disk:
            write_here_and_there(disk, content)
            with counting_flushes(mount.pid, tmp_path / "trace") as flushes:
                writes = write_here_and_there(disk, content)
                assert flushes() >= writes


def test_always_keeps_nothing_back_in_the_kernel(folder: Path) -> None:
    """Also with writeback=on, which would have writes return before fvdfs has them."""
    image = new_image(folder, "cow")
    with mounted(folder, "-o", "sync=always,writeback=on") as mount, opened(mount) as disk:
        os.pwrite(disk, b"one byte at a time"[:1], 12345)
        mount.kill()
        assert content_of(image)[12345:12346] == b"o"


@pytest.mark.parametrize("engine", ["psync", "libaio"])
@pytest.mark.parametrize("writeback", ["on", "off"])
def test_a_direct_write_that_is_to_be_durable_is_flushed(
    folder: Path, tmp_path: Path, engine: str, writeback: str
) -> None:
    """O_DSYNC, as a guest's FUA: for asynchronous writes the kernel itself sends no flush."""
    new_image(folder, "cow")
    command = [
        "fio",
        "--name=x",
        "--rw=randwrite",
        "--bs=4k",
        "--size=1M",
        "--io_size=40k",
        "--direct=1",
        "--iodepth=1",
    ]
    with mounted(folder, "-o", f"writeback={writeback},io_uring=off") as mount:
        command += ["--sync=dsync", f"--ioengine={engine}", f"--filename={mount.raw('a')}"]
        with counting_flushes(mount.pid, tmp_path / "trace") as flushes:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            assert flushes() >= 10


def test_none_answers_a_flush_without_a_commit(folder: Path, tmp_path: Path) -> None:
    image = new_image(folder, "cow")
    content = bytearray(BASE + bytes(MIB))
    with mounted(folder, "-o", "sync=none,io_uring=off") as mount:
        with opened(mount) as disk:
            with counting_flushes(mount.pid, tmp_path / "trace") as flushes:
                write_here_and_there(disk, content, flush=True)
                os.close(os.dup(disk))  # a close that is not the last asks for a flush, too
                assert flushes() == 0
            assert content_of(image)[:MIB] == BASE, "nothing on disk names what was written over the base"
            assert os.pread(disk, len(content), 0) == content
        mount.remount()
        assert mount.raw("a").read_bytes() == content, "closing makes all of it durable"
        assert reference.check(image, "fvdfs") == []
        with opened(mount) as disk:
            os.pwrite(disk, b"lost" * 1024, 64 << 10)
            os.fsync(disk)
            deadline = time.monotonic() + 20
            while content_of(image)[64 << 10 : 68 << 10] != b"lost" * 1024:
                assert time.monotonic() < deadline, "it is not committed after some seconds either"
                time.sleep(0.2)


def test_a_kill_under_none_loses_what_was_flushed_and_nothing_else(folder: Path) -> None:
    """So the tests that kill would see a flush that did nothing."""
    image = new_image(folder, "cow")
    content = bytearray(BASE + bytes(MIB))
    with mounted(folder, "-o", "sync=none") as mount:
        with opened(mount) as disk:
            write_here_and_there(disk, content)
        with opened(mount) as disk:
            os.pwrite(disk, b"gone" * 1024, 900 << 10)
            os.fsync(disk)
            mount.kill()
        assert content_of(image) == content
        mount.mount()
        assert mount.raw("a").read_bytes() == content


def test_flush_commits_at_a_flush_and_not_before(folder: Path, tmp_path: Path) -> None:
    image = new_image(folder, "cow")
    content = bytearray(BASE + bytes(MIB))
    with mounted(folder, "-o", "sync=flush,writeback=off,io_uring=off") as mount, opened(mount) as disk:
        with counting_flushes(mount.pid, tmp_path / "trace") as flushes:
            write_here_and_there(disk, content)
            assert flushes() == 0
            assert content_of(image)[:MIB] == BASE
            os.fsync(disk)
            assert flushes() >= 2
        mount.kill()
        assert content_of(image) == content


@pytest.mark.parametrize("io_uring", ["on", "off"])
def test_a_flush_reaches_the_device(folder: Path, tmp_path: Path, io_uring: str) -> None:
    """Twice for blocks that were in the base: for the data, and for what names it. Once for those that are local."""
    (folder / "base.raw").write_bytes(BASE)
    backing = tmp_path / "device"
    backing.touch()
    os.truncate(backing, 32 * MIB)
    with loop_device(backing) as device:
        must("create", device, "2M", "--base", folder / "base.raw", "--base-format", "raw", "--block-size", "4K")
        (folder / "a.fvd").symlink_to(device)
        flushes = Path("/sys/block", device.name, "stat")
        with mounted(folder, "-o", f"writeback=off,io_uring={io_uring}") as mount, opened(mount) as disk:
            for number in range(5):
                os.pwrite(disk, b"new", number * 64 << 10)
                before = int(flushes.read_text().split()[15])
                os.fsync(disk)
                assert int(flushes.read_text().split()[15]) >= before + 2
            for number in range(5):
                before = int(flushes.read_text().split()[15])
                os.pwrite(disk, b"newer", number * 64 << 10)
                os.fsync(disk)
                assert int(flushes.read_text().split()[15]) > before


def test_what_sync_may_be(folder: Path) -> None:
    done = fvdfs("mount", folder, folder.parent, "-o", "sync=sometimes")
    assert done.code == 2
    assert "-o sync=sometimes: must be flush or none or always" in done.err
