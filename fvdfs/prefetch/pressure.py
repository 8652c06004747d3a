"""How long tasks wait for the disk that images are on while others than us use it, as far as the kernel tells.

/proc/pressure/io counts the time in which some task waits for I/O of any kind, also for a slow network
file system or for our own mount. So at most the time in which the disk itself was busy is counted (the
tenth number in /sys/dev/block/*/stat). Where a disk has no such file, as under btrfs or NFS, the pressure
alone counts.

The kernel does not tell who waits; it may be us, or the kernel that writes for us. So pressure counts only
while the disk moves more than this program and its children have asked for, by /proc/PID/io. That counts a
write when it is made, so it is a credit for what the disk does in the next seconds. A guest's requests are
ours, too: prefetching does not stand back for them here, but lets them go first.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

PRESSURE_FILE = "/proc/pressure/io"
PROC = "/proc"
SECTOR = 512
CREDIT_TIME = 10.0  # seconds; what was written then is on the disk, or never will be
IGNORED = 16 << 10  # bytes between two samples that the file system moves for itself


@dataclass(frozen=True)
class _Sample:
    """Counters of the kernel at one time."""

    at: float
    stalled: float
    busy: float | None
    """Seconds in which the disk was busy."""
    moved: int
    """Bytes that the disk has read or written."""
    own: int | None
    """Bytes that we have asked for, of any disk."""


class DiskPressure:
    """The pressure on the disk that a file or folder is on."""

    def __init__(self, path: str | bytes, pressure_file: str = PRESSURE_FILE, proc: str = PROC) -> None:
        device = os.stat(path).st_dev
        self._stat_file = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"
        self._pressure_file = pressure_file
        self._proc = proc
        self._total = 0.0
        self._credit = 0.0
        self._last: _Sample | None = None

    def __call__(self) -> float | None:
        """Seconds, in all, in which tasks waited while others used the disk; None where the kernel does not count."""
        try:
            with open(self._pressure_file, encoding="ascii") as file:
                stalled = int(file.readline().rpartition("total=")[2]) / 1e6
        except (OSError, ValueError):
            return None
        sample = _Sample(time.monotonic(), stalled, *self._disk(), self._own())
        if self._last is not None and self._others(sample, self._last):
            more = stalled - self._last.stalled
            if sample.busy is not None and self._last.busy is not None:
                more = min(more, sample.busy - self._last.busy)
            self._total += max(0.0, more)
        self._last = sample
        return self._total

    def _others(self, now: _Sample, last: _Sample) -> bool:
        """Whether the disk has moved more than we asked for."""
        if now.busy is None or now.own is None or last.own is None:
            return True
        self._credit = self._credit * math.exp((last.at - now.at) / CREDIT_TIME) + max(0, now.own - last.own)
        moved = max(0, now.moved - last.moved)
        ours = min(moved, self._credit)
        self._credit -= ours
        return moved - ours > IGNORED

    def _disk(self) -> tuple[float | None, int]:
        try:
            with open(self._stat_file, encoding="ascii") as file:
                words = file.read().split()
            return int(words[9]) / 1e3, (int(words[2]) + int(words[6])) * SECTOR
        except (OSError, ValueError, IndexError):
            return None, 0

    def _own(self) -> int | None:
        """Bytes that this program and the storage daemons that it has started have asked for."""
        own = self._asked_for("self")
        try:
            with open(f"{self._proc}/self/task/{os.getpid()}/children", encoding="ascii") as file:
                children = file.read().split()
        except OSError:
            children = []
        return None if own is None else own + sum(self._asked_for(child) or 0 for child in children)

    def _asked_for(self, process: str) -> int | None:
        try:
            with open(f"{self._proc}/{process}/io", encoding="ascii") as file:
                counters = dict(line.split(": ") for line in file.read().splitlines())
            return int(counters["read_bytes"]) + int(counters["write_bytes"])
        except (OSError, ValueError, KeyError):
            return None
