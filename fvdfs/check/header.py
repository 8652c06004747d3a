"""The header of an image that may be damaged: everything that is wrong with it.

Each rule of `Header.check`, and more, is applied by itself: an image that breaks three of them gets
three findings. Where a field has one right value, the check goes on with that; a region is examined if
its own place and size make sense, whatever else does not. Only a header that passes `Header.check` in
the end is *sound*: by any other, nothing may be written.

Pure: bytes in, decisions out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fvdfs.check.findings import Findings, Kind, Severity
from fvdfs.errors import FormatError, NotFvd
from fvdfs.format import migration, moving
from fvdfs.format.header import (
    ENTRIES_WITH_BITMAP_RECORD,
    HEADER_SIZE,
    HEADER_SPACE,
    LIMITS_OF_BASE,
    LIMITS_OF_DISK,
    LIMITS_OF_JOURNAL,
    LIMITS_OF_TABLE,
    MAGIC,
    MAX_CHUNKS,
    MAX_DISK_SIZE,
    NEEDS_BASE,
    PAGE,
    SECTOR,
    VERSION,
    Header,
    Limits,
    Region,
    ceil_div,
    misplaced,
    out_of_limits,
    round_up,
    string_places,
    with_fields,
)
from fvdfs.format.note import NOTE_OFFSET, Note


@dataclass(frozen=True, slots=True)
class HeaderCheck:
    """A header, and how far it can be trusted."""

    raw: bytes
    """Its sectors and their padding, HEADER_SPACE bytes, as they are on disk."""
    header: Header
    """With the right value in each field that has one."""
    sound: bool
    """Whether `header` passes `Header.check`; if not, nothing may be written by it."""
    doubtful: frozenset[str]
    """Fields whose value cannot be right, and no other is known to be."""
    regions: dict[str, Region]
    """The regions in use that can be examined, by name."""

    @property
    def changed(self) -> bool:
        return self.raw[:HEADER_SIZE] != self.header.encode()

    @property
    def layout_known(self) -> bool:
        """Whether size and kind of the disk are beyond doubt."""
        return not self.doubtful & {"virtual_disk_size", "compact_image"}


@dataclass(frozen=True, slots=True)
class _Fault:
    field: str
    why: str
    right: int | None = None
    """The only value that can be right."""
    severity: Severity = Severity.CORRUPTION
    kind: Kind = Kind.HEADER_FIELD
    value: int | str | None = None
    """What to show as the field's value, where that is not what it decodes to."""
    remedy: str = ""
    """What a repair does, where that is not to set the field to `right`."""

    @property
    def casts_doubt(self) -> bool:
        """Whether nobody knows what the field should hold."""
        return self.severity is Severity.CORRUPTION and self.right is None

    def report(self, header: Header, findings: Findings) -> None:
        """Add it to the findings. `header`: as it is on disk."""
        value = self.value if self.value is not None else getattr(header, self.field, None)
        remedy = self.remedy or (f"sets it to {self.right}" if self.right is not None else "")
        findings.add(self.kind, self.severity, self.field, self.why, value=value, remedy=remedy)


_FLAGS = ("all_data_in_fvd_img", "copy_on_read", "compact_image", "clean_shutdown", "need_zero_init")
_OF_BASE = ("base_img_size", "bitmap_offset", "bitmap_size", "block_size")
_OF_TABLE = ("table_offset", "chunk_size")
_NOT_NEGATIVE = (
    "max_outstanding_copy_on_read_data",
    "prefetch_read_throughput_measure_time",
    "prefetch_write_throughput_measure_time",
    "prefetch_min_read_throughput",
    "prefetch_min_write_throughput",
    "prefetch_max_read_throughput",
    "prefetch_max_write_throughput",
)
_WRITE_UPDATES = ("", "no", "writethrough", "writeback", "writenocache")


