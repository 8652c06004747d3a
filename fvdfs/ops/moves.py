"""Moves of the disks of a mount to other hosts, and from them: what programs that have a disk open notice of it.

What may follow on what, `format/migration.py` says; docs/migration.md has the whole table. A step is asked for through
an extended attribute (`xattrs.MOVE`):

    serve | freeze | handover EPOCH TARGET NAME | thaw | thaw lose-writes | release [EPOCH TARGET]

A freeze: what copies from the base ends; writers are kept out, and what was written is made stable; the image is
closed, clean; its record says so, and is stable; then whoever waited to write gets EROFS, and so do all who come later.
Programs keep the disk open, and read it. Where anything fails before the record is stable, the disk is written on.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from fvdfs.errors import FvdError, MovedAway, UsageError
from fvdfs.format import migration
from fvdfs.format.migration import Record
from fvdfs.image.image import Image
from fvdfs.image.locking import lock_for_writing, unlock_for_writing
from fvdfs.image.migration import new_number, read_record, write_record
from fvdfs.image.policy import Policy
from fvdfs.ops.inodes import Entry
from fvdfs.ops.keeping import begin_writing
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.snapshots import begin_copies, stop_copies
from fvdfs.store.host import HostFile

log = logging.getLogger(__name__)

Event = Callable[[Record], Record]


async def take_step(openings: Openings, entry: Entry, text: str) -> None:
    """Do what is asked for. Raises OSError, ImageError; `Entry.move_refused` tells why in words."""
    entry.move_refused = ""
    try:
        event = _event(text)
        with trio.CancelScope(shield=True):
            async with _opened(openings, entry) as image:
                await _change(openings, entry, image, event)
    except (FvdError, OSError) as error:
        entry.move_refused = str(error) if isinstance(error, FvdError) else error.strerror or str(error)
        if isinstance(error, UsageError):
            raise OSError(errno.EINVAL, str(error)) from error
        raise


def _event(text: str) -> Event:
    """Raises UsageError for what makes no sense."""
    match text.split(" ", 3):
        case ["serve"]:
            return functools.partial(migration.serve, new_epoch=new_number())
        case ["freeze"]:
            return functools.partial(migration.freeze, new_epoch=new_number())
        case ["handover", epoch, target, name] if migration.is_number(epoch) and migration.is_number(target):
            return functools.partial(migration.hand_over, epoch=epoch, target=target, name=name)
        case ["thaw"]:
            return functools.partial(migration.thaw, lose_writes=False)
        case ["thaw", "lose-writes"]:
            return functools.partial(migration.thaw, lose_writes=True)
        case ["release"]:
            return migration.release
        case ["release", epoch, target] if migration.is_number(epoch) and migration.is_number(target):
            return functools.partial(migration.release, epoch=epoch, target=target)
    raise UsageError("is no step of a move")


@asynccontextmanager
async def _opened(openings: Openings, entry: Entry) -> AsyncIterator[Image]:
    """The image, its entry locked; open for writing, so that it is recovered after a crash, where it may be written."""
    try:
        await openings.open(entry.inode, write=True)
    except MovedAway:
        await openings.open(entry.inode, write=False)
    try:
        async with entry.lock:
            assert entry.image is not None
            yield entry.image
    finally:
        await openings.close(entry)


async def _change(openings: Openings, entry: Entry, image: Image, event: Event) -> None:
    assert isinstance(image.meta, HostFile)
    before = await trio.to_thread.run_sync(read_record, image.meta)
    entry.record = before
    after = event(before)
    if after == before:
        return
    await _refuse_passthrough(openings, entry)
    policy = openings.folder.policy
    if image.writable and after.obstacle:
        await _freeze(openings, entry, image)
    elif not image.writable:
        await lock_for_writing(image)
    try:
        await trio.to_thread.run_sync(write_record, image.meta, after)
        entry.record = after
        log.info("%s: move: %s", image.name, after.obstacle or after.state or "over")
    finally:
        await entry.mtime.restore()
        if not image.writable:
            await unlock_for_writing(image)
        if not image.writable and not entry.record.obstacle and entry.for_writing:
            await _go_on(openings, policy, entry, image)


async def _refuse_passthrough(openings: Openings, entry: Entry) -> None:
    """Raise UsageError where the kernel writes the disk by itself: nobody could keep it from that."""
    if isinstance(entry.passthrough, Passthrough):
        if entry.opens > 1:
            raise UsageError(
                f"{os.fsdecode(entry.path)}: the kernel reads and writes its data by itself; close the disk first, "
                "or mount its folder with -o writeback=on"
            )
        await openings.end_passthrough(entry)


async def _freeze(openings: Openings, entry: Entry, image: Image) -> None:
    """Have nobody write the image, and close it as far as others can see. Raises UsageError, OSError."""
    if image.base_writer is not None:
        raise UsageError(f"{image.name}: is a cache that writes to its base (--update-base), which cannot move")
    if image.damage:
        raise OSError(errno.EIO, f"{image.name}: {image.damage}")
    try:
        await stop_copies(entry, image)
        await image.freeze()
    except BaseException:
        await _go_on(openings, openings.folder.policy, entry, image)
        raise


async def _go_on(openings: Openings, policy: Policy, entry: Entry, image: Image) -> None:
    """Programs that have it open for writing may write again. Failures go to the log: the disk can be closed."""
    try:
        if image.writable:
            await begin_copies(openings, entry, image)
            return
        await begin_writing(entry, image, policy, openings.background)
    except (FvdError, OSError) as error:
        log.error("%s: cannot be written until it is opened again: %s", image.name, error)
