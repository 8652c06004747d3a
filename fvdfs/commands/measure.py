"""`fvdfs measure`: what a conversion would take, without making it.

It is made, as by `convert`, but in a store that notes which pages are written and forgets their content. So the answer
is exact on a file system that takes space in pages, and it costs reading the source: zeros take nothing wherever they
are, and over a base only what differs is stored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from bitarray import bitarray

from fvdfs import daemon
from fvdfs.commands.base import open_base
from fvdfs.commands.convert import Permission, Progress, copy, open_source, permitted
from fvdfs.commands.create import plan_image
from fvdfs.commands.sides import NamedSide, Side, StoreSide
from fvdfs.commands.terminal import progress_bar
from fvdfs.cow.planner import Zeroes
from fvdfs.errors import UsageError, named
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS, Policy
from fvdfs.sizes import human_size
from fvdfs.store.base import Buffer, Stepwise, Store
from fvdfs.store.locations import is_local
from fvdfs.store.references import BASE_FORMATS, RAW

PAGE = 4096  # bytes: what file systems take space in
SEGMENT = 1 << 15  # pages that are noted together


@dataclass(frozen=True, slots=True)
class Need:
    """What a conversion would take, in bytes."""

    required: int
    """Of space, where a file system stores it."""
    fully_allocated: int
    """The same once a guest has written all of the disk."""
    device: int
    """Of a device that is to hold it, or of its data device."""


def run(
    source: str,
    *,
    source_format: str,
    target_format: str,
    layout: CreateOptions,
    as_json: bool,
    options: Sequence[str],
    secret: str,
) -> int:
    """Measure, with a progress bar, and print what was found. Raises as `measure`."""
    if source_format and source_format not in BASE_FORMATS:
        raise UsageError(f"--source-format {source_format}: is not known; known are {', '.join(BASE_FORMATS)}")
    if target_format not in (FVD_FORMAT, RAW):
        raise UsageError(f"--target-format {target_format}: can tell of fvd and raw; of others: qemu-img measure")
    if target_format == RAW and layout != CreateOptions():
        raise UsageError("options of FVD images do not go with the format raw")
    if not (is_local(layout.data_file or "x") and layout.data_file_fmt in RAW_FORMATS):
        raise UsageError("--data-format: can tell of raw data files only; of others: qemu-img measure")
    with progress_bar() as progress:
        work = functools.partial(
            measure, source, source_format, target_format, layout, permitted(options, secret), progress
        )
        need, remarks = daemon.run_loop(work)
    for remark in remarks:
        daemon.complain(remark)
    if as_json:
        facts = {"required": need.required, "fully-allocated": need.fully_allocated, "device": need.device}
        print(json.dumps(facts))
    else:
        print(f"required:         {human_size(need.required)}")
        print(f"fully allocated:  {human_size(need.fully_allocated)}")
        print(f"on a device:      {human_size(need.device)}")
    return 0


async def measure(
    name: str,
    source_format: str,
    target_format: str,
    layout: CreateOptions,
    allowed: Permission,
    progress: Progress,
) -> tuple[Need, list[str]]:
    """What a conversion of this source would take; remarks for the user. A base is named relative to where we are.

    Raises UsageError, ImageError, OSError.
    """
    with named(name):
        source, remarks = await open_source(name, source_format, allowed)
    try:
        side = NamedSide(source, name)
        need = await (
            _of_fvd(side, layout, allowed, progress) if target_format == FVD_FORMAT else _of_raw(side, progress)
        )
        return need, remarks
    finally:
        with trio.CancelScope(shield=True):
            await source.close()


async def _of_raw(source: Side, progress: Progress) -> Need:
    store = PageStore(0)
    await copy(source, StoreSide(store, source.size), progress, over_base=False)
    return Need(store.usage(), source.size, source.size)


async def _of_fvd(source: Side, layout: CreateOptions, allowed: Permission, progress: Progress) -> Need:
    plan = functools.partial(plan_image, "", source.size, layout, secret_file=allowed.secret_file)
    new, base, layout = await trio.to_thread.run_sync(plan)
    meta = PageStore(new.header.metadata_size)
    data = PageStore(0) if layout.data_file else meta
    await meta.resize(new.file_size)
    if data is not meta:
        await data.resize(new.data_size)
    for offset, part in new.parts():
        await meta.pwrite(part, offset)
    below: Core | Store | None = None
    if base is not None:
        opened, _ = await open_base("", layout.base_img, base.format, allowed.secret_file)
        assert isinstance(opened, Image | StoreSide)
        below = opened if isinstance(opened, Image) else opened.store
    first = bytearray(HEADER_SPACE)
    await meta.pread(memoryview(first), 0)
    header = Header.decode(bytes(first), "the new image")
    policy = Policy(zeroes=Zeroes.ON)
    image = await load_image("the new image", header, bytes(first), meta, data, below, policy)
    try:
        await image.begin_writing()
        await copy(source, _OverBase(image), progress, over_base=image.bitmap is not None)
    finally:
        with trio.CancelScope(shield=True):
            await image.close()
    used = image.table.allocated() * header.chunk_size if image.table is not None else header.virtual_disk_size
    whole = header.chunks * header.chunk_size if header.compact else header.virtual_disk_size
    required = meta.usage() + (data.usage() if data is not meta else 0)
    return Need(required, header.metadata_size + whole, (0 if layout.data_file else header.metadata_size) + used)


class _OverBase:
    """A new image as a target: what it does not store itself has been read, before it is written."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.size = image.size

    async def read(self, offset: int, length: int) -> Buffer:
        data = bytearray(length)
        await self._image.read_base(memoryview(data), offset)
        return data

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        return await self._image.base_extent(start, stop)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._image.write(offset, data)

    async def fsync(self) -> None:
        await self._image.fsync()

    async def close(self) -> None:
        await self._image.close()