def check_header(raw: bytes, file_size: int, findings: Findings) -> HeaderCheck | None:
    """Everything that is wrong with the header in `raw`, the first HEADER_SPACE bytes of a file, or all of it.

    None where the file ends inside the header. Raises NotFvd.
    """
    if int.from_bytes(raw[:4], "little") != MAGIC:
        raise NotFvd(findings.image, "not an FVD image (the magic number is missing)")
    if len(raw) < HEADER_SIZE:
        text = f"the file ends inside the header, which takes {HEADER_SIZE} bytes"
        findings.add(Kind.HEADER_CUT, Severity.CORRUPTION, "header", text, value=len(raw))
        return None
    raw = raw[:HEADER_SPACE].ljust(HEADER_SPACE, b"\0")
    on_disk = Header.decode(_decodable(raw), findings.image)
    faults = [*_raw_faults(raw), *_faults(on_disk)]
    doubtful = {fault.field for fault in faults if fault.casts_doubt}
    header = with_fields(on_disk, **{fault.field: fault.right for fault in faults if fault.right is not None})
    layout = _lay_out(header, doubtful, file_size)
    header = layout.header
    sound = not doubtful and _passes(header, file_size)
    faults += layout.faults
    if fault := _profile_fault(header, layout.regions, doubtful, file_size):
        faults.append(fault)
        header = with_fields(header, prefetch_profile_offset=0, prefetch_profile_entries=0)
    for fault in faults:
        fault.report(on_disk, findings)
    usable = {region.name: region for region in layout.regions if region.name not in layout.unusable}
    return HeaderCheck(raw, header, sound, frozenset(doubtful), usable)


def _decodable(raw: bytes) -> bytes:
    """The header as if its version were known and each of its strings had an end."""
    patched = bytearray(raw)
    patched[4:8] = VERSION.to_bytes(4, "little")
    for _, at, size in string_places():
        patched[at + size - 1] = 0
    return bytes(patched)


def _raw_faults(raw: bytes) -> Iterator[_Fault]:
    """What a header must not have to be decoded; and bytes that mean nothing."""
    version = int.from_bytes(raw[4:8], "little")
    if version != VERSION:
        why = f"only version {VERSION} is known; the rest is checked as if it were that"
        yield _Fault("version", why, kind=Kind.HEADER_VERSION, value=version)
    for name, at, size in string_places():
        _, nul, fill = raw[at : at + size].partition(b"\0")
        if not nul:
            start = raw[at : at + min(size, 16)].decode("utf-8", "surrogateescape")
            why = f"fills its {size} bytes without an end"
            yield _Fault(name, why, kind=Kind.HEADER_STRING, value=f"{start}...")
        elif fill.strip(b"\0"):
            why = "something other than zeros follows the end of the string"
            yield _Fault(name, why, None, Severity.HARMLESS, Kind.HEADER_FILL, remedy="writes zeros there")
    if not _is_padding(raw):
        why = f"bytes {HEADER_SIZE}..{HEADER_SPACE} of the file, the padding of the header, are not all zero"
        yield _Fault("header", why, None, Severity.HARMLESS, Kind.HEADER_PADDING)


def _is_padding(raw: bytes) -> bool:
    """Whether the padding holds nothing but what fvdfs puts there, or had to leave there."""
    rest = bytearray(raw)
    if moving.is_record(raw[moving.PLACE :]):
        rest[moving.PLACE :] = bytes(len(raw) - moving.PLACE)
    end = migration.PLACE + migration.SIZE
    if migration.is_record(raw[migration.PLACE : end]):
        rest[migration.PLACE : end] = bytes(migration.SIZE)
    if not any(rest[HEADER_SIZE:]):
        return True
    try:
        return not any(raw[HEADER_SIZE:NOTE_OFFSET]) and Note.decode(raw[NOTE_OFFSET:], "") is not None
    except FormatError:
        return False


def _passes(header: Header, file_size: int) -> bool:
    try:
        header.check("", file_size)
    except FormatError:
        return False
    return True


