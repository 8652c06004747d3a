"""Records of the journal, packed by hand."""

from __future__ import annotations

import struct

from support.reference import BITMAP_RECORD, TABLE_RECORD


def bits(first: int, count: int) -> bytes:
    """A bitmap record, in sectors."""
    return struct.pack("<IIq", BITMAP_RECORD, count, first)


def entries(first: int, *numbers: int) -> bytes:
    """A table record; the entries have bit 31 set, as a writer's have."""
    return raw_entries(first, *(number | 0x80000000 for number in numbers))


def raw_entries(first: int, *values: int) -> bytes:
    """A table record, its entries as they are."""
    return struct.pack(f"<III{len(values)}I", TABLE_RECORD, first, len(values), *values)
