"""The kernel's requests on their way: what the short path does with what a kernel, or a stress of it, may ask."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fvdfs.ops.wire import (
    CONGESTION_THRESHOLD,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_PARALLEL_DIRECT_WRITES,
    FOPEN_PASSTHROUGH,
    FUSE_AUTO_INVAL_DATA,
    FUSE_DIRECT_IO_ALLOW_MMAP,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_INIT_EXT,
    FUSE_PASSTHROUGH,
    FUSE_WRITEBACK_CACHE,
    MAX_BACKGROUND,
    amend,
    amend_open,
    passes_through,
    writes_back,
    writes_side_by_side,
)
from support.mounts import FVDFS, MIB, Mount, mounted, must, running, wait_until

REQUEST = struct.pack("=IIQQIIIHHIIII", 56, 26, 1, 0, 0, 0, 0, 0, 0, 7, 45, 1 << 17, FUSE_HANDLE_KILLPRIV_V2 | 1)


def init_answer(flags: int, error: int = 0) -> bytes:
    body = struct.pack("=IIIIHHI36x", 7, 38, 1 << 17, flags, 12, 9, 1 << 20)
    return struct.pack("=IiQ", 16 + len(body), error, 1) + body


def test_the_answer_to_init_is_amended() -> None:
    answer = amend(REQUEST, init_answer(1))
    assert len(answer) == len(init_answer(1))
    fields = struct.unpack_from("=IIIIHHI", answer, 16)
    assert fields == (7, 38, 1 << 17, 1 | FUSE_HANDLE_KILLPRIV_V2, MAX_BACKGROUND, CONGESTION_THRESHOLD, 1 << 20)


def test_a_flag_that_is_not_offered_is_not_answered() -> None:
    request = REQUEST[:-4] + struct.pack("=I", 1)
    assert struct.unpack_from("=IIIIHHI", amend(request, init_answer(1)), 16)[3] == 1


def test_the_kernel_is_not_to_drop_pages_by_itself() -> None:
    answer = amend(REQUEST, init_answer(1 | FUSE_AUTO_INVAL_DATA))
    assert struct.unpack_from("=IIIIHHI", answer, 16)[3] == 1 | FUSE_HANDLE_KILLPRIV_V2


@pytest.mark.parametrize("answer", [init_answer(1, error=-71), struct.pack("=IiQ", 16, -71, 1)])
def test_a_refusal_stays_one(answer: bytes) -> None:
    assert amend(REQUEST, answer) == answer


@pytest.mark.parametrize("length", range(len(REQUEST)))
def test_an_init_that_is_cut_short_is_not_amended(length: int) -> None:
    assert amend(REQUEST[:length], init_answer(1)) == init_answer(1)


@pytest.mark.parametrize("length", range(len(init_answer(1)) - 36))
def test_an_answer_to_init_that_is_cut_short_is_not_amended(length: int) -> None:
    assert amend(REQUEST, init_answer(1)[:length]) == init_answer(1)[:length]


NEW_REQUEST = struct.pack(
    "=IIQQIIIHHIIIII44x", 104, 26, 1, 0, 0, 0, 0, 0, 0, 7, 45, 1 << 17, FUSE_INIT_EXT | 1, FUSE_PASSTHROUGH
)


@pytest.mark.parametrize("flags", [1, 1 | FUSE_WRITEBACK_CACHE])
def test_passthrough_is_asked_for_in_place_of_the_write_back_cache(flags: int) -> None:
    answer = amend(NEW_REQUEST, init_answer(flags), passthrough=True)
    assert struct.unpack_from("=I", answer, 16 + 12)[0] == 1 | FUSE_INIT_EXT
    assert not writes_back(answer)
    assert struct.unpack_from("=II", answer, 16 + 32) == (FUSE_PASSTHROUGH, 1)
    assert passes_through(answer)


@pytest.mark.parametrize(
    ("request_", "flags", "wanted"),
    [
        (NEW_REQUEST, 1, False),
        (NEW_REQUEST, 1 | FUSE_WRITEBACK_CACHE, False),
        (NEW_REQUEST[:-48] + bytes(48), 1 | FUSE_WRITEBACK_CACHE, True),
        (NEW_REQUEST[:-48] + bytes(48), 1, True),
        (NEW_REQUEST[: 40 + 16], 1, True),
        (REQUEST, 1, True),
    ],
    ids=["not wanted", "write-back", "not offered beside write-back", "not offered", "cut short", "old kernel"],
)
def test_passthrough_is_not_asked_for(request_: bytes, flags: int, wanted: bool) -> None:
    answer = amend(request_, init_answer(flags), passthrough=wanted)
    assert not passes_through(answer)
    assert struct.unpack_from("=I", answer, 16 + 12)[0] & FUSE_INIT_EXT == 0
    assert writes_back(answer) == bool(flags & FUSE_WRITEBACK_CACHE)


@pytest.mark.parametrize(
    ("flags", "minor", "offered", "passthrough", "asked"),
    [
        (1, 45, FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_PASSTHROUGH, False, FUSE_DIRECT_IO_ALLOW_MMAP),
        (1, 45, FUSE_DIRECT_IO_ALLOW_MMAP, True, FUSE_DIRECT_IO_ALLOW_MMAP),
        (1, 45, FUSE_PASSTHROUGH, False, 0),
        (1, 44, FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_PASSTHROUGH, False, 0),
        (1 | FUSE_WRITEBACK_CACHE, 45, FUSE_DIRECT_IO_ALLOW_MMAP, True, 0),
        (
            1 | FUSE_WRITEBACK_CACHE,
            45,
            FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_PASSTHROUGH,
            True,
            FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_PASSTHROUGH,
        ),
    ],
    ids=["yes", "no passthrough", "not offered", "old kernel", "write-back", "passthrough in place of write-back"],
)
def test_direct_writes_side_by_side_are_asked_for(
    flags: int, minor: int, offered: int, passthrough: bool, asked: int
) -> None:
    request = struct.pack("=IIQQIIIHHIIIII44x", 104, 26, 1, 0, 0, 0, 0, 0, 0, 7, minor, 1 << 17, FUSE_INIT_EXT, offered)
    answer = amend(request, init_answer(flags), passthrough=passthrough)
    assert struct.unpack_from("=I", answer, 16 + 32)[0] == asked
    assert writes_side_by_side(answer) == bool(asked & FUSE_DIRECT_IO_ALLOW_MMAP)


def test_an_answer_to_open_tells_how_to_read_and_write() -> None:
    answer = struct.pack("=IiQQIi", 32, 0, 7, 5, FOPEN_KEEP_CACHE, 0)
    for side_by_side in (True, False):
        amended = amend_open(answer, {5: 3}.__getitem__, side_by_side=side_by_side)
        assert amended == struct.pack("=IiQQIi", 32, 0, 7, 5, FOPEN_PASSTHROUGH, 3)
    assert amend_open(answer, {5: 0}.__getitem__, side_by_side=False) == answer
    amended = amend_open(answer, {5: 0}.__getitem__, side_by_side=True)
    flags = FOPEN_KEEP_CACHE | FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    assert amended == struct.pack("=IiQQIi", 32, 0, 7, 5, flags, 0)


@pytest.mark.parametrize("answer", [struct.pack("=IiQ", 16, -5, 7), struct.pack("=IiQQ", 24, 0, 7, 5)])
def test_a_refused_open_tells_nothing(answer: bytes) -> None:
    assert amend_open(answer, {5: 3}.__getitem__, side_by_side=True) == answer


@pytest.fixture(params=["on", "off"])
def mount(request: pytest.FixtureRequest, folder: Path) -> Iterator[Mount]:
    """A disk of 16 MiB, half of it over a base, with and without io_uring."""
    (folder / "base.raw").write_bytes(random.Random(1).randbytes(8 * MIB))
    must("create", folder / "a.fvd", "16M", "--base", "base.raw", "--base-format", "raw", "--block-size", "4K")
    with mounted(folder, "-o", f"io_uring={request.param}") as mount:
        yield mount


def test_many_readers_and_writers_at_once(mount: Mount) -> None:
    """Each has its own part of the disk, in requests of all sizes, past the kernel's cache."""
    errors: list[BaseException] = []
    part = MIB

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            disk = os.open(mount.raw("a"), os.O_RDWR | os.O_DIRECT)
            area = mmap.mmap(-1, part)
            with memoryview(area) as buffer:
                os.preadv(disk, [buffer], number * part)
                content = bytearray(buffer)
                for _ in range(60):
                    length = 512 * int(2 ** rng.uniform(0, 11))
                    start = rng.randrange(0, part - length + 1, 512)
                    with buffer[:length] as piece:
                        if rng.random() < 0.5:
                            piece[:] = content[start : start + length] = rng.randbytes(length)
                            assert os.pwritev(disk, [piece], number * part + start) == length
                        else:
                            assert os.preadv(disk, [piece], number * part + start) == length
                            assert piece == content[start : start + length]
                        if rng.random() < 0.1:
                            os.fsync(disk)
            os.close(disk)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []


