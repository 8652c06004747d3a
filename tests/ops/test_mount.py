"""The mount as a user meets it: what appears, who may open what, how it ends."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fvdfs.errors import ImageError
from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from fvdfs.image import chain
from fvdfs.image.policy import Policy
from fvdfs.ops.commits import COMMIT_INTERVAL
from support import reference
from support.devices import loop_device, small_disk
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_for_end, wait_for_log


def write_at(path: Path, offset: int, data: bytes, *, sync: bool = True) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)
        if sync:
            os.fsync(file.fileno())


def read_at(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def change_header(image: Path, **fields: int | str) -> None:
    """Damage or change the header of an image on disk."""
    with open(image, "r+b") as file:
        header = with_fields(Header.decode(file.read(HEADER_SIZE), str(image)), **fields)
        file.seek(0)
        file.write(header.encode())


def names(mount: Mount) -> list[str]:
    return sorted(os.listdir(mount.point))


# --- what appears -------------------------------------------------------------------------------


def test_a_raw_file_has_the_attributes_of_its_image(folder: Path) -> None:
    image = folder / "a.fvd"
    must("create", image, "10M")
    os.chmod(image, 0o640)
    os.chown(image, 12, 34)
    os.utime(image, (1_000_000, 2_000_000))
    with mounted(folder) as mount:
        status = mount.raw("a").stat()
        assert status.st_size == 10 * MIB
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 12, 34)
        assert status.st_mtime == 2_000_000
        assert status.st_blocks == image.stat().st_blocks < 100
        write_at(mount.raw("a"), MIB, b"x" * MIB)
        assert mount.raw("a").stat().st_blocks >= MIB // 512
        assert mount.raw("a").stat().st_mtime > 2_000_000
        os.chmod(mount.raw("a"), 0o600)
        os.utime(mount.raw("a"), (3_000_000, 4_000_000))
        assert image.stat().st_mode & 0o7777 == 0o600
        assert image.stat().st_mtime == 4_000_000


def test_the_time_of_a_change_is_kept(folder: Path) -> None:
    """The kernel tells it before each flush; it need not be stored before the file is closed."""
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        raw = mount.raw("a")
        with open(raw, "r+b", buffering=0) as file:
            file.write(b"first")
            os.fsync(file)
            changed = os.fstat(file.fileno()).st_mtime_ns
            time.sleep(0.05)
        assert raw.stat().st_mtime_ns == changed
        mount.remount()
        assert raw.stat().st_mtime_ns == changed
        with open(raw, "r+b", buffering=0) as file:
            file.write(b"second")
            os.fsync(file)
            os.utime(raw, ns=(3_000_000_001, 4_000_000_005))
        assert (folder / "a.fvd").stat().st_mtime_ns == 4_000_000_005
        mount.remount()
        assert raw.stat().st_mtime_ns == 4_000_000_005


def test_only_images_appear_and_a_damaged_one_is_in_the_log(folder: Path) -> None:
    must("create", folder / "good.fvd", "1M")
    must("create", folder / "bad.fvd", "1M")
    change_header(folder / "bad.fvd", virtual_disk_size=-512)
    (folder / "text.fvd").write_text("not an image")
    (folder / "empty.fvd").touch()
    (folder / "folder.fvd").mkdir()
    os.mkfifo(folder / "pipe.fvd")
    (folder / "plain.raw").write_bytes(bytes(512))
    os.symlink("nowhere", folder / "link.fvd")
    with mounted(folder) as mount:
        assert names(mount) == ["good.raw"]
        for missing in ("bad", "text", "pipe", "plain", "link", "folder"):
            with pytest.raises(FileNotFoundError):
                mount.raw(missing).stat()
        assert "bad.fvd: virtual_disk_size=-512: " in mount.log
        assert "text.fvd: not an FVD image" in mount.log


def test_images_come_and_go_without_a_remount(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        assert names(mount) == ["a.raw"]
        must("create", folder / "b.fvd", "2M")
        assert mount.raw("b").stat().st_size == 2 * MIB
        assert names(mount) == ["a.raw", "b.raw"]
        write_at(mount.raw("b"), 0, b"old")
        (folder / "a.fvd").unlink()
        assert not mount.raw("a").exists()
        assert names(mount) == ["b.raw"]
        must("create", folder.parent / "new.fvd", "3M")
        os.rename(folder.parent / "new.fvd", folder / "b.fvd")
        assert mount.raw("b").stat().st_size == 3 * MIB
        assert read_at(mount.raw("b"), 0, 3) == bytes(3), "the cache of a replaced image is still there"


def test_an_image_removed_while_open_stays_usable_until_closed(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        with open(mount.raw("a"), "r+b", buffering=0) as file:
            (folder / "a.fvd").unlink()
            file.write(b"still there")
            os.fsync(file.fileno())
            assert os.pread(file.fileno(), 11, 0) == b"still there"
            assert os.fstat(file.fileno()).st_size == MIB
        assert names(mount) == []


def test_a_link_to_a_device_that_holds_an_image_appears(folder: Path, tmp_path: Path) -> None:
    backing = tmp_path / "device.fvd"
    must("create", backing, "8M", "--compact", "--chunk-size", "64K", "--journal-size", "64K")
    os.truncate(backing, 16 * MIB)
    with loop_device(backing) as device:
        os.symlink(device, folder / "disk.fvd")
        with mounted(folder) as mount:
            assert mount.raw("disk").stat().st_size == 8 * MIB
            write_at(mount.raw("disk"), 5 * MIB + 3, b"on a device")
            mount.remount()
            assert read_at(mount.raw("disk"), 5 * MIB, 20) == b"\0\0\0on a device\0\0\0\0\0\0"


def test_a_disk_shrinks_or_grows_by_truncate(folder: Path) -> None:
    base = random.Random(5).randbytes(MIB)
    (folder / "base.raw").write_bytes(base)
    must("create", folder / "a.fvd", "-b", "base.raw", "--block-size", "64K")
    must("create", folder / "c.fvd", "1M", "--compact", "--chunk-size", "64K")
    with mounted(folder) as mount:
        raw = mount.raw("a")
        with pytest.raises(PermissionError):
            os.truncate(raw, 1000)
        assert raw.stat().st_size == MIB
        os.truncate(raw, MIB + 1000)
        assert raw.stat().st_size == MIB + 1024
        assert raw.read_bytes() == base + bytes(1024)
        write_at(raw, MIB + 1000, b"tail" * 100)
        assert raw.stat().st_size == MIB + 1536
        os.truncate(mount.raw("c"), 64 * MIB)
        with pytest.raises(OSError, match="File too large"):
            os.truncate(mount.raw("c"), 1 << 46)  # no table is that large
        mount.remount()
        assert raw.stat().st_size == MIB + 1536
        assert raw.read_bytes() == base + bytes(1000) + b"tail" * 100 + bytes(136)
        assert mount.raw("c").stat().st_size == 64 * MIB
    assert re.search("the chunk table can have room for a disk of [0-9]+ bytes at most", mount.log)
    with mounted(folder, "-o", "shrink") as mount:
        os.truncate(mount.raw("a"), 1024)
        os.truncate(mount.raw("a"), 4096)
        assert mount.raw("a").read_bytes() == base[:1024] + bytes(3072)
        mount.raw("a").write_bytes(b"as cp does")
        mount.remount()
        assert mount.raw("a").read_bytes() == b"as cp does".ljust(512, b"\0")
    assert reference.check(folder / "a.fvd", "fvdfs") == []


class FileHandle:
    """What an NFS server remembers of a file."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.create_string_buffer(8 + 128)
        struct.pack_into("I", self._handle, 0, 128)
        mount_id = ctypes.c_int()
        code = LIBC.name_to_handle_at(-100, os.fsencode(path), self._handle, ctypes.byref(mount_id), 0)
        assert code == 0, os.strerror(ctypes.get_errno())

    def open(self, point: Path, flags: int = os.O_RDONLY) -> int:
        """A descriptor, as `open_by_handle_at` gives it once the kernel has forgotten what it can."""
        root = os.open(point, os.O_RDONLY)
        try:
            Path("/proc/sys/vm/drop_caches").write_text("2")
            descriptor: int = LIBC.open_by_handle_at(root, self._handle, flags)
            if descriptor < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return descriptor
        finally:
            os.close(root)

    def read(self, point: Path, length: int) -> bytes:
        descriptor = self.open(point)
        try:
            return os.pread(descriptor, length, 0)
        finally:
            os.close(descriptor)


