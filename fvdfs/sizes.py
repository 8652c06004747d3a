"""Sizes as people write and read them. Pure."""

from __future__ import annotations

from typing import NamedTuple

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
MAX_FILE = 1 << 63  # bytes; no file offset is larger
_DIGITS = 100  # of a number; int() refuses thousands of them


def parse_size(text: str) -> int:
    """Bytes: `512`, `64K`, `10M`, `20G`, `2T`. Raises ValueError, whose text says what is wrong."""
    number, unit = text, ""
    if text and not text[-1].isdigit():
        number, unit = text[:-1], text[-1].upper()
    if unit not in UNITS or not number.isdigit() or not number.isascii():
        raise ValueError(f"{text!r} is no size; write 512, 64K, 10M, 20G or 2T")
    size = int(number[:_DIGITS]) * UNITS[unit]
    if len(number) > _DIGITS or size >= MAX_FILE:
        raise ValueError(f"{text[:_DIGITS]!r} is more than any file can hold")
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
