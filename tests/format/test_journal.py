"""The journal: records, replay of good and bad ones, and what fvdfs writes, read by the reference reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdfs.alloc.table import Table, decode_entries, new_table
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.format.header import SECTOR, UNALLOCATED, Header, ceil_div, with_fields
from fvdfs.format.journal import (
    BITMAP_MAGIC,
    TABLE_MAGIC,
    BitmapRecord,
    Skipped,
    TableRecord,
    encode,
    merge,
    parse,
    replay,
)
from support import reference
from support.records import bits, entries, raw_entries

ROOM = 700  # chunks that the storage has room for

# 100 sectors of disk and 41 of base; blocks of four sectors, the last one partial; chunks of six.
BOTH = Header(
    all_data_in_fvd_img=0,
    virtual_disk_size=100 * SECTOR,
    base_img="base",
    base_img_size=41 * SECTOR,
    block_size=4 * SECTOR,
    compact_image=1,
    chunk_size=6 * SECTOR,
)
FLAT = with_fields(BOTH, compact_image=0)
COMPACT = with_fields(BOTH, all_data_in_fvd_img=1, base_img="")


def full(*records: bytes, fill: bytes = b"\0") -> bytes:
    """A sector that holds these records."""
    sector = b"".join(records).ljust(SECTOR, fill)
    assert len(sector) == SECTOR
    return sector


class Metadata:
    """A bitmap and a table as an image has them, nothing local, nothing allocated."""

    def __init__(self, header: Header, room: int = ROOM) -> None:
        self.header = header
        self.bitmap = Bitmap(bytes(bitmap_bytes(header.blocks)), header.blocks) if header.has_base else None
        self.table = Table(decode_entries(new_table(header.chunks)), header.chunks, room) if header.compact else None

    def replay(self, *sectors: bytes) -> list[Skipped]:
        return replay(b"".join(sectors), self.header, self.bitmap, self.table)

    @property
    def local(self) -> set[int]:
        assert self.bitmap is not None
        return {block for block in range(self.header.blocks) if self.bitmap.is_local(block)}

    @property
    def allocated(self) -> dict[int, int]:
        assert self.table is not None
        chunks = range(self.header.chunks)
        return {chunk: self.table[chunk] for chunk in chunks if self.table[chunk] != UNALLOCATED}


def place(skipped: list[Skipped]) -> list[tuple[int, int]]:
    return [(skip.sector, skip.offset) for skip in skipped]


# --- records --------------------------------------------------------------------------------------


def test_records_of_a_sector() -> None:
    sector = full(entries(7, 1, 2), entries(3, 9), bits(-5, 8), bits(1 << 40, 0xFFFFFFFF))
    assert list(parse(sector)) == [
        (0, TableRecord(7, (0x80000001, 0x80000002))),
        (20, TableRecord(3, (0x80000009,))),
        (36, BitmapRecord(8, -5)),
        (52, BitmapRecord(0xFFFFFFFF, 1 << 40)),
    ]


@pytest.mark.parametrize("end", [bytes(4), b"\xed\xb8\x2a\x3e", b"\xb4\xe6\xf7\xac", b"\xff" * 4])
def test_what_is_behind_the_records_is_garbage(end: bytes) -> None:
    """Whatever it is: records from before, or a guest's data that looks like them."""
    garbage = end + bits(0, 8) + entries(0, 1) + struct.pack("<III", TABLE_MAGIC, 0, 200)
    assert list(parse(full(bits(4, 1), garbage))) == [(0, BitmapRecord(1, 4))]
    assert list(parse(full(garbage, fill=b"\xed"))) == []
    metadata = Metadata(BOTH)
    assert metadata.replay(full(entries(0, 5), bits(0, 4), garbage)) == []
    assert (metadata.local, metadata.allocated) == ({0}, {0: 5})


