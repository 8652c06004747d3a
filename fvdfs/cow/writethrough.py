"""Writing to the base as well: an image as a local cache in front of a volume (format.md, "Reserved fields").

`write_updates_base_img` asks for it, and the mount has to allow it (`-o allow_base_write`). Only what
lies in the base's range goes to the base; all of it is in own storage as well.

*writethrough*  A write is answered when both have it, a flush when both are stable.

*writeback*     A write is answered when own storage has it. Blocks that the base lacks are *owed*; a
                background task copies them there, and closing copies the rest and flushes the base
                before the header becomes clean. Nothing on disk says which blocks are owed: the
                header is unclean from the start, and an image that was not closed owes all blocks
                that are local.

Whoever writes blocks, or copies owed ones, holds their range (`locks.py`), so that storage and base
see overlapping writes in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio
from bitarray import bitarray

from fvdfs.store.base import Buffer, Store

log = logging.getLogger(__name__)

MODES = ("writethrough", "writeback")
COPY_DELAY = 1.0  # seconds that owed blocks may wait for more of their kind
RETRY_DELAY = 10.0  # seconds between attempts to reach a base that failed


class BaseWriter(Protocol):
    """How an image has writes in the base's range reach the base."""

    async def wrote(self, first: int, end: int, offset: int, data: Buffer) -> None:
        """Blocks [first, end), held by the caller, got `data` at byte `offset`. Raises OSError."""

    async def zeroed(self, first: int, end: int, start: int, stop: int) -> None:
        """Blocks [first, end), held by the caller, got zeros in bytes [start, stop). Raises OSError."""

    async def flush(self) -> None:
        """Part of a flush of the image. Raises OSError."""

    async def close(self) -> None:
        """Bring the base up to date, stable. Raises OSError; the image must then stay unclean."""


class WriteThrough:
    """Every write goes to the base before it is answered."""

    def __init__(self, base: Store) -> None:
        self._base = base
        self._written = False

    async def wrote(self, first: int, end: int, offset: int, data: Buffer) -> None:
        self._written = True
        await self._base.pwrite(data, offset)

    async def zeroed(self, first: int, end: int, start: int, stop: int) -> None:
        self._written = True
        await self._base.zero(start, stop - start)

    async def flush(self) -> None:
        if self._written:
            self._written = False
            try:
                await self._base.flush()
            except BaseException:
                self._written = True
                raise

    async def close(self) -> None:
        await self.flush()


class WriteBack:
    """Writes go to the base later, in the background and at closing."""

    def __init__(self, base: Store, blocks: int, copy: Callable[[int, int], Awaitable[int]], name: str) -> None:
        """`copy`: has the image copy blocks of [first, end) to the base, the first and others that follow, holding
        their range, then call `copied`; it says where that ended.
        """
        self._base = base
        self._owed = bitarray(blocks)
        self._copy = copy
        self._name = name
        self._wake = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def owed(self) -> int:
        """Blocks that the base lacks."""
        return self._owed.count(1)

    def owe(self, first: int, end: int) -> None:
        """The base lacks these blocks."""
        self._owed[first:end] = 1
        self._wake.set()

    def copied(self, first: int, end: int) -> None:
        """The base has these blocks now; their range is still held."""
        self._owed[first:end] = 0

    async def wrote(self, first: int, end: int, offset: int, data: Buffer) -> None:
        self.owe(first, end)

    async def zeroed(self, first: int, end: int, start: int, stop: int) -> None:
        self.owe(first, end)

    async def flush(self) -> None:
        """Own storage alone makes the promise."""

    async def run(self) -> None:
        """Copy what is owed, until the image is closed."""
        with self._scope:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await trio.sleep(COPY_DELAY)
                try:
                    await self._copy_all()
                except OSError as error:
                    log.error("%s: writing back to the base: %s; trying again", self._name, error)
                    self._wake.set()
                    await trio.sleep(RETRY_DELAY)

    async def _copy_all(self) -> None:
        first = self._owed.find(1)
        while first >= 0:
            end = self._owed.find(0, first)
            first = self._owed.find(1, await self._copy(first, end if end >= 0 else len(self._owed)))

    async def close(self) -> None:
        self._scope.cancel()
        while self.owed:
            await self._copy_all()
        await self._base.flush()
