"""What is done with a disk of 1 GiB: fio, and guests that boot, unpack a tree of files, and run PostMark."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lab
from bench.lab import MIB, command
from bench.targets import SIZE, Served
from support.guest import boot, build_initrd, find_program, run
from support.treegen import make_tar

_DIRECT16 = ("--direct=1", "--ioengine=libaio", "--iodepth=16")
FIO: dict[str, tuple[str, ...]] = {
    "seqread": ("--rw=read", "--bs=1m", "--size=512m"),
    "reread": ("--rw=read", "--bs=1m", "--size=512m", "--invalidate=0"),
    "randread4k": ("--rw=randread", "--bs=4k", "--size=1g", "--io_size=48m", "--direct=1"),
    "randread4k16": ("--rw=randread", "--bs=4k", "--size=1g", "--io_size=96m", *_DIRECT16),
    "randwrite4k": ("--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=48m", "--end_fsync=1"),
    "randwrite4ks": ("--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=4m", "--fsync=1"),
    "randwrite4k16": ("--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=64m", *_DIRECT16),
    "seqwrite": ("--rw=write", "--bs=1m", "--size=512m", "--offset=512m", "--end_fsync=1"),
}
GUESTS = ("boot", "unpack", "postmark")
UNITS = dict.fromkeys(FIO, "IOPS") | {
    **dict.fromkeys(("seqread", "reread", "seqwrite"), "MB/s"),
    "boot": "s",
    "unpack": "s",
    "postmark": "1/s",
}
LESS_IS_BETTER = {"boot", "unpack"}
FILES = 10_000  # in the tree that is unpacked, most of them of at most 4 KiB
TRANSACTIONS = 4000
POSTMARK = (
    "set location /mnt/postmark\nset number 2000\nset size 500 100000\nset subdirectories 20\n"
    f"set buffering false\nset transactions {TRANSACTIONS}\nset report terse\nrun\nquit\n"
)
READ_BY_BOOT = 64 * MIB
WORK_SCRIPT = """\
mkdir /mnt /tools
mount -t ext4 -o noatime /dev/vda /mnt
mount -t ext4 -o ro,noload /dev/vdb /tools
now() { cut -d' ' -f1 /proc/uptime; }
echo UNPACK $(now)
tar xf /tools/tree.tar -C /mnt
sync
echo UNPACKED $(now)
mkdir /mnt/postmark
echo POSTMARK $(now)
/tools/loader --library-path /tools /tools/postmark /tools/postmark.conf > /dev/null
sync
echo POSTMARKED $(now)
umount /mnt
"""


@dataclass(frozen=True)
class Figure:
    """What a workload gave, in its unit, and what it cost those who serve the disk."""

    value: float
    cpu_per_gib: float | None = None


def measure_fio(served: Served, workload: str) -> Figure:
    """Cold but for `reread`: nothing of the disk or its base is in memory before."""
    if workload == "reread":
        _fio(served.disk, workload)
    else:
        lab.drop_caches()
    before = served.cpu_seconds()
    side = _fio(served.disk, workload)
    cost = (served.cpu_seconds() - before) / (side["io_bytes"] / (1 << 30))
    value = megabytes(side) if UNITS[workload] == "MB/s" else float(side["iops"])
    return Figure(value, cost)


def _fio(disk: Path, workload: str) -> dict[str, Any]:
    return run_fio("--name=x", f"--filename={disk}", *FIO[workload])[0]


def run_fio(*words: str) -> list[dict[str, Any]]:
    """What fio says of each job: of its reads or its writes, whichever are more."""
    output = command("fio", "--output-format=json", *words)
    jobs = json.loads(output[output.index("{") :])["jobs"]
    return [max(job["read"], job["write"], key=lambda side: side["io_bytes"]) for job in jobs]


def megabytes(side: dict[str, Any]) -> float:
    """A second, of what `run_fio` returns."""
    return float(side["bw"] * 1.024 / 1000)


class Guests:
    """Guests that work on a disk, each measured by its own clock."""

    def __init__(self, work: Path, base: Path) -> None:
        """Makes the base: a file system whose files a boot reads."""
        for name in ("booting", "working"):
            (work / name).mkdir()
        sparse = base.with_suffix(".sparse")
        self._checksum = lab.make_guest_disk(sparse, SIZE, READ_BY_BOOT)
        command("cp", "--sparse=never", sparse, base)
        sparse.unlink()
        self._booting = build_initrd(work / "booting", lab.GUEST_SCRIPT, ["ext4"])
        self._working = build_initrd(work / "working", WORK_SCRIPT, ["ext4"])
        self._tools = self._make_tools(work) if shutil.which("postmark") else None

    @staticmethod
    def _make_tools(work: Path) -> Path:
        """A disk with the tree to be unpacked, and PostMark with its libraries."""
        folder, disk = work / "tools", work / "tools.raw"
        folder.mkdir()
        make_tar(folder / "tree.tar", FILES)
        (folder / "postmark.conf").write_text(POSTMARK)
        program = find_program("postmark")
        shutil.copy(program, folder / "postmark")
        for path in re.findall(r"(/\S+\.so\S*)", command("ldd", program)):
            shutil.copy(path, folder / ("loader" if Path(path).name.startswith("ld-") else Path(path).name))
        run("mkfs.ext4", "-q", "-d", folder, disk, "128M")
        shutil.rmtree(folder)
        return disk

    def boot(self, served: Served) -> Figure:
        """Seconds from QEMU's start to its end, of a guest that reads its files and checks them."""
        return Figure(lab.boot_guest(served.disk, self._booting, self._checksum)[0])

    def work(self, served: Served) -> dict[str, Figure]:
        """Seconds to unpack a tree onto a new ext4; transactions of PostMark a second. Both end with a sync."""
        if self._tools is None:
            return {}
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", served.disk)
        lab.drop_caches()
        tools = ("-drive", f"file={self._tools},format=raw,if=virtio,readonly=on")
        log = boot(served.disk, self._working, cache="none", timeout=300, extra_args=tools)
        at = {word: float(time) for word, time in re.findall(r"^([A-Z]+ED|UNPACK|POSTMARK) ([\d.]+)$", log, re.M)}
        return {
            "unpack": Figure(at["UNPACKED"] - at["UNPACK"]),
            "postmark": Figure(TRANSACTIONS / (at["POSTMARKED"] - at["POSTMARK"])),
        }
