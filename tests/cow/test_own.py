"""The map of what a disk has beyond its template."""

from __future__ import annotations

import random

import pytest

from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.own import MAX_BITS, Head, OwnBits, unit_for
from fvdfs.format.header import PAGE, SECTOR

EPOCH, STAMP = "e" * 16, "ab" * 16


def read(data: bytes) -> Bitmap:
    head = Head.decode(data[:SECTOR])
    return head.bitmap(data[SECTOR : SECTOR + head.length])


def test_a_unit_is_shared_only_as_a_whole() -> None:
    size = 20 * PAGE - SECTOR
    random_ = random.Random(4)
    for _ in range(300):
        found, at = OwnBits(size), 0
        shared = bytearray(size // SECTOR)
        while at < size:
            start = at + random_.randrange(0, 5) * SECTOR
            stop = min(size, start + random_.randrange(1, 60) * SECTOR)
            if start < stop:
                found.shared(start, stop)
                shared[start // SECTOR : stop // SECTOR] = b"\1" * ((stop - start) // SECTOR)
            at = stop
        found.end()
        data = found.encode(EPOCH, STAMP)
        assert len(data) % SECTOR == 0
        head, own = Head.decode(data[:SECTOR]), read(data)
        assert (head.size, head.epoch, head.stamp, head.unit) == (size, EPOCH, STAMP, PAGE)
        for unit in range(20):
            parts = shared[unit * PAGE // SECTOR : (unit + 1) * PAGE // SECTOR]
            assert own.is_local(unit) == (not all(parts))


def test_all_is_its_own_at_first() -> None:
    assert OwnBits(PAGE + SECTOR).bitmap().count_local() == 2
    assert OwnBits(PAGE + SECTOR).bitmap().blocks == 2


def test_units_grow_with_the_disk() -> None:
    assert unit_for(1 << 40) == PAGE
    assert unit_for((1 << 40) + SECTOR) == 2 * PAGE
    for size in (1 << 50, (1 << 62) - SECTOR):
        assert -(-size // unit_for(size)) <= MAX_BITS


def test_damaged_maps_are_refused() -> None:
    data = OwnBits(100 * PAGE).encode(EPOCH, STAMP)
    length = Head.decode(data[:SECTOR]).length
    for at in (*range(300), *range(SECTOR, SECTOR + length)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        if head_or_none(damaged) == Head.decode(data[:SECTOR]) and at < SECTOR:
            continue  # behind the text
        with pytest.raises(ValueError):
            read(bytes(damaged))
    with pytest.raises(ValueError):
        read(data[:-SECTOR])
    for head in (Head(0, EPOCH, STAMP, length, ""), Head(8, EPOCH, STAMP, 1 << 60, ""), Head(8, EPOCH, STAMP, 0, "")):
        with pytest.raises(ValueError):
            Head.decode(head.encode())


def head_or_none(data: bytearray) -> Head | None:
    try:
        return Head.decode(bytes(data[:SECTOR]))
    except ValueError:
        return None


def test_a_map_of_another_length_is_refused() -> None:
    small, large = OwnBits(8 * PAGE), OwnBits(1 << 36)
    for made, size in ((small, 1 << 36), (large, 8 * PAGE)):
        data = made.encode(EPOCH, STAMP)
        head = Head.decode(data[:SECTOR])
        with pytest.raises(ValueError):
            Head(size, EPOCH, STAMP, head.length, head.checksum).bitmap(data[SECTOR : SECTOR + head.length])
