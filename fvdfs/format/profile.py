"""Profiles: what a machine read first, in which order (format.md, "Reserved fields").

A profile is a sequence of extents of the virtual disk, recorded while a machine starts, and fetched
first when another image of the same base is opened. On disk it is an array of entries

    i64 offset in bytes | u32 length in units of `unit_of_PrefetchProfileEntry_len`        (12 bytes)

at `prefetch_profile_offset`. As a file of its own it is text, an extent a line: offset and length in
bytes, in decimal. Adjacent extents that were read one after the other are one entry.

A profile is advice: entries that make no sense (of a disk of another size, or from a stranger) are
ignored, and nothing depends on the others.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from fvdfs.errors import UsageError
from fvdfs.format.header import PROFILE_ENTRY, ceil_div

TEXT_HEAD = "# fvdfs profile: offset and length of each extent, in bytes, in the order of their first read\n"
MAX_LENGTH = (1 << 32) - 1  # units, what the field holds

Extent = tuple[int, int]
"""Bytes [start, stop) of the virtual disk."""


def decode(data: bytes, entries: int, unit: int) -> list[Extent]:
    """The extents in `data`, without negative and empty ones. `unit`: bytes."""
    extents = []
    for offset, length in PROFILE_ENTRY.iter_unpack(data[: entries * PROFILE_ENTRY.size]):
        if offset >= 0 and length > 0:
            extents.append((offset, offset + length * unit))
    return extents


def encode(extents: Iterable[Extent], unit: int, room: int) -> tuple[bytes, int]:
    """As many entries as fit into `room` bytes, rounded out to units of `unit` bytes; and their number."""
    data = bytearray()
    for start, stop in extents:
        if len(data) + PROFILE_ENTRY.size > room:
            break
        first = start // unit * unit
        data += PROFILE_ENTRY.pack(first, min(ceil_div(stop - first, unit), MAX_LENGTH))
    return bytes(data), len(data) // PROFILE_ENTRY.size


def to_text(extents: Iterable[Extent]) -> str:
    """The text of a profile file."""
    return TEXT_HEAD + "".join(f"{start} {stop - start}\n" for start, stop in extents)


def from_text(text: str, name: str) -> list[Extent]:
    """The extents in the text of the profile file `name`. Raises UsageError for a line that is none."""
    extents = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words):
            raise UsageError(f"{name}: line {number}: must be two numbers, offset and length in bytes")
        start, length = int(words[0]), int(words[1])
        if length:
            extents.append((start, start + length))
    return extents
