"""The mtime of a disk: what changes the disk changes it, in every layout and mode, and nothing else does."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.ops.times import Mtime
from fvdfs.store.host import HostFile, open_path
from support.devices import loop_device
from support.mounts import MIB, NO_PASSTHROUGH, PASSED_THROUGH, Mount, mounted, must, wait_until

OLD = 1_577_836_800 * 10**9 + 123_456_789
CLOCK_TICK = 20_000_000  # ns that a file system's clock may be behind
MODES = {"on": "writeback=on", "off": "writeback=off", "always": "sync=always"}
LAYOUTS = {
    "plain": [],
    "cow": ["-b", "base", "-F", "raw", "--block-size", "4K"],
    "compact": ["--compact", "--chunk-size", "64K"],
    "data": ["--data-file", "data"],
    "cow-data": ["-b", "base", "-F", "raw", "--data-file", "data"],
    "compact-data": ["--compact", "--chunk-size", "64K", "--data-file", "data"],
    "qcow2-data": ["--data-file", "data.qcow2", "--data-format", "qcow2"],
    "device": [],
    "device-data": ["--data-file", "device"],
}


@contextmanager
def image(folder: Path, layout: str) -> Iterator[Path]:
    """An image of 1 MiB that was changed in 2020, and its folder."""
    (folder / "base").write_bytes(b"base" * (MIB // 4))
    if layout.startswith("device"):
        backing = folder.parent / "device"
        backing.touch()
        os.truncate(backing, 16 * MIB)
        with loop_device(backing) as device:
            (folder / "device").symlink_to(device)
            if layout == "device":
                must("create", device, "1M")
                (folder / "a.fvd").symlink_to(device)
            else:
                must("create", folder / "a.fvd", "1M", *LAYOUTS[layout])
            os.utime(folder / "a.fvd", ns=(OLD, OLD))
            yield folder
        return
    must("create", folder / "a.fvd", "1M", *LAYOUTS[layout])
    for file in folder.iterdir():
        os.utime(file, ns=(OLD, OLD))
    yield folder


def options(mode: str) -> tuple[str, str]:
    return "-o", f"base_path=/,shrink,{MODES[mode]}"


@contextmanager
def served(folder: Path, layout: str, mode: str) -> Iterator[Mount]:
    """The image, mounted; one of these cases is that of a disk that is passed through."""
    with image(folder, layout), mounted(folder, *options(mode)) as mount:
        if (layout, MODES[mode]) == ("data", PASSED_THROUGH) and not NO_PASSTHROUGH:
            mount.expect_passthrough("a")
        yield mount


def changed(mount: Mount) -> int:
    return mount.raw("a").stat().st_mtime_ns


def expect_change_since(mount: Mount, before: int) -> int:
    """The mtime, which is not before that, and neither is the ctime."""
    status = mount.raw("a").stat()
    assert status.st_mtime_ns >= before - CLOCK_TICK
    assert status.st_ctime_ns >= before - CLOCK_TICK
    return status.st_mtime_ns


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_write_is_a_change(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        assert changed(mount) == OLD
        last = 0
        for number in range(3):
            before = time.time_ns()
            with open(mount.raw("a"), "r+b", buffering=0) as disk:
                disk.write(b"change %d" % number)
                os.fsync(disk)
                last = expect_change_since(mount, before)
                assert os.fstat(disk.fileno()).st_mtime_ns == last
            assert changed(mount) == last
        mount.remount()
        assert expect_change_since(mount, before) == last
        # Also where nobody asks for a flush, and where a page was changed in memory.
        before = time.time_ns()
        with open(mount.raw("a"), "r+b", buffering=0) as disk:
            disk.write(b"change 4")
        last = expect_change_since(mount, before)
        mount.remount()
        assert changed(mount) == last
        before = time.time_ns()
        with open(mount.raw("a"), "r+b", buffering=0) as disk, mmap.mmap(disk.fileno(), 0) as area:
            area[:4] = b"page"
        last = expect_change_since(mount, before)
        mount.remount()
        assert expect_change_since(mount, before) <= time.time_ns()


@pytest.mark.parametrize("layout", ["plain", "cow", "data", "compact-data"])
@pytest.mark.parametrize("mode", MODES)
def test_another_size_is_a_change(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        raw = mount.raw("a")

        def cut_by_descriptor() -> None:
            with open(raw, "r+b") as disk:
                os.ftruncate(disk.fileno(), MIB)

        def cut_by_opening() -> None:
            with open(raw, "wb"):
                pass

        def cut(size: int) -> None:
            os.truncate(raw, size)

        for change in (partial(cut, 2 * MIB), partial(cut, MIB), cut_by_descriptor):
            os.utime(raw, ns=(OLD, OLD))
            before = time.time_ns()
            change()
            last = expect_change_since(mount, before)
            mount.remount()
            assert changed(mount) == last
        os.utime(raw, ns=(OLD, OLD))
        before = time.time_ns()
        cut_by_opening()
        expect_change_since(mount, before)
        mount.remount()
        expect_change_since(mount, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["plain", "cow", "compact", "data", "cow-data", "compact-data", "device"])
def test_opening_reading_and_closing_is_none(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        for flags in ("rb", "r+b"):
            with open(mount.raw("a"), flags, buffering=0) as disk:
                assert len(disk.read(MIB)) == MIB
                os.fsync(disk)
                assert changed(mount) == OLD
            assert changed(mount) == OLD
            mount.remount()
            assert changed(mount) == OLD


@pytest.mark.parametrize("layout", [[], ["--data-file", "data"], ["--compact", "--chunk-size", "64K"]])
@pytest.mark.parametrize("mode", MODES)
def test_copies_from_the_base_are_none(folder: Path, layout: list[str], mode: str) -> None:
    """Copy-on-read and prefetching fill the image; what the disk holds stays."""
    (folder / "base").write_bytes(b"base" * (MIB // 4))
    must("create", folder / "a.fvd", "1M", "-b", "base", "-F", "raw", "--copy-on-read", *layout)
    os.utime(folder / "a.fvd", ns=(OLD, OLD))
    with mounted(folder, *options(mode)) as mount:
        with open(mount.raw("a"), "r+b", buffering=0) as disk:
            assert disk.read(300_000)
            wait_until(lambda: mount.status("a")["local_bytes"] > 0)
            assert changed(mount) == OLD
        mount.remount()
        assert changed(mount) == OLD
        must("prefetch", "start", mount.raw("a"))
        wait_until(lambda: mount.status("a")["state"] == "closed" and mount.status("a")["local_share"] == 1)
        assert changed(mount) == OLD
        mount.remount()
        assert changed(mount) == OLD


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["cow", "data", "cow-data", "compact-data"])
def test_a_replay_is_none(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        disk = os.open(mount.raw("a"), os.O_RDWR)
        os.pwrite(disk, b"write", 5000)
        os.fsync(disk)
        mount.kill()
        with suppress(OSError):
            os.close(disk)
        for file in folder.iterdir():
            os.utime(file, ns=(OLD, OLD))
        mount.mount()
        with open(mount.raw("a"), "r+b", buffering=0) as again:
            assert os.pread(again.fileno(), 5, 5000) == b"write"
        assert changed(mount) == OLD
        mount.remount()
        assert changed(mount) == OLD


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["plain", "data", "compact-data", "qcow2-data"])
def test_a_time_that_was_set_stays(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        raw = mount.raw("a")
        with open(raw, "r+b", buffering=0) as disk:
            disk.write(b"change")
            os.utime(raw, ns=(OLD + 1, OLD + 2))
            assert changed(mount) == OLD + 2
            assert disk.read(5)
        assert changed(mount) == OLD + 2
        mount.remount()
        assert changed(mount) == OLD + 2
        os.utime(raw, ns=(OLD + 3, OLD + 4))
        mount.remount()
        assert changed(mount) == OLD + 4
        copy = folder.parent / "copy"
        subprocess.run(["cp", "-p", raw, copy], check=True)
        assert abs(copy.stat().st_mtime_ns - OLD - 4) < 1000  # cp may round
        subprocess.run(["cp", "-p", copy, folder.parent / "other"], check=True)
        with open(raw, "r+b", buffering=0) as disk:
            os.utime(raw, ns=(OLD, OLD))
            before = time.time_ns()
            disk.write(b"after that")
        expect_change_since(mount, before)


@pytest.mark.parametrize("mode", ["on", "off", "always"])
@pytest.mark.parametrize("layout", ["plain", "data", "cow-data", "compact-data", "qcow2-data", "device-data"])
def test_what_was_flushed_counts_as_a_change_after_kill(folder: Path, layout: str, mode: str) -> None:
    """Each time, also in a session in which the file was told a time before."""
    with served(folder, layout, mode) as mount:
        for count in (1, 2, 7):
            disk = os.open(mount.raw("a"), os.O_RDWR)
            for number in range(count):
                before = time.time_ns()
                os.pwrite(disk, b"%d" % number, 4096 * number)
                os.fsync(disk)
            mount.kill()
            with suppress(OSError):
                os.close(disk)
            mount.mount()
            expect_change_since(mount, before)


def test_a_backup_by_time_and_size_sees_each_write(folder: Path, tmp_path: Path) -> None:
    with served(folder, "data", "off") as mount:
        backup = tmp_path / "backup"
        for number in range(3):
            with open(mount.raw("a"), "r+b", buffering=0) as disk:
                disk.write(b"change %d" % number)
                subprocess.run(["rsync", "-a", f"{mount.point}/", backup], check=True)
                time.sleep(1.1)  # rsync compares seconds
                disk.write(b"and %d" % number)
            subprocess.run(["rsync", "-a", f"{mount.point}/", backup], check=True)
            assert (backup / "a.raw").read_bytes() == mount.raw("a").read_bytes()


def test_a_file_of_somebody_else_gets_the_present(tmp_path: Path) -> None:
    """Who may write it, but does not own it, cannot set any other time."""
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=(OLD, OLD))
    file = HostFile(os.open(path, os.O_RDWR), "file", True)
    path.chmod(0o666)
    os.seteuid(65534)
    try:
        trio.run(file.keep_mtime, OLD - 1)
        assert file.status().st_mtime_ns == OLD, "it has a later one already"
        before = time.time_ns()
        trio.run(file.keep_mtime, before)
        assert file.status().st_mtime_ns >= before - CLOCK_TICK
    finally:
        os.seteuid(0)
        file.close()


async def test_a_flush_waits_for_a_time_that_is_being_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    file = open_path(str(folder / "file"), writable=True)
    may_go_on = trio.Event()
    keep_mtime = HostFile.keep_mtime

    async def keep_later(file: HostFile, ns: int) -> None:
        await may_go_on.wait()
        await keep_mtime(file, ns)

    monkeypatch.setattr(HostFile, "keep_mtime", keep_later)
    async with trio.open_nursery() as nursery:
        mtime = Mtime()
        mtime.begin(file, OLD, nursery.start_soon)
        mtime.written(kernel_tells=False)
        await trio.testing.wait_all_tasks_blocked()
        assert mtime.is_behind
        may_go_on.set()
        await mtime.store()
        assert not mtime.is_behind
        assert file.status().st_mtime_ns == mtime.ns
    await file.aclose()
