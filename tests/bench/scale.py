"""What a request costs in large disks, with much or little local, in deep chains, beside many images; and memory.

    python tests/bench/scale.py [--work DIR] [--picture FILE]

A request is 4 KiB at a random place, past the kernel's cache of the mount, one at a time, read from or written to
what the host has in memory: so the disk does not count. Prints tables; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import FVDFS, MIB, command, kept_memory

GIB, TIB = 1 << 30, 1 << 40
PAGE = 4096
REQUESTS = 2000  # a pass
PASSES = 7
IDLE = 5  # seconds
SIZES = {"1 GiB": GIB, "16 GiB": 16 * GIB, "256 GiB": 256 * GIB, "2 TiB": 2 * TIB, "8 TiB": 8 * TIB}
LARGE_BLOCKS = ("--block-size", "64K")


@dataclass
class Series:
    """Microseconds of a read and of a write, by something."""

    by: str
    points: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, where: str, disks: Sequence[int], places: Sequence[int]) -> None:
        """Measure requests to these places, of the disks in turn, after a pass that brings all into memory."""
        costs = []
        with mmap.mmap(-1, PAGE) as area, memoryview(area) as buffer:
            for call in (os.preadv, os.pwritev):
                costs.append(statistics.median(_passes(call, buffer, disks, places)))
        self.points.append((where, costs[0], costs[1]))
        print(f"{self.by} {where}: read {costs[0]:.1f} us, write {costs[1]:.1f} us", file=sys.stderr, flush=True)


def _passes(
    call: Callable[[int, list[memoryview], int], int], buffer: memoryview, disks: Sequence[int], places: Sequence[int]
) -> Iterator[float]:
    for number in range(PASSES + 1):
        start = time.perf_counter()
        for at, place in enumerate(places):
            assert call(disks[at % len(disks)], [buffer], place) == PAGE
        if number:
            yield (time.perf_counter() - start) / len(places) * 1e6


class Mount:
    """A folder of images, mounted."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.point = folder.with_suffix(".mnt")
        self.point.mkdir()
        command(*FVDFS, "mount", folder, self.point)
        stack.callback(command, *FVDFS, "umount", self.point)
        self.pid = int(os.getxattr(self.point, "user.fvdfs.pid"))

    def open(self, name: str) -> int:
        disk = os.open(self.point / f"{name}.raw", os.O_RDWR | os.O_DIRECT)
        self._stack.callback(os.close, disk)
        return disk

    def memory(self) -> int:
        """Bytes that the process has in memory for itself."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) * 1024

    def activity(self) -> tuple[int, int]:
        """Context switches, and ticks of CPU time, up to now."""
        tasks = [task.read_text() for task in Path(f"/proc/{self.pid}/task").glob("*/status")]
        switches = sum(int(count) for text in tasks for count in re.findall(r"ctxt_switches:\s+(\d+)", text))
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return switches, int(fields[11]) + int(fields[12])


@contextmanager
def mounted(work: Path, make: Callable[[Path], None]) -> Iterator[Mount]:
    """A folder of the images that `make` puts there."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)), "images")
        folder.mkdir()
        make(folder)
        yield Mount(folder, stack)


def create(folder: Path, name: str, size: int, *options: str) -> None:
    command(*FVDFS, "create", folder / f"{name}.fvd", str(size), *options)


def base(folder: Path, size: int, content: bool = False) -> tuple[str, ...]:
    """Options for an image over a new raw file, which is sparse, or random."""
    with open(folder / "base.raw", "wb") as file:
        if content:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        file.truncate(size)
    return ("--base", "base.raw", "--base-format", "raw")


def over_base(folder: Path, size: int, options: Sequence[str], content: bool = False) -> None:
    """An image "a" over a base of its size."""
    create(folder, "a", size, *base(folder, size, content), *options)


