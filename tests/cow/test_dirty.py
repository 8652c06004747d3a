"""What was written while a disk is copied: nothing is forgotten, and little is copied twice."""

from __future__ import annotations

import random

from fvdfs.cow.dirty import Dirty
from fvdfs.format.header import PAGE


def test_nothing_is_forgotten() -> None:
    rng = random.Random(1)
    size = 300 * PAGE + 512
    dirty, model = Dirty(size), set[int]()
    for _ in range(2000):
        start = rng.randrange(size)
        stop = min(size, start + rng.choice((1, 512, 4096, 100_000)))
        dirty.add(start, stop)
        model |= set(range(start // PAGE, (stop - 1) // PAGE + 1))
        assert dirty.units == len(model)
        if rng.random() < 0.7 and (taken := dirty.take(rng.choice((1, PAGE, 20 * PAGE)))):
            units = set(range(taken[0] // PAGE, taken[1] // PAGE))
            assert units <= model
            model -= units
    while taken := dirty.take(1 << 20):
        model -= set(range(taken[0] // PAGE, taken[1] // PAGE))
    assert not model
    assert dirty.units == 0


def test_a_disk_that_grows() -> None:
    dirty = Dirty(PAGE)
    dirty.add(10 * PAGE, 10 * PAGE + 1)
    assert dirty.take(1 << 20) == (10 * PAGE, 11 * PAGE)
    assert dirty.take(1 << 20) is None


def test_a_large_disk_takes_little_memory() -> None:
    dirty = Dirty(1 << 44)
    assert dirty.unit == 1 << 20
    dirty.add(0, 1 << 44)
    assert dirty.units == 1 << 24
