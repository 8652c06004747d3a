"""Exports, which hold what of a disk has changed since an earlier state: opening one, and knowing that state again.

An export is an overlay, in FVD or qcow2, with a note (`format/note.py`). Its backing file is not opened here: that need
not be where the export is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from fvdfs.errors import UsageError
from fvdfs.format import note as notes
from fvdfs.format.header import SECTOR
from fvdfs.format.note import CHANGED_SAMPLES, NOTE_OFFSET, NOTE_ROOM, OTHER_SAMPLES, QCOW2_EXTENSION, Note
from fvdfs.format.qcow2 import Placed, read_overlay
from fvdfs.image.chain import open_chain
from fvdfs.image.changes import Change, gaps, spread
from fvdfs.image.core import LastExtents
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image, refuse_damaged
from fvdfs.image.locking import lock_for_reading
from fvdfs.image.policy import FVD_FORMAT, Policy
from fvdfs.store.base import Buffer
from fvdfs.store.host import HostFile, open_path
from fvdfs.store.references import PROBE_SIZE, detect

FORMATS = (FVD_FORMAT, "qcow2")
Read = Callable[[int, int], Awaitable[Buffer]]
"""Reads (offset, length) of a disk, inside it. Raises OSError."""


class Export:
    """An open export. Sizes and offsets in bytes of the disk."""

    def __init__(self, name: str, size: int, parts: Sequence[Change], note: Note | None, file: HostFile) -> None:
        self.name = name
        self.size = size
        self.parts = parts
        """What it holds, in order; not `data`: zeros."""
        self.note = note
        """None: it is an overlay that `fvdfs export` has not made."""
        self.file = file
        """What it lies in."""

    async def read(self, start: int, length: int) -> Buffer:
        """Bytes of one of its parts that has data. Raises OSError."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close its file."""
        await self.file.aclose()


class _FvdExport(Export):
    def __init__(self, image: Image, file: HostFile, parts: Sequence[Change], note: Note | None) -> None:
        super().__init__(image.name, image.size, parts, note, file)
        self._image = image

    async def read(self, start: int, length: int) -> Buffer:
        return await self._image.read(start, length)


class _Qcow2Export(Export):
    def __init__(self, name: str, size: int, places: Sequence[Placed], note: Note | None, file: HostFile) -> None:
        super().__init__(
            name, size, [Change(start, stop, where is not None) for start, stop, where in places], note, file
        )
        self._places = places

    async def read(self, start: int, length: int) -> Buffer:
        data, at = bytearray(length), start
        while at < start + length:
            begin, stop, where = self._places[bisect_right(self._places, at, key=lambda place: place[0]) - 1]
            assert where is not None
            assert begin <= at < stop
            end = min(stop, start + length)
            await self.file.pread(memoryview(data)[at - start : end - start], where + at - begin)
            at = end
        return data


async def open_export(name: str, place: str = "") -> Export:
    """Open the export of this name, and lock it for reading. `place`: where it lies now, if that is elsewhere.

    Raises UsageError where it is none, ImageBusy, ImageError, OSError.
    """
    file = await trio.to_thread.run_sync(lambda: open_path(place or name, writable=False))
    try:
        first = bytearray(PROBE_SIZE)
        await file.pread(memoryview(first), 0)
        kind = detect(bytes(first))
    except BaseException:
        await file.aclose()
        raise
    if kind == FVD_FORMAT:
        await file.aclose()
        return await _open_fvd(name, place or name)
    if kind == "qcow2":
        try:
            return await _open_qcow2(name, file)
        except BaseException:
            await file.aclose()
            raise
    await file.aclose()
    raise UsageError(f"{name}: is neither an FVD nor a qcow2 image, and so no export")


async def _open_fvd(name: str, place: str) -> Export:
    policy = Policy(writable=False, unnamed=((name, place),))
    chain = await trio.to_thread.run_sync(lambda: open_chain(name, policy, top_only=True))
    layer = chain.layers[0]
    try:
        if layer.header.data_file or not layer.header.has_base:
            raise UsageError(f"{name}: is no export, which has a base and its data in its own file")
        await lock_for_reading([layer.meta], chain.layers)
        image = await load_image(name, layer.header, layer.raw_header, layer.meta, layer.meta, None, policy, None)
        refuse_damaged(image)
        found = await image.extents(0, image.size, LastExtents())
        parts = _joined(Change(start, stop, kind == "stored") for start, stop, kind in found if kind != "base")
        raw = bytearray(NOTE_ROOM)
        await layer.meta.pread(memoryview(raw), NOTE_OFFSET)
        return _FvdExport(image, layer.meta, parts, Note.decode(bytes(raw), name))
    except BaseException:
        await chain.aclose()
        raise


async def _open_qcow2(name: str, file: HostFile) -> Export:
    await lock_for_reading([file])

    def read(offset: int, length: int) -> bytes:
        data = bytearray(length)
        return bytes(data[: file.pread_now(memoryview(data), offset)])

    stored = await trio.to_thread.run_sync(lambda: read_overlay(name, read, file.size_now()))
    note = Note.decode(stored.extensions.get(QCOW2_EXTENSION, b""), name)
    return _Qcow2Export(name, stored.size, stored.places, note, file)


def _joined(parts: Iterable[Change]) -> list[Change]:
    found: list[Change] = []
    for part in parts:
        if found and (found[-1].stop, found[-1].data) == (part.start, part.data):
            found[-1] = found[-1]._replace(stop=part.stop)
        else:
            found.append(part)
    return found


# --- the earlier state --------------------------------------------------------------------------


def _samples(export: Export, since_size: int) -> tuple[list[int], list[int]]:
    """The sectors that tell the earlier state, of what has changed and of what has not."""
    size = min(export.size, since_size) // SECTOR * SECTOR
    inside = [(start, min(stop, size)) for start, stop, _ in export.parts if start < size]
    return list(spread(inside, CHANGED_SAMPLES)), list(spread(list(gaps(inside, size)), OTHER_SAMPLES))


async def checksums(export: Export, since_size: int, read: Read) -> tuple[bytes, str]:
    """`Note.changed` and `Note.others` of an export; `read` reads the earlier state. Raises OSError."""
    changed, others = _samples(export, since_size)
    return (
        notes.changed_checksums([bytes(await read(at, SECTOR)) for at in changed]),
        notes.others_checksum([bytes(await read(at, SECTOR)) for at in others]),
    )


async def is_earlier_state(export: Export, read: Read) -> bool:
    """Whether what `read` reads can be the state that an export is since, or one that a restore of it has left.

    Raises OSError.
    """
    note = export.note
    assert note is not None
    changed, others = _samples(export, note.since_size)
    if notes.others_checksum([bytes(await read(at, SECTOR)) for at in others]) != note.others:
        return False
    for number, at in enumerate(changed):
        found = bytes(await read(at, SECTOR))
        if not notes.is_changed_sample(note, number, found) and found != await _new(export, at):
            return False
    return True


async def _new(export: Export, at: int) -> bytes:
    """A sector of an export's parts."""
    part = export.parts[bisect_right(export.parts, at, key=lambda part: part.start) - 1]
    return bytes(await export.read(at, SECTOR)) if part.data else bytes(SECTOR)
