"""Reading the base, each byte once: single flight, copy-on-read.

A *fetch* is a piece of the base that is being read, or that was read and is about to be stored. Reads that
need a part of it meanwhile take it from there, so that a block crosses the link to the base once,
however many ask for it. Fetches never overlap.

With copy-on-read a read is rounded out to whole blocks, answered, and stored afterwards. Data that
waits to be stored is bounded (max_outstanding_copy_on_read_data). A read above the bound waits
`PATIENCE` for others to be stored; if that does not help, it is not stored. If the storage is full, it is
not stored either. The base still has it. Prefetching (`prefetch.prefetcher`) fetches in the same way, but
waits until its data is stored.

After a read that has brought nothing but zeros, and its answer, the base is asked whether they are a hole (`extents`).
The rest of it then becomes local at once.

Where the base fails in bytes that only rounding out has added, the read does not fail.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from fvdfs.cow.extents import Extents
from fvdfs.cow.planner import zero_runs
from fvdfs.errors import told
from fvdfs.format.header import ceil_div
from fvdfs.store.base import Done, together

log = logging.getLogger(__name__)

ALIGNED_SIZE = 64 << 10
OVERTAKING = 64 << 10  # bytes of a read that does not wait for a slow fetch: so many cross the link twice
PATIENCE = 0.05  # seconds that a read may wait for room to be copied
STORE_RETRY = 10.0  # seconds without copying after the storage refused a copy


class Observer(Protocol):
    """Is told of the reads of the base that somebody waits for."""

    def foreground_started(self) -> None:
        """Such a read begins."""

    def foreground_finished(self, size: int) -> None:
        """It has ended; `size` bytes were read."""


class Owner(Protocol):
    """What an image does for its fetcher."""

    name: str

    def base_range(self) -> tuple[int, int]:
        """The block size and the size of the base's range, bytes."""

    def read_base_nowait(self, view: memoryview, start: int) -> bool:
        """Fill the buffer from the base if that needs no waiting, else say False."""

    async def read_base(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the base's bytes from `start` on. Raises OSError."""

    def is_missing(self, start: int, stop: int) -> bool:
        """Whether all of these bytes are only in the base."""

    async def read_disk(self, view: memoryview, start: int) -> None:
        """Fill the buffer with the disk's bytes from `start` on, from wherever they are by now. Raises OSError."""

    async def base_extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent` of the base. Raises OSError."""

    async def store_copy(self, start: int, data: memoryview) -> int:
        """Store those whole blocks that are missing and that nobody has claimed; how many bytes. Raises OSError."""

    async def store_hole(self, start: int, stop: int, *, writes: bool) -> tuple[int, int]:
        """`store_copy` of a hole of any length: how far that went, and how many bytes. Raises OSError.

        `writes`: also where zeros have to be written, one step.
        """


def _new_buffer(size: int) -> memoryview:
    """Zeros; a large buffer begins on a page, so that reads past the page cache need not be split.

    The memory of the last one serves for the next: pages that are mapped anew take longer than to copy into them.
    """
    if size < ALIGNED_SIZE:
        return memoryview(bytearray(size))
    memory = bytearray(size + mmap.PAGESIZE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE
    return memoryview(memory)[first : first + size]


class Fetch:
    """Bytes [start, stop) of the base's range, on their way."""

    __slots__ = ("data", "done", "failed", "is_slow", "start", "stop")

    def __init__(self, start: int, stop: int, *, is_slow: bool = False) -> None:
        """`is_slow`: much else may come before it, and who asks for a part of it by himself gets that sooner."""
        self.is_slow = is_slow
        self.start = start
        self.stop = stop
        self.data = _new_buffer(stop - start)
        self.done = trio.Event()
        self.failed = True

    def copy_to(self, view: memoryview, start: int) -> None:
        """Fill the buffer with its bytes from `start` on."""
        view[:] = self.data[start - self.start : start - self.start + len(view)]


class Fetcher:
    """Reads of one image from its base."""

    def __init__(
        self,
        owner: Owner,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        *,
        copy_on_read: bool,
        max_outstanding: int,
    ) -> None:
        """`spawn` runs what is stored after the answer. `max_outstanding`: bytes."""
        self._owner = owner
        self._spawn = spawn
        self._fetches: list[Fetch] = []
        self.copy_on_read = copy_on_read
        self._max_outstanding = max_outstanding
        self._outstanding = 0
        self._stored = trio.Event()
        self._no_copies_before = 0.0
        self._closed = False
        self._idle = trio.Event()
        self.observer: Observer | None = None
        self.extents = Extents(owner.name, owner.base_extent)
        self._following: trio.CancelScope | None = None

    # --- reads that somebody waits for ------------------------------------------------------------

    def pread_nowait(self, view: memoryview, start: int) -> bool:
        """Fill the buffer if that needs no waiting, else say False."""
        stop = start + len(view)
        if self._overlapping(start, stop):
            return False
        if not self._copies:
            return self._owner.read_base_nowait(view, start)
        first, end = self._round_out(start, stop)
        if self._must_wait(end - first):
            return False
        fetch = Fetch(first, end)
        try:
            if not self._owner.read_base_nowait(fetch.data, fetch.start):
                return False
        except OSError:  # perhaps of what was added by rounding out: a read that waits finds out
            return False
        self._fetches.append(fetch)
        fetch.copy_to(view, start)
        self._arrived(fetch, copy=True)
        return True

    def start_pread(self, view: memoryview, start: int, done: Done) -> bool:
        """Never: such a read may have to be observed, shared and copied."""
        return False

    async def pread(self, view: memoryview, start: int) -> int:
        """Fill the buffer with bytes of the base's range. Raises OSError."""
        if not self._owner.is_missing(start, start + len(view)):  # they were copied since somebody looked
            await self._owner.read_disk(view, start)
            return len(view)
        return await self._observed(view, start, self._copies)

    async def read_for_write(self, view: memoryview, start: int) -> None:
        """Fill the buffer for a write that is going to store these bytes itself. Raises OSError."""
        await self._observed(view, start, False)

    async def _observed(self, view: memoryview, start: int, copy: bool) -> int:
        observer = self.observer  # the same one for both calls
        if observer is not None:
            observer.foreground_started()
        try:
            await self._read(view, start, copy)
        finally:
            if observer is not None:
                observer.foreground_finished(len(view))
        return len(view)

    async def _read(self, view: memoryview, start: int, copy: bool) -> None:
        calls: list[Callable[[], Awaitable[None]]] = []
        own: list[Fetch] = []
        try:
            for part_start, part_stop, fetch in self._parts(start, start + len(view)):
                part = view[part_start - start : part_stop - start]
                if fetch is not None:
                    calls.append(functools.partial(self._read_shared, part, part_start, fetch))
                    continue
                # It begins here, before others look: the calls may take their turn later.
                fetch = self._begin(*(self._round_out(part_start, part_stop) if copy else (part_start, part_stop)))
                own.append(fetch)
                calls.append(functools.partial(self._read_own, part, part_start, fetch, copy))
        except BaseException:  # no memory
            for fetch in own:
                self.give_up(fetch)
            raise
        await together(calls)

    async def _read_shared(self, view: memoryview, start: int, fetch: Fetch) -> None:
        """Fill the buffer from a fetch of others."""
        if fetch.is_slow and len(view) <= OVERTAKING and not fetch.done.is_set():
            await self._owner.read_base(view, start)
            return
        await fetch.done.wait()
        if fetch.failed:  # it asked for other bytes as well, or was given up: ours may still come
            await self._owner.read_base(view, start)
        else:
            fetch.copy_to(view, start)

    async def _read_own(self, view: memoryview, start: int, fetch: Fetch, copy: bool) -> None:
        """Fill the buffer from a fetch that nobody fills yet."""
        try:
            await self.fill(fetch)
        except BaseException as error:
            self.give_up(fetch)
            if len(fetch.data) == len(view) or not isinstance(error, OSError):
                raise
        if fetch.failed:  # what was added by rounding out may be what cannot be read
            await self._owner.read_base(view, start)
            return
        fetch.copy_to(view, start)
        if copy:
            try:
                await self._wait_for_room(len(fetch.data))
            except BaseException:
                self._end(fetch)
                raise
        self._arrived(fetch, copy)

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, Fetch | None]]:
        """The range as parts (start, stop, the fetch that has it on its way)."""
        parts: list[tuple[int, int, Fetch | None]] = []
        for fetch in self._overlapping(start, stop):
            if start < fetch.start:
                parts.append((start, fetch.start, None))
            parts.append((max(start, fetch.start), min(stop, fetch.stop), fetch))
            start = fetch.stop
        if start < stop:
            parts.append((start, stop, None))
        return parts

    def _overlapping(self, start: int, stop: int) -> list[Fetch]:
        if not self._fetches:
            return []
        return sorted((f for f in self._fetches if f.start < stop and start < f.stop), key=lambda f: f.start)

    @property
    def _copies(self) -> bool:
        return self.copy_on_read and not self._closed

    def _round_out(self, start: int, stop: int) -> tuple[int, int]:
        """Whole blocks around the range, as far as no other fetch is in the way."""
        block_size, base_size = self._owner.base_range()
        first, end = start // block_size * block_size, min(ceil_div(stop, block_size) * block_size, base_size)
        first, end = min(first, start), max(end, stop)
        for fetch in self._fetches:
            if fetch.stop <= start:
                first = max(first, fetch.stop)
            elif fetch.start >= stop:
                end = min(end, fetch.start)
        return first, end

    # --- copies -----------------------------------------------------------------------------------

    def _begin(self, start: int, stop: int, *, is_slow: bool = False) -> Fetch:
        fetch = Fetch(start, stop, is_slow=is_slow)
        self._fetches.append(fetch)
        return fetch

    def _end(self, fetch: Fetch) -> None:
        self._fetches.remove(fetch)
        if not self._fetches:
            self._idle.set()

    def _arrived(self, fetch: Fetch, copy: bool) -> None:
        """The data of a foreground read is there: have it stored after the answer, if it shall and may be."""
        fetch.failed = False
        fetch.done.set()
        size = len(fetch.data)
        if (
            not copy
            or self._closed
            or self._outstanding + size > self._max_outstanding
            or trio.current_time() < self._no_copies_before
        ):
            self._end(fetch)
            return
        self._outstanding += size
        self._spawn(functools.partial(self._store_after_answer, fetch))

    def _must_wait(self, size: int) -> bool:
        return self._outstanding + size > self._max_outstanding >= size

    async def _wait_for_room(self, size: int) -> None:
        with trio.move_on_after(PATIENCE):
            while self._must_wait(size):
                await self._stored.wait()

    async def _store_after_answer(self, fetch: Fetch) -> None:
        try:
            await self._owner.store_copy(fetch.start, fetch.data)
        except OSError as error:
            self._refused(error)
        finally:
            self._outstanding -= len(fetch.data)
            self._stored.set()
            self._stored = trio.Event()
            self._end(fetch)
        await self.follow_hole(fetch)

    async def follow_hole(self, fetch: Fetch) -> None:
        """If a read has brought nothing but zeros, have the rest of the hole local, as far as that takes no writing.

        One at a time is enough.
        """
        _, end, zero = next(zero_runs(fetch.start, fetch.data))
        if not zero or end < fetch.stop or self._closed or self._following is not None:
            return
        self._following = trio.CancelScope()
        try:
            with self._following:
                end, hole = await self.extents.at(fetch.start, self._owner.base_range()[1])
                if hole and end > fetch.stop:
                    await self._owner.store_hole(fetch.stop, end, writes=False)
        except OSError as error:
            self._refused(error)
        finally:
            self._following = None
            self._idle.set()

    def _refused(self, error: OSError) -> None:
        """The storage has refused a copy."""
        log.error("%s: copy-on-read: %s; it goes on in %d s", self._owner.name, told(error), STORE_RETRY)
        self._no_copies_before = trio.current_time() + STORE_RETRY

    # --- prefetching ------------------------------------------------------------------------------

    def free(self, start: int, stop: int) -> tuple[int, int]:
        """The first part of the range that is in no fetch; (stop, stop) where there is none."""
        for part_start, part_stop, fetch in self._parts(start, stop):
            if fetch is None:
                return part_start, part_stop
        return stop, stop

    def begin_ahead(self, start: int, stop: int, *, is_slow: bool = False) -> Fetch:
        """Fetch a range that is free: what `fill` reads, and `store` stores, or else `give_up` ends.

        `is_slow`: as of `Fetch`.
        """
        return self._begin(start, stop, is_slow=is_slow)

    async def fill(self, fetch: Fetch) -> None:
        """Read it. Raises OSError."""
        began = trio.current_time()
        await self._owner.read_base(fetch.data, fetch.start)
        self.extents.was_read(len(fetch.data), trio.current_time() - began)
        fetch.failed = False
        fetch.done.set()

    def give_up(self, fetch: Fetch) -> None:
        """It has failed, or is not wanted any more."""
        fetch.done.set()
        self._end(fetch)

    async def store(self, fetch: Fetch) -> int:
        """Store what `fill` has read; the number of bytes that were still missing. Raises OSError."""
        try:
            return await self._owner.store_copy(fetch.start, fetch.data)
        finally:
            self._end(fetch)

    # --- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Copy nothing any more, and wait for what is under way."""
        self._closed = True
        if self._following is not None:
            self._following.cancel()
        while self._fetches or self._following is not None:
            self._idle = trio.Event()
            await self._idle.wait()
