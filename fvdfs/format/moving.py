"""The record of a move of the chunk table, in the last sector of the header's padding.

A table that moves takes the start of the data with it: `table_offset` and `metadata_size` change at the same time, and
lie in different sectors of the header. So what they become is written here first, and counts from the moment on at
which three other fields, which lie in one sector, say so:

    clean_shutdown = 0, journal_size = 0, journal_offset = PLACE

The original refuses such an image, as one without a journal that was not closed. Whoever knows this record takes
the fields from here (`Header.decode`), and the image as closed. Then the header's other sectors are written, then that
one, each stable before the next; then the record is cleared (`image.commit.write_header`).

The record, little-endian, fills a sector: 8 bytes magic | i64 metadata_size | i64 table_offset | i64 journal_offset |
i64 journal_size | u32 CRC-32 of all that | zeros.

Pure.
"""

from __future__ import annotations

import struct
import zlib

PLACE = 15 * 512  # bytes; what an export notes of itself is in front of it (`note.py`)
SIZE = 512  # bytes
FIELDS = ("metadata_size", "table_offset", "journal_offset", "journal_size")
_MAGIC = b"FVDmoved"
_RECORD = struct.Struct("<8sqqqq")
_SUM = struct.Struct("<I")
_MARK = struct.Struct("<qqi")
_MARK_AT = 4284  # bytes; where journal_offset, journal_size and clean_shutdown are in the header


def is_moving(raw: bytes) -> bool:
    """Whether the header, as it is on disk, says that the record counts."""
    return _MARK.unpack_from(raw, _MARK_AT) == (PLACE, 0, 0)


def encode(fields: dict[str, int]) -> bytes:
    """The record that gives these values to `FIELDS`."""
    record = _RECORD.pack(_MAGIC, *(fields[name] for name in FIELDS))
    return (record + _SUM.pack(zlib.crc32(record))).ljust(SIZE, b"\0")


def decode(raw: bytes) -> dict[str, int] | None:
    """The fields in the record of a file that begins with these bytes; None where there is none that is whole."""
    sector = raw[PLACE : PLACE + SIZE]
    if not is_record(sector):
        return None
    return dict(zip(FIELDS, _RECORD.unpack_from(sector)[1:], strict=True))


def is_record(sector: bytes) -> bool:
    """Whether a sector is a record, and whole."""
    record = sector[: _RECORD.size]
    whole = (record + _SUM.pack(zlib.crc32(record))).ljust(SIZE, b"\0")
    return sector == whole and record.startswith(_MAGIC)
