"""Whether files are unchanged, as far as their times tell.

The kernel keeps pages of a disk that nobody has open. They are right as long as no file under the disk has changed:
the image, its data file, its base, and whatever these stand on. A change shows in the size and the times of a file; in
the time of its inode (ctime) even where somebody has put the others back.

Times tell nothing

- while they are so recent that a second change may get the same one (git calls such files racy): the clock of a file
  system goes in ticks, of some milliseconds, or of a second or two where it keeps whole seconds. A time in the future
  counts as recent: a clock was set back;
- of what is behind a device or a server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from fvdfs.image.policy import HostStore

SECOND = 1_000_000_000  # ns

TICK = SECOND // 10
"""Nanoseconds in which two changes may get the same time; ten times what Linux has."""
WHOLE_SECONDS_TICK = 3 * SECOND
"""The same where the file system keeps whole seconds, or every other one."""

Signature = tuple[int, int, int, int, int, int]


def signature(status: os.stat_result) -> Signature:
    """What changes when a file is replaced or written to."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_rdev,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size,
    )


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are of one file, changed or not."""
    return signature(one)[:3] == signature(other)[:3]


def is_settled(ctime_ns: int, now_ns: int) -> bool:
    """Whether any change after `now_ns` will show in the time: it is older than a tick."""
    tick = TICK if ctime_ns % SECOND else WHOLE_SECONDS_TICK
    return ctime_ns < now_ns - tick


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How the files under a disk were at some moment."""

    signatures: tuple[Signature, ...]
    settled: bool
    """Whether any later change will show."""

    def is_still(self, now: Snapshot | None) -> bool:
        """Whether nothing can have changed between the two."""
        return self.settled and now is not None and self.signatures == now.signatures


def snapshot_of(stores: Iterable[HostStore]) -> Snapshot | None:
    """How the files of these stores are; None where nobody can tell. Blocks. Raises OSError."""
    now_ns = time.time_ns()
    found: list[os.stat_result] = []
    for store in stores:
        statuses = store.statuses()
        if statuses is None:
            return None
        found += statuses
    settled = all(is_settled(status.st_ctime_ns, now_ns) for status in found)
    return Snapshot(tuple(signature(status) for status in found), settled)
