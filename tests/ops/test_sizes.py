"""How long a disk is: whole sectors once it is closed, and the same in all modes at every moment."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import reference
from support.devices import small_disk
from support.mounts import MIB, NO_PASSTHROUGH, PASSED_THROUGH, Mount, mounted, must

MODES = {"on": "writeback=on", "off": "writeback=off", "always": "sync=always", "none": "sync=none"}
LAYOUTS = {
    "plain": [],
    "cow": ["-b", "base", "-F", "raw"],
    "compact": ["--compact", "--chunk-size", "64K"],
    "data": ["--data-file", "data"],
}
modes = pytest.mark.parametrize("mode", MODES)
cases = pytest.mark.parametrize(("layout", "mode"), [*(("plain", mode) for mode in MODES), ("data", "off")])


def passed_through(layout: str, mode: str) -> bool:
    return (layout, MODES[mode]) == ("data", PASSED_THROUGH) and not NO_PASSTHROUGH


@contextmanager
def served(folder: Path, layout: str, mode: str, *options: str) -> Iterator[Mount]:
    """A disk of 1 MiB, mounted; one of these cases is that of a disk that is passed through."""
    (folder / "base").write_bytes(bytes(1000))
    must("create", folder / "a.fvd", "1M", *LAYOUTS[layout])
    with mounted(folder, "-o", ",".join([MODES[mode], *options])) as mount:
        if passed_through(layout, mode):
            mount.expect_passthrough("a")
        yield mount


@pytest.mark.parametrize("layout", LAYOUTS)
@modes
def test_appends_make_the_same_disk_in_every_mode(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        raw = mount.raw("a")
        texts = ["abc", "def", "ghi", "jkl", "mno", "pqr", "stu", "vwx"]  # then the size is one to be passed through
        for text in texts:
            subprocess.run(["sh", "-c", f"printf {text} >> {raw}"], check=True)
        assert raw.stat().st_size == MIB + 4096
        expected = bytes(MIB) + b"".join(text.encode().ljust(512, b"\0") for text in texts)
        assert raw.read_bytes() == expected
        # While somebody has it open it ends where the last write has ended.
        with open(raw, "ab", buffering=0) as disk:
            assert not passed_through(layout, mode) or mount.passthrough("a") == "on"
            for number, word in enumerate((b"one", b"two", b"three")):
                disk.write(word)
                size = MIB + 4096 + (3, 6, 11)[number]
                assert os.fstat(disk.fileno()).st_size == size
                assert raw.stat().st_size == size
                with open(raw, "rb") as reader:
                    assert reader.seek(0, os.SEEK_END) == size
                    reader.seek(MIB + 4096)
                    assert reader.read() == b"onetwothree"[: size - MIB - 4096]
                if number == 1:
                    os.fsync(disk)
                    os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert disk.tell() == MIB + 4096 + 11
        expected += b"onetwothree".ljust(512, b"\0")
        assert raw.stat().st_size == len(expected)
        assert [entry.stat().st_size for entry in os.scandir(mount.point)] == [len(expected)]
        assert raw.read_bytes() == expected
        mount.remount()
        assert raw.read_bytes() == expected
    assert reference.check(folder / "a.fvd", "fvdfs") == []


@cases
def test_a_write_across_the_end(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        raw = mount.raw("a")
        with open(raw, "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), b"x" * 1000, MIB - 500)
            assert os.fstat(disk.fileno()).st_size == MIB + 500
            os.pwrite(disk.fileno(), b"y" * 5, MIB + 600)
            assert os.fstat(disk.fileno()).st_size == MIB + 605
            os.pwrite(disk.fileno(), b"z" * 5, MIB + 502)
            assert os.fstat(disk.fileno()).st_size == MIB + 605
            os.fsync(disk)
            with mmap.mmap(disk.fileno(), 0) as area:
                assert len(area) == MIB + 605
                area[-1:] = b"Y"
        tail = b"x" * 500 + b"\0\0" + b"z" * 5 + bytes(93) + b"yyyyY" + bytes(419)
        assert raw.read_bytes() == bytes(MIB - 500) + b"x" * 500 + tail


@cases
def test_truncating_rounds_up_at_once(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode, "shrink") as mount:
        raw = mount.raw("a")
        with open(raw, "r+b", buffering=0) as disk:
            for size, rounded in ((MIB + 1000, MIB + 1024), (1000, 1024), (1, 512), (MIB, MIB)):
                os.ftruncate(disk.fileno(), size)
                assert os.fstat(disk.fileno()).st_size == rounded
            os.pwrite(disk.fileno(), b"x", MIB)
            assert os.fstat(disk.fileno()).st_size == MIB + 1
            os.ftruncate(disk.fileno(), MIB + 1)
            assert os.fstat(disk.fileno()).st_size == MIB + 512
        os.truncate(raw, MIB + 513)
        assert raw.stat().st_size == MIB + 1024
        raw.write_bytes(b"anew")
        assert raw.read_bytes() == b"anew".ljust(512, b"\0")


@cases
def test_what_is_open_twice_is_rounded_when_the_last_has_closed_it(folder: Path, layout: str, mode: str) -> None:
    with served(folder, layout, mode) as mount:
        raw = mount.raw("a")
        with open(raw, "rb"):
            for text in ("abc", "def"):
                subprocess.run(["sh", "-c", f"printf {text} >> {raw}"], check=True)
            assert raw.stat().st_size == MIB + 6
        assert raw.stat().st_size == MIB + 512
        assert raw.read_bytes()[MIB:] == b"abcdef".ljust(512, b"\0")


@modes
def test_a_write_that_can_never_be_stored_leaves_no_false_size(folder: Path, mode: str) -> None:
    """Far past what the chunk table has room for."""
    must("create", folder / "a.fvd", "4M", "--compact", "--chunk-size", "64K")
    with mounted(folder, "-o", MODES[mode]) as mount:
        raw = mount.raw("a")
        for _ in range(2):
            program = ["dd", f"of={raw}", "bs=3", f"seek={10 << 30}", "oflag=seek_bytes", "conv=notrunc"]
            done = subprocess.run(program, input=b"abc", capture_output=True, check=False)
            assert done.returncode, "it can never be stored"
            assert raw.stat().st_size == 4 * MIB
            assert [entry.stat().st_size for entry in os.scandir(mount.point)] == [4 * MIB]
            assert raw.read_bytes() == bytes(4 * MIB)
        with pytest.raises(OSError) as caught, open(raw, "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), b"abc", 10 << 30)
            os.fsync(disk)
        assert caught.value.errno in (errno.EFBIG, errno.EIO)
        target = folder.parent / "copy"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", raw, target], check=True)
        assert target.stat().st_size == 4 * MIB
        # What fits is stored all the same, by who has it open after that, too.
        with open(raw, "r+b", buffering=0) as disk:
            with suppress(OSError):
                os.pwrite(disk.fileno(), b"abc", 10 << 30)
                os.fsync(disk)
            os.pwrite(disk.fileno(), b"stored", 4 * MIB)
            os.fsync(disk)
        size = raw.stat().st_size
        assert size in (4 * MIB + 512, 4 * MIB + 4096), "a kernel that believed in more has stored a page"
        assert raw.read_bytes()[4 * MIB :] == b"stored".ljust(size - 4 * MIB, b"\0")
        mount.remount()
        assert raw.stat().st_size == size


@modes
def test_pages_that_could_not_be_stored_are_not_shown(folder: Path, mode: str) -> None:
    """A full file system: the kernel keeps what it has accepted until it is read again."""
    with small_disk(folder.parent / "small", "2M"):
        data = folder.parent / "small/data"
        must("create", folder / "a.fvd", "8M", "--data-file", data)
        options = f"base_path={data.parent},{MODES[mode]}"
        with mounted(folder, "-o", options, passes="a" if passed_through("data", mode) else "") as mount:
            with pytest.raises(OSError), open(mount.raw("a"), "r+b", buffering=0) as disk:
                for at in range(0, 8 * MIB, MIB):
                    os.pwrite(disk.fileno(), b"x" * MIB, at)
                os.fsync(disk)
            shown = mount.raw("a").read_bytes()
            assert shown[-MIB:] == bytes(MIB)
            mount.remount()
            assert mount.raw("a").read_bytes() == shown
