"""The journal: records of bitmap bits and table entries that became true since both were written.

It is an array of independent 512-byte sectors, each written whole or not at all; there is no checksum.
A sector holds records, packed from its start, up to a word that is no record's magic, or its end
(format.md, "Journal"):

    bitmap record  u32 0x3F2AB8ED | u32 number of sectors | i64 first sector   (16 bytes)
    table record   u32 0xB4E6F7AC | u32 first entry | u32 n | n * u32 entries  (12 + 4n bytes)

fvdfs writes only what the original can replay:

- A bitmap record is the last of its sector. fvdfs fills the rest of a sector with zeros.
- Where an image has both regions, bits and the entries of all chunks under these blocks are in one
  sector, so that a bit never becomes visible without its chunk. A range of more blocks than fit is cut
  at a block, and the chunk under the cut is in both sectors. A layout where one block lies over more
  than 121 chunks cannot be journaled: `encode` says so, and the caller writes the table, then the
  bitmap.
- Entries of chunks past the base need no bitmap record; several table records may share a sector.

Each session starts at the first sector; sectors of earlier ones stay and are replayed too. This is
harmless because bits only get set and entries never change. Whatever breaks this (a smaller disk) must
clear the journal first.

Replay trusts nothing: a record that is out of range, or contradicts what is known, is skipped with the
rest of its sector, and reported with its place; other sectors count (format.md, "Beyond the original").

Pure: bytes in, decisions out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fvdfs.format.header import ENTRIES_WITH_BITMAP_RECORD, SECTOR, UNALLOCATED, Header, ceil_div

BITMAP_MAGIC = 0x3F2AB8ED
TABLE_MAGIC = 0xB4E6F7AC
_WORD = struct.Struct("<I")
_BITMAP = struct.Struct("<IIq")
_TABLE = struct.Struct("<III")
MAX_RECORD_SECTORS = (1 << 32) - 1  # sectors of the disk in one bitmap record: what its field holds

Range = tuple[int, int]
"""Half-open: [start, stop)."""


class Bits(Protocol):
    """A bitmap that records are replayed into."""

    def set_local(self, start: int, stop: int) -> None:
        """Blocks [start, stop) are local."""


class Entries(Protocol):
    """A chunk table whose entries are recorded, and that records are replayed into."""

    def __getitem__(self, chunk: int) -> int:
        """The number of the chunk in the storage, or UNALLOCATED."""

    def on_disk(self, chunk: int) -> int:
        """The entry of a chunk that has a place, as it belongs on disk."""

    def replay(self, first: int, entries: Sequence[int]) -> str | None:
        """Take over the entries from `first` on, or none of them; why not."""


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """All blocks of the base's range that these sectors of the disk touch are local."""

    sectors: int
    first_sector: int


@dataclass(frozen=True, slots=True)
class TableRecord:
    """Entries of the chunk table from `first` on."""

    first: int
    entries: tuple[int, ...]


