"""The header of an FVD image: fields, limits, regions.

The source of every rule here is format.md, "Regions" and "Header".

    header | bitmap | chunk table | journal | data

Regions start on a page when fvdfs creates them; in an image made elsewhere only the offsets in the
header count. `Header.check` accepts an image only if every region lies inside the file, none
overlaps another or the header, and every size is one that fvdfs can compute with: after it, no other
module needs to distrust a header.

Pure: bytes in, decisions out.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fvdfs.errors import FormatError, NotFvd, UsageError
from fvdfs.format import moving

MAGIC = 0x5143F5A9
VERSION = 1
SECTOR = 512  # bytes
PAGE = 4096  # bytes
HEADER_SIZE = 4336  # bytes
HEADER_SPACE = 8192  # bytes of the header and its padding, where the first region is created
TABLE_ENTRY_SIZE = 4  # bytes
UNALLOCATED = 0xFFFFFFFF  # the entry of a chunk that has no place
MAX_DISK_SIZE = 1 << 62  # bytes; keeps every sum of two offsets inside the 63 bits of a file offset
MAX_BLOCK_SIZE = (1 << 31) - SECTOR  # bytes; the largest multiple of a sector in the field's 31 bits
MAX_CHUNKS = 0x7FFFFFFF  # numbers 0 .. 0x7FFFFFFE (format.md, "Chunk table")
ENTRIES_WITH_BITMAP_RECORD = 121  # table entries in a journal sector beside a bitmap record

PROFILE_ENTRY = struct.Struct("<qI")  # offset in bytes, length in units of unit_of_PrefetchProfileEntry_len
DEFAULT_PROFILE_ROOM = 64 << 10  # bytes, for 5461 extents
MAX_PROFILE_SIZE = 1 << 20  # bytes; it is read in one piece
MAX_PROFILE_UNIT = 1 << 30  # bytes; keeps the length of an extent inside 63 bits
CRASH_WINDOW = 64 << 20  # bytes of a device that are zeroed when an image is opened after a crash
LONGEST_REQUEST = 8 << 20  # bytes that are written at once, but for the blocks around them


def round_up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def ceil_div(value: int, unit: int) -> int:
    """`value / unit`, rounded up."""
    return -(-value // unit)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the image file, in bytes."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def _field(code: str, default: int | str) -> Any:
    """A field of the header: its code in `struct`, and its value where nothing is said."""
    return dataclasses.field(default=default, metadata={"code": code})


def _u32(default: int) -> Any:
    return _field("I", default)


def _i32(default: int = 0) -> Any:
    return _field("i", default)


def _i64(default: int = 0) -> Any:
    return _field("q", default)


def _chars(size: int) -> Any:
    return _field(f"{size}s", "")


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of the header, in the order of the file, as the format names them; sizes and offsets in bytes."""

    magic: int = _u32(MAGIC)
    version: int = _u32(VERSION)
    all_data_in_fvd_img: int = _i32(1)
    virtual_disk_size: int = _i64()
    metadata_size: int = _i64(HEADER_SPACE)
    base_img: str = _chars(1024)
    base_img_fmt: str = _chars(16)
    base_img_size: int = _i64()
    bitmap_offset: int = _i64()
    bitmap_size: int = _i64()
    block_size: int = _i32()
    copy_on_read: int = _i32()
    max_outstanding_copy_on_read_data: int = _i64()
    data_file: str = _chars(1024)
    data_file_fmt: str = _chars(16)
    prefetch_start_delay: int = _i32()
    prefetch_profile_offset: int = _i64()
    prefetch_profile_entries: int = _i64()
    num_prefetch_slots: int = _i32()
    bytes_per_prefetch: int = _i32()
    prefetch_read_throughput_measure_time: int = _i32()
    prefetch_write_throughput_measure_time: int = _i32()
    prefetch_perf_calc_alpha: int = _i32()
    prefetch_min_read_throughput: int = _i32()
    prefetch_min_write_throughput: int = _i32()
    prefetch_max_read_throughput: int = _i32()
    prefetch_max_write_throughput: int = _i32()
    prefetch_throttle_time: int = _i32()
    compact_image: int = _i32()
    table_offset: int = _i64()
    chunk_size: int = _i64()
    storage_grow_unit: int = _i64()
    add_storage_cmd: str = _chars(2048)
    journal_offset: int = _i64()
    journal_size: int = _i64()
    clean_shutdown: int = _i32(1)
    need_zero_init: int = _i32()
    generate_prefetch_profile: int = _i32()
    unit_of_PrefetchProfileEntry_len: int = _i32()
    profile_directed_prefetch_start_delay: int = _i32()
    write_updates_base_img: str = _chars(16)

    @classmethod
    def decode(cls, data: bytes, image: str) -> Header:
        """The header in `data`, the first bytes of the file `image`; `check` has yet to look at its numbers.

        Where a move of the table was interrupted, it is as if that had ended (`moving`). Raises NotFvd where the magic
        is missing, FormatError where the data is too short, the version unknown or a string not terminated.
        """
        if len(data) < 4 or int.from_bytes(data[:4], "little") != MAGIC:
            raise NotFvd(image, "not an FVD image (the magic number is missing)")
        if len(data) < HEADER_SIZE:
            raise FormatError(image, f"the file ends inside the header ({len(data)} of {HEADER_SIZE} bytes)")
        fields: dict[str, int | str] = {}
        for (name, _), value in zip(_FIELDS, _STRUCT.unpack_from(data), strict=True):
            if isinstance(value, bytes):
                text, nul, _ = value.partition(b"\0")
                if not nul:
                    raise FormatError(image, f"{name} fills its {len(value)} bytes without an end")
                fields[name] = text.decode("utf-8", "surrogateescape")
            else:
                fields[name] = value
        if fields["version"] != VERSION:
            raise FormatError(image, f"version={fields['version']}: only version {VERSION} is known")
        if moving.is_moving(data):
            moved = moving.decode(data)
            if moved is None:
                raise FormatError(image, "its chunk table was being moved, and the record of where to is damaged")
            fields |= {**moved, "clean_shutdown": 1}
        return cls(**fields)  # type: ignore[arg-type]

    def encode(self) -> bytes:
        """The header's HEADER_SIZE bytes. Raises UsageError where a string is too long for its field."""
        values: list[int | bytes] = []
        for name, code in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, str):
                data = value.encode("utf-8", "surrogateescape")
                room = int(code[:-1]) - 1
                if len(data) > room:
                    raise UsageError(f"{name} is {len(data)} bytes long; the format has room for {room}")
                value = data
            values.append(value)
        return _STRUCT.pack(*values)

    # --- what the fields mean -----------------------------------------------------------------

    @property
    def has_base(self) -> bool:
        """Whether a block may still lie in the base image."""
        return bool(self.base_img) and not self.all_data_in_fvd_img

    @property
    def base_size(self) -> int:
        """Bytes of the virtual disk that the base image can provide.

        base_img_size may be more: the original keeps it when it makes a disk smaller (format.md, "Surprising values").
        """
        return min(self.base_img_size, self.virtual_disk_size) if self.has_base else 0

    @property
    def compact(self) -> bool:
        return self.compact_image != 0

    @property
    def clean(self) -> bool:
        return self.clean_shutdown != 0

    @property
    def blocks(self) -> int:
        """Blocks that the bitmap covers."""
        return ceil_div(self.base_size, self.block_size) if self.has_base else 0

    @property
    def chunks(self) -> int:
        """Entries of the chunk table."""
        return ceil_div(self.virtual_disk_size, self.chunk_size) if self.compact else 0

    @property
    def chunk_window(self) -> int:
        """Chunks of a device that may be handed out before a commit: so many can a crash leave without an entry."""
        assert self.compact
        longest = LONGEST_REQUEST + 2 * (self.block_size if self.has_base else 0)
        return max(CRASH_WINDOW // self.chunk_size, ceil_div(longest, self.chunk_size) + 1)

    @property
    def has_metadata(self) -> bool:
        """Whether writing can change a bitmap or a table."""
        return self.has_base or self.compact

    @property
    def metadata_end(self) -> int:
        """Where metadata ends: metadata_size, rounded down to a sector (format.md, "Surprising values")."""
        return self.metadata_size // SECTOR * SECTOR

    @property
    def data_offset(self) -> int:
        """Where data starts in the file that holds it."""
        return 0 if self.data_file else self.metadata_end

    @property
    def length_counts(self) -> bool:
        """Whether the disk is as long as its data file: an image without metadata that was not closed.

        The kernel had the file, and makes it longer without telling anybody (format.md, "Left to the writer").
        """
        in_file = bool(self.data_file) and self.data_file_fmt in ("", "raw")
        return in_file and not self.clean and not self.has_metadata

    def with_length(self, storage: int) -> Header:
        """The header with the disk's true size, where its data has this many bytes (`length_counts`)."""
        if not self.length_counts or not self.virtual_disk_size < storage <= MAX_DISK_SIZE:
            return self
        return with_fields(self, virtual_disk_size=round_up(storage, SECTOR))

    def is_truncated(self, storage: int, *, any_local: bool) -> bool:
        """Whether an image without a table has had more data (format.md, "Storage without a table").

        `storage`: bytes of data that there are; `any_local`: whether a bit is set.
        """
        assert not self.compact
        if self.length_counts:
            storage = round_up(storage, SECTOR)
        if storage >= SECTOR:  # less may be what an odd metadata_size leaves to a new image
            return storage < self.virtual_disk_size
        released = bool(self.base_img) and self.base_img_size > 0 and not self.has_base
        return (any_local or released) and not self.need_zero_init

    @property
    def bitmap_region(self) -> Region | None:
        """The part of the bitmap that is in use, in whole pages (format.md, "Bitmap")."""
        if not self.has_base:
            return None
        return Region("bitmap", self.bitmap_offset, round_up(ceil_div(self.blocks, 8), PAGE))

    @property
    def table_region(self) -> Region | None:
        """The part of the table that is in use, in whole pages (format.md, "Chunk table")."""
        if not self.compact:
            return None
        return Region("table", self.table_offset, round_up(self.chunks * TABLE_ENTRY_SIZE, PAGE))

    @property
    def journal_region(self) -> Region | None:
        """The journal; None where the image has none, or neither bitmap nor table."""
        if self.journal_size == 0 or not self.has_metadata:
            return None
        return Region("journal", self.journal_offset, self.journal_size)

    def regions(self) -> Iterator[Region]:
        """Bitmap, table and journal, as far as they are in use."""
        for region in (self.bitmap_region, self.table_region, self.journal_region):
            if region is not None:
                yield region

    @property
    def profile_region(self) -> Region | None:
        """The prefetch profile, in whole pages; None where there is none, or its fields are wrong."""
        if not self.prefetch_profile_entries or self.profile_fault(self.regions(), self.metadata_end):
            return None
        return self._stated_profile

    @property
    def _stated_profile(self) -> Region:
        size = round_up(self.prefetch_profile_entries * PROFILE_ENTRY.size, PAGE)
        return Region("profile", self.prefetch_profile_offset, size)

    def profile_fault(self, regions: Iterable[Region], end: int) -> str:
        """Why there can be no profile where the fields say; empty: there can (format.md, "Reserved fields").

        `regions`: those that it must not overlap; `end`: the byte of the file that it must not reach past.
        """
        profile, most = self._stated_profile, MAX_PROFILE_SIZE // PROFILE_ENTRY.size
        if not 0 <= self.prefetch_profile_entries <= most:
            return f"prefetch_profile_entries={self.prefetch_profile_entries} must be 0..{most}"
        if self.prefetch_profile_entries and not 0 < self.unit_of_PrefetchProfileEntry_len <= MAX_PROFILE_UNIT:
            unit = self.unit_of_PrefetchProfileEntry_len
            return f"unit_of_PrefetchProfileEntry_len={unit} must be 1..{MAX_PROFILE_UNIT}"
        if profile.offset % PAGE:
            return f"must be a multiple of {PAGE}"
        if profile.offset < HEADER_SPACE or profile.end > end:
            return f"the profile, of {profile.size} bytes, must be in {HEADER_SPACE}..{end}"
        overlapped = [other.name for other in regions if profile.offset < other.end and other.offset < profile.end]
        if overlapped:
            return f"the profile, of {profile.size} bytes, overlaps the {' and the '.join(overlapped)}"
        return ""

    @property
    def profile_room(self) -> Region:
        """Where a profile may be put: behind all other regions, before the data.

        Where the base is no longer needed its bitmap keeps its place: `check` looks at it.
        """
        end = max((region.end for region in with_fields(self, all_data_in_fvd_img=0).regions()), default=HEADER_SPACE)
        offset = round_up(max(end, HEADER_SPACE), PAGE)
        return Region("profile", offset, min(max(0, self.metadata_end - offset), MAX_PROFILE_SIZE) // PAGE * PAGE)

    @property
    def table_capacity(self) -> int:
        """How many entries table and journal have room for (format.md, "Regions" and "Values at creation")."""
        assert self.compact
        others = [region for region in self.regions() if region != self.table_region]
        if self.profile_region is not None:
            others.append(self.profile_region)
        ends = [region.offset for region in others if region.size] + [self.metadata_end]
        ends = [end for end in ends if end >= self.table_offset]  # a table of no entries may lie where another begins
        room = min(ends) - self.table_offset if ends else round_up(self.chunks * TABLE_ENTRY_SIZE, PAGE)
        entries = min(room // PAGE * PAGE // TABLE_ENTRY_SIZE, MAX_CHUNKS)
        if self.journal_size:
            entries = min(entries, self.journal_size // SECTOR * ENTRIES_WITH_BITMAP_RECORD)
        return entries

    # --- validity -----------------------------------------------------------------------------

    def check(self, image: str, file_size: int) -> None:
        """Raise FormatError unless the header describes an image that fits a file of `file_size` bytes."""
        for field, why in self._faults(file_size):
            raise FormatError(image, f"{field}={getattr(self, field)}: {why}")

    def _faults(self, file_size: int) -> Iterator[tuple[str, str]]:
        """Fields that cannot be right, and why; each rule presupposes that those before it hold."""
        yield from out_of_limits(self, LIMITS_OF_DISK)
        if not self.base_img and not self.all_data_in_fvd_img:
            yield "all_data_in_fvd_img", NEEDS_BASE
        if self.has_base:
            yield from out_of_limits(self, LIMITS_OF_BASE)
            yield from out_of_limits(self, [Limits("bitmap_size", ceil_div(self.blocks, 8), MAX_DISK_SIZE)])
        if self.compact:
            yield from out_of_limits(self, LIMITS_OF_TABLE)
            if self.chunks > MAX_CHUNKS:
                yield "chunk_size", f"too small for a disk of {self.virtual_disk_size} bytes"
        if self.has_metadata:
            yield from out_of_limits(self, LIMITS_OF_JOURNAL)
        for fault in misplaced(self, self.regions(), file_size):
            yield fault.field, fault.why


_FIELDS = tuple((field.name, field.metadata["code"]) for field in dataclasses.fields(Header))
_STRUCT = struct.Struct("<" + "".join(code for _, code in _FIELDS))
assert _STRUCT.size == HEADER_SIZE


def string_places() -> Iterator[tuple[str, int, int]]:
    """The fields that hold strings: name, offset in the file, size in bytes."""
    at = 0
    for name, code in _FIELDS:
        size = struct.calcsize(f"<{code}")
        if code.endswith("s"):
            yield name, at, size
        at += size


NEEDS_BASE = "the image says that it needs a base image, but base_img is empty"


@dataclass(frozen=True, slots=True)
class Limits:
    """The least and the largest value of a field, and what it must be a multiple of."""

    field: str
    low: int
    high: int
    unit: int = 1


LIMITS_OF_DISK = (Limits("virtual_disk_size", 0, MAX_DISK_SIZE, SECTOR), Limits("metadata_size", 0, MAX_DISK_SIZE))
LIMITS_OF_BASE = (
    Limits("base_img_size", 0, MAX_DISK_SIZE, SECTOR),
    Limits("block_size", SECTOR, MAX_BLOCK_SIZE, SECTOR),
)
LIMITS_OF_TABLE = (Limits("chunk_size", SECTOR, MAX_DISK_SIZE, SECTOR), Limits("storage_grow_unit", 0, MAX_DISK_SIZE))
LIMITS_OF_JOURNAL = (Limits("journal_size", 0, MAX_DISK_SIZE, SECTOR),)


def out_of_limits(header: Header, limits: Iterable[Limits]) -> Iterator[tuple[str, str]]:
    """The fields outside their limits, and why."""
    for limit in limits:
        value = getattr(header, limit.field)
        if not limit.low <= value <= limit.high:
            yield limit.field, f"must be {limit.low}..{limit.high}"
        elif value % limit.unit:
            yield limit.field, f"must be a multiple of {limit.unit}"


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A region that is where none can be."""

    field: str
    why: str
    regions: tuple[str, ...]
    """The names of those concerned."""
    truncated: bool = False
    """Whether it ends past the file."""


def misplaced(header: Header, regions: Iterable[Region], file_size: int) -> Iterator[Misplaced]:
    """The regions, of those given, that are off a sector, overlap another or the header, or end past the file."""
    last = Region("header", 0, HEADER_SIZE)
    for region in sorted(regions, key=lambda region: region.offset):
        field = f"{region.name}_offset"
        if region.offset % SECTOR:
            yield Misplaced(field, f"must be a multiple of {SECTOR}", (region.name,))
        if region.offset < last.end:
            why = f"the {region.name} overlaps the {last.name}, which ends at {last.end}"
            yield Misplaced(field, why, (region.name, last.name))
        if region.end > file_size:
            why = f"the {region.name} ends at {region.end}, the file at {file_size}"
            yield Misplaced(field, why, (region.name,), truncated=True)
        elif region.end > last.end:
            last = region
    if not header.data_file and header.metadata_end < last.end:
        why = f"data would overlap the {last.name}, which ends at {last.end}"
        yield Misplaced("metadata_size", why, (last.name,))


def changed_sectors(old: bytes | None, new: bytes) -> Iterator[tuple[int, bytes]]:
    """The sectors, as (offset, bytes), in which two encoded headers differ; all, where the old one is not known."""
    assert old is None or len(old) == len(new)
    assert len(new) % SECTOR == 0
    for at in range(0, len(new), SECTOR):
        if old is None or old[at : at + SECTOR] != new[at : at + SECTOR]:
            yield at, new[at : at + SECTOR]


def with_fields(header: Header, **changes: int | str) -> Header:
    """A copy of the header with some fields changed."""
    return dataclasses.replace(header, **changes)  # type: ignore[arg-type]
