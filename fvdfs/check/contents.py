"""The contents of an image that may be damaged: table, bitmap, storage; and what they should hold instead.

    TableScan       checks each entry of the table against the storage and all other entries
    report_*        tell what is wrong with table, bitmap and storage, and which bytes of the disk are lost
    plan_table      makes a table that is right. Entries past the storage become UNALLOCATED, and read as
                    zeros, or as the base where the block is not local. The second owner of a chunk gets
                    a copy. A local block has a chunk, of zeros if its own is lost. No number is given
                    twice: new ones are above the highest (format.md, "Chunk table"), and those of leaked
                    chunks stay unused.

Bitmap and table are taken as a replay of the journal leaves them.

Pure: bytes in, decisions out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from bitarray import bitarray

from fvdfs.alloc.table import ENTRIES_PER_PAGE, NOT_JOURNALED
from fvdfs.check.findings import (
    MAX_LISTED,
    Findings,
    Kind,
    Range,
    Severity,
    bit_runs,
    bounded,
    numbered,
    span,
)
from fvdfs.cow.bitmap import Bitmap
from fvdfs.errors import ImageError
from fvdfs.format.header import MAX_CHUNKS, UNALLOCATED, Header, ceil_div, round_up

Buffer = bytes | bytearray | memoryview


# --- where bytes of the disk come from ----------------------------------------------------------------------


def own_ranges(header: Header, bitmap: Bitmap | None, start: int, stop: int) -> Iterator[Range]:
    """The parts of bytes [start, stop) of the disk that are read from the image's own storage.

    Without a bitmap, the base's range counts as local.
    """
    stop = min(stop, header.virtual_disk_size)
    base = header.base_size if bitmap is not None else 0
    if bitmap is not None and start < min(stop, base):
        for first, end, local in bitmap.block_runs(
            start // header.block_size, ceil_div(min(stop, base), header.block_size)
        ):
            if local:
                yield max(start, first * header.block_size), min(stop, base, end * header.block_size)
    if max(start, base) < stop:
        yield max(start, base), stop


def base_ranges(header: Header, bitmap: Bitmap, start: int) -> Iterator[Range]:
    """The parts of the disk, from byte `start` on, that are read from the base."""
    if start >= header.base_size:
        return
    for first, end, local in bitmap.block_runs(start // header.block_size, header.blocks):
        if not local:
            yield max(start, first * header.block_size), min(header.base_size, end * header.block_size)


# --- the table ------------------------------------------------------------------------------------


class TableScan:
    """The chunk table, each entry checked against the storage and all other entries.

    Entries behind the last chunk, from when the disk was larger, are not the disk's; but the chunks that
    they name do not count as free.
    """

    def __init__(self, entries: array[int], chunks: int, limit: int) -> None:
        """`entries`: as on disk, at least `chunks`; are taken over, and bit 31 is cleared in them.

        `limit`: how many chunks the storage has room for, a last partial one included.
        """
        self.entries = entries
        self.chunks = chunks
        self.flagged = bitarray(chunks)
        """Entries with bit 31 set."""
        self.beyond = bitarray(chunks)
        """Entries past the end of the storage."""
        self.extra = bitarray(chunks)
        """Entries that name the same chunk as an earlier one."""
        self.used = bitarray(min(limit, MAX_CHUNKS))
        self.allocated = 0
        self._scan()
        self._scan_tail()

    def _scan(self) -> None:
        for page in range(0, self.chunks, ENTRIES_PER_PAGE):
            part = self.entries[page : min(page + ENTRIES_PER_PAGE, self.chunks)]
            if part.count(part[0]) == len(part):
                self._scan_equal(page, page + len(part), part[0])
                continue
            for chunk, entry in enumerate(part, page):
                if entry == UNALLOCATED:
                    continue
                if entry & NOT_JOURNALED:
                    entry &= ~NOT_JOURNALED
                    self.entries[chunk] = entry
                    self.flagged[chunk] = 1
                self.allocated += 1
                if entry >= len(self.used):
                    self.beyond[chunk] = 1
                elif self.used[entry]:
                    self.extra[chunk] = 1
                else:
                    self.used[entry] = 1

    def _scan_equal(self, first: int, stop: int, entry: int) -> None:
        """Chunks [first, stop) with the same entry: UNALLOCATED mostly, 0 in a damaged table."""
        if entry == UNALLOCATED:
            return
        number = entry & ~NOT_JOURNALED
        if number != entry:
            self.entries[first:stop] = array("I", [number]) * (stop - first)
            self.flagged[first:stop] = 1
        self.allocated += stop - first
        if number >= len(self.used):
            self.beyond[first:stop] = 1
        else:
            self.extra[first + (not self.used[number]) : stop] = 1
            self.used[number] = 1

    def _scan_tail(self) -> None:
        for page in range(self.chunks // ENTRIES_PER_PAGE * ENTRIES_PER_PAGE, len(self.entries), ENTRIES_PER_PAGE):
            part = self.entries[max(page, self.chunks) : page + ENTRIES_PER_PAGE]
            for entry in set(part):
                number = entry & ~NOT_JOURNALED
                if entry != UNALLOCATED and number < len(self.used):
                    self.used[number] = 1

    @property
    def damaged(self) -> int:
        """How many entries cannot be right."""
        return self.beyond.count(1) + self.extra.count(1)

    @property
    def end(self) -> int:
        """The number above all that are used."""
        return self.used.find(1, right=True) + 1

    def holds(self, number: int) -> bool:
        """Whether an entry names this chunk."""
        return number < len(self.used) and bool(self.used[number])

    def leaked(self) -> Iterator[Range]:
        """Runs of numbers below the highest used one that no entry names."""
        free = ~self.used[: self.end]
        yield from bit_runs(free)

    def unallocated(self, stop: int) -> Iterator[Range]:
        """Runs of chunks below `stop` that are not allocated."""
        start = -1
        for page in range(0, stop, ENTRIES_PER_PAGE):
            part = self.entries[page : min(page + ENTRIES_PER_PAGE, stop)]
            if part.count(UNALLOCATED) == len(part):
                start = page if start < 0 else start
                continue
            for chunk, entry in enumerate(part, page):
                if entry == UNALLOCATED:
                    start = chunk if start < 0 else start
                elif start >= 0:
                    yield start, chunk
                    start = -1
        if start >= 0:
            yield start, stop

    def owners(self) -> dict[int, int]:
        """The first owner of each chunk that has several, by its number; of MAX_LISTED chunks at most."""
        owners = dict.fromkeys([self.entries[chunk] for chunk in islice(self.extra.search(1), MAX_LISTED)], -1)
        missing = len(owners)
        chunks = iter(range(self.chunks))
        while missing:
            chunk = next(chunks)
            if owners.get(self.entries[chunk]) == -1:
                owners[self.entries[chunk]] = chunk
                missing -= 1
        return owners


def report_table(scan: TableScan, header: Header, bitmap: Bitmap | None, findings: Findings) -> None:
    """Entries that cannot be right; adjacent ones of one kind are one finding."""
    size = header.chunk_size
    for first, stop in findings.listable(scan.flagged, Kind.TABLE_BIT_31, Severity.HARMLESS):
        findings.add(
            Kind.TABLE_BIT_31,
            Severity.HARMLESS,
            numbered("table entry", first, stop),
            "bit 31 is set, which says nothing on disk",
            value=f"0x{scan.entries[first] | NOT_JOURNALED:X}",
            remedy="clears it",
        )
    for first, stop in findings.listable(scan.beyond, Kind.CHUNK_BEYOND_STORAGE, Severity.CORRUPTION):
        lost = bounded(own_ranges(header, bitmap, first * size, stop * size))
        findings.add(
            Kind.CHUNK_BEYOND_STORAGE,
            Severity.CORRUPTION,
            numbered("table entry", first, stop),
            f"the storage has room for {len(scan.used)} chunks; {span(lost)} read as zeros: what they held is lost",
            value=scan.entries[first],
            remedy="takes them as never written",
            lost=lost,
        )
    owners = scan.owners()
    for chunk in islice(scan.extra.search(1), MAX_LISTED):
        number = scan.entries[chunk]
        lost = bounded(own_ranges(header, bitmap, chunk * size, (chunk + 1) * size))
        other = f"entry {owners[number]}" if number in owners else "another entry"
        findings.add(
            Kind.CHUNK_SHARED,
            Severity.CORRUPTION,
            f"table entry {chunk}",
            f"{other} names this chunk too: one of both has the wrong content, here {span(lost)}",
            value=number,
            remedy="gives it a copy of its own, which leaves the content as it is",
            lost=lost,
        )
    findings.more(Kind.CHUNK_SHARED, Severity.CORRUPTION, max(0, scan.extra.count(1) - MAX_LISTED))
    tail = scan.entries[scan.chunks : round_up(scan.chunks, ENTRIES_PER_PAGE)]
    if tail.count(UNALLOCATED) != len(tail):
        first = next(at for at, entry in enumerate(tail, scan.chunks) if entry != UNALLOCATED)
        text = (
            f"behind the last of {scan.chunks} chunks all must be 0x{UNALLOCATED:X}, unless virtual_disk_size is wrong"
        )
        place = f"table entry {first}"
        findings.add(Kind.TABLE_TAIL, Severity.HARMLESS, place, text, value=scan.entries[first])


def bits_without_chunk(header: Header, bitmap: Bitmap, scan: TableScan) -> Iterator[Range]:
    """Bytes of the disk that are local, but have no chunk."""
    for first, stop in scan.unallocated(ceil_div(header.base_size, header.chunk_size)):
        yield from own_ranges(
            header, bitmap, first * header.chunk_size, min(stop * header.chunk_size, header.base_size)
        )


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table that is right, and what has to be done for it."""

    entries: array[int]
    """All entries; those behind the last chunk are unchanged."""
    copies: tuple[tuple[int, int], ...]
    """Chunks to copy, as (from number, to number)."""
    zeros: Range
    """Numbers of new chunks, to be filled with zeros."""

    @property
    def end(self) -> int:
        """The number above all that are used."""
        return self.zeros[1]


