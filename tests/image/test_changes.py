"""Changes in whole units, and sectors spread over parts of a disk."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fvdfs.image.changes import Change, gaps, in_units, spread

SECTOR = 512


@st.composite
def some_changes(draw: st.DrawFn) -> tuple[list[Change], int]:
    """Changes as `changes` finds them, and the size of the disk."""
    found: list[Change] = []
    at = 0
    for gap, length, data in draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20), st.booleans()), max_size=8)
    ):
        if found and not gap and found[-1].data is data:
            gap = 1
        start = at + gap * SECTOR
        at = start + length * SECTOR
        found.append(Change(start, at, data))
    return found, at + draw(st.integers(0, 9)) * SECTOR


@given(some_changes(), st.sampled_from([1, 2, 3, 8]))
def test_whole_units(found: tuple[list[Change], int], sectors: int) -> None:
    changes, size = found
    unit = sectors * SECTOR
    kinds: dict[int, set[bool | None]] = {}
    for at in range(0, size, SECTOR):
        kind = next((change.data for change in changes if change.start <= at < change.stop), None)
        kinds.setdefault(at // unit, set()).add(kind)
    expected = {at: kind != {False} for at, kind in kinds.items() if kind != {None}}
    units: dict[int, bool] = {}
    last = None
    for part in in_units(changes, unit, size):
        assert part.start % unit == 0
        assert part.stop % unit == 0 or part.stop == size
        assert last is None or last.stop < part.start or (last.stop == part.start and last.data is not part.data)
        units |= {at // unit: part.data for at in range(part.start, part.stop, unit)}
        last = part
    assert units == expected


@given(some_changes(), st.integers(1, 12))
def test_sectors_are_spread(found: tuple[list[Change], int], count: int) -> None:
    parts = [(start, stop) for start, stop, _ in found[0]]
    sectors = [at for start, stop in parts for at in range(start, stop, SECTOR)]
    chosen = list(spread(parts, count))
    assert len(chosen) <= count
    assert chosen == sorted(set(chosen) & set(sectors))
    if len(sectors) <= count:
        assert chosen == sectors
    else:
        steps = {sectors.index(b) - sectors.index(a) for a, b in pairwise(chosen)}
        assert len(steps) <= 1
        assert 2 * len(chosen) >= count - 1


@given(some_changes())
def test_gaps(found: tuple[list[Change], int]) -> None:
    changes, size = found
    parts = [(start, stop) for start, stop, _ in changes]
    inside = {at for start, stop in parts for at in range(start, stop, SECTOR)}
    between = [at for start, stop in gaps(parts, size) for at in range(start, stop, SECTOR)]
    assert between == [at for at in range(0, size, SECTOR) if at not in inside]
