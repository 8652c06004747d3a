"""Allocation by FVD: chunks in the order of first write, through the chunk table (format.md, "Chunk table").

A new chunk reads as zeros, so a write need not cover all of it. What lies behind the highest used
chunk is free, but may hold anything: a former owner's bytes, or chunks that a crash left
without an entry. So room is made ready before numbers are handed out:

- A file is truncated at the end of the highest used chunk, once a session, and extended again, sparse.
- A device is zeroed, some chunks ahead; and where it is too small, made larger by a command.

Other programs that write to the image later, the original among them, use what lies there as it is. So it is
made to read as zeros also where this session hands out none of it (format.md, "Beyond the original"): a file is
truncated, a device zeroed, when an image is opened after a crash (`clear_behind`), and when the disk shrinks
(`give_back`).
What a crash leaves on a device is bounded, so that not all of it need be zeroed: no more than `window`
chunks are handed out before a commit has made their entries stable (`image.writing` sees to that).

Before a device is made larger, chunks that hold nothing any more are freed, and numbers that no entry names are given
again, after their places were zeroed (`image/reuse.py`). In a file there is no need: their space went back to the
host's file system when they were zeroed.

Room is made ready off the write path, by a background task, as soon as little of it is left; only a
write that overtakes that task waits. Entries appear in the table only when their place is ready;
`prepare` reports them to its caller, who sees to it that a commit covers them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager

import trio
from bitarray import bitarray

from fvdfs.alloc.growth import GrowCommand
from fvdfs.alloc.table import Table
from fvdfs.format.header import MAX_CHUNKS, UNALLOCATED, ceil_div
from fvdfs.format.journal import Range
from fvdfs.store.base import OUT_OF_SPACE, Store, pread_exactly

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes that are read at a time
_GROWTH_STEP = 1 << 17  # chunks for which a table gets room before others get their turn
_PER_LOOK = 1 << 30  # bytes that are read to find chunks that hold zeros
ZERO_AHEAD = 32 << 20  # bytes of a device that are zeroed before they are needed

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
"""Runs an async function in the background, in a nursery whose owner outlives the image."""


class ChunkedStorage:
    """The mapping by a chunk table over a store."""

    def __init__(
        self,
        store: Store,
        table: Table,
        *,
        data_offset: int,
        chunk_size: int,
        grow_unit: int,
        size: int,
        grow_command: GrowCommand,
        window: int,
        spawn: Spawn | None,
    ) -> None:
        """Offsets, sizes and units in bytes; `window` in chunks."""
        self._store = store
        self._table = table
        self._offset = data_offset
        self._chunk_size = chunk_size
        self._grow_unit = max(grow_unit, chunk_size)
        self._size = size
        self._command = grow_command
        self.window = window
        self._room: int | None = None
        """Chunks below this number are used, or have a place that reads as zeros; None: nobody has looked."""
        self._growing = trio.Lock()
        self._touching = trio.Lock()
        self._stopped = False
        self._zeroed = bitarray()
        """Chunks of a device that were zeroed, and may hold zeros still."""
        self._unnamed: list[int] = []
        """Numbers that no entry names, whose places may hold anything."""
        self._freed: list[int] = []
        """Numbers that a shrink has freed, and whose space is still to be given back."""
        ahead = min(ZERO_AHEAD, self._grow_unit) if store.fixed_size else self._grow_unit
        self._ahead = max(1, ahead // chunk_size)
        self._growing_ahead = False
        self._full_at: int | None = None
        """The room at which growing ahead failed: not tried again until a write has made more."""
        self._spawn = spawn

    @property
    def damage(self) -> str:
        """What is wrong with it, in words; empty: nothing."""
        return self._table.damage

    def byte_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Bytes [start, stop) of the disk as runs (start, stop, offset in the store; None: zeros).

        Raises OSError(EIO) at a chunk that is damaged.
        """
        size = self._chunk_size
        table = self._table
        first, end = start // size, (stop - 1) // size + 1
        if table.shared and not table.shared.isdisjoint(range(first, end)):
            raise OSError(errno.EIO, f"{self._store.name}: a chunk of bytes {start}..{stop} is allocated twice")
        for chunk, chunk_stop, number in table.chunk_runs(first, end):
            run_start = max(start, chunk * size)
            run_stop = min(stop, chunk_stop * size)
            if number == UNALLOCATED:
                yield run_start, run_stop, None
            else:
                yield run_start, run_stop, self._offset + number * size + run_start - chunk * size

    def place(self, start: int, stop: int) -> int | None:
        """The offset in the store, where these bytes have one, in one piece. Raises as `byte_runs`."""
        (_, run_stop, where), *_ = self.byte_runs(start, stop)
        return where if run_stop == stop else None

    def holds(self, end: int) -> bool:
        """Whether the store must reach to this offset of its own, which is in a chunk that the table has, or had."""
        return bool(self._table.beyond) or end <= self._end(self._table.highest + 1)

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
            more = max(0, len(missing) - table.spare)
            if not more or (self._room is not None and table.highest + 1 + more <= self._room):
                for chunk in missing:
                    table.allocate(chunk)
                self._grow_ahead_if_short()
                return missing
            await self._make_room(more)

    # --- reuse ----------------------------------------------------------------------------------

    def zeroed(self, start: int, stop: int) -> None:
        """Bytes [start, stop) of the disk were zeroed."""
        if self._store.fixed_size:
            first = ceil_div(start, self._chunk_size)
            end = self._table.chunks if stop >= self._size else stop // self._chunk_size
            if first < end:
                self._zeroed.extend(bitarray(max(0, end - len(self._zeroed))))
                self._zeroed[first:end] = 1

    @property
    def may_reuse(self) -> bool:
        """Whether there may be places in the storage that nothing needs, and that are not ready for use."""
        return self._zeroed.any() or self._table.unnamed > len(self._unnamed)

    async def find_unused(self, first: int) -> list[int]:
        """Chunks from `first` on that have a place, were zeroed, and read as zeros still. Nobody writes meanwhile.

        Not all where that takes long: some are left for the next time. Raises OSError.
        """
        found = []
        buffer = memoryview(bytearray(min(self._chunk_size, _PIECE)))
        zeros = bytes(len(buffer))
        self._zeroed[:first] = 0
        self._table.leave_allocated(self._zeroed)
        for _ in range(max(1, _PER_LOOK // self._chunk_size)):
            if (chunk := self._zeroed.find(1, first)) < 0:
                break
            self._zeroed[chunk] = 0
            if await self._is_zero(self._table[chunk], buffer, zeros):
                found.append(chunk)
            first = chunk
        return found

    async def _is_zero(self, number: int, buffer: memoryview, zeros: bytes) -> bool:
        for at in range(self._end(number), self._end(number + 1), len(buffer)):
            piece = buffer[: min(len(buffer), self._end(number + 1) - at)]
            if await self._store.pread(piece, at) < len(piece) or not zeros.startswith(piece):
                return False
        return True

    async def look_for_unnamed(self) -> None:
        """No number that the table does not name has an entry or a record on disk, or is read by anybody."""
        async with self._growing:  # else some may be about to be given
            self._unnamed = self._table.take_unnamed()

    async def _ready_unnamed(self, needed: int) -> bool:
        """Zero places that no entry names, `needed` at the least if there are so many; False where there are none."""
        count = max(needed, self._ahead)
        numbers, self._unnamed = self._unnamed[-count:], self._unnamed[:-count]
        try:
            async with self._touch():
                for first, stop in _runs(reversed(numbers)):
                    await self._store.zero(self._end(first), (stop - first) * self._chunk_size)
        except BaseException:
            self._unnamed += numbers
            raise
        self._table.give_again(numbers)
        return bool(numbers)

    # --- room -----------------------------------------------------------------------------------

    def _grow_ahead_if_short(self) -> None:
        if self._spawn is None or self._growing_ahead or self._room in (None, self._full_at):
            return
        assert self._room is not None
        left = self._room - self._table.highest - 1
        unallocated = self._table.chunks - self._table.highest - 1
        if left < min(ceil_div(self._ahead, 2), unallocated):
            self._growing_ahead = True
            self._spawn(self._grow_ahead)

    async def stop_growing(self) -> None:
        """Have nothing in the background use the store any more. (A command that grows it may go on.)"""
        self._spawn = None
        self._stopped = True
        async with self._touching:
            pass

    @asynccontextmanager
    async def _touch(self) -> AsyncIterator[None]:
        """Use the store, which `stop_growing` must not find closed under it."""
        async with self._touching:
            if self._stopped:
                raise OSError(errno.EBADF, f"{self._store.name}: closed")
            yield

    async def _grow_ahead(self) -> None:
        try:
            await self._make_room(self._ahead)
        except OSError as error:
            if self._stopped:
                return
            self._full_at = self._room
            if self.may_reuse:
                return
            log.warning("%s: storage is running out: %s", self._store.name, error.strerror)
        finally:
            self._growing_ahead = False

    async def _make_room(self, more: int) -> None:
        """Make room for `more` chunks above the highest used one, and ahead. Raises OSError."""
        async with self._growing:
            used = self._table.highest + 1
            if self._room is None:
                self._room = used
                end = self._end(used)
                async with self._touch():
                    if not self._store.fixed_size and await self._store.size() > end:
                        await self._store.resize(end)
            if used + more <= self._room:
                return
            # No more than the disk can ever use, so that a small one does not grow for nothing.
            wanted = max(used + more, min(self._end_of_use(), used + more + self._ahead))
            if self._store.fixed_size:
                self._room = await self._make_room_on_device(used + more, wanted)
                return
            async with self._touch():
                try:
                    await self._store.resize(self._end(wanted))
                except OSError as error:
                    if error.errno not in OUT_OF_SPACE:
                        raise
                    wanted = used + more
                    await self._store.resize(self._end(wanted))
                self._room = wanted

    async def _make_room_on_device(self, needed: int, wanted: int) -> int:
        """Zero chunks from the room on, as far as `wanted`, `needed` at the least; where it ends."""
        assert self._room is not None
        async with self._touch():
            size = await self._store.size()
        if size < self._end(needed):
            if await self._ready_unnamed(needed - self._table.highest - 1):
                return self._room
            if self.may_reuse:
                raise OSError(errno.ENOSPC, f"{self._store.name}: is full, but for what nobody uses any more")
            await self._command.grow(max(self._grow_unit, self._end(needed) - size), self._store.name)
        async with self._touch():
            size = await self._store.size()
            if size < self._end(needed):
                raise OSError(errno.ENOSPC, f"{self._store.name}: still ends at {size} bytes after it was grown")
            room = min(wanted, (size - self._offset) // self._chunk_size)
            await self._store.zero(self._end(self._room), (room - self._room) * self._chunk_size)
            return room

    def _end(self, chunks: int) -> int:
        """Where so many chunks end in the store."""
        return self._offset + chunks * self._chunk_size

    def _end_of_use(self) -> int:
        """The room that the disk needs when all of it is allocated."""
        unallocated = self._table.chunks - self._table.allocated()
        return min(self._table.highest + 1 + unallocated, MAX_CHUNKS)

    # --- room for metadata ------------------------------------------------------------------------

    def give_from(self, first: int) -> None:
        """Give no place below this number."""
        self._unnamed = []
        self._table.give_from(first)

    async def take_places(self, count: int) -> range:
        """The numbers of so many places, which read as zeros and which nobody else gets. Raises OSError, as ENOSPC."""
        while self._room is None or self._table.highest + 1 + count > self._room:
            if self._table.highest + 1 + count > MAX_CHUNKS:
                raise OSError(errno.ENOSPC, f"{self._store.name}: every chunk number of the format is in use")
            await self._make_room(count)
        return self._table.take(count)

    async def give_back_places(self, numbers: range) -> None:
        """They are not needed. Raises OSError; nobody uses them then."""
        async with self._touch():
            await self._store.zero(self._end(numbers.start), len(numbers) * self._chunk_size)
        self._table.give_again(numbers)

    async def copy_away(self, ranges: Iterable[Range], places: Mapping[int, int], *, fresh: bool) -> None:
        """Copy bytes [start, stop) of the disk to the new places of their chunks, as far as these have one.

        The entries stay as they are. `fresh`: the places read as zeros. Raises OSError.
        """
        size = self._chunk_size
        for start, stop in ranges:
            for chunk in range(start // size, ceil_div(stop, size)):
                if (to := places.get(chunk)) is not None:
                    number, origin = self._table[chunk], chunk * size
                    at = self._end(number) + max(0, start - origin)
                    end = self._end(number) + min(size, stop - origin)
                    await self._copy(at, end, (to - number) * size, fresh=fresh)

    async def _copy(self, at: int, stop: int, distance: int, *, fresh: bool) -> None:
        """Copy bytes [at, stop) of the store to so many bytes further behind."""
        while at < stop:
            async with self._touch():
                end, hole = await self._store.extent(at, stop)
                if not hole:
                    end = min(end, at + _PIECE)
                    await self._store.pwrite(await pread_exactly(self._store, end - at, at), at + distance)
                elif not fresh:
                    await self._store.zero(at + distance, end - at)
            at = end

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Nothing is made ready in the background while the block runs."""
        async with self._growing:
            yield

    def table_moved(self, filled: int) -> None:
        """Data begins where numbers are given from, in the header and for the numbers on disk; it stays where it is.

        `filled`: as for `Table.use_copy`.
        """
        self._table.use_copy(filled)
        self._full_at = None

    # --- size -----------------------------------------------------------------------------------

    async def make_table_room(self, chunks: int) -> None:
        """Have room in memory for a table of so many entries."""
        while self._table.room < chunks:
            self._table.make_room(min(chunks, self._table.room + _GROWTH_STEP))
            await trio.lowlevel.checkpoint()

    async def grow(self, size: int) -> None:
        """The disk grows to `size` bytes, and what is new reads as zeros. Raises OSError."""
        start = self._size
        stop = min(size, ceil_div(start, self._chunk_size) * self._chunk_size)
        if start < stop:
            for run_start, run_stop, offset in self.byte_runs(start, stop):
                if offset is not None:
                    await self._store.zero(offset, run_stop - run_start)
        self._table.grow(ceil_div(size, self._chunk_size))
        self._size = size

    def grow_failed(self, size: int) -> None:
        """The disk stays at `size` bytes: a growth could not be completed."""
        self._table.shrink(ceil_div(size, self._chunk_size))
        self._size = size

    async def shrink(self, size: int) -> None:
        """The disk has become smaller: chunks past its end no longer count. `give_back` has to follow."""
        async with self._growing:  # which makes numbers ready that may become another's now
            freed = self._table.shrink(ceil_div(size, self._chunk_size))
            if freed:
                self._unnamed = []
            self._freed += freed
            self._size = size
            self._room = None

    async def give_back(self) -> None:
        """The table on disk is without them, and nobody reads them: give back the space of chunks past its end.

        Raises OSError.
        The numbers above the highest are going to be handed out again, by whoever writes next: they read as zeros.
        Others stay unused; in a file they take no space any more, on a device nobody else could use it.
        """
        # Some may be in use again, where the shrink that freed them could not be completed.
        freed, self._freed = sorted(set(self._freed) - self._table.named(self._freed)), []
        if not freed:
            return
        async with self._growing:
            used = self._table.highest + 1
            async with self._touch():
                for first, stop in _runs(number for number in freed if number < used):
                    if not self._store.fixed_size:
                        await self._store.zero(self._end(first), (stop - first) * self._chunk_size)
                if self._store.fixed_size:
                    stop = max(used, freed[-1] + 1)
                    await self._store.zero(self._end(used), (stop - used) * self._chunk_size)
                    self._room = stop
                else:
                    await self._store.resize(min(self._end(used), await self._store.size()))
                    self._room = used

    async def clear_behind(self) -> None:
        """After a crash: what lies behind the highest used chunk reads as zeros, as far as it may have been written.

        Raises OSError.
        """
        async with self._growing:
            used = self._table.highest + 1
            end = self._end(used)
            async with self._touch():
                size = await self._store.size()
                if not self._store.fixed_size:
                    if size > end:
                        await self._store.resize(end)
                    self._room = used
                    return
                stop = min(used + self.window, (size - self._offset) // self._chunk_size)
                if stop > used:
                    await self._store.zero(end, (stop - used) * self._chunk_size)
                self._room = max(stop, used)


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs [first, stop)."""
    first = stop = -1
    for number in numbers:
        if number != stop:
            if first < stop:
                yield first, stop
            first = number
        stop = number + 1
    if first < stop:
        yield first, stop