LIBC = ctypes.CDLL(None, use_errno=True)


def test_file_handles_lead_to_their_disk_or_nowhere(folder: Path) -> None:
    for name in "abc":
        must("create", folder / f"{name}.fvd", "1M")
    with mounted(folder) as mount:
        for name in "abc":
            write_at(mount.raw(name), 0, name.encode() * 512)
        numbers = {name: mount.raw(name).stat().st_ino for name in "abc"}
        handles = {name: FileHandle(mount.raw(name)) for name in "abc"}

        def all_lead_there() -> None:
            for name in "cab":
                assert handles[name].read(mount.point, 4) == name.encode() * 4
                assert mount.raw(name).stat().st_ino == numbers[name]

        all_lead_there()
        mount.remount()
        all_lead_there()
        descriptor = handles["a"].open(mount.point, os.O_RDWR)
        os.pwrite(descriptor, b"aaaab", 0)
        os.fsync(descriptor)
        os.close(descriptor)
        os.utime(folder / "b.fvd", (5_000_000, 6_000_000))
        assert handles["b"].read(mount.point, 4) == b"bbbb"
        assert mount.raw("b").stat().st_mtime == 6_000_000
        all_lead_there()
        # Removed, replaced, renamed: another disk is never shown.
        (folder / "a.fvd").unlink()
        must("create", folder / "a.fvd", "1M")
        os.rename(folder / "b.fvd", folder / "d.fvd")
        (folder / "c.fvd").unlink()
        for _ in range(2):
            for handle in handles.values():
                assert error_of(lambda handle=handle: handle.open(mount.point)) == errno.ESTALE  # type: ignore[misc]
            mount.remount()
        os.close(FileHandle(mount.point).open(mount.point))
        assert names(mount) == ["a.raw", "d.raw"]


