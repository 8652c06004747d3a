"""Disks that the kernel reads and writes by itself: that it does, that nothing is lost by it, and when it does not.

The mounts are real ones, made by root: the kernel gives passthrough to nobody else, and from Linux 6.9 on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.policy import Policy
from fvdfs.ops.filesystem import ATTRIBUTE_TIMEOUT
from fvdfs.ops.folder import Folder
from fvdfs.ops.writeback import Writeback, obstacle
from support.devices import loop_device
from support.mounts import (
    FVDFS,
    MIB,
    PASSED_THROUGH,
    Mount,
    fvdfs,
    mounted,
    must,
    needs_passthrough,
    running,
    wait_until,
)

pytestmark = needs_passthrough

SIZE = 4 * MIB
OPTIONS = ("-o", f"{PASSED_THROUGH},shrink")
CONTENT = random.Random(1).randbytes(SIZE)
NOBODY = 65534


def new_disk(folder: Path, *options: str, name: str = "a") -> Path:
    """An image with a data file that holds CONTENT; the data file."""
    must("create", folder / f"{name}.fvd", str(SIZE), "--data-file", "auto", *options)
    data = folder / f"{name}.fvd.data"
    data.write_bytes(CONTENT)
    return data


@pytest.fixture
def data(folder: Path) -> Path:
    return new_disk(folder)


@pytest.fixture
def mount(folder: Path, data: Path) -> Iterator[Mount]:
    """A mount of a disk that can be passed through."""
    with mounted(folder, *OPTIONS) as mount:
        yield mount


@contextlib.contextmanager
def opened(mount: Mount, flags: int = os.O_RDWR, name: str = "a") -> Iterator[int]:
    """The disk; the mount may be dead when it is closed."""
    disk = os.open(mount.raw(name), flags)
    try:
        yield disk
    finally:
        with contextlib.suppress(OSError):
            os.close(disk)


def header_of(folder: Path, name: str = "a") -> Header:
    with open(folder / f"{name}.fvd", "rb") as file:
        return Header.decode(file.read(HEADER_SPACE), name)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still meanwhile; what waits for it goes on after a while, and has failed."""
    waited = threading.Event()

    def go_on() -> None:
        waited.set()
        os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(20, go_on)
    os.kill(pid, signal.SIGSTOP)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)
    assert not waited.is_set(), "something waits for the process"


# --- that it does -----------------------------------------------------------------------------------


def test_reads_and_writes_do_not_reach_the_daemon(mount: Mount, data: Path) -> None:
    with opened(mount) as disk:
        assert mount.passthrough("a") == "on"
        assert mount.status("a")["passthrough"] == "on"
        assert re.search(r"a\.raw .* on *$", must("status", mount.point), re.MULTILINE)
        with mmap.mmap(disk, 4096) as area:
            os.pwrite(disk, b"first", 5000)  # after a look at the file the kernel asks for its set-uid bits, once
            with stopped(mount.pid):
                assert os.pwrite(disk, b"written" * 1000, 5000) == 7000
                assert os.pread(disk, 7000, 5000) == b"written" * 1000
                area[:6] = b"mapped"
        expected = bytearray(CONTENT)
        expected[5000:12000] = b"written" * 1000
        expected[:6] = b"mapped"
        assert data.read_bytes() == expected
        assert os.pread(disk, SIZE + 1, 0) == expected
    mount.remount()
    assert mount.raw("a").read_bytes() == expected
    assert header_of(mount.folder).clean


def test_direct_requests_are_those_of_the_data_file(mount: Mount, data: Path) -> None:
    area = mmap.mmap(-1, 8192)
    area.write(b"direct--" * 1024)
    with opened(mount, os.O_RDWR | os.O_DIRECT) as disk:
        assert mount.passthrough("a") == "on"
        assert os.pwritev(disk, [memoryview(area)], 8192) == 8192
        with pytest.raises(OSError, match="Invalid argument"):
            os.pwritev(disk, [memoryview(area)[:100]], 100)
    assert data.read_bytes()[8192:16384] == area[:]