class PageStore(Stepwise):
    """A file in memory that knows which of its pages are written, and the content of the first bytes alone.

    The rest is not read again: a conversion writes each part of a disk once.
    """

    name = "the new image"
    writable = True
    fixed_size = False
    server = ""
    is_remote = False

    def __init__(self, kept: int) -> None:
        """`kept`: the bytes whose content is known; in whole pages."""
        self._kept = bytearray(kept)
        self._size = 0
        self._written: dict[int, bitarray] = {}
        """Of each segment of pages, those that were written."""

    def _mark(self, first: int, end: int, *, written: bool) -> None:
        while first < end:
            segment, at = divmod(first, SEGMENT)
            count = min(end - first, SEGMENT - at)
            if written or segment in self._written:
                pages = self._written.setdefault(segment, bitarray("0") * SEGMENT)
                pages[at : at + count] = written
            first += count

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        return False

    async def pread(self, buffer: memoryview, offset: int) -> int:
        count = max(0, min(len(buffer), self._size - offset))
        known = bytes(self._kept[offset : offset + count])
        buffer[:count] = known + bytes(count - len(known))
        return count

    async def pwrite(self, data: Buffer, offset: int) -> None:
        end = offset + len(data)
        kept = memoryview(data)[: max(0, len(self._kept) - offset)]
        self._kept[offset : offset + len(kept)] = kept
        self._mark(offset // PAGE, -(-end // PAGE), written=True)
        self._size = max(self._size, end)

    async def write_out(self, offset: int, length: int) -> None:
        """There is nowhere to write to."""

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        end = min(offset + length, self._size)
        kept = max(0, min(end, len(self._kept)) - offset)
        self._kept[offset : offset + kept] = bytes(kept)
        self._mark(-(-offset // PAGE), end // PAGE, written=False)

    async def reserve(self, offset: int, length: int) -> None:
        self._mark(offset // PAGE, -(-(offset + length) // PAGE), written=True)

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        segment, at = divmod(start // PAGE, SEGMENT)
        pages = self._written.get(segment)
        hole = pages is None or not pages[at]
        end = SEGMENT if pages is None else pages.find(int(hole), at)
        page = segment * SEGMENT + (end if end >= 0 else SEGMENT)
        return min(page * PAGE, stop), hole

    async def flush(self) -> None:
        """There is nothing to make stable."""

    async def size(self) -> int:
        return self._size

    async def resize(self, size: int) -> None:
        self._mark(-(-size // PAGE), -(-self._size // PAGE), written=False)
        self._size = size

    def usage(self) -> int:
        return sum(pages.count() for pages in self._written.values()) * PAGE

    async def aclose(self) -> None:
        """There is nothing to close."""
