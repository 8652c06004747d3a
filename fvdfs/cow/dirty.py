"""What of a disk has been written since it was copied: a bit for each unit, for a copy of a disk that is in use.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from bitarray import bitarray

from fvdfs.format.header import PAGE, ceil_div

_UNITS = 1 << 24  # at the most, about: 2 MiB of bits


class Dirty:
    """Byte ranges are half-open: [start, stop)."""

    def __init__(self, size: int) -> None:
        """Nothing is dirty. `size`: bytes of the disk, which may grow."""
        self.unit = PAGE
        while size // self.unit > _UNITS:
            self.unit *= 2
        self._bits = bitarray(ceil_div(size, self.unit))
        self._bits.setall(0)
        self._next = 0

    @property
    def units(self) -> int:
        """How many are dirty."""
        return self._bits.count(1)

    def add(self, start: int, stop: int) -> None:
        """These bytes were written, perhaps in part."""
        end = ceil_div(stop, self.unit)
        if end > len(self._bits):
            self._bits.extend([0] * (end - len(self._bits)))
        self._bits[start // self.unit : end] = 1

    def take(self, length: int) -> tuple[int, int] | None:
        """Some dirty bytes, at most about `length`, which count as clean from here on; None where nothing is dirty."""
        first = self._bits.find(1, self._next)
        if first < 0:
            first = self._bits.find(1)
            if first < 0:
                return None
        end = self._bits.find(0, first, first + max(1, length // self.unit))
        if end < 0:
            end = min(first + max(1, length // self.unit), len(self._bits))
        self._bits[first:end] = 0
        self._next = end
        return first * self.unit, end * self.unit