def test_all_who_have_it_open_see_the_same(mount: Mount) -> None:
    """The kernel wants all to use it in one way: whoever reads, writes, appends, has it open for direct I/O."""
    with opened(mount, os.O_RDONLY) as reader:
        assert mount.passthrough("a") == "on"
        with opened(mount) as writer, opened(mount, os.O_WRONLY | os.O_APPEND) as appender:
            assert os.pwrite(writer, b"x" * 100, 100) == 100
            assert os.pread(reader, 100, 100) == b"x" * 100
            assert os.write(appender, b"y" * 512) == 512
            assert os.pread(writer, 600, SIZE) == b"y" * 512
            assert mount.passthrough("a") == "on"
        with opened(mount) as writer:
            assert os.pwrite(writer, b"z" * 100, 100) == 100
        assert os.pread(reader, 100, 100) == b"z" * 100
    mount.remount()
    assert mount.raw("a").stat().st_size == SIZE + 512


@contextlib.contextmanager
def flushes_of(pid: int, trace: Path, path: Path) -> Iterator[Callable[[], int]]:
    """Count how often a process has flushed a file."""
    command = ["strace", "-f", "-y", "-qq", "-e", "trace=fdatasync,fsync", "-e", "signal=none", "-o", str(trace)]
    with running(*command, "-p", str(pid), stderr=subprocess.DEVNULL) as tracer:
        wait_until(
            lambda: all(
                re.search(r"TracerPid:\t[1-9]", Path(task, "status").read_text())
                for task in Path(f"/proc/{pid}/task").iterdir()
            )
        )
        yield lambda: len(re.findall(rf"(?:fdatasync|fsync)\(\d+<{re.escape(str(path))}>", trace.read_text()))
        tracer.terminate()
        tracer.wait(60)


def test_each_flush_and_close_reaches_the_data_file(folder: Path, data: Path, tmp_path: Path) -> None:
    with mounted(folder, "-o", f"{PASSED_THROUGH},io_uring=off") as mount, opened(mount) as disk:
        assert mount.passthrough("a") == "on"
        with flushes_of(mount.pid, tmp_path / "trace", data) as flushes:
            for flush in (os.fsync, os.fdatasync, lambda disk: os.close(os.dup(disk)), os.fsync):
                before = flushes()
                os.pwrite(disk, b"x" * 4096, 0)
                flush(disk)
                assert flushes() == before + 1
            before = flushes()
            with opened(mount) as other:
                os.pwrite(other, b"y", 0)
            assert flushes() > before


# --- size and attributes --------------------------------------------------------------------------------


def test_a_write_past_the_end_makes_the_disk_longer(mount: Mount, data: Path) -> None:
    raw = mount.raw("a")
    with opened(mount) as disk:
        for length in (SIZE + 3, SIZE + 600, SIZE + 5000):
            os.pwrite(disk, b"end", length - 3)
            assert os.fstat(disk).st_size == raw.stat().st_size == length
            assert os.lseek(disk, 0, os.SEEK_END) == length
        with opened(mount, os.O_WRONLY | os.O_APPEND) as appender:
            os.write(appender, b"more")
        assert os.pread(disk, 100, SIZE + 4997) == b"endmore"
        blocks = raw.stat().st_blocks
        os.pwrite(disk, b"x" * MIB, 2 * SIZE - MIB)
        assert raw.stat().st_blocks >= blocks + MIB // 512
    assert raw.stat().st_size == 2 * SIZE
    wait_until(lambda: mount.status("a")["state"] == "closed")
    assert header_of(mount.folder).virtual_disk_size == 2 * SIZE


def test_the_last_sector_is_filled_with_zeros_at_closing(mount: Mount, data: Path) -> None:
    raw = mount.raw("a")
    with opened(mount) as disk:
        os.pwrite(disk, b"end", SIZE)
        os.fsync(disk)
    wait_until(lambda: mount.status("a")["state"] == "closed")
    assert raw.stat().st_size == SIZE + 512
    assert raw.read_bytes()[SIZE:] == b"end".ljust(512, b"\0")
    header = header_of(mount.folder)
    assert header.clean
    assert header.virtual_disk_size == data.stat().st_size == SIZE + 512


