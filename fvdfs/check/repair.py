"""Repairing an image.

A power cut at any moment of a repair leaves an image that reads as before the repair or as after it,
and that another repair completes. Each step ends with a flush (format.md, "Beyond the original"):

    1. header: fields that have one right value
    2. the storage is made as long as it must be
    3. header: `clean_shutdown` = 0, before any change of table or bitmap
    4. table, flush, bitmap: as a replay of the journal leaves them. Nothing goes backwards here
    5. the journal is cleared: from here on no old record can come back (rule 4)
    6. copies of chunks and new zeros; flush; the table that names them; flush; the bitmap
    7. the space of leaked chunks is given back; what a crash left behind the highest one is cleared
    8. header: `clean_shutdown` = 1

Data is in place, and flushed, before an entry names it, and each entry by itself is right, old or
new. Leaked chunks in the middle of a file become holes, but their numbers stay unused: whoever writes
next takes the number above the highest (format.md, "Chunk table"). On a device, where nobody else could
use the space, they are left. A file is only ever cut at its end.
"""

from __future__ import annotations

import contextlib
import errno
from array import array

from bitarray import bitarray

from fvdfs.alloc.table import encode_entries
from fvdfs.check.contents import plan_table, without_tail
from fvdfs.check.examine import Examined
from fvdfs.check.findings import Kind, Range
from fvdfs.check.layers import PIECE, CheckLayer, Filled, is_store, read
from fvdfs.format.header import PAGE, SECTOR, Header, Region, round_up, with_fields
from fvdfs.image.commit import write_header
from fvdfs.store.base import Buffer, Store, pwrite_pages

_OF_TABLE = {Kind.TABLE_BIT_31, Kind.CHUNK_BEYOND_STORAGE, Kind.CHUNK_SHARED, Kind.BIT_WITHOUT_CHUNK}
_OF_JOURNAL = {Kind.REPLAY_PENDING, Kind.JOURNAL_UNAPPLIED, Kind.JOURNAL_RECORD}
_OF_SPACE = {Kind.CHUNK_LEAKED, Kind.STORAGE_TAIL}
_OF_BASE = {
    Kind.BASE_MISSING,
    Kind.BASE_UNUSABLE,
    Kind.BASE_FORMAT,
    Kind.CHAIN_LOOP,
}  # repairable where every block is local


async def repair_image(layer: CheckLayer, found: Examined) -> None:
    """Repair what is repairable, in the order that the head of this file gives. Raises OSError, ImageError."""
    assert found.check is not None
    assert found.check.sound
    wanted = found.findings.to_repair
    meta, data = layer.meta, layer.data
    header = _HeaderOnDisk(meta, found.check.raw)
    await _make_whole(layer, found)
    if found.check.changed:
        await header.write(found.header)
    if Kind.STORAGE_SHORT in wanted and found.storage_needed is not None:
        assert is_store(data)
        await _extend(data, found.header.data_offset + found.storage_needed)
        await data.flush()
    rewrite = bool(wanted & _OF_TABLE) or Kind.BITMAP_TAIL in wanted
    clear = found.header.journal_region is not None and (rewrite or bool(wanted & (_OF_JOURNAL | _OF_SPACE)))
    replay = Kind.JOURNAL_UNAPPLIED in wanted or (clear and not found.header.clean)
    if (replay or rewrite) and header.header.clean:
        await header.change(clean_shutdown=0)
    if replay:
        entries = found.scan.entries if found.scan is not None else None
        await _write_metadata(layer, found.header, entries, found.bitmap.pages if found.bitmap is not None else None)
    if clear:
        region = found.header.journal_region
        assert region is not None
        await meta.zero(region.offset, region.size)
        await meta.flush()
    if rewrite:
        await _rewrite(layer, found)
    if wanted & _OF_SPACE:
        await _give_back(layer, found, wanted)
    if wanted & _OF_BASE:
        await header.change(all_data_in_fvd_img=1)
    closed = found.header.clean or bool(wanted & {Kind.REPLAY_PENDING, Kind.UNCLEAN})
    if closed and not header.header.clean:
        if not found.findings.corrupt:
            await _clear_behind(layer, found)
        await header.change(clean_shutdown=1)


async def _make_whole(layer: CheckLayer, found: Examined) -> None:
    """Have the data file of a disk that is as long as this end with a whole sector. Raises OSError."""
    size = found.header.virtual_disk_size
    if found.header.length_counts and found.storage is not None and round_up(found.storage, SECTOR) == size:
        assert is_store(layer.data)
        if found.storage < size:
            await _extend(layer.data, size)
        await layer.data.flush()