def test_what_libfuse_answers_is_answered_beside_reads_and_writes(mount: Mount) -> None:
    """Long names, extended attributes, listings: all that does not take the short path, in between what does."""
    raw = mount.raw("a")
    stop = threading.Event()

    def load() -> None:
        with open(raw, "r+b", buffering=0) as disk:
            while not stop.is_set():
                os.pwrite(disk.fileno(), bytes(100_000), 3 * MIB)
                os.fsync(disk)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(50):
            assert os.listdir(mount.point) == ["a.raw"]
            assert raw.stat().st_size == 16 * MIB
            assert os.getxattr(raw, "user.fvdfs.status").startswith(b"{")
            with pytest.raises(FileNotFoundError):
                (mount.point / ("n" * 250)).stat()
            with open(raw, "rb", buffering=0) as disk:
                assert len(disk.read(10)) == 10
    finally:
        stop.set()
        thread.join(20)


def test_a_reader_that_is_killed_leaves_nothing_behind(mount: Mount) -> None:
    """The kernel takes its requests back, or the answers find nobody."""
    program = "import os, sys\ndisk = os.open(sys.argv[1], os.O_RDONLY)\n"
    program += "while os.pread(disk, 1 << 24, 0): os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)"
    for _ in range(10):
        with running(sys.executable, "-I", "-S", "-c", program, mount.raw("a")):
            time.sleep(0.1)
    with open(mount.raw("a"), "rb") as disk:
        assert disk.read(8 * MIB) == (mount.folder / "base.raw").read_bytes()
    assert "Traceback" not in mount.log