def plan_table(scan: TableScan, header: Header, bitmap: Bitmap | None, bare: bitarray, image: str) -> TablePlan:
    """A table without what `report_table` reports.

    `bare`: chunks under local blocks that are not allocated. They, and chunks beyond the storage under
    local blocks of the base's range, become new chunks of zeros. Raises ImageError where no number is left.
    """
    entries = scan.entries[:]
    number = scan.end
    if number + scan.extra.count(1) + bare.count(1) + scan.beyond.count(1) > MAX_CHUNKS:
        raise ImageError(image, "every chunk number of the format is in use: the table cannot be repaired")
    copies = []
    for chunk in scan.extra.search(1):
        copies.append((entries[chunk], number))
        entries[chunk] = number
        number += 1
    first_zeros = number
    bare = bare.copy()
    for chunk in scan.beyond.search(1):
        entries[chunk] = UNALLOCATED
        start, end = chunk * header.chunk_size, min((chunk + 1) * header.chunk_size, header.base_size)
        if bitmap is not None and start < end and any(own_ranges(header, bitmap, start, end)):
            bare[chunk] = 1
    for chunk in bare.search(1):
        entries[chunk] = number
        number += 1
    return TablePlan(entries, tuple(copies), (first_zeros, number))


# --- the bitmap -----------------------------------------------------------------------------------


