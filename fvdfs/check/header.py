"""The header of an image that may be damaged: everything that is wrong with it.

Each rule of `Header.check`, and more, is looked at by itself: an image that breaks three of them gets
three findings. Where a field has one right value, the check goes on with that; a region is looked into
if its own place and size make sense, whatever else does not. Only a header that passes `Header.check`
in the end is *sound*: by any other, nothing may be written.

Pure: bytes in, decisions out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fvdfs.check.findings import Findings, Kind, Severity
from fvdfs.errors import FormatError, NotFvd
from fvdfs.format.header import (
    ENTRIES_WITH_BITMAP_RECORD,
    HEADER_SIZE,
    HEADER_SPACE,
    MAGIC,
    MAX_CHUNKS,
    MAX_DISK_SIZE,
    PAGE,
    SECTOR,
    VERSION,
    Header,
    Region,
    ceil_div,
    round_up,
    string_places,
    with_fields,
)

PROFILE_ENTRY_SIZE = 12


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
    """The regions in use that can be looked into."""

    @property
    def changed(self) -> bool:
        return self.raw[:HEADER_SIZE] != self.header.encode()

    @property
    def layout_known(self) -> bool:
        """Whether size and kind of the disk are beyond doubt."""
        return not self.doubtful & {"virtual_disk_size", "compact_image"}

    def usable(self, name: str) -> Region | None:
        """The region of this name, if the image has it and it can be looked into."""
        return self.regions.get(name)


@dataclass(frozen=True, slots=True)
class _Fault:
    field: str
    why: str
    right: int | None = None
    """The only value that can be right."""
    severity: Severity = Severity.CORRUPTION
    kind: Kind = Kind.HEADER_FIELD


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

    None where there is not enough to go on with. Raises NotFvd.
    """
    if int.from_bytes(raw[:4], "little") != MAGIC:
        raise NotFvd(findings.image, "not an FVD image (the magic number is missing)")
    if len(raw) < HEADER_SIZE:
        text = f"the file ends inside the header, which takes {HEADER_SIZE} bytes"
        findings.add(Kind.HEADER_CUT, Severity.CORRUPTION, "header", text, value=len(raw))
        return None
    raw = raw[:HEADER_SPACE].ljust(HEADER_SPACE, b"\0")
    patched = bytearray(raw)
    doubtful = set()
    version = int.from_bytes(raw[4:8], "little")
    if version != VERSION:
        patched[4:8] = VERSION.to_bytes(4, "little")
        doubtful.add("version")
    filled = []
    for name, at, size in string_places():
        _, nul, fill = raw[at : at + size].partition(b"\0")
        if not nul:
            patched[at + size - 1] = 0
            doubtful.add(name)
        elif fill.strip(b"\0"):
            filled.append(name)
    found = Header.decode(bytes(patched), findings.image)

    faults = list(_faults(found))
    doubtful.update(fault.field for fault in faults if _is_open(fault))
    header = with_fields(found, **{fault.field: fault.right for fault in faults if fault.right is not None})
    regions = list(_regions(header, doubtful))
    misplaced = list(_misplaced(header, regions, doubtful, file_size))
    move = _only_move(header, regions, file_size) if misplaced else None
    if move is not None:
        header = with_fields(header, **{move[0]: move[1]})
        regions = list(_regions(header, doubtful))
    sound = not doubtful and _passes(header, file_size)

    _report_strings(raw, version, doubtful, filled, findings)
    for fault in faults:
        remedy = f"sets it to {fault.right}" if fault.right is not None else ""
        value = getattr(found, fault.field)
        findings.add(fault.kind, fault.severity, fault.field, fault.why, value=value, remedy=remedy)
    for _, fault in misplaced:
        remedy = f"sets {move[0]} to {move[1]}, the only place for it" if move is not None else ""
        value = getattr(found, fault.field)
        findings.add(fault.kind, fault.severity, fault.field, fault.why, value=value, remedy=remedy)
    header = _check_profile(header, regions, doubtful, file_size, findings)
    unusable = set() if move is not None else {name for names, _ in misplaced for name in names}
    usable = {region.name: region for region in regions if region.name not in unusable}
    return HeaderCheck(raw, header, sound, frozenset(doubtful), usable)


def _is_open(fault: _Fault) -> bool:
    return fault.severity is Severity.CORRUPTION and fault.right is None


