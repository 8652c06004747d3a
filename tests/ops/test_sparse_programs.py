"""Programs that make holes, or look for them, on a mounted disk: what it holds and takes is what a raw file would.

Each program does the same to a disk and to its twin, a sparse file of the host's file system. Both hold the same then,
and take the same space within some slack, which each test justifies. The space is read as the first thing after the
program, with nothing in between that could help it along.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from support.devices import ext4, loop_device
from support.guest import run
from support.mounts import MIB, PASSED_THROUGH, Mount, mounted, must, needs_passthrough

KIB = 1024
SIZE = 64 * MIB
UNIT = 64 * KIB  # of blocks over a base, and of chunks
EXTENTS = 10
SLACK = 64 * KIB
"""Bytes by which two files may differ: extent trees of the host's file system, and pages of the image's own bitmap,
table and journal, which are written for the first time. (8 KiB were seen.)"""
EDGES = 2 * UNIT
"""Bytes over a base that an extent may take beyond itself: what is missing of its first and last block is copied."""

OVER_BASE = ("--base", "base.raw", "--base-format", "raw", "--block-size", str(UNIT))
COMPACT = ("--compact", "--chunk-size", str(UNIT))
LAYOUTS = {
    "flat": (),
    "compact": COMPACT,
    "compact-cow": (*OVER_BASE, *COMPACT),
    "passed-through": ("--data-file", "auto"),
}
numbers = count()


def fill(path: Path, seed: int) -> None:
    """Some extents of data, and one of zeros that are written."""
    rng = random.Random(seed)
    with open(path, "r+b") as file:
        for number in range(EXTENTS):
            file.seek(number * SIZE // EXTENTS + rng.randrange(2 * MIB) // 4096 * 4096)
            file.write(rng.randbytes(rng.randrange(100 * KIB, 900 * KIB)))
        file.seek(SIZE - 3 * MIB)
        file.write(bytes(2 * MIB))


def used(path: Path) -> int:
    """The bytes that a file takes, as all programs see it."""
    taken = path.stat().st_blocks * 512
    assert int(run("du", "--block-size=1", path).split()[0]) == taken
    assert int(run("ls", "-s", "--block-size=1", path).split()[0]) == taken
    return taken


@dataclass(frozen=True)
class Pair:
    """A disk and its twin."""

    raw: Path
    twin: Path
    slack: int
    """Bytes by which the space that they take may differ."""
    own: int
    """What the disk took when it was new. The content of its base it has for nothing, and the twin has not."""

    def do(self, step: Callable[[Path], object]) -> tuple[int, int]:
        """Do the same to both; the space that they take then."""
        found = []
        for path in (self.raw, self.twin):
            step(path)
            found.append(used(path))
        return found[0] - self.own, found[1]

    def same(self) -> None:
        """The content is the same."""
        run("cmp", self.raw, self.twin)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=needs_passthrough if "through" in name else ()) for name in LAYOUTS],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mount, str]]:
    """A mount, and the layout of the disks that are to be made in it."""
    folder = tmp_path_factory.mktemp("sparse") / "images"
    folder.mkdir()
    (folder / "base.raw").touch()
    os.truncate(folder / "base.raw", SIZE)
    fill(folder / "base.raw", 1)
    passes = request.param == "passed-through"
    with mounted(folder, "-o", f"shrink,{PASSED_THROUGH}" if passes else "shrink") as mount:
        yield mount, request.param


def new_pair(mount: Mount, layout: str, folder: Path, size: int = SIZE) -> Pair:
    """An empty disk, or one over a base, and its twin."""
    name, twin = f"disk{next(numbers)}", folder / "twin.raw"
    must("create", mount.folder / f"{name}.fvd", str(size), *LAYOUTS[layout])
    if layout == "passed-through":
        mount.expect_passthrough(name)
    if "cow" in layout:
        run("cp", "--sparse=always", mount.folder / "base.raw", twin)
    with open(twin, "ab") as file:
        file.truncate(size)
    slack = SLACK + ("cow" in layout) * EDGES * EXTENTS
    return Pair(mount.raw(name), twin, slack, used(mount.raw(name)))


@pytest.fixture
def pair(served: tuple[Mount, str], tmp_path: Path) -> Pair:
    return new_pair(*served, tmp_path)


@pytest.fixture
def full(pair: Pair) -> Pair:
    """The same with data of its own, and with zeros that were written."""
    pair.do(lambda path: fill(path, 2))
    return pair


# --- out ------------------------------------------------------------------------------------------


def unpacked(source: Path, target: Path) -> None:
    """Out of an archive that is as small as the data."""
    archive = target.with_suffix(".tar")
    run("tar", "-S", "-cf", archive, "-C", source.parent, source.name)
    folder = target.with_suffix(".out")
    folder.mkdir()
    run("tar", "-xf", archive, "-C", folder)
    (folder / source.name).rename(target)
    assert used(archive) <= used(target) + SLACK + EDGES * EXTENTS


COPIES: dict[str, Callable[[Path, Path], object]] = {
    "cp": lambda source, target: run("cp", source, target),
    "cp --sparse=always": lambda source, target: run("cp", "--sparse=always", source, target),
    "cp --reflink=auto": lambda source, target: run("cp", "--reflink=auto", source, target),
    "tar -S": unpacked,
    "rsync --sparse": lambda source, target: run("rsync", "--sparse", source, target),
    "qemu-img convert": lambda source, target: run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, target),
    "qemu-img convert -S 64k": lambda source, target: run(
        "qemu-img", "convert", "-f", "raw", "-O", "raw", "-S", "64k", source, target
    ),
    "qemu-img convert to qcow2": lambda source, target: run(
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, target
    ),
}


@pytest.mark.parametrize("program", COPIES)
def test_a_copy_is_as_sparse_as_one_of_a_raw_file(full: Pair, tmp_path: Path, program: str) -> None:
    copies = []
    for number, source in enumerate((full.raw, full.twin)):
        target = tmp_path / f"copy{number}"
        COPIES[program](source, target)
        copies.append(used(target))
    assert abs(copies[0] - copies[1]) <= full.slack, (copies, used(full.raw), used(full.twin))
    if "qcow2" in program:
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "copy0", full.twin)
    else:
        run("cmp", tmp_path / "copy0", full.twin)


# --- in -------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "cp": lambda source, disk: run("cp", source, disk),
    "cp --sparse=always": lambda source, disk: run("cp", "--sparse=always", source, disk),
    "cp --reflink=auto": lambda source, disk: run("cp", "--reflink=auto", source, disk),
    "dd conv=sparse": lambda source, disk: run("dd", f"if={source}", f"of={disk}", "bs=64K", "conv=sparse"),
    "rsync --inplace --sparse": lambda source, disk: run("rsync", "--inplace", "--sparse", "-I", source, disk),
    "qemu-img convert": lambda source, disk: convert_into(source, disk, "writeback"),
    "qemu-img convert, direct": lambda source, disk: convert_into(source, disk, "none"),
    "tar -xS": lambda source, disk: unpack_into(source, disk),
}


def convert_into(source: Path, disk: Path, cache: str) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", "-n", "-S", "4k", "-t", cache, source, disk)


def unpack_into(source: Path, disk: Path) -> None:
    archive = source.with_suffix(".tar")
    run("tar", "-S", "-cf", archive, f"--transform=s/.*/{disk.name}/", "-C", source.parent, source.name)
    run("tar", "--overwrite", "-xf", archive, "-C", disk.parent)


@pytest.mark.parametrize("program", WRITERS)
def test_a_disk_that_is_written_takes_what_a_raw_file_would(full: Pair, tmp_path: Path, program: str) -> None:
    """Another file comes over the whole disk: where that has holes, the space of what was there comes back."""
    source = tmp_path / "source"
    source.touch()
    os.truncate(source, SIZE)
    fill(source, 3)
    taken = full.do(lambda path: WRITERS[program](source, path))
    full.same()
    if program != "dd conv=sparse":  # which skips zeros, and cuts the file before
        run("cmp", full.raw, source)
    assert taken[0] <= taken[1] + full.slack, taken


# --- where they are -------------------------------------------------------------------------------


def data_of(path: Path) -> list[tuple[int, int]]:
    """The runs of bytes that qemu-img says are data."""
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path))
    assert sum(part["length"] for part in found) == SIZE
    assert all(part["zero"] is not part["data"] for part in found)
    return [(part["start"], part["start"] + part["length"]) for part in found if part["data"]]


def test_qemu_img_maps_the_holes(full: Pair) -> None:
    """Data is that of the twin, and no more than what is in the same blocks and chunks."""
    mapped, expected = data_of(full.raw), data_of(full.twin)
    for start, stop in expected:
        assert any(first <= start and stop <= end for first, end in mapped), (start, stop, mapped)
    allowed = [(start // UNIT * UNIT, -(-stop // UNIT) * UNIT) for start, stop in expected]
    for start, stop in mapped:
        assert any(first <= start and stop <= end for first, end in merged(allowed)), (start, stop, expected)


def merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, with those that touch joined."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return found


def test_qemu_img_measures_the_data(full: Pair) -> None:
    measured = [
        json.loads(run("qemu-img", "measure", "-f", "raw", "-O", "qcow2", "--output=json", path))["required"]
        for path in (full.raw, full.twin)
    ]
    assert abs(measured[0] - measured[1]) <= EDGES * EXTENTS, measured


def test_the_map_shows_what_was_given_back(full: Pair) -> None:
    def stored() -> int:
        text = json.loads(must("map", full.raw, "--json"))
        at = text["states"].index("stored")
        return sum(cell[at] for cell in text["cells"])

    before = stored()
    assert before >= EXTENTS * 100 * KIB
    run("fallocate", "--punch-hole", "--offset", "0", "--length", str(SIZE), full.raw)
    assert stored() == 0
    assert sum(json.loads(must("map", full.raw, "--json"))["cells"][0]) > 0


# --- holes that are made --------------------------------------------------------------------------


def test_fallocate_digs_holes(full: Pair) -> None:
    """The zeros that were written are found, and none else; but what is in the same blocks and chunks stays."""
    before = full.do(lambda path: None)
    after = full.do(lambda path: run("fallocate", "--dig-holes", path))
    full.same()
    assert before[1] - after[1] >= 2 * MIB - UNIT
    assert before[0] - after[0] >= 2 * MIB - UNIT - SLACK
    assert after[0] <= after[1] + full.slack


@pytest.mark.parametrize("start", [0, 5 * MIB + 1234])
def test_a_range_is_punched(full: Pair, start: int) -> None:
    """At any byte: the file system's blocks at both ends stay."""
    length = 40 * MIB + 777
    command = ("fallocate", "--punch-hole", "--offset", str(start), "--length", str(length))
    taken = full.do(lambda path: run(*command, path))
    full.same()
    assert taken[0] <= taken[1] + full.slack