def report_bitmap_tail(header: Header, data: Buffer, findings: Findings) -> None:
    """Bits behind the last block: 0, or all of the bitmap 1 (format.md, "Bitmap")."""
    bits = bitarray(endian="little", buffer=data)
    count = bits.count(1, header.blocks)
    if header.base_img_size > header.virtual_disk_size:
        return  # they were blocks of a disk that was larger
    if count and not bits.all():
        findings.add(
            Kind.BITMAP_TAIL,
            Severity.HARMLESS,
            "bitmap",
            f"{count} bits behind the last of {header.blocks} blocks are set, and mean nothing",
            remedy="clears them",
        )


def without_tail(data: Buffer, blocks: int) -> Buffer:
    """The bitmap without bits behind the last block, unless all of it is set."""
    if bitarray(endian="little", buffer=data).all():
        return data
    cleared = bytearray(data)
    bitarray(endian="little", buffer=cleared)[blocks:] = 0
    return cleared


def report_bitmap_of_complete(header: Header, data: Buffer, blocks: int, findings: Findings) -> None:
    """A bitmap in which every bit must be set, since the base is not needed (format.md, "Reads, writes, copies")."""
    bits = bitarray(endian="little", buffer=data)
    missing = blocks - bits.count(1, 0, blocks)
    if missing:
        findings.add(
            Kind.BITMAP_INCOMPLETE,
            Severity.CORRUPTION,
            "all_data_in_fvd_img",
            f"the base is said not to be needed, but {missing} of {blocks} blocks are not local; "
            f"if they are in {header.base_img}, the disk reads wrongly",
            value=header.all_data_in_fvd_img,
            hint="cannot be repaired: nobody can tell which of both is right",
        )


