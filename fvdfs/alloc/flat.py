"""Allocation by the host: virtual byte v is at data start + v (format.md, "Storage without a table").

The layout of a raw image. In a file of a file system it is sparse, and the file system decides
where blocks go. On a device it takes its place as it is. Storage that was never used may be empty, and
reads as zeros; one that ends early was truncated, and what is missing cannot be read (`Header.is_truncated`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import trio

from fvdfs.alloc.growth import GrowCommand
from fvdfs.store.base import Store


class FlatStorage:
    """The identity mapping over a store."""

    def __init__(
        self, store: Store, data_offset: int, size: int, grow_command: GrowCommand, *, length: int, is_truncated: bool
    ) -> None:
        """`length`: bytes of data that the store has; `is_truncated`: whether it has had more."""
        self._store = store
        self._offset = data_offset
        self._size = size
        self._command = grow_command
        self._ready = length >= size
        self._is_longer = length > size
        self._truncated_at = length if is_truncated else None
        self._resizing = trio.Lock()

    @property
    def damage(self) -> str:
        """What is wrong with it, in words; empty: nothing."""
        if self._truncated_at is None:
            return ""
        return f"storage: was cut at byte {self._truncated_at} of {self._size}"

    def byte_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Bytes [start, stop) of the disk as runs (start, stop, offset in the store); here one run.

        Raises OSError(EIO) where the storage was truncated before `stop`.
        """
        if self._truncated_at is not None and stop > self._truncated_at:
            raise OSError(errno.EIO, f"{self._store.name}: bytes {start}..{stop} of the disk were cut off")
        yield start, stop, self._offset + start

    def place(self, start: int, stop: int) -> int | None:
        """The offset in the store, where these bytes lie in one piece."""
        return self._offset + start

    def holds(self, end: int) -> bool:
        """Whether the store must reach to this offset of its own: it may be empty until the first write."""
        return self._ready and end <= self._offset + self._size

    @property
    def is_whole(self) -> bool:
        """Whether the store has all bytes of the disk."""
        return self._ready

    @property
    def is_longer(self) -> bool:
        """Whether the store goes on behind the disk, as where the original has made this smaller."""
        return self._is_longer

    def has_grown(self, length: int, size: int) -> None:
        """Others have written past the end: the store has `length` bytes of data now, the disk `size`."""
        self._size = size
        self._ready = length >= size

    def prepare_nowait(self, start: int, stop: int) -> bool:
        """Whether these bytes can be written without `prepare`."""
        return self._ready

    async def prepare(self, start: int, stop: int) -> list[int]:
        """Make room for these bytes; the chunks that were allocated for it (here none).

        The original extends the file to the whole disk before its first request (format.md,
        "Storage without a table"), and so refuses none of what is written here. The length is stable before
        anything is written: one in between would look like that of a file that was truncated. Raises OSError.
        """
        async with self._resizing:
            if not self._ready and await self._store.size() < self._offset + self._size:
                await self._store.resize(self._offset + self._size)
                await self._store.flush()
            self._ready = True
        return []

    async def clear_behind(self) -> None:
        """Nothing here is handed out to anybody."""

    async def give_back(self) -> None:
        """What `shrink` has not given back already: nothing."""

    async def stop_growing(self) -> None:
        """Nothing grows in the background here."""

    async def grow(self, size: int) -> None:
        """The disk grows to `size` bytes, and what is new reads as zeros. Raises OSError."""
        old_end, end = self._offset + self._size, self._offset + size
        async with self._resizing:
            have = await self._store.size()
            if self._store.fixed_size:
                if have < end:
                    await self._command.grow(end - have, self._store.name)
                await self._store.zero(old_end, end - old_end)
            else:
                if have > old_end:
                    await self._store.resize(old_end)
                await self._store.resize(end)
            self._size = size
            self._ready = True
            self._is_longer = False

    def grow_failed(self, size: int) -> None:
        """The disk stays at `size` bytes: a growth could not be completed."""
        self._size = size

    async def shrink(self, size: int) -> None:
        """The disk has become smaller: give back what is past its end, where that is possible. Raises OSError."""
        async with self._resizing:
            self._size = size
            if not self._store.fixed_size:
                await self._store.resize(self._offset + size)
                self._ready, self._is_longer = True, False
