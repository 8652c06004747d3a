"""`fvdfs profile`: profiles of images that are not open. Blocks."""

from __future__ import annotations

import json
import os

from fvdfs.commands.amend import change_header, opened_to_amend
from fvdfs.errors import NotFvd, UsageError
from fvdfs.format.header import PROFILE_ENTRY
from fvdfs.format.profile import Extent, decode, from_text, to_text
from fvdfs.image.chain import open_chain
from fvdfs.image.policy import Policy

MAX_TEXT = 64 << 20  # bytes of a profile as text, which is read as a whole


def run(command: str, image: str, *, as_json: bool) -> int:
    """`record` a profile, or `show` the one that there is. Raises as `record_profile`, `read_profile`, UsageError."""
    if command == "record":
        if as_json:
            raise UsageError("--json is for show")
        record_profile(image)
    elif as_json:
        print(json.dumps([{"start": start, "length": stop - start} for start, stop in read_profile(image)]))
    else:
        print(to_text(read_profile(image)), end="")
    return 0


def read_profile(path: str) -> list[Extent]:
    """The profile in an image, or in a file of its own.

    Raises UsageError where there is none, ImageError, OSError.
    """
    try:
        extents = profile_of_image(path)
    except NotFvd:
        if os.path.getsize(path) > MAX_TEXT:
            raise UsageError(f"{path}: neither an FVD image nor a profile") from None
        with open(path, encoding="ascii", errors="replace") as file:
            extents = from_text(file.read(), path)
    if not extents:
        raise UsageError(f"{path}: holds no profile; have one recorded with: fvdfs profile record IMAGE")
    return extents


def profile_of_image(path: str) -> list[Extent]:
    """The profile in an image; empty where it has none. Raises ImageError, OSError."""
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
    with opened_to_amend(path) as layer:
        header = layer.header
        if not header.has_base:
            raise UsageError(f"{path}: has no base, and so nothing to prefetch")
        if header.profile_room.size < PROFILE_ENTRY.size:
            raise UsageError(f"{path}: was made without room for a profile; make a new image with fvdfs create")
        change_header(layer, generate_prefetch_profile=1)
