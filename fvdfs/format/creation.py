"""What creation decides: the header of a new image for the options that the user chose.

Defaults and rounding are those of the original (format.md, "Values at creation"). Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fvdfs.errors import FormatError, UsageError
from fvdfs.format.header import (
    ENTRIES_WITH_BITMAP_RECORD,
    MAX_BLOCK_SIZE,
    MAX_CHUNKS,
    MAX_DISK_SIZE,
    PAGE,
    SECTOR,
    TABLE_ENTRY_SIZE,
    Header,
    ceil_div,
    round_up,
    with_fields,
)

# Bytes; the original's.
DEFAULT_BITMAP_LIMIT = 4 << 20
DEFAULT_CHUNK_SIZE = 1 << 20
DEFAULT_GROW_UNIT = 100 << 20
DEFAULT_JOURNAL_SIZE = 16 << 20
DEFAULT_PREFETCH = 1 << 20


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What a user may choose at creation; None and 0 stand for the format's default. Sizes in bytes."""

    base_img: str = ""
    base_img_fmt: str = ""
    block_size: int = 0
    compact: bool = False
    chunk_size: int = 0
    grow_unit: int = 0
    journal_size: int | None = None
    """None: the default; 0: no journal."""
    data_file: str = ""
    data_file_fmt: str = ""
    copy_on_read: bool = False
    prefetch_delay: int = -1
    """Seconds; negative: no prefetching."""
    detect_holes: int = 0
    grow_command: str = ""
    update_base: str = ""
    base_to_end: bool = False
    """Whether the base's range reaches to the end of the disk, however long the base is."""
    profile_delay: int = -1
    """Seconds until a profile that the image gets is fetched; negative: it is not."""
    profile_room: int = 0
    """Room for a prefetch profile, where there is a base; the original leaves none."""


def default_block_size(base_size: int) -> int:
    """The smallest 512 * 2^k bytes whose bitmap takes at most 4 MiB (format.md, "Values at creation")."""
    size = SECTOR
    while ceil_div(ceil_div(base_size, size), 8) > DEFAULT_BITMAP_LIMIT:
        size *= 2
    return size


def new_header(virtual_size: int, base_length: int | None, options: CreateOptions) -> Header:
    """The header that the original writes for these options (format.md, "Values at creation").

    `virtual_size` and `base_length` (None without a base) are bytes. Raises UsageError for a choice
    that the format has no room for.
    """
    for wrong, why in _refusals(virtual_size, base_length is not None, options):
        if wrong:
            raise UsageError(why)
    header = Header(
        virtual_disk_size=virtual_size,
        data_file=options.data_file,
        data_file_fmt=options.data_file_fmt,
        add_storage_cmd=options.grow_command,
    )
    # Each step puts its region where metadata ends so far, at metadata_size, and moves that.
    if base_length is not None:
        header = _with_base(header, base_length, options)
    if options.compact:
        header = _with_table(header, options)
    header = _with_journal(header, options)
    if base_length is not None:
        header = with_fields(header, metadata_size=header.metadata_size + round_up(options.profile_room, PAGE))
    try:
        header.encode()
        header.check("the new image", header.metadata_size)
    except struct.error:
        raise UsageError("a number is too large for its field of the format") from None
    except FormatError as error:
        raise UsageError(str(error)) from None
    return header


