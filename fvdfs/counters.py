"""What the requests to a disk came to: how many of each kind, their bytes, how long they took, how many failed. Pure.

They count from when the mount first knew the disk, whoever opened and closed it since. What the kernel reads and writes
by itself (`passthrough.py`), and what its page cache answers, reaches nobody who could count it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

KINDS = ("read", "write", "fsync", "fallocate", "lseek", "copy")
"""The names that requests have in the log, too (`device.py`)."""
_WITH_BYTES = frozenset({"read", "write", "copy"})
"""Those whose result is a number of bytes."""
_LEAST = 13  # bits; all that takes less than 2**13 ns, 8 us, is one
BOUNDS = tuple((1 << (_LEAST + power)) / 1e9 for power in range(22))
"""Seconds, up to 17; what takes longer has no bound."""


class Count:
    """Of one kind."""

    __slots__ = ("_times", "bytes", "errors", "nanoseconds")

    def __init__(self) -> None:
        self.bytes = 0
        self.errors = 0
        self.nanoseconds = 0
        self._times = [0] * 64  # by the bits that the number of nanoseconds has

    def add(self, size: int, nanoseconds: int) -> None:
        """A request was answered, which moved `size` bytes."""
        self.bytes += size
        self.nanoseconds += nanoseconds
        self._times[nanoseconds.bit_length()] += 1

    @property
    def requests(self) -> int:
        """How many were answered, without those that failed."""
        return sum(self._times)

    @property
    def times(self) -> list[int]:
        """How many took up to each of BOUNDS and longer than the one before it, then those that took longer."""
        first, last = _LEAST + 1, _LEAST + len(BOUNDS)
        return [sum(self._times[:first]), *self._times[first:last], sum(self._times[last:])]


def quantile(times: Sequence[int], share: float) -> float | None:
    """The seconds within which this share of `times` (as `Count.times`) was answered, rounded up to one of BOUNDS.

    None: there were none; infinite: longer than all.
    """
    wanted = share * sum(times)
    if not wanted:
        return None
    for count, bound in zip(times, (*BOUNDS, math.inf), strict=True):
        wanted -= count
        if wanted <= 0:
            return bound
    return math.inf


class Counters:
    """Of a disk."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of = {kind: Count() for kind in KINDS}

    def answered(self, kind: str, result: int, nanoseconds: int) -> None:
        """A request was answered with this result."""
        self._of[kind].add(result if kind in _WITH_BYTES else 0, nanoseconds)

    def failed(self, kind: str) -> None:
        """A request was answered with an error; others than these KINDS are not counted."""
        if (count := self._of.get(kind)) is not None:
            count.errors += 1

    def status(self) -> dict[str, Any]:
        """By kind, ready for JSON: those of which there were any."""
        return {
            kind: {
                "requests": count.requests,
                "bytes": count.bytes,
                "errors": count.errors,
                "seconds": count.nanoseconds / 1e9,
                "times": count.times,
            }
            for kind, count in self._of.items()
            if count.errors or count.requests
        }
