"""A guest gives back space: it fills file systems, deletes most of the files, and discards what is free (fstrim).

Afterwards each image takes as much as before, but for a file that was left; what was left is right, and so are file
system and image. A raw sparse file is among the disks, to show that the test is fair.

FVDFS_TRIM_MIB sets the size of a file, of which a guest writes 32. So this fills 2 GiB of each disk:

    FVDFS_TRIM_MIB=64 pytest -s -o timeout=0 tests/image/test_giving_back.py
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.guest import boot, build_initrd, drive, run
from support.mounts import MIB, PASSED_THROUGH, mounted, must, needs_passthrough

UNIT = int(os.environ.get("FVDFS_TRIM_MIB", "2")) * MIB  # a file
DISK = 44 * UNIT
KEPT = 4  # files that are there from the start
FILL = 32  # files that the guest writes, from those
SLACK = 0.05  # of what has to be there, that may be there besides
METADATA = MIB  # bytes of tables, of image and file system, that may be there as well
LOOK_INTERVAL = 0.1  # seconds between looks at what a disk takes
IDLE = 6  # looks before the last one, the guest had trimmed all disks and was still there

QEMU = ("none", "writeback", "none,aio=native", "none,aio=io_uring", "writeback,aio=io_uring")
_QCOW2 = ["--data-file", "NAME.qcow2", "--data-format", "qcow2"]
_BASE = ["--base", "base.raw", "--base-format", "raw"]
MOUNTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "gathered": (
        "writeback=on",
        {"flat": [], "data-file": ["--data-file", "auto"], "compact": ["--compact"], "qcow2": _QCOW2},
    ),
    "passed through": (
        PASSED_THROUGH,
        {"passed-through": ["--data-file", "auto"], "flat": [], "compact": ["--compact"], "qcow2": _QCOW2},
    ),
    "over a base": ("writeback=on", {"flat": _BASE, "compact": [*_BASE, "--compact"], "qcow2": [*_BASE, *_QCOW2]}),
}

SCRIPT = f"""
    mkdir /mnt
    for disk in DISKS; do
        while [ ! -b /dev/$disk ]; do sleep 0.1; done
        mount -t ext4 /dev/$disk /mnt
        for n in $(seq {FILL}); do
            dd if=/mnt/kept$((n % {KEPT})) of=/mnt/new$n bs=1M iflag=direct oflag=direct 2>/dev/null
        done
        sync
        for n in $(seq 2 {FILL}); do rm /mnt/new$n; done
        rm /mnt/kept0
        sync
        began=$(cut -d' ' -f1 /proc/uptime)
        fstrim /mnt
        echo "TRIM $disk $began $(cut -d' ' -f1 /proc/uptime)"
        umount /mnt
    done
    sleep {LOOK_INTERVAL * (IDLE + 4)}
"""


@dataclass
class Disk:
    """A disk of the guest, and the bytes that it takes, as its raw file shows them and on the host."""

    device: str
    raw: Path
    files: list[Path]
    """That hold it on the host."""
    added: int
    """Bytes that the guest leaves there in addition to what is there at first."""
    looks: list[tuple[int, int]] = field(default_factory=list)

    def look(self) -> None:
        """Take down what it takes now."""
        self.looks.append((usage(self.raw), sum(map(usage, self.files))))

    def judge(self, log: str) -> None:
        """It was full, and it is back, while the guest still runs and afterwards."""
        before, full, during, after = self.looks[0], max(self.looks), self.looks[-1 - IDLE], self.looks[-1]
        began, ended = re.findall(rf"^TRIM {self.device} (\S+) (\S+)$", log, re.MULTILINE)[0]
        figures = "".join(f"{size / MIB:9.1f}" for look in (before, full, during, after) for size in look)
        print(f"{self.raw.stem:16}{figures}{float(ended) - float(began):8.2f} s")
        for index, who in enumerate(("the raw file", "the host")):
            limit = (before[index] + self.added) * (1 + SLACK) + METADATA
            assert full[index] > before[index] + (FILL - 1) * UNIT, f"{self.raw.stem}: {who} was not full"
            assert during[index] < limit, f"{self.raw.stem}: {who}, while the guest runs"
            assert after[index] < limit, f"{self.raw.stem}: {who}, at the end"


def usage(path: Path) -> int:
    return path.stat().st_blocks * 512


def make_file_system(disk: Path, files: Path) -> None:
    options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    run("mkfs.ext4", "-q", "-F", "-E", options, "-J", "size=4", "-d", files, disk, str(DISK >> 10))


@contextlib.contextmanager
def looking(disks: list[Disk]) -> Iterator[None]:
    """Look at the disks, again and again."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_INTERVAL):
            for disk in disks:
                disk.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def trim_in_guest(disks: list[Disk], work: Path) -> str:
    """Have a guest fill and trim all disks; its log."""
    script = SCRIPT.replace("DISKS", " ".join(disk.device for disk in disks))
    initrd = build_initrd(work, script, extra_modules=["ext4"])
    caches = [f"{QEMU[number % len(QEMU)]},discard=unmap,detect-zeroes=unmap" for number in range(len(disks))]
    more = [word for disk, cache in zip(disks[1:], caches[1:], strict=True) for word in drive(disk.raw, cache)]
    with looking(disks):
        return boot(disks[0].raw, initrd, cache=caches[0], timeout=1000, extra_args=more)


def files_of(disk: Path, point: Path) -> dict[str, bytes]:
    """The files in the file system's root."""
    point.mkdir(exist_ok=True)
    run("mount", "-o", "loop,ro", disk, point)
    try:
        return {path.name: path.read_bytes() for path in point.iterdir() if path.is_file()}
    finally:
        run("umount", point)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=needs_passthrough if "through" in name else ()) for name in MOUNTS]
)
def test_a_guest_trims_what_it_has_deleted(folder: Path, tmp_path: Path, kind: str) -> None:
    options, layouts = MOUNTS[kind]
    over_base = kind == "over a base"
    chance = random.Random(kind)
    contents = {f"kept{number}": chance.randbytes(UNIT) for number in range(KEPT)}
    files = tmp_path / "files"
    files.mkdir()
    for name, content in contents.items():
        (files / name).write_bytes(content)
    left = {**contents, "new1": contents["kept1"]}
    gone = left.pop("kept0")
    control = tmp_path / "control.raw"
    make_file_system(control, files)
    if over_base:
        make_file_system(folder / "base.raw", files)
    for name, words in layouts.items():
        must("create", folder / f"{name}.fvd", str(DISK), *(word.replace("NAME", name) for word in words))
    with mounted(folder, "-o", options, passes="passed-through" if "passed-through" in layouts else "") as mount:
        disks = [Disk("vda", control, [control], 0)]
        for letter, name in zip("bcdef", layouts, strict=False):
            if not over_base:
                make_file_system(mount.raw(name), files)
            own = list(folder.glob(f"{name}.*"))
            disks.append(Disk(f"vd{letter}", mount.raw(name), own, UNIT if over_base else 0))
        mount.remount()
        for disk in disks:
            disk.look()
        log = trim_in_guest(disks, tmp_path)
        print(f"\n{kind}: MiB shown and stored before, when full, when trimmed, at the end; fstrim took")
        for disk in disks:
            disk.look()
            disk.judge(log)
            run("e2fsck", "-fn", disk.raw)
            assert gone[:4096] not in disk.raw.read_bytes(), "a guest reads what it has discarded"
            assert files_of(disk.raw, tmp_path / "fs") == left
    for name in layouts:
        must("check", folder / f"{name}.fvd")