def _report_strings(raw: bytes, version: int, doubtful: set[str], filled: list[str], findings: Findings) -> None:
    if version != VERSION:
        text = f"only version {VERSION} is known; the rest is looked at as if it were that"
        findings.add(Kind.HEADER_VERSION, Severity.CORRUPTION, "version", text, value=version)
    for name, at, size in string_places():
        if name in doubtful:
            value = raw[at : at + min(size, 16)].decode("utf-8", "surrogateescape") + "..."
            text = f"fills its {size} bytes without an end"
            findings.add(Kind.HEADER_STRING, Severity.CORRUPTION, name, text, value=value)
        elif name in filled:
            text = "something other than zeros follows the end of the string"
            findings.add(Kind.HEADER_FILL, Severity.HARMLESS, name, text, remedy="writes zeros there")
    if any(raw[HEADER_SIZE:]):
        text = f"bytes {HEADER_SIZE}..{HEADER_SPACE} of the file, the padding of the header, are not all zero"
        findings.add(Kind.HEADER_PADDING, Severity.HARMLESS, "header", text)


def _passes(header: Header, file_size: int) -> bool:
    try:
        header.check("", file_size)
    except FormatError:
        return False
    return True


def _faults(header: Header) -> Iterator[_Fault]:
    """Fields that are not what format.md, "Header", says, and those that `Header.check` refuses."""
    for flag in _FLAGS:
        if getattr(header, flag) not in (0, 1):
            yield _Fault(flag, "must be 0 or 1; it is taken as 1", 1, Severity.HARMLESS, Kind.HEADER_FLAG)
    yield from _size_fault(header, "virtual_disk_size", 0, MAX_DISK_SIZE, SECTOR)
    yield from _size_fault(header, "metadata_size", 0, MAX_DISK_SIZE)
    if header.metadata_size % SECTOR and header.has_metadata:
        why = f"is no multiple of {SECTOR}, which is usual only without a bitmap and a table; data starts below it"
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
            "if it is one, nothing of what it reads now is right",
            kind=Kind.HEADER_COMPACT,
        )
    if header.has_metadata:
        yield from _size_fault(header, "journal_size", 0, MAX_DISK_SIZE, SECTOR)
    elif header.journal_size and not any(getattr(header, field) for field in ("base_img", *_OF_BASE, *_OF_TABLE)):
        why = "means nothing in an image with neither a bitmap nor a table"
        yield _Fault("journal_size", why, 0, Severity.HARMLESS, Kind.HEADER_ODD)


def _size_fault(header: Header, field: str, low: int, high: int, unit: int = 1) -> Iterator[_Fault]:
    value = getattr(header, field)
    if not low <= value <= high:
        yield _Fault(field, f"must be {low}..{high}")
    elif value % unit:
        yield _Fault(field, f"must be a multiple of {unit}")


def _disk_size(header: Header) -> int:
    """The disk's size in bytes, or the largest where that is no size."""
    size = header.virtual_disk_size
    return size if 0 <= size <= MAX_DISK_SIZE else MAX_DISK_SIZE


def _base_faults(header: Header) -> Iterator[_Fault]:
    faults = [
        *_size_fault(header, "base_img_size", 0, MAX_DISK_SIZE, SECTOR),
        *_size_fault(header, "block_size", SECTOR, (1 << 31) - SECTOR, SECTOR),
    ]
    yield from faults
    if faults:
        return
    if header.base_img_size > _disk_size(header):
        why = "what is past the end of the disk means nothing, as where the original has made the disk smaller"
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
        why = "the image says that it needs a base image, but base_img is empty"
        yield _Fault("all_data_in_fvd_img", why, None if traces else 1)
    elif traces:
        why = f"the image has no base, but {', '.join(traces)} are set as for one"
        yield _Fault("base_img", why, severity=Severity.HARMLESS, kind=Kind.HEADER_ODD)


def _prefetch_faults(header: Header) -> Iterator[_Fault]:
    """What only the copying from the base goes by."""
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
    faults = list(_size_fault(header, "chunk_size", SECTOR, MAX_DISK_SIZE, SECTOR))
    if not faults and ceil_div(_disk_size(header), header.chunk_size) > MAX_CHUNKS:
        faults.append(_Fault("chunk_size", f"too small for a disk of {header.virtual_disk_size} bytes"))
    yield from faults
    grow_unit = header.storage_grow_unit
    if not 0 <= grow_unit <= MAX_DISK_SIZE:
        why = f"must be 0..{MAX_DISK_SIZE}"
        yield _Fault("storage_grow_unit", why, None if faults else header.chunk_size)
    elif not faults and grow_unit < header.chunk_size:
        why = f"must be at least a chunk, {header.chunk_size} bytes, and is taken as that"
        yield _Fault("storage_grow_unit", why, header.chunk_size, Severity.HARMLESS, Kind.HEADER_ODD)
    if header.need_zero_init:
        why = "means nothing in an image with a table, whose missing chunks are zeros"
        yield _Fault("need_zero_init", why, 0, Severity.HARMLESS, Kind.HEADER_ODD)


