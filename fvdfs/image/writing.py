"""Writes to an open image, and zeroing of ranges.

A write whose blocks are all local goes straight to the storage. One that touches a block which is not local holds
these blocks (`cow.locks`), completes the first and the last from the base where it covers them only in part, stores
all in one piece, and then, without a checkpoint between, sets the bits and tells the committer. Copies from the base do
it as writes do (`copying`).

Zeroing is a write of zeros that stores none: the range becomes a hole in the storage (`Store.zero`), and its blocks
local. A chunk without a place reads as zeros, and gets none, except under blocks of the base's range: a bit over a
missing chunk is what a lost table looks like.

What makes a write durable, and in which order, is `commit`. Only these writes wait for a flush themselves:

- the first of a session that needs a chunk: the header says first that the image is in use (`mark_unclean`);
- on a device, one that would leave too many chunks without a stable entry (`_keep_in_window`);
- the first to storage without a table that is still empty (`FlatStorage.prepare`);
- one past the end of the disk, which grows (`resizing`);
- one after which too much is pending (`Committer.overfull`).
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.locks import Claim, Gate, RangeLock
from fvdfs.cow.planner import WritePlan, Zeroes, plan_write, zero_runs
from fvdfs.format.journal import merge
from fvdfs.image.copying import ZERO_STEP, Copies
from fvdfs.image.core import PIECES_PER_TURN, Core, OwnData
from fvdfs.image.reading import Reads
from fvdfs.image.resizing import Resizer
from fvdfs.image.reuse import Reuse
from fvdfs.store.base import OUT_OF_SPACE, Buffer, Done, Store, next_data

T = TypeVar("T")

CHUNKS_PER_SLICE = 1 << 14  # of a long range, before other requests get their turn
ONE_READ = 64 << 10  # bytes; a shorter write between two parts of the base has both read in one piece


class PendingWrite:
    """A write (`store.base.Pending`)."""

    __slots__ = ("_data", "_offset", "_writes")

    def __init__(self, writes: Writes, offset: int, data: memoryview) -> None:
        self._writes = writes
        self._offset = offset
        self._data = data

    def start(self, done: Done, /) -> bool:
        """Where one call to the storage is all that it takes; the data is a writable buffer."""
        writes, offset = self._writes, self._offset
        core, stop = writes.core, offset + len(self._data)
        where = writes.place(offset, stop)
        if where is None:
            return False
        bitmap, plan, claim = core.bitmap, plan_write(core.geometry, core.bitmap, offset, stop), None
        if plan.missing:
            if plan.head or plan.tail:
                return False
            claim = writes.locks.hold_nowait(plan.first, plan.end)
            if claim is None:
                return False

        def ended(result: int) -> None:
            writes.data_written(offset, stop)
            writes.changed(offset, stop)
            if result >= 0:
                writes.stored(bitmap, plan)
                writes.ended(offset, stop)
            writes.leave(claim)
            done(result)

        writes.gate.enter()
        try:
            started = core.data.start_pwrite(self._data, where, ended)
        except BaseException:
            writes.leave(claim)
            raise
        if not started:
            writes.leave(claim)
        return started

    async def finish(self) -> int:
        """A disk that ends before is grown where the format can. Raises as `Image.write`."""
        if self._data:
            await self._writes.write(self._offset, self._data)
        else:
            self._writes.check()
        return len(self._data)


class Writes:
    """The writes of one image."""

    def __init__(self, core: Core, reads: Reads, resizer: Resizer, gate: Gate, locks: RangeLock) -> None:
        self.core = core
        self._reads = reads
        self._resizer = resizer
        self.gate = gate
        self.locks = locks
        self.reuse = Reuse(core, reads, gate, resizer.lock)
        self.copies = Copies(core, gate, locks, functools.partial(self._store, skip_zeros=True), self._store_zeros)
        self._allocating = trio.Lock()
        self._unsure_chunks = 0
        """Chunks of a device that were allocated since the last commit, at the most."""

    # --- what both ways of a write share ----------------------------------------------------------

    def stored(self, bitmap: Bitmap | None, plan: WritePlan) -> None:
        """All that was planned is in the storage; blocks that were missing are still held."""
        first, end = plan.first, plan.end
        if bitmap is None or first == end:
            return
        if plan.missing:
            bitmap.set_local(first, end)
        if not bitmap.all_committed(first, end):
            self.core.committer.blocks_stored(first, end)

    def data_written(self, start: int, stop: int) -> None:
        """Bytes [start, stop) of the storage were written, perhaps in part."""
        core = self.core
        core.committer.data_written()
        if core.written is not None:
            core.written.append((start, stop))

    def changed(self, start: int, stop: int) -> None:
        """These bytes are other ones now, or may be in part; before the gate is left."""
        if self.core.dirty is not None:
            self.core.dirty.add(start, stop)

    @contextmanager
    def changing(self, start: int, stop: int) -> Iterator[None]:
        """`changed` at the end, whatever that is."""
        try:
            yield
        finally:
            self.changed(start, stop)

    def ended(self, start: int, stop: int) -> None:
        """A write was successful, and is about to be answered."""
        core = self.core
        if stop > core.end:
            core.end = stop
        if core.recorder is not None:
            core.recorder.touched(start, stop, written=True)

    # --- without a task ---------------------------------------------------------------------------

    def place(self, start: int, stop: int) -> int | None:
        """Where in the storage these bytes have one place already, and nothing else keeps a write from being started.

        None: it takes a task.
        """
        core = self.core
        if (
            not core.writable
            or start == stop
            or stop > core.size
            or self.gate.is_closed
            or core.zeroes is not Zeroes.OFF
            or core.base_writer is not None
            or core.committer.failed is not None
            or core.committer.overfull
            or not core.storage.prepare_nowait(start, stop)
        ):
            return None
        return core.storage.place(start, stop)

    def leave(self, claim: Claim | None) -> None:
        """Let others have the blocks, and pass the gate."""
        if claim is not None:
            self.locks.release(claim)
        self.gate.leave()

    # --- with one ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise OSError unless the image may be written."""
        core = self.core
        if not core.writable:
            raise OSError(errno.EROFS, f"{core.name}: not open for writing")
        if core.committer.failed is not None:
            raise OSError(errno.EIO, f"{core.name}: read-only since an earlier error: {core.committer.failed}")

    async def write(self, offset: int, data: memoryview) -> None:
        """Write data, which is not empty, in a task. Raises OSError: EROFS, EFBIG, ENOSPC as `Image.write`, EIO."""
        self.check()
        core = self.core
        stop = offset + len(data)
        try:
            await self._where_there_is_room(stop, functools.partial(self._write, offset, stop, data))
        except BaseException:
            if stop > core.end:
                core.end = core.size  # it has grown
            raise
        self.ended(offset, stop)
        if core.committer.overfull:
            await core.committer.commit()

    async def _write(self, start: int, stop: int, data: memoryview) -> None:
        with self.changing(start, stop):
            await self._write_past_gate(start, stop, data)

    async def _write_past_gate(self, start: int, stop: int, data: memoryview) -> None:
        core = self.core
        bitmap, plan = core.bitmap, plan_write(core.geometry, core.bitmap, start, stop)
        shared = core.base_writer is not None and plan.first < plan.end
        if not plan.missing and not shared:
            await self._store(start, stop, data)
            self.stored(bitmap, plan)
            return
        async with self.locks.hold(plan.first, plan.end):
            bitmap, plan = core.bitmap, plan_write(core.geometry, core.bitmap, start, stop)  # others held them before
            whole = await self._complete(plan, data) if plan.head or plan.tail else data
            await self._store(plan.start, plan.stop, whole)
            self.stored(bitmap, plan)
            if core.base_writer is not None:
                await core.base_writer.wrote(plan.first, plan.end, start, data[: core.geometry.base_size - start])

    async def zero(self, start: int, stop: int, *, discard: bool) -> None:
        """Have bytes [start, stop) read as zeros. Raises OSError as `Image.zero`."""
        self.check()
        core = self.core
        stop = min(stop, core.size)
        try:
            await self._in_slices(start, stop, functools.partial(self._zero, discard=discard))
        except OSError as error:
            if discard and error.errno in OUT_OF_SPACE:  # for which QEMU would stop the machine
                raise OSError(errno.EOPNOTSUPP, f"{core.name}: a discard takes space: {error.strerror}") from error
            raise
        self.ended(start, min(stop, core.end))
        if core.committer.overfull:
            await core.committer.commit()

    async def _where_there_is_room(self, end: int, work: Callable[[], Awaitable[T]]) -> T:
        """Do it past the gate, on a disk of at least `end` bytes. Raises OSError.

        Again where chunks that nobody uses any more have made room.
        """

        async def pass_gate() -> T:
            while end > self.core.size or self.gate.is_closed:
                if self.gate.is_closed:
                    await self.gate.wait_until_open()
                    self.check()  # it may have been frozen
                else:
                    await self._resizer.reach(end)
            with self.gate.passed():
                return await work()

        return await self.reuse.where_full(pass_gate)

    async def _zero(self, start: int, stop: int, *, discard: bool) -> None:
        stop = min(stop, self.core.size)
        if start < stop:  # else: it has shrunk
            with self.changing(start, stop):
                await self._replace(start, stop, functools.partial(self._punch, start, stop, writes=not discard))

    async def _replace(self, start: int, stop: int, change: Callable[[], Awaitable[None]]) -> None:
        """Have `change` store bytes [start, stop), then local with all of their blocks. Zeros, if a base gets them."""
        core = self.core
        bitmap, plan = core.bitmap, plan_write(core.geometry, core.bitmap, start, stop)
        if not plan.missing and (core.base_writer is None or plan.first == plan.end):
            await change()
            self.stored(bitmap, plan)
            return
        async with self.locks.hold(plan.first, plan.end):
            bitmap, plan = core.bitmap, plan_write(core.geometry, core.bitmap, start, stop)  # others held them before
            for part in (plan.head, plan.tail):
                if part is not None:
                    await self._store(*part, await self._read_base(*part))
            await change()
            self.stored(bitmap, plan)
            if core.base_writer is not None:
                await core.base_writer.zeroed(plan.first, plan.end, start, min(stop, core.geometry.base_size))

    async def copy(self, source: Core, reads: Reads, at: int, start: int, stop: int) -> int:
        """`Image.copy`, of what the source's chain has in one piece; `reads`: those of the source."""
        self.check()
        core = self.core
        try:
            stop = await self._where_there_is_room(0, functools.partial(self._copy, source, reads, at, start, stop))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return 0
            raise
        self.ended(start, stop)
        if core.committer.overfull:
            await core.committer.commit()
        return stop - start

    async def _copy(self, source: Core, reads: Reads, at: int, start: int, stop: int) -> int:
        """`copy`, past the gate: where it ends."""
        core = self.core
        with reads.held(source.own):  # only past the gate: a shrink that has closed it waits for reads
            begin, end, found, where = next(source.pieces(at, at + stop - start), (stop, stop, None, 0))
            if found is None or begin > at or stop > core.size or core.base_writer is not None:
                return start
            store = found.store if isinstance(found, OwnData) else found
            stop = start + end - at
            with self.changing(start, stop):
                await self._replace(start, stop, functools.partial(self._store_piece, store, where, start, stop))
        return stop

    async def reserve(self, start: int, stop: int) -> None:
        """Have later writes to bytes [start, stop) find space. Raises OSError as `Image.reserve`."""
        self.check()
        await self.core.data.reserve(0, 0)
        await self._in_slices(start, min(stop, self.core.size), self._reserve)

    async def _reserve(self, start: int, stop: int) -> None:
        core = self.core
        stop = min(stop, core.size)
        if start >= stop:
            return
        await self._prepare(start, stop)
        try:
            for where, length in await self._places(start, stop):
                await core.data.reserve(where, length)
        finally:
            core.committer.data_written()

    async def _in_slices(self, start: int, stop: int, work: Callable[[int, int], Awaitable[None]]) -> None:
        """Do it for bytes [start, stop), cut where a new block begins: to allot the chunks of a whole disk takes time.

        Others get their turn between two slices. Raises OSError, also where the image has failed meanwhile.
        """
        core, size = self.core, stop
        if isinstance(core.storage, ChunkedStorage):
            chunks = core.storage.window if core.data.fixed_size else CHUNKS_PER_SLICE
            block_size = max(1, core.header.block_size)
            size = max(1, chunks * core.header.chunk_size // block_size) * block_size
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            await self._where_there_is_room(0, functools.partial(work, start, end))
            start = end
            if start < stop:
                await trio.lowlevel.checkpoint()
                self.check()

    async def _complete(self, plan: WritePlan, data: Buffer) -> Buffer:
        """The data of the plan: the request's own, with what is missing of its blocks from the base."""
        if plan.head and plan.tail and len(data) <= ONE_READ:
            whole = await self._read_base(plan.start, plan.stop)
            at = plan.head[1] - plan.start
            whole[at : at + len(data)] = data
            return whole
        parts: list[Buffer] = []
        for part in (plan.head, data, plan.tail):
            if isinstance(part, tuple):
                parts.append(await self._read_base(*part))
            elif part is not None:
                parts.append(part)
        return b"".join(parts)

    async def _read_base(self, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        view = memoryview(buffer)
        if self._reads.read_base_nowait(view, start):
            return buffer
        if self.core.fetcher is not None:
            await self.core.fetcher.read_for_write(view, start)
        else:
            await self._reads.read_base(view, start)
        return buffer

    # --- the storage ------------------------------------------------------------------------------

    async def _store(self, start: int, stop: int, data: Buffer, *, skip_zeros: bool = False) -> None:
        """Put bytes [start, stop) of the disk into the storage, and tell the committer of it."""
        view = memoryview(data)
        if self.core.zeroes is Zeroes.OFF and not skip_zeros:
            await self._store_data(start, stop, view)
            return
        for piece_start, piece_stop, zeros in zero_runs(start, view):
            if zeros:
                await self._store_zeros(piece_start, piece_stop)
            else:
                await self._store_data(piece_start, piece_stop, view[piece_start - start : piece_stop - start])

    async def _store_data(self, start: int, stop: int, view: memoryview) -> None:
        core = self.core
        await self._prepare(start, stop)
        try:
            for run_start, run_stop, where in core.storage.byte_runs(start, stop):
                assert where is not None
                await core.data.pwrite(view[run_start - start : run_stop - start], where)
        finally:
            self.data_written(start, stop)

    async def _store_piece(self, source: Store, where: int, start: int, stop: int) -> None:
        """Have bytes [start, stop) of the disk get in the storage what a store has from `where` on."""
        core = self.core
        await self._prepare(start, stop)
        try:
            for run_start, run_stop, to in core.storage.byte_runs(start, stop):
                assert to is not None
                await core.data.copy(source, where + run_start - start, to, run_stop - run_start)
        finally:
            self.data_written(start, stop)

    async def _store_zeros(self, start: int, stop: int) -> None:
        """Have bytes [start, stop) read as zeros, and store nothing for what does so already."""
        core = self.core
        if core.zeroes is Zeroes.PUNCH:
            await self._punch(start, stop)
            return
        await self._prepare_zeros(start, stop)
        try:
            for where, length in await self._places(start, stop):
                at, end = where, where + length
                while (at := await next_data(core.data, at, end)) < end:
                    size = min(end - at, ZERO_STEP)
                    await core.data.pwrite(bytes(size), at)
                    at += size
        finally:
            self.data_written(start, stop)

    async def _punch(self, start: int, stop: int, *, writes: bool = True) -> None:
        """Have bytes [start, stop) read as zeros, and give their space back; `writes` as for `Store.zero`."""
        core = self.core
        await self._prepare_zeros(start, stop)
        try:
            for where, length in await self._places(start, stop):
                await core.data.zero(where, length, writes=writes)
        finally:
            self.data_written(start, stop)
        if isinstance(core.storage, ChunkedStorage):
            core.storage.zeroed(start, stop)

    async def _prepare_zeros(self, start: int, stop: int) -> None:
        """Blocks of the base's range get a place: their bits are going to say that they have one."""
        base_size = self.core.geometry.base_size
        if start < base_size:
            await self._prepare(start, min(stop, base_size))

    async def _places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where bytes [start, stop) have a place in the storage: (offset, length), in its order, adjacent ones joined.

        A whole disk in a million chunks may be one.
        """
        found = []
        for number, (run_start, run_stop, where) in enumerate(self.core.storage.byte_runs(start, stop)):
            if where is not None:
                found.append((where, where + run_stop - run_start))
            if number % PIECES_PER_TURN == PIECES_PER_TURN - 1:
                await trio.lowlevel.checkpoint()
        return [(begin, end - begin) for begin, end in merge(found)]

    async def _prepare(self, start: int, stop: int) -> None:
        core = self.core
        if core.committer.unseen_writes or core.storage.prepare_nowait(start, stop):
            return  # the first: the data file ends where the kernel has it end
        if core.table is not None:
            # Whoever opens the image after a crash has to see that there may be data without an entry.
            await core.committer.mark_unclean()
        if core.table is not None and core.data.fixed_size:
            async with self._allocating:
                await self._keep_in_window(start, stop)
                self._unsure_chunks += await self._allocate(start, stop)
        else:
            await self._allocate(start, stop)

    async def _allocate(self, start: int, stop: int) -> int:
        chunks = await self.core.storage.prepare(start, stop)
        if chunks:
            self.core.committer.chunks_allocated(chunks)
        return len(chunks)

    async def _keep_in_window(self, start: int, stop: int) -> None:
        """Commit before more chunks would be without a stable entry than are looked at after a crash."""
        core = self.core
        assert isinstance(core.storage, ChunkedStorage)
        chunk_size = core.header.chunk_size
        need = (stop - 1) // chunk_size - start // chunk_size + 1
        if self._unsure_chunks and self._unsure_chunks + need > core.storage.window:
            await core.committer.commit()
            self._unsure_chunks = 0
