"""A disk of 1 TiB with 1 GiB used: finding its data, copying it out, giving it back.

    python tests/bench/space.py [--rounds N] [--work DIR] [--only TARGET,...]

In each round and for each target a new disk gets 1024 pieces of 1 MiB, spread evenly. Then

    walk     every extent is asked for by lseek (SEEK_DATA, SEEK_HOLE)
    convert  `qemu-img convert` copies it to a raw file
    discard  `fallocate --punch-hole` of the whole disk, and fsync

Prints the medians, in seconds, and what the disk takes before and after the discard.
Needs root, qemu-utils and qemu-system-common (qemu-storage-daemon).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import FVDFS, MIB, command, exported, mounted
from bench.scale import table

SIZE, PIECES = 1 << 40, 1024
OVER_BASE = ("--base", "base.raw", "--base-format", "raw")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "passed through": ("--data-file", "data.raw"),
    "compact": ("--compact",),
    "over a base": OVER_BASE,
    "compact over a base": ("--compact", *OVER_BASE),
    "qcow2 data file": ("--data-file", "data.qcow2", "--data-format", "qcow2"),
}


@contextmanager
def fvdfs(work: Path, *options: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=work, prefix="images-"))
    (folder / "base.raw").touch()
    os.truncate(folder / "base.raw", SIZE)
    command(*FVDFS, "create", folder / "0.fvd", str(SIZE), *options)
    with mounted(folder, "writeback=auto") as disks:
        yield disks[0].path


@contextmanager
def sparse(work: Path) -> Iterator[Path]:
    file = work / "sparse.raw"
    file.touch()
    os.truncate(file, SIZE)
    yield file
    file.unlink()


@contextmanager
def qcow2(work: Path) -> Iterator[Path]:
    file = work / "disk.qcow2"
    command("qemu-img", "create", "-q", "-f", "qcow2", file, str(SIZE))
    node = {"driver": "qcow2", "discard": "unmap"}
    with exported(
        work, [{**node, "file": {"driver": "file", "filename": str(file), "discard": "unmap"}}], True
    ) as disks:
        yield disks[0].path
    file.unlink()


def targets() -> dict[str, Callable[[Path], AbstractContextManager[Path]]]:
    """What is measured, by name."""

    def layout(options: Sequence[str]) -> Callable[[Path], AbstractContextManager[Path]]:
        return lambda work: fvdfs(work, *options)

    ours = {f"fvdfs {name}": layout(options) for name, options in LAYOUTS.items()}
    return {"raw": sparse, **ours, "qcow2, qemu-storage-daemon": qcow2}


def fill(disk: Path) -> None:
    with open(disk, "r+b", buffering=0) as file:
        for number in range(PIECES):
            file.seek(number * (SIZE // PIECES))
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def walk(disk: Path) -> float:
    """Seconds to find all data; raises AssertionError where some is missing."""
    start, found, at = time.perf_counter(), 0, 0
    with open(disk, "rb", buffering=0) as file:
        while True:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
            found += at - data
    assert PIECES * MIB <= found <= 2 * PIECES * MIB, found
    return time.perf_counter() - start


def timed(*words: str | Path) -> float:
    start = time.perf_counter()
    command(*words)
    return time.perf_counter() - start


def measure(work: Path, disk: Path) -> tuple[float, ...]:
    """Seconds to walk, convert and discard; bytes before and after."""
    fill(disk)
    before = disk.stat().st_blocks * 512
    target = work / "copy.raw"
    seconds = walk(disk), timed("qemu-img", "convert", "-f", "raw", "-O", "raw", disk, target)
    assert target.stat().st_blocks * 512 < 2 * PIECES * MIB
    target.unlink()
    discard = timed("fallocate", "--punch-hole", "--offset", "0", "--length", str(SIZE), disk) + timed("sync", disk)
    return (*seconds, discard, before, disk.stat().st_blocks * 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    found = {name: served for name, served in targets().items() if not chosen.only or name in chosen.only.split(",")}
    rows = []
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        for name, served in found.items():
            rounds = []
            for _ in range(chosen.rounds):
                with served(Path(folder)) as disk:
                    rounds.append(measure(Path(folder), disk))
            walked, converted, discarded, before, after = map(statistics.median, zip(*rounds, strict=True))
            seconds = (f"{value:.2f}" for value in (walked, converted, discarded))
            rows.append((name, *seconds, f"{before / MIB:.0f}", f"{after / MIB:.1f}"))
    print(table(("", "walk s", "convert s", "discard s", "before MiB", "after MiB"), rows))


if __name__ == "__main__":
    main()
