"""A small reader and checker of FVD images, for tests only.

It shares no code with the package under test, so that one misreading of the format is not made
twice: it is written from docs/format.md alone. Offsets,
sizes and lengths are in bytes unless a name says otherwise. Nothing is ever written.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

SECTOR = 512
PAGE = 4096
HEADER_SIZE = 8192  # the header's 4336 bytes, padded (format.md, "Regions")
PIECE = 1 << 20  # bytes that read_disk() yields at a time
MAGIC = 0x5143F5A9
BITMAP_RECORD = 0x3F2AB8ED
TABLE_RECORD = 0xB4E6F7AC
RECORD_AT = 7680  # of a move, in the header's padding (format.md, "Left to the writer")
MISSING = 0xFFFFFFFF  # table entry of a chunk that is not allocated (format.md, "Chunk table")
NUMBER = 0x7FFFFFFF  # the bits of a table entry that hold the chunk's number (format.md, "Chunk table")
GARBAGE = "not zero after its records"

# Name and struct code of each field of the header, in order (format.md, "Header").
FIELDS = """
    magic I, version I, all_data_in_fvd_img i, virtual_disk_size q, metadata_size q,
    base_img 1024s, base_img_fmt 16s, base_img_size q, bitmap_offset q, bitmap_size q,
    block_size i, copy_on_read i, max_outstanding_copy_on_read_data q,
    data_file 1024s, data_file_fmt 16s, prefetch_start_delay i, prefetch_profile_offset q,
    prefetch_profile_entries q, num_prefetch_slots i, bytes_per_prefetch i,
    prefetch_read_throughput_measure_time i, prefetch_write_throughput_measure_time i,
    prefetch_perf_calc_alpha i, prefetch_min_read_throughput i, prefetch_min_write_throughput i,
    prefetch_max_read_throughput i, prefetch_max_write_throughput i, prefetch_throttle_time i,
    compact_image i, table_offset q, chunk_size q, storage_grow_unit q, add_storage_cmd 2048s,
    journal_offset q, journal_size q, clean_shutdown i, need_zero_init i,
    generate_prefetch_profile i, unit_of_PrefetchProfileEntry_len i,
    profile_directed_prefetch_start_delay i, write_updates_base_img 16s"""
NAMES = [field.split()[0] for field in FIELDS.split(",")]
CODES = [field.split()[1] for field in FIELDS.split(",")]
FORMAT = struct.Struct("<" + "".join(CODES))
# Numbers of use with a base only, and 0 without one (format.md, "Values at creation").
OF_BASE = [*NAMES[7:13], NAMES[15], *NAMES[18:28], *NAMES[38:40]]


def up(size: int, unit: int) -> int:
    """How many units `size` takes."""
    return -(-size // unit)


@functools.lru_cache
def _fields(raw: bytes) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Numbers, strings, and the names of strings without a NUL, or not NUL-filled."""
    numbers, strings, unterminated = {}, {}, []
    for name, value in zip(NAMES, FORMAT.unpack(raw), strict=True):
        if isinstance(value, bytes):
            text, nul, fill = value.partition(b"\0")
            strings[name] = os.fsdecode(text)
            if not nul or fill.strip(b"\0"):
                unterminated.append(name)
        else:
            numbers[name] = value
    return numbers, strings, unterminated


def _record(padding: bytes) -> tuple[tuple[int, ...] | None, bytes]:
    """The record of a move, if there is one, and the rest of the padding (format.md, "Left to the writer")."""
    rest, sector = padding[:-SECTOR], padding[-SECTOR:]
    if sector[:8] != b"FVDmoved" or any(sector[44:]):
        return None, padding
    *numbers, checksum = struct.unpack_from("<4qI", sector, 8)
    return (tuple(numbers), rest) if zlib.crc32(sector[:40]) == checksum else (None, padding)


