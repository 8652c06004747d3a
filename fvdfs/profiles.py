"""What `fvdfs profile` does, and `create --profile`: profiles of images that are not open. Blocks."""

from __future__ import annotations

import os

import trio

from fvdfs.chain import Policy, open_chain
from fvdfs.commit import Committer
from fvdfs.cow.profile import Extent, decode, from_text
from fvdfs.errors import NotFvd, UsageError
from fvdfs.header import HEADER_SIZE, PROFILE_ENTRY_SIZE, SECTOR, round_up

MAX_TEXT = 64 << 20  # bytes


def read_profile(path: str) -> list[Extent]:
    """The profile in an image, or in a file of its own.

    Raises UsageError where there is none, ImageError, OSError.
    """
    try:
        extents = _of_image(path)
    except NotFvd:
        if os.path.getsize(path) > MAX_TEXT:
            raise UsageError(f"{path}: neither an FVD image nor a profile") from None
        with open(path, encoding="ascii", errors="replace") as file:
            extents = from_text(file.read(), path)
    if not extents:
        raise UsageError(f"{path}: holds no profile; have one recorded with: fvdfs profile record IMAGE")
    return extents


def _of_image(path: str) -> list[Extent]:
    chain = open_chain(path, Policy(writable=False), top_only=True)
    layer = chain.layers[0]
    try:
        region = layer.header.profile_region
        if region is None:
            return []
        data = bytearray(region.size)
        layer.meta.pread_now(memoryview(data), region.offset)
        header = layer.header
        return decode(bytes(data), header.prefetch_profile_entries, header.unit_of_PrefetchProfileEntry_len)
    finally:
        layer.meta.close()


def record_profile(path: str) -> None:
    """Have the next opening of the image for writing record a profile.

    Raises UsageError where it has no base or no room for one, ImageBusy, ImageError, OSError.
    """
    layer = open_chain(path, Policy(), top_only=True).layers[0]
    header = layer.header
    try:
        if not header.has_base:
            raise UsageError(f"{path}: has no base, and so nothing to prefetch")
        if header.profile_room.size < PROFILE_ENTRY_SIZE:
            raise UsageError(f"{path}: was made without room for a profile; make a new image with fvdfs create")
        if not layer.meta.writable:
            raise UsageError(f"{path}: no permission to write to it")
        layer.meta.lock(exclusive=True)
        layer.check_unchanged()
        raw = layer.raw_header[: round_up(HEADER_SIZE, SECTOR)]
        committer = Committer(header, raw, layer.meta, layer.meta, None, None)
        trio.run(lambda: committer.change_header(generate_prefetch_profile=1))
    finally:
        layer.meta.close()
