"""Plans of reads and writes, against a disk of single bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.planner import ZERO_UNIT, Geometry, WritePlan, plan_write, read_runs, zero_runs
from fvdfs.format.header import PAGE


@dataclass
class Disk:
    """A small disk; planning does not care for sectors, so that blocks of a few bytes do."""

    geometry: Geometry
    size: int
    local: set[int]

    @property
    def bitmap(self) -> Bitmap:
        size, base = self.geometry.block_size, self.geometry.base_size
        bitmap = Bitmap(bytes(PAGE), -(-base // size))
        for block in self.local:
            bitmap.set_local(block, block + 1)
        return bitmap

    def is_local(self, byte: int) -> bool:
        return byte >= self.geometry.base_size or byte // self.geometry.block_size in self.local


@st.composite
def disks(draw: st.DrawFn) -> Disk:
    geometry = Geometry(draw(st.integers(1, 9)), draw(st.integers(0, 40)))
    blocks = -(-geometry.base_size // geometry.block_size)
    local = draw(st.sets(st.integers(0, blocks - 1))) if blocks else set()
    return Disk(geometry, geometry.base_size + draw(st.integers(0, 20)), local)


@st.composite
def requests(draw: st.DrawFn, *, in_base: bool = False) -> tuple[Disk, int, int]:
    """A disk, and bytes [start, stop) of it; `in_base`: some of which are in the base's range."""
    disk = draw(disks().filter(lambda disk: disk.geometry.base_size > 0) if in_base else disks())
    start = draw(st.integers(0, disk.geometry.base_size - 1 if in_base else disk.size))
    return disk, start, draw(st.integers(start + in_base, disk.size))


# --- reading --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(requests())
def test_read_runs(request: tuple[Disk, int, int]) -> None:
    """In order, without a gap, as few as can be; each byte where the bitmap says."""
    disk, start, stop = request
    at, before = start, None
    for run_start, run_stop, local in read_runs(disk.geometry, disk.bitmap, start, stop):
        assert run_start == at < run_stop
        assert local is not before, "two runs of the same state"
        assert {disk.is_local(byte) for byte in range(run_start, run_stop)} == {local}
        at, before = run_stop, local
    assert at == stop


