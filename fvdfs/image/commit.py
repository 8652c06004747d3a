"""Making writes durable, in order.

A guest's write is answered when its data is in the store and its bits and entries are set in
memory; nothing on disk names the data yet. A *commit* makes that up, at a flush, at closing, and a
few seconds after a write at the latest. It takes what is pending when it begins, and

    1. header: `clean_shutdown` = 0                        (once a session)
    2. flush of the data, and of 1
    3. journal sectors that show the pending blocks and chunks
    4. flush of the metadata

so that data is stable before the record that makes it visible, and the record before the flush is
answered (format.md, "Beyond the original"). A crash between any two steps leaves, for every sector, its old or
its new content. Commits run one at a time; all that is asked for while one runs share the next.

A *checkpoint* takes the place of 3 and 4 where the image has no journal, the journal is full (a
recycle), or the pages are fewer than the sectors would be:

    3. the table's dirty pages        4. flush of the metadata
    5. the bitmap's dirty pages       6. flush of the metadata, and the journal is free again

Pages are snapshots from before step 2, so that every bit and entry in them has its data on stable
storage. The table goes first because an entry without bits is harmless (the block is read from the
base, or reads as the zeros that a new chunk holds), while a bit without its chunk is not. By this
an image without a journal survives a power cut as well, if fvdfs wrote it.

Closing makes a checkpoint, then `clean_shutdown` = 1, then flushes.

When a flush fails, nobody knows what is on the disk, and asking again only hides it: the image is
`failed` then, nothing more is written to it, and the next opening replays its journal. A write of
metadata that failed for want of space is kept pending and tried again with the next commit.
"""

from __future__ import annotations

import errno
import logging
from typing import NoReturn

import trio

from fvdfs.alloc.table import Table
from fvdfs.cow.bitmap import Bitmap
from fvdfs.format import journal
from fvdfs.format.header import HEADER_SIZE, PAGE, SECTOR, Header, changed_sectors, round_up, with_fields
from fvdfs.store.base import OUT_OF_SPACE, Done, FlushError, Store, pwrite_pages

log = logging.getLogger(__name__)

MAX_PENDING = 1 << 16  # block ranges; more are committed at once, to bound memory


