"""The images of a chain that is checked, and reading from them.

Unlike an image that is opened to be used, any of their files may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from fvdfs.check.findings import Kind, Range, Severity
from fvdfs.errors import ImageError
from fvdfs.format.header import HEADER_SPACE, PAGE, Header
from fvdfs.image import reading
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image
from fvdfs.image.policy import Policy
from fvdfs.store.base import Store

PIECE = 1 << 20  # bytes that are read or copied at a time; bounds memory


@dataclass(frozen=True, slots=True)
class Absent:
    """A file that an image names and that is not open: why."""

    kind: Kind
    severity: Severity
    text: str
    hint: str = "cannot be repaired: some blocks are nowhere else"


@dataclass(slots=True)
class CheckLayer:
    """An image of a chain, its files open."""

    path: str
    meta: Store
    data: Store | Absent | None = None
    """None: nobody knows which file it is."""
    base: CheckLayer | Store | Absent | None = None
    is_base: bool = False
    base_format: str = ""
    """The format of the base, stated or detected; empty: not known."""


def is_store(store: CheckLayer | Store | Absent | None) -> TypeGuard[Store]:
    """Whether it is a file that can be read."""
    return not (store is None or isinstance(store, CheckLayer | Absent))


async def read(store: Store, offset: int, size: int) -> bytes:
    """Read `size` bytes, fewer where the store ends before. Raises OSError."""
    data = bytearray(size)
    with memoryview(data) as view:
        count = await store.pread(view, offset)
    return bytes(data) if count == size else bytes(data[:count])


class Filled:
    """The parts of bytes [start, stop) of a store that are no hole, PIECE bytes at most: an async iterator.

    A hole of any size takes one step. Raises OSError.
    """

    def __init__(self, store: Store, start: int, stop: int) -> None:
        self._store = store
        self._at = start
        self._stop = stop

    def __aiter__(self) -> Filled:
        return self

    async def __anext__(self) -> Range:
        while self._at < self._stop:
            end, hole = await self._store.extent(self._at, self._stop)
            start, self._at = self._at, end if hole else min((self._at + PIECE) // PAGE * PAGE, end)
            if not hole:
                return start, self._at
        raise StopAsyncIteration


async def is_zero(store: Store, start: int, stop: int) -> bool:
    """Whether bytes [start, stop) of a store read as zeros. Raises OSError."""
    async for at, end in Filled(store, start, stop):
        if any(await read(store, at, end - at)):
            return False
    return True


class BaseZeros:
    """Tells where the base of an image reads as zeros."""

    def __init__(self, base: CheckLayer | Store | Absent | None) -> None:
        self._base = base
        self._image: Image | None = None
        self._unreadable = False

    async def hold(self, start: int, stop: int) -> bool | None:
        """Whether all of bytes [start, stop) are zeros; None: that cannot be told. Raises OSError, ImageError."""
        if isinstance(self._base, CheckLayer):
            return await self._hold_in_image(self._base, start, stop)
        return await is_zero(self._base, start, stop) if is_store(self._base) else None

    async def _hold_in_image(self, base: CheckLayer, start: int, stop: int) -> bool | None:
        if self._image is None and not self._unreadable:
            try:
                self._image = await _load(base)
            except ImageError:  # reported by the check of the base
                self._unreadable = True
        if self._image is None:
            return None
        return await reading.is_zero(self._image, start, min(stop, self._image.size))


async def _load(layer: CheckLayer) -> Image:
    """The image, open for reading. Raises ImageError, OSError."""
    raw = await read(layer.meta, 0, HEADER_SPACE)
    header = Header.decode(raw, layer.path)
    header.check(layer.path, await layer.meta.size())
    if not is_store(layer.data):
        raise ImageError(layer.path, "its data file is missing")
    base: Image | Store | None = None
    if header.has_base:
        below = layer.base
        if below is None or isinstance(below, Absent):
            raise ImageError(layer.path, "its base image is missing")
        base = await _load(below) if isinstance(below, CheckLayer) else below
    return await load_image(layer.path, header, raw.ljust(HEADER_SPACE, b"\0"), layer.meta, layer.data, base, Policy())
