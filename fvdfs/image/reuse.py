"""Chunks of a full device are used again.

A guest's discards leave chunks that hold zeros only, and a crash or a smaller disk leaves numbers that no entry names.
In a file neither takes space. On a device both do: so when it has no room left, before it is made larger,

    1. writers wait, those under way end
    2. checkpoint, and the journal is cleared: an old record must not bring back an entry
    3. the entries of chunks that were discarded, and read as zeros still, become UNALLOCATED; checkpoint
    4. writers go on, but for the one that needs room; reads of the storage that are under way end: they may be of these
       places

and from then on numbers that no entry names are given again, after their places were zeroed (`alloc/chunked.py`). A
power cut before the end of 3 leaves the entries, over zeros; after it nothing on the disk names the places. What a
lost session has written there is zeroed, too, before the next one gives the number again; the original never does
(it takes the highest + 1).

A chunk in the base's range is kept as long as there is a bitmap: its blocks are local, and a local block without a
chunk is what a lost table entry looks like (`check`). Chunks of blocks that are not local were never discarded.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.cow.locks import Gate
from fvdfs.format.header import ceil_div
from fvdfs.image.core import Core
from fvdfs.image.reading import Reads

T = TypeVar("T")


class Reuse:
    """The chunks of one image that are used again."""

    def __init__(self, core: Core, reads: Reads, gate: Gate, resizing: trio.Lock) -> None:
        """`resizing`: `Resizer.lock`."""
        self._core = core
        self._reads = reads
        self._gate = gate
        self._resizing = resizing
        self._times = 0

    async def where_full(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that passes the gate by itself; again where that has found no room, and chunks were freed since.

        Raises OSError.
        """
        while True:
            before = self._times
            try:
                return await work()
            except OSError as error:
                if error.errno != errno.ENOSPC or not await self._free(before):
                    raise

    async def _free(self, before: int) -> bool:
        """Have chunks that hold nothing be used again, unless others have done it since `before`.

        False: there are none. True also where those that were discarded hold something again: now the device may be
        made larger. Raises OSError.
        """
        core, storage = self._core, self._core.storage
        if not isinstance(storage, ChunkedStorage) or not core.data.fixed_size:
            return False
        async with self._resizing:
            if self._times != before:
                return True
            if not storage.may_reuse:
                return False
            async with self._gate.closed():
                with trio.CancelScope(shield=True):
                    await _free_chunks(core, storage)
            await self._reads.wait(core.own)
            await storage.look_for_unnamed()
            self._times += 1
        return True


async def _free_chunks(core: Core, storage: ChunkedStorage) -> None:
    assert core.table is not None
    first = 0 if core.bitmap is None else ceil_div(core.geometry.base_size, core.header.chunk_size)
    unused = await storage.find_unused(first)
    await core.committer.checkpoint(clear_journal=True)
    if unused:
        core.table.free(unused)
        await core.committer.checkpoint()
