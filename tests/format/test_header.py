"""The header: against the golden images, creation, and refusal of what cannot be."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
import tarfile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fvdfs.errors import FormatError, FvdError, NotFvd, UsageError
from fvdfs.format.creation import CreateOptions, default_block_size, new_header
from fvdfs.format.header import (
    HEADER_SIZE,
    HEADER_SPACE,
    MAGIC,
    MAX_CHUNKS,
    MAX_DISK_SIZE,
    Header,
    Region,
    ceil_div,
    changed_sectors,
    round_up,
    with_fields,
)
from support.golden import GOLDEN, MANIFEST
from support.reference import CODES, NAMES

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
OFFSETS = {name: struct.calcsize("<" + "".join(CODES[:index])) for index, name in enumerate(NAMES)}
golden_images = pytest.mark.parametrize("golden", MANIFEST, ids=lambda golden: str(golden["name"]))


@functools.cache
def golden_header(name: str) -> tuple[bytes, int]:
    """The header's region of a golden image, and the length of its file."""
    with tarfile.open(GOLDEN / f"{name}.tar.xz", "r:xz") as archive:
        member = next(member for member in archive if member.name == "disk.fvd")
        file = archive.extractfile(member)
        assert file is not None
        return file.read(HEADER_SPACE), member.size


def patched(data: bytes, **fields: int | bytes) -> bytes:
    """The bytes of a header with some fields replaced, past any check."""
    raw = bytearray(data)
    for name, value in fields.items():
        struct.pack_into("<" + CODES[NAMES.index(name)], raw, OFFSETS[name], value)
    return bytes(raw)


# --- golden images --------------------------------------------------------------------------------


@golden_images
def test_golden_header_survives_decoding_and_encoding(golden: dict[str, Any]) -> None:
    data, length = golden_header(golden["name"])
    header = Header.decode(data, "disk.fvd")
    header.check("disk.fvd", length)
    assert header.encode() == data[:HEADER_SIZE]
    for name, code in zip(NAMES, CODES, strict=True):
        (raw,) = struct.unpack_from(f"<{code}", data, OFFSETS[name])
        value = getattr(header, name)
        assert value == (raw.rstrip(b"\0").decode() if isinstance(raw, bytes) else raw), name


@golden_images
def test_new_header_is_what_the_original_writes(golden: dict[str, Any]) -> None:
    """Byte for byte, but for two fields that the original changed after creation, and one odd size that we round.

    `clean_shutdown` became 0 when a writer opened an image that it did not close (`crashed`);
    `all_data_in_fvd_img` became 1 when prefetching was done (images named so).
    """
    given = golden["options"]
    asked = int(given["journal_size"]) if "journal_size" in given else None
    options = CreateOptions(
        base_img="base.raw" if golden["base_size"] is not None else "",
        block_size=given.get("block_size", 0),
        compact=given.get("compact_image") == "on",
        chunk_size=given.get("chunk_size", 0),
        grow_unit=given.get("storage_grow_unit", 0),
        journal_size=0 if asked == -1 else asked,
        data_file=given.get("data_file", ""),
        data_file_fmt=given.get("data_file_fmt", ""),
        copy_on_read=given.get("copy_on_read") == "on",
        prefetch_delay=given.get("prefetch_start_delay", -1),
        detect_holes=given.get("detect_sparse_hole", 0),
    )
    header = new_header(golden["virtual_size"], golden["base_size"], options)
    expected = golden_header(golden["name"])[0][:HEADER_SIZE]
    if golden["crashed"]:
        assert patched(expected, clean_shutdown=0) == expected
        expected = patched(expected, clean_shutdown=1)
    if golden["name"].startswith("prefetched"):
        assert patched(expected, all_data_in_fvd_img=1) == expected
        expected = patched(expected, all_data_in_fvd_img=0)
    if golden["name"] == "metadata-size-odd":
        assert asked is not None
        assert patched(expected, metadata_size=HEADER_SPACE + asked) == expected
        expected = patched(expected, metadata_size=round_up(HEADER_SPACE + asked, 4096))
    assert header.encode() == expected


def test_limits() -> None:
    """Chunk numbers are 0 to 0x7FFFFFFE (format.md, "Chunk table"); two offsets add up to one of 63 bits."""
    assert MAX_CHUNKS == 0x7FFFFFFE + 1
    assert MAX_DISK_SIZE + MAX_DISK_SIZE == 1 << 63


# --- creation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_size", "block_size"),
    [
        (0, 512),
        (512, 512),
        (16 * GIB, 512),
        (16 * GIB + 512, 1024),
        (32 * GIB, 1024),
        (32 * GIB + 512, 2048),
        (100 * GIB, 4096),
        (TIB, 32768),
    ],
)
def test_default_block_size(base_size: int, block_size: int) -> None:
    """The smallest whose bitmap is at most 4 MiB (format.md, "Values at creation")."""
    assert default_block_size(base_size) == block_size
    header = new_header(2 * TIB, base_size, CreateOptions(base_img="base"))
    assert header.block_size == block_size
    assert header.bitmap_size <= 4 * MIB