class Header:
    """Every number is an attribute; strings, up to their NUL, are in `text` (format.md, "Header")."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            raw = file.read(FORMAT.size)
            padding = file.read(HEADER_SIZE - FORMAT.size)
        if len(raw) < FORMAT.size:
            raise ValueError("the file ends inside its header")
        numbers, self.text, self.unterminated = _fields(raw)
        self.set(**numbers)
        self.record, self.padding = _record(padding)
        self.is_moving = (self.journal_offset, self.journal_size, self.clean_shutdown) == (RECORD_AT, 0, 0)
        if self.is_moving:
            if self.record is None:
                raise ValueError("the record of a move is damaged")
            names = ("metadata_size", "table_offset", "journal_offset", "journal_size")
            self.set(**dict(zip(names, self.record, strict=True)), clean_shutdown=1)
        compact = self.compact_image and self.chunk_size > 0
        self.chunks = up(self.virtual_disk_size, self.chunk_size) if compact else 0  # format.md, "Chunk table"
        self.table_size = up(4 * self.chunks, PAGE) * PAGE
        # Only the smaller counts (format.md, "Surprising values"). The bitmap keeps the size that it had.
        self.base_size = min(self.base_img_size, self.virtual_disk_size)
        has_blocks = self.base_img_size > 0 and self.block_size > 0
        self.blocks = up(self.base_size, self.block_size) if has_blocks else 0  # format.md, "Bitmap"
        self.bitmap_blocks = up(self.base_img_size, self.block_size) if has_blocks else 0
        self.data_at = self.metadata_size // SECTOR * SECTOR  # format.md, "Surprising values"

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...

    def set(self, **numbers: int) -> None:
        """Make these numbers attributes."""
        vars(self).update(numbers)

    def grow_to(self, length: int) -> None:
        """The disk is as long as its data, where this is longer (format.md, "Left to the writer")."""
        self.set(virtual_disk_size=max(self.virtual_disk_size, length))


class Image:
    """An image with its metadata in memory, replayed if it was not shut down cleanly (format.md, "Journal").

    Without a journal such an image is read as it stands. `reports` says what the replay met:
    bad records, which were skipped, and what a writer should not have written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = header = Header(path)
        if (header.magic, header.version) != (MAGIC, 1):
            raise ValueError("not an FVD image of version 1")
        base_format, data_format = header.text["base_img_fmt"], header.text["data_file_fmt"]
        if base_format not in ("", "raw", "fvd") or data_format not in ("", "raw"):
            raise ValueError(f"base or data file of a format unknown: {base_format} {data_format}")
        self.bitmap = bytearray(self._region("bitmap", header.bitmap_size))
        raw_table = self._region("table", header.table_size)
        self.disk_table = struct.unpack(f"<{header.table_size // 4}I", raw_table)  # to its page
        self.table = [  # format.md, "Chunk table": bit 31 is ignored
            entry if entry == MISSING else entry & NUMBER for entry in self.disk_table[: header.chunks]
        ]
        self.owner = {number: chunk for chunk, number in enumerate(self.table) if number != MISSING}
        self.journal = self._region("journal", header.journal_size)
        # Data is behind the metadata, or at 0 of the data file (format.md, "Regions").
        data_file = header.text["data_file"]
        self.data_start = 0 if data_file else header.data_at
        storage = (path.parent / data_file if data_file else path).resolve(strict=True)
        self.base: BinaryIO | Image | None = None
        if not header.all_data_in_fvd_img:
            base = path.parent / header.text["base_img"]
            self.base = Image(base) if base_format == "fvd" else base.open("rb")
        self.storage = storage.open("rb")
        self.storage_length = max(0, self.storage.seek(0, os.SEEK_END) - self.data_start)
        if data_file and self.base is None and not (header.clean_shutdown or header.chunks):
            self.storage_length = up(self.storage_length, SECTOR) * SECTOR  # its last sector is filled with zeros
            header.grow_to(self.storage_length)
        self.reports: list[str] = []
        if not header.clean_shutdown:
            self.replay()

    def close(self) -> None:
        """Close the files of the image and of its bases."""
        self.storage.close()
        if self.base is not None:
            self.base.close()

    def _region(self, name: str, size: int) -> bytes:
        """A region of metadata; a file that ends inside one is an error (format.md, "Compatibility")."""
        with self.path.open("rb") as file:
            file.seek(getattr(self.header, f"{name}_offset") if size else 0)
            raw = file.read(size)
        if len(raw) < size:
            raise ValueError(f"the file ends inside its {name}")
        return raw

    # -- journal (format.md, "Journal"; rules for bad records: format.md, "Beyond the original", 3) --

    def replay(self) -> None:
        """Apply the whole journal to the bitmap and the table in memory."""
        for index in range(len(self.journal) // SECTOR):
            sector = self.journal[index * SECTOR : (index + 1) * SECTOR]
            if sector == bytes(SECTOR):
                continue  # no record; most are like that
            for report in self._replay_sector(sector):
                self.reports.append(f"journal sector {index}: {report}")

    def _replay_sector(self, sector: bytes) -> Iterator[str]:
        """Apply one sector, up to a bad record if it has one."""
        at, kind, named = 0, 0, range(0)
        while at + 4 <= SECTOR:
            before, (kind,) = kind, struct.unpack_from("<I", sector, at)
            if kind not in (BITMAP_RECORD, TABLE_RECORD):
                break
            if before == BITMAP_RECORD:
                yield "a record follows a bitmap record"
            try:
                if kind == TABLE_RECORD:
                    first, count = struct.unpack_from("<II", sector, at + 4)
                    entries = struct.unpack_from(f"<{count}I", sector, at + 12)
                    named = range(first, first + count)
                    yield from self._apply_entries(first, entries)
                    at += 12 + 4 * count
                else:
                    count, first = struct.unpack_from("<Iq", sector, at + 4)
                    yield from self._apply_bits(first, count, named)
                    at += 16
            except struct.error:
                yield "a record is longer than its sector"
                return
            except ValueError as error:
                yield str(error)
                return
            if not count:
                yield "empty record"
        if any(sector[at:]):
            yield GARBAGE

    def _apply_bits(self, first: int, count: int, named: range) -> Iterator[str]:
        """A bitmap record of `count` sectors; `named` are the chunks of the table record before."""
        header = self.header
        if not header.bitmap_size:
            raise ValueError("bitmap record without a bitmap")
        if first < 0 or (first + count) * SECTOR > max(header.virtual_disk_size, header.base_img_size):
            raise ValueError(f"bitmap record out of range: {count} sectors from {first}")
        start, end = first * SECTOR, min((first + count) * SECTOR, header.base_size)
        if start >= end:
            return  # format.md, "Beyond the original": wholly past the base is normal
        for block in range(start // header.block_size, up(end, header.block_size)):
            self.bitmap[block // 8] |= 1 << block % 8
        if header.chunks:
            chunks = range(start // header.chunk_size, up(end, header.chunk_size))
            if not set(chunks) <= set(named):
                yield "bitmap record without the entries of its chunks"

    def _apply_entries(self, first: int, entries: tuple[int, ...]) -> Iterator[str]:
        """A table record. An entry that changes is applied, and reported."""
        header = self.header
        if not header.chunks:
            raise ValueError("table record without a table")
        if first + len(entries) > header.chunks:
            raise ValueError(f"table record out of range: {len(entries)} entries from {first}")
        owner = dict[int, int]()
        for chunk, entry in enumerate(entries, first):
            number = entry & NUMBER
            if entry == MISSING:
                raise ValueError(f"entry of chunk {chunk} is 0xFFFFFFFF")
            if (number + 1) * header.chunk_size > self.storage_length:
                raise ValueError(f"entry of chunk {chunk} is past the storage: {number}")
            if (other := owner.setdefault(number, self.owner.get(number, chunk))) != chunk:
                raise ValueError(f"chunk number {number} is used twice: by {other} and {chunk}")
        if header.bitmap_size and len(entries) > 121:
            yield f"{len(entries)} entries, more than 121 with a bitmap"
        for chunk, entry in enumerate(entries, first):
            if self.table[chunk] not in (MISSING, entry & NUMBER):
                yield f"entry of chunk {chunk} changes: {self.table[chunk]} to {entry & NUMBER}"
                self.owner.pop(self.table[chunk], None)
            self.table[chunk] = entry & NUMBER
            self.owner[entry & NUMBER] = chunk

    # -- reading (format.md, "Reads, writes, copies") --

    def bit(self, block: int) -> bool:
        """Whether a block is in the image's own storage (format.md, "Bitmap")."""
        return bool(self.bitmap[block // 8] >> block % 8 & 1)

    def read_base(self, start: int, length: int) -> bytes:
        """From the base; zeros past its end (format.md, "Bitmap")."""
        assert self.base is not None
        if isinstance(self.base, Image):
            return self.base.read(start, length)
        self.base.seek(start)
        return self.base.read(length).ljust(length, b"\0")

    def read_own(self, start: int, length: int) -> bytes:
        """From own storage, or zeros (format.md, "Storage without a table" and "Chunk table")."""
        size, out, end = self.header.chunk_size, [], start + length
        while start < end:
            at, step = start, end - start
            if self.table:
                entry, inside = self.table[at // size], at % size
                at, step = entry * size + inside, min(step, size - inside)
                if entry == MISSING:
                    out.append(bytes(step))
                    start += step
                    continue
            self.storage.seek(self.data_start + at)
            out.append(self.storage.read(step).ljust(step, b"\0"))
            start += step
        return b"".join(out)

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes of the virtual disk from `start`; zeros past its end."""
        end, out = min(start + length, self.header.virtual_disk_size), []
        limit, size = self.header.base_size, self.header.block_size
        while start < end:
            if self.base is None or start >= limit:
                stop, own = end, True
            else:
                block = start // size
                own = self.bit(block)
                while (block := block + 1) * size < min(limit, end) and self.bit(block) == own:
                    pass  # blocks that are in the same place are read at once
                stop = min(block * size, limit, end)
            out.append((self.read_own if own else self.read_base)(start, stop - start))
            start = stop
        return b"".join(out).ljust(length, b"\0")


def length(path: Path) -> int:
    """Bytes of a file or a device."""
    with path.open("rb") as file:
        return file.seek(0, 2)


def read_disk(path: Path) -> Iterator[bytes]:
    """The whole virtual disk of the image `path`, in order, in pieces of at most PIECE bytes."""
    image = Image(path)
    size = image.header.virtual_disk_size
    try:
        for start in range(0, size, PIECE):
            yield image.read(start, min(PIECE, size - start))
    finally:
        image.close()


def sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of the whole virtual disk of the image `path`."""
    digest = hashlib.sha256()
    for piece in read_disk(path):
        digest.update(piece)
    return digest.hexdigest()


def check(path: Path, writer: str = "original") -> list[str]:
    """What is wrong with an image, in words; empty: nothing. Bases are not looked into.

    With `writer` "fvdfs", two things that images of the original have are problems too: bytes
    other than zero after a journal sector's records (format.md, "Journal"), and a set bit over a missing
    chunk where the base is zero, so that nothing is lost (format.md, "Left to the writer").
    """
    try:
        header = Header(path)
        if problems := [*_check_header(header), *_check_layout(header, length(path))]:
            return problems  # the rest would only trip over these
        image = Image(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    try:
        return [*_check_contents(image, writer), *_check_storage(image)]
    finally:
        image.close()


def _check_header(h: Header) -> Iterator[str]:
    """Fields in range (format.md, "Header")."""
    yield from (f"{name} is not NUL-terminated and NUL-filled" for name in h.unterminated)
    flags = "all_data_in_fvd_img copy_on_read compact_image clean_shutdown need_zero_init"
    good = {flag: getattr(h, flag) in (0, 1) for flag in flags.split()}
    good["magic"] = h.magic == MAGIC
    good["version"] = h.version == 1
    good["virtual_disk_size"] = h.virtual_disk_size > 0 and h.virtual_disk_size % SECTOR == 0
    good["journal_size"] = h.journal_size >= 0 and h.journal_size % SECTOR == 0
    good["journal_offset"] = h.journal_size != 0 or h.journal_offset == 0
    good["prefetch_profile_offset"] = h.prefetch_profile_offset >= 0
    good["prefetch_profile_entries"] = h.prefetch_profile_entries >= 0
    if h.text["base_img"]:
        may_be_negative = ("start_delay", "throttle_time")
        good |= {n: getattr(h, n) >= 0 for n in OF_BASE if not n.endswith(may_be_negative)}
        good["copy_on_read"] = h.copy_on_read in (0, 1)
        good["base_img_size"] &= h.base_img_size % SECTOR == 0
        good["block_size"] = h.block_size > 0 and h.block_size % SECTOR == 0
        good["bitmap_size"] = h.bitmap_size == up(up(h.bitmap_blocks, 8), PAGE) * PAGE
        good["bytes_per_prefetch"] = h.bytes_per_prefetch > 0
        good["bytes_per_prefetch"] &= h.bytes_per_prefetch % max(h.block_size, 1) == 0
        good["num_prefetch_slots"] = h.num_prefetch_slots > 0
        good["prefetch_perf_calc_alpha"] = 0 <= h.prefetch_perf_calc_alpha <= 100
    else:
        good |= {name: getattr(h, name) == 0 for name in OF_BASE}
        good["all_data_in_fvd_img"] = h.all_data_in_fvd_img == 1
    if h.compact_image:
        good["chunk_size"] = h.chunk_size > 0 and h.chunk_size % SECTOR == 0
        good["storage_grow_unit"] = h.storage_grow_unit >= h.chunk_size
        good["need_zero_init"] = h.need_zero_init == 0  # format.md, "Bitmap": not with a table
    else:
        good |= {n: getattr(h, n) == 0 for n in ("table_offset", "chunk_size", "storage_grow_unit")}
    yield from (f"{name} is {getattr(h, name)}" for name in good if not good[name])
    if h.journal_size and not h.compact_image and not h.block_size:
        yield "a journal with neither a bitmap nor a table"  # format.md, "Regions"
    if 0 < h.journal_size < up(h.chunks, 121) * SECTOR:
        yield "the journal has no room for the whole table"  # format.md, "Values at creation"
    if not h.journal_size and not h.clean_shutdown:
        yield "clean_shutdown is 0 without a journal"  # format.md, "Journal": the original refuses it


def _check_layout(h: Header, length: int) -> Iterator[str]:
    """Regions on page boundaries, in order, apart, inside the file (format.md, "Regions" and "Reserved fields")."""
    regions = [
        ("header", 0, HEADER_SIZE),
        ("bitmap", h.bitmap_offset, h.bitmap_size),
        ("table", h.table_offset, h.table_size),
        ("journal", h.journal_offset, up(h.journal_size, PAGE) * PAGE),
    ]
    regions = [region for region in regions if region[2] > 0]
    data = 1 << 62 if h.chunks else h.virtual_disk_size  # a compact image's storage may grow
    regions.append(("data", h.data_at, 0 if h.text["data_file"] else data))
    # What was asked for in vain is not rounded (format.md, "Surprising values").
    plain = not h.chunks and not h.text["base_img"]
    if regions != sorted(regions, key=lambda region: region[1]):
        yield "the regions are not in order"
    if h.prefetch_profile_entries > 0:  # anywhere between or after the others
        size = up(12 * h.prefetch_profile_entries, PAGE) * PAGE
        regions.append(("prefetch profile", h.prefetch_profile_offset, size))
    regions.sort(key=lambda region: region[1])
    yield from (
        f"the {name} is not on a page boundary"
        for name, at, _ in regions
        if at % PAGE and not (plain and name == "data")
    )
    for (name, at, size), (following, limit, _) in pairwise(regions):
        if at + size > limit:
            yield f"the {name} overlaps the {following}"
    for name, at, size in regions:
        if name != "data" and at + size > length:  # short data is zeros (format.md, "Compatibility")
            yield f"the file ends inside its {name}"


def _check_contents(image: Image, writer: str) -> Iterator[str]:
    """Bitmap, table and journal: each by itself, and together after a replay."""
    h = image.header
    if h.padding.strip(b"\0"):
        yield "the header's padding is not zero"  # format.md, "Compatibility"
    if set(image.disk_table[h.chunks :]) - {MISSING}:
        yield "the table's tail is not 0xFF"  # likewise
    whole, bits = (1 << 8 * len(image.bitmap)) - 1, int.from_bytes(image.bitmap, "little")
    if bits >> h.bitmap_blocks and bits != whole:  # format.md, "Bitmap": only prefetching sets it, and all of it
        yield "the bitmap's tail is neither zero nor, with all the rest, ones"
    if h.all_data_in_fvd_img and ~bits & whole >> (whole.bit_length() - h.blocks):
        yield "all_data_in_fvd_img is 1, but a bit is 0"  # format.md, "Reads, writes, copies"
    if h.clean_shutdown:
        if any(NUMBER < entry < MISSING for entry in set(image.disk_table)):
            yield "bit 31 of an entry is set"  # format.md, "Chunk table"
        # If a later session crashes, today's records are replayed too (format.md, "Journal").
        before = bytes(image.bitmap), list(image.table)
        image.replay()
        if before != (bytes(image.bitmap), image.table):
            yield "the image is clean, but a replay of its journal changes it"
        image.bitmap[:], image.table[:] = before
    yield from (text for text in image.reports if writer == "fvdfs" or not text.endswith(GARBAGE))
    numbers = [number for number in image.table if number != MISSING]
    if len(numbers) != len(set(numbers)):
        yield "a chunk number is used twice in the table"
    if NUMBER in numbers:
        yield "an entry is 0x7FFFFFFF"  # format.md, "Chunk table": with bit 31 it would mean "not allocated"
    if image.base is None or not h.chunks:
        return
    for block in filter(image.bit, range(h.blocks)):
        start, end = block * h.block_size, min((block + 1) * h.block_size, h.base_size)
        for chunk in range(start // h.chunk_size, up(end, h.chunk_size)):
            if image.table[chunk] != MISSING:
                continue
            at, to = max(start, chunk * h.chunk_size), min(end, (chunk + 1) * h.chunk_size)
            if writer == "fvdfs" or image.read_base(at, to - at).strip(b"\0"):
                yield f"bit without chunk: block {block}, chunk {chunk}"


def _check_storage(image: Image) -> Iterator[str]:
    """Storage as long as the original wants it (format.md, "Compatibility")."""
    h, length = image.header, image.storage_length
    if h.chunks:
        used = max((number + 1 for number in image.table if number != MISSING), default=0)
        if length < used * h.chunk_size:
            yield f"the storage ends before the end of its chunk {used - 1}"
    elif length < h.virtual_disk_size and (length or (any(image.bitmap) and not h.need_zero_init)):
        yield "the storage holds data, but is shorter than the disk"
