"""Many disks at once: what one mount serves in all, next to as many mounts and as many qemu-storage-daemons.

    python tests/bench/many.py [--rounds N] [--work DIR] [--only WORKLOAD,...] [--images N,...] [--targets TARGET,...]
                               [--json FILE]

Each round makes 1, 4 and 16 disks over one base of 256 MiB in each way, and has fio work on all of them at the same
time: 4 KiB at random places, past the kernel's cache of the mount. What the base and the images hold is in the host's
memory, so that the servers count and not the disk. Then one disk is read, one request at a time, alone (`quiet`) and
while another one is flooded, with 32 reads of 4 KiB at a time (`reads`) or 8 writes of 1 MiB (`writes`).

Prints the medians: requests a second in all; the median and the 99th percentile of the time of a request, of the disk
where it is highest; and how many CPUs the servers kept busy. fio runs on the same CPUs. With `--json` the figures of
earlier runs in this file count, too, so that rounds and rows can be run one by one.

Needs root, fio and qemu-system-common (qemu-storage-daemon), without which that target is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import FVDFS, MIB, command, kept_memory
from bench.scale import table
from bench.targets import SIZE, TARGETS, Served
from bench.workloads import megabytes, run_fio

BASE = 256 * MIB
SECONDS = 2.0  # of a measurement
RAMP = 0.5  # seconds before it
ONE, MOUNTS, DAEMONS = "one mount", "a mount each", "a qemu-storage-daemon each"
EACH = {MOUNTS: "fvdfs cow writeback=off", DAEMONS: "qcow2 cow"}
"""Those with a process for each disk, and their names in TARGETS."""

_COMMON = ("--thread", "--direct=1", "--time_based", f"--runtime={SECONDS}", f"--ramp_time={RAMP}", "--randrepeat=0")
_ONE_AT_A_TIME = ("--rw=randread", "--bs=4k", "--ioengine=psync")
BUSY = {
    "randread4k": _ONE_AT_A_TIME,
    "randread4k4": ("--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=4"),
    "randwrite4k4": ("--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=4"),
}
"""What is done with all disks."""
FLOODS: dict[str, tuple[str, ...]] = {
    "quiet": (),
    "reads": ("--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=32"),
    "writes": ("--rw=write", "--bs=1m", "--ioengine=libaio", "--iodepth=8"),
}
"""What is done with one disk while another one is read."""
FLOOD = "flood"


@dataclass(frozen=True)
class Figure:
    """Of disks at work at the same time."""

    iops: float
    """Of all of them; of the disk that is read beside a flood."""
    median_us: float
    """Of the disk where it is highest."""
    p99_us: float
    flood: float
    """MB/s of the flood."""
    cpus: float
    """That the servers kept busy."""


@contextmanager
def served(way: str, count: int, work: Path, base: Path) -> Iterator[list[Served]]:
    """So many new disks over a base."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
        if way == ONE:
            yield stack.enter_context(_one_mount(folder, base, count))
            return
        disks = []
        for number in range(count):
            own = folder / str(number)
            own.mkdir()
            disks.append(stack.enter_context(TARGETS[EACH[way]].served(own, base)))
        yield disks


@contextmanager
def _one_mount(work: Path, base: Path, count: int) -> Iterator[list[Served]]:
    folder, point = work / "images", work / "disks"
    folder.mkdir()
    point.mkdir()
    for number in range(count):
        command(*FVDFS, "create", folder / f"{number}.fvd", str(SIZE), "-b", base, "-F", "raw")
    command(*FVDFS, "mount", folder, point, "-o", f"base_path={base.parent},writeback=off")
    try:
        server = int(os.getxattr(point, "user.fvdfs.pid"))
        yield [Served(point / f"{number}.raw", () if number else (server,)) for number in range(count)]
    finally:
        command(*FVDFS, "umount", point)