Record = BitmapRecord | TableRecord


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that replay passed over, with the rest of its sector."""

    sector: int
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"journal sector {self.sector}, byte {self.offset}: {self.reason}; skipped"


# --- reading ------------------------------------------------------------------------------------


def parse(sector: bytes) -> Iterator[tuple[int, Record | str]]:
    """The records of a sector as (byte offset, record); the first bad one ends them, as (byte offset, why)."""
    assert len(sector) == SECTOR
    at = 0
    while at + _WORD.size <= SECTOR:
        (magic,) = _WORD.unpack_from(sector, at)
        if magic == BITMAP_MAGIC:
            if at + _BITMAP.size > SECTOR:
                yield at, "a bitmap record that reaches past the sector"
                return
            _, sectors, first = _BITMAP.unpack_from(sector, at)
            yield at, BitmapRecord(sectors, first)
            at += _BITMAP.size
        elif magic == TABLE_MAGIC:
            if at + _TABLE.size > SECTOR:
                yield at, "a table record that reaches past the sector"
                return
            _, first, count = _TABLE.unpack_from(sector, at)
            end = at + _TABLE.size + 4 * count
            if end > SECTOR:
                yield at, f"a table record of {count} entries, which reaches past the sector"
                return
            yield at, TableRecord(first, struct.unpack_from(f"<{count}I", sector, at + _TABLE.size))
            at = end
        else:
            return


def replay(
    sectors: bytes, header: Header, bitmap: Bits | None, table: Entries | None, first_index: int = 0
) -> list[Skipped]:
    """Apply journal sectors, in order, to bitmap and table; the records that were skipped.

    `sectors`: a part of the journal, whole sectors from number `first_index` on.
    """
    skipped = []
    blocks: list[Range] = []  # merged and set at the end: a million records may name the same blocks
    for base in range(0, len(sectors), SECTOR):
        sector = sectors[base : base + SECTOR]
        for offset, record in parse(sector):
            if isinstance(record, BitmapRecord):
                problem = _blocks_of(record, header, bitmap, blocks)
            elif isinstance(record, TableRecord):
                problem = (
                    "a table record, but the image has no table"
                    if table is None
                    else table.replay(record.first, record.entries)
                )
            else:
                problem = record
            if problem:
                skipped.append(Skipped(first_index + base // SECTOR, offset, problem))
                break
    if bitmap is not None:
        for start, stop in merge(blocks):
            bitmap.set_local(start, stop)
    return skipped


def _blocks_of(record: BitmapRecord, header: Header, bitmap: Bits | None, blocks: list[Range]) -> str | None:
    """Add the blocks of the record to the list; if it is bad, why."""
    if bitmap is None:
        if header.base_img:
            return None  # from before all of its base was local
        return "a bitmap record, but the image has no bitmap"
    start = record.first_sector * SECTOR
    stop = start + record.sectors * SECTOR
    # A disk that the original has made smaller keeps records of what was past its new end.
    if start < 0 or stop > max(header.virtual_disk_size, header.base_img_size):
        return (
            f"a bitmap record of {record.sectors} sectors from {record.first_sector} on a disk of "
            f"{header.virtual_disk_size // SECTOR}"
        )
    stop = min(stop, header.base_size)
    if start < stop:
        blocks.append((start // header.block_size, ceil_div(stop, header.block_size)))
    return None


# --- writing ------------------------------------------------------------------------------------


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The ranges in order, overlapping and adjacent ones joined."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            if stop > merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def encode(header: Header, table: Entries | None, blocks: Sequence[Range], chunks: Sequence[int]) -> list[bytes] | None:
    """The sectors that record these blocks as local and these chunks as allocated.

    `blocks`: merged ranges; `chunks`: in ascending order. None where the layout needs more than one sector for
    what must become visible together.
    """
    if table is None:
        return [_pad(record) for start, stop in blocks for record in _bitmap_records(header, start, stop)]
    sectors = []
    covered: set[int] = set()
    for start, stop in blocks:
        while start < stop:
            first = start * header.block_size // header.chunk_size
            limit = (first + ENTRIES_WITH_BITMAP_RECORD) * header.chunk_size
            end = min(stop * header.block_size, header.base_size)
            cut = stop
            if end > limit:
                cut = limit // header.block_size
                end = cut * header.block_size
                if cut <= start:
                    return None
            last = (end - 1) // header.chunk_size
            if any(table[chunk] == UNALLOCATED for chunk in range(first, last + 1)):
                return None  # the original can leave a bit over a chunk that is not allocated, over zeros
            records = list(_bitmap_records(header, start, cut))
            if len(records) > 1:
                return None  # more than 2 TiB in one sector, which takes chunks of more than 16 GiB
            sectors.append(_pad(_table_record(table, first, last) + records[0]))
            covered.update(range(first, last + 1))
            start = cut
    # Where a bitmap record could follow, the original leaves room for one.
    space = SECTOR - _BITMAP.size if header.base_img else SECTOR
    sectors += _table_sectors(table, [chunk for chunk in chunks if chunk not in covered], space)
    return sectors


def _bitmap_records(header: Header, start: int, stop: int) -> Iterator[bytes]:
    """Bitmap records for blocks [start, stop)."""
    first = start * header.block_size // SECTOR
    end = min(stop * header.block_size, header.base_size) // SECTOR
    unit = header.block_size // SECTOR
    while first < end:
        count = min(end - first, MAX_RECORD_SECTORS // unit * unit)
        yield _BITMAP.pack(BITMAP_MAGIC, count, first)
        first += count


def _table_record(table: Entries, first: int, last: int) -> bytes:
    chunks = range(first, last + 1)
    assert all(table[chunk] != UNALLOCATED for chunk in chunks), "a block is local, but its chunk has no place"
    entries = [table.on_disk(chunk) for chunk in chunks]
    return struct.pack(f"<III{len(entries)}I", TABLE_MAGIC, first, len(entries), *entries)


def _table_sectors(table: Entries, chunks: Sequence[int], space: int) -> list[bytes]:
    """Sectors with table records of these chunks, at most `space` bytes of records each."""
    sectors: list[bytes] = []
    current = b""
    at = 0
    while at < len(chunks):
        room = (space - len(current) - _TABLE.size) // 4
        if room < 1:
            sectors.append(_pad(current))
            current = b""
            continue
        end = at + 1
        while end < len(chunks) and end - at < room and chunks[end] == chunks[at] + end - at:
            end += 1
        current += _table_record(table, chunks[at], chunks[end - 1])
        at = end
    if current:
        sectors.append(_pad(current))
    return sectors


def _pad(records: bytes) -> bytes:
    return records.ljust(SECTOR, b"\0")
