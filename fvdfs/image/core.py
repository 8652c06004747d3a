"""An open image without its requests: what it is made of, and where the bytes of its disk are.

Requests share it: reads (`reading`), writes (`writing`), copies from the base (`copying`), changes of the size
(`resizing`), writes to the base (`base_writing`), profiles (`profiling`). `image.Image` puts them together.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from fvdfs.alloc.chunked import ChunkedStorage, Spawn
from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.table import Table
from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.dirty import Dirty
from fvdfs.cow.fetching import Fetcher
from fvdfs.cow.planner import Geometry, Zeroes, read_runs
from fvdfs.cow.recorder import Recorder
from fvdfs.cow.writethrough import BaseWriter
from fvdfs.format.header import Header, ceil_div
from fvdfs.format.journal import Range
from fvdfs.image.bases import Bases
from fvdfs.image.commit import Committer
from fvdfs.store.base import Done, Store
from fvdfs.store.host import HostFile
from fvdfs.store.outage import Outage
from fvdfs.store.qemu_store import QemuStore

PIECES_PER_TURN = 1000  # of a disk that are looked at before other tasks get their turn

Storage = FlatStorage | ChunkedStorage


class OwnData:
    """Reads of an image's storage. If it ends before what it must hold, it was truncated: an error, no zeros."""

    def __init__(self, data: Store, storage: Storage, committer: Committer) -> None:
        self.store = data
        self._storage = storage
        self._committer = committer

    @property
    def changes(self) -> int:
        """How often blocks have become local."""
        return self._committer.local_changes

    def follow(self, storage: Storage, committer: Committer) -> None:
        """The metadata were loaded again."""
        self._storage, self._committer = storage, committer

    def start_pread(self, view: memoryview, offset: int, done: Done) -> bool:
        end = offset + len(view)
        if not self._storage.holds(end):
            return self.store.start_pread(view, offset, done)

        def ended(count: int) -> None:
            done(-errno.EIO if 0 <= count < len(view) and self._is_truncated(end) else count)

        return self.store.start_pread(view, offset, ended)

    async def pread(self, view: memoryview, offset: int) -> int:
        end = offset + len(view)
        held = self._storage.holds(end)
        count = await self.store.pread(view, offset)
        if count < len(view) and held and self._is_truncated(end):
            raise OSError(errno.EIO, self._too_short(end))
        return count

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent`. Raises OSError."""
        end, hole = await self.store.extent(start, stop)
        if hole and end >= stop and self._storage.holds((size := await self.store.size()) + 1):
            if start >= size:
                raise OSError(errno.EIO, self._too_short(end))
            return min(end, size), True
        return end, hole

    def _is_truncated(self, end: int) -> bool:
        """Whether it is too short now, as when the read began; else its size was changed meanwhile."""
        if not self._storage.holds(end):
            return False
        self._committer.fail(self._too_short(end))
        return True

    def _too_short(self, end: int) -> str:
        return f"{self.store.name} ends before byte {end}, up to which it holds data: it was cut"


class LastExtents:
    """What stores say of their extents: the last answer of each is remembered, so that a walk asks for each once.

    Until blocks become local: copies fill holes of an image's storage, and change nothing that others would notice.
    """

    def __init__(self) -> None:
        self._known: dict[OwnData | Store, tuple[int, int, bool, int]] = {}

    async def at(self, source: OwnData | Store, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent`, perhaps past `stop`, which is no more than how far to look now. Raises OSError."""
        changes = source.changes if isinstance(source, OwnData) else 0
        first, end, hole, then = self._known.get(source, (0, 0, False, 0))
        if not first <= start < end or (hole and then != changes):
            end, hole = await source.extent(start, stop)
            self._known[source] = start, end, hole, changes
        return end, hole


class _Layer(NamedTuple):
    """What an image consists of at one moment, as far as a walk along the chain needs it."""

    storage: Storage
    own: OwnData
    base: Core | Store | None


@dataclass(kw_only=True, eq=False)
class Core:
    """The parts of an open image. Offsets and lengths are bytes of the virtual disk."""

    name: str
    committer: Committer
    meta: Store
    data: Store
    base: Core | Store | None
    storage: Storage
    bitmap: Bitmap | None
    table: Table | None
    zeroes: Zeroes = Zeroes.OFF
    """What becomes of zeros that are written."""
    spawn: Spawn | None = None
    """Runs work in the background: growth ahead of need, copies, write-back. None: nothing does."""
    bases: Bases[Core, Store] = field(default_factory=Bases)
    """Who stands on what."""

    def __post_init__(self) -> None:
        self.own = OwnData(self.data, self.storage, self.committer)
        if self.base is not None:
            self.bases.enter(self.base, self)
        self.writable = False
        self.written: list[Range] | None = None
        """What writes have changed of the storage since somebody began to copy it; None: nobody does."""
        self.base_writer: BaseWriter | None = None
        """Makes writes reach the base, where the image asks for it and the mount allows it."""
        self.base_read = 0
        """Bytes that were asked of the base."""
        self.fetcher: Fetcher | None = None
        """Reads the base for copy-on-read and prefetching; None where there is neither."""
        self.recorder: Recorder | None = None
        """Records what is read first, for a profile."""
        self.dirty: Dirty | None = None
        """What is written while somebody copies the disk."""
        self.followed: Core | None = None
        """The base, where that is a source on top of a template, for the time of a move (`following`)."""
        self.map_known = trio.Event()
        """Set once it is known what that has beyond the template."""
        header = self.committer.header
        self.size = header.virtual_disk_size
        self.end = self.size
        """The end of the disk for those who have it open: that of the last write past it, within the last sector."""
        self.geometry = Geometry(header.block_size, header.base_size)

    @property
    def header(self) -> Header:
        """The header as it is on disk."""
        return self.committer.header

    @property
    def base_may_be_written(self) -> bool:
        """Whether the base was opened for writing."""
        return self.base is not None and not isinstance(self.base, Core) and self.base.writable

    @property
    def damage(self) -> str:
        """Why the image is read-only, or cannot be read everywhere; empty where nothing is known to be wrong."""
        return self.storage.damage or self.committer.failed or ""

    @property
    def needs_share(self) -> bool:
        """Whether a part of the chain may hang, because a server or a program answers for it."""
        image: Core | Store | None = self
        while isinstance(image, Core):
            if _may_hang(image.meta) or _may_hang(image.data):
                return True
            image = image.base
        return image is not None and _may_hang(image)

    @property
    def base_server(self) -> str:
        """What the lowest base of the chain shares its throughput with."""
        base = self.base
        while isinstance(base, Core):
            base = base.base if base.base is not None and self.followed is not base else base.data
        assert base is not None
        return base.server

    @property
    def is_remote(self) -> bool:
        """Whether a read may have to ask another machine, given what is local now."""
        layer: Core | Store | None = self
        while isinstance(layer, Core):
            if layer.data.is_remote:
                return True
            if layer.bitmap is None or layer.bitmap.next_missing(0) is None:
                return False
            layer = layer.base
        return layer is not None and layer.is_remote

    @property
    def outage(self) -> Outage | None:
        """The last time that a server was away on which the image, or what it stands on, is; it may last."""
        outages = [store.outage for store in stores_of(self) if isinstance(store, QemuStore)]
        return max((outage for outage in outages if outage is not None), key=lambda outage: outage.since, default=None)

    def base_range(self) -> tuple[int, int]:
        """The block size and the size of the base's range, bytes."""
        return self.geometry.block_size, self.geometry.base_size

    def local_of_base(self) -> int:
        """Bytes of the base's range that are local."""
        bitmap = self.bitmap
        block_size, base_size = self.base_range()
        if bitmap is None or not bitmap.blocks:
            return base_size
        beyond = bitmap.blocks * block_size - base_size  # of the last block
        return bitmap.count_local() * block_size - (beyond if bitmap.is_local(bitmap.blocks - 1) else 0)

    def missing(self, start: int, length: int) -> tuple[int, int]:
        """The first bytes [start, stop), whole blocks and at most about `length`, that are only in the base.

        Looks from byte `start` on; an empty range at the end of the base's range where nothing is missing. Of a disk
        that follows its source, what the template has is not missing.
        """
        block_size, base_size = self.base_range()
        bitmap = self.bitmap
        if bitmap is None or start >= base_size:
            return base_size, base_size
        block, most = start // block_size, max(1, length // block_size)
        while (first := bitmap.next_missing(block)) is not None:
            first, until = self.to_copy(first, bitmap.blocks)
            if first == until:
                break
            if bitmap.is_local(first):
                block = first
                continue
            end = bitmap.next_local(first, min(first + most, until))
            return first * block_size, min(end * block_size, base_size)
        return base_size, base_size

    def left_to_copy(self) -> int:
        """Bytes that are missing, in whole blocks."""
        bitmap, followed = self.bitmap, self.followed
        block_size, base_size = self.base_range()
        if bitmap is None:
            return 0
        if followed is None or followed.bitmap is None:
            return max(0, base_size - bitmap.count_local() * block_size)
        if followed.geometry.block_size == block_size:
            return bitmap.count_missing(followed.bitmap) * block_size
        at = left = 0
        while (part := self.missing(at, base_size)) != (base_size, base_size):
            at, left = part[1], left + part[1] - part[0]
        return left

    def to_copy(self, start: int, stop: int) -> tuple[int, int]:
        """The first blocks in [start, stop) that are to be copied if they are missing: all but the template's.

        An empty range where there are none, or as long as nobody knows which these are.
        """
        followed = self.followed
        if followed is None:
            return start, stop
        if followed.bitmap is None:
            return stop, stop
        unit, block_size = followed.geometry.block_size, self.geometry.block_size
        own, end = followed.bitmap, min(ceil_div(stop * block_size, unit), followed.bitmap.blocks)
        first = own.next_local(start * block_size // unit, end)
        if first >= end:
            return stop, stop
        until = own.next_missing(first)
        last = stop if until is None else min(stop, ceil_div(until * unit, block_size))
        return max(start, first * unit // block_size), last

    def local_runs(self, start: int, stop: int) -> Sequence[tuple[int, int, bool]]:
        """Bytes [start, stop) as runs (start, stop, local); the rest of each run is in the base."""
        bitmap, geometry = self.bitmap, self.geometry
        if bitmap is None or start >= geometry.base_size:
            return ((start, stop, True),)
        first, end = geometry.blocks(start, stop)
        if bitmap.all_local(first, end):
            return ((start, stop, True),)
        if stop <= geometry.base_size and bitmap.none_local(first, end):
            return ((start, stop, False),)
        return tuple(read_runs(geometry, bitmap, start, stop))

    async def extents(self, start: int, stop: int, known: LastExtents) -> list[tuple[int, int, str]]:
        """Bytes [start, stop) of the disk as runs (start, stop, "stored", "base" or "hole"). Raises OSError.

        `known`: for the whole of a walk, which asks once for an extent that goes on behind `stop`.
        """
        found = []
        storage, own = self.storage, self.own  # they may be exchanged meanwhile
        for run_start, run_stop, local in self.local_runs(start, stop):
            if not local:
                found.append((run_start, run_stop, "base"))
                continue
            for piece_start, piece_stop, where in storage.byte_runs(run_start, run_stop):
                at = piece_start
                while at < piece_stop:
                    end, hole = piece_stop, True
                    if where is not None:
                        place = where + at - piece_start
                        extent_end, hole = await known.at(own, place, place + max(piece_stop, self.size) - at)
                        end = min(piece_stop, at + extent_end - place)
                    found.append((at, end, "hole" if hole else "stored"))
                    at = end
        return found

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """`Store.extent` of the disk, whatever layer of the chain has the bytes. Raises OSError."""
        known = LastExtents()
        kind: bool | None = None  # of what lies before `at`
        at = start
        for number, (piece_start, piece_stop, source, where) in enumerate(self.pieces(start, stop)):
            if not number % PIECES_PER_TURN:
                await trio.lowlevel.checkpoint()
            if source is None:
                continue
            if at < piece_start:
                if kind is False:
                    return at, False
                kind, at = True, piece_start
            while at < piece_stop:
                place = where + at - piece_start
                end, hole = await known.at(source, place, place + stop - at)
                if kind is not None and kind is not hole:
                    return at, kind
                kind, at = hole, min(piece_stop, at + end - place)
        return (at, False) if kind is False else (stop, True)

    def extent_nowait(self, start: int, stop: int) -> tuple[int, bool] | None:
        """`extent`, where the metadata of the chain tells all; else None. Raises OSError."""
        for number, (piece_start, _, source, _) in enumerate(self.pieces(start, stop)):
            if source is not None:
                return (piece_start, True) if start < piece_start else None
            if number >= PIECES_PER_TURN:
                return None
        return stop, True

    def pieces(
        self, start: int, stop: int, *, down_to: Core | None = None
    ) -> Iterator[tuple[int, int, OwnData | Store | None, int]]:
        """Where in the chain bytes [start, stop) are stored: (start, stop, source, offset in it).

        Where they are not, there is no piece, or one without a source. In order, without recursion: a chain may be of
        any depth. What lies in `down_to`, an image below, or in what that stands on, is in one source, its own data, at
        the offset that it has on its disk.
        """
        layers = [self._layer_runs(start, stop)]
        while layers:
            run = next(layers[-1], None)
            if run is None:
                layers.pop()
                continue
            layer, begin, end, local = run
            base = layer.base
            if local:
                for piece_start, piece_stop, where in layer.storage.byte_runs(begin, end):
                    yield piece_start, piece_stop, None if where is None else layer.own, where or 0
            elif not isinstance(base, Core):
                assert base is not None
                yield begin, end, base, begin
            elif begin >= base.size:
                continue
            elif base is down_to:
                yield begin, min(end, base.size), base.own, begin
            else:
                layers.append(base._layer_runs(begin, min(end, base.size)))

    def _layer_runs(self, start: int, stop: int) -> Iterator[tuple[_Layer, int, int, bool]]:
        """As `local_runs`, but one at a time: a whole disk may have millions.

        They are those of one moment, with what the image consists of then.
        """
        bitmap, layer = self.bitmap, _Layer(self.storage, self.own, self.base)
        runs = read_runs(self.geometry, bitmap, start, stop) if bitmap is not None else ((start, stop, True),)
        for run_start, run_stop, local in runs:
            yield layer, run_start, run_stop, local

    async def write_out(self, start: int, stop: int) -> None:
        """Have stored bytes leave memory for the disk, where that is possible; promises nothing."""
        for run_start, run_stop, where in self.storage.byte_runs(start, min(stop, self.size)):
            if where is not None:
                await self.data.write_out(where, run_stop - run_start)

    def take_metadata(self, loaded: Core) -> None:
        """Go on with what was just loaded from the same files, as another image, whose place on the base ends."""
        if loaded.base is not None:
            loaded.bases.exchange(loaded.base, loaded, self)
        self.committer, self.storage, self.bitmap, self.table = (
            loaded.committer, loaded.storage, loaded.bitmap, loaded.table
        )  # fmt: skip
        self.own.follow(self.storage, self.committer)
        self.geometry = loaded.geometry

    async def end_copies(self) -> None:
        """Nobody stands on this image any more: make stable what was copied into it. Failures go to the log."""

    def usage(self) -> int:
        """Bytes that the image takes, metadata and data."""
        return usage_of(self.header, self.meta, self.data, self._allocated_chunks)

    def _allocated_chunks(self) -> int:
        return self.table.allocated() if self.table is not None else 0


def stores_of(image: Core) -> list[Store]:
    """Every file of the chain, those of the image first."""
    found: list[Store] = []
    layer: Core | Store | None = image
    while isinstance(layer, Core):
        found += [layer.meta] if layer.data is layer.meta else [layer.meta, layer.data]
        layer = layer.base
    return found if layer is None else [*found, layer]


def damaged_layers(image: Core) -> Iterator[tuple[str, str]]:
    """The images of the chain that are damaged, from the top: name, and `Core.damage`."""
    layer: Core | Store | None = image
    while isinstance(layer, Core):
        if layer.damage:
            yield layer.name, layer.damage
        layer = layer.base


def usage_of(header: Header, meta: Store, data: Store, allocated_chunks: Callable[[], int]) -> int:
    """Bytes that an image takes, metadata and data.

    What the host says of its files; of a device, which says nothing, what the image has in use, for which a compact
    image has to count its `allocated_chunks`.
    """
    if not data.fixed_size:
        return meta.usage() + (data.usage() if data is not meta else 0)
    used = allocated_chunks() * header.chunk_size if header.compact else header.virtual_disk_size
    return used + (header.metadata_size if data is meta else meta.usage())


def _may_hang(store: Store) -> bool:
    return not isinstance(store, HostFile) or store.may_hang


async def close_chain(image: Core) -> None:
    """Give up the files of an image, and of all below it that nobody else stands on."""
    await close_files(image)
    await leave_base(image)


async def leave_base(image: Core) -> None:
    """The image stands on nothing from now on; what nobody else stands on is closed."""
    with trio.CancelScope(shield=True):
        while (base := image.base) is not None:
            image.base = image.followed = None
            async with image.bases.leaving(base, image) as is_last:
                if not is_last:
                    return
                if not isinstance(base, Core):
                    await base.aclose()
                    return
                await base.end_copies()
                await close_files(base)
            image = base


async def close_files(image: Core) -> None:
    """Close an image's own files."""
    await image.meta.aclose()
    if image.data is not image.meta:
        await image.data.aclose()
