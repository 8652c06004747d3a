"""A disk that follows its machine from another host fills the link whoever else is there; the machine hardly waits."""

from __future__ import annotations

import functools
import math
import os

import pytest
import trio

from fvdfs.format.migration import Incoming, Record, Target
from fvdfs.ops.inodes import Entry, Seen
from fvdfs.prefetch.linkwatch import GOOD_REQUEST, SHORT_OF_TIME, SMALLEST_REQUEST
from fvdfs.prefetch.prefetcher import WRITE_OUT
from fvdfs.prefetch.scheduler import FOLLOWING_JOBS
from fvdfs.prefetch.window import BEHIND, FEWEST, LARGEST_APART, LARGEST_REQUEST, MORE, Sent, Window
from support.simulation import (
    MIB,
    Guest,
    SimulatedDisk,
    SimulatedFile,
    SimulatedLink,
    machine,
    percentile,
    rival,
    simulate,
)

GIB = 1024 * MIB


@pytest.mark.parametrize(("rate", "latency"), [(112e6, 1e-3), (112e6, 3e-3), (20e6, 5e-3), (2e6, 1e-3), (1e9, 1e-3)])
def test_it_fills_the_link_and_hardly_more(rate: float, latency: float) -> None:
    """A server in order of arrival, in time that is counted."""
    window, now, free_at, served = Window(), 0.0, 0.0, 0
    under_way: list[tuple[float, Sent]] = []
    longest = 0.0
    while now < 5:
        while len(under_way) < min(window.limit, 8):
            size = window.size
            longest = max(longest, free_at - now) if now > 2 else 0.0
            free_at = max(now + latency / 2, free_at) + size / rate
            under_way.append((free_at + latency / 2, window.started(now, size)))
        now, sent = min(under_way, key=lambda found: found[0])
        under_way.remove((now, sent))
        window.finished(now, sent, says_nothing=False)
        served += sent.size if now > 2 else 0
    assert served > 0.9 * rate * 3
    assert longest < max(0.01, 1.5 * FEWEST * SMALLEST_REQUEST / rate), "what a read of the machine's would wait for"


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, GOOD_REQUEST])
def test_small_pieces_fill_it_as_well(size: int) -> None:
    """Of a disk whose data lies here and there. What counts are bytes, not requests."""
    window = Window()
    for number in range(10):
        sent = window.started(number, GOOD_REQUEST)
        window.finished(number + GOOD_REQUEST / 112e6 + 0.005, sent, says_nothing=False)
    room = window.limit * window.size
    under_way: list[Sent] = []
    while not window.is_full(len(under_way)):
        assert not window.is_full(len(under_way) + (room - len(under_way) * size - 1) // window.size)
        under_way.append(window.started(11.0, size))
    assert room <= len(under_way) * size < room + size
    assert window.is_full(len(under_way) + 1)
    window.finished(12.0, under_way.pop(), says_nothing=True)
    assert not window.is_full(len(under_way))


@pytest.mark.parametrize("rate", [2e6, 112e6, 1e9])
def test_more_is_under_way_where_no_more_than_that_is_on_the_link(rate: float) -> None:
    """In larger requests, each served within a moment; beyond what is on the link, as much as is sent in another."""
    window, room = Window(), 384 << 10
    sent = window.started(0.0, GOOD_REQUEST)
    window.finished(GOOD_REQUEST / rate, sent, says_nothing=False)
    before = window.size
    window.room = room
    assert before <= window.size <= LARGEST_APART
    assert window.size <= max(SMALLEST_REQUEST, rate * 0.005)
    under_way = 0
    while not window.is_full(under_way):
        window.started(1.0, window.size)
        under_way += 1
    assert room <= under_way * window.size - rate * BEHIND < room + window.size


def test_holes_and_failures_say_nothing_and_short_processors_ask_for_more() -> None:
    window = Window()
    sent = window.started(0.0, MIB)
    window.finished(1e-5, sent, says_nothing=True)
    assert (window.size, window.limit) == (SMALLEST_REQUEST, FEWEST)
    for number in range(100):
        sent = window.started(number, MIB)
        window.finished(number + (0.01 if number == 50 else 0.5), sent, says_nothing=False)
        if 50 < number < 55:
            assert window.size == GOOD_REQUEST, "the best of the last seconds counts"
    assert window.size < GOOD_REQUEST <= LARGEST_REQUEST
    limit = window.limit
    window.lag = 2 * SHORT_OF_TIME
    assert window.limit == limit + MORE


@pytest.mark.parametrize("follows", [True, False])
def test_neither_rivals_nor_the_machine_hold_it_up(follows: bool) -> None:
    """Beside a client of the server, others at the disk, and a machine that reads; one that does not follow yields."""

    async def main() -> tuple[float, float, float]:
        link, disk = SimulatedLink(112e6, 1e-3, fair=True), SimulatedDisk(400e6)
        guest = Guest()
        async with machine(link, disk=disk) as mount:
            image = await mount.open(8 * GIB)
            mount.prefetch(image, follows=follows)
            mount.start(functools.partial(mount.guest, think=0.01), image, guest, (4 * GIB, 8 * GIB))
            await trio.sleep(6)
            alone = link.log("prefetch").rate(3, 6)
            mount.start(rival, link, 6.0, math.inf, 2)
            mount.start(rival, disk, 6.0, math.inf, 2)
            await trio.sleep(6)
            return alone, link.log("prefetch").rate(8, 12), percentile(guest.latencies(3, 6), 0.99)

    alone, beside, slowest = simulate(main)
    assert (alone > 0.75 * 112e6) == follows
    assert (beside > 0.2 * 112e6) == follows
    assert slowest < 0.01


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_are_kept(jobs: int) -> None:
    async def main() -> int:
        async with machine(SimulatedLink(1e9, 0.02), jobs=jobs) as mount:
            image = await mount.open(16 * GIB)
            mount.prefetch(image, follows=True)
            await trio.sleep(4)
            assert isinstance(image.base, SimulatedFile)
            return image.base.max_under_way

    assert simulate(main) == FOLLOWING_JOBS * jobs


async def in_turns(_self: SimulatedFile, start: int, stop: int) -> tuple[int, bool]:
    """A mebibyte of data and one of zeros take turns, and 3 ms go by until the server has said so."""
    await trio.sleep(0.003)
    return min(stop, (start // MIB + 1) * MIB), start // MIB % 2 == 1


def test_asking_for_holes_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedFile, "extent", in_turns)

    async def main() -> float:
        link = SimulatedLink(112e6, 1e-3)
        async with machine(link) as mount:
            mount.prefetch(await mount.open(16 * GIB), follows=True)
            await trio.sleep(6)
            return link.log("prefetch").rate(2, 6)

    assert simulate(main) > 0.9 * 112e6


def test_a_pause_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for what is to be copied next, either."""
    looks = 0
    monkeypatch.setattr(SimulatedFile, "extent", in_turns)

    async def main() -> None:
        nonlocal looks
        async with machine(SimulatedLink(112e6, 1e-3)) as mount:
            image = await mount.open(16 * GIB)
            prefetcher, missing = mount.prefetch(image, follows=True), image.missing

            def counted(start: int, length: int) -> tuple[int, int]:
                nonlocal looks
                looks += 1
                return missing(start, length)

            monkeypatch.setattr(image, "missing", counted)
            await trio.sleep(2)
            prefetcher.pause()
            await trio.sleep(1)
            assert looks
            looks = 0
            await trio.sleep(60)

    simulate(main)
    assert looks == 0


@pytest.mark.parametrize("follows", [True, False])
def test_what_is_stored_is_written_out_together(monkeypatch: pytest.MonkeyPatch, follows: bool) -> None:
    """All but the last of it, so that a flush has little to write; in fewer calls than pieces where a disk follows."""
    written: list[tuple[int, int]] = []

    async def main() -> int:
        async with machine(SimulatedLink(112e6, 1e-3)) as mount:
            image = await mount.open(64 * MIB)

            async def write_out(start: int, stop: int) -> None:
                written.append((start, stop))
                await trio.lowlevel.checkpoint()

            monkeypatch.setattr(image, "write_out", write_out)
            prefetcher = mount.prefetch(image, follows=follows)
            await prefetcher.ended.wait()
            return prefetcher.copied

    assert simulate(main) == 64 * MIB
    covered = sum(stop - start for start, stop in written)
    assert covered == len({block for start, stop in written for block in range(start, stop, 4096)}) * 4096
    assert 64 * MIB - (WRITE_OUT if follows else 1) < covered <= 64 * MIB
    assert (len(written) <= 2 * 64 * MIB // WRITE_OUT) == follows


def test_caps_are_kept() -> None:
    async def main() -> float:
        link = SimulatedLink(112e6, 1e-3)
        async with machine(link, max_rate=10e6) as mount:
            mount.prefetch(await mount.open(4 * GIB), follows=True)
            await trio.sleep(6)
            return link.log("prefetch").rate(2, 6)

    assert simulate(main) == pytest.approx(10e6, rel=0.05)


def test_a_disk_follows_once_it_is_taken_over_until_all_is_local() -> None:
    status = os.stat(__file__)
    records = {state: Record(incoming=Incoming(state, "0" * 16, "1" * 32)) for state in Target}
    assert [
        state for state, record in records.items() if Entry(2, b"/x/vm.fvd", Seen(status, record=record)).follows
    ] == [Target.ACTIVE]
    assert not Entry(2, b"/x/vm.fvd", Seen(status)).follows
