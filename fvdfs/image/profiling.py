"""The prefetch profile of an open image: what to fetch first, and what was read first."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fvdfs.cow.recorder import Recorder
from fvdfs.format.header import PAGE, PROFILE_ENTRY
from fvdfs.format.profile import Extent, decode, encode
from fvdfs.image.core import Core
from fvdfs.image.reading import read_padded

log = logging.getLogger(__name__)


async def read_profile(image: Core) -> list[Extent]:
    """The extents to be fetched first; none where there is no usable profile. Raises OSError."""
    header = image.header
    region = header.profile_region
    if region is None:
        if header.prefetch_profile_entries:
            log.warning("%s: its prefetch profile makes no sense and is not used", image.name)
        return []
    data = bytearray(region.size)
    await read_padded(image.meta, memoryview(data), region.offset)
    return decode(bytes(data), header.prefetch_profile_entries, header.unit_of_PrefetchProfileEntry_len)


def record_profile(image: Core) -> bool:
    """Take down from now on what is read first; False where the image has no room for a profile, or no base."""
    room = image.header.profile_room.size // PROFILE_ENTRY.size
    if image.bitmap is None or not image.writable or not room:
        return False
    image.recorder = Recorder(image.geometry.base_size, room)
    return True


async def write_profile(image: Core) -> None:
    """Store what was recorded, if anything was. That it cannot be is only logged."""
    if image.recorder is None or not image.recorder.extents or image.committer.failed is not None:
        return
    await keep_profile(image, image.recorder.extents)


async def keep_profile(image: Core, extents: Sequence[Extent]) -> None:
    """Store the first of these, as many as there is room for. That they cannot be is only logged."""
    data, entries = encode(extents, PAGE, image.header.profile_room.size)
    try:
        await image.committer.write_profile(data, entries, PAGE)
    except OSError as error:
        log.error("%s: the prefetch profile could not be kept: %s", image.name, error)
