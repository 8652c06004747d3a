"""What of their disks programs have used lately, for moves: a target fetches that first.

Requests that reach the mount are counted (`cow/heat.py`), those of all disks, since one is served only a moment before
it moves. What the kernel answers from its page cache is not, nor are the requests for a disk that is passed through.
"""

from __future__ import annotations

import logging

import trio

from fvdfs.errors import FvdError
from fvdfs.format import hot
from fvdfs.image.image import Image
from fvdfs.image.profiling import keep_profile
from fvdfs.ops.background import stop_prefetching
from fvdfs.ops.inodes import Entry, Inodes
from fvdfs.ops.openings import Openings
from fvdfs.sizes import human_size
from fvdfs.store.locations import Location
from fvdfs.store.source import hot_blocks as hot_blocks_of_source

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds


async def let_cool(inodes: Inodes) -> None:
    """Have time pass for the heat of all open disks, once a second while any is used. Runs for ever."""
    last = trio.current_time()
    while True:
        await inodes.used.wait()
        inodes.used, now = trio.Event(), trio.current_time()
        for entry in [*inodes.busy]:
            entry.heat.pass_time(now - last)
            await trio.lowlevel.checkpoint()  # each may take some milliseconds
        last = now
        await trio.sleep(INTERVAL)


def hot_blocks(entry: Entry) -> bytes:
    """What was used lately, for `xattrs.HOT`: until the disk was frozen, if it is. Then only targets read it."""
    if entry.record.obstacle and entry.hot is not None:
        return entry.hot
    size = entry.image.size if entry.image is not None else entry.size
    return hot.encode(entry.heat.extents(size, hot.MOST))


async def fetch_hot_first(openings: Openings, entry: Entry, image: Image, source: Location) -> None:
    """Have an image that was taken over be copied in the order of its source's last use, where it wants that.

    It is kept as the profile of the image, so that another opening goes on in this order; one on a template asks again.
    Whatever fails is only logged: then all is copied by address.
    """
    header, into = image.header, entry.record.incoming
    if header.profile_directed_prefetch_start_delay < 0 or header.prefetch_profile_entries or not image.writable:
        return
    try:
        extents = await hot_blocks_of_source(source, openings.folder.policy.tls_creds, image.base_range()[1])
    except (FvdError, OSError) as error:
        log.warning("%s: what its source used last is not known, all is copied by address: %s", image.name, error)
        return
    async with entry.lock:
        if entry.image is not image or not image.writable or entry.record.incoming != into or not extents:
            return
        size = sum(stop - start for start, stop in extents)
        log.info("%s: copies first what its source used last, %s", image.name, human_size(size))
        await stop_prefetching(entry)
        if image.followed is not None:  # its header is one of an image on a template, which copies nothing
            openings.background.prefetch(entry, image, extents)
            return
        whole, delay = header.prefetch_start_delay > 0, header.prefetch_start_delay
        openings.background.prefetch(entry, image, extents, whole=whole, delay=delay)
        image.recorder = None  # what it has noted would replace this
        await keep_profile(image, extents)
