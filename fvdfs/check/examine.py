"""Examining one image of a chain: what is wrong with it, from the header to the base. Nothing is written.

The journal is replayed in memory, also where the image is clean: bits only get set and entries never
change, so a replay that changes a clean image shows that bitmap or table have lost something
(format.md, "Journal"). All later checks take the image as a replay leaves it. The rules are in
`header.py` and `contents.py`.

What cannot be checked (an input error, a region that is too large) is an error, not a finding. Holes are
skipped, whatever their size. Bitmap and table are held in memory once, up to MAX_REGION bytes each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bitarray import bitarray

from fvdfs.alloc.table import MAX_DAMAGED, Table, decode_entries
from fvdfs.check.contents import (
    TableScan,
    base_ranges,
    bits_without_chunk,
    own_ranges,
    report_bitmap_of_complete,
    report_bitmap_tail,
    report_storage,
    report_table,
    room_ahead,
    room_in_chunks,
    storage_limit,
)
from fvdfs.check.findings import Findings, Kind, Range, Severity, bit_runs, bounded, join, numbered, span
from fvdfs.check.header import HeaderCheck, check_header, check_state
from fvdfs.check.layers import Absent, BaseZeros, CheckLayer, Filled, is_store, is_zero, read
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.errors import FormatError, ImageError
from fvdfs.format import journal
from fvdfs.format.header import HEADER_SPACE, PAGE, SECTOR, Header, Region, ceil_div, round_up
from fvdfs.format.migration import NO_RECORD, Record
from fvdfs.image.chain import MAX_REGION
from fvdfs.store.base import Store, next_data
from fvdfs.store.references import PROBE_SIZE, detect


@dataclass(slots=True)
class Examined:
    """What was found in one image, and what a repair needs to know."""

    findings: Findings
    errors: list[str] = field(default_factory=list)
    check: HeaderCheck | None = None
    size: int = 0
    """Bytes of the file."""
    storage: int | None = None
    """Bytes of data; None: not known."""
    replayed: bool = False
    """Whether the whole journal was replayed, or there is none."""
    storage_needed: int | None = None
    """Bytes of data that there must be, where there are fewer."""
    base_size: int | None = None
    """Bytes of the base; None: not known."""
    bitmap: Bitmap | None = None
    """As a replay leaves it."""
    scan: TableScan | None = None
    """Likewise."""
    bare: bitarray = field(default_factory=bitarray)
    """Chunks that are not allocated, under local blocks that the base does not have as zeros."""

    @property
    def header(self) -> Header:
        assert self.check is not None
        return self.check.header

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an error in the block, and go on behind it."""
        try:
            yield
        except OSError as error:
            self.errors.append(f"{what}: {error.strerror or error}")
        except ImageError as error:
            self.errors.append(str(error))


# --- reading ----------------------------------------------------------------------------------------


async def _load(layer: CheckLayer, found: Examined, region: Region | None) -> bytearray | None:
    """The bytes of a region; None where there is none, or it cannot be read."""
    if region is None:
        return None
    what = f"{layer.path}: {region.name}"
    if region.size > MAX_REGION:
        found.errors.append(f"{what}: of {region.size} bytes, more than the {MAX_REGION} that can be checked")
        return None
    with found.attempt(what):
        data = bytearray(region.size)
        with memoryview(data) as view:
            count = await layer.meta.pread(view, region.offset)
        if count == region.size:
            return data
        found.errors.append(f"{what}: ends early: the file is changing")
    return None


def _table_with_room(check: HeaderCheck, file_size: int) -> Region | None:
    """The table, and the room behind it that may hold entries from when the disk was larger."""
    table = check.regions.get("table")
    if table is None:
        return None
    ends = [region.offset for region in check.regions.values()]
    ends += [check.header.metadata_end, file_size]
    room = min((end for end in ends if end > table.offset), default=table.end) - table.offset
    room = min(room, MAX_REGION) // PAGE * PAGE
    return Region(table.name, table.offset, max(table.size, room))


# --- the order of checks ----------------------------------------------------------------------------


