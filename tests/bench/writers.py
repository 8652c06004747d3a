"""Writing as a host's programs do it, with and without the kernel gathering writes: QEMU's cache modes, dd, qemu-img.


    python tests/bench/writers.py [--rounds N] [--work DIR] [--targets TARGET,...]

QEMU's 4 KiB requests walk over the whole disk, so that they soon come back to blocks that were written before.
Prints medians: thousand requests a second, or MB/s with a sync at the end. Needs root and qemu-utils.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import MIB, command, drop_caches, kept_memory
from bench.scale import table
from bench.targets import SIZE, TARGETS

DEFAULT = "fvdfs cow,fvdfs cow writeback=off,fvdfs passthrough,qcow2 cow,raw file"
STEP = 1118208  # bytes from one request to the next: pages, and no power of two
DD = "dd if={source} of={disk} conv=notrunc,fsync status=none bs={size} count={count}"


def _requests(disk: Path, _: Path, cache: str, depth: int, count: int, flush: int = 0) -> float:
    """Thousand writes a second by QEMU, with a flush after each `flush` of them."""
    words = ["qemu-img", "bench", "-w", "-f", "raw", "-s", "4096", "-S", str(STEP), "-t", cache, "-d", str(depth)]
    words += ["-c", str(count)] + ([f"--flush-interval={flush}"] if flush else [])
    seconds = re.search(r"completed in ([\d.]+)", command(*words, disk))
    assert seconds is not None
    return count / float(seconds[1]) / 1000


def _copy(disk: Path, source: Path, program: str, amount: int) -> float:
    """MB/s of a program that writes to the disk."""
    start = time.monotonic()
    command("sh", "-c", program.format(source=source, disk=disk))
    return amount / (time.monotonic() - start) / 1e6


def _dd(size: str, count: int, amount: int) -> Callable[[Path, Path], float]:
    return partial(_copy, program=DD.replace("{size}", size).replace("{count}", str(count)), amount=amount)


WORK: dict[str, Callable[[Path, Path], float]] = {
    "QEMU, cache=none": partial(_requests, cache="none", depth=1, count=8000),
    "the same, 16 at a time": partial(_requests, cache="none", depth=16, count=20000),
    "the same, a flush after 16": partial(_requests, cache="none", depth=16, count=8000, flush=16),
    "QEMU, cache=writeback": partial(_requests, cache="writeback", depth=1, count=8000),
    "the same, 16 at a time ": partial(_requests, cache="writeback", depth=16, count=20000),
    "the same, a flush after 16 ": partial(_requests, cache="writeback", depth=16, count=8000, flush=16),
    "the same, a flush after each": partial(_requests, cache="writeback", depth=1, count=3000, flush=1),
    "dd bs=4K (MB/s)": _dd("4k", 16384, 64 * MIB),
    "dd bs=64K (MB/s)": _dd("64k", 4096, 256 * MIB),
    "dd bs=1M (MB/s)": _dd("1M", 512, 512 * MIB),
    "qemu-img convert -n (MB/s)": partial(
        _copy, program="qemu-img convert -n -f raw -O raw {source} {disk} && sync {disk}", amount=SIZE
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--targets", default=DEFAULT)
    arguments = parser.parse_args()
    names = arguments.targets.split(",")
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch, kept_memory():
        base = Path(scratch) / "base.raw"
        command("dd", "if=/dev/urandom", f"of={base}", "bs=1M", f"count={SIZE // MIB}", "status=none")
        for number in range(arguments.rounds):
            for name in names:
                with (
                    tempfile.TemporaryDirectory(dir=scratch) as folder,
                    TARGETS[name].served(Path(folder), base) as served,
                ):
                    for what, work in WORK.items():
                        drop_caches()
                        found.setdefault((what, name), []).append(work(served.disk, base))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    rows = [[what.strip(), *(f"{statistics.median(found[what, name]):.3g}" for name in names)] for what in WORK]
    print(table(["", *names], rows))


if __name__ == "__main__":
    main()
