"""The stamp of a template: by it two hosts see whether theirs is the same, without reading all of it.

It is the SHA-256 of the size, and of pieces spread over the disk: all of the beginning, where partition tables and the
first file system's own records are, then some of the rest at equal distances, up to the end. Two builds of a system
differ in it, and so do a template and what was started from it; a change of a few bytes in between need not. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

PIECE = 64 << 10  # bytes
FIRST = 4 << 20  # bytes that count from the beginning
PARTS = 256
"""Of the rest, each with a piece that counts."""
LENGTH = 32  # hexadecimal digits


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Bytes [start, stop) that count of a disk of this size, in order."""
    yield from ((at, min(at + PIECE, size)) for at in range(0, min(FIRST, size), PIECE))
    rest = size - FIRST
    if rest <= PARTS * PIECE:
        yield from ((at, min(at + PIECE, size)) for at in range(FIRST, size, PIECE))
        return
    last = size - PIECE
    yield from ((at, at + PIECE) for at in (FIRST + (last - FIRST) * part // (PARTS - 1) for part in range(PARTS)))


class Stamp:
    """A stamp in the making."""

    def __init__(self, size: int) -> None:
        """`size`: bytes of the disk."""
        self._hash = hashlib.sha256(f"fvdfs template {size}\n".encode())

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        """The bytes of the next one of `pieces`."""
        self._hash.update(piece)

    def text(self) -> str:
        """The stamp, once all pieces were added."""
        return self._hash.hexdigest()[:LENGTH]


def is_stamp(text: str) -> bool:
    """Whether this can be one."""
    return isinstance(text, str) and len(text) == LENGTH and all(c in "0123456789abcdef" for c in text)