async def examine(layer: CheckLayer) -> Examined:
    """Check one image. What cannot be read is an error in the result; the rest is checked. Raises NotFvd."""
    found = Examined(Findings(layer.path))
    with found.attempt(layer.path):
        found.size = await layer.meta.size()
        found.check = check_header(await read(layer.meta, 0, HEADER_SPACE), found.size, found.findings)
    if found.check is not None:
        check_state(found.check, found.findings)
        await _examine_contents(layer, found)
    sound = found.check is not None and found.check.sound
    complete = found.replayed and not found.errors
    found.findings.block_unsafe(sound=sound, complete=complete, is_base=layer.is_base)
    return found


async def _examine_contents(layer: CheckLayer, found: Examined) -> None:
    assert found.check is not None
    await _check_data_file(layer, found)
    header = found.header
    bits = await _load(layer, found, found.check.regions.get("bitmap"))
    if bits is not None:
        report_bitmap_tail(header, bits, found.findings)
        found.bitmap = Bitmap(bits, header.blocks)
    table = await _load(layer, found, _table_with_room(found.check, found.size))
    if table is not None and found.storage is not None:
        assert is_store(layer.data)
        room = room_in_chunks(header, found.storage, fixed_size=layer.data.fixed_size)
        found.scan = TableScan(decode_entries(table), header.chunks, room)
        if found.scan.damaged > MAX_DAMAGED:
            why = f"{found.scan.damaged} entries of the table cannot be right: too many to go on"
            found.errors.append(f"{layer.path}: {why}")
    del table  # up to MAX_REGION bytes
    await _check_journal(layer, found)
    await _check_early_bits(layer, found)
    await _check_unneeded_bitmap(layer, found)
    if found.scan is not None:
        report_table(found.scan, header, found.bitmap, found.findings)
    await _check_storage(layer, found)
    await _check_base(layer, found)
    await _check_bits(layer, found)


async def _check_data_file(layer: CheckLayer, found: Examined) -> None:
    assert found.check is not None
    header, data = found.header, layer.data
    if isinstance(data, Absent):
        found.findings.add(data.kind, data.severity, "data_file", data.text, value=header.data_file)
    elif is_store(data) and (header.data_file or "metadata_size" not in found.check.doubtful):
        with found.attempt(data.name):
            found.storage = max(0, await data.size() - header.data_offset)
            if not data.fixed_size:
                found.check = replace(found.check, header=header.with_length(found.storage))
            guess = detect(await read(data, 0, PROBE_SIZE)) if header.data_file and not header.data_file_fmt else None
            if guess:
                text = f"empty means raw, but {header.data_file} looks like {guess}; a guest may have written that"
                found.findings.add(Kind.DATA_FORMAT, Severity.HARMLESS, "data_file_fmt", text, value="")


# --- the journal ---


async def _check_journal(layer: CheckLayer, found: Examined) -> None:
    """Replay it in memory; report what that changes, and bad records."""
    assert found.check is not None
    header = found.header
    if header.journal_region is None:
        found.replayed = True
        if not header.clean and "journal_size" not in found.check.doubtful:
            _report_unclean(header, found.findings)
        return
    region = found.check.regions.get("journal")
    if region is None:
        return
    known = (found.bitmap is not None or not header.has_base) and (found.scan is not None or not header.compact)
    with found.attempt(f"{layer.path}: journal"):
        if not known or not found.check.layout_known:
            await _parse_only(layer, found, region)
        elif found.scan is None or found.scan.damaged <= MAX_DAMAGED:
            await _replay(layer, found, region)


def _report_unclean(header: Header, findings: Findings) -> None:
    if header.has_metadata:
        text = (
            "the image was not closed, and has no journal: whether bits and entries of the last writes are "
            "missing cannot be seen (if fvdfs wrote them, none are)"
        )
        severity = Severity.CORRUPTION
    else:
        text, severity = "the image was not closed, but has nothing that could be incomplete", Severity.HARMLESS
        if header.length_counts:
            text = f"{text}; its disk is as long as its data file, {header.virtual_disk_size} bytes"
    remedy = "" if _owes_base(header) else "sets it to 1"
    findings.add(Kind.UNCLEAN, severity, "clean_shutdown", text, value=0, remedy=remedy, hint=_OWED)


