"""What `fvdfs convert` reads from and writes to, in one shape for all formats."""

from __future__ import annotations

from typing import Protocol

from fvdfs.errors import named
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.store.base import Buffer, Store


class Side(Protocol):
    """What is converted from or to. Sizes and offsets in bytes. All methods raise OSError."""

    size: int

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on."""

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent`."""

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""

    async def fsync(self) -> None:
        """Make it stable."""

    async def close(self) -> None:
        """Finish; what was written is then complete."""


class StoreSide:
    """A store as a side: a raw file, or another format behind one."""

    def __init__(self, store: Store, size: int, *, keep_open: bool = False) -> None:
        """`keep_open`: the store is somebody else's to close."""
        self.store = store
        self.size = size
        self._keep_open = keep_open

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await self.store.pread(memoryview(buffer), offset)
        return buffer

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        return await self.store.extent(start, stop)

    async def write(self, offset: int, data: Buffer) -> None:
        await self.store.pwrite(data, offset)

    async def fsync(self) -> None:
        await self.store.flush()

    async def close(self) -> None:
        if not self._keep_open:
            await self.store.aclose()


class NamedSide:
    """A side whose errors name it."""

    def __init__(self, side: Side, name: str) -> None:
        self._side = side
        self._name = name
        self.size = side.size

    async def read(self, offset: int, length: int) -> Buffer:
        with named(self._name):
            return await self._side.read(offset, length)

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        with named(self._name):
            return await self._side.extent(start, stop)

    async def write(self, offset: int, data: Buffer) -> None:
        with named(self._name):
            await self._side.write(offset, data)

    async def fsync(self) -> None:
        with named(self._name):
            await self._side.fsync()

    async def close(self) -> None:
        with named(self._name):
            await self._side.close()


def stores_of(side: Side) -> list[Store]:
    """All that it stands on."""
    if isinstance(side, StoreSide):
        return [side.store]
    found: list[Store] = []
    image: Core | Store | None = side if isinstance(side, Image) else None
    while isinstance(image, Core):
        found += [image.meta, image.data]
        image = image.base
    return found if image is None else [*found, image]
