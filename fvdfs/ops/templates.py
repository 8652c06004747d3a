"""Moves on top of a template that both hosts have (`image/following.py`): what source and target do in a mount.

The source is asked whether a disk stands on the template of a stamp, and, once the disk has moved, for the map of what
it has beyond that. It is kept with the disk, to be read in parts (`xattrs.OWN`). The target sees that its own template
still has this stamp, then fetches the map, for as long as it takes; then what the map names is copied.
"""

from __future__ import annotations

import logging
import os

import trio

from fvdfs.cow.own import Head
from fvdfs.errors import FvdError, UsageError
from fvdfs.format.header import SECTOR
from fvdfs.format.mailbox import MAP_EXPORT, Wish
from fvdfs.format.migration import Incoming, Record
from fvdfs.image.core import Core
from fvdfs.image.following import find_template, own_bits, stamp_of_layer, take_all, take_map
from fvdfs.image.image import Image
from fvdfs.ops.inodes import Entry
from fvdfs.ops.openings import Openings
from fvdfs.store.base import Store
from fvdfs.store.locations import Location
from fvdfs.store.nbd_client import nbd_client
from fvdfs.store.source import ask

log = logging.getLogger(__name__)

PART = 32 << 10  # bytes of a map in an extended attribute
_READ = 1 << 20  # bytes of a map that are read at a time
_PATIENCE = 3.0  # seconds for the source to make the map, each time
_RETRY = 2.0  # seconds before it is asked again


# --- the source -------------------------------------------------------------------------------------


async def stand(openings: Openings, entry: Entry, stamp: str) -> None:
    """See that a disk stands on a template of this stamp. Raises UsageError where it does not, ImageError, OSError."""
    await openings.open(entry.inode, write=False, keep_copies=False)
    try:
        assert entry.image is not None
        await _template(entry, entry.image, stamp)
    finally:
        await openings.close(entry)


async def _template(entry: Entry, image: Image, stamp: str) -> Core | Store:
    if image.followed is not None:
        raise UsageError("it still follows its own source, on top of a template: wait until all is local")
    template = await find_template(image, stamp)
    if template is None:
        raise UsageError(f"{os.fsdecode(entry.name)} stands on no template of this size and content")
    return template


async def make_map(openings: Openings, entry: Entry, epoch: str, target: str, stamp: str) -> None:
    """Make the map for the target that has the disk. Raises UsageError, ImageError, OSError."""
    _refuse_others(entry.record, epoch, target)
    await openings.open(entry.inode, write=False, keep_copies=False)
    try:
        assert entry.image is not None
        template = await _template(entry, entry.image, stamp)
        found = await trio.to_thread.run_sync(own_bits, entry.image, template)
        entry.own = await trio.to_thread.run_sync(found.encode, epoch, stamp)
        _refuse_others(entry.record, epoch, target)
    finally:
        await openings.close(entry)


def _refuse_others(record: Record, epoch: str, target: str) -> None:
    out = record.outgoing
    if out is None or not record.handed_over or (out.epoch, out.target) != (epoch, target):
        raise UsageError("has not moved to this target")


# --- the target -------------------------------------------------------------------------------------


async def learn_map(openings: Openings, entry: Entry, image: Image, into: Incoming, location: Location) -> None:
    """Have what follows be copied, beyond the template alone where that can be known, else all; as long as it is open.

    Failures go to the log.
    """
    assert image.followed is not None
    complaint = ""
    try:
        template = image.followed.base
        assert template is not None
        if await stamp_of_layer(template) != into.stamp:
            log.error("%s: its base is not the template of its source any more: all of the disk is copied", image.name)
            take_all(image)
            return
        while image.followed is not None:
            try:
                await _fetch_map(openings, image, into, location)
                return
            except UsageError as error:
                log.error("%s: %s: all of the disk is copied", image.name, error)
                take_all(image)
                return
            except (FvdError, OSError, ValueError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.warning("%s: what its source has beyond the template is not known yet: %s", image.name, error)
            with trio.move_on_after(_RETRY):
                await entry.unloaded.wait()
                return
    except (FvdError, OSError) as error:
        log.error("%s: its base: %s: all of the disk is copied", image.name, error)
        take_all(image)


async def _fetch_map(openings: Openings, image: Image, into: Incoming, location: Location) -> None:
    """Raises UsageError where the source refuses, ImageError, OSError, ValueError."""
    creds = openings.folder.policy.tls_creds
    await ask(location, creds, into, Wish.MAP, _PATIENCE)
    async with nbd_client(location, f"/{into.epoch}{MAP_EXPORT}", creds) as export:
        head = Head.decode(await export.pread(SECTOR, 0))
        if (head.epoch, head.stamp) != (into.epoch, into.stamp):
            raise ValueError("the map is that of another move")
        data = bytearray()
        while len(data) < head.length:
            data += await export.pread(min(_READ, head.length - len(data)), SECTOR + len(data))
    own, unit = head.bitmap(bytes(data)), head.unit
    layer = image.followed
    if layer is None:
        return
    if head.size != layer.size:
        raise UsageError(f"the map is that of a disk of {head.size} bytes, and not {layer.size}")
    take_map(image, own, unit)
    log.info("%s: %d bytes are its source's own", image.name, own.count_local() * unit)
