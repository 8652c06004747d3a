"""What of a disk was used lately: most of all what is used again and again, in little memory."""

from __future__ import annotations

import random
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from fvdfs.cow.heat import EXTENT, HALF_LIFE, LIMIT, NOTES, Heat
from fvdfs.format.header import PAGE

MOST = 5000
SIZE = 1 << 40


def extents(heat: Heat, size: int = SIZE) -> list[tuple[int, int]]:
    """In units of `EXTENT`, but for a last one that the end of the disk cuts."""
    return [(start // EXTENT, -(-stop // EXTENT)) for start, stop in heat.extents(size, MOST)]


def test_what_is_used_more_comes_first_and_neighbours_together() -> None:
    heat = Heat()
    assert extents(heat) == []
    for number in (70, 3, 4, 5, 90):
        heat.touched(number * EXTENT, PAGE)
    for _ in range(10):
        heat.touched(500 * EXTENT + 512, PAGE)
        heat.touched(499 * EXTENT, 2 * EXTENT)
    assert extents(heat) == [(500, 501), (499, 500), (3, 6), (70, 71), (90, 91)]


def test_what_is_used_later_comes_first() -> None:
    heat = Heat()
    for _ in range(16):
        heat.touched(0, PAGE)
    heat.pass_time(3 * HALF_LIFE)
    for _ in range(4):
        heat.touched(7 * EXTENT, PAGE)
    assert extents(heat) == [(7, 8), (0, 1)]
    heat.pass_time(1000 * HALF_LIFE)
    heat.touched(9 * EXTENT, PAGE)
    assert extents(heat)[0] == (9, 10)


def test_days_pass() -> None:
    heat = Heat()
    for day in range(30):
        for _ in range(24 * 60):
            heat.touched(day * EXTENT, PAGE)
            heat.pass_time(60)
        assert extents(heat)[0] == (day, day + 1)
    heat.pass_time(30 * 86400)
    assert extents(heat)[0] == (29, 30)


def test_what_is_used_again_outlives_one_pass_over_the_disk() -> None:
    heat, hot = Heat(), range(1 << 20, (1 << 20) + 100)
    for start in range(0, 40 * LIMIT, 100):
        heat.touched(start * EXTENT, 100 * EXTENT)
        for number in hot:
            heat.touched(number * EXTENT, PAGE)
        heat.pass_time(1)
    assert extents(heat)[0] == (hot.start, hot.stop)


def test_it_takes_one_megabyte() -> None:
    rng = random.Random(1)
    tracemalloc.start()
    heat = Heat()
    for _ in range(20):
        for _ in range(NOTES):
            heat.touched(rng.randrange(1 << 41), PAGE)
        heat.pass_time(1)
    for _ in range(NOTES):
        heat.touched(rng.randrange(1 << 41), PAGE)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.2e6
    assert len(heat.extents(1 << 41, MOST)) <= MOST


@given(
    st.lists(st.tuples(st.integers(0, 64 * EXTENT), st.integers(1, 4 * EXTENT), st.floats(0, 1e6))),
    st.integers(1, 64 * EXTENT),
    st.integers(1, 20),
)
def test_it_names_what_was_used_once_and_inside_the_disk(
    requests: list[tuple[int, int, float]], size: int, most: int
) -> None:
    heat, used = Heat(), set[int]()
    for start, length, seconds in requests:
        heat.touched(start, length)
        heat.pass_time(seconds)
        used |= set(range(start // EXTENT, (start + length - 1) // EXTENT + 1))
    found = heat.extents(size, most)
    assert len(found) <= most
    named = [number for start, stop in found for number in range(start // EXTENT, -(-stop // EXTENT))]
    assert len(named) == len(set(named))
    assert set(named) <= used
    assert all(0 <= start < stop <= size for start, stop in found)