_OWED = "left to the next mount, which has to see it to bring the base up to date"


def _owes_base(header: Header) -> bool:
    """Whether a mount has to see that the image was not closed (see `Image.begin_writing`)."""
    return header.has_base and header.write_updates_base_img == "writeback"


def _report_record(skipped: journal.Skipped, header: Header, findings: Findings) -> None:
    if header.clean:
        severity, effect = Severity.HARMLESS, "a replay would skip it"
    else:
        severity, effect = Severity.CORRUPTION, "the replay skips it, and what it tells of is lost"
    findings.add(
        Kind.JOURNAL_RECORD,
        severity,
        f"journal sector {skipped.sector}, byte {skipped.offset}",
        f"{skipped.reason}; {effect}",
        remedy="clears the journal",
    )


async def _parse_only(layer: CheckLayer, found: Examined, region: Region) -> None:
    """Check the records alone, where there is nothing to replay them into."""
    async for start, stop in Filled(layer.meta, region.offset, region.end):
        data = await read(layer.meta, start, stop - start)
        for at in range(0, len(data), SECTOR):
            for offset, record in journal.parse(data[at : at + SECTOR]):
                if isinstance(record, str):
                    sector = (start - region.offset + at) // SECTOR
                    _report_record(journal.Skipped(sector, offset, record), found.header, found.findings)


