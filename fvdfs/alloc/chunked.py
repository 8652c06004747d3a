"""Allocation by FVD: chunks in the order of first write, through the chunk table (format.md, section 5).

A new chunk reads as zeros: who allocates it need not cover it. A file gives this by being cut at
the end of the highest used chunk before the first allocation of a session (behind it may lie chunks
that a crash left without an entry, with a former owner's bytes), and then extended, sparse.

Entries appear in the table only when their place is ready; `prepare` reports them to its caller,
who sees to it that a commit covers them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import trio

from fvdfs.alloc.store import Store
from fvdfs.alloc.table import UNALLOCATED, Table
from fvdfs.header import ceil_div

ZEROS = bytes(1 << 20)


class ChunkedStorage:
    """The mapping by a chunk table over a store."""

    def __init__(
        self, store: Store, table: Table, *, data_offset: int, chunk_size: int, grow_unit: int, size: int
    ) -> None:
        self._store = store
        self._table = table
        self._offset = data_offset
        self._chunk_size = chunk_size
        self._grow_unit = max(grow_unit, chunk_size)
        self._size = size
        self._room = 0  # chunks below this number have a place that reads as zeros until written
        self._growing = trio.Lock()

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Bytes [start, stop) of the disk as runs (start, stop, offset in the store; None: zeros).

        Raises OSError(EIO) at a chunk that is damaged.
        """
        size = self._chunk_size
        table = self._table
        first, last = start // size, (stop - 1) // size
        if table.shared and not table.shared.isdisjoint(range(first, last + 1)):
            raise OSError(errno.EIO, f"{self._store.name}: a chunk of bytes {start}..{stop} is allocated twice")
        for chunk, count, number in table.runs(first, last):
            run_start = max(start, chunk * size)
            run_stop = min(stop, (chunk + count) * size)
            if number == UNALLOCATED:
                yield run_start, run_stop, None
            else:
                yield run_start, run_stop, self._offset + number * size + run_start - chunk * size

    def prepare_nowait(self, start: int, stop: int) -> bool:
        """Whether every byte of [start, stop) has a place already."""
        table = self._table
        size = self._chunk_size
        return all(table[chunk] != UNALLOCATED for chunk in range(start // size, (stop - 1) // size + 1))

    async def prepare(self, start: int, stop: int) -> list[int]:
        """Give every byte of [start, stop) a place; the chunks that were allocated for it.

        Raises OSError, ENOSPC where the storage cannot grow; nothing is allocated then.
        """
        table = self._table
        chunks = range(start // self._chunk_size, (stop - 1) // self._chunk_size + 1)
        while True:
            missing = [chunk for chunk in chunks if table[chunk] == UNALLOCATED]
            # No checkpoint from here on: numbers are handed out against the room just seen.
            if len(missing) > table.numbers_left:
                raise OSError(errno.ENOSPC, f"{self._store.name}: every chunk number of the format is in use")
            if table.highest + 1 + len(missing) <= self._room or not missing:
                for chunk in missing:
                    table.allocate(chunk)
                return missing
            await self._grow(len(missing))

    async def _grow(self, more: int) -> None:
        async with self._growing:
            used = self._table.highest + 1
            if used + more <= self._room:
                return
            if self._room == 0:
                # Whatever lies behind the highest chunk belongs to nobody, but need not be zeros.
                end = self._offset + used * self._chunk_size
                if await self._store.size() > end:
                    await self._store.resize(end)
            needed = self._offset + (used + more) * self._chunk_size
            try:
                await self._store.resize(needed + self._grow_unit)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise
                await self._store.resize(needed)
            size = await self._store.size()
            self._room = (size - self._offset) // self._chunk_size

    async def grow(self, size: int) -> None:
        """The disk grows to `size` bytes, and what is new reads as zeros. Raises OSError."""
        start = self._size
        stop = min(size, ceil_div(start, self._chunk_size) * self._chunk_size)
        if start < stop:
            for run_start, run_stop, offset in self.runs(start, stop):
                if offset is not None:
                    await self._zero(offset, run_stop - run_start)
        self._table.grow(ceil_div(size, self._chunk_size))
        self._size = size

    def grow_failed(self, size: int) -> None:
        """The disk stays at `size` bytes: a growth could not be completed."""
        self._table.shrink(ceil_div(size, self._chunk_size))
        self._size = size

    async def shrink(self, size: int) -> None:
        """The disk has become smaller: chunks past its end no longer count; their space is kept."""
        self._table.shrink(ceil_div(size, self._chunk_size))
        self._size = size
        self._room = 0

    async def _zero(self, offset: int, length: int) -> None:
        while length:
            count = min(length, len(ZEROS))
            await self._store.pwrite(memoryview(ZEROS)[:count], offset)
            offset += count
            length -= count
