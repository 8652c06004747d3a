"""Damage and failing disks that a mount meets while it serves: one image suffers, and says so; the others go on.

Where bytes are unknown the answer is EIO, never zeros; nothing more is written to that image; one line in the log
and `fvdfs status` say why.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.format.header import HEADER_SIZE, Header
from fvdfs.ops.complaints import LINES, PERIOD, Complaints
from support import reference
from support.devices import loop_device, small_disk
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until

CHUNK = 64 << 10
EXT4_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN; its argument 2: without writing out the journal


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor; its disk may have failed when it is closed."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


def write(path: Path, offset: int, data: bytes) -> None:
    with opened(path) as disk:
        assert os.pwrite(disk, data, offset) == len(data)
        os.fsync(disk)


def read(path: Path, offset: int, length: int = 4096) -> bytes:
    """Read past the kernel's cache."""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as disk:
        return os.pread(disk, length, offset)


def fails(path: Path, offset: int, length: int = 4096) -> bool:
    """Whether reading there gives EIO."""
    try:
        read(path, offset, length)
    except OSError as error:
        assert error.errno == errno.EIO
        return True
    return False


def wait_until_closed(mount: Mount, name: str) -> None:
    """A close is answered before its image is closed; the status says when the file is as it stays."""
    wait_until(lambda: not mount.status(name)["open"], timeout=20)
    assert mount.status(name)["state"] == "closed"


def lines(mount: Mount, text: str) -> int:
    return sum(text in line for line in mount.log.splitlines())


def set_entry(image: Path, chunk: int, number: int) -> None:
    """Damage the chunk table."""
    with open(image, "r+b") as file:
        header = Header.decode(file.read(HEADER_SIZE), str(image))
        file.seek(header.table_offset + 4 * chunk)
        file.write(struct.pack("<I", number))


def compact_image(folder: Path, mount: Mount, name: str = "bad") -> Path:
    """An image of four chunks, 1 to 4, each full of its number."""
    must("create", folder / f"{name}.fvd", "1M", "--compact", "--chunk-size", "64K", "--grow-unit", "64K")
    for chunk in range(4):
        write(mount.raw(name), chunk * CHUNK, b"%d" % (chunk + 1) * CHUNK)
    wait_until_closed(mount, name)
    return folder / f"{name}.fvd"


@contextmanager
def with_a_good_one(folder: Path, *options: str) -> Iterator[Mount]:
    """A mount with an image that nothing happens to; it must still work at the end."""
    must("create", folder / "good.fvd", "1M", "--compact", "--chunk-size", "64K")
    with mounted(folder, *options) as mount:
        with opened(mount.raw("good")) as disk:
            os.pwrite(disk, b"before", 0)
            pid = mount.pid
            yield mount
            os.pwrite(disk, b"after", 100)
            os.fsync(disk)
        assert read(mount.raw("good"), 0)[:6] == b"before"
        assert os.getxattr(mount.point, "user.fvdfs.pid") == str(pid).encode()
        assert mount.status("good")["failed"] == ""
        assert lines(mount, "unforeseen") == lines(mount, "Traceback") == 0, mount.log
    assert reference.check(folder / "good.fvd", "fvdfs") == []


DAMAGED_ENTRIES = {
    "shared": (2, 1, "2 chunks share their place with others", {1, 2}),
    "beyond": (3, 1000, "1 chunks lie past the end of the storage", {3}),
    "far beyond": (0, 0x7FFFFFFE, "1 chunks lie past the end of the storage", {0}),
}


@pytest.mark.parametrize("kind", DAMAGED_ENTRIES)
def test_a_damaged_chunk_table(folder: Path, kind: str) -> None:
    chunk, number, message, unknown = DAMAGED_ENTRIES[kind]
    with with_a_good_one(folder) as mount:
        image = compact_image(folder, mount)
        set_entry(image, chunk, number)
        raw = mount.raw("bad")
        before = image.read_bytes()
        with opened(raw, os.O_RDONLY):
            for each in range(4):
                if each in unknown:
                    assert fails(raw, each * CHUNK)
                else:
                    assert read(raw, each * CHUNK) == b"%d" % (each + 1) * 4096
            assert read(raw, 5 * CHUNK) == bytes(4096), "what has no place is zeros"
            assert lines(mount, f"chunk table: {message}") == 1
            with pytest.raises(OSError) as caught:
                os.open(raw, os.O_RDWR)
            assert caught.value.errno == errno.EROFS
            assert message in mount.status("bad")["failed"]
            assert not mount.status("bad")["writable"]
            assert message in must("status", mount.point)
        assert message in mount.status("bad")["failed"], "nor is it forgotten at closing"
        assert image.read_bytes() == before


