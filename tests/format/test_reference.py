"""The reference reader against the golden images, and proof that its checks can fail."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import reference
from support.golden import MANIFEST, extract
from support.records import bits, entries, raw_entries
from support.reference import CODES, MAGIC, MISSING, NAMES, TABLE_RECORD


@pytest.mark.parametrize("golden", MANIFEST, ids=lambda golden: str(golden["name"]))
def test_golden_image(golden: dict[str, Any], tmp_path: Path) -> None:
    path = extract(golden["name"], tmp_path)
    try:
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(golden["files"])
        header = reference.Header(path)
        assert header.virtual_disk_size == golden["virtual_size"]
        assert header.clean_shutdown == (not golden["crashed"])
        assert reference.sha256(path) == golden["sha256"]
        assert reference.check(path) == []
    finally:
        for file in tmp_path.iterdir():
            file.unlink()  # one of these is up to 100 MiB; pytest keeps folders for a while


# -- small images made by hand --
#
# 1 MiB and one sector of disk; 512 KiB and one sector of base, all 0xBB; 4 KiB blocks, so 129 of
# them, the last one partial; 12 KiB chunks (three blocks), so 86. In use: blocks 0 to 5, and the
# last chunk, which is past the base. Own storage holds, 12 KiB by 12 KiB, 0x01, 0x02, ...

VIRTUAL = (1 << 20) + 512
BASE = (512 << 10) + 512
BLOCK = 4096
CHUNK = 12288
CHUNKS = 86
BITMAP_AT, TABLE_AT, JOURNAL_AT, DATA_AT = 8192, 12288, 16384, 20480
JOURNAL_SECTORS = 8
TABLE = {0: 1, 1: 0, 85: 2}
KINDS = ("plain", "bitmap", "table", "both")

OF_BASE = {
    "base_img_size": BASE,
    "bitmap_offset": BITMAP_AT,
    "bitmap_size": 4096,
    "block_size": BLOCK,
    "prefetch_start_delay": -1,
    "max_outstanding_copy_on_read_data": 2000000,
    "num_prefetch_slots": 2,
    "bytes_per_prefetch": 1 << 20,
    "prefetch_perf_calc_alpha": 80,
    "prefetch_throttle_time": 30000,
    "unit_of_PrefetchProfileEntry_len": 4096,
    "profile_directed_prefetch_start_delay": -1,
}
OF_TABLE = {
    "compact_image": 1,
    "table_offset": TABLE_AT,
    "chunk_size": CHUNK,
    "storage_grow_unit": 10 * CHUNK,
}


class Sample:
    """A valid image made by hand, with means to spoil it."""

    def __init__(self, folder: Path, kind: str, name: str = "disk.fvd") -> None:
        self.path = folder / name
        self.base = folder / "base.raw"
        self.has_base, self.has_table = kind in ("bitmap", "both"), kind in ("table", "both")
        self.path.write_bytes(bytes(DATA_AT))
        self.put(magic=MAGIC, version=1, virtual_disk_size=VIRTUAL, metadata_size=DATA_AT)
        self.put(all_data_in_fvd_img=int(not self.has_base), clean_shutdown=1)
        if self.has_base or self.has_table:
            self.put(journal_offset=JOURNAL_AT, journal_size=JOURNAL_SECTORS * 512)
        if self.has_base:
            self.base.write_bytes(b"\xbb" * BASE)
            self.put(base_img="base.raw", **OF_BASE)
            self.write(BITMAP_AT, b"\x3f")
        if self.has_table:
            self.put(**OF_TABLE)
            self.write(TABLE_AT, b"\xff" * 4096)
            for chunk, number in TABLE.items():
                self.entry(chunk, number)
        chunks = 3 if self.has_table else CHUNKS
        data = b"".join(bytes([number + 1]) * CHUNK for number in range(chunks))
        self.write(DATA_AT, data[:VIRTUAL])

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the image."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def put(self, **fields: int | str | bytes) -> None:
        """Set fields of the header."""
        for name, value in fields.items():
            index = NAMES.index(name)
            raw = value.encode() if isinstance(value, str) else value
            offset = struct.calcsize("<" + "".join(CODES[:index]))
            self.write(offset, struct.pack(f"<{CODES[index]}", raw))

    def entry(self, chunk: int, entry: int) -> None:
        """Set an entry of the table."""
        self.write(TABLE_AT + 4 * chunk, struct.pack("<I", entry))

    def journal(self, sector: int, *records: bytes) -> None:
        """Fill a sector of the journal."""
        self.write(JOURNAL_AT + 512 * sector, b"".join(records))

    def crash(self, sector: int, *records: bytes) -> None:
        """Fill a sector of the journal, which is to be replayed."""
        self.journal(sector, *records)
        self.put(clean_shutdown=0)

    def grow(self, chunks: int) -> None:
        """Make own storage hold so many chunks, filled as the first ones are."""
        self.write(DATA_AT, b"".join(bytes([number + 1]) * CHUNK for number in range(chunks)))

    def truncate(self, length: int) -> None:
        """Cut the image, or make it longer."""
        with self.path.open("r+b") as file:
            file.truncate(length)

    def read(self) -> bytes:
        """The whole virtual disk, by the reference reader."""
        return b"".join(reference.read_disk(self.path))

    def check(self, writer: str = "original") -> list[str]:
        """What the reference checker finds."""
        return reference.check(self.path, writer)


def disk(own: dict[int, int], base: bytes = b"\xbb" * BASE) -> bytes:
    """A disk whose bytes come from `base`, but for some chunks, each filled with one byte."""
    content = bytearray(base.ljust(VIRTUAL, b"\0"))
    for chunk, byte in own.items():
        start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, VIRTUAL)
        content[start:end] = bytes([byte]) * (end - start)
    return bytes(content)


PLAIN_DISK = disk({chunk: chunk + 1 for chunk in range(CHUNKS)})
PAST_BASE = PLAIN_DISK[BASE:]
SAMPLE_DISKS = {
    "plain": PLAIN_DISK,
    "bitmap": disk({0: 1, 1: 2})[:BASE] + PAST_BASE,
    "table": disk({0: 2, 1: 1, 85: 3}, b""),
    "both": disk({0: 2, 1: 1, 85: 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_valid(kind: str, tmp_path: Path) -> None:
    sample = Sample(tmp_path, kind)
    assert sample.check("fvdfs") == []
    assert sample.read() == SAMPLE_DISKS[kind]


# -- reading --


def test_bit_31_on_disk_is_ignored(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.entry(0, 0x80000001)
    assert sample.read() == SAMPLE_DISKS["both"]


def test_base_shorter_and_longer_than_its_recorded_size(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.base.write_bytes(b"\xbb" * (VIRTUAL + 1000))
    assert sample.read() == SAMPLE_DISKS["both"]
    sample.base.write_bytes(b"\xbb" * 40001)
    assert sample.read() == disk({0: 2, 1: 1, 85: 3}, b"\xbb" * 40001)


def test_base_is_not_needed_when_all_data_is_in_the_image(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.put(all_data_in_fvd_img=1)
    sample.base.unlink()
    assert sample.read() == SAMPLE_DISKS["table"]


def test_short_data_region_is_zeros(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "plain")
    sample.truncate(DATA_AT + 5 * CHUNK + 7)
    assert sample.read() == PLAIN_DISK[: 5 * CHUNK + 7].ljust(VIRTUAL, b"\0")


@pytest.mark.parametrize("kind", KINDS)
def test_data_file(kind: str, tmp_path: Path) -> None:
    sample = Sample(tmp_path, kind)
    raw = sample.path.read_bytes()
    (tmp_path / "data.raw").write_bytes(raw[DATA_AT:])
    sample.truncate(DATA_AT)
    sample.put(data_file="data.raw", data_file_fmt="raw")
    assert sample.check("fvdfs") == []
    assert sample.read() == SAMPLE_DISKS[kind]


def test_chain_of_images(tmp_path: Path) -> None:
    Sample(tmp_path, "bitmap", "middle.fvd")
    sample = Sample(tmp_path, "both")
    sample.put(base_img="middle.fvd", base_img_fmt="fvd")
    sample.crash(0, entries(1, 3), bits(24, 24))  # an image replayed, on one that is not
    sample.grow(4)
    assert sample.read() == disk({0: 2, 1: 4, 85: 3})
    sample.write(BITMAP_AT, b"\0")  # 0 to 2: from the middle image; 3 to 5: replayed
    assert sample.read() == disk({0: 1, 1: 4, 85: 3})
    sample.put(all_data_in_fvd_img=0, base_img="middle.fvd", base_img_fmt="vmdk")
    with pytest.raises(ValueError, match="vmdk"):
        sample.read()


def test_reader_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.truncate(DATA_AT - 1)
    with pytest.raises(ValueError, match="ends inside its journal"):
        sample.read()
    sample.put(magic=0)
    with pytest.raises(ValueError, match="not an FVD image"):
        sample.read()


def test_replay(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.grow(6)
    # Blocks 8 and 9 from a write of their middle only; a write over the end of the base; one
    # wholly past it; and no more records after the first type that is none of the two.
    sample.crash(0, entries(2, 5), bits(60 + 8, 1))
    sample.journal(1, entries(42, 3, 4), bits(1023, 8), bytes(4), entries(3, 3), bits(100, 8))
    sample.journal(3, entries(85, 2), bits(2040, 1))
    expected = bytearray(disk({0: 2, 1: 1, 43: 5, 85: 3}))
    expected[8 * BLOCK : 9 * BLOCK] = b"\x06" * BLOCK
    expected[127 * BLOCK : 129 * BLOCK] = b"\x04" * (2 * BLOCK)
    assert sample.read() == bytes(expected)
    assert sample.check() == []
    sample.put(clean_shutdown=1)
    assert sample.read() == SAMPLE_DISKS["both"]


BAD_RECORDS: dict[str, tuple[bytes, str]] = {
    "first entry": (entries(CHUNKS, 5), "out of range"),
    "entries past the table": (entries(CHUNKS - 1, 2, 5), "out of range"),
    "entry missing": (raw_entries(6, 4, MISSING), "0xFFFFFFFF"),
    "past the storage": (entries(6, 7), "past the storage"),
    "used twice": (entries(6, 1), "used twice: by 0 and 6"),
    "used twice in the record": (entries(6, 5, 5), "used twice: by 6 and 7"),
    "longer than the sector": (struct.pack("<III", TABLE_RECORD, 6, 126), "longer than"),
    "first sector negative": (bits(-1, 8), "out of range"),
    "last sector": (bits(2048, 2), "out of range"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_ends_its_sector_only(name: str, tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.grow(7)
    bad, problem = BAD_RECORDS[name]
    sample.crash(0, entries(3, 3), bad, entries(4, 4), bits(96, 24))
    sample.journal(1, entries(3, 3), bits(72, 24))
    sample.journal(2, entries(5, 5), bits(120, 24))
    assert sample.read() == disk({0: 2, 1: 1, 3: 4, 5: 6, 85: 3})
    (found,) = sample.check()
    assert found.startswith("journal sector 0: ")
    assert problem in found


@pytest.mark.parametrize(("kind", "bad"), [("table", bits(0, 8)), ("bitmap", entries(2, 5))])
def test_record_of_a_kind_the_image_has_not(kind: str, bad: bytes, tmp_path: Path) -> None:
    sample = Sample(tmp_path, kind)
    sample.crash(0, bad)
    assert sample.read() == SAMPLE_DISKS[kind]
    (found,) = sample.check()
    assert "without a" in found


def test_fullest_sectors(tmp_path: Path) -> None:
    """125 entries, or 121 and a bitmap record, leave no room for a type that ends them."""
    assert len(raw_entries(0, *range(125))) == len(raw_entries(0, *range(121)) + bits(0, 1)) == 512
    sample = Sample(tmp_path, "table")
    sample.put(chunk_size=4096, storage_grow_unit=4096)
    sample.write(TABLE_AT, b"\xff" * 4096)
    sample.grow(50)
    sample.crash(0, entries(2, *range(125)))
    assert sample.check("fvdfs") == []
    assert sample.read()[8192 : 8192 + 125 * 4096 : 4096] == bytes(n // 3 + 1 for n in range(125))


# -- what check() finds: one corruption each --

HEADER_CORRUPTIONS: list[tuple[str, str, int | str | bytes, str]] = [
    ("plain", "magic", 0x5143F5A8, "magic is"),
    ("plain", "version", 2, "version is 2"),
    ("plain", "all_data_in_fvd_img", 2, "all_data_in_fvd_img is 2"),
    ("plain", "all_data_in_fvd_img", 0, "all_data_in_fvd_img is 0"),
    ("plain", "virtual_disk_size", VIRTUAL + 1, f"virtual_disk_size is {VIRTUAL + 1}"),
    ("plain", "virtual_disk_size", 0, "virtual_disk_size is 0"),
    ("table", "metadata_size", DATA_AT + 512, "the data is not on a page boundary"),
    ("plain", "metadata_size", 4096, "the header overlaps the data"),
    ("bitmap", "metadata_size", TABLE_AT, "the regions are not in order"),
    ("bitmap", "metadata_size", JOURNAL_AT, "the journal overlaps the data"),
    ("plain", "data_file", b"x" * 1024, "data_file is not NUL-terminated"),
    ("plain", "data_file", b"\0x", "data_file is not NUL-terminated and NUL-filled"),
    ("plain", "data_file", "missing", "missing"),
    ("plain", "data_file_fmt", "qcow2", "qcow2"),
    ("plain", "compact_image", 2, "compact_image is 2"),
    ("plain", "need_zero_init", 2, "need_zero_init is 2"),
    ("plain", "clean_shutdown", 2, "clean_shutdown is 2"),
    ("plain", "clean_shutdown", 0, "clean_shutdown is 0 without a journal"),
    ("plain", "base_img_size", 512, "base_img_size is 512"),
    ("plain", "block_size", 512, "block_size is 512"),
    ("plain", "copy_on_read", 1, "copy_on_read is 1"),
    ("plain", "num_prefetch_slots", 2, "num_prefetch_slots is 2"),
    ("plain", "chunk_size", 4096, "chunk_size is 4096"),
    ("plain", "storage_grow_unit", 4096, "storage_grow_unit is 4096"),
    ("plain", "table_offset", 8192, "table_offset is 8192"),
    ("plain", "journal_offset", 8192, "journal_offset is 8192"),
    ("plain", "journal_size", 512, "a journal with neither"),
    ("plain", "prefetch_profile_offset", -4096, "prefetch_profile_offset is -4096"),
    ("plain", "prefetch_profile_entries", -1, "prefetch_profile_entries is -1"),
    ("plain", "prefetch_profile_entries", 1, "the header overlaps the prefetch profile"),
    ("both", "base_img", "missing", "missing"),
    ("both", "base_img_fmt", "qcow2", "qcow2"),
    ("both", "base_img_size", BASE - 1, f"base_img_size is {BASE - 1}"),
    ("both", "base_img_size", -512, "base_img_size is -512"),
    ("both", "bitmap_size", 8192, "bitmap_size is 8192"),
    ("both", "bitmap_size", 17, "bitmap_size is 17"),
    ("both", "bitmap_offset", 12288, "the bitmap overlaps the table"),
    ("both", "bitmap_offset", 4096, "the header overlaps the bitmap"),
    ("both", "bitmap_offset", -4096, "the regions are not in order"),
    ("both", "block_size", 0, "block_size is 0"),
    ("both", "block_size", 1000, "block_size is 1000"),
    ("both", "copy_on_read", 2, "copy_on_read is 2"),
    ("both", "max_outstanding_copy_on_read_data", -1, "max_outstanding_copy_on_read_data is -1"),
    ("both", "num_prefetch_slots", 0, "num_prefetch_slots is 0"),
    ("both", "bytes_per_prefetch", 0, "bytes_per_prefetch is 0"),
    ("both", "bytes_per_prefetch", 4608, "bytes_per_prefetch is 4608"),
    ("both", "prefetch_perf_calc_alpha", 101, "prefetch_perf_calc_alpha is 101"),
    ("both", "prefetch_min_read_throughput", -1, "prefetch_min_read_throughput is -1"),
    ("both", "chunk_size", 12289, "chunk_size is 12289"),
    ("both", "chunk_size", 0, "chunk_size is 0"),
    ("both", "storage_grow_unit", CHUNK - 1, f"storage_grow_unit is {CHUNK - 1}"),
    ("both", "need_zero_init", 1, "need_zero_init is 1"),
    ("both", "table_offset", 12800, "the table is not on a page boundary"),
    ("both", "table_offset", JOURNAL_AT, "the table overlaps the journal"),
    ("both", "table_offset", JOURNAL_AT + 4096, "the regions are not in order"),
    ("both", "journal_size", -512, "journal_size is -512"),
    ("both", "journal_size", 1000, "journal_size is 1000"),
    ("both", "journal_size", 4608, "the journal overlaps the data"),
    ("both", "prefetch_profile_entries", 1, "the header overlaps the prefetch profile"),
]


@pytest.mark.parametrize(("kind", "name", "value", "problem"), HEADER_CORRUPTIONS)
def test_check_finds_bad_field(kind: str, name: str, value: int | str | bytes, problem: str, tmp_path: Path) -> None:
    sample = Sample(tmp_path, kind)
    sample.put(**{name: value})
    found = sample.check()
    assert [text for text in found if problem in text], found


def small_chunks(sample: Sample) -> None:
    """A table of 2049 entries needs a journal of 17 sectors, and three pages."""
    sample.put(chunk_size=512, journal_size=16 * 512, table_offset=4 * 4096)
    sample.put(journal_offset=7 * 4096, metadata_size=9 * 4096)
    sample.truncate(1 << 20)


def too_many_entries(sample: Sample) -> None:
    """Smaller chunks, so that there are enough of them; the base is only as large as one."""
    sample.put(chunk_size=4096, base_img_size=4096)
    sample.write(BITMAP_AT, b"\x01")
    sample.write(TABLE_AT, b"\xff" * 4096)
    sample.grow(50)
    sample.crash(0, entries(0, *range(122)))


def entry_changes(sample: Sample) -> None:
    sample.grow(4)
    sample.crash(0, entries(1, 3))


def profile_in_data(sample: Sample) -> None:
    sample.put(prefetch_profile_offset=DATA_AT + 4096, prefetch_profile_entries=1)


CORRUPTIONS: dict[str, tuple[str, Callable[[Sample], None], str]] = {
    "header cut": ("plain", lambda s: s.truncate(4335), "the file ends inside its header"),
    "header padding cut": ("plain", lambda s: s.truncate(8191), "the file ends inside its header"),
    "journal cut": ("both", lambda s: s.truncate(DATA_AT - 1), "the file ends inside its journal"),
    "header padding": (
        "plain",
        lambda s: s.write(4336, b"x"),
        "the header's padding is not zero",
    ),
    "journal small": ("table", small_chunks, "the journal has no room for the whole table"),
    "profile in data": ("both", profile_in_data, "the data overlaps the prefetch profile"),
    "bitmap tail": (
        "bitmap",
        lambda s: s.write(BITMAP_AT + 16, b"\x02"),
        "the bitmap's tail is neither zero nor, with all the rest, ones",
    ),
    "bitmap tail all ones": (
        "bitmap",
        lambda s: s.write(BITMAP_AT + 16, b"\xfe" + b"\xff" * (4096 - 17)),
        "the bitmap's tail is neither zero nor, with all the rest, ones",
    ),
    "not all prefetched": (
        "bitmap",
        lambda s: s.put(all_data_in_fvd_img=1),
        "all_data_in_fvd_img is 1, but a bit is 0",
    ),
    "table tail": ("table", lambda s: s.entry(CHUNKS, 0), "the table's tail is not 0xFF"),
    "bit 31": ("both", lambda s: s.entry(0, 0x80000001), "bit 31 of an entry is set"),
    "used twice": ("both", lambda s: s.entry(1, 1), "a chunk number is used twice in the table"),
    "past the storage": (
        "both",
        lambda s: s.entry(2, 3),
        "the storage ends before the end of its chunk 3",
    ),
    "storage cut": (
        "table",
        lambda s: s.truncate(DATA_AT + 3 * CHUNK - 1),
        "the storage ends before the end of its chunk 2",
    ),
    "storage cut without table": (
        "bitmap",
        lambda s: s.truncate(DATA_AT + VIRTUAL - 512),
        "the storage holds data, but is shorter than the disk",
    ),
    "no storage under bits": (
        "bitmap",
        lambda s: s.truncate(DATA_AT),
        "the storage holds data, but is shorter than the disk",
    ),
    "bit without chunk": (
        "both",
        lambda s: s.write(BITMAP_AT, b"\x7f"),
        "bit without chunk: block 6, chunk 2",
    ),
    "record after bitmap record": (
        "bitmap",
        lambda s: s.crash(1, bits(0, 8), bits(8, 8)),
        "journal sector 1: a record follows a bitmap record",
    ),
    "122 entries": (
        "both",
        too_many_entries,
        "journal sector 0: 122 entries, more than 121 with a bitmap",
    ),
    "bitmap record alone": (
        "both",
        lambda s: s.crash(0, bits(0, 8)),
        "journal sector 0: bitmap record without the entries of its chunks",
    ),
    "too few entries": (
        "both",
        lambda s: s.crash(0, entries(0, 1), bits(16, 16)),
        "journal sector 0: bitmap record without the entries of its chunks",
    ),
    "empty bitmap record": (
        "bitmap",
        lambda s: s.crash(0, bits(0, 0)),
        "journal sector 0: empty record",
    ),
    "empty table record": (
        "table",
        lambda s: s.crash(0, entries(0)),
        "journal sector 0: empty record",
    ),
    "entry changes": (
        "table",
        entry_changes,
        "journal sector 0: entry of chunk 1 changes: 0 to 3",
    ),
    "clean, but more in the journal": (
        "bitmap",
        lambda s: s.journal(0, bits(48, 8)),
        "the image is clean, but a replay of its journal changes it",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_finds_corruption(name: str, tmp_path: Path) -> None:
    kind, spoil, problem = CORRUPTIONS[name]
    sample = Sample(tmp_path, kind)
    spoil(sample)
    assert sample.check() == [problem]


def test_check_finds_the_number_that_no_chunk_can_have(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "table")
    sample.entry(2, 0x7FFFFFFF)
    assert "an entry is 0x7FFFFFFF" in sample.check()


def test_check_is_stricter_with_fvdfs(tmp_path: Path) -> None:
    sample = Sample(tmp_path, "both")
    sample.journal(0, entries(0, 1), bits(0, 8), bytes(8), b"garbage")
    assert sample.check() == []
    assert sample.check("fvdfs") == ["journal sector 0: not zero after its records"]
    sample.journal(0, bytes(512))
    sample.base.write_bytes(b"\xbb" * 6 * BLOCK)  # zeros from here on: a lost block loses nothing
    sample.write(BITMAP_AT, b"\x7f")
    assert sample.check() == []
    assert sample.check("fvdfs") == ["bit without chunk: block 6, chunk 2"]


def test_check_of_a_prefetched_image(tmp_path: Path) -> None:
    """All bits set, those past the last block too, or not."""
    sample = Sample(tmp_path, "bitmap")
    sample.put(all_data_in_fvd_img=1)
    sample.write(BITMAP_AT, b"\xff" * 4096)
    assert sample.check("fvdfs") == []
    sample.write(BITMAP_AT, (b"\xff" * 16 + b"\x01").ljust(4096, b"\0"))
    assert sample.check("fvdfs") == []


def test_check_of_an_image_never_written_to(tmp_path: Path) -> None:
    """Own storage is extended before the first data is written, or at creation (format.md, "Compatibility")."""
    sample = Sample(tmp_path, "bitmap")
    sample.write(BITMAP_AT, b"\0")
    sample.truncate(DATA_AT)
    assert sample.check("fvdfs") == []


def test_check_of_a_prefetch_profile(tmp_path: Path) -> None:
    """Its place is left open (format.md, "Reserved fields"): here after the data of an image without a table."""
    sample = Sample(tmp_path, "plain")
    end = (DATA_AT + VIRTUAL + 4095) // 4096 * 4096
    sample.put(prefetch_profile_offset=end, prefetch_profile_entries=341)
    assert sample.check() == ["the file ends inside its prefetch profile"]
    sample.truncate(end + 4096)
    assert sample.check() == []
    sample.put(prefetch_profile_offset=end - 4096)
    assert sample.check() == ["the data overlaps the prefetch profile"]
