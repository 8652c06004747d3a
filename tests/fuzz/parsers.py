"""Fuzz targets without I/O: header, bitmap, chunk table, journal.

Each takes bytes, makes an input of them (`source.py`), and gives it to the parser. `FvdError` is how a
parser refuses; anything else that it raises is a defect, and so is an answer that differs from what the
target computes by itself, in the plainest way, or from what the reference reader says. The result is
whether the input was accepted.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import cast

from fuzz.layouts import HEADERS, RAW_HEADERS, patch
from fuzz.source import Source
from fvdfs.alloc.table import ENTRIES_PER_PAGE, NOT_JOURNALED, Table, decode_entries
from fvdfs.commands.info import fields
from fvdfs.cow.bitmap import BLOCKS_PER_PAGE, Bitmap, bitmap_bytes
from fvdfs.errors import FormatError, FvdError
from fvdfs.format.header import HEADER_SIZE, MAX_DISK_SIZE, PAGE, SECTOR, UNALLOCATED, Header, ceil_div, with_fields
from fvdfs.format.journal import BITMAP_MAGIC, TABLE_MAGIC, encode, merge, parse, replay
from support import reference

NAME = "disk.fvd"


class HeldFile:
    """What the reference reader needs of a path, for bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self._data)


# --- header ---------------------------------------------------------------------------------------


def fuzz_header(data: bytes) -> bool:
    """Decoding, checking, and all that is derived from the fields."""
    source = Source(data)
    kind = source.byte()
    if kind == 255:
        raw = source.rest()
        length = len(raw)
    else:
        template = RAW_HEADERS[kind % len(RAW_HEADERS)]
        length = 24576 + source.byte() * 512 if kind < 128 else source.number(source.byte() % 9)
        changed = bytearray(template)
        patch(source, changed, length)
        raw = bytes(changed)
    try:
        header = Header.decode(raw, NAME)
    except FvdError as error:
        assert "\n" not in str(error)
        return False
    assert Header.decode(header.encode(), NAME) == header
    _compare_with_reference(header, raw)
    try:
        header.check(NAME, length)
    except FormatError as error:
        assert "\n" not in str(error)
        return False
    check_header(header, length)
    return True


def _compare_with_reference(header: Header, raw: bytes) -> None:
    other = reference.Header(cast(Path, HeldFile(raw)))
    for name, value in fields(header).items():
        assert value == (other.text[name] if isinstance(value, str) else getattr(other, name)), name


def check_header(header: Header, length: int) -> None:
    """What must hold of a header that was accepted for a file of this length."""
    assert 0 <= header.virtual_disk_size <= MAX_DISK_SIZE
    assert header.virtual_disk_size % SECTOR == 0
    used = [(0, HEADER_SIZE)]
    if header.has_base:
        assert 0 <= header.base_size <= header.virtual_disk_size
        assert (header.blocks - 1) * header.block_size < header.base_size <= header.blocks * header.block_size
        used.append((header.bitmap_offset, ceil_div(header.blocks, 8)))
    if header.compact:
        size = header.chunk_size
        assert (header.chunks - 1) * size < header.virtual_disk_size <= header.chunks * size
        used.append((header.table_offset, 4 * header.chunks))
        assert header.table_capacity >= 0
        full = with_fields(header, virtual_disk_size=header.table_capacity * size)
        if header.virtual_disk_size < full.virtual_disk_size <= MAX_DISK_SIZE:
            full.check(NAME, MAX_DISK_SIZE)
    if header.journal_region is not None:
        used.append((header.journal_offset, header.journal_size))
    regions = {(region.offset, region.size) for region in header.regions()}
    assert len(regions) == len(used) - 1
    for offset, size in regions:
        assert HEADER_SIZE <= offset <= offset + size <= length
        assert any(offset == used_offset and size >= used_size for used_offset, used_size in used[1:])
    assert header.data_offset >= 0
    ends = sorted([*regions, (0, HEADER_SIZE), *([] if header.data_file else [(header.metadata_size, 0)])])
    for (offset, size), (following, _) in pairwise(ends):
        assert offset + size <= following


