"""How much others wait for the disk that images are on, as far as the kernel tells.

/proc/pressure/io counts the time in which some task has waited for I/O, of any kind: a read of a slow
network file system (or of our own mount) counts as well as one of the disk. So no more is believed than
the time in which the disk itself was busy (the tenth number in /sys/dev/block/*/stat). Where a disk has
no such file, as under btrfs or NFS, the pressure alone counts.
"""

from __future__ import annotations

import os

PRESSURE_FILE = "/proc/pressure/io"


class DiskPressure:
    """Of the disk that a file or folder is on."""

    def __init__(self, path: str | bytes, pressure_file: str = PRESSURE_FILE) -> None:
        device = os.stat(path).st_dev
        self._stat_file = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"
        self._pressure_file = pressure_file
        self._total = 0.0
        self._last: tuple[float, float | None] | None = None

    def __call__(self) -> float | None:
        """Seconds in which somebody has waited for it, counted from some time on; None where nobody counts."""
        try:
            with open(self._pressure_file, encoding="ascii") as file:
                stalled = int(file.readline().rpartition("total=")[2]) / 1e6
        except (OSError, ValueError):
            return None
        busy = self._busy()
        if self._last is not None:
            more = stalled - self._last[0]
            if busy is not None and self._last[1] is not None:
                more = min(more, busy - self._last[1])
            self._total += max(0.0, more)
        self._last = stalled, busy
        return self._total

    def _busy(self) -> float | None:
        try:
            with open(self._stat_file, encoding="ascii") as file:
                return int(file.read().split()[9]) / 1e3
        except (OSError, ValueError, IndexError):
            return None
