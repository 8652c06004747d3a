"""Snapshots of the disks of a mount, open or not: programs that have one open go on without noticing.

The names in the folder change as `layers/snapshot.py` says, the image in memory as `image/stacking.py`. The kernel's
pages stay right, since the content does not change; so does the inode number, although the file is another one.
What copies from the base (copy-on-read, prefetching, a profile that is recorded) ends before. Afterwards the snapshot
goes on with it as a base image, which keeps its content.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from fvdfs.errors import FvdError, MovedAway, UsageError, reason_of
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image
from fvdfs.image.migration import read_record
from fvdfs.image.profiling import write_profile
from fvdfs.layers import snapshot
from fvdfs.layers.newtop import new_top, replace, write_top
from fvdfs.ops.background import stop_prefetching
from fvdfs.ops.inodes import Entry
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthrough
from fvdfs.store.host import HostFile
from fvdfs.store.placing import sync_folder

log = logging.getLogger(__name__)

COPIES_PATIENCE = 10.0  # seconds that reads of the base may take to end, before the snapshot is given up


async def make_snapshot(openings: Openings, entry: Entry, name: str) -> None:
    """Make a snapshot of a disk; `name`: empty for the next number. `Entry.snapshot` tells its path.

    Raises OSError, ImageError; `Entry.refused` tells why in words.
    """
    try:
        await openings.open(entry.inode, write=True)
        try:
            with trio.CancelScope(shield=True):
                async with entry.lock:
                    assert entry.image is not None
                    entry.snapshot = await _make(openings, entry, entry.image, name)
        finally:
            await openings.close(entry)
    except (FvdError, OSError) as error:
        entry.refused = reason_of(error)
        if isinstance(error, UsageError):
            raise OSError(errno.EINVAL, str(error)) from error
        raise


async def _make(openings: Openings, entry: Entry, image: Image, name: str) -> str:
    path = os.fsdecode(entry.path)
    if entry.record.receiving:
        raise MovedAway(path, entry.record.obstacle)
    if image.followed is not None:
        raise UsageError(f"{path}: still follows its source, on top of a template: wait until all is local")
    if isinstance(entry.passthrough, Passthrough):
        raise UsageError(
            f"{path}: the kernel reads and writes its data by itself; close the disk, then: fvdfs snapshot {path}"
        )
    if entry.merging:
        raise UsageError(f"{path}: what it stands on is being merged into it; wait for that, or end it by Ctrl-C there")
    if image.damage:
        raise OSError(errno.EIO, f"{path}: {image.damage}")
    assert isinstance(image.meta, HostFile)
    old = image.meta
    await trio.to_thread.run_sync(snapshot.refuse_what_cannot_be, path)
    under = await trio.to_thread.run_sync(snapshot.snapshot_path, path, name, old.identity)
    new = new_top(image.header, os.path.basename(under))
    file, place = await trio.to_thread.run_sync(write_top, path, new, old, entry.mtime.ns)
    turn = Turn()
    try:
        top = await load_top(openings, path, file)

        async def rename() -> None:
            await top.fit(image.size)
            await trio.to_thread.run_sync(replace, place, path, old.identity)
            turn.is_taken = True

        sync = functools.partial(trio.to_thread.run_sync, sync_folder, os.path.dirname(path))
        async with other_file(openings, entry, image, top, turn):
            await trio.to_thread.run_sync(snapshot.add_name, path, under, old.identity)
            entry.snapshot_wait = await image.put_on_top(top, under, rename, sync)
    except BaseException:
        if not turn.is_taken:
            await file.aclose()
            await trio.to_thread.run_sync(_remove, place, under, old)
        raise
    log.info("%s: snapshot %s; writers waited %.1f ms", path, under, entry.snapshot_wait * 1000)
    try:
        await openings.share(image)
    except (FvdError, OSError) as error:
        log.error("%s: what is read of its base is not kept: %s", under, error)
    return under


@dataclass(slots=True)
class Turn:
    """The moment in which the image of an open disk gets another file."""

    is_taken: bool = False
    """Whether the file has the image's name."""


@asynccontextmanager
async def other_file(openings: Openings, entry: Entry, image: Image, parts: Image, turn: Turn) -> AsyncIterator[None]:
    """An open disk goes on in the file of these parts, if the turn is taken meanwhile; `Entry.lock` is held.

    What copies from the base ends before; afterwards it is done as the header says then. Raises OSError.
    """
    assert isinstance(parts.meta, HostFile)
    status = await trio.to_thread.run_sync(parts.meta.status)
    entry.former = [*entry.former, entry.status, status]
    openings.folder.inodes.note(entry)
    try:
        await stop_copies(entry, image)
        yield
    finally:
        if turn.is_taken:
            entry.record = await trio.to_thread.run_sync(read_record, parts.meta)
            entry.status = status
            entry.cached = None
            data_elsewhere = parts.data is not parts.meta or parts.meta.fixed_size
            await entry.mtime.move(parts.meta, openings.background.spawn if data_elsewhere else None)
            openings.opened(entry, image)
        await begin_copies(openings, entry, image)


async def load_top(openings: Openings, path: str, file: HostFile) -> Image:
    """The new top, empty and locked, without its base. Raises ImageBusy, OSError."""
    file.file_lock.with_qemu = openings.folder.policy.qemu_locks
    await trio.to_thread.run_sync(file.lock, True)
    await trio.to_thread.run_sync(file.file_lock.keep_unfilled)
    raw = bytearray(HEADER_SPACE)
    await file.pread(memoryview(raw), 0)
    header = Header.decode(bytes(raw), path)
    return await load_image(
        path, header, bytes(raw), file, file, None, openings.folder.policy, openings.background.spawn
    )


async def stop_copies(entry: Entry, image: Image) -> None:
    """Raises OSError where the base does not answer; then copies go on."""
    await stop_prefetching(entry)
    fetcher, image.fetcher = image.fetcher, None
    if fetcher is not None:
        with trio.move_on_after(COPIES_PATIENCE) as waiting:
            await fetcher.close()
        if waiting.cancelled_caught:
            raise OSError(errno.EAGAIN, f"{image.name}: its base does not answer; try again when it does")
    await write_profile(image)
    image.recorder = None


async def begin_copies(openings: Openings, entry: Entry, image: Image) -> None:
    """What the header of the image asks for now. What cannot be done is logged, as nobody waits for it."""
    if image.header.copy_on_read:
        image.start_fetching(copy_on_read=True)
    try:
        await openings.background.begin(entry, image)
    except OSError as error:
        log.error("%s: %s", image.name, error)


def _remove(place: str, under: str, old: HostFile) -> None:
    os.unlink(place)
    snapshot.remove_name(under, old.identity)