def test_base_is_used_up_to_the_end_of_the_disk() -> None:
    options = CreateOptions(base_img="base")
    assert new_header(MIB, MIB + 1, options).base_img_size == MIB
    assert new_header(MIB, MIB - 511, options).base_img_size == MIB
    assert new_header(MIB, MIB - 513, options).base_img_size == MIB - 512
    assert new_header(MIB, 0, options).base_img_size == 0


def test_sizes_are_rounded_up_at_creation() -> None:
    options = CreateOptions(base_img="b", block_size=513, compact=True, chunk_size=4097, journal_size=8193)
    header = new_header(MIB, MIB, options)
    assert (header.block_size, header.chunk_size, header.journal_size) == (1024, 8192, 12288)
    assert header.bytes_per_prefetch == MIB
    odd = new_header(100 * MIB, 100 * MIB, CreateOptions(base_img="b", block_size=7680))
    assert odd.bytes_per_prefetch == 137 * 7680  # 1 MiB is 136.5 blocks


def test_defaults_of_a_compact_image() -> None:
    header = new_header(10 * GIB, None, CreateOptions(compact=True))
    assert (header.chunk_size, header.storage_grow_unit, header.journal_size) == (MIB, 100 * MIB, 16 * MIB)
    assert header.chunks == 10 * 1024
    assert header.table_offset == HEADER_SPACE
    assert header.journal_offset == HEADER_SPACE + 40960
    assert header.metadata_size == HEADER_SPACE + 40960 + 16 * MIB


def test_grow_unit_is_at_least_a_chunk() -> None:
    def grow_unit(chunk_size: int, unit: int) -> int:
        options = CreateOptions(compact=True, chunk_size=chunk_size, grow_unit=unit)
        return new_header(GIB, None, options).storage_grow_unit

    assert grow_unit(MIB, 512) == MIB
    assert grow_unit(MIB, MIB + 1) == MIB + 1
    assert grow_unit(200 * MIB, 0) == 200 * MIB


def test_journal_has_room_for_the_whole_table() -> None:
    """But no journal asked for is no journal (format.md, "Values at creation")."""

    def journal_size(entries: int, asked: int | None) -> int:
        options = CreateOptions(compact=True, chunk_size=4096, journal_size=asked)
        return new_header(entries * 4096, None, options).journal_size

    assert journal_size(121 * 16, 512) == 16 * 512
    assert journal_size(121 * 16 + 1, 512) == 24 * 512
    assert journal_size(121 * 16 + 1, 0) == 0
    assert journal_size(121 * 16, None) == 16 * MIB
    assert journal_size(121 * 32768 + 1, None) == 16 * MIB + 4096


def test_words_that_are_kept_as_given() -> None:
    header = new_header(
        MIB, MIB, CreateOptions("base", base_img_fmt="fvd", grow_command="grow", update_base="writeback")
    )
    assert (header.base_img, header.base_img_fmt) == ("base", "fvd")
    assert (header.add_storage_cmd, header.write_updates_base_img) == ("grow", "writeback")


def test_image_without_metadata_has_no_journal() -> None:
    header = new_header(MIB, None, CreateOptions())
    assert (header.journal_offset, header.journal_size, header.metadata_size) == (0, 0, HEADER_SPACE)
    header = new_header(MIB, None, CreateOptions(journal_size=1))
    assert (header.journal_offset, header.journal_size, header.metadata_size) == (0, 0, HEADER_SPACE + 4096)


def test_new_header_passes_its_own_check() -> None:
    for size, base, block, compact, chunk, journal in itertools.product(
        (512, MIB + 512), (None, 0, 1, 2 * MIB), (0, 512, 7680), (False, True), (0, 5000), (None, 0, 1)
    ):
        options = CreateOptions(
            base_img="" if base is None else "base",
            block_size=0 if base is None else block,
            compact=compact,
            chunk_size=chunk if compact else 0,
            journal_size=journal,
        )
        header = new_header(size, base, options)
        header.check("new", header.metadata_size)
        again = Header.decode(header.encode(), "new")
        assert again == header