def measure(disks: Sequence[Served], work: Sequence[tuple[str, ...]]) -> Figure:
    """Have fio do its work with each disk at the same time; where there is a flood, it is the last one's."""
    jobs = [
        word
        for number, (disk, options) in enumerate(zip(disks, work, strict=True))
        for word in (f"--name={number}", f"--filename={disk.disk}", *options)
    ]
    before = sum(disk.cpu_seconds() for disk in disks)
    sides = run_fio(f"--size={BASE}", *_COMMON, *jobs)
    cpus = (sum(disk.cpu_seconds() for disk in disks) - before) / (RAMP + SECONDS)
    flood = megabytes(sides.pop()) if len(set(work)) > 1 else 0.0
    times = [side["clat_ns"]["percentile"] for side in sides]
    median, p99 = (max(each[name] for each in times) / 1000 for name in ("50.000000", "99.000000"))
    return Figure(sum(side["iops"] for side in sides), median, p99, flood, cpus)


class Results:
    """Figures of all rounds, by row and way; kept in a file, if there is one."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._figures: dict[str, dict[str, list[Figure]]] = {}
        if file is not None and file.exists():
            for row, ways in json.loads(file.read_text()).items():
                self._figures[row] = {way: [Figure(*each) for each in figures] for way, figures in ways.items()}

    def add(self, row: str, way: str, figure: Figure) -> None:
        self._figures.setdefault(row, {}).setdefault(way, []).append(figure)
        print(f"{row}: {way}: {figure}", file=sys.stderr, flush=True)
        if self._file is not None:
            plain = {
                r: {w: [astuple(f) for f in found] for w, found in ways.items()} for r, ways in self._figures.items()
            }
            self._file.write_text(json.dumps(plain, indent=1))

    def tables(self) -> Iterator[str]:
        """What the head of this file names."""
        for title, floods in (("requests a second, all disks", False), ("read beside a flood", True)):
            rows = [row for row in self._figures if row.startswith(FLOOD) == floods]
            ways = [way for way in (ONE, MOUNTS, DAEMONS) if any(way in self._figures[row] for row in rows)]
            lines = [(row, *(self._cell(row, way, floods) for way in ways)) for row in rows]
            if lines:
                yield table((f"{title}; us: median / 99 %; CPUs of the servers", *ways), lines)

    def _cell(self, row: str, way: str, floods: bool) -> str:
        found = self._figures[row].get(way)
        if not found:
            return ""
        iops, median, p99, flood, cpus = map(statistics.median, zip(*map(astuple, found), strict=True))
        first = f"beside {flood:.0f} MB/s" if floods and flood else f"{iops:,.0f}"
        return f"{first}; {median:.0f} / {p99:.0f}; {cpus:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder for the images (default: the temporary folder)")
    parser.add_argument("--only", default=",".join((*BUSY, FLOOD)))
    parser.add_argument("--images", default="1,4,16", metavar="N,...")
    parser.add_argument("--targets", default=",".join((ONE, MOUNTS, DAEMONS)))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures there, and count those that are there"
    )
    arguments = parser.parse_args()
    workloads, counts = arguments.only.split(","), [int(word) for word in arguments.images.split(",")]
    ways = arguments.targets.split(",")
    if not shutil.which("qemu-storage-daemon") and DAEMONS in ways:
        ways.remove(DAEMONS)
        print(f"left out: {DAEMONS} (it is not installed)")
    results = Results(arguments.json)
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch, kept_memory():
        work = Path(scratch)
        base = work / "base.raw"
        base.write_bytes(os.urandom(BASE))
        for _ in range(arguments.rounds):
            for count in counts:
                for way in ways:
                    with served(way, count, work, base) as disks:
                        for workload in filter(BUSY.__contains__, workloads):
                            results.add(f"{workload}, {count}", way, measure(disks, [BUSY[workload]] * count))
            for way in ways if FLOOD in workloads else ():
                for name, flood in FLOODS.items():
                    with served(way, 2, work, base) as disks:
                        if flood:
                            figure = measure(disks, [_ONE_AT_A_TIME, flood])
                        else:
                            figure = measure(disks[:1], [_ONE_AT_A_TIME])
                        results.add(f"{FLOOD}: {name}", way, figure)
    print("\n".join(results.tables()))


if __name__ == "__main__":
    main()