def _faults(header: Header) -> Iterator[_Fault]:
    """Fields that are not as in format.md, "Header", and those that `Header.check` refuses."""
    for flag in _FLAGS:
        if getattr(header, flag) not in (0, 1):
            yield _Fault(flag, "must be 0 or 1; it is taken as 1", 1, Severity.HARMLESS, Kind.HEADER_FLAG)
    yield from _size_faults(header, LIMITS_OF_DISK)
    if header.metadata_size % SECTOR and header.has_metadata:
        why = f"is no multiple of {SECTOR}, which is usual only without bitmap and table; data starts below it"
        yield _Fault("metadata_size", why, severity=Severity.HARMLESS, kind=Kind.HEADER_ODD)
    if header.has_base:
        yield from _base_faults(header)
    if header.base_img:
        yield from _prefetch_faults(header)
    else:
        yield from _no_base_faults(header)
    if header.compact:
        yield from _compact_faults(header)
    elif any(getattr(header, field) for field in _OF_TABLE):
        yield _Fault(
            "compact_image",
            f"table_offset={header.table_offset} and chunk_size={header.chunk_size} are those of a compact image; "
            "if it is one, all that it reads now is wrong",
            kind=Kind.HEADER_COMPACT,
        )
    if header.has_metadata:
        yield from _size_faults(header, LIMITS_OF_JOURNAL)
    elif header.journal_size and not any(getattr(header, field) for field in ("base_img", *_OF_BASE, *_OF_TABLE)):
        why = "means nothing in an image without bitmap and table"
        yield _Fault("journal_size", why, 0, Severity.HARMLESS, Kind.HEADER_ODD)


def _size_faults(header: Header, limits: Iterable[Limits]) -> list[_Fault]:
    return [_Fault(field, why) for field, why in out_of_limits(header, limits)]


def _disk_size(header: Header) -> int:
    """The disk's size in bytes, or the largest where that is no size."""
    size = header.virtual_disk_size
    return size if 0 <= size <= MAX_DISK_SIZE else MAX_DISK_SIZE


def _base_faults(header: Header) -> Iterator[_Fault]:
    faults = _size_faults(header, LIMITS_OF_BASE)
    yield from faults
    if faults:
        return
    if header.base_img_size > _disk_size(header):
        why = "what is past the end of the disk means nothing: the original leaves that when it makes a disk smaller"
        yield _Fault("base_img_size", why, severity=Severity.HARMLESS, kind=Kind.HEADER_ODD)
    blocks = ceil_div(header.base_img_size, header.block_size)
    right = round_up(ceil_div(blocks, 8), PAGE)
    if not ceil_div(header.blocks, 8) <= header.bitmap_size <= MAX_DISK_SIZE:
        yield _Fault("bitmap_size", f"must be {right} for {blocks} blocks", right, kind=Kind.HEADER_BITMAP_SIZE)
    elif header.bitmap_size != right:
        why = f"{right} are usual for {blocks} blocks"
        yield _Fault("bitmap_size", why, right, Severity.HARMLESS, Kind.HEADER_BITMAP_SIZE)


def _no_base_faults(header: Header) -> Iterator[_Fault]:
    traces = [field for field in _OF_BASE if getattr(header, field)]
    if not header.all_data_in_fvd_img:
        yield _Fault("all_data_in_fvd_img", NEEDS_BASE, None if traces else 1)
    elif traces:
        why = f"the image has no base, but {', '.join(traces)} are set as for one"
        yield _Fault("base_img", why, severity=Severity.HARMLESS, kind=Kind.HEADER_ODD)


def _prefetch_faults(header: Header) -> Iterator[_Fault]:
    """Fields that only copy-on-read, prefetching and writing to the base use."""
    odd = []
    block = header.block_size if header.block_size > 0 else 1
    if header.bytes_per_prefetch <= 0 or header.bytes_per_prefetch % block:
        odd.append(("bytes_per_prefetch", "must be a positive multiple of block_size"))
    if header.num_prefetch_slots <= 0:
        odd.append(("num_prefetch_slots", "must be positive"))
    if not 0 <= header.prefetch_perf_calc_alpha <= 100:
        odd.append(("prefetch_perf_calc_alpha", "must be 0..100"))
    odd += [(field, "must not be negative") for field in _NOT_NEGATIVE if getattr(header, field) < 0]
    if header.write_updates_base_img not in _WRITE_UPDATES:
        odd.append(("write_updates_base_img", f"must be one of {', '.join(_WRITE_UPDATES[1:])}, or empty"))
    for field, why in odd:
        yield _Fault(field, why, severity=Severity.HARMLESS, kind=Kind.HEADER_ODD)