# --- the storage ----------------------------------------------------------------------------------


def room_in_chunks(header: Header, storage: int, *, fixed_size: bool) -> int:
    """How many chunks `storage` bytes hold; in a file, which can be extended, a partial one counts."""
    return storage // header.chunk_size if fixed_size else ceil_div(storage, header.chunk_size)


def report_storage(
    header: Header, bitmap: Bitmap | None, scan: TableScan | None, storage: int, *, fixed_size: bool, findings: Findings
) -> int | None:
    """Report storage that ends too early; the bytes that it must have, None where it has enough.

    `storage`: the bytes that it has. `bitmap` must be given where the image has a base.
    """
    if header.compact:
        return _report_short_chunk(header, bitmap, scan, storage, findings) if scan is not None else None
    size = header.virtual_disk_size
    if not header.is_truncated(storage, any_local=bitmap is not None and bitmap.count_local() > 0):
        return None
    lost = bounded(own_ranges(header, bitmap, storage, size))
    findings.add(
        Kind.STORAGE_SHORT,
        Severity.CORRUPTION,
        "storage",
        f"must be {size} bytes long: it was cut off; {span(lost)} cannot be read",
        value=storage,
        remedy="" if fixed_size else f"extends it to {size} bytes of storage, with zeros",
        hint="make the device larger again" if fixed_size else "",
        lost=lost,
    )
    return size


def _report_short_chunk(
    header: Header, bitmap: Bitmap | None, scan: TableScan, storage: int, findings: Findings
) -> int | None:
    number, rest = divmod(storage, header.chunk_size)
    if not rest or not scan.holds(number):
        return None
    lost: tuple[Range, ...] = ()
    if number in scan.entries[: scan.chunks]:
        start = scan.entries.index(number) * header.chunk_size
        lost = bounded(own_ranges(header, bitmap, start + rest, start + header.chunk_size))
    size = (number + 1) * header.chunk_size
    findings.add(
        Kind.STORAGE_SHORT,
        Severity.CORRUPTION,
        "storage",
        f"ends inside chunk {number}, which is in use, and must be {size} bytes long; {span(lost)} read as zeros",
        value=storage,
        remedy=f"extends it to {size} bytes, with zeros",
        lost=lost,
    )
    return size


def room_ahead(header: Header, scan: TableScan) -> int:
    """How many chunks behind the highest used one a writer may have made ready; they read as zeros."""
    return max(ceil_div(header.storage_grow_unit, header.chunk_size), scan.chunks - scan.allocated)


def storage_limit(header: Header, scan: TableScan | None) -> int:
    """Bytes of storage that the image uses, or a writer may have made ready."""
    if not header.compact:
        return header.virtual_disk_size
    assert scan is not None
    return (scan.end + room_ahead(header, scan)) * header.chunk_size