def test_fullest_sectors() -> None:
    """125 entries, or 121 and a bitmap record, leave no room for a type that ends them."""
    sector = full(raw_entries(0, *range(125)))
    assert list(parse(sector)) == [(0, TableRecord(0, tuple(range(125))))]
    sector = full(raw_entries(0, *range(121)), bits(3, 4))
    assert list(parse(sector)) == [(0, TableRecord(0, tuple(range(121)))), (496, BitmapRecord(4, 3))]
    sector = full(*[bits(n, 1) for n in range(32)])
    assert list(parse(sector)) == [(16 * n, BitmapRecord(1, n)) for n in range(32)]


def test_empty_table_record() -> None:
    assert list(parse(full(entries(5), bits(0, 1)))) == [(0, TableRecord(5, ())), (12, BitmapRecord(1, 0))]


@pytest.mark.parametrize("count", [126, 127, 0x7FFFFFFF, 0xFFFFFFFF])
def test_table_record_longer_than_its_sector(count: int) -> None:
    record = struct.pack("<III", TABLE_MAGIC, 0, count)
    ((at, reason),) = parse(full(record))
    assert at == 0
    assert isinstance(reason, str)
    assert f"of {count} entries, which reaches past the sector" in reason


def test_table_record_longer_than_the_rest_of_its_sector() -> None:
    for count, fits in ((121, True), (122, False)):
        record = struct.pack("<III", TABLE_MAGIC, 0, count)
        _, (at, found) = parse(full(bits(0, 1), record))
        assert at == 16
        assert isinstance(found, TableRecord) == fits


@pytest.mark.parametrize(
    ("before", "magic", "reason"),
    [
        (122, BITMAP_MAGIC, "a bitmap record that reaches past the sector"),
        (124, BITMAP_MAGIC, "a bitmap record that reaches past the sector"),
        (123, TABLE_MAGIC, "a table record that reaches past the sector"),
        (124, TABLE_MAGIC, "a table record that reaches past the sector"),
    ],
)
def test_record_cut_by_the_end_of_its_sector(before: int, magic: int, reason: str) -> None:
    sector = full(raw_entries(0, *range(before)), struct.pack("<I", magic))
    assert list(parse(sector))[1:] == [(12 + 4 * before, reason)]


def test_last_records_that_fit() -> None:
    sector = full(raw_entries(0, *range(122)), entries(400), fill=b"?")
    assert list(parse(sector))[1:] == [(500, TableRecord(400, ()))]


# --- replay ---------------------------------------------------------------------------------------


def test_replay() -> None:
    metadata = Metadata(BOTH)
    assert metadata.replay(full(entries(1, 8), bits(8, 4)), full(entries(3, 2, 5))) == []
    assert metadata.local == {2}
    assert metadata.allocated == {1: 8, 3: 2, 4: 5}
    assert Metadata(BOTH).replay() == []


def test_replayed_bits_are_still_to_be_written() -> None:
    """They are true, but a crash would need the journal again until their page is written."""
    metadata = Metadata(FLAT)
    assert metadata.replay(full(bits(0, 4))) == []
    assert metadata.bitmap is not None
    assert metadata.bitmap.dirty_pages == 1


def test_empty_sectors_between_full_ones() -> None:
    metadata = Metadata(BOTH)
    sectors = full(bits(0, 4)), bytes(SECTOR), full(b"garbage!"), full(bits(8, 4))
    assert metadata.replay(*sectors) == []
    assert metadata.local == {0, 2}


def test_later_record_wins() -> None:
    metadata = Metadata(COMPACT)
    assert metadata.replay(full(entries(0, 5)), full(entries(0, 6)), full(entries(1, 5), entries(1, 7))) == []
    assert metadata.allocated == {0: 6, 1: 7}


def test_bit_31_of_entries_is_masked() -> None:
    metadata = Metadata(COMPACT)
    assert metadata.replay(full(raw_entries(0, 0x80000003, 4))) == []
    assert metadata.allocated == {0: 3, 1: 4}


