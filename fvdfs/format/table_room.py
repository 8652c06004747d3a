"""Room for a larger chunk table: how the regions are laid out where the disk outgrows its table.

The journal lies behind the table, and is larger than it has to be: 16 MiB by default, while a table of n entries needs
ceil(n / 121) sectors of it (format.md, "Values at creation"). So the table takes the front of the journal, which gets
smaller. Nothing else moves, and the change is one of two fields in one sector of the header.

Where the journal is too small for that, or there is none, table and journal move behind all metadata there is, and data
begins later: by whole chunks, so that it stays where it is, and each chunk's number becomes less by as many. The
chunks whose places the table takes have to be copied elsewhere before. The order of the regions stays the same.

Pure.
"""

from __future__ import annotations

from fvdfs.format.header import (
    ENTRIES_WITH_BITMAP_RECORD,
    HEADER_SPACE,
    MAX_CHUNKS,
    PAGE,
    SECTOR,
    TABLE_ENTRY_SIZE,
    Header,
    Region,
    ceil_div,
    round_up,
    with_fields,
)

MAX_TABLE = 1 << 30  # bytes; larger ones are not opened (`chain.MAX_REGION`)


def may_move(header: Header) -> bool:
    """Whether the table can move: the record of it has room."""
    return all(region.offset >= HEADER_SPACE for region in header.regions()) and header.metadata_end >= HEADER_SPACE


def smaller_journal(header: Header, chunks: int) -> Region | None:
    """What is left of the journal where a table of so many entries takes its front; None: too little, or none.

    The table of this header must have less room than that.
    """
    journal, table = header.journal_region, header.table_region
    if journal is None or table is None or journal.offset < table.end:
        return None
    between = [region.offset for region in header.regions()]
    if header.profile_region is not None:
        between.append(header.profile_region.offset)
    if any(table.offset < offset < journal.offset for offset in between):
        return None
    offset = max(journal.offset, table.offset + round_up(chunks * TABLE_ENTRY_SIZE, PAGE))
    size = journal.end - offset
    return Region("journal", offset, size) if size >= _least_journal(chunks) else None


def moved_table(header: Header, chunks: int) -> Header:
    """The header of the image when its table, with room for so many entries, and its journal have moved."""
    ends = [HEADER_SPACE, header.metadata_end, *(region.end for region in header.regions())]
    start = round_up(max(ends), PAGE)
    end = start + round_up(chunks * TABLE_ENTRY_SIZE, PAGE)
    changes = {"table_offset": start}
    if header.journal_size:
        journal_size = max(header.journal_size, round_up(_least_journal(chunks), PAGE))
        changes |= {"journal_offset": end, "journal_size": journal_size}
        end += journal_size
    if header.data_file:
        changes["metadata_size"] = end
    else:
        changes["metadata_size"] = header.metadata_size + round_up(end - header.metadata_end, header.chunk_size)
    return with_fields(header, clean_shutdown=1, **changes)


def largest_table(header: Header) -> int:
    """How many entries the table can have at most."""
    if may_move(header):
        return max(header.table_capacity, min(MAX_CHUNKS, MAX_TABLE // TABLE_ENTRY_SIZE))
    low, high = header.table_capacity, min(MAX_CHUNKS, MAX_TABLE // TABLE_ENTRY_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        if smaller_journal(header, middle) is None:
            high = middle - 1
        else:
            low = middle
    return low


def _least_journal(chunks: int) -> int:
    return max(1, ceil_div(chunks, ENTRIES_WITH_BITMAP_RECORD)) * SECTOR