@pytest.mark.parametrize(
    ("size", "base", "options", "text"),
    [
        (0, None, CreateOptions(), "disk, 0,"),
        (-512, None, CreateOptions(), "disk, -512,"),
        (1000, None, CreateOptions(), "disk, 1000,"),
        ((1 << 62) + 512, None, CreateOptions(), "disk, 4611686018427388416, must be at most"),
        (1 << 63, None, CreateOptions(), "must be at most"),
        (MIB, None, CreateOptions(update_base="writeback"), "--update-base needs a base"),
        (MIB, None, CreateOptions(block_size=512), "--block-size needs a base"),
        (MIB, None, CreateOptions(copy_on_read=True), "--copy-on-read needs a base"),
        (MIB, None, CreateOptions(prefetch_delay=1), "--prefetch-delay needs a base"),
        (MIB, None, CreateOptions(detect_holes=4096), "--detect-holes needs a base"),
        (MIB, MIB, CreateOptions(base_img="b", detect_holes=4096, compact=True), "--detect-holes does not go with"),
        (MIB, None, CreateOptions(chunk_size=4096), "need --compact"),
        (MIB, None, CreateOptions(grow_unit=4096), "need --compact"),
        (MIB, MIB, CreateOptions(base_img="b", block_size=(1 << 31) - 511), "--block-size 2147483137 is too large"),
        (MAX_CHUNKS * 4096 + 512, None, CreateOptions(compact=True, chunk_size=4096), "--chunk-size 4096 is too small"),
    ],
)
def test_new_header_refuses(size: int, base: int | None, options: CreateOptions, text: str) -> None:
    with pytest.raises(UsageError) as error:
        new_header(size, base, options)
    assert text in str(error.value)


def test_new_header_at_its_limits() -> None:
    new_header(1 << 62, None, CreateOptions()).check("new", HEADER_SPACE)
    assert new_header(512, None, CreateOptions(prefetch_delay=0)).prefetch_start_delay == 0
    largest = (1 << 31) - 512
    header = new_header(4 * GIB, 4 * GIB, CreateOptions(base_img="b", block_size=largest))
    assert (header.block_size, header.bytes_per_prefetch) == (largest, largest)
    header = new_header(MAX_CHUNKS * 4096, None, CreateOptions(compact=True, chunk_size=4096, journal_size=0))
    assert header.chunks == MAX_CHUNKS
    header.check("new", header.metadata_size)