def test_a_disk_that_changed_under_the_kernel_gets_another_number_until_it_is_forgotten(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        handle = FileHandle(mount.raw("a"))
        with open(mount.raw("a"), "rb") as held:
            first = os.fstat(held.fileno()).st_ino
        with open(os.open(mount.raw("a"), os.O_PATH), closefd=True) as held:
            os.utime(folder / "a.fvd", (5_000_000, 6_000_000))
            assert mount.raw("a").stat().st_ino != first == os.fstat(held.fileno()).st_ino
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert handle.read(mount.point, 4) == bytes(4)
        assert mount.raw("a").stat().st_ino == first


# --- caching ------------------------------------------------------------------------------------


def test_direct_and_buffered_readers_see_the_same(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M", "--compact", "--chunk-size", "64K")
    with mounted(folder) as mount:
        raw = mount.raw("a")
        write_at(raw, 4096, b"b" * 4096, sync=False)
        page = mmap.mmap(-1, 4096)
        descriptor = os.open(raw, os.O_RDWR | os.O_DIRECT)
        try:
            assert os.preadv(descriptor, [page], 4096) == 4096
            assert page[:] == b"b" * 4096
            page[:] = b"d" * 4096
            assert os.pwritev(descriptor, [page], 8192) == 4096
        finally:
            os.close(descriptor)
        assert read_at(raw, 8192, 4096) == b"d" * 4096


def test_limits_of_the_kernel_are_raised(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        device = os.stat(mount.point).st_dev
        path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
        assert int((path / "read_ahead_kb").read_text()) == 4096
        assert int((path / "max_ratio").read_text()) == 40


def test_an_idle_mount_sleeps(folder: Path) -> None:
    """Also with an image open that was written."""
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount, open(mount.raw("a"), "r+b", buffering=0) as file:
        file.write(b"x")
        os.fsync(file)
        time.sleep(COMMIT_INTERVAL + 1)

        def turns() -> list[str]:
            tasks = sorted(Path(f"/proc/{mount.pid}/task").glob("*/status"))
            return [line for task in tasks for line in task.read_text().splitlines() if "ctxt_switches" in line]

        before = turns()
        assert len(before) >= 2
        time.sleep(2)
        assert turns() == before


# --- who may open what --------------------------------------------------------------------------


def test_two_mounts_never_write_one_image(folder: Path, tmp_path: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    other = tmp_path / "other"
    other.mkdir()
    os.symlink(folder / "a.fvd", other / "a.fvd")
    with mounted(folder) as first, mounted(other) as second:
        with open(first.raw("a"), "r+b"):
            for mode in ("r+b", "rb"):
                with pytest.raises(OSError, match="busy"):
                    open(second.raw("a"), mode)
            assert "a.fvd: open for writing by another mount or process" in second.log
        with open(first.raw("a"), "rb"), open(second.raw("a"), "rb"), pytest.raises(OSError, match="busy"):
            open(second.raw("a"), "r+b")
        with open(second.raw("a"), "r+b") as file:
            file.write(b"now it may")


def test_an_image_in_use_as_a_base_is_not_written(folder: Path) -> None:
    must("create", folder / "base.fvd", "1M")
    must("create", folder / "top.fvd", "-b", "base.fvd", "-F", "fvd")
    with mounted(folder) as mount:
        with open(mount.raw("top"), "rb"), pytest.raises(OSError, match="busy"):
            open(mount.raw("base"), "r+b")
        with open(mount.raw("base"), "r+b") as file:
            file.write(b"alone")
        assert read_at(mount.raw("top"), 0, 5) == b"alone"


def test_locks_of_other_programs_are_respected(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount, open(folder / "a.fvd", "r+b") as outside:
        fcntl.fcntl(outside, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        with pytest.raises(OSError, match="busy"):
            open(mount.raw("a"), "rb")


def test_names_lead_only_where_the_user_allows(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "base.raw").write_bytes(b"secret" * 1024)
    os.symlink(outside / "base.raw", folder / "link.raw")
    os.mkfifo(folder / "pipe")
    must("create", folder / "dots.fvd", "-b", "../outside/base.raw")
    must("create", folder / "absolute.fvd", "-b", outside / "base.raw")
    must("create", folder / "link.fvd", "-b", "link.raw")
    must("create", folder / "fifo.fvd", "-b", "link.raw")
    change_header(folder / "fifo.fvd", base_img="pipe")
    must("create", folder / "data.fvd", "1M", "--data-file", "../outside/data.raw")
    must("create", folder / "url.fvd", "-b", "link.raw")
    change_header(folder / "url.fvd", base_img="nbd://127.0.0.1:1/")
    with mounted(folder) as mount:
        assert names(mount) == []
        for name, field in (
            ("dots", "base_img=../outside/base.raw"),
            ("absolute", "base_img=/"),
            ("link", "base_img="),
        ):
            assert f"{name}.fvd: {field}" in mount.log
        assert mount.log.count(f"allow it with -o base_path={outside}") == 4
        (line,) = [line for line in mount.log.splitlines() if "/fifo.fvd: base_img=pipe: " in line]
        assert "neither a regular file nor a block device" in line
        assert "url.fvd: base_img=nbd://127.0.0.1:1/: " in mount.log
    for allowed in (outside, "/", f"{folder}:{outside}"):
        with mounted(folder, "-o", f"base_path={allowed}") as mount:
            assert names(mount) == ["absolute.raw", "data.raw", "dots.raw", "link.raw"]
            assert mount.raw("dots").read_bytes() == b"secret" * 1024


def test_a_read_only_mount_writes_nothing(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder, "--read-only") as mount:
        with pytest.raises(OSError, match="Read-only"):
            open(mount.raw("a"), "r+b")
        with pytest.raises(OSError, match="Read-only"):
            os.truncate(mount.raw("a"), 2 * MIB)


def error_of(call: Callable[[], object]) -> int:
    """The errno that the call raises, or 0."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def read_only_medium(path: Path, kind: str) -> Iterator[Path]:
    """A place where writing is refused, with what stood in the folder `path`; the place."""
    if kind == "bind mount":
        subprocess.run(["mount", "--bind", path, path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", path], check=True)
    elif kind == "file system":
        backing = path.with_suffix(".img")
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", path, backing, "32M"], check=True)
        subprocess.run(["mount", "-o", "loop,ro", backing, path], check=True)
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", path], check=True)
    else:
        flag = {"immutable": "i", "append only": "a"}[kind]
        files = list(path.iterdir())
        subprocess.run(["chattr", f"+{flag}", *files], check=True)
        try:
            yield path
        finally:
            subprocess.run(["chattr", f"-{flag}", *files], check=True)


@pytest.mark.parametrize("where", ["image", "data file"])
@pytest.mark.parametrize("kind", ["bind mount", "file system", "immutable", "append only"])
def test_what_the_host_does_not_let_be_written_gives_its_error(
    folder: Path, tmp_path: Path, kind: str, where: str
) -> None:
    """So that programs fall back to reading where they do so for a file."""
    place = tmp_path / "place"
    place.mkdir()
    if where == "image":
        must("create", place / "a.fvd", "4M")
        os.symlink(place / "a.fvd", folder / "a.fvd")
    else:
        must("create", folder / "a.fvd", "4M", "--data-file", place / "a.data")
    with (
        read_only_medium(place, kind),
        mounted(folder, "-o", f"base_path={place}") as mount,
    ):
        raw, file = mount.raw("a"), place / ("a.fvd" if where == "image" else "a.data")
        expected = error_of(lambda: os.open(file, os.O_RDWR))
        assert expected in (errno.EROFS, errno.EPERM)
        assert error_of(lambda: os.open(raw, os.O_RDWR)) == expected
        assert error_of(lambda: os.open(raw, os.O_WRONLY | os.O_TRUNC)) == expected
        assert error_of(lambda: os.truncate(raw, 8 * MIB)) == expected
        with open(raw, "rb") as reader:
            assert len(reader.read(4096)) == 4096
            assert error_of(lambda: os.open(raw, os.O_RDWR)) == expected
        if where == "image":
            assert error_of(lambda: os.chmod(raw, 0o600)) == error_of(lambda: os.chmod(file, 0o600)) == expected
        if expected == errno.EROFS:
            with loop_device(raw) as device:
                read_only = Path(f"/sys/block/{device.name}/ro").read_text()
                assert read_only == "1\n"
                assert len(device.read_bytes()) == 4 * MIB
    assert "no permission to write to it" in mount.log


def test_a_disk_on_a_read_only_device_cannot_be_opened_for_writing(folder: Path, tmp_path: Path) -> None:
    backing = tmp_path / "backing.fvd"
    must("create", backing, "4M")
    device = Path(
        subprocess.run(
            ["losetup", "-r", "-f", "--show", backing], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    try:
        os.symlink(device, folder / "a.fvd")
        with mounted(folder) as mount:
            assert error_of(lambda: os.open(mount.raw("a"), os.O_RDWR)) == errno.EROFS
            assert read_at(mount.raw("a"), 0, 4096) == bytes(4096)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_crash_without_a_journal_can_be_read_and_written_only_on_demand(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"base" * 1024)
    must("create", folder / "a.fvd", "-b", "base.raw", "--journal-size", "none")
    change_header(folder / "a.fvd", clean_shutdown=0)
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == b"base" * 1024
        with pytest.raises(OSError, match="Read-only"):
            open(mount.raw("a"), "r+b")
        assert "written with -o accept_unclean" in mount.log
    with mounted(folder, "-o", "accept_unclean") as mount:
        write_at(mount.raw("a"), 512, b"new")
    assert reference.check(folder / "a.fvd") == []


# --- bad input ----------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], object]] = {
    "is not an FVD image|the file ends inside the header": lambda p: os.truncate(p, 4000),
    "version=2": lambda p: change_header(p, version=2),
    "block_size=0": lambda p: change_header(p, block_size=0),
    "block_size=511": lambda p: change_header(p, block_size=511),
    "chunk_size=0": lambda p: change_header(p, chunk_size=0),
    "table_offset=": lambda p: change_header(p, table_offset=1 << 40),
    "bitmap_offset=": lambda p: change_header(p, bitmap_offset=0),
    "journal_size=-512": lambda p: change_header(p, journal_size=-512),
    "virtual_disk_size=-512": lambda p: change_header(p, virtual_disk_size=-512),
    "virtual_disk_size=9223372036854775296": lambda p: change_header(p, virtual_disk_size=(1 << 63) - 512),
    "metadata_size=512": lambda p: change_header(p, metadata_size=512),
    "base_img=nowhere.raw": lambda p: change_header(p, base_img="nowhere.raw"),
    "base_img_fmt=qcow99": lambda p: change_header(p, base_img_fmt="qcow99"),
    "data_file=gone.raw": lambda p: change_header(p, data_file="gone.raw"),
}


def test_one_bad_image_is_one_line_and_the_others_work(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"base" * 1024)
    for number, damage in enumerate(DAMAGE.values()):
        image = folder / f"bad{number}.fvd"
        must("create", image, "1M", "-b", "base.raw", "--compact", "--chunk-size", "64K", "--journal-size", "64K")
        damage(image)
    must("create", folder / "good.fvd", "1M", "-b", "base.raw")
    for name, base in (("a", "b"), ("b", "c"), ("c", "d")):
        must("create", folder / f"loop-{name}.fvd", "1M", "-b", "base.raw")
        change_header(folder / f"loop-{name}.fvd", base_img=f"loop-{base}.fvd", base_img_fmt="fvd")
    change_header(folder / "loop-c.fvd", base_img="loop-a.fvd")
    with mounted(folder) as mount:
        assert names(mount) == ["good.raw"]
        assert read_at(mount.raw("good"), 0, 4096) == b"base" * 1024
        lines = mount.log.splitlines()
        for number, expected in enumerate(DAMAGE):
            found = [line for line in lines if f"/bad{number}.fvd: " in line]
            assert len(found) == 1, found
            assert any(part in found[0] for part in expected.split("|")), found[0]
        for name in "abc":
            assert any(f"loop-{name}.fvd" in line and "the chain is a loop" in line for line in lines)


def test_a_base_that_comes_back_makes_its_image_appear(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"base" * 1024)
    must("create", folder / "a.fvd", "-b", "base.raw")
    os.rename(folder / "base.raw", folder / "away")
    with mounted(folder) as mount:
        assert names(mount) == []
        os.rename(folder / "away", folder / "base.raw")
        assert mount.raw("a").read_bytes() == b"base" * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mount", "{folder}/nowhere", "{folder}"], "is not a directory"),
        (["mount", "{folder}", "{folder}/nowhere"], "is not a directory"),
        (["mount", "{folder}", "{folder}"], "hidden by their own mount"),
        (["mount", "{folder}", "{tmp}", "-o", "colour=red"], "-o colour: unknown; there are: base_path"),
        (["mount", "{folder}", "{tmp}", "-o", "base_path=relative"], "must be an absolute path"),
        (["mount", "{folder}", "{tmp}", "--log-file", "{folder}/no/log"], "--log-file"),
        (["umount", "{folder}"], "not mounted"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "m").mkdir()
    done = fvdfs(*[argument.format(folder=folder, tmp=tmp_path / "m") for argument in arguments])
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1, done.err


# --- how it ends --------------------------------------------------------------------------------


@contextmanager
def opened_until_death(path: Path) -> Iterator[int]:
    """A descriptor for reading and writing; the mount may be gone when it is closed."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


def dirty_image(folder: Path) -> bytes:
    """An image over a base, made; the content it has once `soil` has written to it."""
    base = random.Random(1).randbytes(4 * MIB)
    (folder / "base.raw").write_bytes(base)
    must("create", folder / "a.fvd", "6M", "-b", "base.raw", "--block-size", "4K", "--compact", "--chunk-size", "64K")
    content = bytearray(base + bytes(2 * MIB))
    for offset, data in soil():
        content[offset : offset + len(data)] = data
    return bytes(content)


def soil() -> Iterator[tuple[int, bytes]]:
    chance = random.Random(2)
    for _ in range(200):
        yield chance.randrange(6 * MIB - 10_000), chance.randbytes(chance.randrange(1, 10_000))


@pytest.mark.parametrize("end", ["fvdfs umount", "fusermount3 -u", "SIGTERM", "SIGINT"])
def test_every_way_to_end_leaves_clean_images(folder: Path, end: str) -> None:
    content = dirty_image(folder)
    with mounted(folder) as mount:
        pid = mount.pid
        if end.startswith("SIG"):
            # Still open, and nothing flushed: the kernel's cache has to reach the image too.
            with opened_until_death(mount.raw("a")) as descriptor:
                for offset, data in soil():
                    os.pwrite(descriptor, data, offset)
                os.kill(pid, getattr(signal, end))
                wait_for_end(pid)
                mount.pid = 0
        else:
            for offset, data in soil():
                write_at(mount.raw("a"), offset, data, sync=False)
            if end == "fvdfs umount":
                mount.umount()
            else:
                subprocess.run(["fusermount3", "-u", mount.point], check=True)
                wait_for_end(pid)
                mount.pid = 0
        assert not os.path.ismount(mount.point)
    assert reference.check(folder / "a.fvd", "fvdfs") == []
    assert b"".join(reference.read_disk(folder / "a.fvd")) == content


def test_umount_of_a_busy_mount_says_so(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        with open(mount.raw("a"), "rb"):
            done = fvdfs("umount", mount.point)
            assert done.code == 1
            assert "busy" in done.err
        mount.umount()


LAYOUTS = {
    "cow": ["--block-size", "4K"],
    "cow, tiny journal": ["--block-size", "512", "--journal-size", "4K"],
    "cow, no journal": ["--block-size", "4K", "--journal-size", "none"],
    "compact": ["--compact", "--chunk-size", "64K", "--block-size", "8K", "--journal-size", "64K"],
    "data file": ["--data-file", "data.raw", "--block-size", "64K"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_flushed_survives_kill(folder: Path, layout: str) -> None:
    base = random.Random(3).randbytes(2 * MIB)
    (folder / "base.raw").write_bytes(base)
    image = folder / "a.fvd"
    must("create", image, "3M", "-b", "base.raw", *LAYOUTS[layout])
    content = bytearray(base + bytes(MIB))
    chance = random.Random(layout)
    with mounted(folder, "-o", "accept_unclean") as mount:
        for _ in range(3):
            with opened_until_death(mount.raw("a")) as descriptor:
                for _ in range(60):
                    offset, data = chance.randrange(3 * MIB - 5000), chance.randbytes(chance.randrange(1, 5000))
                    os.pwrite(descriptor, data, offset)
                    content[offset : offset + len(data)] = data
                    if chance.random() < 0.3:
                        os.fsync(descriptor)
                os.fsync(descriptor)
                mount.kill()
            problems = [p for p in reference.check(image, "fvdfs") if "clean_shutdown" not in p]
            assert problems == []
            assert b"".join(reference.read_disk(image)) == content
            mount.mount()
            assert mount.raw("a").read_bytes() == content
            write_at(mount.raw("a"), 0, bytes(content[:10]))
    assert reference.check(image, "fvdfs") == []
    assert b"".join(reference.read_disk(image)) == content


# --- many images, large images, slow images -----------------------------------------------------


def test_two_hundred_images_are_small(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "i0.fvd", "1G", "-b", "base.raw")
    for number in range(1, 200):
        subprocess.run(["cp", "--sparse=always", folder / "i0.fvd", folder / f"i{number}.fvd"], check=True)
    with mounted(folder) as mount:
        assert len(names(mount)) == 200
        for number in range(200):
            read_at(mount.raw(f"i{number}"), 0, 4096)
        status = Path(f"/proc/{mount.pid}/status").read_text()
        peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    print(f"200 images: {peak / 1024:.0f} MiB at the peak")
    assert peak < 150_000


def chain_of(folder: Path, numbers: Sequence[int]) -> None:
    """Images that stand on one another, the last of them on a raw base."""
    (folder / "base.raw").write_bytes(b"base" * 256)
    below = numbers[-1]
    must("create", folder / f"i{below}.fvd", "1M", "-b", "base.raw", "-F", "raw")
    for number in reversed(numbers[:-1]):
        shutil.copy(folder / f"i{numbers[-1]}.fvd", folder / f"i{number}.fvd")
        change_header(folder / f"i{number}.fvd", base_img=f"i{below}.fvd", base_img_fmt="fvd")
        below = number


@pytest.mark.parametrize("numbers", [range(100, 140), range(139, 99, -1)])
def test_a_scan_looks_at_each_image_of_a_chain_once_or_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int]
) -> None:
    """As itself, and as a base; and never holds a chain open, which may be longer than the limit of descriptors."""
    chain_of(folder, numbers)
    looks, descriptors = [], []

    def open_layer(path: str, *rest: Any, **options: Any) -> chain.Layer:
        looks.append(path)
        descriptors.append(len(os.listdir("/proc/self/fd")))
        return original(path, *rest, **options)

    original = chain._open_layer
    monkeypatch.setattr(chain, "_open_layer", open_layer)
    before = len(os.listdir("/proc/self/fd"))
    judged: chain.Judged = {}
    for image in sorted(folder.glob("*.fvd")):
        assert chain.look_at_chain(str(image), Policy(), judged).size == MIB
    assert max(descriptors) <= before + 3
    assert len(looks) <= 2 * len(numbers)
    (folder / "base.raw").unlink()
    for image in sorted(folder.glob("*.fvd")):
        with pytest.raises(ImageError, match=r"i[0-9]+\.fvd: base_img=base\.raw"):
            chain.look_at_chain(str(image), Policy(), judged={})
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_chain_of_four_hundred(folder: Path) -> None:
    chain_of(folder, range(400))
    with mounted(folder) as mount:
        assert len(names(mount)) == 400
        assert read_at(mount.raw("i0"), 0, 8) == b"basebase"


def transferred(pid: int) -> int:
    """Bytes that the system calls of a process have read and written so far."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def test_a_large_disk_opens_at_once(folder: Path) -> None:
    """To open it and use it here and there, the bitmap is read once, and little else."""
    bitmap = (1 << 40) // (64 << 10) // 8  # bytes
    with open(folder / "base.raw", "wb") as base:
        base.truncate(1 << 40)
        base.seek((1 << 40) - 512)
        base.write(b"e" * 512)
    must("create", folder / "a.fvd", "2T", "-b", "base.raw", "--block-size", "64K")
    with mounted(folder, "-o", "io_uring=off") as mount:  # whose transfers are not counted
        before = transferred(mount.pid)
        with open(mount.raw("a"), "r+b", buffering=0) as file:
            assert os.fstat(file.fileno()).st_size == 2 << 40
            assert os.pread(file.fileno(), 512, (1 << 40) - 512) == b"e" * 512
            os.pwrite(file.fileno(), b"z", (2 << 40) - 1)
            os.pwrite(file.fileno(), b"m", 1 << 39)
            os.fsync(file)
        assert bitmap <= transferred(mount.pid) - before < bitmap + 2 * MIB
    assert reference.check(folder / "a.fvd", "fvdfs") == []


def test_an_image_that_waits_for_its_disk_stalls_no_other(folder: Path, tmp_path: Path) -> None:
    """The base of one image lies on a frozen file system."""
    slow = tmp_path / "slow"
    slow.mkdir()
    backing = tmp_path / "slow.img"
    with open(backing, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", backing], check=True)
    subprocess.run(["mount", "-o", "loop", backing, slow], check=True)
    try:
        must("create", slow / "slow.fvd", "8M")
        must("create", folder / "fast.fvd", "8M")
        os.symlink(slow / "slow.fvd", folder / "slow.fvd")
        with mounted(folder, "-o", "writeback=off") as mount, open(mount.raw("slow"), "r+b", buffering=0) as stuck:
            subprocess.run(["fsfreeze", "-f", slow], check=True)
            writer = threading.Thread(target=lambda: os.pwrite(stuck.fileno(), b"w" * 4096, 0))
            try:
                writer.start()
                time.sleep(0.3)
                assert writer.is_alive(), "the file system is not frozen"
                for number in range(20):
                    write_at(mount.raw("fast"), number * 4096, b"f" * 4096)
                assert read_at(mount.raw("fast"), 0, 4096) == b"f" * 4096
                assert writer.is_alive()
            finally:
                subprocess.run(["fsfreeze", "-u", slow], check=True)
                writer.join(timeout=20)
            assert read_at(mount.raw("slow"), 0, 4096) == b"w" * 4096
    finally:
        subprocess.run(["umount", slow], check=True)


def test_what_nobody_flushes_is_committed_after_some_seconds(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "-b", "base.raw")
    with mounted(folder, "-o", "writeback=off") as mount, open(mount.raw("a"), "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"committed", 4096)
        deadline = time.monotonic() + 20
        while b"".join(reference.read_disk(folder / "a.fvd"))[4096:4105] != b"committed":
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_an_error_of_the_storage_reaches_the_writer(folder: Path, tmp_path: Path) -> None:
    """A full file system: ENOSPC to the one who writes, and writing works again when there is space."""
    small = tmp_path / "small"
    with small_disk(small, "2M") as set_size:
        must("create", folder / "a.fvd", "8M", "--compact", "--chunk-size", "64K", "--data-file", small / "data")
        with mounted(folder, "-o", f"writeback=off,base_path={small}") as mount:
            with open(mount.raw("a"), "r+b", buffering=0) as file:
                with pytest.raises(OSError) as caught:
                    for at in range(0, 8 * MIB, MIB):
                        os.pwrite(file.fileno(), b"x" * MIB, at)
                assert caught.value.errno == errno.ENOSPC
                set_size("20M")
                for at in range(0, 8 * MIB, MIB):
                    assert os.pwrite(file.fileno(), b"y" * MIB, at) == MIB
                os.fsync(file.fileno())
            mount.remount()
            assert mount.raw("a").read_bytes() == b"y" * 8 * MIB
            wait_for_log(mount, "No space left on device")


def test_a_shrink_gives_back_space(folder: Path) -> None:
    """Of a compact disk, wherever its chunks lie: check finds no leak, and what was cut off does not come back."""
    image = folder / "disk.fvd"
    must("create", image, "32M", "--compact", "--chunk-size", "256K")
    with mounted(folder, "-o", "shrink") as mount:
        with open(mount.raw("disk"), "r+b") as disk:
            for at in (*range(24, 32), *range(8), *range(16, 24)):
                disk.seek(at * MIB)
                disk.write(bytes([at + 1]) * MIB)
        mount.remount()
        before = image.stat().st_blocks * 512
        os.truncate(mount.raw("disk"), 12 * MIB)
        mount.umount()
        assert before - image.stat().st_blocks * 512 > 15 * MIB
        assert fvdfs("check", image).code == 0
        mount.mount()
        os.truncate(mount.raw("disk"), 32 * MIB)
        with open(mount.raw("disk"), "r+b") as disk:
            disk.seek(30 * MIB)
            disk.write(b"x")
        expected = b"".join(bytes([at + 1]) * MIB for at in range(8)).ljust(30 * MIB, b"\0") + b"x"
        assert mount.raw("disk").read_bytes() == expected.ljust(32 * MIB, b"\0")
        mount.umount()
    assert fvdfs("check", image).code == 0