def places(size: int, count: int = REQUESTS) -> list[int]:
    chance = random.Random(1)
    return [chance.randrange(size // PAGE) * PAGE for _ in range(count)]


# --- what is measured ---------------------------------------------------------------------------------


def by_size(work: Path) -> Series:
    series = Series("disk size")
    for name, size in SIZES.items():
        with mounted(work, partial(over_base, size=size, options=LARGE_BLOCKS)) as m:
            series.add(name, [m.open("a")], places(size))
    return series


def by_local_share(work: Path) -> Series:
    """Blocks of 4 KiB, those that are local scattered at random."""
    series, size = Series("local share"), 256 * MIB
    for share in (0, 25, 50, 75, 100):
        with mounted(work, partial(over_base, size=size, options=("--block-size", "4K"), content=True)) as m:
            disk = m.open("a")
            blocks = list(range(0, size, PAGE))
            random.Random(2).shuffle(blocks)
            with mmap.mmap(-1, PAGE) as area:
                for place in blocks[: len(blocks) * share // 100]:
                    os.pwritev(disk, [area], place)
            series.add(f"{share} %", [disk], places(size))
    return series


def by_depth(work: Path) -> Series:
    series, size = Series("images in the chain"), 256 * MIB
    for depth in (1, 4, 16):

        def make(folder: Path, depth: int = depth) -> None:
            create(folder, "1", size, *base(folder, size, True), "--block-size", "4K")
            for number in range(2, depth + 1):
                below = ("--base", f"{number - 1}.fvd", "--base-format", "fvd")
                create(folder, str(number), size, *below, "--block-size", "4K")

        with mounted(work, make) as m:
            series.add(str(depth), [m.open(str(depth))], places(size))
    return series


def by_images(work: Path) -> tuple[Series, list[tuple[str, ...]]]:
    """Images of 20 GiB, with 64K blocks, all open; what each takes in memory."""
    series, size = Series("open images"), 20 * GIB
    memory: list[tuple[str, ...]] = []
    bitmap = size // (64 << 10) // 8
    for count in (1, 10, 100, 500):

        def make(folder: Path, count: int = count) -> None:
            options = base(folder, size)
            create(folder, "0", size, *options, *LARGE_BLOCKS, "--journal-size", "64K")
            for number in range(1, count):
                command("cp", "--sparse=auto", folder / "0.fvd", folder / f"{number}.fvd")

        with mounted(work, make) as m:
            os.listdir(m.point)
            before = m.memory()
            disks = [m.open(str(number)) for number in range(count)]
            each = (m.memory() - before) / count
            memory.append((f"{count} x 20 GiB", f"{each / 1024:.0f} KiB", f"{bitmap / 1024:.0f} KiB"))
            series.add(str(count), disks, places(size, max(REQUESTS, 4 * count)))
    return series, memory


def large_image(work: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Images of 2 TiB: memory next to bitmap and table, and the time to open one."""
    memory: list[tuple[str, ...]] = []
    opening: list[tuple[str, ...]] = []
    blocks = 2 * TIB // (64 << 10) // 8
    chunks = 2 * TIB // MIB * 4
    for name, options, size in (
        ("2 TiB, 64K blocks", LARGE_BLOCKS, blocks),
        ("2 TiB, 64K blocks, compact", (*LARGE_BLOCKS, "--compact"), blocks + chunks),
    ):
        with mounted(work, partial(over_base, size=2 * TIB, options=options)) as m:
            os.listdir(m.point)
            before, times = m.memory(), []
            for _ in range(5):
                start = time.perf_counter()
                disk = os.open(m.point / "a.raw", os.O_RDWR)
                times.append(time.perf_counter() - start)
                taken = m.memory() - before
                os.close(disk)
            memory.append((name, f"{taken / MIB:.1f} MiB", f"{size / MIB:.1f} MiB"))
            opening.append((name, f"{statistics.median(times) * 1000:.1f} ms"))
    return memory, opening


def idle(work: Path) -> list[tuple[str, ...]]:
    with mounted(work, lambda folder: create(folder, "a", GIB)) as m:
        disk = m.open("a")
        with mmap.mmap(-1, PAGE) as area:
            os.pwritev(disk, [area], 0)
        os.fsync(disk)
        time.sleep(20)  # until the last commit that nobody asked for, and the end of the thread that it was done in
        before = m.activity()
        time.sleep(IDLE)
        switches, ticks = (after - then for after, then in zip(m.activity(), before, strict=True))
        return [(f"in {IDLE} s", str(switches), str(ticks))]


# --- showing it ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def draw(all_series: Sequence[Series], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, len(all_series), figsize=(12, 3), sharey=True, layout="constrained")
    for axes, series in zip(plots, all_series, strict=True):
        names, reads, writes = zip(*series.points, strict=True)
        axes.plot(names, reads, "o-", color="#4a7fb5", label="read")
        axes.plot(names, writes, "s-", color="#c0392b", label="write")
        axes.set_xlabel(series.by)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", linewidth=0.3)
    plots[0].set_ylim(bottom=0)
    plots[0].set_ylabel("µs a request of 4 KiB")
    plots[0].legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the images (default: the temporary folder)")
    parser.add_argument("--picture", type=Path, help="a file to draw in, as SVG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch, kept_memory():
        work = Path(scratch)
        images, memory = by_images(work)
        all_series = [by_size(work), by_local_share(work), by_depth(work), images]
        more_memory, opening = large_image(work)
        quiet = idle(work)
    for series in all_series:
        rows = [(name, f"{read:.1f}", f"{write:.1f}") for name, read, write in series.points]
        print(table((series.by, "read (us)", "write (us)"), rows))
    print(table(("images open", "memory of each", "bitmap and table"), memory + more_memory))
    print(table(("", "time to open"), opening))
    print(table(("idle mount", "context switches", "ticks of CPU time"), quiet))
    if arguments.picture:
        draw(all_series, arguments.picture)


if __name__ == "__main__":
    main()
