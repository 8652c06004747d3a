"""What a new image consists of: its header, its other metadata, and which of its data has to be zeros.

The header is what the original writes for the same options (`creation.new_header`); behind it stand an empty bitmap,
table, journal and, where somebody has recorded one, a profile. No I/O: who makes the file writes `parts` to it, the
header last where a half-written file could be taken for an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvdfs.alloc.table import new_table
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.errors import UsageError
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import HEADER_SIZE, PAGE, SECTOR, Header, round_up, with_fields
from fvdfs.format.migration import NO_RECORD, PLACE, Record
from fvdfs.format.profile import Extent, encode
from fvdfs.image.chain import MAX_REGION

Part = tuple[int, bytes]
"""Offset and content of something in a file."""
Span = tuple[int, int]
"""Offset and size of something in a file, in bytes."""


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image that is not written yet."""

    header: Header
    profile: bytes
    """As it is stored; empty where there is none."""
    bitmap: Bitmap | None
    """Empty; None without a base."""
    record: Record = NO_RECORD
    """What it says of moves to and from other hosts."""

    @property
    def data_size(self) -> int:
        """Bytes of data that there are at first: chunks are added as they are needed; all else is sparse."""
        return 0 if self.header.compact else self.header.virtual_disk_size

    @property
    def file_size(self) -> int:
        """Bytes of the image's own file."""
        return self.header.metadata_size + (0 if self.header.data_file else self.data_size)

    def parts(self) -> list[Part]:
        """What the image's own file holds, the header first; all else in it is zeros."""
        header = self.header
        parts = [(0, header.encode().ljust(round_up(HEADER_SIZE, SECTOR), b"\0"))]
        if self.record:
            parts.append((PLACE, self.record.encode()))
        if self.bitmap is not None:
            parts += [(header.bitmap_offset + number * PAGE, page) for number, page in self.bitmap.take_dirty_pages()]
        if header.compact:
            parts.append((header.table_offset, new_table(header.chunks)))
        if self.profile:
            parts.append((header.prefetch_profile_offset, self.profile))
        return parts

    def data_zeros(self) -> list[Span]:
        """The parts of the data that are read before they are written, and so have to be zeros.

        All that lies past the base's range, and blocks that count as local from the start (need_zero_init).
        Chunks are zeroed when they are allocated.
        """
        header = self.header
        if header.compact:
            return []
        spans = []
        if self.bitmap is not None:
            for first, end, local in self.bitmap.block_runs(0, header.blocks):
                if local:
                    start = first * header.block_size
                    spans.append((start, min(end * header.block_size, header.base_size) - start))
        spans.append((header.base_size, header.virtual_disk_size - header.base_size))
        return spans


def new_image(size: int, base_length: int | None, options: CreateOptions, profile: Sequence[Extent] = ()) -> NewImage:
    """The image for these options. `size` and `base_length` (None without a base) are bytes.

    `profile`: what is to be fetched first from the base once the image is opened. Raises UsageError for what the
    format has no room for.
    """
    header = new_header(size, base_length, options)
    for region in header.regions():
        if region.size > MAX_REGION:
            remedy = "--block-size" if region.name == "bitmap" else "--chunk-size or a smaller --journal-size"
            raise UsageError(f"the {region.name} would take {region.size} bytes: choose a larger {remedy}")
    header, stored = _with_profile(header, profile)
    bitmap = None if base_length is None else Bitmap(bytes(bitmap_bytes(header.blocks)), header.blocks)
    return NewImage(header, stored, bitmap)


def _with_profile(header: Header, profile: Sequence[Extent]) -> tuple[Header, bytes]:
    """The header that names this profile, and the profile as it is stored."""
    if not profile:
        return header, b""
    room = header.profile_room
    data, entries = encode(profile, PAGE, room.size)
    header = with_fields(
        header,
        prefetch_profile_offset=room.offset,
        prefetch_profile_entries=entries,
        profile_directed_prefetch_start_delay=0,
    )
    return header, data