@contextmanager
def debugged(folder: Path, *options: str) -> Iterator[tuple[Path, list[str]]]:
    """A mount in the foreground: where it is, and, once it is unmounted, the lines of its log."""
    point = folder.parent / "point"
    point.mkdir()
    lines: list[str] = []
    command = [*FVDFS, "mount", "-f", "--debug", *options, str(folder), str(point)]
    with running(*command, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            wait_until(lambda: os.path.ismount(point) and any(point.iterdir()))
            yield point, lines
        finally:
            must("umount", point)
            lines += daemon.communicate(timeout=60)[1].splitlines()


def test_debug_shows_every_request(folder: Path) -> None:
    """Also those that libfuse does not see."""
    must("create", folder / "a.fvd", "1M")
    with debugged(folder) as (point, lines), open(point / "a.raw", "r+b", buffering=0) as disk:
        assert disk.read(4096) == bytes(4096)
        for _ in range(20):
            disk.write(b"x" * 4096)
            os.fsync(disk)
    log = "\n".join(lines)
    counts = {name: log.count(f"opcode: {name} (") for name in ("LOOKUP", "OPEN", "READ", "WRITE", "FSYNC", "RELEASE")}
    assert all(counts.values()), f"{counts}: {log}"
    assert counts["FSYNC"] == counts["WRITE"] == 20


def test_a_write_leaves_what_the_kernel_has_cached(folder: Path) -> None:
    """Pages that were read or written stay; no READ for them reaches the mount."""
    must("create", folder / "a.fvd", "1M")
    with debugged(folder, "-o", "writeback=off") as (point, lines), open(point / "a.raw", "r+b", buffering=0) as disk:
        content = bytearray(disk.read(MIB))
        for start in range(0, MIB, 65536):
            content[start : start + 4096] = bytes([start >> 16]) * 4096
            os.pwrite(disk.fileno(), content[start : start + 4096], start)
            assert os.pread(disk.fileno(), MIB, 0) == content
    kinds = [kind for line in lines for kind in ("READ", "WRITE") if f"opcode: {kind} (" in line]
    assert kinds == ["READ"] * kinds.count("READ") + ["WRITE"] * 16
    assert kinds[0] == "READ"