def test_a_range_is_allocated(pair: Pair) -> None:
    """And takes its space, at the moment."""
    taken = pair.do(lambda path: run("fallocate", "--offset", "1MiB", "--length", "20MiB", path))
    pair.same()
    assert taken[0] >= 20 * MIB
    assert taken[0] <= taken[1] + pair.slack


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_blkdiscard_of_a_loop_device(full: Pair, direct: bool) -> None:
    """A part, then all of it; the device is open meanwhile, and only then closed."""

    def part(path: Path) -> None:
        with loop_device(path, direct=direct) as device:
            run("blkdiscard", "--offset", str(10 * MIB), "--length", str(20 * MIB), device)

    def zeros(path: Path) -> None:
        with loop_device(path, direct=direct) as device:
            run("blkdiscard", "--zeroout", "--offset", str(35 * MIB), "--length", str(10 * MIB), device)

    def all_of_it(path: Path) -> None:
        with loop_device(path, direct=direct) as device:
            before = used(path)
            run("blkdiscard", "--force", device)
            assert used(path) < before - 2 * MIB or before < 3 * MIB

    for step in (part, zeros):
        taken = full.do(step)
        full.same()
        assert taken[0] <= taken[1] + full.slack, step
    taken = full.do(all_of_it)
    full.same()
    assert taken[0] <= SLACK
    assert taken[1] <= SLACK


