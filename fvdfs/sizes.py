"""Sizes as people write and read them. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
MAX_FILE = 1 << 63  # bytes; no file offset is larger
_SIZE = re.compile(
    r"(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))? ?"
    r"(?:(?P<unit>[KMGTPE])(?:iB)?|bytes|B)?(?: \((?P<exact>[0-9]+) bytes\))?",
    re.IGNORECASE | re.ASCII,
)
_SECTOR = 512  # bytes; what a rounded size is a multiple of
_DIGITS = 100  # of a number; int() refuses thousands of them


def parse_size(text: str) -> int:
    """Bytes: `512`, `64K`, `10M`, `20GiB`, `1.5T`, and what `human_size` writes.

    From M on a part of a unit may be rounded, as where only the first half of that is shown: `20.49 GiB` is the nearest
    whole number of sectors.

    Raises ValueError, whose text says what is wrong.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (not found["exact"] and found["fraction"] and len(found["fraction"]) > _DIGITS):
        raise ValueError(f"{text!r} is no size; write 512, 64K, 10M, 20GiB or 1.5T")
    whole, fraction, unit = found["exact"] or found["whole"], found["fraction"] or "", found["unit"] or ""
    if found["exact"]:
        fraction = unit = ""
    if len(whole) > _DIGITS:
        raise ValueError(f"{text[:_DIGITS]!r} is more than any file can hold")
    factor, parts = UNITS[unit.upper()], int("1" + "0" * len(fraction))
    size, rest = divmod(int(whole + fraction) * factor, parts)
    if rest and factor >= UNITS["M"]:
        size, rest = (2 * int(whole + fraction) * factor // (parts * _SECTOR) + 1) // 2 * _SECTOR, 0
    if size >= MAX_FILE:
        raise ValueError(f"{text[:_DIGITS]!r} is more than any file can hold")
    if rest:
        raise ValueError(f"{text!r} is no whole number of bytes")
    return size


class NewSize(NamedTuple):
    """What a disk's size is to become."""

    size: int
    """Bytes."""
    added: bool
    """Whether they are to be added to what it has."""

    def after(self, old: int) -> int:
        """That of a disk of `old` bytes."""
        return old + self.size if self.added else self.size


def parse_new_size(text: str) -> NewSize:
    """A size, or `+` and a size. Raises ValueError, as `parse_size`."""
    return NewSize(parse_size(text.removeprefix("+")), text.startswith("+"))


def human_size(size: int) -> str:
    """Bytes as a person reads them, with the exact number where that is rounded."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024 or unit == "EiB":
            break
        value /= 1024
    if unit == "bytes":
        return f"{size} bytes"
    return f"{value:.4g} {unit} ({size} bytes)"