async def _clear_behind(layer: CheckLayer, found: Examined) -> None:
    """Zero what a crash may have left behind the highest chunk of a device. Raises OSError."""
    header, scan, data = found.header, found.scan, layer.data
    if scan is None or not is_store(data) or not data.fixed_size:
        return  # a file is cut instead: `_give_back`
    start = header.data_offset + scan.end * header.chunk_size
    stop = min(start + header.chunk_window * header.chunk_size, await data.size())
    if start < stop:
        await data.zero(start, stop - start)
        await data.flush()


async def _extend(data: Store, size: int) -> None:
    if size >= 1 << 63:
        raise OSError(errno.EFBIG, f"{data.name}: no file has {size} bytes")
    await data.resize(size)


class _HeaderOnDisk:
    """The header of the image that is repaired, as it is on disk."""

    def __init__(self, meta: Store, raw: bytes) -> None:
        self._meta = meta
        self._raw = raw
        self.header = Header.decode(raw, meta.name)

    async def change(self, **fields: int | str) -> None:
        """Change fields of the header, and make that stable. Raises OSError."""
        await self.write(with_fields(self.header, **fields))

    async def write(self, header: Header) -> None:
        """Replace the header, and make that stable. Raises OSError."""
        self._raw = await write_header(self._meta, header, self._raw)
        await self._meta.flush()
        self.header = header


async def _write_metadata(layer: CheckLayer, header: Header, entries: array[int] | None, bits: Buffer | None) -> None:
    """Write table and bitmap where they differ from what is on disk, the table first. Raises OSError."""
    if entries is not None:
        assert header.table_region is not None
        await _write_region(layer.meta, header.table_region, encode_entries(entries))
    if bits is not None:
        assert header.bitmap_region is not None
        await _write_region(layer.meta, header.bitmap_region, bits)


async def _write_region(meta: Store, region: Region, new: Buffer) -> None:
    for start in range(0, region.size, PIECE):
        stop = min(start + PIECE, region.size)
        old = await read(meta, region.offset + start, stop - start)
        pages = []
        for at in range(start, stop, PAGE):
            page = bytes(new[at : at + PAGE])
            if page != old[at - start : at - start + PAGE]:
                pages.append((at // PAGE, page))
        await pwrite_pages(meta, region.offset, PAGE, pages)
    await meta.flush()


async def _rewrite(layer: CheckLayer, found: Examined) -> None:
    """Write a table and a bitmap that are right; the journal must be empty. Raises OSError, ImageError."""
    header, scan = found.header, found.scan
    entries = None
    if scan is not None and found.findings.to_repair & _OF_TABLE:
        bare = found.bare if found.bare else bitarray(scan.chunks)
        plan = plan_table(scan, header, found.bitmap, bare, layer.path)
        assert is_store(layer.data)
        await _fill_chunks(layer.data, header, scan.end, plan.copies, plan.zeros, plan.end)
        entries = plan.entries
    bits = without_tail(found.bitmap.pages, header.blocks) if found.bitmap is not None else None
    await _write_metadata(layer, header, entries, bits)


async def _fill_chunks(
    data: Store, header: Header, used: int, copies: tuple[tuple[int, int], ...], zeros: Range, end: int
) -> None:
    """Fill the new chunks, numbers `used` to `end`, and make them stable.

    Raises OSError, ENOSPC where there is no room; a file has its old length then.
    """
    if end == used:
        return

    def place(number: int) -> int:
        return header.data_offset + number * header.chunk_size

    size = await data.size()
    if data.fixed_size and size < place(end):
        raise OSError(errno.ENOSPC, f"{data.name}: the device ends at {size} bytes, {place(end)} are needed")
    try:
        if min(size, place(end)) > place(used):
            await data.zero(place(used), min(size, place(end)) - place(used))
        if size < place(end):
            await _extend(data, place(end))
        for source, target in copies:
            async for start, stop in Filled(data, place(source), place(source + 1)):
                piece = await read(data, start, stop - start)
                await data.pwrite(piece, place(target) + start - place(source))
        await data.flush()
    except OSError:
        if size < place(end) and not data.fixed_size:
            with contextlib.suppress(OSError):
                await data.resize(size)
        raise


async def _give_back(layer: CheckLayer, found: Examined, wanted: set[Kind]) -> None:
    """Give back space that nothing refers to. Raises OSError."""
    header, scan, data = found.header, found.scan, layer.data
    assert scan is not None
    assert is_store(data)
    if Kind.CHUNK_LEAKED in wanted:
        for first, stop in scan.leaked():
            await data.zero(header.data_offset + first * header.chunk_size, (stop - first) * header.chunk_size)
    if Kind.STORAGE_TAIL in wanted:
        await data.resize(header.data_offset + scan.end * header.chunk_size)
    await data.flush()
