"""`fvdfs export`: write what of a disk has changed since an earlier state of it into an overlay over that.

The overlay holds whole blocks (FVD) or clusters (qcow2): the rest of one that has changed in part is read from the
disk, so that nothing has to be known of the backing file but its name. Zeros are not stored, and noted as such: what
was discarded hides what the earlier state has there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from fvdfs import daemon
from fvdfs.commands.convert import PIECE, Permission, Progress, format_of_name, in_workers, open_target, permitted
from fvdfs.commands.exports import FORMATS, checksums, open_export
from fvdfs.commands.newfiles import NewFiles, permissions
from fvdfs.commands.sides import NamedSide, Side, StoreSide, stores_of
from fvdfs.commands.states import find_below, image_of, open_state
from fvdfs.commands.terminal import progress_bar
from fvdfs.cow.planner import zero_runs
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.format.creation import CreateOptions, default_block_size
from fvdfs.format.header import SECTOR, round_up
from fvdfs.format.note import NOTE_OFFSET, QCOW2_EXTENSION, Note
from fvdfs.format.qcow2 import CLUSTER, Overlay, Placed
from fvdfs.image.changes import Change, changes, in_units
from fvdfs.image.image import Image
from fvdfs.image.policy import FVD_FORMAT
from fvdfs.store.base import Buffer, Store
from fvdfs.store.host import HostFile
from fvdfs.store.qemu_store import host_files
from fvdfs.store.references import RAW


@dataclass(frozen=True, slots=True)
class Backing:
    """What an overlay names as its base."""

    name: str
    """As it is written into the overlay: relative to its folder."""
    format: str


def run(
    disk: str,
    target: str,
    *,
    since: str,
    target_format: str,
    backing: Backing,
    options: Sequence[str],
    force: bool,
    secret: str,
) -> int:
    """Export, with a progress bar, and tell the user what to know about it. Raises as `export`."""
    target_format = target_format or format_of_name(target)
    if target_format not in FORMATS:
        raise UsageError(f"{target}: say which format it shall have: --format {' or '.join(FORMATS)}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise UsageError(f"{target}: an export is a file; choose another name")
    image = image_of(disk)
    allowed = permitted(options, secret)
    with progress_bar() as progress:
        work = functools.partial(export, image, target, since, target_format, backing, allowed, force, progress)
        for remark in daemon.run_loop(work):
            daemon.complain(remark)
    return 0


async def export(
    image: str,
    target: str,
    since: str,
    target_format: str,
    backing: Backing,
    allowed: Permission,
    force: bool,
    progress: Progress,
) -> list[str]:
    """Make `target` an overlay with what of the image has changed since that state; remarks for the user.

    An empty name of the backing: the earlier state, which for qcow2 is to be a raw file of its name beside the overlay.
    Raises UsageError, ImageBusy, ImageError, OSError; what had the target's name is then still there.
    """
    disk = await open_state(image, allowed)
    try:
        path, below = find_below(disk, image, since)
        earlier: Side = below if isinstance(below, Image) else StoreSide(below, await _size(below), keep_open=True)
        stores = stores_of(disk)
        mode = permissions([file for store in stores for file in host_files(store)])
        with NewFiles(force=force, mode=mode) as files:
            files.protect(stores)
            if allowed.secret_file:
                files.protect_file(allowed.secret_file)
            found = [change async for change in changes(disk, below)]
            source = NamedSide(disk, image)
            if target_format == FVD_FORMAT:
                remarks = await _write_fvd(
                    files, source, found, target, _fvd_backing(backing, path, target), earlier.size, allowed, progress
                )
                placed = _in_padding
            else:
                remarks, overlay = [], _overlay(source.size, earlier.size, found, _qcow2_backing(backing, path))
                await _write_qcow2(files, source, overlay, target, progress)
                placed = functools.partial(_in_header, overlay)
            note = await _note(files, target, image, path, earlier)
            offset, data = placed(note)
            await files.files[-1].store.pwrite(data, offset)
            await trio.to_thread.run_sync(files.publish)
            return remarks
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()


async def _size(store: Store) -> int:
    return round_up(await store.size(), SECTOR)


# --- FVD ----------------------------------------------------------------------------------------


def _fvd_backing(backing: Backing, since: str, target: str) -> Backing:
    """What the overlay names as its base: what the user has chosen, or the earlier state."""
    if backing.name:
        return backing
    folder = os.path.realpath(os.path.dirname(target) or ".")
    path = os.path.realpath(since)
    is_beside = os.path.dirname(path) == folder
    return Backing(os.path.basename(path) if is_beside else path, backing.format)


async def _write_fvd(
    files: NewFiles,
    source: Side,
    found: Sequence[Change],
    path: str,
    backing: Backing,
    since_size: int,
    allowed: Permission,
    progress: Progress,
) -> list[str]:
    """Make the overlay; remarks for the user. Raises UsageError, ImageError, OSError."""
    unit = default_block_size(min(source.size, since_size))
    options = CreateOptions(base_img=backing.name, base_img_fmt=backing.format, block_size=unit)
    target, remarks = await open_target(files, path, FVD_FORMAT, source.size, options, allowed)
    assert isinstance(target, Image)
    try:
        if target.header.base_size != min(source.size, since_size):
            raise UsageError(f"--base {backing.name}: has another size than the earlier state, {since_size} bytes")
        parts = in_units(found, unit, source.size)
        await _fill(source, target, [(start, stop, start if data else None) for start, stop, data in parts], progress)
        for start, stop, data in in_units(found, unit, source.size):
            if not data:
                await target.zero(start, stop)
        await target.fsync()
    except BaseException:
        target.writable = False  # nothing is committed: it will be discarded
        with trio.CancelScope(shield=True):
            await target.close()
        raise
    with trio.CancelScope(shield=True), named(path):
        await target.close()
    return remarks


def _in_padding(note: Note) -> tuple[int, bytes]:
    return NOTE_OFFSET, note.encode()


# --- qcow2 --------------------------------------------------------------------------------------


class _Clusters:
    """A new qcow2 file as a place for data; what is not written in it is zeros."""

    def __init__(self, store: HostFile) -> None:
        self._store = store

    async def write(self, offset: int, data: Buffer) -> None:
        await self._store.pwrite(data, offset)

    async def zero(self, start: int, stop: int) -> None:
        """Nothing is to be done."""


def _qcow2_backing(backing: Backing, since: str) -> Backing:
    """What the overlay names as its backing file: QEMU knows no FVD."""
    if backing.name:
        return Backing(backing.name, backing.format or RAW)
    return Backing(f"{os.path.splitext(os.path.basename(since))[0]}.raw", RAW)


def _overlay(size: int, since_size: int, found: Sequence[Change], backing: Backing) -> Overlay:
    """Behind the end of its backing file an overlay reads as zeros: they would take tables there."""
    end = round_up(since_size, CLUSTER)
    inside = [change if change.data else change._replace(stop=min(change.stop, end)) for change in found]
    parts = in_units((change for change in inside if change.start < change.stop), CLUSTER, size)
    return Overlay(size, list(parts), backing.name, backing.format)


async def _write_qcow2(files: NewFiles, source: Side, overlay: Overlay, path: str, progress: Progress) -> None:
    """Make the overlay. Raises UsageError, ImageError, OSError."""
    file = await trio.to_thread.run_sync(files.add, path)
    await trio.to_thread.run_sync(files.look_at_images)

    def write_metadata() -> None:
        os.ftruncate(file.store.fileno(), overlay.file_size)
        for offset, data in overlay.metadata():
            file.store.pwrite_now(data, offset)

    with named(path):
        await trio.to_thread.run_sync(write_metadata)
        await _fill(source, _Clusters(file.store), list(overlay.places()), progress)


def _in_header(overlay: Overlay, note: Note) -> tuple[int, bytes]:
    return 0, replace(overlay, extensions=((QCOW2_EXTENSION, note.encode()),)).header()


# --- both ---------------------------------------------------------------------------------------


class _Sink(Protocol):
    """Where data goes. Offsets in bytes. Raises OSError."""

    async def write(self, offset: int, data: Buffer, /) -> None:
        """Write all of `data`."""

    async def zero(self, start: int, stop: int, /) -> None:
        """Have bytes [start, stop) read as zeros."""


async def _fill(source: Side, sink: _Sink, places: Sequence[Placed], progress: Progress) -> None:
    """Copy the parts that have a place: zeros, which need none, are not stored. Raises ImageError, OSError."""
    whole = sum(stop - start for start, stop, where in places if where is not None)
    todo = _pieces(places)
    done = 0

    async def work() -> None:
        nonlocal done
        for start, stop, where in todo:
            data = await source.read(start, stop - start)
            if len(data) < stop - start:
                raise ImageError("the disk", f"it ends at {start + len(data)} bytes")
            view = memoryview(data)
            for begin, end, zero in zero_runs(start, view):
                to = where + begin - start
                await (sink.zero(to, to + end - begin) if zero else sink.write(to, view[begin - start : end - start]))
            done += stop - start
            progress(done, whole)
            await trio.lowlevel.checkpoint()

    await in_workers(work)


def _pieces(places: Sequence[Placed]) -> Iterator[tuple[int, int, int]]:
    for start, stop, where in places:
        if where is not None:
            at = start
            while at < stop:
                end = min(stop, at // PIECE * PIECE + PIECE)
                yield at, end, where + at - start
                at = end


async def _note(files: NewFiles, path: str, image: str, since: str, earlier: Side) -> Note:
    """What the new overlay is to say of itself. Raises ImageError, OSError."""
    export = await open_export(path, files.files[-1].place)
    try:
        with named(since):
            changed, others = await checksums(export, earlier.size, earlier.read)
    finally:
        with trio.CancelScope(shield=True):
            await export.close()
    written = int(os.stat(since).st_mtime)
    return Note(
        disk=os.path.basename(image),
        since=os.path.basename(since),
        size=export.size,
        since_size=earlier.size,
        since_time=max(0, written),
        changed=changed,
        others=others,
    )
