"""The one seam to storage: all that fvdfs reads or writes of images goes through a `Store`.

A store is an array of bytes with a size. A call moves all of its bytes, or fails. The order of calls is the caller's
business; only a flush promises something about it: when it ends, all that was written before it began is on stable
storage, a new size included.

Work that may have to wait has one shape on every floor. At a store it is a pair of calls, in an image a `Pending`:

1. `start_X(..., done)`, or `Pending.start(done)`, does it without a task. False: that cannot be; nothing has happened.
   An exception says so as well, and that the work has failed: `done` is not told then, and there is no second step.
2. Then `await X(...)`, or `Pending.finish()`, does it in a task.
3. `done` is told the result, or a negative errno, once; perhaps before the starting call returns.
4. An answer is final. What failed is not done again; what the kernel has not even taken, or done in part, the store
   completes by a thread before it answers.
5. Both ways make the same plan, and account for its result in the same function.

`pread_nowait` has no counterpart for writing: some file systems, ext4 among them, do not know RWF_NOWAIT there, and
even where it is known a write waits for a file system that is frozen.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from fvdfs.errors import ImageError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that end when there is space again."""
Buffer = bytes | bytearray | memoryview
Done = Callable[[int], None]
"""Is told the result of work that was started, or a negative errno; see above."""


class Pending(Protocol):
    """A request that may have to wait. Call `start`, and where that says False await `finish`: once, to its end."""

    def start(self, done: Done, /) -> bool:
        """Do it without a task; `done` is told the number of bytes, or a negative errno. False: it takes a task."""

    async def finish(self) -> int:
        """Do it; the number of bytes. Raises OSError."""


