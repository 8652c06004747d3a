"""What a source says of the use of its disk: read as it was said, and not believed where it makes no sense."""

from __future__ import annotations

import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from fvdfs.format import hot
from fvdfs.format.header import PAGE, PROFILE_ENTRY

DISK = 1000 * PAGE + 512


def said(*entries: tuple[int, int]) -> bytes:
    """What says these entries: offset in bytes, length in pages."""
    data = b"".join(PROFILE_ENTRY.pack(*entry) for entry in entries)
    head = hot.encode([])[:8] + len(entries).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little")
    return (head + data).ljust(hot.SIZE, b"x")


@given(st.lists(st.integers(0, 1000), unique=True))
def test_it_is_read_as_it_was_said(pages: list[int]) -> None:
    extents = [(page * PAGE, min((page + 1) * PAGE, DISK)) for page in pages]
    data = hot.encode(extents)
    assert hot.decode(data, DISK) == extents
    assert hot.decode(data.ljust(hot.SIZE, b"x"), DISK) == extents


def test_there_is_room_for_so_many() -> None:
    extents = [(2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(hot.MOST + 9)]
    data = hot.encode(extents)
    assert hot.SIZE - PROFILE_ENTRY.size < len(data) <= hot.SIZE
    assert hot.decode(data, 1 << 40) == extents[: hot.MOST]


def test_what_lies_behind_the_disk_is_left_out() -> None:
    data = said((0, 1), (DISK - 512, 1), (DISK, 1), (PAGE, 7), (1 << 62, 1), (-PAGE, 1), (9 * PAGE, 0))
    assert hot.decode(data, DISK) == [(0, PAGE), (DISK - 512, DISK), (PAGE, 8 * PAGE)]
    assert hot.decode(data, PAGE) == [(0, PAGE)]


def test_nonsense_is_refused() -> None:
    good = said((0, 1), (5 * PAGE, 3))
    assert hot.decode(good, DISK) == [(0, PAGE), (5 * PAGE, 8 * PAGE)]
    assert hot.decode(bytes(hot.SIZE), DISK) is None
    assert hot.decode(said((0, 600), (0, 600)), DISK) is None, "more than the disk has"
    assert hot.decode(said(*[(0, (1 << 32) - 1)] * hot.MOST), DISK) is None
    assert hot.decode(good[:8] + b"\xff\xff\xff\xff" + good[12:], DISK) is None
    for length in range(16 + 2 * PROFILE_ENTRY.size):
        assert hot.decode(good[:length], DISK) is None
    chance = random.Random(1)
    for _ in range(300):
        bad = bytearray(good)
        bad[chance.randrange(16 + 2 * PROFILE_ENTRY.size)] ^= 1 << chance.randrange(8)
        assert hot.decode(bytes(bad), DISK) is None


@given(st.binary(max_size=200), st.integers(1, 1 << 50))
def test_whatever_is_said_lies_in_the_disk(tail: bytes, size: int) -> None:
    entries = tail[: len(tail) // PROFILE_ENTRY.size * PROFILE_ENTRY.size]
    found = hot.decode(said(*PROFILE_ENTRY.iter_unpack(entries)), size)
    if found is not None:
        assert all(0 <= start < stop <= size for start, stop in found)
        assert sum(stop - start for start, stop in found) <= size
