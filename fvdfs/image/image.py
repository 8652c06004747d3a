"""One open image: a disk of bytes that can be read, written, flushed and resized.

Reads need no lock: each is planned by the bitmap as it is when it begins. What is read from the base
may be kept (copy-on-read; `cow/fetching.py`): a copy sets bits as a write does, under the same locks,
but tells the committer nothing, since a bit that is lost costs nothing. A write whose blocks are
all local goes straight to the storage. A write that touches a block which is not local holds these
blocks (`cow/locks.py`), completes the first and the last from the base where it covers them only in
part, stores all in one piece, and then, without a checkpoint between, sets the bits and tells the
committer. Nothing here waits for a flush but `flush` itself (and whoever calls it): what makes a
write durable, and in which order, is `commit.py`.

Nothing here knows about FUSE. Errors of the storage are OSError.
"""

from __future__ import annotations

import enum
import errno
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import trio

from fvdfs.alloc.chunked import ChunkedStorage, Spawn
from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.table import Table
from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.fetching import Fetcher
from fvdfs.cow.locks import RangeLock
from fvdfs.cow.planner import Geometry, WritePlan, plan_write, read_runs, zero_runs
from fvdfs.cow.recorder import Recorder
from fvdfs.cow.writethrough import MODES, BaseWriter, WriteBack, WriteThrough
from fvdfs.errors import ReadOnlyImage
from fvdfs.format.header import MAX_DISK_SIZE, PAGE, PROFILE_ENTRY, SECTOR, Header, ceil_div, round_up, with_fields
from fvdfs.format.profile import Extent, decode, encode
from fvdfs.image.commit import Committer
from fvdfs.store.base import Buffer, Done, Store, together
from fvdfs.store.host import HostFile

log = logging.getLogger(__name__)

Storage = FlatStorage | ChunkedStorage


ONE_READ = 64 << 10  # bytes; a shorter write between two parts of the base has both read in one piece


class Zeroes(enum.Enum):
    """What becomes of zeros that a guest writes."""

    OFF = "off"
    """They are data like any other."""
    ON = "on"
    """They are not stored where zeros are read already."""
    PUNCH = "punch"
    """Their space is given back, too."""


class _Reader(Protocol):
    async def pread(self, view: memoryview, offset: int, /) -> int: ...

    def pread_soon(self, view: memoryview, offset: int, done: Done, /) -> bool: ...


class _QuickReader(_Reader, Protocol):
    def pread_nowait(self, view: memoryview, offset: int, /) -> bool: ...


_Todo = list[tuple[_Reader, memoryview, int]]


class _OwnData:
    """The storage of an image: where it ends before something that it holds, it was cut, and that is an error."""

    def __init__(self, data: Store, storage: Storage, committer: Committer) -> None:
        self._data = data
        self._storage = storage
        self._committer = committer

    async def pread(self, view: memoryview, offset: int) -> int:
        end = offset + len(view)
        for _ in range(2):  # once more, since the first may have met a change of the size
            count = await self._data.pread(view, offset)
            if count == len(view) or not self._storage.holds(end):
                return count
        why = f"{self._data.name} ends before byte {end}, up to which it holds data: it was cut"
        self._committer.fail(why)
        raise OSError(errno.EIO, why)

    def pread_soon(self, view: memoryview, offset: int, done: Done) -> bool:
        return self._data.pread_soon(view, offset, done)


class PendingRead:
    """The part of a read that has to wait. Whoever gets one has to see it to its end."""

    def __init__(self, todo: _Todo, pending: set[PendingRead]) -> None:
        """Until its end it is one of those `pending`."""
        self._todo = todo
        self._pending = pending
        self._ended: trio.Event | None = None
        pending.add(self)

    def soon(self, done: Done) -> bool:
        """Do it without a task, where one call to a store is all that there is to do.

        `done` is called later, and told whether all went well. Where it did not, and where this says False,
        `finish` has to be awaited.
        """
        if len(self._todo) != 1:
            return False
        reader, view, offset = self._todo[0]

        def ended(whole: bool) -> None:
            if whole:
                self._end()
            done(whole)

        return reader.pread_soon(view, offset, ended)

    async def finish(self) -> None:
        """Fill what is missing. Raises OSError."""
        try:
            await together([functools.partial(_fill, *read) for read in self._todo])
        finally:
            self._end()

    def _end(self) -> None:
        self._pending.remove(self)
        if self._ended is not None:
            self._ended.set()

    async def wait(self) -> None:
        """Wait for its end."""
        if self._ended is None:
            self._ended = trio.Event()
        await self._ended.wait()


