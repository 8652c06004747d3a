"""Images for programs in Python, in trio's event loop: `await fvdfs.aio.open(path)`.

An image is open here as a command has it open: without a mount, with the same locks. Nothing runs beside the calls:
what is read of a base is not kept, nothing is prefetched, nothing is committed but by `flush` and `close`.
docs/python.md says what a user may rely on. `blocking` has the same calls for programs without an event loop.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import NamedTuple, TypeVar

import trio

from fvdfs.commands.convert import Permission
from fvdfs.commands.states import image_of, snapshot_file
from fvdfs.cow.locks import Gate
from fvdfs.errors import ImageBusy, ReadOnlyImage, named
from fvdfs.image.core import LastExtents
from fvdfs.image.image import Image as Engine
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.image.tree import SUFFIX, Tree
from fvdfs.layers.delete import delete
from fvdfs.layers.snapshot import MARK, make_snapshot, stem_of
from fvdfs.store.base import Buffer

T = TypeVar("T")

_PER_TURN = 1 << 30  # bytes of a disk that are mapped before other tasks get their turn


class Extent(NamedTuple):
    """Bytes [start, stop) of a disk, and where they are."""

    start: int
    stop: int
    state: str
    """`stored` in the image; in its `base`; a `hole`, which reads as zeros. As `fvdfs map` has it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An earlier state of a disk: an image, on which the disk stands."""

    name: str
    path: str
    size: int
    """Bytes of the disk then."""
    written: float
    """When it was written last, in seconds since 1970."""


async def open(
    path: str | os.PathLike[str],
    *,
    write: bool = False,
    base_path: Iterable[str | os.PathLike[str]] = (),
    allow_url: Iterable[str] = (),
    base_format: Iterable[str] = (),
    secret: str | os.PathLike[str] = "",
    accept_unclean: bool = False,
) -> Image:
    """Open the image at `path`, or the snapshot NAME of it, `path@NAME`.

    Names in the image lead into its folder, and to what `base_path` and `allow_url` name; these and the other arguments
    are options of a mount. The thread of the event loop has to last as long as an image that needs QEMU.

    Raises UsageError where there is no such file, or a program is missing; ImageBusy where another process, or a mount,
    has it open; TypeError where a list is one string; ImageError, OSError.
    """
    for name, given in (("base_path", base_path), ("allow_url", allow_url), ("base_format", base_format)):
        if isinstance(given, str | bytes):  # whose first character, "/" or "n", would allow nearly everything
            raise TypeError(f"{name} is a list: {name}=[{given!r}]")

    def look() -> tuple[str, Policy]:
        found = os.path.abspath(image_of(os.fspath(path)))
        roots = tuple(os.path.realpath(folder) for folder in base_path)
        return found, Permission(roots, tuple(allow_url), os.fspath(secret)).policy(found)

    found, policy = await trio.to_thread.run_sync(look)
    formats = tuple(base_format)
    return await open_as(found, replace(policy, writable=write, base_formats=formats, accept_unclean=accept_unclean))


async def open_as(path: str, policy: Policy) -> Image:
    """Open the image at this path, which is absolute. Raises as `open`."""
    await trio.to_thread.run_sync(image_of, path)
    return Image(path, await _load(path, policy), policy)


async def _load(path: str, policy: Policy) -> Engine:
    try:
        with named(path):
            return await open_image(path, policy, write=policy.writable)
    except ImageBusy as error:
        if error.image != path:
            raise
        raise ImageBusy(path, f"{error.reason}, or use its raw file in the mount") from error


class Image:
    """An open image: a disk of bytes. `open` makes it.

    Any number of tasks may use it. All calls raise ValueError once it is closed, and OSError that names the image.
    """

    def __init__(self, path: str, engine: Engine, policy: Policy) -> None:
        self.path = path
        """Of the image's file, absolute."""
        self._engine: Engine | None = engine
        self._policy = policy
        self._gate = Gate()
        """Calls pass it; it is closed where the files are exchanged, or closed."""

    def __repr__(self) -> str:
        state = "closed" if self.closed else "writable" if self.writable else "readable"
        return f"<fvdfs image {self.path!r}, {state}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._engine is None

    @property
    def writable(self) -> bool:
        """Whether it was opened to be written."""
        return self._policy.writable

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._open().size

    # --- the disk -------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, fewer than `length` only at the end of the disk."""
        _check(offset, length)
        async with self._used() as engine:
            return bytes(await engine.read(offset, length))

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`; a disk that ends before is grown, where the format can.

        Raises ReadOnlyImage. OSError: ENOSPC, EFBIG, and others; then nothing but parts of the range has changed.
        """
        view = memoryview(data).cast("B")
        _check(offset, len(view))
        async with self._written() as engine:
            await engine.write(offset, view)

    async def zero(self, offset: int, length: int) -> None:
        """Have bytes, as far as the disk reaches, read as zeros, and give their space back. Raises as `write`."""
        _check(offset, length)
        async with self._written() as engine:
            await engine.zero(offset, offset + length)

    async def map(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Where the bytes from `offset` on are, to the end of the disk where no `length` is given.

        In order and without gaps; neighbours differ.
        """
        _check(offset, length or 0)
        async with self._used() as engine:
            stop = engine.size if length is None else min(offset + length, engine.size)
            found: list[Extent] = []
            known = LastExtents()
            for at in range(offset, stop, _PER_TURN):
                await trio.lowlevel.checkpoint()
                for extent in map(Extent._make, await engine.extents(at, min(at + _PER_TURN, stop), known)):
                    if found and found[-1].state == extent.state:
                        found[-1] = found[-1]._replace(stop=extent.stop)
                    else:
                        found.append(extent)
            return found

    async def flush(self) -> None:
        """When this returns, what was written and zeroed before survives a power cut.

        Raises OSError; then the image cannot be written until it is opened again, since nobody knows what it holds.
        """
        async with self._used() as engine:
            await engine.fsync()

    # --- snapshots ------------------------------------------------------------------------------

    async def snapshots(self) -> list[Snapshot]:
        """The snapshots on which the disk stands, the latest first. Raises ImageError."""
        async with self._used():
            return await trio.to_thread.run_sync(_snapshots, self.path)

    async def create_snapshot(self, name: str = "") -> Snapshot:
        """Keep the present state, stable, under this name, or the next number; go on in a new image over it.

        For a moment the image is closed: another process may open it then, and this one stays closed. Raises UsageError
        for a name that is taken, or an image that can have no snapshot; ReadOnlyImage, ImageBusy, ImageError.
        """
        made = await self._changed(partial(make_snapshot, self.path, name, self._policy))
        return next(each for each in await self.snapshots() if each.path == made)

    async def delete_snapshot(self, name: str) -> None:
        """Delete this snapshot; what stands on it takes over what it needs of it, which takes its time.

        The image is closed meanwhile, as in `create_snapshot`. If it is interrupted, call it again. Raises UsageError
        where the snapshot must stay, or there is none; ReadOnlyImage, ImageBusy, ImageError.
        """
        await self._changed(partial(delete, snapshot_file(self.path, name), self._policy, _not_told))

    async def open_snapshot(self, name: str) -> Image:
        """Open this snapshot to read it, with the same permissions. Raises as `open`."""
        async with self._used():
            return await open_as(*self.of_snapshot(name))

    def of_snapshot(self, name: str) -> tuple[str, Policy]:
        """By what `open_as` opens a snapshot. Raises UsageError for what can be no name of one."""
        return snapshot_file(self.path, name), replace(self._policy, writable=False)

    # --- open and closed ------------------------------------------------------------------------

    async def close(self) -> None:
        """Wait for calls under way, make all stable, and give the image up. Twice is no mistake.

        Raises OSError where not all could be made stable; then it is closed as well.
        """
        with trio.CancelScope(shield=True):
            async with self._alone():
                engine, self._engine = self._engine, None
                if engine is not None:
                    with named(self.path):
                        await engine.close()

    async def __aenter__(self) -> Image:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> Engine:
        if self._engine is None:
            raise ValueError(f"{self.path}: is closed")
        return self._engine

    @asynccontextmanager
    async def _used(self) -> AsyncIterator[Engine]:
        """For a call; until it has ended the files stay open."""
        await trio.lowlevel.checkpoint()
        while self._gate.is_closed:
            await self._gate.wait_until_open()
        engine = self._open()
        with self._gate.passed(), named(self.path):
            yield engine

    @asynccontextmanager
    async def _written(self) -> AsyncIterator[Engine]:
        """As `_used`, for a call that writes."""
        async with self._used() as engine:
            self._check_writable()
            yield engine

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Without calls under way."""
        while self._gate.is_closed:
            await self._gate.wait_until_open()
        async with self._gate.closed():
            yield

    async def _changed(self, change: Callable[[], Awaitable[T]]) -> T:
        """Have files changed that must not be open for that, and open them again. Raises as `change` and `open`."""
        self._open()
        self._check_writable()
        async with self._alone():
            engine = self._open()
            try:
                with named(self.path):
                    await engine.close()
                    return await change()
            finally:
                self._engine = None
                with trio.CancelScope(shield=True):
                    self._engine = await _load(self.path, self._policy)

    def _check_writable(self) -> None:
        if not self.writable:
            raise ReadOnlyImage(self.path, "was opened to be read; open it with write=True")


def _check(offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise ValueError(f"offset {offset}, length {length}: must not be negative")


def _snapshots(image: str) -> list[Snapshot]:
    """Blocks."""
    folder, start = os.path.split(stem_of(image).partition(MARK)[0] + MARK)
    found = []
    for node in Tree(folder).chain(image)[1:]:
        name = os.path.basename(node.path)
        if os.path.dirname(node.path) == folder and name.startswith(start) and name.endswith(SUFFIX):
            size, written = node.header.virtual_disk_size, node.mtime_ns / 1e9
            found.append(Snapshot(name[len(start) : -len(SUFFIX)], node.path, size, written))
    return found


def _not_told(done: int, total: int) -> None:
    """Of how far it is."""
