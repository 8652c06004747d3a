"""Prefetching on hosts that are busy and slow: what it gets when nobody else is there, and how soon it makes way.

Many simulations (`simulation.py`), each with caps, delays, images and chances of its own, in which programs wait
for a processor for up to a tick of 4 ms on each of their ways. The bounds are those that a long series with real
servers has to keep (`bench/series.py`): 0.9 of what `dd` gets in 19 of 20, and down to 0.3 within a second in 19
of 20; with as much room as chance needs in so few runs (`may_miss`). FVDFS_BUSY_HOSTS sets how many.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import trio

from support.builder import KIB
from support.simulation import MIB, Log, Machine, NbdkitLink, SimulatedLink, machine, rival, simulate, starve

GIB = 1024 * MIB
TICK = 0.004
RUNS = int(os.environ.get("FVDFS_BUSY_HOSTS", "16"))
CAPS = (2e6, 10e6, 50e6, 200e6)
FAST = 1e9
SECONDS = 8.0
CAME, LEFT = 5.0, 9.0


def may_miss(runs: int) -> int:
    """How many runs may miss a bound that 19 of 20 keep: by chance alone, more do so in less than one series of ten."""
    chance = 0.0
    for missed in range(runs):
        chance += math.comb(runs, missed) * 0.05**missed * 0.95 ** (runs - missed)
        if chance > 0.9:
            return missed
    raise ValueError(runs)


@dataclass(frozen=True)
class Host:
    """What a run is like."""

    seed: int
    cap: float
    delay: float
    images: int
    burst: float
    policed: bool
    """Whether the cap is a bucket of tokens; else it is a link of that rate, with a queue as long as anybody wants."""
    fair: bool

    def link(self) -> SimulatedLink:
        rate, cap = (FAST, self.cap) if self.policed else (self.cap, 0.0)
        return SimulatedLink(rate, self.delay, fair=self.fair, cap=cap, burst=self.burst, late=TICK, seed=self.seed)


def hosts(count: int = RUNS) -> list[Host]:
    rng = random.Random(12)
    return [
        Host(
            seed,
            CAPS[seed % len(CAPS)],
            rng.choice((1e-3, 5e-3)),
            rng.choice((1, 2, 10)),
            rng.choice((0.1, 2.0)),
            rng.random() < 0.7,
            rng.random() < 0.5,
        )
        for seed in range(count)
    ]


async def fetch(mount: Machine, images: int, holes: Callable[[int], bool] | None = None) -> list[Log]:
    for number in range(images):
        image = await mount.open(64 * GIB, who=f"image {number}", prefetch_throttle_time=30000)
        if holes is not None:
            assert image.base is not None
            image.base.holes = holes  # type: ignore[union-attr]
        mount.prefetch(image, seed=number)
    return [mount.link.log(f"image {number}") for number in range(images)]


def rate(logs: list[Log], begin: float, end: float) -> float:
    return sum(log.rate(begin, end) for log in logs)


def dd(host: Host, seconds: float, depth: int = 2, size: int = 128 * KIB) -> float:
    """What a reader gets there alone; by default one with read-ahead."""
    return run_alone(host.link(), host.seed, seconds, depth, size)


def run_alone(link: SimulatedLink, seed: int, seconds: float, depth: int, size: int) -> float:
    """Bytes a second that a reader gets alone."""

    async def main() -> float:
        async with machine(link) as mount:
            mount.start(lambda: rival(link, 0, seconds, depth, size=size))
            await trio.sleep(seconds)
            return link.log("rival").rate(0, seconds)

    return simulate(main, seed)


def meet(link: SimulatedLink, host: Host, depth: int, size: int) -> tuple[float, float]:
    """Prefetching that a rival comes to: seconds until it makes way, and bytes a second that the rival then gets."""

    async def main() -> tuple[float, float]:
        async with machine(link) as mount:
            mount.start(lambda: starve(TICK, host.seed))
            logs = await fetch(mount, host.images)
            mount.start(lambda: rival(link, CAME, LEFT, depth, size=size))
            await trio.sleep(LEFT + 0.5)
            before = rate(logs, CAME - 2, CAME)
            steps = (step / 10 for step in range(30))
            gone = next((at for at in steps if rate(logs, CAME + at, CAME + at + 1) < 0.3 * before), math.inf)
            return gone, link.log("rival").rate(CAME + 1, LEFT)

    return simulate(main, host.seed)


def alone(host: Host, change: Callable[[SimulatedLink], None] | None = None) -> float:
    async def main() -> float:
        link = host.link()
        async with machine(link) as mount:
            mount.start(lambda: starve(TICK, host.seed))
            logs = await fetch(mount, host.images)
            await trio.sleep(SECONDS / 2)
            if change is None:
                await trio.sleep(SECONDS / 2)
                return rate(logs, 0, SECONDS)
            change(link)
            await trio.sleep(SECONDS * 1.5)
            return rate(logs, SECONDS, SECONDS * 2)

    return simulate(main, host.seed)


@pytest.mark.slow
def test_who_is_alone_gets_what_is_there() -> None:
    shares = {host: alone(host) / dd(host, SECONDS) for host in hosts()}
    missed = {host: share for host, share in shares.items() if share < 0.9}
    assert len(missed) <= may_miss(RUNS), missed
    assert min(shares.values()) > 0.6, missed  # no promise: to find a run that has stopped for seconds


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.3, 3.0], ids=["slower", "quicker"])
def test_a_rate_that_changes_for_good_is_ours(part: float) -> None:
    shares = {}
    for host in hosts(12):
        host = replace(host, cap=min(host.cap, max(CAPS) / part))  # both rates are among those of CAPS
        new = host.cap * part

        def change(link: SimulatedLink, new: float = new, policed: bool = host.policed) -> None:
            link.become(cap=new) if policed else link.become(rate=new)

        reference = dd(Host(host.seed, new, host.delay, 1, 0.1, host.policed, host.fair), SECONDS)
        shares[host] = alone(host, change) / reference
    # Not 0.9: the change is looked into, which may go on in the time that is measured.
    missed = {host: share for host, share in shares.items() if share < 0.85}
    assert len(missed) <= may_miss(len(shares)), missed
    assert min(shares.values()) > 0.4, missed  # no promise: to find a run that holds the change against others for good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "size"), [(1, MIB), (16, MIB), (4, 256 * KIB)], ids=["one", "sixteen", "four small ones"]
)
def test_a_rival_gets_the_link(depth: int, size: int) -> None:
    """It loses little, be it that prefetching makes way, or that there was room for both.

    Left out is what cannot be found out: a few requests at a time over a link that serves one in less time than
    programs wait for a processor on the way. Then neither progress nor single requests tell of them.
    """
    well = []
    lost = []
    for host in hosts():
        if depth < 16 and MIB / host.cap < 2 * TICK:
            continue

        gone, got = meet(host.link(), host, depth, size)
        lost.append(1 - got / min(host.cap, dd(host, 4, depth, size)))
        well.append(gone <= 1 or lost[-1] < 0.2)
    print(sorted(lost))  # shown where it fails
    assert sum(well) >= len(well) - may_miss(len(well))
    assert sum(lost) / len(lost) < 0.2  # on average no more than counts as room for both above


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2], ids=["one", "two"])
def test_a_small_reader_gets_what_nbdkit_caps(depth: int) -> None:
    """A single reader of 128 KiB, as `dd` is, beside whose requests smaller ones never have to wait."""
    well = []
    for host in hosts(RUNS):
        if host.cap > 10e6:
            continue  # what programs wait for a processor is longer than a request takes

        def link(host: Host = host) -> NbdkitLink:
            return NbdkitLink(FAST, host.delay, cap=host.cap, burst=host.burst, late=TICK, seed=host.seed)

        alone, got = run_alone(link(), host.seed, 4, depth, 128 * KIB), meet(link(), host, depth, 128 * KIB)
        well.append(got[0] <= 1 or 1 - got[1] / alone < 0.2)
    assert sum(well) >= len(well) - may_miss(len(well))


def test_holes_are_no_measure_for_data() -> None:
    """Where they come ten times sooner, data does not look like a rival's doing."""
    period = 256 * MIB

    async def main() -> float:
        link = SimulatedLink(20e6, 1e-3)
        async with machine(link) as mount:
            logs = await fetch(mount, 1, lambda start: start % period >= period // 4)
            await trio.sleep(30)
            data = sum(entry.size for entry in logs[0].entries if entry.size > 4096 and entry.end > 5)
            return data / 25 / link.rate

    assert simulate(main) > 0.8  # not 0.9: the holes between the data take time, too


def test_a_base_of_holes_is_got_through() -> None:
    async def main() -> bool:
        link = SimulatedLink(20e6, 1e-3)
        async with machine(link) as mount:
            image = await mount.open(256 * MIB)
            assert image.base is not None
            image.base.holes = lambda start: True  # type: ignore[union-attr]
            prefetcher = mount.prefetch(image)
            with trio.move_on_after(20):
                await prefetcher.ended.wait()
            return prefetcher.ended.is_set()

    assert simulate(main)


def test_a_link_of_two_megabytes_is_used_whatever_the_images_minimum_says() -> None:
    """5 MB/s is the original's; below it others may be there, but need not."""

    async def main() -> float:
        link = SimulatedLink(1e9, 1e-3, cap=2e6, burst=0.1)
        async with machine(link) as mount:
            logs = await fetch(mount, 1)
            await trio.sleep(30)
            return rate(logs, 0, 30) / 2e6

    assert simulate(main) > 0.9  # as whoever is alone gets


def test_a_queue_that_is_long_before_anybody_comes_is_nobodys() -> None:
    """Bufferbloat: each answer takes half a second from the begin."""

    async def main() -> float:
        link = SimulatedLink(10e6, 0.5)
        async with machine(link) as mount:
            logs = await fetch(mount, 1)
            await trio.sleep(60)
            return rate(logs, 30, 60)

    assert simulate(main) > 2e6  # no promise: to find prefetching that makes way for its own queue
