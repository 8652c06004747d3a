"""Direct I/O: what is no whole number of sectors is refused; a disk of an odd number of sectors is like any other."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from support.guest import CommandError, boot, build_initrd, run
from support.mounts import (
    MIB,
    NO_PASSTHROUGH,
    PASSED_THROUGH,
    RELEASE,
    Mount,
    fuse_connection,
    mounted,
    must,
    wait_until,
)

SIZES = {"odd": 4097 * 512, "one": 512, "seven": 7 * 512, "even": 2 * MIB}
LAYOUTS = {
    "plain": [],
    "cow": ["--base", "base.raw", "--base-format", "raw"],
    "compact": ["--compact", "--chunk-size", "64K"],
    "data-file": ["--data-file", "data.raw"],
}


@contextmanager
def direct(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def odd_disk(folder: Path, options: str = "", *, layout: str = "plain", size: int = SIZES["odd"]) -> Iterator[Mount]:
    """A disk, mounted; one of whole pages, with a data file and the options for it, is passed through."""
    (folder / "base.raw").write_bytes(bytes(1000))
    must("create", folder / "a.fvd", str(size), *LAYOUTS[layout])
    passes = (layout, options, size % 4096) == ("data-file", PASSED_THROUGH, 0) and not NO_PASSTHROUGH
    with mounted(folder, *(["-o", options] if options else []), passes="a" if passes else "") as mount:
        yield mount


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_what_is_no_whole_sector_is_refused_as_on_a_disk(folder: Path, options: str) -> None:
    with odd_disk(folder, options) as mount, direct(mount.raw("a")) as disk:
        page = mmap.mmap(-1, 8192)
        with memoryview(page) as buffer:
            for offset, length in ((0, 1), (0, 511), (0, 513), (1, 512), (100, 4096), (0, 4097), (511, 1)):
                for call in (os.preadv, os.pwritev):
                    with buffer[:length] as piece, pytest.raises(OSError) as caught:
                        call(disk, [piece], offset)
                    assert caught.value.errno == errno.EINVAL
            for offset, length in ((0, 512), (512, 1024), (4608, 8192)):
                with buffer[:length] as piece:
                    assert os.pwritev(disk, [piece], offset) == length
                    assert os.preadv(disk, [piece], offset) == length
            assert os.preadv(disk, [buffer], 4096 * 512) == 512, "the last sector, and where the disk ends"
        # What takes the flag away may do what it likes.
        fcntl.fcntl(disk, fcntl.F_SETFL, fcntl.fcntl(disk, fcntl.F_GETFL) & ~os.O_DIRECT)
        assert os.pwrite(disk, b"xyz", 4096 * 512 + 1) == 3
        fcntl.fcntl(disk, fcntl.F_SETFL, fcntl.fcntl(disk, fcntl.F_GETFL) | os.O_DIRECT)
        with memoryview(page) as buffer, buffer[:512] as piece:
            assert os.preadv(disk, [piece], 4096 * 512) == 512
            assert bytes(piece[:5]) == b"\0xyz\0"


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_pages_written_through_a_direct_descriptor_reach_the_disk(folder: Path, options: str) -> None:
    """A page that was changed in memory is the kernel's to write, up to where the file ends, whatever the flags."""
    with odd_disk(folder, options) as mount:
        with direct(mount.raw("a")) as disk:
            with mmap.mmap(disk, SIZES["odd"]) as area:
                area[-3:] = b"end"
                area.flush()
            os.fsync(disk)
        mount.remount()
        assert mount.raw("a").read_bytes()[-4:] == b"\0end"


