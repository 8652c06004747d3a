"""What the source of a moving disk says of its use: a profile (`format/profile.py`), what was used most lately first.

    8 bytes magic | u32 entries | u32 CRC-32 of these | entries as in an image, lengths in pages | whatever

The source exports it as NAME/hot, read-only. It is advice from another host: what makes no sense is refused as a whole.
Pure.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from fvdfs.format import profile
from fvdfs.format.header import PAGE, PROFILE_ENTRY
from fvdfs.format.profile import Extent

EXPORT = "/hot"
"""What follows the name of the disk."""
SIZE = 64 << 10  # bytes: an extended attribute can have no more
_HEAD = struct.Struct("<8sII")
_MAGIC = b"FVDhot01"
MOST = (SIZE - _HEAD.size) // PROFILE_ENTRY.size  # extents


def encode(extents: Sequence[Extent]) -> bytes:
    """What says this; of the extents, rounded out to pages, the first `MOST`."""
    data, entries = profile.encode(extents, PAGE, SIZE - _HEAD.size)
    return _HEAD.pack(_MAGIC, entries, zlib.crc32(data)) + data


def decode(data: bytes, size: int) -> list[Extent] | None:
    """The extents of a disk of `size` bytes, the last page of which may be a part; None: it makes no sense.

    All lie in the disk, and together have no more bytes.
    """
    if len(data) < _HEAD.size:
        return None
    magic, entries, checksum = _HEAD.unpack_from(data)
    encoded = data[_HEAD.size : _HEAD.size + entries * PROFILE_ENTRY.size]
    if magic != _MAGIC or entries > MOST or len(encoded) < entries * PROFILE_ENTRY.size:
        return None
    if zlib.crc32(encoded) != checksum:
        return None
    extents = [(start, min(stop, size)) for start, stop in profile.decode(encoded, entries, PAGE) if start < size]
    return extents if sum(stop - start for start, stop in extents) <= size else None
