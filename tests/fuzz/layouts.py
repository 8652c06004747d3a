"""Headers of small images, and how a source spoils them.

Every image has its regions where a freshly created one has them, one page for the bitmap, one for the
table and two for the journal, so that an input stays small and an execution short.
"""

from __future__ import annotations

import struct

from fuzz.source import Source
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import SECTOR, Header, with_fields
from support.reference import CODES, NAMES

MAX_PATCHES = 7
_CODES = [struct.Struct(f"<{code}") for code in CODES]
_OFFSETS = [struct.calcsize("<" + "".join(CODES[:index])) for index in range(len(CODES))]
# The fields that the package computes with come first, and so are met more often.
_GEOMETRY = (
    *("all_data_in_fvd_img", "virtual_disk_size", "metadata_size", "base_img_size", "bitmap_offset", "bitmap_size"),
    *("block_size", "compact_image", "table_offset", "chunk_size", "storage_grow_unit", "journal_offset"),
    *("journal_size", "clean_shutdown", "base_img", "base_img_fmt", "data_file", "write_updates_base_img"),
    "add_storage_cmd",
)
FIELDS = [NAMES.index(name) for name in [*_GEOMETRY, *(name for name in NAMES if name not in _GEOMETRY)]]


def _new(disk: int, base: int | None, block: int = 0, chunk: int = 0, journal: int | None = 8192) -> Header:
    return new_header(
        disk,
        base,
        CreateOptions(
            base_img="" if base is None else "base",
            base_img_fmt="" if base is None else "raw",
            block_size=block,
            compact=chunk > 0,
            chunk_size=chunk,
            grow_unit=3 * chunk,
            journal_size=journal if block or chunk else None,
        ),
    )


def _chunks(header: Header, size: int) -> Header:
    """With chunks that are no whole pages, which creation does not make."""
    return with_fields(header, chunk_size=size, storage_grow_unit=2 * size)


HEADERS = (
    _chunks(_new(100 * SECTOR, 41 * SECTOR, 4 * SECTOR, 4096), 6 * SECTOR),
    _new(100 * SECTOR, 41 * SECTOR, 4 * SECTOR),
    _new(30 * 4096 + SECTOR, None, chunk=4096),
    _new(64 * SECTOR, None),
    _new(200 * SECTOR, 200 * SECTOR, SECTOR, 8192),
    _chunks(_new(200 * SECTOR, 190 * SECTOR, 150 * SECTOR, 4096), SECTOR),
    with_fields(_new(90 * SECTOR, 31 * SECTOR, 15 * SECTOR, 4096), data_file="data", base_img_fmt="fvd"),
    _new(90 * SECTOR, 90 * SECTOR, 2 * SECTOR, 4096, journal=0),
    with_fields(_new(90 * SECTOR, 90 * SECTOR, 2 * SECTOR), need_zero_init=1, write_updates_base_img="writethrough"),
    with_fields(_new(120 * SECTOR, None, chunk=4096), data_file="data"),
)
RAW_HEADERS = tuple(header.encode() for header in HEADERS)


def patch(source: Source, raw: bytearray, near: int) -> None:
    """Change some fields of a header, and perhaps some byte of it; `near`: a size that matters, as the file's."""
    count = source.byte() % (MAX_PATCHES + 1)
    for _ in range(count):
        choice = source.byte()
        if choice >= 250:
            raw[source.number(2) % len(raw)] = source.byte()
            continue
        field = FIELDS[choice % len(FIELDS)]
        code, offset = _CODES[field], _OFFSETS[field]
        if CODES[field][-1] == "s":
            length = source.byte()
            value = source.take(source.byte() % 48) if length < 240 else b"x" * (code.size - (255 - length))
            raw[offset : offset + code.size] = value[: code.size].ljust(code.size, b"\0")
        else:
            bits = 8 * code.size
            number = source.size(near) & (1 << bits) - 1
            raw[offset : offset + code.size] = number.to_bytes(code.size, "little")