@pytest.mark.parametrize(("field", "room"), [("base_img", 1023), ("data_file", 1023), ("data_file_fmt", 15)])
def test_name_too_long_for_its_field(field: str, room: int) -> None:
    fits = with_fields(Header(), **{field: "x" * room})
    assert Header.decode(fits.encode(), "new") == fits
    with pytest.raises(UsageError) as error:
        with_fields(Header(), **{field: "x" * (room + 1)}).encode()
    assert f"{field} is {room + 1} bytes long" in str(error.value)
    with pytest.raises(UsageError):  # bytes count, not characters
        with_fields(Header(), **{field: "é" * (room // 2 + 1)}).encode()


def test_names_are_any_bytes() -> None:
    name = b"b\xff\xc3\xa4se"
    header = Header.decode(patched(Header().encode(), base_img=name), "image")
    assert header.base_img.encode("utf-8", "surrogateescape") == name
    assert header.encode() == patched(Header().encode(), base_img=name)


# --- what the fields mean -------------------------------------------------------------------------
#
# A disk of 1 MiB and a sector; a base of 512 KiB and a sector in 129 blocks, the last one partial;
# 86 chunks of three blocks.

BOTH = new_header(
    MIB + 512,
    512 * KIB + 512,
    CreateOptions(base_img="base", block_size=4096, compact=True, chunk_size=12288, journal_size=8192),
)
assert (BOTH.bitmap_offset, BOTH.table_offset, BOTH.journal_offset) == (8192, 12288, 16384)
assert BOTH.metadata_size == 24576
FLAT = with_fields(BOTH, compact_image=0)
TABLE = with_fields(BOTH, base_img="", all_data_in_fvd_img=1)
PLAIN = with_fields(TABLE, compact_image=0)


def test_regions() -> None:
    bitmap, table, journal = Region("bitmap", 8192, 4096), Region("table", 12288, 4096), Region("journal", 16384, 8192)
    assert list(BOTH.regions()) == [bitmap, table, journal]
    assert list(FLAT.regions()) == [bitmap, journal]
    assert list(TABLE.regions()) == [table, journal]
    assert list(PLAIN.regions()) == []
    assert list(with_fields(BOTH, journal_size=0).regions()) == [bitmap, table]
    assert journal.end == 24576


def test_region_is_as_large_as_its_contents() -> None:
    """Whatever bitmap_size says; in whole pages."""
    header = with_fields(FLAT, virtual_disk_size=GIB, base_img_size=32768 * 4096, bitmap_size=1 << 20)
    assert header.bitmap_region == Region("bitmap", 8192, 4096)
    header = with_fields(header, base_img_size=32768 * 4096 + 512)
    assert header.blocks == 32769
    assert header.bitmap_region == Region("bitmap", 8192, 8192)
    header = with_fields(TABLE, virtual_disk_size=1024 * 12288)
    assert header.table_region == Region("table", 12288, 4096)
    header = with_fields(TABLE, virtual_disk_size=1024 * 12288 + 512)
    assert header.table_region == Region("table", 12288, 8192)


def test_what_an_image_has() -> None:
    def has(header: Header) -> tuple[bool, bool, bool]:
        return header.has_base, header.compact, header.has_metadata

    assert has(BOTH) == (True, True, True)
    assert has(FLAT) == (True, False, True)
    assert has(TABLE) == (False, True, True)
    assert has(PLAIN) == (False, False, False)
    assert has(with_fields(BOTH, all_data_in_fvd_img=1)) == (False, True, True)
    assert (BOTH.base_size, BOTH.blocks, BOTH.chunks) == (512 * KIB + 512, 129, 86)
    assert (TABLE.base_size, TABLE.blocks, TABLE.chunks) == (0, 0, 86)
    assert (FLAT.base_size, FLAT.blocks, FLAT.chunks) == (512 * KIB + 512, 129, 0)
    prefetched = with_fields(BOTH, all_data_in_fvd_img=1)
    assert (prefetched.base_size, prefetched.blocks) == (0, 0)


def test_storage_that_was_truncated() -> None:
    """Shorter than the disk, unless it may never have been used (format.md, "Storage without a table")."""
    plain = new_header(MIB, None, CreateOptions())
    over = new_header(MIB, MIB, CreateOptions(base_img="base"))
    for header in (plain, over, with_fields(over, need_zero_init=1)):
        for any_local in (False, True):
            assert header.is_truncated(MIB - 512, any_local=any_local)
            assert header.is_truncated(512, any_local=any_local)
            assert not header.is_truncated(MIB, any_local=any_local)
            assert not header.is_truncated(MIB + 5, any_local=any_local)
    odd = 511  # of an image whose metadata_size is no multiple of 512
    for length in (0, odd):
        assert not plain.is_truncated(length, any_local=False)
        assert not over.is_truncated(length, any_local=False)
        assert over.is_truncated(length, any_local=True)
        assert not with_fields(over, need_zero_init=1).is_truncated(length, any_local=True), "they are holes"
        assert with_fields(over, all_data_in_fvd_img=1).is_truncated(length, any_local=False), (
            "prefetching has finished"
        )


def test_place_of_the_data() -> None:
    assert BOTH.data_offset == 24576
    assert with_fields(BOTH, data_file="data").data_offset == 0


def test_clean() -> None:
    assert BOTH.clean
    assert not with_fields(BOTH, clean_shutdown=0).clean


def test_table_capacity() -> None:
    """Up to the next region or the end of the metadata, and as far as the journal has room for all entries."""
    assert BOTH.table_capacity == 1024
    assert with_fields(BOTH, journal_offset=20480).table_capacity == 1936  # 16 sectors of the journal
    assert with_fields(BOTH, journal_offset=20480, journal_size=17 * 512).table_capacity == 2048
    assert with_fields(BOTH, journal_size=0).table_capacity == 3072
    last = with_fields(BOTH, journal_offset=12288, table_offset=20480)
    assert last.table_capacity == 1024
    assert with_fields(last, metadata_size=28672).table_capacity == 1936
    assert with_fields(last, metadata_size=28672, journal_size=0, data_file="data").table_capacity == 2048
    assert with_fields(last, metadata_size=0, data_file="data").table_capacity == 1024
    large = with_fields(last, metadata_size=0, data_file="data", virtual_disk_size=1025 * 12288, journal_size=0)
    assert large.table_capacity == 2048
    assert with_fields(last, journal_size=0, metadata_size=MAX_DISK_SIZE).table_capacity == MAX_CHUNKS
    profile = {
        "prefetch_profile_offset": 28672,
        "prefetch_profile_entries": 1,
        "unit_of_PrefetchProfileEntry_len": 4096,
    }
    assert with_fields(last, metadata_size=40960, journal_size=0, **profile).table_capacity == 2048, "up to a profile"


# --- decoding and check ---------------------------------------------------------------------------

RAW = BOTH.encode()
LENGTH = 24576 + 12288


def test_valid_header_passes() -> None:
    for header in (BOTH, FLAT, TABLE, PLAIN):
        header.check("disk.fvd", LENGTH)
        header.check("disk.fvd", max((region.end for region in header.regions()), default=0))
        assert Header.decode(header.encode() + b"more", "disk.fvd") == header


@pytest.mark.parametrize("data", [b"", b"\xa9\xf5\x43", b"QFI\xfb", bytes(HEADER_SIZE), b"\xa9\xf5\x43\x52" * 2000])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(NotFvd) as error:
        Header.decode(data, "disk.fvd")
    assert error.value.image == "disk.fvd"
    assert str(error.value).startswith("disk.fvd: not an FVD image")


@pytest.mark.parametrize("length", [4, HEADER_SIZE - 1])
def test_header_cut_short(length: int) -> None:
    with pytest.raises(FormatError, match=f"disk.fvd: the file ends inside the header .{length} of 4336 bytes"):
        Header.decode(RAW[:length], "disk.fvd")
    assert Header.decode(RAW[:HEADER_SIZE], "disk.fvd") == BOTH


@pytest.mark.parametrize("version", [0, 2, 0x01000000])
def test_other_versions(version: int) -> None:
    with pytest.raises(FormatError, match=f"disk.fvd: version={version}: "):
        Header.decode(patched(RAW, version=version), "disk.fvd")


@pytest.mark.parametrize("field", [name for name, code in zip(NAMES, CODES, strict=True) if code.endswith("s")])
def test_string_without_an_end(field: str) -> None:
    size = struct.calcsize(CODES[NAMES.index(field)])
    with pytest.raises(FormatError, match=f"disk.fvd: {field} fills its {size} bytes"):
        Header.decode(patched(RAW, **{field: b"x" * size}), "disk.fvd")
    assert getattr(Header.decode(patched(RAW, **{field: b"x" * (size - 1)}), "disk.fvd"), field) == "x" * (size - 1)


def test_bytes_behind_the_end_of_a_string_mean_nothing() -> None:
    assert Header.decode(patched(RAW, base_img=b"base\0old name"), "disk.fvd") == BOTH


ABSURD: list[tuple[Header, str, int | str, str]] = [
    (PLAIN, "virtual_disk_size", -512, "must be 0.."),
    (PLAIN, "virtual_disk_size", -(1 << 63), "must be 0.."),
    (PLAIN, "virtual_disk_size", 513, "a multiple of 512"),
    (PLAIN, "virtual_disk_size", MAX_DISK_SIZE + 512, "must be 0.."),
    (PLAIN, "virtual_disk_size", (1 << 63) - 1, "must be 0.."),
    (PLAIN, "metadata_size", -512, "must be 0.."),
    (PLAIN, "metadata_size", MAX_DISK_SIZE + 512, "must be 0.."),
    (PLAIN, "metadata_size", 0, "data would overlap the header"),
    (PLAIN, "metadata_size", 4096, "data would overlap the header, which ends at 4336"),
    (BOTH, "metadata_size", 24064, "data would overlap the journal, which ends at 24576"),
    (PLAIN, "all_data_in_fvd_img", 0, "base_img is empty"),
    (BOTH, "base_img_size", -512, "must be 0.."),
    (BOTH, "base_img_size", 4097, "a multiple of 512"),
    (BOTH, "block_size", 0, "must be 512.."),
    (BOTH, "block_size", 511, "must be 512.."),
    (BOTH, "block_size", -512, "must be 512.."),
    (BOTH, "block_size", -(1 << 31), "must be 512.."),
    (BOTH, "block_size", 1000, "a multiple of 512"),
    (BOTH, "block_size", (1 << 31) - 1, "must be 512.."),
    (BOTH, "bitmap_size", 16, "must be 17.."),
    (BOTH, "bitmap_size", 0, "must be 17.."),
    (BOTH, "bitmap_size", -4096, "must be 17.."),
    (BOTH, "bitmap_size", MAX_DISK_SIZE + 1, "must be 17.."),
    (BOTH, "bitmap_offset", 0, "the bitmap overlaps the header, which ends at 4336"),
    (BOTH, "bitmap_offset", 4096, "the bitmap overlaps the header"),
    (BOTH, "bitmap_offset", -8192, "the bitmap overlaps the header"),
    (BOTH, "bitmap_offset", 8193, "a multiple of 512"),
    (BOTH, "bitmap_offset", LENGTH - 4096 + 512, f"the bitmap ends at {LENGTH + 512}, the file at {LENGTH}"),
    (BOTH, "bitmap_offset", (1 << 63) - 512, "the file at"),
    (BOTH, "table_offset", 0, "the table overlaps the header"),
    (BOTH, "table_offset", 8192 + 4096 - 512, "the table overlaps the bitmap, which ends at 12288"),
    (BOTH, "table_offset", 12289, "a multiple of 512"),
    (BOTH, "table_offset", LENGTH, f"the table ends at {LENGTH + 4096}, the file at {LENGTH}"),
    (BOTH, "table_offset", -(1 << 63), "the table overlaps the header"),
    (BOTH, "chunk_size", 0, "must be 512.."),
    (BOTH, "chunk_size", 511, "must be 512.."),
    (BOTH, "chunk_size", -12288, "must be 512.."),
    (BOTH, "chunk_size", 12289, "a multiple of 512"),
    (BOTH, "chunk_size", MAX_DISK_SIZE + 512, "must be 512.."),
    (BOTH, "storage_grow_unit", -1, "must be 0.."),
    (BOTH, "storage_grow_unit", MAX_DISK_SIZE + 1, "must be 0.."),
    (BOTH, "journal_size", -512, "must be 0.."),
    (BOTH, "journal_size", 1000, "a multiple of 512"),
    (BOTH, "journal_size", MAX_DISK_SIZE + 512, "must be 0.."),
    (BOTH, "journal_offset", 12288 + 512, "the journal overlaps the table"),
    (BOTH, "journal_offset", 16385, "a multiple of 512"),
    (BOTH, "journal_offset", LENGTH, f"the journal ends at {LENGTH + 8192}, the file at {LENGTH}"),
    (BOTH, "journal_offset", (1 << 63) - 512, "the file at"),
]


@pytest.mark.parametrize(("header", "field", "value", "reason"), ABSURD)
def test_absurd_value_is_refused(header: Header, field: str, value: int | str, reason: str) -> None:
    """The message names the image, the field and its value."""
    bad = with_fields(header, **{field: value})
    assert Header.decode(bad.encode(), "disk.fvd") == bad
    with pytest.raises(FormatError) as error:
        bad.check("disk.fvd", LENGTH)
    assert error.value.image == "disk.fvd"
    assert str(error.value).startswith(f"disk.fvd: {field}={value}: ")
    assert reason in str(error.value)


ACCEPTED: list[tuple[Header, dict[str, int | str]]] = [
    (PLAIN, {"virtual_disk_size": 0}),
    (PLAIN, {"virtual_disk_size": MAX_DISK_SIZE}),
    (PLAIN, {"metadata_size": 4608}),
    (PLAIN, {"metadata_size": HEADER_SPACE + 1}),
    (BOTH, {"base_img_size": MIB + 1024}),
    (BOTH, {"base_img_size": MAX_DISK_SIZE}),
    (PLAIN, {"metadata_size": 0, "data_file": "data"}),
    (PLAIN, {"metadata_size": MAX_DISK_SIZE}),
    (BOTH, {"base_img_size": 0, "bitmap_size": 0}),
    (BOTH, {"base_img_size": MIB + 512, "bitmap_size": 33}),
    (BOTH, {"block_size": 512, "bitmap_size": 129}),
    (BOTH, {"block_size": (1 << 31) - 512, "bitmap_size": 1}),
    (BOTH, {"bitmap_size": 17}),
    (BOTH, {"bitmap_size": MAX_DISK_SIZE}),
    (BOTH, {"bitmap_offset": 4608}),
    (BOTH, {"bitmap_offset": LENGTH - 4096, "metadata_size": LENGTH}),
    (BOTH, {"storage_grow_unit": 0}),
    (BOTH, {"storage_grow_unit": MAX_DISK_SIZE}),
    (BOTH, {"chunk_size": MAX_DISK_SIZE}),
    (BOTH, {"chunk_size": 2048}),
    (BOTH, {"journal_size": 512}),
    (BOTH, {"journal_size": 0, "journal_offset": 0}),
    (FLAT, {"chunk_size": -1, "table_offset": -1, "storage_grow_unit": -1}),
    (TABLE, {"block_size": -1, "bitmap_offset": -1, "bitmap_size": -1, "base_img_size": -1}),
    (with_fields(BOTH, all_data_in_fvd_img=1), {"block_size": -1, "bitmap_offset": 1, "base_img_size": -1}),
    (PLAIN, {"journal_size": -1, "journal_offset": -1}),
]


@pytest.mark.parametrize(("header", "fields"), ACCEPTED)
def test_unusual_value_is_accepted(header: Header, fields: dict[str, int | str]) -> None:
    """Limits, and fields of regions that the image does not need."""
    with_fields(header, **fields).check("disk.fvd", LENGTH)


def test_table_of_more_chunks_than_the_format_has_numbers() -> None:
    limit = with_fields(TABLE, chunk_size=512, virtual_disk_size=MAX_CHUNKS * 512, data_file="data", journal_size=0)
    limit.check("disk.fvd", 9 * GIB)
    with pytest.raises(FormatError, match=r"chunk_size=512: too small for a disk of"):
        with_fields(limit, virtual_disk_size=MAX_CHUNKS * 512 + 512).check("disk.fvd", 9 * GIB)


def test_region_that_ends_past_the_file() -> None:
    """The last byte of each region must be there."""
    for header in (BOTH, FLAT, TABLE, with_fields(BOTH, journal_size=0), with_fields(FLAT, journal_size=0)):
        end = max(region.end for region in header.regions())
        header.check("disk.fvd", end)
        with pytest.raises(FormatError, match=f"ends at {end}, the file at {end - 1}"):
            header.check("disk.fvd", end - 1)


def test_regions_in_another_order() -> None:
    header = with_fields(BOTH, bitmap_offset=20480, table_offset=16384, journal_offset=8192)
    header.check("disk.fvd", 24576)
    with pytest.raises(FormatError, match="table_offset=15872: the table overlaps the journal"):
        with_fields(header, table_offset=15872).check("disk.fvd", 24576)
    with pytest.raises(FormatError, match="bitmap_offset=20480: the bitmap ends at 24576"):
        header.check("disk.fvd", 24575)


PROFILE = {"prefetch_profile_offset": 24576, "prefetch_profile_entries": 1, "metadata_size": LENGTH}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"prefetch_profile_entries": 1023}, ""),
        ({"prefetch_profile_entries": 1025}, "of 16384 bytes, must be in 8192..36864"),
        ({"prefetch_profile_entries": -1}, "prefetch_profile_entries=-1 must be 0..87381"),
        ({"prefetch_profile_entries": 87382}, "prefetch_profile_entries=87382 must be 0..87381"),
        ({"unit_of_PrefetchProfileEntry_len": 0}, "unit_of_PrefetchProfileEntry_len=0 must be 1.."),
        ({"unit_of_PrefetchProfileEntry_len": (1 << 30) + 1}, "must be 1..1073741824"),
        ({"prefetch_profile_offset": 24576 + 512}, "must be a multiple of 4096"),
        ({"prefetch_profile_offset": 4096}, "must be in 8192..36864"),
        ({"prefetch_profile_offset": -4096}, "must be in 8192..36864"),
        ({"prefetch_profile_offset": LENGTH}, "must be in 8192..36864"),
        ({"prefetch_profile_offset": 12288}, "of 4096 bytes, overlaps the table"),
        ({"prefetch_profile_offset": 12288, "prefetch_profile_entries": 342}, "overlaps the table and the journal"),
    ],
)
def test_where_a_profile_can_be(fields: dict[str, int | str], why: str) -> None:
    header = with_fields(BOTH, **(PROFILE | fields))
    fault = header.profile_fault(header.regions(), header.metadata_end)
    assert why in fault
    assert bool(why) == bool(fault) == (header.profile_region is None)