def test_bits_of_every_block_that_the_sectors_touch() -> None:
    for first, count, blocks in ((0, 1, {0}), (3, 2, {0, 1}), (4, 4, {1}), (5, 3, {1}), (7, 6, {1, 2, 3}), (8, 0, {})):
        metadata = Metadata(FLAT)
        assert metadata.replay(full(bits(first, count))) == []
        assert metadata.local == set(blocks)


def test_bitmap_record_across_the_end_of_the_base_is_cut() -> None:
    for first, count, blocks in ((40, 1, {10}), (40, 60, {10}), (0, 100, set(range(11))), (36, 5, {9, 10})):
        metadata = Metadata(FLAT)
        assert metadata.replay(full(bits(first, count))) == []
        assert metadata.local == blocks


@pytest.mark.parametrize(("first", "count"), [(41, 1), (41, 59), (99, 1), (100, 0)])
def test_bitmap_record_past_the_base_is_normal(first: int, count: int) -> None:
    """Sector 41 is in the last block of the base, but past the base."""
    metadata = Metadata(FLAT)
    assert metadata.replay(full(bits(first, count), bits(0, 1))) == []
    assert metadata.local == {0}


BAD_RECORDS: dict[str, tuple[bytes, str]] = {
    "bitmap past the disk": (bits(99, 2), "of 2 sectors from 99 on a disk of 100"),
    "bitmap far past the disk": (bits(1 << 62, 0xFFFFFFFF), "on a disk of 100"),
    "bitmap longer than the disk": (bits(0, 101), "of 101 sectors from 0 on a disk of 100"),
    "first sector negative": (bits(-1, 8), "of 8 sectors from -1"),
    "first sector as negative as can be": (bits(-(1 << 63), 8), "from -9223372036854775808"),
    "table past the table": (entries(16, 90, 91), "entries 16..17 of a table of 17"),
    "table far past the table": (entries(0xFFFFFFFF, 90), "entries 4294967295..4294967295 of a table of 17"),
    "entry 0xFFFFFFFF": (raw_entries(2, 90, UNALLOCATED), "entry 3 is 0xFFFFFFFF"),
    "number used twice in the record": (entries(2, 90, 90), "occurs twice"),
    "number used twice": (entries(2, 90, 50), "entry 3 is 50, a chunk that is in use"),
    "number used twice, once in this sector": (entries(2, 51), "entry 2 is 51, a chunk that is in use"),
    "number past the storage": (entries(2, 90, ROOM), f"entry 3 is {ROOM}, but the storage ends"),
    "longer than the sector": (struct.pack("<III", TABLE_MAGIC, 2, 126), "of 126 entries, which reaches past"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_ends_its_sector_only(name: str) -> None:
    """What stands before it, and in other sectors, counts; the place is reported."""
    bad, reason = BAD_RECORDS[name]
    metadata = Metadata(BOTH)
    good = full(entries(0, 50), bits(0, 4))
    skipped = metadata.replay(good, full(entries(1, 51), bad, entries(5, 55), bits(24, 4)), full(entries(4, 54)))
    assert place(skipped) == [(1, 16)]
    assert reason in skipped[0].reason
    assert str(skipped[0]) == f"journal sector 1, byte 16: {skipped[0].reason}; skipped"
    assert metadata.allocated == {0: 50, 1: 51, 4: 54}
    assert metadata.local == {0}


@pytest.mark.parametrize(
    ("header", "bad", "reason"),
    [
        (COMPACT, bits(0, 4), "a bitmap record, but the image has no bitmap"),
        (FLAT, entries(0, 1), "a table record, but the image has no table"),
    ],
)
def test_record_of_a_kind_that_the_image_has_no_region_for(header: Header, bad: bytes, reason: str) -> None:
    metadata = Metadata(header)
    good = bits(0, 4) if header is FLAT else entries(0, 1)
    assert metadata.replay(full(bad, good), full(good), full(bad)) == [Skipped(0, 0, reason), Skipped(2, 0, reason)]
    if header is FLAT:
        assert metadata.local == {0}
    else:
        assert metadata.allocated == {0: 1}


def test_bitmap_records_from_before_the_base_was_let_go_are_normal() -> None:
    """The original leaves them in the journal."""
    header = with_fields(BOTH, all_data_in_fvd_img=1)
    metadata = Metadata(header)
    assert replay(full(entries(0, 1), bits(0, 4)), header, None, metadata.table) == []


def test_sectors_are_counted_from_the_first_of_the_journal() -> None:
    skipped = replay(bytes(SECTOR) + full(bits(-1, 1)), FLAT, Metadata(FLAT).bitmap, None, first_index=40)
    assert place(skipped) == [(41, 0)]


# --- what fvdfs writes ----------------------------------------------------------------------------


def numbered(header: Header, chunks: Sequence[int], room: int = ROOM) -> Table:
    """A table in which these chunks are allocated, in this order."""
    table = Table(decode_entries(new_table(header.chunks)), header.chunks, room)
    for chunk in chunks:
        table.allocate(chunk)
    return table


def test_bitmap_records_alone() -> None:
    """One sector a range, zeros behind it; nothing past the base."""
    sectors = encode(FLAT, None, [(0, 2), (10, 11)], [])
    assert sectors == [full(bits(0, 8)), full(bits(40, 1))]
    assert encode(FLAT, None, [], []) == []


def test_bitmap_record_has_room_for_a_count_of_32_bits() -> None:
    """More sectors take more records, cut at a block."""
    blocks = 3 << 20
    size = blocks * 5 * (1 << 20)
    header = with_fields(FLAT, virtual_disk_size=size, base_img_size=size - SECTOR, block_size=5 << 20)
    sectors = encode(header, None, [(1, blocks)], [])
    most = 0xFFFFFFFF // 10240 * 10240
    total = size // SECTOR - 1
    starts = range(10240, total, most)
    assert sectors == [full(bits(start, min(most, total - start))) for start in starts]
    assert len(starts) == 8
    exactly = with_fields(header, block_size=SECTOR)
    assert encode(exactly, None, [(0, 0xFFFFFFFF)], []) == [full(bits(0, 0xFFFFFFFF))]
    assert encode(exactly, None, [(0, 1 << 32)], []) == [full(bits(0, 0xFFFFFFFF)), full(bits(0xFFFFFFFF, 1))]


def test_bits_and_all_their_chunks_stand_in_one_sector() -> None:
    """Blocks 1 and 2, sectors 4 to 11, lie in chunks 0 and 1; the known ones are named too."""
    table = numbered(BOTH, [1, 0, 9])
    assert encode(BOTH, table, [(1, 3)], [1]) == [full(raw_entries(0, 1, 0), bits(4, 8))]
    assert encode(BOTH, table, [(1, 2)], [9]) == [full(raw_entries(0, 1, 0), bits(4, 4)), full(raw_entries(9, 2))]


def test_chunks_under_the_last_block_end_where_the_base_does() -> None:
    """Block 10 has sector 40 only, in chunk 6; chunk 7, under the rest of the block, need not be there."""
    table = numbered(BOTH, [6])
    assert encode(BOTH, table, [(10, 11)], [6]) == [full(raw_entries(6, 0), bits(40, 1))]


def test_chunks_past_the_base_share_sectors() -> None:
    table = numbered(BOTH, [7, 8, 10, 12, 13])
    records = raw_entries(7, 0, 1), raw_entries(10, 2), raw_entries(12, 3, 4)
    assert encode(BOTH, table, [], [7, 8, 10, 12, 13]) == [full(*records)]


def test_block_over_a_chunk_without_a_place() -> None:
    """The original leaves a bit so where the base was zero; no sector could show it, so pages have to be written."""
    assert encode(BOTH, numbered(BOTH, [1]), [(2, 3)], [1]) == [full(raw_entries(1, 0), bits(8, 4))]
    assert encode(BOTH, numbered(BOTH, [1]), [(1, 2)], [1]) is None
    assert encode(BOTH, numbered(BOTH, [0]), [(1, 2)], [0]) is None
    assert encode(BOTH, numbered(BOTH, [1]), [(2, 3), (5, 6)], [1]) is None


def test_chunk_without_a_place_is_not_recorded() -> None:
    with pytest.raises(AssertionError):
        encode(BOTH, numbered(BOTH, [7]), [], [7, 8])


def test_sector_is_filled_to_its_last_byte() -> None:
    """125 entries without a bitmap; 121 beside a bitmap record, or where one could be."""
    compact = with_fields(COMPACT, virtual_disk_size=400 * SECTOR, chunk_size=SECTOR)
    table = numbered(compact, range(400))
    assert encode(compact, table, [], range(250)) == [
        full(raw_entries(0, *range(125))),
        full(raw_entries(125, *range(125, 250))),
    ]
    both = with_fields(
        BOTH, virtual_disk_size=400 * SECTOR, base_img_size=242 * SECTOR, block_size=SECTOR, chunk_size=SECTOR
    )
    assert encode(both, table, [(0, 242)], range(364)) == [
        full(raw_entries(0, *range(121)), bits(0, 121)),
        full(raw_entries(121, *range(121, 242)), bits(121, 121)),
        full(raw_entries(242, *range(242, 363))),
        full(raw_entries(363, 363)),
    ]
    prefetched = with_fields(both, all_data_in_fvd_img=1)  # still an image with a bitmap, to the original
    assert encode(prefetched, table, [], range(122)) == [full(raw_entries(0, *range(121))), full(raw_entries(121, 121))]


def test_single_entries_fill_sectors() -> None:
    """16 bytes each: 32 fit a sector without a bitmap, and 31 where a bitmap record could follow."""
    compact = with_fields(COMPACT, virtual_disk_size=400 * SECTOR, chunk_size=SECTOR)
    chunks = range(0, 68, 2)
    table = numbered(compact, chunks)
    records = [raw_entries(chunk, chunk // 2) for chunk in chunks]
    assert encode(compact, table, [], chunks) == [full(*records[:32]), full(*records[32:])]
    both = with_fields(compact, base_img="base", all_data_in_fvd_img=0, base_img_size=0, block_size=SECTOR)
    assert encode(both, table, [], chunks) == [full(*records[:31]), full(*records[31:])]


def test_room_for_a_record_but_for_no_entry_is_left() -> None:
    compact = with_fields(COMPACT, virtual_disk_size=400 * SECTOR, chunk_size=SECTOR)
    chunks = [*range(122), 200]
    table = numbered(compact, chunks)
    assert encode(compact, table, [], chunks) == [full(raw_entries(0, *range(122))), full(raw_entries(200, 122))]


def test_record_is_cut_where_the_sector_ends() -> None:
    """The rest of a run goes to the next sector; room for one entry is used."""
    compact = with_fields(COMPACT, virtual_disk_size=400 * SECTOR, chunk_size=SECTOR)
    chunks = [*range(121), 200, 201, 202, *range(300, 303)]
    table = numbered(compact, chunks)
    assert encode(compact, table, [], chunks) == [
        full(raw_entries(0, *range(121)), raw_entries(200, 121)),
        full(raw_entries(201, 122, 123), raw_entries(300, 124, 125, 126)),
    ]


BLOCK_OVER_CHUNKS = with_fields(
    BOTH, virtual_disk_size=500 * SECTOR, base_img_size=500 * SECTOR, block_size=121 * SECTOR, chunk_size=SECTOR
)


def test_block_over_as_many_chunks_as_a_sector_holds() -> None:
    table = numbered(BLOCK_OVER_CHUNKS, range(500))
    sectors = encode(BLOCK_OVER_CHUNKS, table, [(0, 5)], [])
    assert sectors is not None
    assert sectors[:2] == [
        full(raw_entries(0, *range(121)), bits(0, 121)),
        full(raw_entries(121, *range(121, 242)), bits(121, 121)),
    ]
    assert sectors[4:] == [full(raw_entries(484, *range(484, 500)), bits(484, 16))]


def test_block_over_more_chunks_than_a_sector_holds() -> None:
    """No sector could stand alone; but a last block that the base cuts short may fit."""
    larger = with_fields(BLOCK_OVER_CHUNKS, block_size=122 * SECTOR)
    table = numbered(larger, range(500))
    assert encode(larger, table, [(0, 1)], []) is None
    assert encode(larger, table, [(1, 5)], []) is None
    assert encode(larger, table, [(4, 5)], []) == [full(raw_entries(488, *range(488, 500)), bits(488, 12))]
    just = with_fields(larger, base_img_size=121 * SECTOR)
    assert encode(just, table, [(0, 1)], []) == [full(raw_entries(0, *range(121)), bits(0, 121))]
    astride = with_fields(BLOCK_OVER_CHUNKS, block_size=241 * SECTOR, chunk_size=2 * SECTOR)
    table = numbered(astride, range(250))
    assert encode(astride, table, [(0, 1)], []) == [full(raw_entries(0, *range(121)), bits(0, 241))]
    assert encode(astride, table, [(1, 2)], []) == [full(raw_entries(120, *range(120, 241)), bits(241, 241))]
    astride = with_fields(astride, block_size=242 * SECTOR)
    assert encode(astride, table, [(0, 1)], []) == [full(raw_entries(0, *range(121)), bits(0, 242))]
    astride = with_fields(astride, block_size=243 * SECTOR)
    assert encode(astride, table, [(0, 1)], []) is None


def test_more_sectors_of_disk_than_a_bitmap_record_counts() -> None:
    """Only with huge chunks; cutting there would need no more than chunks known already, but is not worth it."""
    size = (1 << 33) * SECTOR
    header = with_fields(BOTH, virtual_disk_size=size, base_img_size=size, block_size=1 << 30, chunk_size=1 << 40)
    table = numbered(header, range(4))
    assert encode(header, table, [(0, 2047)], []) == [full(raw_entries(0, 0, 1), bits(0, 2047 << 21))]
    assert encode(header, table, [(0, 2048)], []) is None


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([], []),
        ([(1, 2)], [(1, 2)]),
        ([(3, 4), (1, 2)], [(1, 2), (3, 4)]),
        ([(2, 3), (1, 2)], [(1, 3)]),
        ([(1, 9), (2, 3)], [(1, 9)]),
        ([(1, 5), (4, 9), (9, 10), (20, 30)], [(1, 10), (20, 30)]),
        ([(1, 5), (1, 5), (1, 4), (1, 7)], [(1, 7)]),
    ],
)
def test_merge(ranges: list[tuple[int, int]], merged: list[tuple[int, int]]) -> None:
    assert merge(ranges) == merged
    assert merge(iter(ranges)) == merged


# --- any layout -----------------------------------------------------------------------------------


def layout(header: Header) -> reference.Image:
    """The image of the reference reader with this layout: nothing local, nothing allocated."""
    other = reference.Header.__new__(reference.Header)
    other.blocks, other.chunks = header.blocks, header.chunks
    other.base_size = header.base_size
    other.set(
        virtual_disk_size=header.virtual_disk_size,
        base_img_size=header.base_img_size,
        bitmap_size=bitmap_bytes(header.blocks) if header.has_base else 0,
        block_size=header.block_size,
        chunk_size=header.chunk_size,
    )
    image = reference.Image.__new__(reference.Image)
    image.header = other
    image.bitmap = bytearray(bitmap_bytes(header.blocks))
    image.table = [reference.MISSING] * header.chunks
    image.owner, image.reports, image.journal = {}, [], b""
    image.storage_length = ROOM * header.chunk_size
    return image


def replay_by_reference(header: Header, sectors: Sequence[bytes]) -> tuple[set[int], dict[int, int], list[str]]:
    """Local blocks, entries, and reports of the reference reader after a replay."""
    image = layout(header)
    image.journal = b"".join(sectors)
    image.replay()
    local = {block for block in range(header.blocks) if image.bit(block)}
    return local, {c: n for c, n in enumerate(image.table) if n != reference.MISSING}, image.reports


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Layouts with odd blocks, larger than chunks or astride them, and a base that ends anywhere."""
    size = draw(st.integers(1, 600))
    chunk = draw(st.sampled_from([1, 1, 2, 3, 5, 8, 40]))
    block = draw(st.sampled_from([1, 2, 3, 7, 8, 60, 121, 122, 130, 250]))
    header = with_fields(
        BOTH,
        virtual_disk_size=size * SECTOR,
        base_img_size=draw(st.integers(1, size) | st.just(size)) * SECTOR,
        block_size=block * SECTOR,
        chunk_size=chunk * SECTOR,
    )
    kind = draw(st.sampled_from(["both", "both", "both", "flat", "compact"]))
    if kind == "flat":
        return with_fields(header, compact_image=0)
    if kind == "compact":
        return with_fields(header, all_data_in_fvd_img=1, base_img="", base_img_size=0, block_size=0)
    return header


def chunks_under(header: Header, block: int) -> range:
    """The chunks that hold a block's bytes below the end of the base."""
    start, stop = block * header.block_size, min((block + 1) * header.block_size, header.base_img_size)
    return range(start // header.chunk_size, ceil_div(stop, header.chunk_size))


@dataclass
class Commit:
    """What a commit has to show: blocks that became local, chunks that were allocated for them or else."""

    header: Header
    blocks: list[tuple[int, int]]
    chunks: list[int]
    table: Table | None


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    header = draw(headers())
    blocks: list[tuple[int, int]] = []
    if header.blocks:
        starts = draw(st.lists(st.integers(0, header.blocks - 1), max_size=5))
        lengths = st.integers(1, 4) | st.integers(1, header.blocks)
        blocks = merge((start, min(start + draw(lengths), header.blocks)) for start in starts)
    if not header.compact:
        return Commit(header, blocks, [], None)
    some = st.sets(st.integers(0, header.chunks - 1), max_size=8)
    new, known = draw(some), draw(some)
    if draw(st.booleans()):
        first = draw(st.integers(0, header.chunks - 1))
        new |= set(range(first, draw(st.integers(first, header.chunks))))
    under = {chunk for first, end in blocks for block in range(first, end) for chunk in chunks_under(header, block)}
    new |= under - known
    new -= known
    order = list(draw(st.permutations(sorted(new | known)))) if len(new) < 20 else sorted(new | known, reverse=True)
    return Commit(header, blocks, sorted(new), numbered(header, order))


@settings(max_examples=300, deadline=None)
@given(commits(), st.data())
def test_what_is_written_is_what_a_replay_finds(commit: Commit, data: st.DataObject) -> None:
    header = commit.header
    blocks = {block for first, end in commit.blocks for block in range(first, end)}
    sectors = encode(header, commit.table, commit.blocks, commit.chunks)
    if sectors is None:
        assert max(len(chunks_under(header, block)) for block in blocks) > 121
        return
    assert all(len(sector) == SECTOR for sector in sectors)
    assert not (header.compact and blocks) or max(len(chunks_under(header, block)) for block in blocks) <= 121
    metadata = Metadata(header)
    assert metadata.replay(*sectors) == []
    # The reference reader finds the same, and nothing to complain of: bytes behind the records, a
    # record behind a bitmap record, a bitmap record without the entries of its chunks.
    local, allocated, reports = replay_by_reference(header, sectors)
    assert reports == []
    if header.has_base:
        assert metadata.local == local == blocks
    if commit.table is not None:
        under = {chunk for block in blocks for chunk in chunks_under(header, block)}
        table = commit.table
        assert metadata.allocated == allocated == {chunk: table[chunk] for chunk in under | set(commit.chunks)}
    if header.has_base and header.compact:
        some = data.draw(st.lists(st.sampled_from(sectors), unique=True)) if sectors else []
        for chosen in (some, *[[sector] for sector in sectors]):
            partial = Metadata(header)
            assert partial.replay(*chosen) == []
            assert partial.local <= blocks
            for block in partial.local:
                assert set(chunks_under(header, block)) <= set(partial.allocated)


@st.composite
def records(draw: st.DrawFn, header: Header) -> bytes:
    """A record that is good, or somewhat out of range, or garbage."""
    sectors, chunks = header.virtual_disk_size // SECTOR, header.chunks
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from([bytes(4), b"\xed\xb8\x2a", struct.pack("<III", TABLE_MAGIC, 0, 1 << 31)]))
    if kind < 5:
        first = draw(st.integers(-2, sectors + 2) | st.sampled_from([-(1 << 63), (1 << 63) - 1]))
        return bits(first, draw(st.integers(0, sectors + 2) | st.just(0xFFFFFFFF)))
    first = draw(st.integers(0, chunks + 1) | st.just(0xFFFFFFFF))
    number = st.integers(0, 12) | st.integers(ROOM - 2, ROOM + 1) | st.just(0x7FFFFFFF)
    entry = st.builds(lambda number, flag: number | flag << 31, number, st.integers(0, 1))
    return raw_entries(first, *draw(st.lists(entry, max_size=5)))


fills = st.sampled_from([b"\0", b"?"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_replay_of_anything_agrees_with_the_reference_reader(data: st.DataObject) -> None:
    header = data.draw(st.sampled_from([BOTH, FLAT, COMPACT, with_fields(BOTH, block_size=20 * SECTOR)]))
    contents = st.lists(records(header), max_size=6)
    sectors = data.draw(
        st.lists(st.builds(lambda c, fill: full(*c, fill=fill), contents, fills), min_size=1, max_size=4)
    )
    metadata = Metadata(header)
    skipped = metadata.replay(*sectors)
    local, allocated, reports = replay_by_reference(header, sectors)
    if header.has_base:
        assert metadata.local == local
    if header.compact:
        assert metadata.allocated == allocated
    remarks = ("empty record", reference.GARBAGE, "follows a bitmap record", "without the entries", "changes: ")
    bad = [report.partition(":")[0] for report in reports if not any(remark in report for remark in remarks)]
    assert [f"journal sector {skip.sector}" for skip in skipped] == bad


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda r: (r[0], r[0] + r[1]))))
def test_merge_keeps_every_number_and_leaves_gaps(ranges: list[tuple[int, int]]) -> None:
    merged = merge(ranges)
    assert {n for r in merged for n in range(*r)} == {n for r in ranges for n in range(*r)}
    assert all(stop < start for (_, stop), (start, _) in pairwise(merged))


def test_many_records_of_the_same_blocks_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small image could keep all others waiting for minutes."""
    calls: list[tuple[int, int]] = []
    set_local = Bitmap.set_local

    def counted(self: Bitmap, start: int, stop: int) -> None:
        calls.append((start, stop))
        set_local(self, start, stop)

    monkeypatch.setattr(Bitmap, "set_local", counted)
    metadata = Metadata(FLAT)
    records = [bits(4 * n, 1) + bits(0, 16) + bits(0, 4 * n + 1) for n in range(10)]
    assert metadata.replay(*[full(record * 10) for record in records]) == []
    assert metadata.local == set(range(10))
    assert calls == [(0, 10)]


def test_sector_must_be_whole() -> None:
    with pytest.raises(AssertionError):
        list(parse(bytes(SECTOR - 1)))