class Committer:
    """Owns what is on disk of header, bitmap, table and journal of an image open for writing."""

    def __init__(
        self,
        header: Header,
        raw_header: bytes,
        meta: Store,
        data: Store,
        bitmap: Bitmap | None,
        table: Table | None,
    ) -> None:
        """`raw_header`: the header's sectors as they are on disk."""
        assert len(raw_header) >= HEADER_SIZE
        assert len(raw_header) % SECTOR == 0
        self.header = header
        self.failed: str | None = None
        """Why nothing more may be written, once that is so."""
        self.journal_is_bad = False
        """Whether it holds records that were skipped: a larger disk or storage could make them good."""
        self._raw_header = raw_header
        self._header_unsure = False  # a failed write left some sector of it old or new
        self._meta = meta
        self._data = data
        self._bitmap = bitmap
        self._table = table
        self._pending_blocks: list[journal.Range] = []
        self._pending_chunks: set[int] = set()
        self._data_written = False
        self.writes = 0
        """How many there were, of the data."""
        self._journal_next = 0  # sector
        self._lock = trio.Lock()
        self._begun = 0
        self._done = 0

    # --- what writers report; none of these waits ----------------------------------------------

    def data_written(self) -> None:
        """Data was stored; a commit has to flush it."""
        self._data_written = True
        self.writes += 1

    def blocks_stored(self, first: int, end: int) -> None:
        """A write stored these blocks, and a crash would not show them yet."""
        pending = self._pending_blocks
        if pending and pending[-1][1] == first:
            pending[-1] = (pending[-1][0], end)
        else:
            pending.append((first, end))

    def chunks_allocated(self, chunks: list[int]) -> None:
        """These chunks got their place."""
        self._pending_chunks.update(chunks)

    @property
    def dirty(self) -> bool:
        """Whether something that was reported is not durable yet, also while a commit is at it."""
        return self._data_written or self.uncommitted or self._lock.locked()

    @property
    def uncommitted(self) -> bool:
        """Whether some data is stored that a crash would not show."""
        return bool(self._pending_blocks) or bool(self._pending_chunks)

    @property
    def overfull(self) -> bool:
        """Whether so much is pending that writers should wait for a commit."""
        return len(self._pending_blocks) > MAX_PENDING

    # --- commits --------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Make all that was reported up to now durable.

        Raises OSError; EIO from the moment on that the image has failed.
        """
        need = self._begun + 1  # one that has begun already need not cover what came since
        while self._done < need:
            try:
                self._lock.acquire_nowait()  # not a turn of the event loop later
            except trio.WouldBlock:
                await self._lock.acquire()
            try:
                if self._done >= need:
                    return
                self._begun += 1
                this = self._begun
                with trio.CancelScope(shield=True):
                    await self._commit(checkpoint=False)
                self._done = this
            finally:
                self._lock.release()

    def commit_soon(self, done: Done) -> bool:
        """A commit without a task, where all that it takes is a flush of the data that has begun already.

        `done` is called, perhaps before this returns, and told whether all that was reported is durable. Where it is
        not, and where this says False, `commit` has to be awaited.
        """
        if self.failed is not None or self.uncommitted or self._lock.locked():
            return False
        writes = self.writes

        def ended(well: bool) -> None:
            if well and self.writes == writes:
                self._data_written = False
            done(well)

        return self._data.flush_soon(ended)

    async def checkpoint(self) -> None:
        """A commit that leaves nothing in the journal. Raises OSError."""
        async with self._lock:
            self._begun += 1
            this = self._begun
            with trio.CancelScope(shield=True):
                await self._commit(checkpoint=True)
            self._done = this

    async def _commit(self, *, checkpoint: bool) -> None:
        self._check_failed()
        blocks = journal.merge(self._pending_blocks)
        chunks = sorted(self._pending_chunks)
        self._pending_blocks.clear()
        self._pending_chunks.clear()
        data_written, self._data_written = self._data_written, False
        sectors = self._plan_sectors(blocks, chunks) if not checkpoint else None
        table_pages: list[tuple[int, bytes]] = []
        bitmap_pages: list[tuple[int, bytes]] = []
        if sectors is None:
            table_pages = self._table.take_dirty_pages() if self._table else []
            bitmap_pages = self._bitmap.take_dirty_pages() if self._bitmap else []
        changes = bool(sectors or table_pages or bitmap_pages)
        try:
            if changes and self.header.clean:
                await self._write_header(clean_shutdown=0)
                if self._meta is not self._data:
                    await self._flush(self._meta)
                data_written = True
            # Also for a chunk whose first write is still under way: its place must be there.
            data_first = bool(data_written or chunks or table_pages or bitmap_pages)
            if data_first and not (sectors and self._meta is self._data):
                await self._flush(self._data)
            if sectors:
                await self._append(sectors, flush_first=data_first and self._meta is self._data)
            elif changes:
                await self._write_pages(table_pages, bitmap_pages)
        except BaseException as error:
            self._pending_blocks.extend(blocks)
            self._pending_chunks.update(chunks)
            self._data_written = self._data_written or data_written
            if self._table:
                self._table.pages_not_written(table_pages)
            if self._bitmap:
                self._bitmap.pages_not_written(bitmap_pages)
            if not isinstance(error, OSError) or error.errno not in OUT_OF_SPACE:
                self.fail(f"{error}")
            raise
        if self._bitmap:
            for first, end in blocks:
                self._bitmap.mark_committed(first, end)
            self._bitmap.pages_written(bitmap_pages)

    def _plan_sectors(self, blocks: list[journal.Range], chunks: list[int]) -> list[bytes] | None:
        """The journal sectors for a commit, or None where pages have to be, or better are, written."""
        if not blocks and not chunks:
            return []
        region = self.header.journal_region
        if region is None:
            return None
        room = region.size // SECTOR - self._journal_next
        limit = min(room, self._dirty_pages * (PAGE // SECTOR))
        if len(blocks) > limit:
            return None
        sectors = journal.encode(self.header, self._table, blocks, chunks)
        return sectors if sectors is not None and len(sectors) <= limit else None

    async def _append(self, sectors: list[bytes], *, flush_first: bool) -> None:
        region = self.header.journal_region
        assert region is not None
        offset = region.offset + self._journal_next * SECTOR
        # Whole pages, so that the host need not read them first; what is behind is older than the
        # last checkpoint, and no longer needed.
        end = min(round_up(offset + len(sectors) * SECTOR, PAGE), region.end)
        data = b"".join(sectors).ljust(end - offset, b"\0")
        try:
            await self._meta.log(data, offset, flush_first=flush_first)
        except FlushError as error:
            self._flush_failed(self._meta, error)
        self._journal_next += len(sectors)

    async def _write_pages(self, table_pages: list[tuple[int, bytes]], bitmap_pages: list[tuple[int, bytes]]) -> None:
        if table_pages:
            await pwrite_pages(self._meta, self.header.table_offset, PAGE, table_pages)
            await self._flush(self._meta)
        if bitmap_pages:
            await pwrite_pages(self._meta, self.header.bitmap_offset, PAGE, bitmap_pages)
            await self._flush(self._meta)
        self._journal_next = 0

    async def recover(self) -> None:
        """Make stable what an earlier process may have left in the host's memory only, and what a replay rebuilt.

        Of a process that was killed we have read all that it wrote, flushed or not, and build on it.
        An image without metadata does not even show that its process was killed: its data counts as
        written now. Raises OSError.
        """
        self._data_written = True
        if not self.header.clean and self.header.has_metadata:
            if self._meta is not self._data:
                await self._flush(self._meta)
            await self.checkpoint()
            if self.journal_is_bad:
                await self.clear_journal()

    async def clear_journal(self) -> None:
        """Make the journal empty and stable, for a change that old records would undo. Raises OSError."""
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                await self._clear_journal()

    async def _clear_journal(self) -> None:
        region = self.header.journal_region
        if region is None:
            return
        await self._meta.zero(region.offset, region.size)
        await self._flush(self._meta)
        self._journal_next = 0

    async def release_base(self) -> None:
        """Every block is local: have the header say that the base is no longer needed. Raises OSError.

        Data, bitmap and table are stable before that (format.md, "Beyond the original"). The journal is emptied, since
        its bitmap records would be strange in an image without a bitmap.
        """
        async with self._lock:
            self._begun += 1
            this = self._begun
            with trio.CancelScope(shield=True):
                await self._commit(checkpoint=True)
                await self._clear_journal()
                await self._write_header(all_data_in_fvd_img=1)
                await self._flush(self._meta)
            # What a write has reported meanwhile is a block that was local before.
            self._pending_blocks.clear()
            self._bitmap = None
            self._done = this

    async def mark_unclean(self) -> None:
        """Have the header say that the image is in use, and make that stable. Raises OSError."""
        if self.header.clean:
            async with self._lock:
                self._check_failed()
                if self.header.clean:
                    with trio.CancelScope(shield=True):
                        await self._write_header(clean_shutdown=0)
                        await self._flush(self._meta)

    async def change_header(self, **changes: int | str) -> None:
        """Change fields of the header, and make it stable. Raises OSError."""
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                await self._write_header(**changes)
                await self._flush(self._meta)

    async def write_profile(self, data: bytes, entries: int, unit: int) -> None:
        """Put a prefetch profile where there is room for it, and have the header name it. Raises OSError."""
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
        """Take back a change of the header that is stable already, or fail. Raises OSError."""
        try:
            await self.change_header(**fields)
        except OSError as error:
            self.fail(f"writing the header: {error}")
            raise

    async def close(self) -> None:
        """Commit everything; leave a clean header. Raises OSError; the image then needs a replay."""
        async with self._lock:
            self._check_failed()
            with trio.CancelScope(shield=True):
                if self._data_written or self.uncommitted or self._dirty_pages:
                    await self._commit(checkpoint=True)
                if not self.header.clean or self._header_unsure:
                    await self._write_header(clean_shutdown=1)
                    await self._flush(self._meta)

    @property
    def _dirty_pages(self) -> int:
        return (self._bitmap.dirty_pages if self._bitmap else 0) + (self._table.dirty_pages if self._table else 0)

    async def _write_header(self, **changes: int | str) -> None:
        header = with_fields(self.header, **changes)
        raw = header.encode() + self._raw_header[HEADER_SIZE:]
        known = bytes(byte ^ 0xFF for byte in raw) if self._header_unsure else self._raw_header
        try:
            for offset, sector in changed_sectors(known, raw):
                await self._meta.pwrite(sector, offset)
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

    def fail(self, why: str) -> None:
        """Write nothing more."""
        if self.failed is None:
            self.failed = why
            log.error("%s: %s; read-only from now on", self._meta.name, why)

    def _check_failed(self) -> None:
        if self.failed is not None:
            raise OSError(errno.EIO, f"{self._meta.name}: read-only since an earlier error: {self.failed}")