def test_no_profile_is_no_fault() -> None:
    header = with_fields(BOTH, prefetch_profile_offset=24576, metadata_size=LENGTH)
    assert header.profile_fault(header.regions(), header.metadata_end) == ""
    assert header.profile_region is None


GEOMETRY = ["all_data_in_fvd_img", "virtual_disk_size", "metadata_size", "base_img_size", "bitmap_offset"]
GEOMETRY += ["bitmap_size", "block_size", "compact_image", "table_offset", "chunk_size", "journal_offset"]
GEOMETRY += ["journal_size"]
VALUES = [0, 1, -1, 8, 511, 512, 4095, 4096, 4608, 8192, 12288, 16384, 20480, 24576, LENGTH, MIB, MIB + 512]
VALUES += [(1 << 31) - 512, (1 << 31) - 1, -(1 << 31), 1 << 32, MAX_DISK_SIZE, (1 << 63) - 512, -(1 << 63)]


any_value = st.sampled_from(VALUES) | st.integers(0, 128).map(lambda n: n * 512) | st.integers()


@settings(max_examples=400, deadline=None)
@example("both", [("virtual_disk_size", 0), ("journal_offset", 12288)], None, LENGTH)
@given(
    st.sampled_from(["both", "flat", "table", "plain"]),
    st.lists(st.tuples(st.sampled_from(GEOMETRY), any_value), max_size=4),
    st.none() | st.none() | st.tuples(st.integers(0, HEADER_SIZE - 16), st.binary(min_size=1, max_size=16)),
    st.sampled_from([LENGTH, LENGTH, 24576]) | st.integers(0, 2 * LENGTH),
)
def test_damaged_header_is_refused_or_harmless(
    kind: str, fields: list[tuple[str, int]], piece: tuple[int, bytes] | None, length: int
) -> None:
    """What passes has regions that lie in the file, apart, and hold what they have to."""
    data = bytearray({"both": BOTH, "flat": FLAT, "table": TABLE, "plain": PLAIN}[kind].encode())
    for name, value in fields:
        size = struct.calcsize("<" + CODES[NAMES.index(name)])
        data[OFFSETS[name] : OFFSETS[name] + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    if piece is not None:
        data[piece[0] : piece[0] + len(piece[1])] = piece[1]
    raw = bytes(data)
    try:
        header = Header.decode(raw, "disk.fvd")
        header.check("disk.fvd", length)
    except FvdError:
        return
    assert header.encode()[:8] == raw[:8]
    assert 0 <= header.virtual_disk_size <= MAX_DISK_SIZE
    assert header.virtual_disk_size % 512 == 0
    used = [(0, HEADER_SIZE)]
    if header.base_img and not header.all_data_in_fvd_img:
        assert header.block_size > 0
        assert header.block_size % 512 == 0
        assert 0 <= header.base_size <= header.virtual_disk_size
        assert header.base_img_size % 512 == 0
        assert header.blocks * header.block_size >= header.base_size
        used.append((header.bitmap_offset, ceil_div(header.base_size, header.block_size) // 8))
    if header.compact_image:
        assert header.chunk_size > 0
        assert header.chunk_size % 512 == 0
        assert header.chunks * header.chunk_size >= header.virtual_disk_size
        used.append((header.table_offset, 4 * ceil_div(header.virtual_disk_size, header.chunk_size)))
        # A disk that was cut below its base has the base's range cut as well before it grows.
        cut = with_fields(header, base_img_size=header.base_size) if header.has_base else header
        full = with_fields(cut, virtual_disk_size=header.table_capacity * header.chunk_size)
        if header.virtual_disk_size < full.virtual_disk_size <= MAX_DISK_SIZE:
            full.check("disk.fvd", MAX_DISK_SIZE)
    if len(used) > 1 and header.journal_size:
        assert header.journal_size % 512 == 0
        used.append((header.journal_offset, header.journal_size))
    for offset, size in used[1:]:
        assert offset >= 0
        assert size >= 0
        assert offset + size <= length
    if not header.data_file:
        used.append((header.data_offset, header.virtual_disk_size))
    assert header.data_offset >= 0
    used.sort()
    for (offset, size), (following, _) in itertools.pairwise(used):
        assert offset + size <= following


# --- writing parts of a header --------------------------------------------------------------------


def test_changed_sectors() -> None:
    old = bytes(range(256)) * 8
    assert list(changed_sectors(old, old)) == []
    new = bytearray(old)
    new[511] ^= 1
    new[1024] ^= 1
    assert list(changed_sectors(old, bytes(new))) == [(0, bytes(new[:512])), (1024, bytes(new[1024:1536]))]
    new[-1] ^= 1
    assert [at for at, _ in changed_sectors(old, bytes(new))] == [0, 1024, 1536]


@pytest.mark.parametrize(("old", "new"), [(bytes(512), bytes(1024)), (bytes(1024), bytes(512)), (b"a", b"b")])
def test_changed_sectors_compares_whole_sectors(old: bytes, new: bytes) -> None:
    with pytest.raises(AssertionError):
        list(changed_sectors(old, new))


def test_with_fields_changes_a_copy() -> None:
    changed = with_fields(BOTH, clean_shutdown=0, virtual_disk_size=MIB)
    assert dataclasses.replace(changed, clean_shutdown=1, virtual_disk_size=MIB + 512) == BOTH
    assert BOTH.clean_shutdown == 1


@given(st.integers(0, 1 << 62), st.integers(1, 1 << 40))
def test_rounding(value: int, unit: int) -> None:
    up = round_up(value, unit)
    assert up % unit == 0
    assert 0 <= up - value < unit
    assert ceil_div(value, unit) * unit == up


def test_magic_is_at_the_start_of_the_file() -> None:
    assert struct.unpack_from("<I", RAW) == (MAGIC,) == (0x5143F5A9,)


def test_table_capacity_is_whole_pages() -> None:
    """The table is written, and checked, in whole pages: one that would reach into the next region is not there."""
    header = with_fields(BOTH, journal_offset=12288 + 4608, journal_size=7680)
    header.check("disk.fvd", LENGTH)
    assert header.table_capacity == 1024


@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(compact=True, chunk_size=(1 << 62) + 4096),
        CreateOptions(compact=True, grow_unit=(1 << 62) + 1),
        CreateOptions(compact=True, grow_unit=1 << 63),
        CreateOptions(compact=True, journal_size=1 << 62),
        CreateOptions(compact=True, journal_size=1 << 63),
        CreateOptions(base_img="b", prefetch_delay=1 << 31),
        CreateOptions(base_img="b", block_size=-512),
    ],
)
def test_new_header_refuses_what_its_check_would(options: CreateOptions) -> None:
    with pytest.raises(UsageError):
        header = new_header(MIB, MIB if options.base_img else None, options)
        header.encode()
        header.check("new", header.metadata_size)


def test_a_profile_leaves_the_bitmap_of_a_complete_image_alone() -> None:
    options = CreateOptions(base_img="base", base_img_fmt="raw", block_size=4096, profile_room=65536)
    header = new_header(8 << 20, 8 << 20, options)
    assert with_fields(header, all_data_in_fvd_img=1).profile_room == header.profile_room
    assert header.profile_room.size == 65536