def _compact_faults(header: Header) -> Iterator[_Fault]:
    chunks, growth = LIMITS_OF_TABLE
    faults = _size_faults(header, [chunks])
    if not faults and ceil_div(_disk_size(header), header.chunk_size) > MAX_CHUNKS:
        faults.append(_Fault("chunk_size", f"too small for a disk of {header.virtual_disk_size} bytes"))
    yield from faults
    right = None if faults else header.chunk_size
    for field, why in out_of_limits(header, [growth]):
        yield _Fault(field, why, right)
    if right is not None and 0 <= header.storage_grow_unit < right:
        why = f"must be at least a chunk, {right} bytes, and is taken as that"
        yield _Fault("storage_grow_unit", why, right, Severity.HARMLESS, Kind.HEADER_ODD)
    if header.need_zero_init:
        why = "means nothing in an image with a table: chunks that are not allocated are zeros"
        yield _Fault("need_zero_init", why, 0, Severity.HARMLESS, Kind.HEADER_ODD)


def _regions(header: Header, doubtful: set[str]) -> Iterator[Region]:
    """The regions in use whose size is known."""
    if not doubtful & {"base_img_size", "block_size", "virtual_disk_size"} and (region := header.bitmap_region):
        yield region
    if not doubtful & {"virtual_disk_size", "chunk_size"} and (region := header.table_region):
        yield region
    if "journal_size" not in doubtful and (region := header.journal_region):
        yield region


@dataclass(frozen=True, slots=True)
class _Layout:
    """The regions of an image, moved where there is one place for them."""

    header: Header
    regions: list[Region]
    faults: list[_Fault]
    unusable: set[str]
    """Names of regions that cannot be examined."""


def _lay_out(header: Header, doubtful: set[str], file_size: int) -> _Layout:
    regions = list(_regions(header, doubtful))
    wrong = [fault for fault in misplaced(header, regions, file_size) if fault.field not in doubtful]
    remedy, unusable = "", {name for fault in wrong for name in fault.regions}
    if wrong and (move := _only_move(header, regions, file_size)):
        field, start = move
        header = with_fields(header, **{field: start})
        regions = list(_regions(header, doubtful))
        remedy, unusable = f"sets {field} to {start}, the only place for it", set()
    kinds = {True: Kind.REGION_CUT, False: Kind.REGION_MISPLACED}
    faults = [_Fault(fault.field, fault.why, kind=kinds[fault.truncated], remedy=remedy) for fault in wrong]
    return _Layout(header, regions, faults, unusable)


def _only_move(header: Header, regions: list[Region], file_size: int) -> tuple[str, int] | None:
    """The one offset field, and its value, that repairs the layout; None where there is none, or several.

    Regions are created one behind the other (format.md, "Regions"), so the place of one follows from the
    others: the gap between its neighbours must be just as large as it is. metadata_size is never derived
    (format.md, "Surprising values").
    """
    moves = []
    for number, region in enumerate(regions):
        start = round_up(regions[number - 1].end, PAGE) if number else HEADER_SPACE
        stop = regions[number + 1].offset if number + 1 < len(regions) else header.metadata_end
        if start + round_up(region.size, PAGE) == stop:
            field = f"{region.name}_offset"
            if start != region.offset and _passes(with_fields(header, **{field: start}), file_size):
                moves.append((field, start))
    return moves[0] if len(moves) == 1 else None


def _profile_fault(header: Header, regions: list[Region], doubtful: set[str], file_size: int) -> _Fault | None:
    """A prefetch profile where none can be."""
    end = file_size if "metadata_size" in doubtful else min(header.metadata_end, file_size)
    if not header.prefetch_profile_offset and not header.prefetch_profile_entries:
        return None
    why = header.profile_fault(regions, end)
    remedy = "sets it and prefetch_profile_entries to 0: prefetching forgets what was read first"
    return _Fault("prefetch_profile_offset", why, None, Severity.HARMLESS, Kind.PROFILE, remedy=remedy) if why else None


def check_state(check: HeaderCheck, findings: Findings) -> None:
    """Whether the journal has room for the whole table (format.md, "Values at creation")."""
    header = check.header
    if (
        header.compact
        and header.journal_size
        and not check.doubtful & {"chunk_size", "virtual_disk_size", "journal_size"}
    ):
        least = ceil_div(header.chunks, ENTRIES_WITH_BITMAP_RECORD) * SECTOR
        if header.journal_size < least:
            text = f"less than the {least} bytes that hold all entries of the table"
            value = header.journal_size
            findings.add(Kind.JOURNAL_SMALL, Severity.HARMLESS, "journal_size", text, value=value)