@pytest.mark.parametrize("layout", ["plain", "compact", "data file"])
def test_a_file_that_is_truncated_while_it_is_open(folder: Path, layout: str) -> None:
    options = {
        "plain": [],
        "compact": ["--compact", "--chunk-size", "64K", "--grow-unit", "64K"],
        "data file": ["--compact", "--chunk-size", "64K", "--grow-unit", "64K", "--data-file", "bad.data"],
    }[layout]
    with with_a_good_one(folder) as mount:
        image = folder / "bad.fvd"
        must("create", image, "1M", *options)
        raw = mount.raw("bad")
        with opened(raw) as disk:
            for chunk in range(16):
                os.pwrite(disk, b"%x" % chunk * CHUNK, chunk * CHUNK)
        wait_until_closed(mount, "bad")
        with opened(raw) as disk:
            os.pwrite(disk, b"0" * 512, 0)
            os.fsync(disk)
            data = folder / "bad.data" if layout == "data file" else image
            end = data.stat().st_size
            os.truncate(data, end - 5 * CHUNK - 4096)
            assert read(raw, 10 * CHUNK) == b"a" * 4096, "what is there is still read"
            assert fails(raw, 11 * CHUNK)
            assert fails(raw, 15 * CHUNK)
            assert lines(mount, "it was cut; read-only from now on") == 1
            assert "it was cut" in mount.status("bad")["failed"]
            assert "it was cut" in must("status", mount.point)
            with pytest.raises(OSError) as caught:
                os.pwrite(disk, b"more", 0)
                os.fsync(disk)
            assert caught.value.errno == errno.EIO
            assert data.stat().st_size == end - 5 * CHUNK - 4096, "it is not made longer again"
        wait_until_closed(mount, "bad")
        assert fails(raw, 15 * CHUNK), "nor are they zeros after it was opened anew"
        assert read(raw, 10 * CHUNK) == b"a" * 4096
        with pytest.raises(OSError) as caught:
            os.open(raw, os.O_RDWR)
        assert caught.value.errno == errno.EROFS


