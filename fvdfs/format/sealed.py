"""Values as JSON in a few sectors: 8 bytes magic | u32 length | u32 CRC-32 | so many bytes of JSON | zeros. Pure."""

from __future__ import annotations

import json
import zlib
from typing import Any

_TEXT_AT = 16


def seal(magic: bytes, fields: dict[str, Any], size: int) -> bytes:
    """The values as so many bytes, which they have to fit into."""
    return seal_text(magic, json.dumps(fields).encode(), size).ljust(size, b"\0")


def seal_text(magic: bytes, text: bytes, size: int) -> bytes:
    """JSON that is there already, without the zeros; at most so many bytes."""
    data = magic + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    assert len(magic) + 8 == _TEXT_AT
    assert len(data) <= size
    return data


def unseal(magic: bytes, data: bytes) -> dict[str, Any] | None:
    """The values in what begins with these bytes; None where the magic is another.

    Raises ValueError, TypeError where they are damaged.
    """
    if not data.startswith(magic):
        return None
    size, checksum = (int.from_bytes(data[at : at + 4], "little") for at in (8, 12))
    text = data[_TEXT_AT : _TEXT_AT + size]
    if len(text) < size or zlib.crc32(text) != checksum:
        raise ValueError("damaged")
    fields = json.loads(text)
    return dict(fields)
