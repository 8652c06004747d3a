"""What of a disk was used lately: most of all what is used again and again, in little memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdfs.cow.heat import EXTENT, HALF_LIFE, LIMIT, LONG_PASS, NOTES, Heat
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


@pytest.mark.parametrize(("step", "speed"), [(PAGE, 80), (EXTENT, 2000), (8 * EXTENT, 400)])
def test_a_pass_over_the_disk_says_nothing_about_what_is_used(step: int, speed: int) -> None:
    """`speed`: extents a second."""
    rng, heat, size = random.Random(3), Heat(), 8000
    hot = {32 * place + number for place in rng.sample(range(size // 32), 30) for number in range(32)}

    places = sorted(hot)

    def use() -> None:
        heat.touched(rng.choice(places) * EXTENT + rng.randrange(32) * PAGE, PAGE)

    for _ in range(60):
        for _ in range(100):
            use()
        heat.pass_time(1)
    for begin in range(0, size, speed):
        backup = range(begin * EXTENT, min(begin + speed, size) * EXTENT, step)
        for number, at in enumerate(backup):
            heat.touched(at, step)
            if number % max(1, len(backup) // 100) == 0:
                use()
        heat.pass_time(1)
    first = [number for start, stop in extents(heat) for number in range(start, stop)][: len(hot)]
    assert len(hot.intersection(first)) > 0.9 * len(hot)


def test_requests_of_a_pass_that_overtake_each_other_are_one() -> None:
    rng, heat = random.Random(4), Heat()
    for number in range(0, 4096, 8):
        for at in rng.sample(range(8), 8):
            heat.touched((number + at) * EXTENT, EXTENT)
        heat.pass_time(0)
    heat.touched(3000 * EXTENT, PAGE)
    assert extents(heat)[0][1] in range(LONG_PASS, LONG_PASS + 10)
    assert (3000, 3001) in extents(heat)[:5]


def test_what_is_used_again_and_again_is_no_pass() -> None:
    """Also next to each other, and by large requests."""
    rng, heat = random.Random(5), Heat()
    for _ in range(200):
        for number in rng.sample(range(256), 256):
            heat.touched(number * EXTENT, EXTENT)
        heat.touched(9000 * EXTENT, PAGE)
    assert sum(stop - start for start, stop in extents(heat)[:20] if stop <= 256) > 200
    least, most = (f(heat._weights[number] for number in range(256)) for f in (min, max))
    assert least > 0.8 * most


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
