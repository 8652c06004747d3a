"""One workload for every layout; at calls to a store, an error (`workload.py` says at which), at every one a power cut.

The workload begins with the replay of an image that was not closed, and ends with closing it.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fvdfs.store.base import Store
from support.builder import LAYOUTS, Layout
from support.crash import Survivors, open_for_writing, quiet
from support.fakes import (
    SECTOR,
    Clock,
    CrashStore,
    Disk,
    MemoryStore,
    Resize,
)
from support.workload import FAULTS, Workload, inject_faults, small, unclean_image

SEEDS = 1  # power cuts at each moment; `crash.py` makes more of them, of smaller images


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


layouts = pytest.mark.parametrize("layout", [small(layout) for layout in LAYOUTS], ids=lambda layout: layout.name)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(layout: Layout, fault: str, tmp_path: Path) -> None:
    assert inject_faults(layout, fault, tmp_path) > (30 if FAULTS[fault][0] == errno.EIO else 15)


@pytest.mark.slow
@layouts
def test_power_cuts(layout: Layout, tmp_path: Path) -> None:
    """The power is cut after each change and flush."""
    built, folder = tmp_path / "built", tmp_path / "left"
    built.mkdir()
    folder.mkdir()
    files, content = unclean_image(layout, built)
    clock = Clock()
    stores: dict[str, Store] = {}
    crash_stores: dict[str, CrashStore] = {}
    for name, data in files.items():
        if name.startswith("disk."):
            stores[name] = crash_stores[name] = CrashStore(data, name, clock=clock)
        else:
            stores[name] = MemoryStore(data, name, writable=False)
    survivors = Survivors(layout, folder)
    disk = Disk(content)

    def cut_all(since: int, *, cut_short: bool = False) -> None:
        for at in range(since, clock.now + 1):
            for seed in range(SEEDS):
                rng = random.Random(f"{at} {seed}")
                left = dict(files)
                for name, store in crash_stores.items():
                    left[name] = store.crash(rng, at)
                try:
                    disk.check_cut(survivors.content(left, closed=False, cut_short=cut_short), at)
                except BaseException as caught:
                    caught.add_note(f"cut at {at}, seed {seed}")
                    raise

    async def opened() -> Workload:
        return Workload(await open_for_writing(layout, stores), disk, clock)

    work = trio.run(opened)
    cut_all(0)
    start = clock.now
    trio.run(work.first_part)
    cut_all(start)
    trio.run(work.fold)
    for change in (-21 * SECTOR, 30 * SECTOR):
        start = clock.now
        disk.resize = trio.run(_resize, work, disk.size + change)
        cut_all(start, cut_short=change < 0)
        trio.run(work.fold)
        start = clock.now
        trio.run(work.second_part)
        cut_all(start)
        trio.run(work.fold)
    start = clock.now
    assert trio.run(work.close)
    cut_all(start)
    assert work.errors == []


async def _resize(work: Workload, size: int) -> Resize:
    start = work.clock.tick()
    await work.image.resize(size, shrink=True)
    return Resize(start, work.clock.tick(), size)