class Store(Protocol):
    """Bytes that can be read, and perhaps written. Offsets and sizes in bytes."""

    @property
    def name(self) -> str:
        """What a person calls it, for messages."""

    @property
    def writable(self) -> bool:
        """Whether the calls that change it may be used."""

    @property
    def fixed_size(self) -> bool:
        """Whether it is a device: its size is not ours to change, and what was never written is not zeros."""

    @property
    def server(self) -> str:
        """What it shares its throughput with: the disk that it is on, or the server."""

    @property
    def is_remote(self) -> bool:
        """Whether reading it asks another machine."""

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        """Fill the whole buffer if that needs no waiting, else say False (the buffer may then hold parts).

        Raises OSError, EIO for one, where that shows at once.
        """

    def start_pread(self, buffer: memoryview, offset: int, done: Done) -> bool:
        """`pread` without a task."""

    async def pread(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer as far as the store reaches; the number of bytes filled. Raises OSError."""

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        """`pwrite` without a task; `data` is a writable buffer. The result is its length."""

    async def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data`, making the store longer where it must. Raises OSError."""

    async def write_out(self, offset: int, length: int) -> None:
        """Have what was written there leave memory for the disk, so that a later flush of others has less to
        wait for. Promises nothing, fails never.
        """

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        """Have the range read as zeros, giving back its space where that can be; the store gets no longer by it.

        `writes`: by writing zeros, if there is no other way; without it that is EOPNOTSUPP. Raises OSError.
        """

    async def copy(self, source: Store, where: int, offset: int, length: int) -> None:
        """Have the range get what another store, or this, has from `where` on, without reading and writing it here.

        Raises OSError: EOPNOTSUPP where that cannot be; a part may be done then.
        """

    async def reserve(self, offset: int, length: int) -> None:
        """Have later writes to the range find space. What the store has there stays, and so does its size.

        An empty range only asks whether the store can promise that at all, as far as it knows.
        Raises OSError: ENOSPC; EOPNOTSUPP where nobody can promise that.
        """

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """Where the extent that begins at `start` ends, `stop` at the most, and whether it is a hole.

        A hole is known to read as zeros and to take no space; of anything else neither is known. The next extent may
        be of the same kind. Raises OSError.
        """

    def start_flush(self, done: Done) -> bool:
        """`flush` without a task. The result is 0."""

    async def flush(self) -> None:
        """Make all that was written stable. Raises OSError; what was not yet stable may then be lost."""

    async def append_stable(self, data: Buffer, offset: int, *, flush_first: bool) -> None:
        """`pwrite` followed by `flush`, with `flush_first` also after one: a record that names what is before it.

        Raises FlushError where a flush failed, other OSError where the write did.
        """

    async def size(self) -> int:
        """The current size. Raises OSError."""

    async def resize(self, size: int) -> None:
        """Truncate or extend the store to this size; new bytes read as zeros. Raises OSError."""

    def usage(self) -> int:
        """Bytes that it really takes where it lies. Raises OSError."""

    async def aclose(self) -> None:
        """Give up the store; nothing is flushed."""


class HasExtents(Protocol):
    """Bytes that may have holes: a store, a disk."""

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent`."""


async def next_data(source: HasExtents, start: int, stop: int) -> int:
    """The first byte of [start, stop) that may be no zero; `stop`: the whole range is known to be a hole.

    Raises OSError.
    """
    while start < stop:
        end, hole = await source.extent(start, stop)
        if not hole:
            break
        start = end
    return start


class FlushError(OSError):
    """A flush failed: nobody knows what is on the disk."""


async def append_by_steps(store: Store, data: Buffer, offset: int, *, flush_first: bool) -> None:
    """`Store.append_stable` by the other calls of a store."""
    try:
        if flush_first:
            await store.flush()
    except OSError as error:
        raise FlushError(*error.args) from error
    await store.pwrite(data, offset)
    try:
        await store.flush()
    except OSError as error:
        raise FlushError(*error.args) from error


class Stepwise:
    """What a store may leave to its other calls."""

    def start_pread(self, buffer: memoryview, offset: int, done: Done) -> bool:
        return False

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        return False

    def start_flush(self, done: Done) -> bool:
        return False

    async def copy(self: Store, source: Store, where: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)

    async def append_stable(self: Store, data: Buffer, offset: int, *, flush_first: bool) -> None:
        await append_by_steps(self, data, offset, flush_first=flush_first)


async def result_of(start: Callable[[Done], bool]) -> int | None:
    """Start something, and wait for its result; None where it says False. Raises OSError.

    What was started cannot be cancelled.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    results: list[int] = []
    waits = False

    def done(result: int) -> None:
        results.append(result)
        if waits:
            trio.lowlevel.reschedule(task)

    if not start(done):
        return None
    if not results:
        waits = True
        await trio.lowlevel.wait_task_rescheduled(uncancellable)
    (result,) = results
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def uncancellable(_: Callable[[], None]) -> trio.lowlevel.Abort:
    """For tasks that wait for what cannot be taken back."""
    return trio.lowlevel.Abort.FAILED


async def together(calls: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """Do calls to stores side by side. Raises the first OSError, where nothing else was raised."""
    if len(calls) == 1:
        await calls[0]()
        return
    try:
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)
    except BaseExceptionGroup as group:
        errors, others = group.split(OSError)
        if errors is None or others is not None:
            raise
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        # Not within `except*`, where some versions of Python wrap it in a group again.
        raise error from group


async def pread_exactly(store: Store, size: int, offset: int) -> bytearray:
    """Read metadata: exactly `size` bytes. Raises ImageError where the store ends before."""
    data = bytearray(size)
    with memoryview(data) as view:
        if not store.pread_nowait(view, offset):
            count = await store.pread(view, offset)
            if count < size:
                raise ImageError(store.name, f"the file ends at {offset + count}, {size} bytes at {offset} are needed")
    return data


async def pwrite_pages(store: Store, region_offset: int, page_size: int, pages: Sequence[tuple[int, bytes]]) -> None:
    """Write numbered pages of a region, adjacent ones in one call. Raises OSError."""
    at = 0
    while at < len(pages):
        end = at + 1
        while end < len(pages) and pages[end][0] == pages[at][0] + end - at:
            end += 1
        data = pages[at][1] if end == at + 1 else b"".join(page for _, page in pages[at:end])
        await store.pwrite(data, region_offset + pages[at][0] * page_size)
        at = end