async def _replay(layer: CheckLayer, found: Examined, region: Region) -> None:
    header, bitmap, scan = found.header, found.bitmap, found.scan
    table = Table(scan.entries[:], header.chunks, len(scan.used)) if scan is not None else None
    # Bitmap records are normal also where the base is no longer needed.
    unneeded = Bitmap(b"", 0) if header.base_img else None
    bits_before = bitmap.count_local() if bitmap is not None else 0
    async for start, stop in Filled(layer.meta, region.offset, region.end):
        data = await read(layer.meta, start, stop - start)
        for skipped in journal.replay(data, header, bitmap or unneeded, table, (start - region.offset) // SECTOR):
            _report_record(skipped, header, found.findings)
    found.replayed = True
    bits_set = entries_set = 0
    if bitmap is not None:
        bits_set = bitmap.count_local() - bits_before
    if table is not None and scan is not None:
        entries_set = _take_entries(found, scan, table.take_dirty_pages())
    what = f"{bits_set} bits and {entries_set} table entries"
    if not header.clean:
        found.findings.add(
            Kind.REPLAY_PENDING,
            Severity.HARMLESS,
            "clean_shutdown",
            f"the image was not closed: the next opening replays its journal, which sets {what}",
            value=0,
            remedy="" if _owes_base(header) else "replays it",
            hint=_OWED,
        )
    elif bits_set or entries_set:
        found.findings.add(
            Kind.JOURNAL_UNAPPLIED,
            Severity.CORRUPTION,
            "journal",
            f"the image was closed, but {what} that the journal knows of are not set: bitmap or table were lost",
            remedy="replays it",
        )


def _take_entries(found: Examined, scan: TableScan, pages: list[tuple[int, bytes]]) -> int:
    """Take over the pages of the table that a replay has changed; the number of changed entries."""
    changed = 0
    entries = scan.entries
    for page, content in pages:
        new = decode_entries(content)
        first = page * len(new)
        changed += sum(a != b for a, b in zip(entries[first : first + len(new)], new, strict=True))
        entries[first : first + len(new)] = new
    if changed:
        found.scan = TableScan(entries, scan.chunks, len(scan.used))
        found.scan.flagged = scan.flagged
    return changed


# --- bitmap and base ---


async def _check_early_bits(layer: CheckLayer, found: Examined) -> None:
    """Nothing may be kept of a disk that is being received (docs/migration.md, "Receiving")."""
    if found.bitmap is None or not (kept := found.bitmap.count_local()):
        return
    record = NO_RECORD
    with found.attempt(layer.path):
        try:
            record = Record.at(await read(layer.meta, 0, HEADER_SPACE), layer.path)
        except FormatError:
            return  # it says so itself wherever the image is used
    if record.receiving:
        found.findings.add(
            Kind.BITMAP_EARLY,
            Severity.CORRUPTION,
            "bitmap",
            f"{kept} blocks were kept while the disk could be written at its source, and may be old",
            hint="remove this image, and receive the disk again",
        )


async def _check_unneeded_bitmap(layer: CheckLayer, found: Examined) -> None:
    """Every bit must be set where the base is said not to be needed (format.md, "Reads, writes, copies")."""
    assert found.check is not None
    header = found.header
    if not header.base_img or not header.all_data_in_fvd_img or not found.check.layout_known:
        return
    base_size = min(header.base_img_size, header.virtual_disk_size)
    if header.block_size < SECTOR or base_size <= 0:
        return
    blocks = ceil_div(base_size, header.block_size)
    region = Region("bitmap", header.bitmap_offset, bitmap_bytes(blocks))
    others = found.check.regions.values()
    overlaps = any(region.offset < other.end and other.offset < region.end for other in others)
    if region.offset < HEADER_SPACE or overlaps or region.end > found.size:
        return
    bits = await _load(layer, found, region)
    if bits is not None:
        report_bitmap_of_complete(header, bits, blocks, found.findings)


async def _check_base(layer: CheckLayer, found: Examined) -> None:
    header, base, bitmap = found.header, layer.base, found.bitmap
    if not header.has_base or base is None:
        return
    if isinstance(base, Absent):
        corrupt = base.severity is Severity.CORRUPTION
        whole = corrupt and bitmap is not None and bitmap.all_local(0, bitmap.blocks)
        found.findings.add(
            base.kind,
            base.severity,
            "base_img",
            base.text,
            value=header.base_img,
            remedy="sets all_data_in_fvd_img to 1, since every block is in the image" if whole else "",
            hint=base.hint if corrupt else "",
        )
        return
    with found.attempt(header.base_img):
        if isinstance(base, CheckLayer):
            found.base_size = await _size_of(base)
        else:
            found.base_size = await base.size()
        known = found.check is not None and "base_img_size" not in found.check.doubtful
        size = found.base_size
        if known and size is not None and size < header.base_size - SECTOR + 1 and not _follows_source(found):
            _report_short_base(header, bitmap, size, found.findings)


def _follows_source(found: Examined) -> bool:
    """Whether a source gives what the base does not have."""
    assert found.check is not None
    try:
        return Record.at(found.check.raw, found.findings.image).keeps_base
    except FormatError:
        return False  # it is told as what it is: no padding


async def _size_of(base: CheckLayer) -> int | None:
    check = check_header(await read(base.meta, 0, HEADER_SPACE), await base.meta.size(), Findings(base.path))
    if check is None or not check.layout_known:
        return None
    return check.header.virtual_disk_size


def _report_short_base(header: Header, bitmap: Bitmap | None, size: int, findings: Findings) -> None:
    if bitmap is None:
        lost: tuple[Range, ...] = ((size, header.base_size),)
    else:
        lost = bounded(base_ranges(header, bitmap, size))
    findings.add(
        Kind.BASE_SHORT,
        Severity.CORRUPTION if lost else Severity.HARMLESS,
        "base_img_size",
        f"{header.base_img} has only {size} bytes; {span(lost)} read as zeros",
        value=header.base_img_size,
        hint="cannot be repaired: the base is not the one that it was",
        lost=lost,
    )


async def _check_bits(layer: CheckLayer, found: Examined) -> None:
    """Local blocks without a chunk: harmless where the base is zero as well.

    The original leaves such bits over zeros (format.md, "Left to the writer").
    """
    header, bitmap, scan = found.header, found.bitmap, found.scan
    if not header.has_base or bitmap is None or scan is None:
        return
    found.bare = bitarray(scan.chunks)
    size = header.chunk_size
    unknown: list[Range] = []
    zeros = BaseZeros(layer.base)
    for start, stop in bits_without_chunk(header, bitmap, scan):
        zero: bool | None = None
        with found.attempt(header.base_img):
            zero = await zeros.hold(start, stop)
        if zero is None:
            join(unknown, start, stop)
        elif not zero:
            found.bare[start // size : ceil_div(stop, size)] = 1
    for first, end in bit_runs(found.bare):
        lost = bounded(own_ranges(header, bitmap, first * size, min(end * size, header.base_size)))
        found.findings.add(
            Kind.BIT_WITHOUT_CHUNK,
            Severity.CORRUPTION,
            numbered("table entry", first, end),
            f"{span(lost)} were written, as the bitmap says, but have no chunk: they read as zeros, and are lost",
            remedy="gives them chunks of zeros",
            lost=lost,
        )
    if unknown:
        found.findings.add(
            Kind.BIT_WITHOUT_CHUNK,
            Severity.HARMLESS,
            "bitmap",
            f"{span(unknown)} count as written, but have no chunk; whether they were zeros, only the base can show",
            lost=tuple(unknown),
        )


# --- the storage ---


async def _check_storage(layer: CheckLayer, found: Examined) -> None:
    """Whether it is long enough; space in it that nothing refers to."""
    assert found.check is not None
    header, scan = found.header, found.scan
    if found.storage is None or not found.check.layout_known:
        return
    assert is_store(layer.data)
    data = layer.data
    if found.bitmap is not None or not header.has_base:
        found.storage_needed = report_storage(
            header, found.bitmap, scan, found.storage, fixed_size=data.fixed_size, findings=found.findings
        )
    if header.compact and scan is None:
        return
    with found.attempt(data.name):
        if scan is not None:
            await _check_leaks(data, header, scan, found.findings)
        if not data.fixed_size:
            await _check_tail(data, header, scan, found)


async def _check_leaks(data: Store, header: Header, scan: TableScan, findings: Findings) -> None:
    size = header.chunk_size
    for first, stop in scan.leaked():
        start, end = header.data_offset + first * size, header.data_offset + stop * size
        free = await _takes_no_space(data, start, end)
        findings.add(
            Kind.CHUNK_LEAKED,
            Severity.HARMLESS if free or data.fixed_size else Severity.LEAK,
            numbered("chunk", first, stop),
            f"no entry names it ({(stop - first) * size} bytes of storage)" + (", which take no space" if free else ""),
            remedy="" if free or data.fixed_size else "gives its space back, the number stays unused",
            hint="is used again when the device is full" if data.fixed_size else "",
        )


async def _takes_no_space(data: Store, start: int, stop: int) -> bool:
    """Whether the whole pages in a range are a hole."""
    start, stop = round_up(start, PAGE), stop // PAGE * PAGE
    return start >= stop or await next_data(data, start, stop) == stop


async def _check_tail(data: Store, header: Header, scan: TableScan | None, found: Examined) -> None:
    """What lies behind all that the image uses or has made ready."""
    end = header.data_offset + storage_limit(header, scan)
    size = await data.size()
    if scan is not None:
        used = header.data_offset + scan.end * header.chunk_size
        if not await is_zero(data, used, min(size, used + room_ahead(header, scan) * header.chunk_size)):
            found.findings.add(
                Kind.STORAGE_TAIL,
                Severity.LEAK,
                "storage",
                f"{data.name} has {size - used} bytes behind its highest chunk, and not all of them zeros: a crash has "
                "left them, and who writes to the image next may show them",
                remedy="cuts the file at the end of the highest chunk",
            )
            return
    if size <= end or await _takes_no_space(data, end, round_up(size, PAGE)):
        return
    found.findings.add(
        Kind.STORAGE_TAIL,
        Severity.LEAK,
        "storage",
        f"{data.name} has {size} bytes, of which the last {size - end} are of no use",
        remedy="cuts the file at the end of the highest chunk" if scan is not None else "",
        hint=f"kept, since with a wrong virtual_disk_size they would be the disk's; if it is right: truncate -s {end}",
    )