def _regions(header: Header, doubtful: set[str]) -> Iterator[Region]:
    """The regions in use whose size can be computed."""
    if not doubtful & {"base_img_size", "block_size", "virtual_disk_size"} and (region := header.bitmap_region):
        yield region
    if not doubtful & {"virtual_disk_size", "chunk_size"} and (region := header.table_region):
        yield region
    if "journal_size" not in doubtful and (region := header.journal_region):
        yield region


def _misplaced(
    header: Header, regions: list[Region], doubtful: set[str], file_size: int
) -> Iterator[tuple[tuple[str, ...], _Fault]]:
    """Regions that are not where one can be: the names of those concerned, and what is wrong."""
    last = Region("header", 0, HEADER_SPACE)
    for region in sorted(regions, key=lambda region: region.offset):
        field = f"{region.name}_offset"
        if region.offset % SECTOR:
            yield (region.name,), _Fault(field, f"must be a multiple of {SECTOR}", kind=Kind.REGION_MISPLACED)
        if region.offset < last.end:
            why = f"the {region.name}, of {region.size} bytes, overlaps the {last.name}, which ends at {last.end}"
            yield (region.name, last.name), _Fault(field, why, kind=Kind.REGION_MISPLACED)
        if region.end > file_size:
            why = f"the {region.name} ends at {region.end}, the file at {file_size}"
            yield (region.name,), _Fault(field, why, kind=Kind.REGION_CUT)
        elif region.end > last.end:
            last = region
    if not header.data_file and "metadata_size" not in doubtful and header.metadata_end < last.end:
        why = f"data would overlap the {last.name}, which ends at {last.end}"
        yield (last.name,), _Fault("metadata_size", why, kind=Kind.REGION_MISPLACED)


def _only_move(header: Header, regions: list[Region], file_size: int) -> tuple[str, int] | None:
    """The one offset of a region, and its value, that puts all right: if there is exactly one.

    Regions are created one behind the other (format.md, "Regions"), so that the place of one follows
    from the others: there must be a gap between its neighbours that is just as large as it is.
    metadata_size is never derived (format.md, "Surprising values").
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


def profile_region(header: Header) -> Region | None:
    """The prefetch profile, if there is one (format.md, "Reserved fields")."""
    if not header.prefetch_profile_offset and not header.prefetch_profile_entries:
        return None
    return Region("profile", header.prefetch_profile_offset, header.prefetch_profile_entries * PROFILE_ENTRY_SIZE)


def _check_profile(
    header: Header, regions: list[Region], doubtful: set[str], file_size: int, findings: Findings
) -> Header:
    """The header without a profile that cannot be one."""
    profile = profile_region(header)
    if profile is None:
        return header
    others = [Region("header", 0, HEADER_SPACE), *regions]
    if not header.data_file and not doubtful & {"metadata_size", "virtual_disk_size"}:
        size = MAX_DISK_SIZE if header.compact else header.virtual_disk_size
        others.append(Region("data", header.data_offset, size))
    why = ""
    if profile.size < 0:
        why = f"prefetch_profile_entries={header.prefetch_profile_entries} must not be negative"
    elif profile.offset % PAGE:
        why = f"must be a multiple of {PAGE}"
    elif profile.offset < HEADER_SPACE or profile.end > file_size:
        why = f"the profile, of {profile.size} bytes, must be in {HEADER_SPACE}..{file_size}"
    elif overlapped := [o.name for o in others if profile.offset < o.end and o.offset < profile.end]:
        why = f"the profile, of {profile.size} bytes, overlaps the {' and the '.join(overlapped)}"
    if not why:
        return header
    findings.add(
        Kind.PROFILE,
        Severity.HARMLESS,
        "prefetch_profile_offset",
        why,
        value=profile.offset,
        remedy="sets it and prefetch_profile_entries to 0: prefetching forgets what was read first",
    )
    return with_fields(header, prefetch_profile_offset=0, prefetch_profile_entries=0)


def check_state(check: HeaderCheck, findings: Findings) -> None:
    """What the header says about table and journal together (format.md, "Values at creation")."""
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
