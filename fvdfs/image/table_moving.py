"""The move of a chunk table that has no room where it is, of an image that is open (`format/table_room.py`).

    1. Writers wait. The chunks whose places the table takes are copied behind all others. Checkpoint, and the journal
       is cleared: an old record must not bring back an entry. Then the entries of these chunks change in memory, and
       are committed as those of new ones.
    2. Writers go on. Reads that are under way end: they may be of the former places.
    3. Writers wait. Checkpoint: nothing on the disk names these places any more. The table, with its new numbers, and
       the record of the move are written to what becomes metadata; then the header changes (`format/moving.py`).

Each step, and each part of one, is stable before the next. A crash in 1 or 2 leaves the disk as it is, and perhaps
space that nobody uses, which the next attempt takes; in 3 the image as before, or as after.
"""

from __future__ import annotations

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.cow.locks import Gate
from fvdfs.format.table_room import moved_table
from fvdfs.image.core import Core
from fvdfs.image.reading import Reads


async def move_table(core: Core, reads: Reads, gate: Gate, chunks: int) -> None:
    """Give the table room for so many entries. The caller holds `Resizer.lock`.

    Raises OSError, ENOSPC where a device has no room; the disk is as it was then.
    """
    storage, table = core.storage, core.table
    assert isinstance(storage, ChunkedStorage)
    assert table is not None
    header = core.header
    moved = (moved_table(header, chunks).data_offset - header.data_offset) // header.chunk_size
    async with gate.closed():
        with trio.CancelScope(shield=True):
            await _clear_front(core, storage, moved)
    await reads.wait(core.own)
    async with gate.closed():
        with trio.CancelScope(shield=True):
            async with storage.still():
                await core.committer.move_table(chunks, table.pages_less(moved))
                storage.data_moved_on(moved)


async def _clear_front(core: Core, storage: ChunkedStorage, first: int) -> None:
    """Step 1, in parts: a crash on a device may leave no more than `window` chunks without an entry."""
    committer, table = core.committer, core.table
    assert table is not None
    await committer.mark_unclean()
    chunks = table.in_front(first)
    for start in range(0, max(1, len(chunks)), storage.window):
        part = chunks[start : start + storage.window]
        numbers = await storage.copy_away(part, first)
        await committer.checkpoint(clear_journal=True)
        for chunk, number in zip(part, numbers, strict=True):
            table.move(chunk, number)
        committer.chunks_allocated(part)
