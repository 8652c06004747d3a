"""Power cuts: every state that they leave, in every layout (`crash.py`); and whether that would see anything.

FVDFS_CRASH_EFFORT scales the number of states; `support/crash_table.py` prints what was tried.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from fvdfs.store.base import Store
from fvdfs.store.host import HostFile
from support import reference
from support.builder import IMAGE, LAYOUTS, Layout, load, read_files
from support.crash import EFFORT, SCENARIOS, SUBJECTS, Effort, Subject, applies, simulate, states, tiny
from support.fakes import SECTOR, Clock, CrashStore


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_state(subject: Subject, tmp_path: Path) -> None:
    counts = simulate(subject, tmp_path, Effort.scaled(EFFORT))
    assert counts.states > 50
    assert counts.exhausted > counts.moments / 2
    assert counts.second_cuts > 10
    assert counts.kills > 0 or not applies("killing", subject)


def test_every_scenario_applies_to_some_subject() -> None:
    assert all(any(applies(scenario, subject) for subject in SUBJECTS) for scenario in SCENARIOS)


# --- the states -----------------------------------------------------------------------------------


def _all_states(stores: dict[str, CrashStore], at: int) -> set[tuple[bytes, ...]]:
    whole, found = states(stores, at, 1 << 16, random.Random(0))
    assert whole
    return {tuple(state.values()) for state in found}


def test_states_are_all_that_two_writes_and_a_size_leave() -> None:
    store = CrashStore(b"a" * 1024)

    async def work() -> None:
        await store.pwrite(b"b" * 1024, 0)
        await store.flush()
        await store.pwrite(b"c" * 512, 0)
        await store.pwrite(b"d" * 1024, 512)

    trio.run(work)
    found = _all_states({"x": store}, store.clock.now)
    first, second, third = (b"b", b"c"), (b"b", b"d"), (b"\0", b"d")
    long = {(a * 512 + b * 512 + c * 512,) for a in first for b in second for c in third}
    assert found == long | {(a * 512 + b * 512,) for a in first for b in second}


@pytest.mark.parametrize("seed", range(30))
def test_states_hold_all_that_random_cuts_leave(seed: int) -> None:
    """Another way of making them: `CrashStore.crash`."""
    rng = random.Random(seed)
    clock = Clock()
    stores = {name: CrashStore(rng.randbytes(2000), name, clock=clock) for name in ("x", "y")}

    async def work() -> None:
        for _ in range(6):
            store = rng.choice(list(stores.values()))
            kind = rng.randrange(6)
            if kind == 0:
                await store.flush()
            elif kind == 1:
                await store.resize(rng.randrange(500, 3000))
            else:
                await store.pwrite(rng.randbytes(rng.randrange(1, 900)), rng.randrange(2000))

    trio.run(work)
    for at in range(clock.now + 1):
        found = _all_states(stores, at)
        for _ in range(20):
            assert tuple(store.crash(rng, at) for store in stores.values()) in found


# --- calls of the host that do only a part ---------------------------------------------------------


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The host reads and writes some bytes less than it was asked to, at random; how many calls were short."""
    rng = random.Random(1)
    short = [0, 0]
    pwrite, preadv = os.pwrite, os.preadv

    def some(length: int) -> int:
        return rng.randrange(1, length + 1) if length else 0

    def short_pwrite(fd: int, data: memoryview, offset: int) -> int:
        count = some(len(data))
        short[0] += count < len(data)
        return pwrite(fd, data[:count], offset)

    def short_preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        (buffer,) = buffers
        count = some(len(buffer))
        short[1] += count < len(buffer)
        return preadv(fd, [buffer[:count]], offset, flags)

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    monkeypatch.setattr(os, "preadv", short_preadv)
    return short


@pytest.mark.parametrize("layout", [tiny(each) for each in LAYOUTS[::4]], ids=lambda layout: layout.name)
def test_short_calls_of_the_host(layout: Layout, tmp_path: Path, short_calls: list[int]) -> None:
    """All arrives all the same: header, journal, pages, data."""
    layout.build(tmp_path)
    expected = bytearray(b"".join(reference.read_disk(tmp_path / IMAGE)))
    stores: dict[str, Store] = {}
    for name in read_files(tmp_path):
        writable = name.startswith("disk.")
        fd = os.open(tmp_path / name, os.O_RDWR if writable else os.O_RDONLY)
        stores[name] = HostFile(fd, name, writable)
    rng = random.Random(2)

    async def work() -> None:
        image = await load(stores)
        await image.begin_writing()
        for _ in range(20):
            at = rng.randrange(len(expected) - 3000)
            data = rng.randbytes(rng.randrange(1, 3000))
            await image.write(at, data)
            expected[at : at + len(data)] = data
            assert await image.read(max(0, at - 700), 4000) == expected[max(0, at - 700) :][:4000]
            await image.fsync()
        await image.close()

    trio.run(work)
    assert reference.check(tmp_path / IMAGE, "fvdfs") == [] or layout.all_local
    assert b"".join(reference.read_disk(tmp_path / IMAGE)) == expected
    assert min(short_calls) > 20


@pytest.mark.parametrize("then", [errno.ENOSPC, 0], ids=["full", "nothing"])
def test_a_write_of_the_host_that_does_not_go_on(then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is written, and then an error, or nothing at all: the caller hears of it."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    pwrite = os.pwrite

    def short(fd: int, data: memoryview, offset: int) -> int:
        if offset < SECTOR:
            return pwrite(fd, data[:SECTOR], offset)
        if then:
            raise OSError(then, os.strerror(then))
        return 0

    monkeypatch.setattr(os, "pwrite", short)
    file = HostFile(os.open(path, os.O_RDWR), "file", True)
    with pytest.raises(OSError) as caught:
        file.pwrite_now(b"x" * 2000, 0)
    file.close()
    assert caught.value.errno == (then or errno.EIO)
    assert path.read_bytes() == b"x" * SECTOR
