"""The one seam to storage: everything that fvdfs reads or writes of images goes through a `Store`.

A store is an array of bytes with a size. Its `async` calls may wait for a disk or a network, in a
thread. `pread_nowait` never waits, and says False where it would have to; then the caller takes
`pread`. (There is no such call for writing: RWF_NOWAIT is unknown to some file systems, ext4 among
them, and even where it is known a write waits for a file system that is frozen.) Calls move whole
requests: nothing is ever half done without an error.

The order of operations is the caller's business; only `flush` promises something about it: when it
returns, all that was written before it was called is on stable storage, a new size included.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from fvdfs.errors import ImageError

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that end when there is space again."""
Buffer = bytes | bytearray | memoryview
Done = Callable[[bool], None]
"""What is called when something that was begun has ended, and told whether all of it was done."""


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
        """Fill the whole buffer if that needs no waiting, else say False (the buffer may then hold parts)."""

    def pread_soon(self, buffer: memoryview, offset: int, done: Done) -> bool:
        """Begin to fill the whole buffer, and call `done` later, never before this returns.

        Says False where it has to be done by `pread`, which also knows why it could not be done.
        """

    async def pread(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer as far as the store reaches; the number of bytes filled. Raises OSError."""

    def pwrite_soon(self, data: memoryview, offset: int, done: Done) -> bool:
        """Begin to write all of `data`, a writable buffer; otherwise as `pread_soon`."""

    async def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data`, making the store longer where it must. Raises OSError."""

    async def write_out(self, offset: int, length: int) -> None:
        """Have what was written there leave memory for the disk, so that a later flush of others has less to
        wait for. Promises nothing, fails never.
        """

    async def zero(self, offset: int, length: int) -> None:
        """Have the range read as zeros, giving back its space where that can be. Raises OSError."""

    async def next_data(self, start: int, stop: int) -> int:
        """The first byte of [start, stop) that may be no zero: what is before it is known to take no space.

        `stop` where that is so of the whole range. Raises OSError.
        """

    def flush_soon(self, done: Done) -> bool:
        """Call `done` once all that was written is stable, where a flush that makes it so has begun already.

        That may be before this returns. Otherwise as `pread_soon`; `flush` raises the error, if there was one.
        """

    async def flush(self) -> None:
        """Make all that was written stable. Raises OSError; what was not yet stable may then be lost."""

    async def log(self, data: Buffer, offset: int, *, flush_first: bool) -> None:
        """`pwrite` followed by `flush`, with `flush_first` also after one.

        Raises FlushError where a flush failed, other OSError where the write did.
        """

    async def size(self) -> int:
        """The current size. Raises OSError."""

    async def resize(self, size: int) -> None:
        """Cut or extend the store to this size; new bytes read as zeros. Raises OSError."""

    def usage(self) -> int:
        """Bytes that it really takes where it lies."""

    async def aclose(self) -> None:
        """Give up the store; nothing is flushed."""


class FlushError(OSError):
    """A flush failed: nobody knows what is on the disk."""


async def log_by_steps(store: Store, data: Buffer, offset: int, *, flush_first: bool) -> None:
    """`Store.log` by the other calls of a store."""
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

    def pread_soon(self, buffer: memoryview, offset: int, done: Done) -> bool:
        return False

    def pwrite_soon(self, data: memoryview, offset: int, done: Done) -> bool:
        return False

    def flush_soon(self, done: Done) -> bool:
        return False

    async def log(self: Store, data: Buffer, offset: int, *, flush_first: bool) -> None:
        await log_by_steps(self, data, offset, flush_first=flush_first)


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