@settings(max_examples=200, deadline=None)
@given(requests())
def test_blocks_of_a_range(request: tuple[Disk, int, int]) -> None:
    disk, start, stop = request
    touched = {byte // disk.geometry.block_size for byte in range(start, stop) if byte < disk.geometry.base_size}
    assert set(range(*disk.geometry.blocks(start, stop))) == touched


@pytest.mark.parametrize(
    ("local", "runs"),
    [
        ({0, 1, 2}, [(0, 100, True)]),
        ({2}, [(0, 20, False), (20, 100, True)]),
        ({0}, [(0, 10, True), (10, 25, False), (25, 100, True)]),
        ({1}, [(0, 10, False), (10, 20, True), (20, 25, False), (25, 100, True)]),
        (set(), [(0, 25, False), (25, 100, True)]),
    ],
)
def test_read_across_the_end_of_the_base(local: set[int], runs: list[tuple[int, int, bool]]) -> None:
    """The last block reaches past the base; what is past it is in own storage, whatever its bit."""
    disk = Disk(Geometry(10, 25), 100, local)
    assert list(read_runs(disk.geometry, disk.bitmap, 0, 100)) == runs


# --- writing --------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(requests(in_base=True))
def test_write_plan_on_a_model(request: tuple[Disk, int, int]) -> None:
    """Carried out byte by byte, the disk reads as before, overlaid with what was written."""
    disk, start, stop = request
    geometry = disk.geometry
    base = [("base", byte) for byte in range(geometry.base_size)]
    own = [("own", byte) if disk.is_local(byte) else ("never written", byte) for byte in range(disk.size)]
    before = [own[byte] if disk.is_local(byte) else base[byte] for byte in range(disk.size)]

    bitmap = disk.bitmap
    plan = plan_write(geometry, bitmap, start, stop)
    stored: list[tuple[str, int]] = []
    for part in (plan.head, (start, stop), plan.tail):
        if part == (start, stop):
            stored += [("written", byte) for byte in range(start, stop)]
        elif part is not None:
            assert part[0] < part[1] <= geometry.base_size, "nothing is read from the base past its range"
            assert not any(disk.is_local(byte) for byte in range(*part))
            stored += base[slice(*part)]
    assert len(stored) == plan.stop - plan.start
    own[plan.start : plan.stop] = stored
    bitmap.set_local(plan.first, plan.end)

    for byte in range(disk.size):
        local = byte >= geometry.base_size or bitmap.is_local(byte // geometry.block_size)
        assert local == (disk.is_local(byte) or plan.first <= byte // geometry.block_size < plan.end)
        expected = ("written", byte) if start <= byte < stop else before[byte]
        assert (own[byte] if local else base[byte]) == expected
    touched = {byte // geometry.block_size for byte in range(start, min(stop, geometry.base_size))}
    assert set(range(plan.first, plan.end)) == touched


def plan(local: set[int], start: int, stop: int) -> WritePlan:
    """A plan on a disk of 100 bytes in blocks of 10, of which the base has 25."""
    disk = Disk(Geometry(10, 25), 100, local)
    return plan_write(disk.geometry, disk.bitmap, start, stop)


def test_write_of_whole_blocks_needs_nothing_from_the_base() -> None:
    assert plan(set(), 0, 20) == WritePlan(0, 20, None, None, 0, 2)
    assert plan(set(), 10, 25) == WritePlan(10, 25, None, None, 1, 3)


def test_write_inside_a_block_is_completed_on_both_sides() -> None:
    assert plan(set(), 12, 17) == WritePlan(10, 20, (10, 12), (17, 20), 1, 2)


def test_last_block_is_completed_up_to_the_end_of_the_base() -> None:
    assert plan(set(), 22, 24) == WritePlan(20, 25, (20, 22), (24, 25), 2, 3)
    assert plan(set(), 22, 25) == WritePlan(20, 25, (20, 22), None, 2, 3)
    assert plan(set(), 22, 27) == WritePlan(20, 27, (20, 22), None, 2, 3)
    assert plan(set(), 22, 60) == WritePlan(20, 60, (20, 22), None, 2, 3)


def test_local_blocks_are_not_completed() -> None:
    assert plan({0}, 5, 15) == WritePlan(5, 20, None, (15, 20), 0, 2)
    assert plan({1}, 5, 15) == WritePlan(0, 15, (0, 5), None, 0, 2)
    assert plan({0, 1}, 5, 15) == WritePlan(5, 15, None, None, 0, 2, missing=False)


@pytest.mark.parametrize(("start", "stop"), [(25, 26), (30, 40), (5, 5)])
def test_a_write_that_touches_no_block_is_stored_as_it_is(start: int, stop: int) -> None:
    assert plan(set(), start, stop) == WritePlan(start, stop, None, None, 0, 0, missing=False)


def test_without_a_bitmap_a_write_is_stored_as_it_is() -> None:
    written = plan_write(Geometry(10, 25), None, 12, 17)
    assert (written.start, written.stop, written.head, written.tail, written.missing) == (12, 17, None, None, False)


# --- zeros ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2 * ZERO_UNIT) | st.integers(0, 3).map(lambda n: n * ZERO_UNIT),
    st.integers(0, 4 * ZERO_UNIT) | st.integers(0, 4).map(lambda n: n * ZERO_UNIT),
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([-1, 0, 1, ZERO_UNIT // 2])), max_size=5),
)
def test_zero_runs(start: int, length: int, ones: list[tuple[int, int]]) -> None:
    """In order, without a gap, as few as can be; each aligned part of the data where it belongs."""
    data = bytearray(length)
    for unit, offset in ones:
        at = unit * ZERO_UNIT + offset - start
        if 0 <= at < length:
            data[at] = 1
    at, before = start, None
    for run_start, run_stop, zero in zero_runs(start, memoryview(data)):
        assert run_start == at < run_stop
        assert zero is not before, "two runs of the same state"
        assert run_start == start or run_start % ZERO_UNIT == 0
        cuts = [run_start, *range(run_start // ZERO_UNIT * ZERO_UNIT + ZERO_UNIT, run_stop, ZERO_UNIT), run_stop]
        assert {any(data[a - start : b - start]) for a, b in pairwise(cuts)} == {not zero}
        at, before = run_stop, zero
    assert at == start + length


def test_zeros_are_found_by_aligned_parts() -> None:
    assert ZERO_UNIT == 65536
    data = bytearray(ZERO_UNIT + 200)
    data[99] = 1  # the last byte before a boundary
    assert list(zero_runs(ZERO_UNIT - 100, memoryview(data))) == [
        (ZERO_UNIT - 100, ZERO_UNIT, False),
        (ZERO_UNIT, 2 * ZERO_UNIT + 100, True),
    ]
    assert list(zero_runs(5, memoryview(bytes(10)))) == [(5, 15, True)]
    assert list(zero_runs(5, memoryview(b""))) == []