@pytest.mark.parametrize("cached_opening", [False, True], ids=["alone", "beside-cached"])
@pytest.mark.skipif(RELEASE < (6, 18), reason="the kernel may keep wrong pages")
def test_direct_writes_are_under_way_side_by_side(folder: Path, cached_opening: bool) -> None:
    """As many as there are threads; one where somebody else uses the page cache."""
    with (
        odd_disk(folder, "writeback=off", size=SIZES["even"]) as mount,
        direct(mount.raw("a")) as disk,
        fuse_connection(mount.raw("a").stat().st_dev) as connection,
    ):
        waiting = connection / "waiting"
        data = mmap.mmap(-1, 4096)
        data[:] = b"side" * 1024
        threads = [threading.Thread(target=os.pwritev, args=(disk, [data], number * 65536)) for number in range(8)]
        with open(mount.raw("a"), "rb") if cached_opening else nullcontext():
            os.kill(mount.pid, signal.SIGSTOP)
            try:
                for thread in threads:
                    thread.start()
                wait_until(lambda: int(waiting.read_text()) >= (1 if cached_opening else 8))
                time.sleep(0.2)
                assert int(waiting.read_text()) == (1 if cached_opening else 8)
            finally:
                os.kill(mount.pid, signal.SIGCONT)
                for thread in threads:
                    thread.join(20)
        assert mount.raw("a").read_bytes()[::65536][:8] == b"s" * 8


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_direct_and_cached_openings_see_what_the_others_write(folder: Path, options: str) -> None:
    """Also while somebody else reads what is being written, of which the kernel must keep no old page."""
    with odd_disk(folder, options, size=SIZES["even"]) as mount, direct(mount.raw("a")) as disk:
        cached = os.open(mount.raw("a"), os.O_RDWR)
        page = mmap.mmap(-1, 4096)
        stop = threading.Event()

        def read_on() -> None:
            while not stop.is_set():
                os.pread(cached, 4096, 8192)

        readers = [threading.Thread(target=read_on) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(400):
                written = number.to_bytes(4, "big") * 1024
                page[:] = written
                os.pwritev(disk, [page], 8192)
                assert os.pread(cached, 4096, 8192) == written
                written = (~number & 0xFFFFFFFF).to_bytes(4, "big") * 1024
                os.pwrite(cached, written, 8192)
                os.preadv(disk, [page], 8192)
                assert page[:] == written
        finally:
            stop.set()
            for reader in readers:
                reader.join(20)
            os.close(cached)


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_what_is_mapped_and_what_is_written_directly_are_the_same(folder: Path, options: str) -> None:
    """Of one opening, or of two."""
    with odd_disk(folder, options, size=SIZES["even"]) as mount, direct(mount.raw("a")) as disk:
        page = mmap.mmap(-1, 4096)
        with mmap.mmap(disk, SIZES["even"]) as area, direct(mount.raw("a")) as other:
            for number in range(200):
                area[4096:8192] = written = number.to_bytes(4, "big") * 1024
                for reader in (disk, other):
                    os.preadv(reader, [page], 4096)
                    assert page[:] == written
                page[:] = written = (~number & 0xFFFFFFFF).to_bytes(4, "big") * 1024
                os.pwritev(other, [page], 4096)
                assert area[4096:8192] == written


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_a_direct_write_changes_the_time_of_the_disk(folder: Path, options: str) -> None:
    with odd_disk(folder, options, size=SIZES["even"]) as mount, direct(mount.raw("a")) as disk:
        for _ in range(3):
            before = mount.raw("a").stat().st_mtime_ns
            time.sleep(0.05)
            os.pwritev(disk, [mmap.mmap(-1, 4096)], 0)
            assert mount.raw("a").stat().st_mtime_ns > before


@pytest.mark.parametrize(("layout", "options"), [*((layout, "") for layout in LAYOUTS), ("data-file", PASSED_THROUGH)])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_qemu_opens_a_disk_of_any_size_without_a_cache(folder: Path, layout: str, options: str, size: int) -> None:
    with odd_disk(folder, options, layout=layout, size=size) as mount:
        raw = mount.raw("a")
        commands = ["-c", f"write -P 7 {size - 512} 512", "-c", f"read -P 7 {size - 512} 512", "-c", "flush"]
        log = run("qemu-io", "-f", "raw", "-t", "none", *commands, raw, check=False)
        assert log.count("512/512 bytes") == 2, log
        mount.remount()
        assert raw.read_bytes()[-512:] == b"\7" * 512
        assert raw.stat().st_size == size


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_loop_device_with_direct_io_on_an_odd_disk(folder: Path, block_size: int) -> None:
    with odd_disk(folder) as mount:
        content = bytearray(random.Random(1).randbytes(SIZES["odd"]))
        with open(mount.raw("a"), "r+b") as raw:
            raw.write(content)
        whole = SIZES["odd"] // block_size * block_size
        setup = ["--find", "--show", "--direct-io=on", f"--sector-size={block_size}", str(mount.raw("a"))]
        device = run("losetup", *setup).strip()
        try:
            with open(device, "r+b", buffering=0) as disk:
                os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert Path("/sys/block", Path(device).name, "loop/dio").read_text() == "1\n"
                assert os.pread(disk.fileno(), whole + MIB, 0) == content[:whole]
                os.pwrite(disk.fileno(), b"L" * block_size, whole - block_size)
                os.fsync(disk)
        finally:
            run("losetup", "--detach", device)
        content[whole - block_size : whole] = b"L" * block_size
        mount.remount()
        assert mount.raw("a").read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_guest_without_a_cache_on_an_odd_disk(folder: Path, tmp_path: Path, block_size: int) -> None:
    size = SIZES["odd"] if block_size == 512 else SIZES["even"]
    script = f"""
        blockdev --getsize64 /dev/vda; blockdev --getss /dev/vda
        yes guest | dd of=/dev/vda bs={block_size} count=1 seek=$(({size} / {block_size} - 1)) iflag=fullblock
        sync
    """
    initrd = build_initrd(tmp_path, script)
    with odd_disk(folder, size=size) as mount:
        device = f"virtio-blk-pci,drive=disk,logical_block_size={block_size},physical_block_size={block_size}"
        drive = f"file={mount.raw('a')},format=raw,if=none,id=disk,cache=none"
        with open(tmp_path / "unused", "wb") as unused:
            unused.truncate(MIB)
        try:
            log = boot(
                tmp_path / "unused",
                initrd,
                cache="none,if=none,id=unused",
                timeout=240,
                extra_args=["-drive", drive, "-device", device],
            )
        except CommandError as error:
            pytest.fail(str(error))
        assert re.search(rf"^{size}$", log, re.MULTILINE), log
        assert re.search(rf"^{block_size}$", log, re.MULTILINE), log
        mount.remount()
        assert mount.raw("a").read_bytes()[-block_size:] == (b"guest\n" * block_size)[:block_size]
