"""What commands read disks from and write them to, in one shape for all formats."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol

from fvdfs.errors import named
from fvdfs.image.core import Core, OwnData
from fvdfs.image.image import Image
from fvdfs.store.base import Buffer, Store
from fvdfs.store.qemu_store import content_of


class Side(Protocol):
    """A disk that is read or written. Sizes and offsets in bytes. All methods raise OSError."""

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

    async def zero(self, start: int, stop: int) -> None:
        """Have bytes [start, stop) read as zeros. Raises OSError."""
        await self.store.zero(start, stop - start)

    async def resize(self, size: int) -> None:
        """Make it this long. Raises OSError."""
        await self.store.resize(size)
        self.size = size

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


async def fill(side: Side, view: memoryview, offset: int) -> int:
    """Read into a buffer, faster than `read` where one serves for many reads: the number of bytes. Raises OSError."""
    if isinstance(side, StoreSide):
        return await side.store.pread(view, offset)
    assert isinstance(side, Image)
    rest = side.begin_read(offset, view)
    return rest if isinstance(rest, int) else await rest.finish()


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


class Stored(NamedTuple):
    """Where the bytes of a side are, from the last one's `stop` up to this. Offsets in bytes."""

    stop: int
    place: tuple[Hashable, int] | None
    """In what (`content_of`), and how much further on there than on the disk; None: nowhere, they read as zeros."""


def stored(side: Side, stop: int) -> Iterator[Stored]:
    """Where bytes [0, stop) of a side are stored. What is past its end is nowhere."""
    at, end = 0, min(side.size, stop)
    if isinstance(side, Image):
        for piece_start, piece_stop, source, where in side.pieces(0, end):
            if at < piece_start:
                yield Stored(piece_start, None)
            store = source.store if isinstance(source, OwnData) else source
            yield Stored(piece_stop, (content_of(store), where - piece_start) if store is not None else None)
            at = piece_stop
    elif isinstance(side, StoreSide) and end:
        yield Stored(end, (content_of(side.store), 0))
        at = end
    if at < stop:
        yield Stored(stop, None)
