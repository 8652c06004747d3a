"""Real programs on a mounted raw file: image tools, load generators, ext4, a virtual machine."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.devices import ext4
from support.guest import boot, build_initrd, run
from support.treegen import make_tar, tree_digest

KIB = 1024
MIB = 1024 * KIB
RAW_SIZE = 512 * MIB
CACHES = ["none", "writeback"]


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """The bytes of a file, which must have that many there."""
    data = bytearray()
    with opened(path) as descriptor:
        while len(data) < length:
            piece = os.pread(descriptor, length - len(data), offset + len(data))
            assert piece, f"{path} ends at {offset + len(data)}"
            data += piece
    return bytes(data)


def drop_pages(path: Path) -> None:
    """Write a file out and take it out of the page cache, so that it is read again."""
    with opened(path, os.O_RDWR) as descriptor:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def same_bytes(found: bytes, expected: bytes, offset: int, what: str) -> None:
    """Fail, with the place of the first difference, unless the bytes at `offset` are right."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{what}: {len(found)} bytes, not {len(expected)}"
    bad = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    place = bad[0]
    pytest.fail(
        f"{what}: {len(bad)} bytes differ, the first at {offset + place}:"
        f" {found[place : place + 16].hex()}, not {expected[place : place + 16].hex()}"
    )


# --- qemu-img ---


def compare(left: Path, left_format: str, right: Path, right_format: str) -> None:
    output = run("qemu-img", "compare", "-f", left_format, "-F", right_format, left, right, timeout=180)
    assert "Images are identical." in output