LAYOUTS: dict[str, tuple[list[str], str]] = {
    "plain": ([], "bad.fvd"),
    "over a base": (["-b", "base.raw", "-F", "raw", "--copy-on-read"], "bad.fvd"),
    "no journal": (["-b", "base.raw", "-F", "raw", "--journal-size", "none"], "bad.fvd"),
    "data file": (["--data-file", "bad.data"], "bad.data"),
    "compact": (["--compact", "--chunk-size", "64K", "--grow-unit", "64K"], "bad.fvd"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_was_truncated_while_nobody_had_it_open(folder: Path, tmp_path: Path, layout: str) -> None:
    """As by a copy that did not end. Whatever is tried with it, nothing takes what is missing for zeros."""
    options, data = LAYOUTS[layout]
    (folder / "base.raw").write_bytes(b"base" * (MIB // 8))
    with with_a_good_one(folder) as mount:
        image = folder / "bad.fvd"
        must("create", image, "1M", *options)
        raw = mount.raw("bad")
        for chunk in range(16):
            write(raw, chunk * CHUNK, b"%x" % chunk * CHUNK)
        wait_until_closed(mount, "bad")
        end = (folder / data).stat().st_size
        cut = end - 4 * CHUNK
        if layout == "compact":
            cut = Header.decode(image.read_bytes()[:HEADER_SIZE], "").metadata_size + 12 * CHUNK
        os.truncate(folder / data, cut)
        with opened(raw, os.O_RDONLY):
            assert read(raw, 11 * CHUNK) == b"b" * 4096, "what is there is still read"
            assert fails(raw, 12 * CHUNK)
            assert fails(raw, 15 * CHUNK)
            with pytest.raises(OSError) as caught:
                os.open(raw, os.O_RDWR)
            assert caught.value.errno == errno.EROFS
            why = mount.status("bad")["failed"]
            assert why
            assert why in must("status", mount.point)
            assert f"{image}: {why}" in mount.log
            assert fvdfs("map", raw).code == 1
        wait_until_closed(mount, "bad")
        for done in (fvdfs("convert", image, tmp_path / "copy.raw"), fvdfs("map", image)):
            assert done.code == 1
            assert done.err == f"fvdfs: {image}: {why}; fvdfs check {image} says what is lost\n"
        assert not (tmp_path / "copy.raw").exists()
        assert [problem for problem in json.loads(must("info", image, "--json"))["problems"] if why in problem]
        assert (folder / data).stat().st_size == cut, "it is not made longer again"
    done = fvdfs("check", image)
    assert done.code == 2
    assert "bytes 786432..1048576 of the disk" in done.out
    must("create", folder / "top.fvd", "-b", "bad.fvd", "-F", "fvd")
    done = fvdfs("convert", folder / "top.fvd", tmp_path / "copy.raw")
    assert (done.code, why in done.err) == (1, True), "the base of an image"


def test_images_that_were_never_used_are_not_truncated(folder: Path) -> None:
    """The original extends a new file before its first request (format.md, "Storage without a table")."""
    (folder / "base.raw").write_bytes(b"base" * (MIB // 8))
    for name, options in (("plain", []), ("cow", ["-b", "base.raw", "-F", "raw"]), ("data", ["--data-file", "d"])):
        image = folder / f"{name}.fvd"
        must("create", image, "1M", *options)
        os.truncate(image, Header.decode(image.read_bytes()[:HEADER_SIZE], "").metadata_size)
    os.truncate(folder / "d", 0)
    with mounted(folder, "-o", "writeback=on") as mount:  # not passed through
        for name in ("plain", "cow", "data"):
            assert read(mount.raw(name), MIB - 4096) == bytes(4096)
            write(mount.raw(name), 4096, b"x" * 4096)
            assert read(mount.raw(name), 4096) == b"x" * 4096
            assert mount.status(name)["failed"] == ""
    for name in ("plain", "cow", "data"):
        must("check", folder / f"{name}.fvd")


def test_a_base_that_is_truncated_while_it_is_open_reads_as_the_format_says(folder: Path) -> None:
    """A base that is shorter than it was reads as followed by zeros: that alone is not damage."""
    (folder / "base.raw").write_bytes(b"base" * (MIB // 4))
    with with_a_good_one(folder) as mount:
        must("create", folder / "bad.fvd", "--base", "base.raw", "--base-format", "raw")
        with opened(mount.raw("bad")):
            assert read(mount.raw("bad"), 0)[:4] == b"base"
            os.truncate(folder / "base.raw", CHUNK)
            assert read(mount.raw("bad"), 4096)[:4] == b"base"
            assert read(mount.raw("bad"), 2 * CHUNK) == bytes(4096)
            assert mount.status("bad")["failed"] == ""


@contextmanager
def file_system(path: Path) -> Iterator[Path]:
    """An ext4 of its own, on a loop device."""
    backing = path.with_suffix(".img")
    backing.touch()
    os.truncate(backing, 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", backing], check=True)
    path.mkdir()
    subprocess.run(["mount", "-o", "loop", backing, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def pull_away(path: Path) -> None:
    """From now on all that the file system is asked gives EIO."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, EXT4_SHUTDOWN, struct.pack("I", 2))
    finally:
        os.close(descriptor)


def test_a_disk_that_is_pulled_away_does_not_end_the_mount(folder: Path, tmp_path: Path) -> None:
    with file_system(tmp_path / "other") as other, with_a_good_one(folder, "-o", f"base_path={other}") as mount:
        os.symlink(other / "bad.fvd", folder / "bad.fvd")
        must("create", folder / "far.fvd", "1M", "--data-file", other / "far.data")
        compact_image(other, mount)
        write(mount.raw("far"), 0, b"far" * 1000)
        with opened(mount.raw("bad")) as bad, opened(mount.raw("far")) as far:
            os.pwrite(bad, b"not flushed", 0)
            os.pwrite(far, b"not flushed", 0)
            pull_away(other)
            for disk, name in ((bad, "bad"), (far, "far")):
                for _ in range(2):
                    with pytest.raises(OSError) as caught:
                        os.pwrite(disk, b"x" * 4096, 8192)
                        os.fsync(disk)
                    assert caught.value.errno in (errno.EIO, errno.EROFS)
                assert lines(mount, f"/{name}.fvd: write: ") >= 1
        listed = {image["name"] for image in json.loads(must("status", mount.point, "--json"))["images"]}
        assert "good.raw" in listed
        os.unlink(folder / "bad.fvd")
        os.unlink(folder / "far.fvd")


def test_a_full_disk_stops_no_other_image(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    options = ("-o", f"writeback=off,base_path={small}")
    with small_disk(small, "1M") as set_size, with_a_good_one(folder, *options) as mount:
        must("create", folder / "bad.fvd", "4M", "--data-file", small / "data")
        with opened(mount.raw("bad")) as disk:
            with pytest.raises(OSError) as caught:
                for at in range(4):
                    os.pwrite(disk, b"%d" % at * MIB, at * MIB)
            assert caught.value.errno == errno.ENOSPC
            os.fsync(disk)
            assert mount.status("bad")["failed"] == "", "a full disk is no damage"
            set_size("8M")
            for at in range(4):
                assert os.pwrite(disk, b"%d" % at * MIB, at * MIB) == MIB
            os.fsync(disk)
        assert mount.raw("bad").read_bytes() == b"".join(b"%d" % at * MIB for at in range(4))


@pytest.mark.parametrize("flushed_before", [0, 5])
def test_a_flush_that_the_device_fails(folder: Path, tmp_path: Path, flushed_before: int) -> None:
    """Also where it began with the write, as it does after some that were flushed one by one."""
    small = tmp_path / "small"
    with small_disk(small, "16M") as set_size:
        backing = small / "backing"
        backing.touch()
        os.truncate(backing, 16 * MIB)
        with loop_device(backing) as device, with_a_good_one(folder, "-o", "writeback=off") as mount:
            must("create", device, "8M")
            (folder / "bad.fvd").symlink_to(device)
            with opened(mount.raw("bad")) as disk:
                for _ in range(flushed_before):
                    os.pwrite(disk, b"old" * 4096, 0)
                    os.fsync(disk)
                subprocess.run(["fallocate", "-p", "-o", "4M", "-l", "3M", backing], check=True)
                set_size(str(backing.stat().st_blocks * 512))
                os.pwrite(disk, b"new" * 4096, 5 * MIB)
                with pytest.raises(OSError) as caught:
                    os.fsync(disk)
                assert caught.value.errno == errno.EIO
                assert mount.status("bad")["failed"]
                with pytest.raises(OSError):
                    os.pwrite(disk, b"new" * 4096, 0)
            os.unlink(folder / "bad.fvd")


def test_what_fails_again_and_again_does_not_fill_the_log(folder: Path) -> None:
    with mounted(folder, "-o", "writeback=off") as mount:
        set_entry(compact_image(folder, mount), 2, 1000)
        with opened(mount.raw("bad"), os.O_RDONLY | os.O_DIRECT) as disk, mmap.mmap(-1, 4096) as page:
            for _ in range(LINES + 40):
                with pytest.raises(OSError) as caught:
                    os.preadv(disk, [page], 2 * CHUNK)
                assert caught.value.errno == errno.EIO
        assert lines(mount, "bad.fvd: read: ") == LINES
    assert lines(mount, "bad.fvd: read: Input/output error: 40 times more") == 1


@pytest.mark.parametrize("periods", [1, 2])
def test_what_is_left_out_of_the_log_is_summed_up(caplog: pytest.LogCaptureFixture, periods: int) -> None:
    complaints = Complaints()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complaints.sum_up)
            for _ in range(periods):
                for number in range(LINES + 5):
                    complaints.say(f"read: at {number}", "read")
                    complaints.say(f"write: at {number}", "write")
                complaints.say("open: damaged", "open: damaged")
                await trio.sleep(PERIOD + 1)
            await trio.sleep(10 * PERIOD)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    said = Counter(record.getMessage().split(" at")[0] for record in caplog.records)
    assert said == {
        "read:": LINES * periods,
        "write:": LINES * periods,
        "open: damaged": periods,
        "read: 5 times more": periods,
        "write: 5 times more": periods,
    }


def test_lines_that_anybody_writes_are_counted_by_what_they_say_and_of_whom(caplog: pytest.LogCaptureFixture) -> None:
    """Also from threads, which wake the one who sums up."""
    complaints = Complaints()
    log = logging.getLogger("fvdfs.somewhere")

    def write() -> None:
        for number in range(LINES + 5):
            for name in ("a", "b"):
                log.warning("%s: %d bytes are missing", name, number)

    async def main() -> None:
        with complaints.filtering():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(complaints.sum_up)
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(write)
                await trio.sleep(PERIOD + 1)
                log.warning("%s: %d bytes are missing", "a", 1)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    said = Counter(record.getMessage() for record in caplog.records)
    for name in ("a", "b"):
        assert said[f"{name}: 0 bytes are missing: 5 times more"] == 1
        assert sum(text.startswith(f"{name}: ") and "more" not in text for text in said.elements()) == LINES + (
            name == "a"
        )


def test_a_header_that_is_spoilt_while_the_image_is_open(folder: Path) -> None:
    """What was read at opening counts; once it is closed, it cannot be opened again."""
    with with_a_good_one(folder) as mount:
        image = compact_image(folder, mount)
        with opened(mount.raw("bad"), os.O_RDONLY):
            with open(image, "r+b") as file:
                file.write(bytes(4096))
            assert read(mount.raw("bad"), CHUNK) == b"2" * 4096
        wait_until_closed(mount, "bad")
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                os.open(mount.raw("bad"), os.O_RDONLY)
            assert caught.value.errno == errno.EIO
        assert "bad.fvd: not an FVD image" in mount.log
