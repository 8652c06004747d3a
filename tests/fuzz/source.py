"""Bytes as a row of decisions, from which the fuzz targets make their inputs.

A fuzzer changes bytes blindly. So that most changes make another input that is nearly valid, and not
one that the first check throws out, a target does not take the bytes as a file: it asks a `Source`
for one decision after the other (which template, which field, which value) and builds the file. The
end of the bytes is no error: from there on every answer is zero. The same bytes always make the same
input, on any machine and without the fuzzer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

EDGES = (
    *(
        0,
        1,
        -1,
        8,
        511,
        512,
        513,
        1024,
        4095,
        4096,
        4336,
        4608,
        8192,
        12288,
        16384,
        20480,
        24576,
        32768,
        65536,
        1 << 20,
    ),
    *((1 << 31) - 512, (1 << 31) - 1, -(1 << 31), 0x7FFFFFFF * 512, 1 << 32, 1 << 61, (1 << 61) + 512),
    *((1 << 62) - 512, 1 << 62, (1 << 62) + 512, (1 << 63) - 512, (1 << 63) - 1, -(1 << 63)),
)


class Source:
    """Reads decisions from bytes, from the first on."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that are not used yet."""
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def number(self, size: int, *, signed: bool = False) -> int:
        """An integer of so many bytes."""
        at = self._at
        self._at = at + size
        return int.from_bytes(self._data[at : at + size], "little", signed=signed)

    def take(self, size: int) -> bytes:
        """Up to so many bytes, as they are."""
        at = self._at
        self._at = at + size
        return self._data[at : at + size]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def pick(self, options: Sequence[T]) -> T:
        """One of at most 256."""
        return options[self.byte() % len(options)]

    def size(self, near: int) -> int:
        """An integer of up to 64 bits that is likely to matter to somebody: an edge, sectors, or about `near`."""
        kind = self.byte() % 5
        if kind == 0:
            return self.pick(EDGES)
        if kind == 1:
            return self.byte() * 512
        if kind == 2:
            return near + self.number(1, signed=True)
        if kind == 3:
            return near + self.number(1, signed=True) * 512
        return self.number(8, signed=True)
