"""Making writes durable, in order.

What a flush has put on the disk is *stable*; a write is *durable* when its data and all that names it is stable.
A guest's write is answered when its data is in the store and its bits and entries are set in
memory; nothing on disk names the data yet. A *commit* makes up for that, at a flush, at closing, and
at the latest a few seconds after a write. It takes what is pending when it begins, and writes

    1. header: `clean_shutdown` = 0                        (once a session)
    2. flush of the data, and of 1
    3. journal sectors that show the pending blocks and chunks
    4. flush of the metadata

so that data is stable before the record that makes it visible, and the record before the flush is
answered (format.md, "Beyond the original"). A crash between any two steps leaves, for every sector,
its old or its new content. Commits of metadata run one at a time; all that is asked for while one runs share the
next. Where data alone is pending a flush is enough, and may run beside a commit (`start_commit`).

A *checkpoint* writes pages in place of 3 and 4 where the image has no journal, the journal is full
(a recycle), or the pages take less than the sectors would:

    3. the table's dirty pages        4. flush of the metadata
    5. the bitmap's dirty pages       6. flush of the metadata, and the journal is free again

Pages are snapshots from before step 2, so that every bit and entry in them has its data on stable
storage. The table goes first because an entry without bits is harmless (the block is read from the
base, or reads as the zeros that a new chunk holds), while a bit without its chunk is not. So an
image without a journal survives a power cut as well, if fvdfs wrote it.

Closing makes a checkpoint, then `clean_shutdown` = 1, then flushes.

When a flush fails, nobody knows what is on the disk, and flushing again only hides it: the image has
`failed`, nothing more is written to it, and the next opening replays its journal. A write of
metadata that fails for want of space stays pending for the next commit.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import trio

from fvdfs.alloc.table import Table
from fvdfs.cow.bitmap import Bitmap
from fvdfs.format import journal, moving
from fvdfs.format.header import HEADER_SIZE, PAGE, SECTOR, Header, changed_sectors, round_up, with_fields
from fvdfs.image.unsettled import Notes
from fvdfs.store.base import OUT_OF_SPACE, Done, FlushError, Store, pwrite_pages

log = logging.getLogger(__name__)

MAX_PENDING = 1 << 16  # block ranges; more are committed at once, to bound memory


@dataclass(slots=True)
class _Batch:
    """What one commit makes stable: what was pending when it began, and what will show that on disk.

    The latter are journal sectors or, at a checkpoint, pages; nothing where only data was written.
    """

    blocks: list[journal.Range]
    chunks: list[int]
    data_written: bool
    sectors: list[bytes] = field(default_factory=list)
    table_pages: list[tuple[int, bytes]] = field(default_factory=list)
    bitmap_pages: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def changes_metadata(self) -> bool:
        return bool(self.sectors or self.table_pages or self.bitmap_pages)


class Committer:
    """Owns header, bitmap, table and journal on the disk, of an image open for writing."""

    def __init__(
        self,
        header: Header,
        raw_header: bytes,
        meta: Store,
        data: Store,
        bitmap: Bitmap | None,
        table: Table | None,
        *,
        journal_is_bad: bool = False,
        notes: Notes | None = None,
        has_left: bool = False,
        was_ours: bool = False,
    ) -> None:
        """`raw_header`: the header's sectors as they are on disk.

        `notes`: where to report what is not committed yet; `has_left`: bitmap and table have some of it in memory.
        `was_ours`: who had the image open before was fvdfs, and what it has not committed is known.
        """
        self._notes = notes
        self._has_left = has_left
        self.was_ours = was_ours
        assert len(raw_header) >= HEADER_SIZE
        assert len(raw_header) % SECTOR == 0
        self.header = header
        self.failed: str | None = None
        """Why nothing more may be written; None while it may."""
        self.journal_is_bad = journal_is_bad
        """Whether it holds records that replay skipped: a larger disk or storage could make them valid."""
        self._raw_header = raw_header
        self._header_unsure = False  # a failed write has left some sector of it old or new
        self._meta = meta
        self._data = data
        self._bitmap = bitmap
        self._table = table
        self._pending_blocks: list[journal.Range] = []
        self._pending_chunks: set[int] = set()
        self._data_written = False
        self._has_moved = False
        self._unseen_writes = False
        self._still_used = False
        self.writes = 0
        """Data writes so far."""
        self._journal_next = 0  # sector
        self._journal_is_empty = False
        """Whether it is known to hold no record."""
        self._lock = trio.Lock()
        self._begun = 0
        """The number of the last commit that has begun."""
        self._done = 0
        """The number of the last commit that was completed."""

    @property
    def commits(self) -> int:
        """How many were completed since it was opened; flushes of data alone are none."""
        return self._done

    @property
    def journal_used(self) -> int:
        """Bytes of the journal since the last checkpoint."""
        return self._journal_next * SECTOR

    # --- what writers report; none of these waits ----------------------------------------------

    def data_written(self) -> None:
        """Data was stored; the next commit flushes it."""
        self._data_written = True
        self.writes += 1

    def blocks_stored(self, first: int, end: int) -> None:
        """A write stored these blocks, and a crash would not show them yet."""
        pending = self._pending_blocks
        if pending and pending[-1][1] == first:
            pending[-1] = (pending[-1][0], end)
        else:
            pending.append((first, end))
        if self._notes is not None:
            self._notes.blocks_stored(first, end)

    def chunks_allocated(self, chunks: list[int]) -> None:
        """These chunks got their place."""
        self._pending_chunks.update(chunks)
        if self._notes is not None and self._table is not None:
            table = self._table
            self._notes.chunks_allocated([(chunk, table.on_disk(chunk)) for chunk in chunks])

    def in_use(self, *, writing: bool) -> None:
        """Whether it is open for writing."""
        if self._notes is not None:
            self._notes.in_use(writing=writing)

    def chunks_moved(self, chunks: list[int]) -> None:
        """These chunks, which had a place, got another one. The journal is empty, and no commit is under way.

        The next commit is a checkpoint: no record shows an entry that changes.
        """
        self.chunks_allocated(chunks)
        self._has_moved = True

    @property
    def local_changes(self) -> int:
        """How often blocks have become local."""
        return self._bitmap.changes if self._bitmap else 0

    @property
    def dirty(self) -> bool:
        """Whether something that was reported is not stable yet; true while a commit runs."""
        return self._data_written or self._unseen_writes or self.uncommitted or self._lock.locked()

    @property
    def unseen_writes(self) -> bool:
        """Whether the kernel writes to the data by itself: then each commit has to flush, and it may get longer."""
        return self._unseen_writes

    @property
    def uncommitted(self) -> bool:
        """Whether data is stored that a crash would not show."""
        return bool(self._pending_blocks) or bool(self._pending_chunks)

    @property
    def overfull(self) -> bool:
        """Whether so much is pending that writers should wait for a commit."""
        return len(self._pending_blocks) > MAX_PENDING

    # --- commits --------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Make all that was reported up to now stable.

        Raises OSError; EIO once the image has failed.
        """
        need = self._begun + 1  # one that has begun already need not cover what came since
        try:
            self._lock.acquire_nowait()  # not a turn of the event loop later
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            if self._done < need:
                with trio.CancelScope(shield=True):
                    await self._commit(checkpoint=False)
        finally:
            self._lock.release()

    def start_commit(self, done: Done) -> bool:
        """`commit` without a task, where all that it takes is a flush of the data."""
        if self.failed is not None or self.uncommitted or self._lock.locked():
            return False
        if not self.dirty:
            done(0)
            return True
        writes = self.writes

        def ended(result: int) -> None:
            if result < 0:
                self.fail(f"a flush of {self._data.name} failed: {os.strerror(-result)}")
                result = -errno.EIO
            elif self.writes == writes:
                self._data_written = False
            done(result)

        return self._data.start_flush(ended)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """No commit is answered, and no header written, while the block runs."""
        async with self._lock:
            yield

    async def checkpoint(self, *, clear_journal: bool = False) -> None:
        """A commit to bitmap and table, after which no record of the journal counts. Raises OSError.

        `clear_journal`: before a change that old records would undo. The journal is empty and stable then. A commit
        between the two would lose its records.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._commit(checkpoint=True)
                if clear_journal:
                    await self._clear_journal()

    async def empty_journal(self) -> None:
        """Have no record in the journal; a checkpoint, unless there is none already. Raises OSError.

        No commit is under way when this returns, and none has begun.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):
                if not self._journal_is_empty and self.header.journal_region is not None:
                    await self._commit(checkpoint=True)
                    await self._clear_journal()

    async def _commit(self, *, checkpoint: bool) -> None:
        self._check_failed()
        self._begun += 1
        this = self._begun
        batch = self._take_pending(checkpoint=checkpoint or self._has_moved)
        try:
            await self._write(batch)
        except BaseException as error:
            self._put_back(batch)
            if not isinstance(error, Exception):  # somebody ends all this: no failure of the image
                self.fail("a commit was interrupted", logging.INFO)
            elif not isinstance(error, OSError) or error.errno not in OUT_OF_SPACE:
                self.fail(f"{error}")
            raise
        if self._bitmap:
            for first, end in batch.blocks:
                self._bitmap.mark_committed(first, end)
            self._bitmap.pages_written(batch.bitmap_pages)
        self._has_moved = False
        self._done = this
        if self._notes is not None:
            self._notes.commit_ends(done=True)

    def _take_pending(self, *, checkpoint: bool) -> _Batch:
        """All that is pending, which then no longer is, and the sectors or pages that show it."""
        data_written = self._data_written or self._unseen_writes
        batch = _Batch(journal.merge(self._pending_blocks), sorted(self._pending_chunks), data_written)
        self._pending_blocks.clear()
        self._pending_chunks.clear()
        self._data_written = False
        if self._notes is not None:
            self._notes.commit_begins()
        if not checkpoint:
            if not batch.blocks and not batch.chunks:
                return batch
            batch.sectors = self._journal_sectors(batch.blocks, batch.chunks)
        if not batch.sectors:
            batch.table_pages = self._table.take_dirty_pages() if self._table else []
            batch.bitmap_pages = self._bitmap.take_dirty_pages() if self._bitmap else []
        return batch

    def _put_back(self, batch: _Batch) -> None:
        """Writing it failed: it is pending again."""
        if self._notes is not None:
            self._notes.commit_ends(done=False)
        self._pending_blocks.extend(batch.blocks)
        self._pending_chunks.update(batch.chunks)
        self._data_written = self._data_written or batch.data_written
        if self._table:
            self._table.pages_not_written(batch.table_pages)
        if self._bitmap:
            self._bitmap.pages_not_written(batch.bitmap_pages)

    async def _write(self, batch: _Batch) -> None:
        """Header, data, then sectors or pages, with the flushes between them. Raises OSError."""
        in_one_file = self._meta is self._data
        if batch.changes_metadata and self.header.clean:
            await self._write_header(clean_shutdown=0)
            if not in_one_file:
                await self._flush(self._meta)
            batch.data_written = True
        # Also for a chunk whose first write is still under way: its place must be there.
        flush_data = bool(batch.data_written or batch.chunks or batch.table_pages or batch.bitmap_pages)
        append_flushes = bool(batch.sectors) and in_one_file
        if flush_data and not append_flushes:
            await self._flush(self._data)
        if batch.sectors:
            await self._append(batch.sectors, flush_first=flush_data and append_flushes)
        elif batch.changes_metadata:
            await self._write_pages(batch)

    def _journal_sectors(self, blocks: list[journal.Range], chunks: list[int]) -> list[bytes]:
        """The journal sectors for these blocks and chunks; none where pages have to be, or better are, written."""
        region = self.header.journal_region
        if region is None:
            return []
        room = region.size // SECTOR - self._journal_next
        limit = min(room, self._dirty_pages * (PAGE // SECTOR))
        if len(blocks) > limit:
            return []
        sectors = journal.encode(self.header, self._table, blocks, chunks) or []
        return sectors if len(sectors) <= limit else []

    async def _append(self, sectors: list[bytes], *, flush_first: bool) -> None:
        region = self.header.journal_region
        assert region is not None
        offset = region.offset + self._journal_next * SECTOR
        # Whole pages, so that the host need not read them first. What lies behind is older than the
        # last checkpoint and no longer needed.
        end = min(round_up(offset + len(sectors) * SECTOR, PAGE), region.end)
        data = b"".join(sectors).ljust(end - offset, b"\0")
        self._journal_is_empty = False
        try:
            await self._meta.append_stable(data, offset, flush_first=flush_first)
        except FlushError as error:
            self._flush_failed(self._meta, error)
        self._journal_next += len(sectors)

    async def _write_pages(self, batch: _Batch) -> None:
        if batch.table_pages:
            await pwrite_pages(self._meta, self.header.table_offset, PAGE, batch.table_pages)
            await self._flush(self._meta)
        if batch.bitmap_pages:
            await pwrite_pages(self._meta, self.header.bitmap_offset, PAGE, batch.bitmap_pages)
            await self._flush(self._meta)
        self._journal_next = 0

    async def recover(self) -> None:
        """Make stable what a replay rebuilt, and what an earlier process may have left in the page cache.

        The caller holds the locks on the files, and nothing was written yet.

        We have read, and build on, all that a killed process wrote, flushed or not. An image without
        metadata does not even show that its process was killed: its data counts as written now.
        Raises OSError.
        """
        self.data_written()
        if moving.is_moving(self._raw_header):
            await self.change_header()
        if (not self.header.clean or self._has_left) and self.header.has_metadata:
            if self._meta is not self._data:
                await self._flush(self._meta)
            await self.checkpoint(clear_journal=self.journal_is_bad)
        self._has_left = False

    async def _clear_journal(self) -> None:
        region = self.header.journal_region
        if region is None or self._journal_is_empty:
            return
        await self._meta.zero(region.offset, region.size)
        await self._flush(self._meta)
        self._journal_next = 0
        self._journal_is_empty = True

    async def release_base(self) -> None:
        """Every block is local: have the header say that the base is no longer needed. Raises OSError.

        Data, bitmap and table are stable before that (format.md, "Beyond the original"). The journal is emptied: no
        bitmap record may stand in an image without a bitmap.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._commit(checkpoint=True)
                await self._clear_journal()
                if not self.header.compact:
                    # Without a table there is no metadata any more that could be incomplete. This is stable first: the
                    # length of the data would count where an image without a base was not closed.
                    await self._write_header(clean_shutdown=1)
                    await self._flush(self._meta)
                await self._write_header(all_data_in_fvd_img=1)
                await self._flush(self._meta)
            # A block that a write has reported meanwhile was local before.
            self._pending_blocks.clear()
            self._bitmap = None

    async def mark_unclean(self) -> None:
        """Have the header say that the image is in use, and make that stable. Raises OSError."""
        if self.header.clean:
            async with self._lock:
                self._check_failed()
                if self.header.clean:
                    with trio.CancelScope(shield=True):
                        await self._write_header(clean_shutdown=0)
                        await self._flush(self._meta)

    async def begin_unseen_writes(self) -> None:
        """From now on the kernel may write to the data by itself.

        The header says before that the image is not closed: then the disk is as long as its data
        (`Header.length_counts`). Raises OSError.
        """
        await self.mark_unclean()
        self._unseen_writes = True

    def end_unseen_writes(self, *, still_used: bool) -> None:
        """The kernel gives this to no further opening; `still_used`: programs that have it may go on writing."""
        if self._unseen_writes:
            self.data_written()
        self._still_used = still_used and self._unseen_writes
        self._unseen_writes = False

    async def change_header(self, **changes: int | str) -> None:
        """Change fields of the header, and make it stable. Raises OSError."""
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                await self._write_header(**changes)
                await self._flush(self._meta)

    async def move_journal(self, offset: int, size: int) -> None:
        """Have the journal be this part of what it is now, after a checkpoint. Raises OSError."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._commit(checkpoint=True)
                await self._write_header(journal_offset=offset, journal_size=size)
                await self._flush(self._meta)

    async def flush_metadata(self) -> None:
        """Make stable what others have written to the image's file. Raises OSError; the image has failed then."""
        await self._flush(self._meta)

    async def begin_move(self, fields: dict[str, int]) -> None:
        """Have table, journal and data be where these fields of the header say (`moving.FIELDS`), after a checkpoint.

        The regions are written there already, the journal empty. It counts when this returns, but `end_move` must
        follow. The caller holds the lock (`held`). Raises OSError; the image is as it was then, or has failed.
        """
        await self._commit(checkpoint=True)
        await self._meta.pwrite(moving.encode(fields), moving.PLACE)
        await self._flush(self._meta)
        try:
            await self._write_header(journal_offset=moving.PLACE, journal_size=0, clean_shutdown=0)
            await self._flush(self._meta)
        except BaseException as error:
            self.fail(f"moving the chunk table: {error}")
            raise
        self.header = with_fields(self.header, clean_shutdown=1, **fields)
        self._journal_next, self._journal_is_empty = 0, True

    async def end_move(self) -> None:
        """Write the rest of the header. As `begin_move`."""
        try:
            self._raw_header = await write_header(self._meta, self.header, self._raw_header)
        except BaseException as error:
            self.fail(f"moving the chunk table: {error}")
            raise

    async def write_profile(self, data: bytes, entries: int, unit: int) -> None:
        """Write an encoded prefetch profile, then have the header name it. `unit` in bytes. Raises OSError."""
        room = self.header.profile_room
        assert len(data) <= room.size
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                await self._meta.pwrite(data.ljust(round_up(len(data), PAGE), b"\0"), room.offset)
                await self._flush(self._meta)
                await self._write_header(
                    prefetch_profile_offset=room.offset,
                    prefetch_profile_entries=entries,
                    unit_of_PrefetchProfileEntry_len=unit,
                    generate_prefetch_profile=0,
                )
                await self._flush(self._meta)

    async def restore_header(self, **fields: int | str) -> None:
        """Undo a change of the header that is stable already, or fail. Raises OSError."""
        try:
            await self.change_header(**fields)
        except OSError as error:
            self.fail(f"writing the header: {error}")
            raise

    async def close(self) -> None:
        """Commit everything and leave a clean header. Raises OSError; the next opening then replays the journal."""
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                if self._data_written or self._unseen_writes or self.uncommitted or self._dirty_pages:
                    await self._commit(checkpoint=True)
                if self._still_used:
                    return
                if not self.header.clean or self._header_unsure:
                    await self._write_header(clean_shutdown=1)
                    await self._flush(self._meta)

    @property
    def _dirty_pages(self) -> int:
        return (self._bitmap.dirty_pages if self._bitmap else 0) + (self._table.dirty_pages if self._table else 0)

    async def _write_header(self, **changes: int | str) -> None:
        header = with_fields(self.header, **changes)
        try:
            raw = await write_header(self._meta, header, self._raw_header, every_sector=self._header_unsure)
        except OSError as error:
            self._header_unsure = True
            if error.errno not in OUT_OF_SPACE:
                self.fail(f"writing the header: {error}")
            raise
        self.header = header
        self._raw_header = raw
        self._header_unsure = False

    async def _flush(self, store: Store) -> None:
        try:
            await store.flush()
        except OSError as error:
            self._flush_failed(store, error)

    def _flush_failed(self, store: Store, error: OSError) -> NoReturn:
        self.fail(f"a flush of {store.name} failed: {error}")
        raise OSError(errno.EIO, f"flush of {store.name}: {error}") from error

    def fail(self, why: str, level: int = logging.ERROR) -> None:
        """Write nothing more."""
        if self.failed is None:
            self.failed = why
            log.log(level, "%s: %s; read-only from now on", self._meta.name, why)

    def _check_failed(self) -> None:
        if self.failed is not None:
            raise OSError(errno.EIO, f"{self._meta.name}: read-only since an earlier error: {self.failed}")


async def write_header(meta: Store, header: Header, raw: bytes, *, every_sector: bool = False) -> bytes:
    """Write the sectors of the header that differ from `raw`, those on disk; the new ones. Nothing is flushed.

    A move of the table that was interrupted is ended (`format/moving.py`). Raises OSError; each sector is old or new
    then, and the next call has to write `every_sector`.
    """
    new = header.encode() + raw[HEADER_SIZE:]
    sectors = list(changed_sectors(None if every_sector else raw, new))
    if moving.is_moving(raw):
        new = new[: moving.PLACE].ljust(len(raw), b"\0")
        *others, mark = sectors
        for offset, sector in others:
            await meta.pwrite(sector, offset)
        await meta.flush()
        sectors = [mark]
    for offset, sector in sectors:
        await meta.pwrite(sector, offset)
    if moving.is_moving(raw):
        await meta.flush()
        await meta.pwrite(bytes(moving.SIZE), moving.PLACE)
    return new