def convert(
    source: Path,
    source_format: str,
    target: Path,
    target_format: str,
    *options: str,
    cache: str,
) -> None:
    run(
        "qemu-img", "convert", "-f", source_format, "-O", target_format,
        "-T", cache, "-t", cache, *options, source, target,
        timeout=180,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A raw file of the disk's size: random bytes at random places, holes between them."""
    path = tmp_path_factory.mktemp("source") / "source.raw"
    rng = random.Random(2)
    with open(path, "wb") as file:
        file.truncate(RAW_SIZE)
        for _ in range(150):
            length = rng.randrange(1, 400 * KIB)
            file.seek(rng.randrange(RAW_SIZE - length))
            file.write(rng.randbytes(length))
        file.seek(RAW_SIZE - 5)
        file.write(b"end.\n")
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_qemu_img_converts_both_ways(raw_disk: Path, source_image: Path, tmp_path: Path, cache: str) -> None:
    back = tmp_path / "back.raw"
    image = tmp_path / "image.qcow2"

    # -n: the target exists, with the size it has to have.
    convert(source_image, "raw", raw_disk, "raw", "-n", cache=cache)
    drop_pages(raw_disk)
    compare(source_image, "raw", raw_disk, "raw")

    convert(raw_disk, "raw", back, "raw", cache=cache)
    compare(source_image, "raw", back, "raw")
    back.unlink()

    convert(raw_disk, "raw", image, "qcow2", cache=cache)
    compare(source_image, "raw", image, "qcow2")

    # Other bytes in places, then into the raw file again.
    size = raw_disk.stat().st_size
    run(
        "qemu-io", "-f", "qcow2",
        "-c", "write -P 0x5a 1234567 3000001",
        "-c", "write -z 100M 7M",
        "-c", f"write -P 0xa5 {size - 70001} 70001",
        image,
    )  # fmt: skip
    convert(image, "qcow2", raw_disk, "raw", "-n", cache=cache)
    drop_pages(raw_disk)
    compare(image, "qcow2", raw_disk, "raw")
    assert read_at(raw_disk, size - 70001, 70001) == b"\xa5" * 70001
    image.unlink()


# --- qemu-io ---

QEMU_IO_CACHES = [
    pytest.param(("-t", "writeback"), id="writeback"),
    pytest.param(("-n",), id="none"),  # -n: cache=none
    pytest.param(("-n", "-i", "native"), id="none-native"),
]


@dataclass(frozen=True)
class Run:
    """Bytes of one value; zeroes are written as such (`write -z`)."""

    offset: int
    length: int
    value: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def overlay(runs: Iterable[Run], new: Run) -> list[Run]:
    """What is left of the runs after a write, and that write."""
    result = []
    for old in runs:
        if old.offset < new.offset:
            end = min(old.end, new.offset)
            result.append(Run(old.offset, end - old.offset, old.value))
        if old.end > new.end:
            start = max(old.offset, new.end)
            result.append(Run(start, old.end - start, old.value))
    return [*result, new]


def qemu_io(disk: Path, arguments: Sequence[str], commands: Iterable[str]) -> None:
    options = [option for command in commands for option in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, *options, disk, timeout=120)
    assert "failed" not in output, output[-2000:]


def unaligned_writes(rng: random.Random, size: int, first: int, last: int) -> Iterator[Run]:
    """Writes at any byte between two places, of lengths from 1 byte to a few blocks."""
    yield Run(first, 1, 0x11)
    yield Run(last - 1, 1, 0x22)
    for number in range(40):
        scale = rng.choice([16, 512, 4 * KIB, 64 * KIB, 300 * KIB])
        length = rng.randrange(1, scale + 1)
        offset = rng.randrange(first, min(last, size) - length + 1)
        yield Run(offset, length, 0 if number % 6 == 5 else rng.randrange(1, 256))


@pytest.mark.parametrize("arguments", QEMU_IO_CACHES)
def test_qemu_io_patterns_at_odd_places(raw_disk: Path, arguments: tuple[str, ...]) -> None:
    size = raw_disk.stat().st_size
    rng = random.Random(3)
    middle = 200 * MIB - 12345
    margin = 4321
    windows = [(0, 2 * MIB), (middle, middle + 3 * MIB), (size - 2 * MIB - 7, size)]
    for first, last in windows:
        start, end = max(0, first - margin), min(size, last + margin)
        expected = bytearray(read_at(raw_disk, start, end - start))
        runs: list[Run] = []
        commands = []
        for number, new in enumerate(unaligned_writes(rng, size, first, last)):
            runs = overlay(runs, new)
            expected[new.offset - start : new.end - start] = bytes([new.value]) * new.length
            if new.value == 0:
                commands.append(f"write -z {new.offset} {new.length}")
            elif number % 6 == 2:
                cut = new.length // 2 or 1
                lengths = f"{cut} {new.length - cut}" if new.length > 1 else "1"
                commands.append(f"writev -P {new.value} {new.offset} {lengths}")
            else:
                force = "-f " if number % 6 == 4 else ""
                commands.append(f"write {force}-P {new.value} {new.offset} {new.length}")
            if number % 6 == 3:
                commands += [f"read -P {new.value} {new.offset} {new.length}", "flush"]
        reads = [f"read -P {left.value} {left.offset} {left.length}" for left in runs]
        qemu_io(raw_disk, arguments, [*commands, "flush", *reads])
        same_bytes(read_at(raw_disk, start, end - start), bytes(expected), start, "after writing")
        drop_pages(raw_disk)
        for other in CACHES:
            qemu_io(raw_disk, ("-t", other), reads)
        same_bytes(read_at(raw_disk, start, end - start), bytes(expected), start, "read again")


@pytest.mark.parametrize("arguments", QEMU_IO_CACHES)
@pytest.mark.parametrize("unit", [1, 4 * KIB])
def test_qemu_io_many_writes_in_flight(raw_disk: Path, arguments: tuple[str, ...], unit: int) -> None:
    """Writes side by side, of less than a block each, all under way at the same time.

    QEMU gives only aligned writes to native asynchronous I/O, the others to threads.
    """
    rng = random.Random(4)
    offset = 300 * MIB + 7 * unit
    runs = []
    for _ in range(120):
        new = Run(offset, unit * rng.randrange(1, 24 * KIB // unit), rng.randrange(1, 256))
        runs.append(new)
        offset = new.end
    order = rng.sample(runs, len(runs))
    writes = [f"aio_write -q -P {new.value} {new.offset} {new.length}" for new in order]
    qemu_io(raw_disk, arguments, [*writes, "aio_flush", "flush"])
    drop_pages(raw_disk)
    reads = [f"read -P {new.value} {new.offset} {new.length}" for new in runs]
    qemu_io(raw_disk, arguments, reads)


# --- fio ---

FIO_ENGINES = {
    "buffered": ["--ioengine=psync", "--direct=0", "--fsync=100"],
    "direct": ["--ioengine=libaio", "--direct=1", "--iodepth=16"],
}
FIO_JOBS = 4
FIO_BYTES = 8 * MIB  # of each job
FIO_LAYOUTS = {
    # Every job in a region of its own, in blocks of several sizes, in random order.
    "apart": [
        "--rw=randwrite",
        f"--size={FIO_BYTES}",
        "--bssplit=512/10:4k/60:16k/20:64k/10",
        "--offset=1m",
        f"--offset_increment={100 * MIB}",
    ],
    # The jobs' blocks in turn, 16 KiB each: all four write in the same 64 KiB at once.
    "interleaved": [
        "--rw=write:48k",
        "--bs=16k",
        f"--size={4 * FIO_BYTES}",
        f"--io_size={FIO_BYTES}",
        f"--offset={64 * MIB}",
        "--offset_increment=16k",
    ],
}


def fio(disk: Path, directory: Path, *options: str) -> list[dict[str, int]]:
    """Run fio's jobs on the disk; return how many bytes each has read and written."""
    output = run(
        "fio", "--name=verify", "--filename=" + str(disk).replace(":", "\\:"),
        f"--numjobs={FIO_JOBS}", "--thread", "--fallocate=none", "--allrandrepeat=1",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--end_fsync=1",
        "--output-format=json", *options,
        cwd=directory,
        timeout=120,
    )  # fmt: skip
    jobs = json.loads(output[output.index("{") :])["jobs"]
    assert [job["error"] for job in jobs] == [0] * FIO_JOBS, output
    return [{way: job[way]["io_bytes"] for way in ("read", "write")} for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("layout", FIO_LAYOUTS)
@pytest.mark.parametrize("engine", FIO_ENGINES)
def test_fio_verifies_what_four_jobs_wrote(raw_disk: Path, tmp_path: Path, engine: str, layout: str) -> None:
    options = [*FIO_ENGINES[engine], *FIO_LAYOUTS[layout]]
    written = fio(raw_disk, tmp_path, *options)
    assert all(job["write"] == job["read"] == FIO_BYTES for job in written), written
    drop_pages(raw_disk)
    verified = fio(raw_disk, tmp_path, *options, "--verify_only=1")
    assert all(job["read"] == FIO_BYTES for job in verified), verified


# --- ext4 on a loop device ---


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """An archive of 6000 small files and the digest of the tree in it."""
    path = tmp_path_factory.mktemp("tree") / "tree.tar"
    yield path, make_tar(path, 6000)
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_ext4_holds_a_tree_of_small_files(raw_disk: Path, tmp_path: Path, tree: tuple[Path, str], direct: bool) -> None:
    archive, digest = tree
    point = tmp_path / "mnt"
    run("mkfs.ext4", "-q", "-F", "-N", "12000", *(["-D"] if direct else []), raw_disk)
    with ext4(raw_disk, point, direct=direct):
        run("tar", "-x", "--no-same-owner", "-f", archive, "-C", point, timeout=120)
        assert tree_digest(point) == digest
    drop_pages(raw_disk)
    run("e2fsck", "-f", "-n", raw_disk)
    with ext4(raw_disk, point, direct=direct):
        assert tree_digest(point) == digest
        for number in range(4):
            run("rm", "-r", point / f"tree/{number:02d}")
        run("tar", "-x", "--no-same-owner", "-f", archive, "-C", point, timeout=120)
    drop_pages(raw_disk)
    run("e2fsck", "-f", "-n", raw_disk)
    with ext4(raw_disk, point, direct=not direct, options="ro"):
        assert tree_digest(point) == digest


# --- a virtual machine ---

PATTERN_NUMBERS = range(1_000_000, 1_524_288)
PATTERN = b"".join(b"%d\n" % number for number in PATTERN_NUMBERS)  # 4 MiB


@dataclass(frozen=True)
class GuestWrite:
    """A piece of PATTERN from `skip` on that the guest writes to its disk."""

    offset: int
    length: int
    skip: int
    direct: bool

    @property
    def data(self) -> bytes:
        return PATTERN[self.skip : self.skip + self.length]

    def write_command(self) -> str:
        output = "oflag=seek_bytes,direct" if self.direct else "oflag=seek_bytes"
        return (
            f"dd status=none if=/pattern skip={self.skip} count={self.length} bs=64k"
            " iflag=skip_bytes,count_bytes,fullblock"
            f" of=/dev/vda seek={self.offset} {output} conv=notrunc,fsync"
        )

    def read_command(self) -> str:
        output = "skip_bytes,count_bytes,fullblock" + (",direct" if self.direct else "")
        return f"dd status=none if=/dev/vda skip={self.offset} count={self.length} bs=64k iflag={output} | md5sum"


def guest_writes(size: int) -> list[GuestWrite]:
    rng = random.Random(5)
    scattered = [
        GuestWrite(
            320 * MIB + number * MIB + 512 * rng.randrange(1000),
            512 * rng.randrange(1, 100),
            rng.randrange(3 * MIB),
            direct=number % 2 == 0,
        )
        for number in range(24)
    ]
    return [
        GuestWrite(0, MIB + 12345, 0, direct=False),
        GuestWrite(37 * MIB + 512, 3 * MIB + 512, 777, direct=True),
        GuestWrite(123_456_789, 777_777, 1_234_567, direct=False),
        GuestWrite(200 * MIB, 4 * MIB, 0, direct=False),
        GuestWrite(300 * MIB - 1, 3, 99_999, direct=False),
        *scattered,
        GuestWrite(size - 2 * MIB, 2 * MIB, 2 * MIB, direct=True),
    ]


def guest_script(writes: Sequence[GuestWrite]) -> str:
    lines = [f"seq {PATTERN_NUMBERS[0]} {PATTERN_NUMBERS[-1]} > /pattern"]
    lines += [write.write_command() for write in writes]
    lines += ["sync", "echo 3 > /proc/sys/vm/drop_caches"]
    lines += [f"echo READ {number} $({w.read_command()})" for number, w in enumerate(writes)]
    lines += ["echo ALL-READ"]
    return "\n".join(lines) + "\n"


GUEST_CACHES = {
    "plain": ["writeback", "none,aio=native"],
    "cow": ["none"],
    "compact-cow": ["writeback", "none,aio=native"],
    "passed through": ["none"],
}
"""What a guest's disk is opened with, by the layout: each way with several of them, each layout with some."""


@pytest.mark.slow
def test_a_virtual_machine_writes_to_its_disk(raw_disk: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for cache in GUEST_CACHES[request.node.callspec.params["raw_disk"]]:
        write_as_guest(raw_disk, tmp_path, cache)


def write_as_guest(raw_disk: Path, tmp_path: Path, cache: str) -> None:
    size = raw_disk.stat().st_size
    writes = guest_writes(size)
    margin = 64 * KIB
    around = []
    for write in writes:
        before = max(0, write.offset - margin)
        end = write.offset + write.length
        after = min(size, end + margin) - end
        left = read_at(raw_disk, before, write.offset - before)
        around.append((before, left, read_at(raw_disk, end, after)))

    initrd = build_initrd(tmp_path, guest_script(writes))
    log = boot(raw_disk, initrd, cache=cache, timeout=120)

    found = dict(re.findall(r"^READ (\d+) ([0-9a-f]{32}) ", log, re.MULTILINE))
    assert found == {str(n): hashlib.md5(w.data).hexdigest() for n, w in enumerate(writes)}, log
    assert "\nALL-READ\n" in log

    drop_pages(raw_disk)
    for write, (before, left, right) in zip(writes, around, strict=True):
        expected = left + write.data + right
        same_bytes(read_at(raw_disk, before, len(expected)), expected, before, f"{write}")
