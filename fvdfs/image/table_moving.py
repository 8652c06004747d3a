"""The move of a chunk table that has no room where it is, of an image that is open (`format/table_room.py`).

    1. The chunks whose places the table takes are copied behind all others, part by part:
       a. The part is copied while writers go on. What they write to it meanwhile is noted, and copied again.
       b. Checkpoint, and the journal is cleared: an old record must not bring back an entry.
       c. Writers wait. What was written since is copied, and b is repeated where records have come since. The entries
          change in memory; the next commit is a checkpoint. Until then the former places have all that was flushed.
    2. Reads that are under way end: they may be of the former places. Checkpoint: nothing on the disk names these
       places any more.
    3. The table, with its new numbers, is written to what becomes metadata, while writers go on. Pages in which entries
       change meanwhile are written again, a few times: who writes to new chunks all the time changes them as fast.
    4. Writers wait. The rest of these pages; checkpoint; the record of the move; then the first sector of the header
       (`format/moving.py`). From now on the table is there. Writers go on; commits wait for the rest of the header.

Each step, and each part of one, is stable before the next. A crash in 1 to 3 leaves the disk as it is, and perhaps
space that nobody uses, which the next attempt takes; in 4 the image as before, or as after. A failure before 4 leaves
all as it was, but for such space.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.alloc.table import ENTRIES_PER_PAGE, Table
from fvdfs.cow.locks import Gate
from fvdfs.format import moving
from fvdfs.format.header import PAGE, Header, ceil_div, round_up
from fvdfs.format.journal import Range, merge
from fvdfs.format.table_room import moved_table
from fvdfs.image.core import Core
from fvdfs.image.reading import Reads
from fvdfs.store.base import pread_exactly, pwrite_pages

PART = 8 << 20  # bytes that are copied before their chunks change places, or zeroed in one call: some milliseconds
UNIT = 256 << 10  # bytes that are copied again where some of them were written
ENOUGH = 1 << 20  # bytes that may be left to be copied while writers wait
ROUNDS = 4  # of copying again, for a writer that is as fast
CHUNKS_PER_LOOK = 1 << 14
PAGES_PER_TURN = 64  # of the table that are written in one call


async def move_table(core: Core, reads: Reads, gate: Gate, chunks: int) -> None:
    """Give the table room for so many entries. The caller holds `Resizer.lock`.

    Raises OSError, ENOSPC where a device has no room; the disk is as it was then.
    """
    storage, table = core.storage, core.table
    assert isinstance(storage, ChunkedStorage)
    assert table is not None
    header = moved_table(core.header, chunks)
    moved = (header.data_offset - core.header.data_offset) // core.header.chunk_size
    filled = ceil_div(chunks, ENTRIES_PER_PAGE)
    await _look_at_padding(core)
    try:
        with _part_of_window(storage, core.header) as part:
            await _clear_front(core, storage, table, gate, moved + table.less, part)
        await reads.wait(core.own)
        await core.committer.checkpoint()
        await _copy_table(core, storage, table, header, moved, filled)
        with trio.CancelScope(shield=True):
            await _use_copy(core, storage, table, gate, header, filled)
    finally:
        table.end_move()


async def _look_at_padding(core: Core) -> None:
    padding = bytes(await pread_exactly(core.meta, moving.SIZE, moving.PLACE))
    if any(padding) and not moving.is_record(padding):
        raise OSError(errno.EFBIG, f"{core.meta.name}: something else is where a move has to be recorded")


@contextlib.contextmanager
def _part_of_window(storage: ChunkedStorage, header: Header) -> Iterator[int]:
    """How many chunks are a part. A crash on a device may leave no more than `window` chunks without an entry."""
    window = storage.window
    part = max(1, min(PART // header.chunk_size, window // 2))
    storage.window = max(1, window - part)
    try:
        yield part
    finally:
        storage.window = window


async def _clear_front(core: Core, storage: ChunkedStorage, table: Table, gate: Gate, first: int, part: int) -> None:
    """Step 1: no chunk has a number below `first`; `part`: how many are copied at a time."""
    await core.committer.mark_unclean()
    storage.give_from(first)
    for start in range(0, table.chunks, CHUNKS_PER_LOOK):
        chunks = table.in_front(first, start, start + CHUNKS_PER_LOOK)
        await trio.lowlevel.checkpoint()
        for at in range(0, len(chunks), part):
            await core.committer.commit()
            await _move_chunks(core, storage, table, gate, chunks[at : at + part])


async def _move_chunks(core: Core, storage: ChunkedStorage, table: Table, gate: Gate, chunks: Sequence[int]) -> None:
    numbers = await storage.take_places(len(chunks))
    places = dict(zip(chunks, numbers, strict=True))
    size = core.header.chunk_size
    core.written = []
    try:
        await storage.copy_away([(chunk * size, (chunk + 1) * size) for chunk in chunks], places, fresh=True)
        await core.committer.empty_journal()
        for _ in range(ROUNDS):
            again = _take_written(core, places)
            if not again:
                break
            await storage.copy_away(again, places, fresh=False)
            if sum(stop - start for start, stop in again) <= ENOUGH:
                break
        async with gate.closed():
            with trio.CancelScope(shield=True):
                await storage.copy_away(_take_written(core, places), places, fresh=False)
                await core.committer.empty_journal()
                # No checkpoint from here on: a commit would record the former places.
                for chunk, number in places.items():
                    table.move(chunk, number)
                core.committer.chunks_moved(list(chunks))
    except BaseException:
        with contextlib.suppress(OSError), trio.CancelScope(shield=True):  # then nobody uses them
            await storage.give_back_places(numbers)
        raise
    finally:
        core.written = None


def _take_written(core: Core, places: dict[int, int]) -> list[Range]:
    """What was written since the last call, in these chunks and around it."""
    assert core.written is not None
    written, core.written = core.written, []
    size = core.header.chunk_size
    parts = []
    for start, stop in written:
        for chunk in range(start // size, ceil_div(stop, size)):
            if chunk in places:
                begin, end = max(start, chunk * size), min(stop, (chunk + 1) * size)
                parts.append((begin // UNIT * UNIT, round_up(end, UNIT)))
    return merge(parts)


async def _copy_table(
    core: Core, storage: ChunkedStorage, table: Table, header: Header, moved: int, filled: int
) -> None:
    """Step 3: the regions are as `header` has them, and the table has so many pages."""
    meta, start, end = core.meta, core.header.metadata_end, header.metadata_end
    async with storage.still():
        if await meta.size() < end:
            if meta.fixed_size:
                raise OSError(errno.ENOSPC, f"{meta.name}: is full; a larger chunk table has no room")
            await meta.resize(end)
    for at in range(start, end, PART):  # in parts: writes to the file wait for one
        await meta.zero(at, min(PART, end - at))
    table.begin_copy(moved)
    at, stop = (header.table_offset + pages * PAGE for pages in (ceil_div(table.chunks, ENTRIES_PER_PAGE), filled))
    unallocated = b"\xff" * (PAGES_PER_TURN * PAGE)
    while at < stop:
        await meta.pwrite(unallocated[: stop - at], at)
        at += len(unallocated)
    for _ in range(ROUNDS):
        first, copied = 0, 0
        while pages := table.take_uncopied(first, PAGES_PER_TURN):
            await pwrite_pages(meta, header.table_offset, PAGE, pages)
            first, copied = pages[-1][0] + 1, copied + len(pages)
        if copied <= PAGES_PER_TURN:
            break
    await core.committer.flush_metadata()


async def _use_copy(core: Core, storage: ChunkedStorage, table: Table, gate: Gate, header: Header, filled: int) -> None:
    """Step 4, after `_copy_table` with these."""
    committer = core.committer
    async with contextlib.AsyncExitStack() as others_wait:
        await others_wait.enter_async_context(gate.closed())
        await others_wait.enter_async_context(storage.still())
        async with committer.held():
            await pwrite_pages(core.meta, header.table_offset, PAGE, table.take_uncopied())
            await committer.begin_move({name: getattr(header, name) for name in moving.FIELDS})
            storage.table_moved(filled)
            await others_wait.aclose()
            await committer.end_move()