class Image:
    """An open image; `chain.py` makes them. Offsets and lengths are bytes of the virtual disk."""

    def __init__(
        self,
        *,
        name: str,
        committer: Committer,
        meta: Store,
        data: Store,
        base: Image | Store | None,
        storage: Storage,
        bitmap: Bitmap | None,
        table: Table | None,
    ) -> None:
        self.name = name
        self.base = base
        self.meta = meta
        self.data = data
        self.bitmap = bitmap
        self.table = table
        self.storage = storage
        self.committer = committer
        self._own = _OwnData(data, storage, committer)
        self.writable = False
        self.zeroes = Zeroes.OFF
        self.base_may_be_written = False
        self.base_writer: BaseWriter | None = None
        self.fetcher: Fetcher | None = None
        """Reads the base for copy-on-read and prefetching; None where there is neither."""
        self.recorder: Recorder | None = None
        """Takes down what is read first, for a profile."""
        self._spawn: Spawn | None = None
        header = committer.header
        self.size = header.virtual_disk_size
        self.end = self.size
        """Where the disk ends for who has it open: where a write past its end has ended, within the last sector."""
        self._geometry = Geometry(header.block_size, header.base_size)
        self._locks = RangeLock()
        self._pending_reads: set[PendingRead] = set()
        self._writers = 0
        self._quiet: trio.Event | None = None  # set when no write is under way; while it exists, none begins
        self._quiet_over = trio.Event()
        self._resizing = trio.Lock()
        self._allocating = trio.Lock()
        self._unsure_chunks = 0
        """Chunks of a device that were allocated since the last commit, at the most."""
        self._journal_cleared = False
        """Whether it holds no records from before this opening."""

    def run_in_background(self, spawn: Spawn | None) -> None:
        """What is better done before it is needed, or later, may be run by `spawn`."""
        self._spawn = spawn
        if isinstance(self.storage, ChunkedStorage):
            self.storage.spawn = spawn

    @property
    def damage(self) -> str:
        """Why it can only be read, as far as that goes; empty where nothing is known to be wrong."""
        if self.table is not None and self.table.damaged:
            return self.table.damage
        return self.committer.failed or ""

    @property
    def in_use(self) -> bool:
        """Whether requests are under way."""
        return bool(self._pending_reads) or self._writers > 0

    @property
    def needs_share(self) -> bool:
        """Whether something that it stands on may not answer for ever, unlike a disk of this host."""
        image: Image | Store | None = self
        while isinstance(image, Image):
            if _may_hang(image.meta) or _may_hang(image.data):
                return True
            image = image.base
        return image is not None and _may_hang(image)

    @property
    def header(self) -> Header:
        """The header as it is on disk."""
        return self.committer.header

    # --- reading --------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """The bytes from `offset` on, fewer than `length` only at the end of the disk. Raises OSError."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        _, rest = self.begin_read(offset, memoryview(buffer))
        if rest is not None:
            await rest.finish()
        return buffer

    def begin_read(self, offset: int, view: memoryview) -> tuple[int, PendingRead | None]:
        """Fill the buffer with the bytes from `offset` on, as far as that needs no waiting.

        Says how many bytes it will hold, fewer than it could only at the end of the disk, and what is still to be
        done. Raises OSError.
        """
        stop = min(offset + len(view), self.end)
        if offset >= stop:
            return 0, None
        if self.recorder is not None:
            self.recorder.touched(offset, stop, written=False)
        todo: _Todo = []
        self._read(offset, stop, view[: stop - offset], todo)
        return stop - offset, PendingRead(todo, self._pending_reads) if todo else None

    def _read(self, start: int, stop: int, view: memoryview, todo: _Todo) -> None:
        """Fill `view` with bytes [start, stop); what would wait goes to `todo`.

        Goes down the chain of base images without recursion: a chain may be of any depth.
        """
        layers: list[tuple[Image, int, int, int]] = [(self, start, stop, 0)]
        while layers:
            image, begin, end, at = layers.pop()
            for run_start, run_stop, local in image._read_runs(begin, end):
                if local:
                    for piece_start, piece_stop, where in image.storage.runs(run_start, run_stop):
                        to = at + piece_start - begin
                        piece = view[to : to + piece_stop - piece_start]
                        if where is None:
                            _zero(piece)
                        elif not image.data.pread_nowait(piece, where):
                            todo.append((image._own, piece, where))
                    continue
                to = at + run_start - begin
                run = view[to : to + run_stop - run_start]
                base = image.base
                if image is self and self.fetcher is not None:
                    _try(self.fetcher, run, run_start, todo)
                elif isinstance(base, Image):
                    length = min(len(run), max(0, base.size - run_start))
                    if length:
                        layers.append((base, run_start, run_start + length, to))
                    _zero(run[length:])
                else:
                    assert base is not None
                    _try(base, run, run_start, todo)

    def _read_runs(self, start: int, stop: int) -> Sequence[tuple[int, int, bool]]:
        bitmap = self.bitmap
        geometry = self._geometry
        if bitmap is None or start >= geometry.base_size:
            return ((start, stop, True),)
        first, end = geometry.blocks(start, stop)
        if bitmap.all_local(first, end):
            return ((start, stop, True),)
        if stop <= geometry.base_size and bitmap.none_local(first, end):
            return ((start, stop, False),)
        return tuple(read_runs(geometry, bitmap, start, stop))

    # --- writing --------------------------------------------------------------------------------

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; a disk that ends before is grown where the format can.

        Raises OSError: EROFS where the image is not open for writing, EFBIG where it cannot grow,
        ENOSPC where the storage cannot; then nothing but parts of the range itself has changed.
        """
        if not self.writable:
            raise OSError(errno.EROFS, f"{self.name}: not open for writing")
        if self.committer.failed is not None:
            raise OSError(errno.EIO, f"{self.name}: read-only since an earlier error: {self.committer.failed}")
        stop = offset + len(data)
        if offset == stop:
            return
        while stop > self.size or self._quiet is not None:
            if self._quiet is not None:
                await self._quiet_over.wait()
            else:
                await self._reach(stop)
        if self.recorder is not None:
            self.recorder.touched(offset, stop, written=True)
        try:
            with self._writing():
                await self._write(offset, stop, data)
        except BaseException:
            if stop > self.end:
                self.end = self.size  # it has grown
            raise
        self.end = max(self.end, stop)
        if self.committer.overfull:
            await self.committer.commit()

    def write_soon(self, offset: int, data: memoryview, done: Done) -> bool:
        """Write without a task, where one call to the storage is all that it takes.

        `done` is called later, and told whether all went well. Where it did not, and where this says False,
        `write` has to be awaited.
        """
        stop = offset + len(data)
        if (
            not self.writable
            or not data
            or stop > self.size
            or self._quiet is not None
            or self.zeroes is not Zeroes.OFF
            or self.base_writer is not None
            or self.committer.failed is not None
            or self.committer.overfull
            or not self.storage.prepare_nowait(offset, stop)
        ):
            return False
        where = self.storage.place(offset, stop)
        if where is None:
            return False
        bitmap, first, end, claim = self.bitmap, 0, 0, None
        if bitmap is not None and offset < self._geometry.base_size:
            first, end = self._geometry.blocks(offset, stop)
            if not bitmap.all_local(first, end):
                plan = plan_write(self._geometry, bitmap, offset, stop)
                if plan.head or plan.tail:
                    return False
                claim = self._locks.hold_nowait(first, end)
                if claim is None:
                    return False

        def ended(whole: bool) -> None:
            self.committer.data_written()
            if whole and bitmap is not None and first < end:
                if claim is not None:
                    bitmap.set_local(first, end)
                if not bitmap.all_committed(first, end):
                    self.committer.blocks_stored(first, end)
            if claim is not None:
                self._locks.release(claim)
            self._end_writing()
            done(whole)

        if not self.data.pwrite_soon(data, where, ended):
            if claim is not None:
                self._locks.release(claim)
            return False
        self._writers += 1
        if stop > self.end:
            self.end = stop
        if self.recorder is not None:
            self.recorder.touched(offset, stop, written=True)
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Who changes the storage or the bitmap; a shrink waits for all of them."""
        self._writers += 1
        try:
            yield
        finally:
            self._end_writing()

    def _end_writing(self) -> None:
        self._writers -= 1
        if self._quiet is not None and not self._writers:
            self._quiet.set()

    async def _write(self, start: int, stop: int, data: Buffer) -> None:
        bitmap = self.bitmap
        if bitmap is None or start >= self._geometry.base_size:
            await self._store(start, stop, data)
            return
        first, end = self._geometry.blocks(start, stop)
        if bitmap.all_local(first, end) and self.base_writer is None:
            await self._store(start, stop, data)
            if not bitmap.all_committed(first, end):
                self.committer.blocks_stored(first, end)
            return
        async with self._locks.hold(first, end):
            plan = plan_write(self._geometry, bitmap, start, stop)
            whole = await self._complete(plan, data) if plan.head or plan.tail else data
            await self._store(plan.start, plan.stop, whole)
            bitmap.set_local(plan.first, plan.end)
            if not bitmap.all_committed(first, end):
                self.committer.blocks_stored(plan.first, plan.end)
            if self.base_writer is not None:
                shared = memoryview(data)[: self._geometry.base_size - start]
                await self.base_writer.wrote(first, end, start, shared)

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
        if self.read_base_nowait(view, start):
            return buffer
        if self.fetcher is not None:
            await self.fetcher.read_for_write(view, start)
        else:
            await self.read_base(view, start)
        return buffer

    def read_base_nowait(self, view: memoryview, start: int) -> bool:
        """Fill the buffer with the base's bytes from `start` on, if that needs no waiting; else say False."""
        return self.base is not None and not isinstance(self.base, Image) and self.base.pread_nowait(view, start)

    async def read_base(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the base's bytes from `start` on, and zeros where it has none. Raises OSError."""
        base = self.base
        assert base is not None
        if isinstance(base, Image):
            data = await base.read(start, len(view))
            view[: len(data)] = data
            view[len(data) :] = bytes(len(view) - len(data))
        else:
            await _fill(base, view, start)

    async def _store(self, start: int, stop: int, data: Buffer, *, skip_zeros: bool = False) -> None:
        """Put bytes [start, stop) of the disk into the storage, and tell the committer of it."""
        view = memoryview(data)
        if self.zeroes is Zeroes.OFF and not skip_zeros:
            await self._store_data(start, stop, view)
            return
        for piece_start, piece_stop, zeros in zero_runs(start, view):
            if zeros:
                await self._store_zeros(piece_start, piece_stop)
            else:
                await self._store_data(piece_start, piece_stop, view[piece_start - start : piece_stop - start])

    async def _store_data(self, start: int, stop: int, view: memoryview) -> None:
        await self._prepare(start, stop)
        try:
            for run_start, run_stop, where in self.storage.runs(start, stop):
                assert where is not None
                await self.data.pwrite(view[run_start - start : run_stop - start], where)
        finally:
            self.committer.data_written()

    async def _store_zeros(self, start: int, stop: int) -> None:
        """Have bytes [start, stop) read as zeros, and store nothing for what does so already.

        A block of the base's range gets a place all the same: its bit is going to say that it has one.
        """
        if start < self._geometry.base_size:
            await self._prepare(start, stop)
        try:
            for run_start, run_stop, where in self.storage.runs(start, stop):
                if where is None:
                    continue
                if self.zeroes is Zeroes.PUNCH:
                    await self.data.zero(where, run_stop - run_start)
                    continue
                end = where + run_stop - run_start
                data = await self.data.next_data(where, end)
                if data < end:
                    await self.data.pwrite(bytes(end - data), data)
        finally:
            self.committer.data_written()

    # --- copies from the base ---------------------------------------------------------------------

    def base_range(self) -> tuple[int, int]:
        """The block size and the size of the base's range, bytes."""
        return self._geometry.block_size, self._geometry.base_size

    @property
    def base_server(self) -> str:
        """What the lowest base of the chain shares its throughput with."""
        base: Image | Store | None = self.base
        while isinstance(base, Image):
            base = base.base if base.base is not None else base.data
        assert base is not None
        return base.server

    @property
    def is_remote(self) -> bool:
        """Whether a read may have to ask another machine, as things are."""
        layer: Image | Store | None = self
        while isinstance(layer, Image):
            if layer.data.is_remote:
                return True
            if layer.bitmap is None or layer.bitmap.next_missing(0) is None:
                return False
            layer = layer.base
        return layer is not None and layer.is_remote

    def missing(self, start: int, length: int) -> tuple[int, int]:
        """The first bytes [start, stop), whole blocks and at most about `length`, that are only in the base.

        Looks from byte `start` on; an empty range at the end of the base's range where nothing is missing.
        """
        block_size, base_size = self.base_range()
        bitmap = self.bitmap
        if bitmap is None or start >= base_size:
            return base_size, base_size
        first = bitmap.next_missing(start // block_size)
        if first is None:
            return base_size, base_size
        end = bitmap.next_local(first, first + max(1, length // block_size))
        return first * block_size, min(end * block_size, base_size)

    async def store_copy(self, start: int, data: memoryview) -> int:
        """Store bytes of the base, from `start` on: whole blocks that are missing and that nobody has claimed.

        The number of bytes stored. Raises OSError.
        """
        bitmap = self.bitmap
        if bitmap is None or self._quiet is not None or self.committer.failed is not None or not self.writable:
            return 0
        block_size, base_size = self.base_range()
        stop = min(start + len(data), base_size)
        block = ceil_div(start, block_size)
        end = bitmap.blocks if stop == base_size else stop // block_size
        stored = 0
        with self._writing():
            while block < end:
                if bitmap.is_local(block):
                    block = bitmap.next_missing(block) or end
                    continue
                free = self._locks.free_until(block, end)
                if free == block:
                    block += 1
                    continue
                piece_end = bitmap.next_local(block, free)
                async with self._locks.hold(block, piece_end):
                    piece_start, piece_stop = block * block_size, min(piece_end * block_size, base_size)
                    piece = data[piece_start - start : piece_stop - start]
                    await self._store(piece_start, piece_stop, piece, skip_zeros=True)
                    bitmap.set_local(block, piece_end)
                stored += piece_stop - piece_start
                block = piece_end
        return stored

    async def write_out(self, start: int, stop: int) -> None:
        """Have stored bytes leave memory for the disk, where that is possible; promises nothing."""
        for run_start, run_stop, where in self.storage.runs(start, min(stop, self.size)):
            if where is not None:
                await self.data.write_out(where, run_stop - run_start)

    def start_fetching(self, *, copy_on_read: bool) -> Fetcher | None:
        """Read the base by a fetcher from now on; None where the image has no base, or cannot be written."""
        if self.bitmap is None or not self.writable or self._spawn is None:
            return None
        if self.fetcher is None:
            limit = max(0, self.header.max_outstanding_copy_on_read_data)
            self.fetcher = Fetcher(self, self._spawn, copy_on_read=False, max_outstanding=limit)
        self.fetcher.copy_on_read |= copy_on_read
        return self.fetcher

    async def finish(self) -> bool:
        """Where nothing is missing any more: make that durable, and let go of the base; whether it is so.

        Raises OSError.
        """
        bitmap = self.bitmap
        if bitmap is None or not self.writable or self.base_writer is not None or self.committer.failed is not None:
            return False
        async with self._resizing:
            if not bitmap.all_local(0, bitmap.blocks):
                return False
            await self.committer.release_base()
            for read in tuple(self._pending_reads):  # later ones find all blocks local
                if read in self._pending_reads:
                    await read.wait()
            if self.fetcher is not None:
                await self.fetcher.close()
            base, self.base, self.bitmap, self.fetcher = self.base, None, None, None
            self._geometry = Geometry(0, 0)
        await _close_chain(base)
        return True

    async def extents(self, start: int, stop: int) -> list[tuple[int, int, str]]:
        """Bytes [start, stop) of the disk as runs (start, stop, "local", "base" or "hole"). Raises OSError."""
        found = []
        for run_start, run_stop, local in self._read_runs(start, stop):
            if not local:
                found.append((run_start, run_stop, "base"))
                continue
            for piece_start, piece_stop, where in self.storage.runs(run_start, run_stop):
                end = piece_stop - piece_start + (where or 0)
                hole = where is None or await self.data.next_data(where, end) == end
                found.append((piece_start, piece_stop, "hole" if hole else "local"))
        return found

    async def next_data(self, start: int, stop: int) -> int:
        """The first byte of [start, stop) of the disk that may be no zero, as `Store.next_data`. Raises OSError."""
        known: dict[Store, tuple[int, int]] = {}  # from where to where a store holds nothing

        async def skip(store: Store, begin: int, at: int) -> int:
            """How many bytes from `begin` on, byte `at` of the disk, are nowhere."""
            first, data = known.get(store, (0, -1))
            if not first <= begin <= data:
                data = await store.next_data(begin, begin + stop - at)
                known[store] = (begin, data)
            return data - begin

        layers = [self._layer_runs(start, stop)]
        while layers:
            run = next(layers[-1], None)
            if run is None:
                layers.pop()
                continue
            image, begin, end, local = run
            base = image.base
            if local:
                for piece_start, piece_stop, where in image.storage.runs(begin, end):
                    if where is not None:
                        data = piece_start + await skip(image.data, where, piece_start)
                        if data < piece_stop:
                            return data
            elif isinstance(base, Image):
                if begin < base.size:
                    layers.append(base._layer_runs(begin, min(end, base.size)))
            else:
                data = begin if base is None else begin + await skip(base, begin, begin)
                if data < end:
                    return data
        return stop

    def _layer_runs(self, start: int, stop: int) -> Iterator[tuple[Image, int, int, bool]]:
        bitmap = self.bitmap
        runs = read_runs(self._geometry, bitmap, start, stop) if bitmap is not None else ((start, stop, True),)
        for run_start, run_stop, local in runs:
            yield self, run_start, run_stop, local

    # --- profiles -----------------------------------------------------------------------------------

    async def read_profile(self) -> list[Extent]:
        """The extents to be fetched first; none where there is no usable profile. Raises OSError."""
        region = self.header.profile_region
        if region is None:
            if self.header.prefetch_profile_entries:
                log.warning("%s: its prefetch profile makes no sense and is not used", self.name)
            return []
        data = bytearray(region.size)
        await _fill(self.meta, memoryview(data), region.offset)
        return decode(bytes(data), self.header.prefetch_profile_entries, self.header.unit_of_PrefetchProfileEntry_len)

    def record_profile(self) -> bool:
        """Take down from now on what is read first; False where the image has no room for a profile, or no base."""
        room = self.header.profile_room.size // PROFILE_ENTRY.size
        if self.bitmap is None or not self.writable or not room:
            return False
        self.recorder = Recorder(self._geometry.base_size, room)
        return True

    async def _write_profile(self) -> None:
        if self.recorder is None or not self.recorder.extents or self.committer.failed is not None:
            return
        data, entries = encode(self.recorder.extents, PAGE, self.header.profile_room.size)
        try:
            await self.committer.write_profile(data, entries, PAGE)
        except OSError as error:
            log.error("%s: the prefetch profile could not be kept: %s", self.name, error)

    async def _prepare(self, start: int, stop: int) -> None:
        if self.storage.prepare_nowait(start, stop):
            return
        if self.table is not None:
            # Whoever opens the image after a crash has to see that there may be data without an entry.
            await self.committer.mark_unclean()
        if self.table is not None and self.data.fixed_size:
            async with self._allocating:
                await self._keep_in_window(start, stop)
                self._unsure_chunks += await self._allocate(start, stop)
        else:
            await self._allocate(start, stop)

    async def _allocate(self, start: int, stop: int) -> int:
        chunks = await self.storage.prepare(start, stop)
        if chunks:
            self.committer.chunks_allocated(chunks)
        return len(chunks)

    async def _keep_in_window(self, start: int, stop: int) -> None:
        """Commit before more chunks would be without a stable entry than are looked at after a crash."""
        assert isinstance(self.storage, ChunkedStorage)
        chunk_size = self.header.chunk_size
        need = (stop - 1) // chunk_size - start // chunk_size + 1
        if self._unsure_chunks and self._unsure_chunks + need > self.storage.window:
            await self.committer.commit()
            self._unsure_chunks = 0

    # --- durability, size, end ------------------------------------------------------------------

    def flush_soon(self, done: Done) -> bool:
        """`flush` without a task, where that can be; as `Committer.commit_soon`."""
        return self.base_writer is None and self.committer.commit_soon(done)

    async def flush(self) -> None:
        """When this returns, every write that was answered before survives a power cut. Raises OSError."""
        if not self.writable:
            return
        if self.base_writer is not None:
            await self.base_writer.flush()
        if self.committer.dirty or self.committer.failed is not None:
            await self.committer.commit()

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Make the disk this long, rounded up to a sector; the new part reads as zeros.

        Raises OSError: EPERM for a smaller size without `shrink`, EFBIG where the table has no room
        for more chunks, EROFS where the image is not open for writing.
        """
        if not self.writable:
            raise OSError(errno.EROFS, f"{self.name}: not open for writing")
        size = round_up(size, SECTOR)
        async with self._resizing:
            if size > self.size:
                await self._grow(size)
            elif size < self.size:
                if not shrink:
                    raise OSError(errno.EPERM, f"{self.name}: the disk can be cut only where -o shrink is given")
                await self._shrink(size)
            self.end = self.size

    async def _reach(self, stop: int) -> None:
        """Grow the disk so that it holds bytes up to `stop`, unless somebody has done it meanwhile."""
        async with self._resizing:
            if stop > self.size:
                await self._grow(round_up(stop, SECTOR))

    async def _grow(self, size: int) -> None:
        header = self.header
        if size > MAX_DISK_SIZE:
            raise OSError(errno.EFBIG, f"{self.name}: a disk has at most {MAX_DISK_SIZE} bytes")
        if header.compact and ceil_div(size, header.chunk_size) > header.table_capacity:
            limit = header.table_capacity * header.chunk_size
            raise OSError(
                errno.EFBIG,
                f"{self.name}: the chunk table has room for a disk of {limit} bytes; "
                "create a larger image and copy into it",
            )
        try:
            await self._grow_to(size)
        except BaseException:
            self.storage.grow_failed(self.size)
            raise
        self.size = size

    async def _grow_to(self, size: int) -> None:
        await self.storage.grow(size)
        # What is new is zeros on disk, and bits and entries from before an earlier cut are gone, before they count.
        if self.bitmap is not None:
            self.bitmap.shrink(self.bitmap.blocks)
        self.committer.data_written()
        await self.committer.checkpoint()
        if not self._journal_cleared:  # the original cuts a disk and leaves records of what was cut off
            await self.committer.clear_journal()
            self._journal_cleared = True
        await self._cut_base_range(self.header.virtual_disk_size)
        await self.committer.change_header(virtual_disk_size=size)

    async def _shrink(self, size: int) -> None:
        self._quiet = trio.Event()
        try:
            if self._writers:
                await self._quiet.wait()
            with trio.CancelScope(shield=True):  # half of it would be a disk whose end has become zeros
                await self._shrink_to(size)
        finally:
            self._quiet = None
            self._quiet_over.set()
            self._quiet_over = trio.Event()

    async def _shrink_to(self, size: int) -> None:
        await self._checkpoint_unclean()
        # From here on bits and entries go backwards: old records must not come back.
        await self.committer.clear_journal()
        self._journal_cleared = True
        header = self.header
        await self._shrink_header(size)
        self.size = size
        self._geometry = Geometry(header.block_size, self.header.base_size)
        if self.bitmap is not None:
            self.bitmap.shrink(self.header.blocks)
        await self.storage.shrink(size)
        await self.committer.checkpoint()
        for read in tuple(self._pending_reads):  # of what was cut off, perhaps, whose place may soon be another's
            if read in self._pending_reads:
                await read.wait()
        await self.storage.give_back()
        self.committer.data_written()

    async def _shrink_header(self, size: int) -> None:
        """Cut the base's range, then the disk: the fields are in different sectors, and no later growth must find
        the first past the second. Raises OSError; the header is then as it was, or the image has failed.
        """
        header = self.header
        await self._cut_base_range(size)
        try:
            await self.committer.change_header(virtual_disk_size=size)
        except OSError:
            if self.header.base_img_size != header.base_img_size and self.committer.failed is None:
                await self.committer.restore_header(base_img_size=header.base_img_size, bitmap_size=header.bitmap_size)
            raise

    async def _cut_base_range(self, size: int) -> None:
        """Have the base provide nothing past this byte, whatever becomes of the disk's size. Raises OSError."""
        header = self.header
        if header.base_img_size > size:
            region = with_fields(header, base_img_size=size).bitmap_region
            bitmap_size = region.size if region is not None else header.bitmap_size
            await self.committer.change_header(base_img_size=size, bitmap_size=bitmap_size)

    async def _checkpoint_unclean(self) -> None:
        """Bitmap and table on disk are as in memory, and the header says that they may change."""
        if self.header.clean and self.header.has_metadata:
            await self.committer.change_header(clean_shutdown=0)
        await self.committer.checkpoint()

    async def begin_writing(self, *, accept_unclean: bool = False) -> None:
        """Permit writes from now on; the caller holds the locks on the files.

        What a replay rebuilt in memory becomes stable first, before the journal is used again
        (format.md, "Beyond the original"). Raises ReadOnlyImage where the state of the image forbids it
        (`accept_unclean` overrides: a crash without a journal), OSError.
        """
        if self.writable:
            return
        header = self.header
        if self.table is not None and self.table.damaged:
            raise ReadOnlyImage(self.name, f"{self.table.damage}: the image can only be read")
        if not header.clean and header.has_metadata and header.journal_region is None and not accept_unclean:
            raise ReadOnlyImage(
                self.name,
                "clean_shutdown=0 and no journal: it was not closed, and its metadata may be incomplete; "
                "it can be read, and written with -o accept_unclean once you have looked at it",
            )
        await self.committer.recover()
        if not header.clean:
            await self.storage.clear_behind()
            self.committer.data_written()
        await self._begin_base_writing(crashed=not header.clean)
        self.writable = True
        if header.copy_on_read:
            self.start_fetching(copy_on_read=True)

    async def stop_writing(self) -> None:
        """Undo `begin_writing`: make all stable, leave clean headers, and be read from then on. Nobody may write now.

        Raises OSError; the image has failed, or can be tried again.
        """
        fetcher, self.fetcher = self.fetcher, None
        if fetcher is not None:
            await fetcher.close()
        if self.base_writer is not None:
            await self.base_writer.close()
            self.base_writer = None
        await self._write_profile()
        await self.committer.close()
        self.writable = False

    async def _begin_base_writing(self, *, crashed: bool) -> None:
        """Have writes reach the base as well, where the image asks for it and the mount allows it."""
        mode = self.header.write_updates_base_img
        if not self.base_may_be_written or self.bitmap is None or mode not in MODES:
            return
        base = self.base
        assert base is not None
        assert not isinstance(base, Image)
        if mode == "writethrough":
            self.base_writer = WriteThrough(base)
            return
        writer = WriteBack(base, self.bitmap.blocks, self.header.block_size, self._write_back, self.name)
        if crashed:
            for first, end, local in self.bitmap.runs(0, self.bitmap.blocks):
                if local:
                    writer.owe(first, end)
        await self.committer.change_header(clean_shutdown=0)
        if self._spawn is not None:
            self._spawn(writer.run)
        self.base_writer = writer

    async def _write_back(self, first: int, end: int) -> None:
        """Copy local blocks to the base. Raises OSError."""
        assert isinstance(self.base_writer, WriteBack)
        assert self.base is not None
        assert not isinstance(self.base, Image)
        async with self._locks.hold(first, end):
            start = first * self._geometry.block_size
            stop = min(end * self._geometry.block_size, self._geometry.base_size)
            if start < stop:  # else: cut off since it was written
                await self.base.pwrite(await self.read(start, stop - start), start)
            self.base_writer.copied(first, end)

    def usage(self) -> int:
        """Bytes that the image takes, metadata and data."""
        return usage_of(self.header, self.meta, self.data, self._allocated_chunks)

    def _allocated_chunks(self) -> int:
        return self.table.allocated() if self.table is not None else 0

    async def close(self) -> None:
        """Commit everything, leave clean headers, and give up all files. Raises OSError of the commit."""
        with trio.CancelScope(shield=True):
            try:
                await self.end_writing()
            finally:
                await _close_chain(self)

    async def end_writing(self) -> None:
        """Commit everything, and leave clean headers; nothing is written again. Raises OSError of the commit."""
        with trio.CancelScope(shield=True):
            try:
                if self.fetcher is not None:
                    await self.fetcher.close()
                    await self.finish()
                await self.storage.stop_growing()
                if self.writable and self.committer.failed is None:
                    await self.stop_writing()
            finally:
                self.writable = False


def _may_hang(store: Store) -> bool:
    return not isinstance(store, HostFile) or store.may_hang


async def _close_chain(image: Image | Store | None) -> None:
    while isinstance(image, Image):
        await image.meta.aclose()
        if image.data is not image.meta:
            await image.data.aclose()
        image = image.base
    if image is not None:
        await image.aclose()


def _try(store: _QuickReader, view: memoryview, offset: int, todo: _Todo) -> None:
    if not store.pread_nowait(view, offset):
        todo.append((store, view, offset))


async def _fill(store: _Reader, view: memoryview, offset: int) -> None:
    """Read what the store has; past its end are zeros (format.md, "Bitmap" and "Storage without a table")."""
    _zero(view[await store.pread(view, offset) :])


def _zero(view: memoryview) -> None:
    if view:
        view[:] = bytes(len(view))


def usage_of(header: Header, meta: Store, data: Store, allocated_chunks: Callable[[], int]) -> int:
    """Bytes that an image takes, metadata and data.

    What the host says of its files; of a device, which says nothing, what the image has in use, for which a compact
    image has to count its `allocated_chunks`.
    """
    if not data.fixed_size:
        return meta.usage() + (data.usage() if data is not meta else 0)
    used = allocated_chunks() * header.chunk_size if header.compact else header.virtual_disk_size
    return used + (header.metadata_size if data is meta else meta.usage())
