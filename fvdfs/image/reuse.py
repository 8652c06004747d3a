"""Chunks of a full device are used again.

A guest's discards leave chunks that hold zeros only, and a crash or a smaller disk leaves numbers that no entry names.
In a file neither takes space. On a device both do: so when it has no room left, before it is made larger,

    1. writers wait, those under way end
    2. checkpoint, and the journal is cleared: an old record must not bring back an entry
    3. the entries of chunks that were discarded, and read as zeros still, become UNALLOCATED; checkpoint
    4. reads under way end: they may be of these places

and from then on numbers that no entry names are given again, after their places were zeroed (`alloc/chunked.py`). A
power cut before the end of 3 leaves the entries, over zeros; after it nothing on the disk names the places. What a
lost session has written there is zeroed, too, before the next one gives the number again; the original never does
(it takes the highest + 1).

A chunk in the base's range is kept as long as there is a bitmap: its blocks are local, and a local block without a
chunk is what a lost table entry looks like (`check`). Chunks of blocks that are not local were never discarded.
"""

from __future__ import annotations

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.cow.locks import Gate
from fvdfs.format.header import ceil_div
from fvdfs.image.core import Core
from fvdfs.image.reading import Reads


async def reuse_chunks(core: Core, reads: Reads, gate: Gate, resizing: trio.Lock) -> bool:
    """Have chunks that hold nothing be used again; whether it is worth trying once more. Raises OSError.

    `resizing`: `Resizer.lock`.
    """
    storage = core.storage
    if not isinstance(storage, ChunkedStorage) or not core.data.fixed_size:
        return False
    async with resizing:
        if storage.has_spare:  # somebody else has done it
            return True
        if not storage.may_reuse:
            return False
        async with gate.closed():
            with trio.CancelScope(shield=True):
                await _free_chunks(core, storage)
                await reads.wait()
                storage.look_for_unnamed()
        return True  # also where there are none: now the device may be made larger


async def _free_chunks(core: Core, storage: ChunkedStorage) -> None:
    assert core.table is not None
    first = 0 if core.bitmap is None else ceil_div(core.geometry.base_size, core.header.chunk_size)
    unused = await storage.find_unused(first)
    await core.committer.checkpoint(clear_journal=True)
    if unused:
        core.table.free(unused)
        await core.committer.checkpoint()