def test_truncate(mount: Mount, data: Path) -> None:
    raw = mount.raw("a")
    with opened(mount) as disk:
        os.pwrite(disk, b"more", SIZE)  # which nobody was told of
        os.ftruncate(disk, SIZE + 2 * 512)
        assert os.pread(disk, 2000, SIZE) == b"more".ljust(1024, b"\0")
        os.ftruncate(disk, SIZE // 2)
        assert data.stat().st_size == os.fstat(disk).st_size == SIZE // 2
        assert os.pread(disk, 100, SIZE // 2) == b""
        os.ftruncate(disk, SIZE)
        assert os.pread(disk, SIZE, 0) == CONTENT[: SIZE // 2].ljust(SIZE, b"\0")
        os.pwrite(disk, b"odd", SIZE)
        os.ftruncate(disk, SIZE + 100)  # the sector that has begun
        assert os.fstat(disk).st_size == data.stat().st_size == SIZE + 512
        os.truncate(raw, 4096)
        assert os.fstat(disk).st_size == 4096
    with open(raw, "wb") as file:  # O_TRUNC
        assert os.fstat(file.fileno()).st_size == 0
        file.write(b"new")
        file.flush()
        assert mount.passthrough("a") == "on"
    mount.remount()
    assert raw.read_bytes() == b"new".ljust(512, b"\0")


def test_a_disk_is_not_cut_without_the_option(folder: Path, data: Path) -> None:
    with mounted(folder, "-o", PASSED_THROUGH) as mount, opened(mount) as disk:
        os.pwrite(disk, b"more", SIZE)
        with pytest.raises(PermissionError):
            os.ftruncate(disk, SIZE)
        assert os.pread(disk, 100, SIZE) == b"more"
        assert data.stat().st_size >= SIZE + 4


def test_times(mount: Mount) -> None:
    raw = mount.raw("a")
    before = raw.stat()
    with opened(mount) as disk:
        os.pread(disk, 4096, 0)
        assert raw.stat().st_mtime_ns == before.st_mtime_ns
        os.pwrite(disk, b"x", 0)
        written = raw.stat()
        assert written.st_mtime_ns > before.st_mtime_ns
        assert written.st_ctime_ns >= written.st_mtime_ns
        os.utime(raw, ns=(10**18, 10**18))
        assert raw.stat().st_mtime_ns == 10**18
        os.fsync(disk)
        assert raw.stat().st_mtime_ns == 10**18
        time.sleep(0.02)  # a tick of the host's clock
        os.pwrite(disk, b"y", 0)
        os.fsync(disk)
        with mmap.mmap(disk, 4096) as area:
            at = raw.stat().st_mtime_ns
            area[:1] = b"z"
            assert raw.stat().st_mtime_ns > at, f"also within {ATTRIBUTE_TIMEOUT} s"
        last = raw.stat().st_mtime_ns
    wait_until(lambda: mount.status("a")["state"] == "closed")
    assert raw.stat().st_mtime_ns == last
    assert raw.read_bytes()[:1] == b"z"
    wait_until(lambda: mount.status("a")["state"] == "closed")
    assert raw.stat().st_mtime_ns == last


def test_what_others_change_while_it_is_closed_is_seen(mount: Mount, data: Path) -> None:
    """The kernel keeps no pages of such a disk: those that it had from before must not come back."""
    raw = mount.raw("a")
    assert raw.read_bytes() == CONTENT
    wait_until(lambda: mount.status("a")["state"] == "closed")
    times = data.stat()
    with open(data, "r+b") as file:
        file.write(b"changed")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert raw.read_bytes() == b"changed" + CONTENT[7:]


# --- crashes ------------------------------------------------------------------------------------------


def test_a_killed_mount_leaves_the_time_that_was_set(mount: Mount) -> None:
    raw = mount.raw("a")
    with opened(mount) as disk:
        os.pwrite(disk, b"new", 0)
        os.utime(raw, ns=(10**18, 10**18))
        os.fsync(disk)
        assert raw.stat().st_mtime_ns == 10**18
        mount.kill()
    mount.mount()
    assert raw.stat().st_mtime_ns == 10**18


def test_a_killed_mount_leaves_the_time_of_the_last_write(mount: Mount) -> None:
    """A backup must not take the disk for unchanged, before anybody has opened it."""
    raw = mount.raw("a")
    with opened(mount) as disk:
        before = raw.stat().st_mtime_ns
        time.sleep(0.02)  # a tick of the host's clock
        os.pwrite(disk, b"new", 0)
        os.fsync(disk)
        written = raw.stat().st_mtime_ns
        assert written > before
        mount.kill()
    mount.mount()
    assert raw.stat().st_mtime_ns == written
    os.utime(raw, ns=(before, before))
    assert raw.stat().st_mtime_ns == before


def grow(mount: Mount) -> int:
    """Open the disk, write past its end and flush; the open disk."""
    disk = os.open(mount.raw("a"), os.O_RDWR)
    os.pwrite(disk, b"grown" * 1000, SIZE + 7000)
    os.fsync(disk)
    return disk


GROWN = CONTENT + bytes(7000) + b"grown" * 1000 + bytes(288)
assert len(GROWN) % 4096 == 0


@pytest.mark.parametrize("how", ["mount", "mount, read-only", "repair", "convert"])
def test_a_killed_mount_leaves_the_size(mount: Mount, data: Path, how: str) -> None:
    disk = grow(mount)
    mount.kill()
    with contextlib.suppress(OSError):
        os.close(disk)
    header = header_of(mount.folder)
    assert (header.clean, header.virtual_disk_size) == (False, SIZE)
    image = mount.folder / "a.fvd"
    info = json.loads(must("info", image, "--json"))
    assert info["virtual_size"] == len(GROWN)
    assert fvdfs("check", image).code == 0
    if how == "convert":
        must("convert", image, mount.folder / "copy.raw")
        assert (mount.folder / "copy.raw").read_bytes() == GROWN
    if how == "repair":
        must("check", "--repair", image)
        header = header_of(mount.folder)
        assert (header.clean, header.virtual_disk_size, data.stat().st_size) == (True, len(GROWN), len(GROWN))
    if how == "mount, read-only":
        mount.options = ("-o", f"{PASSED_THROUGH},ro")
    mount.mount()
    assert mount.raw("a").stat().st_size == len(GROWN)
    assert mount.raw("a").read_bytes() == GROWN
    if how == "mount":
        with opened(mount) as disk:
            assert mount.passthrough("a") == "on"
            assert os.pread(disk, 2 * SIZE, 0) == GROWN
    mount.umount()
    if how == "mount":
        header = header_of(mount.folder)
        assert (header.clean, header.virtual_disk_size, data.stat().st_size) == (True, len(GROWN), len(GROWN))
    assert fvdfs("check", image).code == 0


def test_a_killed_mount_leaves_the_time(mount: Mount, data: Path) -> None:
    """Also of a write that nobody has flushed."""
    before = mount.raw("a").stat().st_mtime_ns
    time.sleep(0.02)
    with opened(mount) as disk:
        os.pwrite(disk, b"x", 0)
        mount.kill()
    assert data.stat().st_mtime_ns > before
    mount.mount()
    with opened(mount, os.O_RDONLY):
        assert mount.raw("a").stat().st_mtime_ns == data.stat().st_mtime_ns


def test_a_killed_mount_without_passthrough_takes_up_the_size(mount: Mount) -> None:
    """And the disk can be cut then: what was cut off does not come back."""
    disk = grow(mount)
    mount.kill()
    with contextlib.suppress(OSError):
        os.close(disk)
    mount.options = ("-o", "shrink,writeback=on")
    mount.mount()
    with opened(mount) as disk:
        assert mount.passthrough("a") != "on"
        assert header_of(mount.folder).clean
        assert os.pread(disk, 2 * SIZE, 0) == GROWN
        os.ftruncate(disk, SIZE)
        mount.kill()
    mount.mount()
    assert mount.raw("a").read_bytes() == CONTENT


def test_nobody_else_opens_what_a_program_still_uses(mount: Mount, tmp_path: Path) -> None:
    """The kernel goes on with a disk that is open when its mount is killed: whoever has it open goes on writing."""
    with opened(mount) as disk:
        mount.kill()
        assert os.pwrite(disk, b"still there", 0) == 11
        with pytest.raises(OSError, match="Transport endpoint"):
            os.fsync(disk)
        mount.mount()
        for flags in (os.O_RDONLY, os.O_RDWR):
            with pytest.raises(OSError, match="busy"):
                os.open(mount.raw("a"), flags)
        assert "still used by way of a mount whose fvdfs has ended" in mount.log
        done = fvdfs("convert", mount.folder / "a.fvd", tmp_path / "copy.raw")
        assert done.code
        assert "still used by way of a mount whose fvdfs has ended" in done.err
        done = fvdfs("create", mount.folder / "a.fvd", "1M", "--force", "--data-file", "auto")
        assert done.code
    assert mount.raw("a").read_bytes() == b"still there" + CONTENT[11:]


def test_a_mount_that_ends_while_a_program_uses_a_disk(mount: Mount) -> None:
    """It is closed as far as it can be, not called clean, and the next mount sees all that the program writes."""
    with opened(mount) as disk:
        os.pwrite(disk, b"x", SIZE)
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{mount.pid}").exists())
        mount.pid = 0
        assert "go on using its data file" in mount.log
        assert not header_of(mount.folder).clean
        os.pwrite(disk, b"y" * 1000, SIZE)
    mount.mount()
    assert mount.raw("a").read_bytes()[SIZE:] == b"y" * 1000 + bytes(24)
    with opened(mount):
        pass
    mount.umount()
    assert header_of(mount.folder).clean


def test_a_reader_leaves_no_trace(mount: Mount) -> None:
    image = mount.folder / "a.fvd"
    before = image.read_bytes(), image.stat().st_mtime_ns
    with opened(mount, os.O_RDONLY) as disk:
        assert mount.passthrough("a") == "on"
        assert os.pread(disk, SIZE, 0) == CONTENT
    mount.umount()
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


# --- others ---------------------------------------------------------------------------------------------


def test_locks_between_mounts_and_against_bases(mount: Mount, tmp_path: Path) -> None:
    other = Mount(mount.folder, tmp_path / "other", tmp_path / "other.log", options=OPTIONS)
    other.point.mkdir()
    must("create", mount.folder / "child.fvd", "-b", "a.fvd", "-F", "fvd")
    other.mount()
    try:
        with opened(mount):
            for name in ("a", "child"):
                with pytest.raises(OSError, match="busy"):
                    os.open(other.raw(name), os.O_RDONLY)
        with opened(mount, os.O_RDONLY) as one, opened(other, os.O_RDONLY) as two:
            assert mount.passthrough("a") == other.passthrough("a") == "on"
            assert os.pread(one, 100, 0) == os.pread(two, 100, 0)
            with pytest.raises(OSError, match="busy"):
                os.open(other.raw("a"), os.O_RDWR)
        with opened(other) as disk:
            os.pwrite(disk, b"other", 0)
        assert mount.raw("a").read_bytes()[:5] == b"other"
    finally:
        other.umount()


def test_a_data_file_that_is_cut_while_it_is_open(mount: Mount, data: Path) -> None:
    with opened(mount) as disk:
        os.truncate(data, SIZE // 2)
        with pytest.raises(OSError) as caught:
            os.fsync(disk)
        assert caught.value.errno == errno.EIO
        assert "was cut" in mount.log
        with pytest.raises(OSError) as caught:
            os.open(mount.raw("a"), os.O_RDWR)
        assert caught.value.errno == errno.EIO


def test_the_data_file_gets_its_name_by_itself(folder: Path, tmp_path: Path) -> None:
    """`--data-file auto`, in every command that makes images."""
    (folder / "source.raw").write_bytes(CONTENT)
    must("convert", folder / "source.raw", folder / "a.fvd", "--data-file", "auto")
    assert header_of(folder).data_file == "a.fvd.data"
    assert (folder / "a.fvd.data").read_bytes() == CONTENT
    done = fvdfs("create", folder / "a.fvd", "1M", "--data-file", "auto")
    assert "exists already" in done.err
    must("create", folder / "a.fvd", "1M", "--data-file", "auto", "--force")
    assert (folder / "a.fvd.data").read_bytes() == bytes(MIB)
    (tmp_path / "device").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "device") as device:
        done = fvdfs("create", device, "1M", "--data-file", "auto")
        assert "an image on a device has no folder; give an absolute name" in done.err
    with mounted(folder, *OPTIONS) as mount, opened(mount):
        assert mount.passthrough("a") == "on"


# --- when it does not -------------------------------------------------------------------------------------

LAYOUTS = {
    "in the image": ([], [], "its data lies in the image file"),
    "compact": (["--data-file", "d", "--compact"], [], "in chunks"),
    "qcow2": (["--data-file", "d", "--data-format", "qcow2"], [], "not a raw file of this host"),
    "base": (["--data-file", "d", "-b", "base.raw", "-F", "raw"], [], "parts of it were in its base"),
    "writeback": (["--data-file", "d"], ["-o", "writeback=on"], "-o writeback=on has the kernel gather writes"),
    "sync": (["--data-file", "d"], ["-o", f"{PASSED_THROUGH},sync=always"], "-o sync=always has to see"),
    "zeroes": (
        ["--data-file", "d"],
        ["-o", f"{PASSED_THROUGH},detect_zeroes=punch"],
        "-o detect_zeroes=punch has to see",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_why_a_disk_is_not_passed_through(folder: Path, case: str) -> None:
    layout, options, why = LAYOUTS[case]
    (folder / "base.raw").write_bytes(CONTENT)
    must("create", folder / "a.fvd", str(SIZE), *layout)
    with mounted(folder, *(options or OPTIONS)) as mount, opened(mount) as disk:
        assert why in mount.passthrough("a")
        assert why in mount.status("a")["passthrough"]
        assert why in must("status", mount.point)
        os.pwrite(disk, b"x" * 5000, 1000)
        os.fsync(disk)
        assert os.pread(disk, 5000, 1000) == b"x" * 5000


def gathers_writes(mount: Mount, name: str) -> bool:
    """Whether the kernel keeps a write to itself for a while."""
    with opened(mount, name=name) as disk:
        os.pwrite(disk, b"w" * 4096, 0)
        return not any(b"w" * 4096 in file.read_bytes() for file in mount.folder.iterdir() if file.is_file())


@pytest.mark.parametrize("options", [(), ("-o", "writeback=auto")])
def test_a_mount_passes_through_where_it_shows_such_a_disk(folder: Path, options: tuple[str, ...]) -> None:
    new_disk(folder)
    (folder / "base.raw").write_bytes(CONTENT)
    must("create", folder / "b.fvd", "-b", "base.raw", "-F", "raw", "--block-size", "4K")
    with mounted(folder, *options) as mount, opened(mount):
        assert mount.passthrough("a") == "on"
        assert not gathers_writes(mount, "b")


@pytest.mark.parametrize("layout", ["", "--data-file d --compact", "--data-file d --data-format qcow2"])
def test_a_mount_gathers_writes_where_it_shows_none(folder: Path, layout: str) -> None:
    must("create", folder / "b.fvd", str(SIZE), *layout.split())
    (folder / "broken.fvd").write_bytes(b"no image")
    os.mkfifo(folder / "pipe.fvd")
    with mounted(folder) as mount:
        assert gathers_writes(mount, "b")
        must("create", folder / "late.fvd", str(SIZE), "--data-file", "auto")
        with opened(mount, name="late"):
            assert "no flat image here had a raw data file" in mount.passthrough("late")


def test_a_mount_of_a_user_gathers_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_disk(folder)
    images = Folder(str(folder), Policy())
    assert obstacle(images, Writeback.AUTO, always_sync=False) == ""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in obstacle(images, Writeback.AUTO, always_sync=False)


def test_data_on_a_device(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "device") as device:
        must("create", folder / "a.fvd", str(SIZE), "--data-file", device)
        with mounted(folder, "-o", f"{PASSED_THROUGH},base_path=/dev") as mount, opened(mount):
            assert "on a device" in mount.passthrough("a")


def test_data_on_a_stacked_file_system(tmp_path: Path) -> None:
    layers = [tmp_path / name for name in ("lower", "upper", "work", "images")]
    for layer in layers:
        layer.mkdir()
    lower, upper, work, images = layers
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", images], check=False).returncode:
        pytest.skip("no overlay can be mounted here")
    try:
        data = new_disk(images)
        with mounted(images, *OPTIONS) as mount, opened(mount) as disk:
            assert "stacked file system" in mount.passthrough("a")
            os.pwrite(disk, b"x", 0)
            os.fsync(disk)
            assert data.read_bytes()[:1] == b"x"
    finally:
        subprocess.run(["umount", images], check=True)


def test_a_data_file_that_goes_on_behind_the_disk(folder: Path) -> None:
    """As where the original has made the disk smaller: what is there never shows."""
    data = new_disk(folder)
    with open(data, "ab") as file:
        file.write(b"left over")
    with mounted(folder, *OPTIONS) as mount:
        for flags in (os.O_RDONLY, os.O_RDWR):
            with opened(mount, flags) as disk:
                assert f"close it, then: truncate -s {SIZE} {data}" in mount.passthrough("a")
                assert os.pread(disk, SIZE + 1, 0) == CONTENT
            wait_until(lambda: mount.status("a")["state"] == "closed")
            assert mount.raw("a").stat().st_size == SIZE
        assert data.read_bytes()[SIZE:] == b"left over"
        os.truncate(mount.raw("a"), SIZE + 4096)
        with opened(mount) as disk:
            assert mount.passthrough("a") == "on"
            assert os.pread(disk, 2 * SIZE, 0) == CONTENT + bytes(4096)


def test_an_odd_size_is_rounded_up_as_status_says(folder: Path) -> None:
    must("create", folder / "a.fvd", str(SIZE + 512), "--data-file", "auto")
    with mounted(folder, *OPTIONS) as mount:
        with opened(mount):
            assert "truncate -s %4096 enlarges it" in mount.passthrough("a")
        wait_until(lambda: mount.status("a")["state"] == "closed")
        subprocess.run(["truncate", "-s", "%4096", mount.raw("a")], check=True)
        with opened(mount):
            assert mount.passthrough("a") == "on"


def test_a_data_file_that_was_never_used(folder: Path) -> None:
    """Of the original: empty until the first write."""
    data = new_disk(folder)
    data.write_bytes(b"")
    with mounted(folder, *OPTIONS) as mount:
        with opened(mount, os.O_RDONLY) as disk:
            assert "was never used" in mount.passthrough("a")
            assert os.pread(disk, SIZE, 0) == bytes(SIZE)
            assert data.stat().st_size == 0
        wait_until(lambda: mount.status("a")["state"] == "closed")
        before = mount.raw("a").stat().st_mtime_ns
        with opened(mount) as disk:
            assert mount.passthrough("a") == "on"
            assert os.pread(disk, SIZE, 0) == bytes(SIZE)
        assert mount.raw("a").stat().st_mtime_ns == before


def test_all_local_while_open_means_passed_through_at_the_next_opening(folder: Path) -> None:
    (folder / "base.raw").write_bytes(CONTENT)
    must("create", folder / "a.fvd", "-b", "base.raw", "-F", "raw", "--data-file", "auto", "--copy-on-read")
    with mounted(folder, *OPTIONS) as mount:
        with opened(mount) as disk:
            assert "parts of it were in its base when it was opened" in mount.passthrough("a")
            must("prefetch", "start", mount.raw("a"))
            wait_until(lambda: header_of(folder).all_data_in_fvd_img)
            assert mount.passthrough("a") != "on"
            os.pwrite(disk, b"x", 0)
        wait_until(lambda: mount.status("a")["state"] == "closed")
        with opened(mount) as disk:
            assert mount.passthrough("a") == "on"
            assert os.pread(disk, SIZE, 0) == b"x" + CONTENT[1:]
            os.pwrite(disk, b"y", SIZE)
    assert header_of(folder).clean
    assert header_of(folder).virtual_disk_size == SIZE + 512


USUAL = """
import os, sys
d = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(d, b"x" * 5000, 1000)
os.fsync(d)
assert os.pread(d, 5001, 1000) == b"x" * 5000 + os.pread(d, 1, 6000)
print(os.getxattr(sys.argv[1], "user.fvdfs.passthrough").decode())
"""


def reason_of(folder: Path, point: Path, *program: str, user: Sequence[str] = ()) -> str:
    """Why the disk in this folder is not passed through, in a mount of this program; the disk is used, too."""
    point.mkdir()
    if user:
        os.chown(point, NOBODY, NOBODY)
    subprocess.run([*user, *program, "mount", str(folder), str(point), *OPTIONS], check=True, timeout=60, cwd="/")
    try:
        command = [*user, sys.executable, "-I", "-S", "-c", USUAL, str(point / "a.raw")]
        return subprocess.check_output(command, timeout=60, cwd="/", text=True)
    finally:
        must("umount", point)


def test_a_snapshot_ends_it_until_that_is_deleted(folder: Path, data: Path) -> None:
    """The new image over it keeps its data in its own file; the snapshot has the data file, and gets the name again."""
    must("snapshot", folder / "a.fvd", "s")
    with mounted(folder, *OPTIONS) as mount, opened(mount) as disk:
        assert mount.passthrough("a") != "on"
        os.pwrite(disk, b"new", 5000)
    must("delete", folder / "a@s.fvd")
    with mounted(folder, *OPTIONS) as mount, opened(mount):
        assert mount.passthrough("a") == "on"
        assert mount.raw("a").read_bytes() == CONTENT[:5000] + b"new" + CONTENT[5003:]


def test_an_old_kernel(folder: Path, data: Path, tmp_path: Path) -> None:
    """One that does not offer the flag."""
    code = "from fvdfs.ops import wire; wire.FUSE_PASSTHROUGH = 0; from fvdfs.cli import entry; entry()"
    why = reason_of(folder, tmp_path / "point", sys.executable, "-c", code)
    assert "the kernel does not offer it" in why
    assert data.read_bytes() == CONTENT[:1000] + b"x" * 5000 + CONTENT[6000:]


def test_a_user_without_privileges() -> None:
    with tempfile.TemporaryDirectory(prefix="fvdfs-test-") as scratch:
        shared = Path(scratch)
        shared.chmod(0o755)
        folder = shared / "images"
        folder.mkdir()
        new_disk(folder)
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all")
        if subprocess.run([*nobody, *FVDFS, "--version"], capture_output=True, check=False, cwd="/").returncode:
            pytest.skip("another user cannot run this Python")
        assert "only root may have it" in reason_of(folder, shared / "point", *FVDFS, user=nobody)


# --- anything in any order --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_as_a_plain_file(folder: Path, data: Path, tmp_path: Path, seed: int) -> None:
    """Whatever is done to the disk leaves what it leaves in a plain file, but for whole sectors at closing."""
    rng = random.Random(seed)
    model = tmp_path / "model"
    model.write_bytes(CONTENT)
    with mounted(folder, *OPTIONS) as mount:
        for _ in range(25):
            flags = rng.choice((os.O_RDWR, os.O_RDWR | os.O_APPEND))
            disk, file = os.open(mount.raw("a"), flags), os.open(model, flags)
            for _ in range(rng.randrange(1, 12)):
                step(rng, disk, file)
                assert os.fstat(disk).st_size == os.fstat(file).st_size
            size = os.fstat(file).st_size
            assert os.pread(disk, size + 1, 0) == os.pread(file, size + 1, 0)
            end = rng.random()
            if end < 0.2:
                os.fsync(disk)
                mount.kill()
            with contextlib.suppress(OSError):
                os.close(disk)
            os.ftruncate(file, -(-size // 512) * 512)
            os.close(file)
            if end < 0.2:
                mount.mount()
            elif end < 0.4:
                mount.remount()
            else:
                wait_until(lambda: mount.status("a")["state"] == "closed")
            assert mount.raw("a").stat().st_size == model.stat().st_size
        with opened(mount):
            pass
        mount.umount()
        found, expected = data.read_bytes(), model.read_bytes()
        assert next((at for at, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), -1) == -1
        assert fvdfs("check", folder / "a.fvd").out.count("clean") == 1


def step(rng: random.Random, disk: int, file: int) -> None:
    """Do the same to both."""
    size = os.fstat(file).st_size
    at, block = rng.randrange(size + 3000), rng.randbytes(rng.randrange(1, 9000))
    what = rng.random()
    for each in (disk, file):
        if what < 0.4:
            os.pwrite(each, block, at)
        elif what < 0.6:
            os.lseek(each, 0, os.SEEK_END)
            os.write(each, block)
        elif what < 0.75:
            os.ftruncate(each, max(512, at) // 512 * 512)
        elif what < 0.9:
            os.fsync(each)
        else:
            with mmap.mmap(each, 512) as area:
                area[:4] = block[:4].ljust(4, b"\0")
