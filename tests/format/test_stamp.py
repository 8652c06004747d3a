"""The stamp of a template: what it tells apart."""

from __future__ import annotations

import itertools
import random

import pytest

from fvdfs.format.stamp import FIRST, PARTS, PIECE, Stamp, is_stamp, pieces

MIB = 1 << 20


def stamp_of(disk: bytes) -> str:
    stamp = Stamp(len(disk))
    for start, stop in pieces(len(disk)):
        stamp.add(disk[start:stop])
    return stamp.text()


@pytest.mark.parametrize(
    "size", [512, PIECE, FIRST - 512, FIRST, FIRST + 512, FIRST + PARTS * PIECE, 64 * MIB, 1 << 50]
)
def test_the_pieces_are_in_order_and_reach_to_the_end(size: int) -> None:
    found = list(pieces(size))
    assert len(found) <= FIRST // PIECE + PARTS
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert all(0 < stop - start <= PIECE for start, stop in found)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))
    if size <= FIRST + PARTS * PIECE:
        assert sum(stop - start for start, stop in found) == size
    else:
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(found)]
        assert max(gaps) <= size // (PARTS - 1)


def test_disks_that_differ_have_different_stamps() -> None:
    disk = random.Random(1).randbytes(32 * MIB)
    found = {stamp_of(disk), stamp_of(disk[:-512]), stamp_of(disk + bytes(512))}
    for at in (0, FIRST - 1, FIRST, len(disk) - 1):
        found.add(stamp_of(disk[:at] + bytes([disk[at] ^ 1]) + disk[at + 1 :]))
    assert len(found) == 7
    assert all(map(is_stamp, found))
    assert not is_stamp("")
    assert not is_stamp("G" * 32)
