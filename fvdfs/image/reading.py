"""Reads of an open image.

They need no lock: each is planned by the bitmap as it is when it begins, and what needs no waiting is read in the same
moment. The rest is a `PendingRead`. What is read from the base may be kept (copy-on-read; `cow.fetching`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from fvdfs.image.core import Core
from fvdfs.store.base import Buffer, Done, HasExtents, Store, next_data, together

_ZEROS = bytes(1 << 20)


class _Source(Protocol):
    """What bytes are read from: a store, the storage of an image, the fetcher."""

    def start_pread(self, view: memoryview, offset: int, done: Done, /) -> bool: ...

    async def pread(self, view: memoryview, offset: int, /) -> int: ...


class _QuickSource(_Source, Protocol):
    def pread_nowait(self, view: memoryview, offset: int, /) -> bool: ...


class Readable(HasExtents, Protocol):
    """A disk, or what else is read by offset and length."""

    async def read(self, offset: int, length: int, /) -> Buffer:
        """The bytes from `offset` on, fewer only at its end. Raises OSError."""


_Todo = list[tuple[_Source, memoryview, int]]


class PendingRead:
    """A read that has to wait (`store.base.Pending`)."""

    __slots__ = ("_count", "_ended", "_pending", "_todo")

    def __init__(self, count: int, todo: _Todo, pending: set[PendingRead]) -> None:
        """A read of `count` bytes, of which some are still to be read; until its end it is one of those `pending`."""
        self._count = count
        self._todo = todo
        self._pending = pending
        self._ended: trio.Event | None = None
        pending.add(self)

    def start(self, done: Done, /) -> bool:
        """Where one call to a store is all that there is to do."""
        if len(self._todo) != 1:
            return False
        source, view, offset = self._todo[0]

        def ended(result: int) -> None:
            if result >= 0:
                if result < len(view):
                    _zero(view[result:])
                result = self._count
            self.end()
            done(result)

        try:
            return source.start_pread(view, offset, ended)
        except BaseException:
            self.end()
            raise

    async def finish(self) -> int:
        try:
            await _read_all(self._todo)
        finally:
            self.end()
        return self._count

    def end(self) -> None:
        """It is done, or has failed."""
        self._pending.remove(self)
        if self._ended is not None:
            self._ended.set()

    def reads(self, source: _Source) -> bool:
        """Whether it reads this, perhaps beside others."""
        return any(found is source for found, _, _ in self._todo)

    async def wait(self) -> None:
        """Wait for its end."""
        if self._ended is None:
            self._ended = trio.Event()
        await self._ended.wait()


class Reads:
    """The reads of one image."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pending: set[PendingRead] = set()
        self._of_base: set[PendingRead] = set()
        """Reads of the base alone, as writes and copies need them."""

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._pending)

    def begin(self, offset: int, view: memoryview) -> int | PendingRead:
        """`Image.begin_read`."""
        core = self._core
        stop = min(offset + len(view), core.end)
        if offset >= stop:
            return 0
        if core.recorder is not None:
            core.recorder.touched(offset, stop, written=False)
        count = stop - offset
        todo = _read_now(core, offset, view[:count])
        return PendingRead(count, todo, self._pending) if todo else count

    @contextmanager
    def held(self, *sources: _Source) -> Iterator[None]:
        """What `wait` waits for, too: somebody looks at the disk in another way, and reads these."""
        read = PendingRead(0, [(source, memoryview(b""), 0) for source in sources], self._pending)
        try:
            yield
        finally:
            read.end()

    async def wait(self, source: _Source | None = None) -> None:
        """Wait for the end of those that are under way now; with a source, only of those that read it."""
        for read in tuple(self._pending):
            if read in self._pending and (source is None or read.reads(source)):
                await read.wait()

    async def wait_for_base(self) -> None:
        """Wait for the end of all that read the base now."""
        for read in (*self._pending, *self._of_base):
            if read in self._pending or read in self._of_base:
                await read.wait()

    def read_base_nowait(self, view: memoryview, start: int) -> bool:
        """Fill the buffer with the base's bytes from `start` on, if that needs no waiting; else say False."""
        base = self._core.base
        if base is None or isinstance(base, Core) or not base.pread_nowait(view, start):
            return False
        self._core.base_read += len(view)
        return True

    async def read_disk(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the disk's bytes from `start` on. Raises OSError."""
        await _read_all(_read_now(self._core, start, view))

    async def read_base(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the base's bytes from `start` on, and zeros where it has none. Raises OSError."""
        base = self._core.base
        assert base is not None
        self._core.base_read += len(view)
        if isinstance(base, Core):
            read = PendingRead(0, [], self._of_base)
            try:
                await _read_all(_read_now(base, start, _zero_behind(base, start, view)))
            finally:
                read.end()
        else:
            await read_padded(base, view, start)


def _read_now(top: Core, start: int, view: memoryview) -> _Todo:
    """Fill the buffer with the disk's bytes from `start` on, as far as that needs no waiting; the rest.

    Goes down the chain of base images without recursion: a chain may be of any depth.
    """
    todo: _Todo = []
    layers = [(top, start, view)]
    while layers:
        image, begin, part = layers.pop()
        if not part:
            continue
        for run_start, run_stop, local in image.local_runs(begin, begin + len(part)):
            run = part[run_start - begin : run_stop - begin]
            base = image.base
            if local:
                _read_storage(image, run_start, run, todo)
                continue
            if image.fetcher is not None:  # which reads it by `Reads.read_base`
                _try(image.fetcher, run, run_start, todo)
                continue
            image.base_read += len(run)
            if isinstance(base, Core):
                layers.append((base, run_start, _zero_behind(base, run_start, run)))
            else:
                assert base is not None
                _try(base, run, run_start, todo)
    return todo


def _read_storage(image: Core, start: int, view: memoryview, todo: _Todo) -> None:
    for piece_start, piece_stop, where in image.storage.byte_runs(start, start + len(view)):
        piece = view[piece_start - start : piece_stop - start]
        if where is None:
            _zero(piece)
        elif not image.data.pread_nowait(piece, where):
            todo.append((image.own, piece, where))


def _zero_behind(base: Core, start: int, view: memoryview) -> memoryview:
    """The part of the buffer that a base image has bytes for, from `start` on; the rest becomes zeros."""
    length = min(len(view), max(0, base.size - start))
    _zero(view[length:])
    return view[:length]


def _try(source: _QuickSource, view: memoryview, offset: int, todo: _Todo) -> None:
    if not source.pread_nowait(view, offset):
        todo.append((source, view, offset))


async def _read_all(todo: _Todo) -> None:
    if todo:
        await together([functools.partial(read_padded, *read) for read in todo])


async def is_zero(source: Readable, start: int, stop: int) -> bool:
    """Whether bytes [start, stop) read as zeros. Holes are not read. Raises OSError."""
    while (start := await next_data(source, start, stop)) < stop:
        end = min(start + len(_ZEROS), stop)
        if not _ZEROS.startswith(await source.read(start, end - start)):
            return False
        start = end
    return True


async def read_padded(source: _Source | Store, view: memoryview, offset: int) -> None:
    """Read what it has; past its end are zeros (format.md, "Bitmap" and "Storage without a table"). Raises OSError."""
    _zero(view[await source.pread(view, offset) :])


def _zero(view: memoryview) -> None:
    if view:
        view[:] = bytes(len(view))