# --- bitmap ---------------------------------------------------------------------------------------


def fuzz_bitmap(data: bytes) -> bool:
    """Any contents, any operations; against two integers of as many bits."""
    source = Source(data)
    pages = 1 + source.byte() % 3
    fill = source.pick((b"\0", b"\xff", b"\xa5"))
    content = bytearray(fill * (pages * PAGE))
    for _ in range(source.byte() % 4):
        at = source.number(2) % len(content)
        piece = source.take(source.byte() % 12)[: len(content) - at]
        content[at : at + len(piece)] = piece
    blocks = pages * BLOCKS_PER_PAGE - source.number(source.byte() % 3)
    blocks = max(0, blocks)
    bitmap = Bitmap(bytes(content), blocks)
    local_bits = committed = int.from_bytes(content, "little")
    dirty = set[int]()
    taken: list[tuple[int, bytes]] = []

    def some_range() -> tuple[int, int]:
        first = source.number(2) % (blocks + 1)
        span = source.number(2) if source.byte() & 1 else source.byte() % 20
        return first, min(blocks, first + span)

    def mask(first: int, stop: int) -> int:
        return (1 << stop) - (1 << first)

    for _ in range(source.byte() % 12):
        kind = source.byte() % 8
        first, stop = some_range()
        bits = mask(first, stop)
        if kind == 0:
            bitmap.set_local(first, stop)
            local_bits |= bits
            dirty |= {
                page for page in range(pages) if mask(page * BLOCKS_PER_PAGE, (page + 1) * BLOCKS_PER_PAGE) & bits
            }
        elif kind == 1:
            if local_bits & bits == bits:
                bitmap.mark_committed(first, stop)
                committed |= bits
        elif kind == 2:
            taken = bitmap.take_dirty_pages()
            assert [page for page, _ in taken] == sorted(dirty)
            for page, piece in taken:
                assert piece == (local_bits >> page * 8 * PAGE & (1 << 8 * PAGE) - 1).to_bytes(PAGE, "little")
            dirty.clear()
        elif kind == 3:
            bitmap.pages_written(taken)
            for page, piece in taken:
                committed |= int.from_bytes(piece, "little") << page * 8 * PAGE
            taken = []
        elif kind == 4:
            bitmap.pages_not_written(taken)
            dirty |= {page for page, _ in taken}
            taken = []
        elif kind == 5 and not taken:
            bitmap.shrink(first)
            gone = local_bits >> first << first  # bits past the end of the blocks, too
            if gone:
                lowest, highest = (gone & -gone).bit_length() - 1, gone.bit_length() - 1
                dirty |= set(range(lowest // BLOCKS_PER_PAGE, highest // BLOCKS_PER_PAGE + 1))
            local_bits, committed, blocks = local_bits ^ gone, committed & mask(0, first), first
        elif kind == 6:
            runs = list(bitmap.block_runs(first, stop)) if stop - first < 4096 else []
            for start, end, local in runs:
                assert first <= start < end <= stop
                assert local_bits & mask(start, end) == (mask(start, end) if local else 0)
            for (_, end, local), (start, _, other) in pairwise(runs):
                assert end == start
                assert local != other
            assert not runs or (runs[0][0], runs[-1][1]) == (first, stop)
        else:
            assert bitmap.all_local(first, stop) == (local_bits & bits == bits)
            assert bitmap.none_local(first, stop) == (local_bits & bits == 0)
            assert bitmap.all_committed(first, stop) == (committed & bits == bits)
            if first < blocks:
                assert bitmap.is_local(first) == bool(local_bits >> first & 1)
        assert bitmap.dirty_pages == len(dirty)
    assert bitmap.count_local() == (local_bits & mask(0, blocks)).bit_count()
    return True


# --- table ----------------------------------------------------------------------------------------


def some_entry(source: Source) -> int:
    """An entry of a table: mostly a small number, some of them "not yet journaled"."""
    code = source.byte()
    if code < 224:
        return code
    if code < 248:
        return code - 224 | NOT_JOURNALED
    return (UNALLOCATED, UNALLOCATED, 0x7FFFFFFF, 0x7FFFFFFE, 0xFFFFFFFE, 700, 701, source.number(4))[code - 248]


def some_table(source: Source, chunks: int) -> list[int]:
    """A table whose first entries the source decides, and a few behind them."""
    listed = [some_entry(source) for _ in range(source.byte() % 24)][:chunks]
    listed += [UNALLOCATED] * (chunks - len(listed))
    for _ in range(source.byte() % 3 if chunks else 0):
        listed[source.number(2) % chunks] = some_entry(source)
    return listed


def fuzz_table(data: bytes) -> bool:
    """Any contents, records and growth; against lists."""
    source = Source(data)
    kind = source.byte()
    chunks = kind % 32 if kind < 252 else ENTRIES_PER_PAGE + kind - 253
    room = source.pick((0, 1, 8, 200, 701, 4096)) + source.byte() % 3
    entries = some_table(source, chunks)
    raw = struct.pack(f"<{chunks}I", *entries)
    tail = source.pick((b"", b"\xff" * (-len(raw) % PAGE), bytes(-len(raw) % PAGE), bytes(PAGE)))
    table = Table(decode_entries(raw + tail), chunks, room)
    entries = [entry if entry == UNALLOCATED else entry & ~NOT_JOURNALED for entry in entries]
    _check_table(table, entries, room)
    times = Counter(entries)
    assert table.shared == {c for c, n in enumerate(entries) if n < room and times[n] > 1}
    pristine = not table.damaged
    replaying = True
    for _ in range(source.byte() % 10):
        kind = source.byte() % 6
        chunk = source.number(2) % (chunks + 2)
        if kind < 3 and replaying:
            record = [some_entry(source) for _ in range(source.byte() % 8)]
            why = table.replay(chunk, record)
            numbers = [entry & ~NOT_JOURNALED for entry in record]
            if pristine:
                assert (why is not None) == (
                    chunk + len(record) > chunks
                    or UNALLOCATED in record
                    or any(number >= room for number in numbers)
                    or len(set(numbers)) < len(numbers)
                    or any(entries[c] != n and n in entries for c, n in enumerate(numbers, chunk))
                )
            if why is None:
                entries[chunk : chunk + len(record)] = numbers
        elif kind == 3 and chunk < chunks and not table.damaged:
            table.replay_done()
            replaying = False
            if entries[chunk] == UNALLOCATED:
                entries[chunk] = table.allocate(chunk)
                assert entries.count(entries[chunk]) == 1
        elif kind == 4 and not table.damaged:
            more = chunks + source.byte() % 40
            replaying = False
            table.grow(more)
            entries += [UNALLOCATED] * (more - chunks)
            chunks = more
        elif kind == 5 and not table.damaged:
            replaying = False
            chunks = min(chunk, chunks)
            table.shrink(chunks)
            del entries[chunks:]
        else:
            pages = table.take_dirty_pages()
            assert table.dirty_pages == 0
            for page, piece in pages:
                assert len(piece) == PAGE
                part = entries[page * ENTRIES_PER_PAGE : (page + 1) * ENTRIES_PER_PAGE]
                assert piece[: 4 * len(part)] == struct.pack(f"<{len(part)}I", *part)
            table.pages_not_written(pages)
        _check_table(table, entries, room if replaying else UNALLOCATED)
        if pristine:
            assert not table.beyond  # but a record may name a place past the storage
            assert not table.shared
            placed = [n for n in entries if n != UNALLOCATED]
            assert len(set(placed)) == len(placed), "one place for two chunks"
    return pristine


def _check_table(table: Table, entries: list[int], room: int) -> None:
    assert table.chunks == len(entries)
    assert [table[chunk] for chunk in range(min(len(entries), 40))] == entries[:40]
    assert table.allocated() == len(entries) - entries.count(UNALLOCATED)
    assert table.highest >= max((n for n in entries if n < room), default=-1)
    if not table.damaged:
        assert table.numbers_left <= 0x7FFFFFFF
    if entries:
        runs = list(table.chunk_runs(0, len(entries)))
        again = list[int]()
        for start, stop, number in runs:
            again += [number if number == UNALLOCATED else number + n for n in range(stop - start)]
        assert again == entries
    if room < UNALLOCATED:  # else: chunks have been allocated, who allocates them makes room first
        assert table.beyond == {chunk for chunk, n in enumerate(entries) if room <= n < UNALLOCATED}


# --- journal --------------------------------------------------------------------------------------

ROOM = 700  # chunks that the storage has room for
REMARKS = (
    *(
        "empty record",
        reference.GARBAGE,
        "follows a bitmap record",
        "without the entries",
        "changes: ",
        "more than 121",
    ),
)
"""What the reference reader says of records that it applies all the same."""


def some_records(source: Source, header: Header) -> bytes:
    """A sector of a journal: good records, bad ones, and bytes."""
    sector = b""
    sectors, chunks = header.virtual_disk_size // SECTOR, header.chunks
    for _ in range(source.byte() % 6):
        kind = source.byte()
        if kind < 100:
            first = source.byte() % (sectors + 2) if kind < 80 else source.size(sectors)
            count = source.byte() % (sectors + 2) if kind < 90 else source.number(4)
            first = (first + (1 << 63)) % (1 << 64) - (1 << 63)
            sector += struct.pack("<IIq", BITMAP_MAGIC, count, first)
        elif kind < 220:
            first = source.byte() % (chunks + 2) if kind < 200 else source.number(4)
            listed = [some_entry(source) for _ in range(source.byte() % 9)]
            count = len(listed) if kind < 210 else source.number(source.byte() % 5)
            sector += struct.pack(f"<III{len(listed)}I", TABLE_MAGIC, first, count, *listed)
        elif kind < 240:
            start = source.byte()
            listed = [(start + n) % ROOM for n in range(source.byte() % 128)]
            sector += struct.pack(f"<III{len(listed)}I", TABLE_MAGIC, source.byte(), len(listed), *listed)
        else:
            sector += source.take(source.byte() % 24)
    return sector[:SECTOR].ljust(SECTOR, source.pick((b"\0", b"\xff")))


def journal_header(source: Source) -> Header:
    """A layout with any proportion of blocks, chunks and base."""
    disk = 1 + source.number(2) % 600
    base = 1 + source.number(2) % disk
    header = with_fields(
        HEADERS[0],
        virtual_disk_size=disk * SECTOR,
        base_img_size=base * SECTOR,
        block_size=source.pick((4, 1, 2, 3, 7, 8, 60, 121, 122, 130, 250)) * SECTOR,
        chunk_size=source.pick((6, 1, 2, 3, 5, 8, 40)) * SECTOR,
    )
    kind = source.byte() % 4
    if kind == 1:
        return with_fields(header, compact_image=0)
    if kind == 2:
        return with_fields(header, all_data_in_fvd_img=1, base_img="", base_img_size=0, block_size=0)
    return header


def fuzz_journal(data: bytes) -> bool:
    """Replay of any sectors onto any metadata, against the reference reader; then records of our own."""
    source = Source(data)
    header = journal_header(source)
    bits = bytearray(bitmap_bytes(header.blocks))
    some = source.take(source.byte() % 8)[: ceil_div(header.blocks, 8)]
    bits[: len(some)] = some
    tail = header.blocks % 8
    if tail:  # the reference reader keeps no bits past the end apart
        bits[header.blocks // 8] &= (1 << tail) - 1
    entries = some_table(source, header.chunks) if source.byte() & 1 else [UNALLOCATED] * header.chunks
    bitmap = Bitmap(bytes(bits), header.blocks) if header.has_base else None
    table = (
        Table(decode_entries(struct.pack(f"<{header.chunks}I", *entries)), header.chunks, ROOM)
        if header.compact
        else None
    )
    other = _reference_image(header, bits, entries)
    damaged = table is not None and table.damaged
    sectors = b"".join(some_records(source, header) for _ in range(1 + source.byte() % 3))
    for at in range(0, len(sectors), SECTOR):
        for offset, record in parse(sectors[at : at + SECTOR]):
            assert 0 <= offset < SECTOR
            assert record is not None
    skipped = replay(sectors, header, bitmap, table)
    assert all("\n" not in str(skip) for skip in skipped)
    if not damaged:
        other.journal = sectors
        other.replay()
        if bitmap is not None:
            assert [bitmap.is_local(block) for block in range(header.blocks)] == [
                other.bit(block) for block in range(header.blocks)
            ]
        if table is not None:
            assert not table.beyond
            assert not table.shared
            assert [table[chunk] for chunk in range(header.chunks)] == other.table
        bad = [text.partition(":")[0] for text in other.reports if not any(remark in text for remark in REMARKS)]
        assert [f"journal sector {skip.sector}" for skip in skipped] == bad
        _write_and_replay(source, header, bitmap, table)
    return not skipped


def _reference_image(header: Header, bits: bytearray, entries: list[int]) -> reference.Image:
    other = reference.Header.__new__(reference.Header)
    other.blocks, other.chunks, other.base_size = header.blocks, header.chunks, header.base_size
    other.set(
        virtual_disk_size=header.virtual_disk_size,
        base_img_size=header.base_img_size,
        bitmap_size=len(bits) if header.has_base else 0,
        block_size=header.block_size,
        chunk_size=header.chunk_size,
    )
    image = reference.Image.__new__(reference.Image)
    image.header = other
    image.bitmap = bytearray(bits)
    image.table = [entry if entry == reference.MISSING else entry & reference.NUMBER for entry in entries]
    image.owner = {number: chunk for chunk, number in enumerate(image.table) if number != reference.MISSING}
    image.reports = []
    image.storage_length = ROOM * header.chunk_size
    return image


def _write_and_replay(source: Source, header: Header, bitmap: Bitmap | None, table: Table | None) -> None:
    """What `encode` writes for some blocks and chunks, a replay onto nothing finds, and no more."""
    blocks = []
    for _ in range(source.byte() % 4 if header.blocks else 0):
        first = source.number(2) % header.blocks
        blocks.append((first, min(header.blocks, first + 1 + source.byte() % 64)))
    ranges = merge(blocks)
    assert {n for r in ranges for n in range(*r)} == {n for r in blocks for n in range(*r)}
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))
    chunks = []
    if table is not None:
        table.replay_done()
        chosen = {source.number(2) % header.chunks for _ in range(source.byte() % 6)}
        for chunk in sorted(chosen):
            if table[chunk] == UNALLOCATED:
                table.allocate(chunk)
        chunks = sorted(chosen)
    sectors = encode(header, table, ranges, chunks)
    if sectors is None:
        return
    assert all(len(sector) == SECTOR for sector in sectors)
    found_bits = Bitmap(bytes(bitmap_bytes(header.blocks)), header.blocks) if bitmap is not None else None
    found = Table(decode_entries(b"\xff" * (4 * header.chunks)), header.chunks, ROOM) if table is not None else None
    assert replay(b"".join(sectors), header, found_bits, found) == []
    if found_bits is not None:
        wanted = {n for r in ranges for n in range(*r)}
        assert {n for n in range(header.blocks) if found_bits.is_local(n)} == wanted
    if table is not None and found is not None:
        assert all(found[chunk] == table[chunk] for chunk in chunks)
        assert all(found[chunk] in (UNALLOCATED, table[chunk]) for chunk in range(header.chunks))


assert {field.name for field in dataclasses.fields(Header)} == set(reference.NAMES)
