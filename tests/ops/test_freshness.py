"""What the kernel has cached of a disk is shown as long as it is right: no file under it has changed meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fvdfs.ops.freshness import SECOND, TICK, WHOLE_SECONDS_TICK, Snapshot, is_settled, snapshot_of
from support.devices import loop_device
from support.mounts import MIB, Mount, mounted, must

NEW = b"changed behind the mount"


def head(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(len(NEW))


def write_head(path: Path, data: bytes = NEW, *, sync: bool = False) -> None:
    with open(path, "r+b", buffering=0) as file:
        assert file.write(data) == len(data)
        if sync:
            os.fsync(file)


def let_times_settle() -> None:
    """Until a change shows in the times of what was made before."""
    time.sleep(2 * TICK / SECOND)


def pages_cached(path: Path) -> int:
    """How many pages of a file are in memory after it was opened."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as area:
        found = ctypes.create_string_buffer(len(area) // mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(area)), found) == 0, ctypes.get_errno()
        return sum(byte & 1 for byte in found.raw)


# --- times --------------------------------------------------------------------------------------


def test_a_time_is_settled_when_no_later_change_can_have_it() -> None:
    now = 1_700_000_000 * SECOND
    assert is_settled(now - TICK - 1, now)
    assert not is_settled(now - TICK // 2 - 1, now)
    assert not is_settled(now + SECOND + 1, now), "a clock was set back"
    assert not is_settled(now - WHOLE_SECONDS_TICK + SECOND, now), "the file system keeps whole seconds"
    assert is_settled(now - WHOLE_SECONDS_TICK - SECOND, now)


def test_a_state_lasts_while_every_file_is_the_same_and_was_settled() -> None:
    one = Snapshot(((1, 2, 0, 4, 5, 6),), settled=True)
    assert one.is_still(Snapshot(one.signatures, settled=False))
    assert not Snapshot(one.signatures, settled=False).is_still(one)
    assert not one.is_still(None)
    assert not one.is_still(Snapshot(((1, 2, 0, 4, 6, 6),), settled=True))
    assert snapshot_of([]) == Snapshot((), settled=True)


# --- what may change ------------------------------------------------------------------------------


def over_raw(folder: Path) -> Path:
    must("create", folder / "top.fvd", "-b", "under", "-F", "raw")
    return folder / "under"


def over_fvd_over_raw(folder: Path) -> Path:
    must("create", folder / "mid.fvd", "-b", "under", "-F", "raw")
    must("create", folder / "top.fvd", "-b", "mid.fvd", "-F", "fvd")
    return folder / "under"


def over_fvd_with_a_data_file(folder: Path) -> Path:
    must("create", folder / "mid.fvd", "1M", "--data-file", "data")
    must("create", folder / "top.fvd", "-b", "mid.fvd", "-F", "fvd")
    os.truncate(folder / "data", MIB)
    return folder / "data"


def with_a_data_file(folder: Path) -> Path:
    must("create", folder / "top.fvd", "1M", "--data-file", "data")
    os.truncate(folder / "data", MIB)
    return folder / "data"


def over_qcow2_over_raw(folder: Path) -> Path:
    options = ["-f", "qcow2", "-b", "under", "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", *options, "mid.qcow2"], cwd=folder, check=True)
    must("create", folder / "top.fvd", "-b", "mid.qcow2", "-F", "qcow2")
    return folder / "under"


LAYERS = [over_raw, over_fvd_over_raw, over_fvd_with_a_data_file, with_a_data_file, over_qcow2_over_raw]


@pytest.fixture(params=["on", "off"])
def options(request: pytest.FixtureRequest, folder: Path) -> tuple[str, str]:
    (folder / "under").write_bytes(bytes(MIB))
    return "-o", f"writeback={request.param}"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_file_under_a_disk_that_changed_while_it_was_closed(
    folder: Path, options: tuple[str, str], layer: Callable[[Path], Path]
) -> None:
    under = layer(folder)
    with mounted(folder, *options) as mount:
        raw = mount.raw("top")
        for number in range(3):
            assert len(raw.read_bytes()) == MIB
            write_head(under, b"change number %010d" % number)
            assert head(raw) == b"change number %010d" % number
        # Unseen by time and size of the file alone: both are put back.
        let_times_settle()
        raw.read_bytes()
        raw.read_bytes()
        before = under.stat()
        write_head(under)
        os.utime(under, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert head(raw) == NEW


def test_a_file_under_a_disk_that_was_replaced(folder: Path, options: tuple[str, str]) -> None:
    under = over_raw(folder)
    before = under.stat()
    let_times_settle()
    with mounted(folder, *options) as mount:
        mount.raw("top").read_bytes()
        (folder / "other").write_bytes(NEW + bytes(MIB - len(NEW)))
        os.utime(folder / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.rename(folder / "other", under)
        assert head(mount.raw("top")) == NEW


def test_a_change_in_the_same_second_where_a_file_system_keeps_seconds(
    folder: Path, options: tuple[str, str], tmp_path: Path
) -> None:
    backing, point = tmp_path / "backing", tmp_path / "seconds"
    backing.touch()
    os.truncate(backing, 16 * MIB)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", "-I", "128", backing], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", backing, point], check=True)
    try:
        (point / "under").write_bytes(bytes(MIB))
        assert (point / "under").stat().st_ctime_ns % SECOND == 0
        must("create", folder / "top.fvd", "-b", point / "under", "-F", "raw")
        with mounted(folder, options[0], f"{options[1]},base_path={point}") as mount:
            time.sleep(1.05 - time.time() % 1)  # a second begins
            for number in range(5):
                write_head(point / "under", b"change number %010d" % number)
                assert head(mount.raw("top")) == b"change number %010d" % number
    finally:
        subprocess.run(["umount", "-l", point], check=True)


def test_a_device_under_a_disk_that_changed(folder: Path, options: tuple[str, str], tmp_path: Path) -> None:
    """Its node does not tell who wrote to it."""
    backing = tmp_path / "device"
    backing.write_bytes(bytes(MIB))
    with loop_device(backing) as device:
        must("create", folder / "top.fvd", "-b", device, "-F", "raw")
        with mounted(folder, options[0], f"{options[1]},base_path=/dev") as mount:
            let_times_settle()
            mount.raw("top").read_bytes()
            write_head(device, sync=True)
            assert head(mount.raw("top")) == NEW


@pytest.mark.parametrize("truncated", [False, True])
def test_pages_go_at_any_kind_of_opening(folder: Path, options: tuple[str, str], truncated: bool) -> None:
    under = over_raw(folder)
    with mounted(folder, options[0], f"{options[1]},shrink") as mount:
        raw = mount.raw("top")
        raw.read_bytes()
        write_head(under)
        if truncated:
            with open(raw, "wb", buffering=0) as file:
                file.write(b"x")
            assert raw.read_bytes() == b"x".ljust(512, b"\0")
        else:
            with open(raw, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as area:
                assert area[: len(NEW)] == NEW


# --- what stays -----------------------------------------------------------------------------------


def test_pages_of_a_disk_that_nothing_has_changed_stay(folder: Path, options: tuple[str, str]) -> None:
    under = over_raw(folder)
    let_times_settle()
    with mounted(folder, *options) as mount:
        raw = mount.raw("top")
        raw.read_bytes()
        for mode in ("rb", "r+b", "rb"):
            with open(raw, mode):
                pass
            assert pages_cached(raw) == MIB // mmap.PAGESIZE
        under.touch()
        with open(raw, "rb") as first:
            assert pages_cached(raw) == 0
            first.read()
            assert pages_cached(raw) == MIB // mmap.PAGESIZE, "it is open: who else opens it drops nothing"


# --- another mount of the same folder ---------------------------------------------------------------


@contextmanager
def two_mounts(folder: Path, *options: str) -> Iterator[tuple[Mount, Mount]]:
    """The folder, mounted twice."""
    point = folder.parent / "second"
    point.mkdir()
    second = Mount(folder, point, folder.parent / "second.log", options=options)
    with mounted(folder, *options) as first:
        second.mount()
        try:
            yield first, second
        finally:
            second.umount()


@pytest.mark.parametrize("layout", [[], ["--data-file", "data"], ["--compact", "--chunk-size", "64K"]])
def test_what_another_mount_has_written(folder: Path, options: tuple[str, str], layout: list[str]) -> None:
    must("create", folder / "a.fvd", "1M", *layout)
    must("create", folder / "top.fvd", "-b", "a.fvd", "-F", "fvd")
    with two_mounts(folder, *options) as (first, second):
        for number in range(3):
            text = b"change number %010d" % number
            first.raw("top").read_bytes()
            old = first.raw("a").stat()
            assert len(first.raw("a").read_bytes()) == old.st_size
            write_head(second.raw("a"), text)
            os.truncate(second.raw("a"), MIB + (number + 1) * 4096)
            new = second.raw("a").stat()
            assert new.st_size == MIB + (number + 1) * 4096
            assert first.raw("a").stat().st_size == new.st_size
            assert first.raw("a").stat().st_mtime_ns > old.st_mtime_ns, "a backup would skip it"
            assert head(first.raw("a")) == text
            assert head(first.raw("top")) == text


def test_an_image_on_a_device_that_another_mount_made_larger(
    folder: Path, options: tuple[str, str], tmp_path: Path
) -> None:
    backing = tmp_path / "device"
    backing.touch()
    os.truncate(backing, 16 * MIB)
    with loop_device(backing) as device:
        must("create", device, "1M")
        (folder / "a.fvd").symlink_to(device)
        with two_mounts(folder, *options) as (first, second):
            assert len(first.raw("a").read_bytes()) == MIB
            write_head(second.raw("a"))
            os.truncate(second.raw("a"), 2 * MIB)
            assert first.raw("a").stat().st_size == 2 * MIB
            assert first.raw("a").read_bytes() == NEW + bytes(2 * MIB - len(NEW))