def _refusals(size: int, has_base: bool, options: CreateOptions) -> Iterator[tuple[bool, str]]:
    """For each choice that the format has no room for: whether it was made, and what to say."""
    positive = f"must be a multiple of {SECTOR}, and more than 0"
    yield size % SECTOR > 0 or size <= 0, f"the size of the disk, {size}, {positive}"
    yield size > MAX_DISK_SIZE, f"the size of the disk, {size}, must be at most {MAX_DISK_SIZE}"
    for given, option in (
        (options.block_size, "--block-size"),
        (options.copy_on_read, "--copy-on-read"),
        (options.prefetch_delay > 0, "--prefetch-delay"),
        (options.detect_holes, "--detect-holes"),
        (options.update_base, "--update-base"),
        (options.base_img_fmt, "--base-format"),
    ):
        yield bool(given) and not has_base, f"{option} needs a base image: give --base"
    yield bool(options.detect_holes) and options.compact, "--detect-holes does not go with --compact: choose one"
    of_table = options.chunk_size or options.grow_unit
    yield bool(of_table) and not options.compact, "--chunk-size and --grow-unit need --compact"
    yield bool(options.data_file_fmt) and not options.data_file, "--data-format needs a data file: give --data-file"
    for value, option in ((options.chunk_size, "--chunk-size"), (options.grow_unit, "--grow-unit")):
        yield value > MAX_DISK_SIZE, f"{option} {value} is too large: at most {MAX_DISK_SIZE}"
    yield options.block_size > MAX_BLOCK_SIZE, f"--block-size {options.block_size} is too large: at most 2 GiB - 512"


def _with_base(header: Header, base_length: int, options: CreateOptions) -> Header:
    base_size = header.virtual_disk_size
    if not options.base_to_end:
        base_size = min(base_size, round_up(base_length, SECTOR))
    block_size = round_up(options.block_size, SECTOR) or default_block_size(base_size)
    bitmap_size = round_up(ceil_div(ceil_div(base_size, block_size), 8), PAGE)
    return with_fields(
        header,
        all_data_in_fvd_img=0,
        base_img=options.base_img,
        base_img_fmt=options.base_img_fmt,
        base_img_size=base_size,
        bitmap_offset=header.metadata_size,
        bitmap_size=bitmap_size,
        block_size=block_size,
        copy_on_read=int(options.copy_on_read),
        max_outstanding_copy_on_read_data=2_000_000,
        prefetch_start_delay=options.prefetch_delay,
        num_prefetch_slots=2,
        bytes_per_prefetch=min(round_up(DEFAULT_PREFETCH, block_size), MAX_BLOCK_SIZE // block_size * block_size),
        prefetch_read_throughput_measure_time=100,
        prefetch_write_throughput_measure_time=100,
        prefetch_perf_calc_alpha=80,
        prefetch_min_read_throughput=5120,
        prefetch_min_write_throughput=5120,
        prefetch_max_read_throughput=1_000_000_000,
        prefetch_max_write_throughput=1_000_000_000,
        prefetch_throttle_time=30_000,
        need_zero_init=int(options.detect_holes > 0),
        unit_of_PrefetchProfileEntry_len=PAGE,
        profile_directed_prefetch_start_delay=options.profile_delay,
        write_updates_base_img=options.update_base,
        metadata_size=header.metadata_size + bitmap_size,
    )


def _with_table(header: Header, options: CreateOptions) -> Header:
    chunk_size = round_up(options.chunk_size, PAGE) or DEFAULT_CHUNK_SIZE
    entries = ceil_div(header.virtual_disk_size, chunk_size)
    if entries > MAX_CHUNKS:
        raise UsageError(f"--chunk-size {chunk_size} is too small for a disk of {header.virtual_disk_size} bytes")
    return with_fields(
        header,
        compact_image=1,
        table_offset=header.metadata_size,
        chunk_size=chunk_size,
        storage_grow_unit=max(options.grow_unit or DEFAULT_GROW_UNIT, chunk_size),
        metadata_size=header.metadata_size + round_up(entries * TABLE_ENTRY_SIZE, PAGE),
    )


def _with_journal(header: Header, options: CreateOptions) -> Header:
    asked = DEFAULT_JOURNAL_SIZE if options.journal_size is None else options.journal_size
    least = ceil_div(header.chunks, ENTRIES_WITH_BITMAP_RECORD) * SECTOR
    size = round_up(max(asked, least), PAGE) if asked else 0
    if not header.has_metadata:
        # The original counts a journal that was asked for in vain (format.md, "Surprising values").
        in_vain = size if options.journal_size is not None else 0
        return with_fields(header, metadata_size=header.metadata_size + in_vain)
    return with_fields(
        header,
        journal_offset=header.metadata_size if size else 0,
        journal_size=size,
        metadata_size=header.metadata_size + size,
    )
