"""Copies from the base of an open image: of bytes that were read, and of holes, which nobody reads.

A copy takes blocks that are missing and that nobody has claimed, holds them (`cow.locks`), stores, and sets the bits,
without a checkpoint between, as a write does (`writing`). But it does not report `blocks_stored` (data and chunks it
does report): a bit that is lost costs nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from fvdfs.cow.locks import Gate, RangeLock
from fvdfs.format.header import ceil_div, round_up
from fvdfs.image.core import Core
from fvdfs.store.base import Buffer

HOLE_CHUNKS = 1 << 12  # that get a place under a hole in one step: some milliseconds
HOLE_BLOCKS = 1 << 24  # that become local in one step; the same for their bits
ZERO_STEP = 8 << 20  # bytes of zeros that are written at a time, while others wait for these blocks


class Copies:
    """The copies of one image."""

    def __init__(
        self,
        core: Core,
        gate: Gate,
        locks: RangeLock,
        store: Callable[[int, int, Buffer], Awaitable[None]],
        store_zeros: Callable[[int, int], Awaitable[None]],
    ) -> None:
        """`store`: puts bytes [start, stop) into the storage, zeros as `store_zeros` does: only where it has others."""
        self._core = core
        self._gate = gate
        self._locks = locks
        self._store = store
        self._store_zeros = store_zeros

    async def store_copy(self, start: int, data: memoryview) -> int:
        """Store bytes of the base, from `start` on: whole blocks that are missing and that nobody has claimed.

        The number of bytes stored. Raises OSError.
        """

        async def store(piece_start: int, piece_stop: int) -> None:
            await self._store(piece_start, piece_stop, data[piece_start - start : piece_stop - start])

        return await self._store_missing(start, start + len(data), store)

    async def store_hole(self, start: int, stop: int, *, writes: bool) -> tuple[int, int]:
        """`store_copy` of bytes [start, stop), a hole of the base of any length: (how far that went, bytes made local).

        It goes on as long as the storage reads as zeros there already. Elsewhere zeros are written: one step, if
        `writes`, or none. Raises OSError.
        """
        core, at, stored = self._core, start, 0
        while True:
            block_size, base_size = core.base_range()
            whole_stop = base_size if stop >= base_size else stop // block_size * block_size
            begin, end = core.missing(round_up(at, max(1, block_size)), whole_stop - at)
            if begin >= min(end, whole_stop):
                return stop, stored
            at, takes_writing = await self._hole_step(begin, min(end, whole_stop))
            if takes_writing and not writes:
                return begin, stored
            stored += await self._store_missing(begin, at, self._store_zeros)
            if core.committer.overfull:
                await core.committer.commit()
            if takes_writing:
                return at, stored
            await trio.lowlevel.checkpoint()

    async def _hole_step(self, start: int, stop: int) -> tuple[int, bool]:
        """Where the next step of `store_hole` ends, and whether it writes zeros; bytes [start, stop) are missing."""
        core, block_size = self._core, self._core.geometry.block_size
        _, run_stop, where = next(iter(core.storage.byte_runs(start, stop)))
        if where is not None:
            end, hole = await core.data.extent(where, where + run_stop - start)
            end += start - where
        else:
            end, hole = min(run_stop, start + HOLE_CHUNKS * core.header.chunk_size), not core.data.fixed_size
        end = min(end, start + (HOLE_BLOCKS * block_size if hole else ZERO_STEP))
        return (stop if end >= stop else max(end // block_size, start // block_size + 1) * block_size), not hole

    async def _store_missing(self, start: int, stop: int, store: Callable[[int, int], Awaitable[None]]) -> int:
        """Have `store` put whole blocks of [start, stop) into the storage: those to copy, missing and not claimed.

        They are held meanwhile, and are local afterwards. The number of bytes.
        """
        core = self._core
        bitmap = core.bitmap
        if bitmap is None or self._gate.is_closed or core.committer.failed is not None or not core.writable:
            return 0
        block_size, base_size = core.base_range()
        stop = min(stop, base_size)
        block = ceil_div(start, block_size)
        end = bitmap.blocks if stop == base_size else stop // block_size
        stored = 0
        with self._gate.passed():
            while block < end:
                block, until = core.to_copy(block, end)
                if block == until:
                    break
                if bitmap.is_local(block):
                    block = bitmap.next_missing(block) or end
                    continue
                free = self._locks.free_until(block, until)
                if free == block:
                    block += 1
                    continue
                piece_end = bitmap.next_local(block, free)
                async with self._locks.hold(block, piece_end):
                    piece_start, piece_stop = block * block_size, min(piece_end * block_size, base_size)
                    await store(piece_start, piece_stop)
                    bitmap.set_local(block, piece_end)
                stored += piece_stop - piece_start
                block = piece_end
        return stored
