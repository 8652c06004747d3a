"""A hundred snapshots while fio writes and verifies, then merged down to one image again, half of them meanwhile.

    python tests/bench/snapshots.py [--snapshots N] [--layout flat|compact] [--write RATE] [--work DIR]

fio writes random blocks of 4 KiB through the mount, a flush after every 16, and verifies each later; a snapshot is
made every 0.3 s. Then every other one is deleted, from the last on, while fio writes again, and the rest when the disk
is closed. Prints how long writers waited for one, what fio saw of it (its slowest writes, alone, with snapshots and
with deletions), how long a snapshot took in all, and how long the deletions took. Ends with an error where the content
is wrong: fio's verification of the disk, after the snapshots and after the merges, and `fvdfs check`.
Needs root and fio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import FVDFS, MIB, command
from fvdfs.cli import main as fvdfs

SIZE = 160 * MIB
INTERVAL = 0.3  # seconds between snapshots
_JOB = ("--name=x", "--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=4", "--direct=1", "--fsync=16")
_VERIFY = ("--verify=crc32c", "--verify_state_save=0", "--randseed=1", "--allrandrepeat=1")


def fio(raw: Path, *options: str) -> subprocess.Popen[str]:
    words = ["fio", *_JOB, *_VERIFY, f"--filename={raw}", f"--size={SIZE}", "--output-format=json", *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def slowest(process: subprocess.Popen[str]) -> str:
    """The latencies of fio's writes, in ms."""
    out, _ = process.communicate()
    assert process.returncode == 0, out
    write = json.loads(out)["jobs"][0]["write"]
    tail = write["clat_ns"]["percentile"]
    return (
        f"{write['total_ios']} writes, p99 {tail['99.000000'] / 1e6:.1f}, p99.9 {tail['99.900000'] / 1e6:.1f},"
        f" longest {write['clat_ns']['max'] / 1e6:.1f} ms"
    )


def take(raw: Path, process: subprocess.Popen[str], number: int) -> tuple[list[float], list[float]]:
    """So many snapshots: how long each took, and kept writers out, in seconds."""
    found, waited = [], []
    for _ in range(number):
        time.sleep(INTERVAL)
        assert process.poll() is None, "fio has ended; have it write more slowly"
        began = time.monotonic()
        os.setxattr(raw, "user.fvdfs.snapshot", b"")
        found.append(time.monotonic() - began)
        waited.append(json.loads(os.getxattr(raw, "user.fvdfs.status"))["snapshot_wait"])
    return found, waited


def delete(point: Path, process: subprocess.Popen[str], numbers: Sequence[int]) -> tuple[list[float], list[float]]:
    """Delete these while the disk is written: how long each took, and kept writers out in the end, in seconds."""
    found, waited = [], []
    while not json.loads(os.getxattr(point / "vm.raw", "user.fvdfs.status"))["open"]:
        time.sleep(INTERVAL)
    for number in numbers:
        time.sleep(INTERVAL)
        assert process.poll() is None, "fio has ended; have it write more slowly"
        began = time.monotonic()
        os.setxattr(point, "user.fvdfs.layers", f"delete vm@{number}.fvd".encode())
        while True:
            merge = json.loads(os.getxattr(point, "user.fvdfs.layers"))["merges"][-1]
            if merge["state"] not in ("waiting", "running"):
                break
            time.sleep(0.005)
        assert merge["state"] == "done", merge
        found.append(time.monotonic() - began)
        waited.append(merge["waited"])
    return found, waited


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=int, default=100)
    parser.add_argument("--layout", choices=["flat", "compact"], default="flat")
    parser.add_argument("--write", default="4m", metavar="RATE", help="of fio, bytes a second (4m)")
    parser.add_argument("--work", default=tempfile.gettempdir())
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        measure(Path(work), arguments.snapshots, arguments.layout, arguments.write)


def measure(work: Path, snapshots: int, layout: str, rate: str) -> None:
    folder, point, log = work / "images", work / "disks", work / "log"
    folder.mkdir()
    point.mkdir()
    command(*FVDFS, "create", folder / "vm.fvd", str(SIZE), *(["--compact"] if layout == "compact" else []))
    mount: list[str | Path] = [*FVDFS, "mount", folder, point, "--log-file", log, "-o", "writeback=off"]
    command(*mount)
    raw = point / "vm.raw"
    try:
        alone = slowest(fio(raw, f"--rate={rate}", "--io_size=16m", "--do_verify=0"))
        process = fio(raw, f"--rate={rate}", "--do_verify=1", f"--io_size={SIZE}")
        taken, waited = take(raw, process, snapshots)
        beside = slowest(process)
        verify(raw)
        process = fio(raw, f"--rate={rate}", "--do_verify=1", f"--io_size={SIZE}")
        merged, held = delete(point, process, range(snapshots, 0, -2))
        under = slowest(process)
        verify(raw)
    finally:
        command(*FVDFS, "umount", point)
    print(f"{layout}: writers waited, ms: {percentiles(waited)}")
    print(f"whole snapshots, ms: {percentiles(taken)}")
    print(f"deletions meanwhile, ms: {percentiles(merged)}; writers waited in the end: {percentiles(held)}")
    print(f"fio without snapshots: {alone}\nfio with them: {beside}\nfio with deletions: {under}")
    began = time.monotonic()
    for number in range(snapshots - 1, 0, -2):
        assert fvdfs(["delete", str(folder / f"vm@{number}.fvd")]) == 0
    took = time.monotonic() - began
    print(f"{snapshots // 2} deletions of a closed disk: {took:.1f} s; left: {sorted(os.listdir(folder))}")
    assert fvdfs(["check", str(folder / "vm.fvd")]) == 0
    command(*mount)
    try:
        verify(raw)
    finally:
        command(*FVDFS, "umount", point)


def verify(raw: Path) -> None:
    """What fio wrote is there."""
    process = fio(raw, "--verify_only=1", f"--io_size={SIZE}")
    out, _ = process.communicate()
    assert process.returncode == 0, out


def percentiles(seconds: list[float]) -> str:
    """In ms."""
    values = sorted(1000 * value for value in seconds)
    middle = statistics.median(values)
    return f"median {middle:.1f}, p99 {values[int(len(values) * 0.99)]:.1f}, longest {values[-1]:.1f}"


if __name__ == "__main__":
    main()