# --- file systems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", ["discard", "nodiscard"])
def test_mkfs_ext4(full: Pair, discard: str) -> None:
    """It discards the disk first; what it writes then lies in a few places."""
    command = ("mkfs.ext4", "-q", "-F", "-U", "6f7d2c9e-0f3a-4a53-b6c5-0d3f6a1f0a11", "-E", f"{discard},hash_seed=")
    seeded = (*command[:-1], command[-1] + "6f7d2c9e-0f3a-4a53-b6c5-0d3f6a1f0a12")
    taken = full.do(lambda path: run(*seeded, path))
    run("e2fsck", "-f", "-n", full.raw)
    assert taken[0] <= taken[1] + full.slack, taken


def test_mkfs_xfs(served: tuple[Mount, str], tmp_path: Path) -> None:
    """Of the smallest size that it makes."""
    pair = new_pair(*served, tmp_path, 300 * MIB)
    pair.do(lambda path: fill(path, 2))
    taken = pair.do(lambda path: run("mkfs.xfs", "-q", "-f", path))
    run("xfs_repair", "-n", "-f", pair.raw)
    assert taken[0] <= taken[1] + pair.slack, taken


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_fstrim_gives_back_what_was_removed(pair: Pair, tmp_path: Path, direct: bool) -> None:
    """Metadata of ext4 stays: some groups' tables and the journal, in as many extents as there are groups."""

    def use(path: Path) -> None:
        run("mkfs.ext4", "-q", "-F", path)
        with ext4(path, tmp_path / "mnt", direct=direct):
            for number in range(8):
                (tmp_path / f"mnt/file{number}").write_bytes(os.urandom(3 * MIB))
            run("sync", "--file-system", tmp_path / "mnt")
            before = used(path)
            for number in range(0, 8, 2):
                (tmp_path / f"mnt/file{number}").unlink()
            run("sync", "--file-system", tmp_path / "mnt")  # what its journal holds is not free yet
            run("fstrim", tmp_path / "mnt")
            assert used(path) <= before - 4 * 3 * MIB + SLACK

    taken = pair.do(use)
    assert taken[0] <= taken[1] + pair.slack, taken
    run("e2fsck", "-f", "-n", pair.raw)
