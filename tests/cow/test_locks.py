"""Range locks: exclusion, order of arrival, cancellation. Time is a clock that jumps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdfs.cow.locks import Gate, RangeLock
from fvdfs.image import stacking


@pytest.mark.trio
async def test_exclusive_where_ranges_overlap() -> None:
    lock, order, seq = RangeLock(), list[str](), trio.testing.Sequencer()

    async def first() -> None:
        async with lock.hold(0, 10):
            async with seq(0):
                order.append("first in")
            async with seq(2):
                order.append("first out")

    async def second() -> None:
        async with seq(1):
            pass
        async with lock.hold(9, 20):
            order.append("second in")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
    assert order == ["first in", "first out", "second in"]
    assert not lock


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (20, 30), (5, 10), (20, 21)])
@pytest.mark.trio
async def test_ranges_apart_do_not_wait(start: int, stop: int) -> None:
    lock = RangeLock()
    async with lock.hold(10, 20):
        with trio.fail_after(0):
            async with lock.hold(start, stop):
                assert lock.overlaps(start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (19, 30), (12, 13), (10, 20), (0, 100)])
@pytest.mark.trio
async def test_ranges_that_overlap_wait(start: int, stop: int) -> None:
    lock = RangeLock()
    async with lock.hold(10, 20):
        with trio.move_on_after(0) as scope:
            async with lock.hold(start, stop):
                pytest.fail("two hold the same block")
        assert scope.cancelled_caught


@pytest.mark.trio
async def test_what_is_claimed_is_seen() -> None:
    lock = RangeLock()
    assert not lock
    async with trio.open_nursery() as nursery, lock.hold(10, 20):
        assert lock
        assert lock.overlaps(0, 11)
        assert lock.overlaps(19, 20)
        assert not lock.overlaps(0, 10)
        assert not lock.overlaps(20, 30)

        async def wait() -> None:
            async with lock.hold(15, 25):
                pass

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert lock.overlaps(24, 25), "one who waits counts"
    assert not lock
    assert not lock.overlaps(0, 100)


@pytest.mark.trio
async def test_first_come_first_served() -> None:
    """Of many who wait for the same block, each gets it in its turn."""
    lock, order = RangeLock(), list[int]()

    async def wait(number: int) -> None:
        async with lock.hold(5 - number, 6 + number):
            order.append(number)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, lock.hold(5, 6):
        for number in range(5):
            nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.trio
async def test_wide_range_is_not_starved_by_narrow_ones() -> None:
    """Who comes later waits for one who waits, even where nobody holds the blocks yet."""
    lock, order = RangeLock(), list[str]()
    release = trio.Event()

    async def hold(name: str, start: int, stop: int) -> None:
        async with lock.hold(start, stop):
            order.append(name)
            if name == "first":
                await release.wait()

    async with trio.open_nursery() as nursery:
        for claim in (("first", 0, 10), ("wide", 0, 100), ("narrow", 50, 51), ("apart", 200, 201)):
            nursery.start_soon(hold, *claim)
            await trio.testing.wait_all_tasks_blocked()
        assert order == ["first", "apart"]
        release.set()
    assert order == ["first", "apart", "wide", "narrow"]


@pytest.mark.trio
async def test_cancelled_while_waiting() -> None:
    """Others wait for the holder still, and for nobody else."""
    lock, order = RangeLock(), list[str]()

    async def hold(name: str, start: int, stop: int, scope: trio.CancelScope) -> None:
        with scope:
            async with lock.hold(start, stop):
                order.append(name)

    async with trio.open_nursery() as nursery, lock.hold(0, 10):
        scopes = [trio.CancelScope() for _ in range(3)]
        claims = (("cancelled", 0, 100), ("waits for the holder", 9, 20), ("waits for the cancelled", 50, 60))
        for (name, start, stop), scope in zip(claims, scopes, strict=True):
            nursery.start_soon(hold, name, start, stop, scope)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["waits for the cancelled"]
        assert lock.overlaps(0, 20)
        assert not lock.overlaps(20, 100)
    assert order == ["waits for the cancelled", "waits for the holder"]
    assert not lock


@pytest.mark.trio
async def test_cancelled_while_holding() -> None:
    lock, order = RangeLock(), list[str]()

    async def wait() -> None:
        async with lock.hold(0, 1):
            order.append("waiter")

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with lock.hold(0, 10):
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert order == ["waiter"]
    assert not lock


@pytest.mark.trio
async def test_error_while_holding_frees_the_range() -> None:
    lock = RangeLock()
    with pytest.raises(OSError, match="disk"):
        async with lock.hold(0, 10):
            raise OSError("disk")
    assert not lock


@pytest.mark.trio
async def test_same_range_held_twice_in_turn() -> None:
    """Claims are told apart by who made them, not by their range."""
    lock, order = RangeLock(), list[int]()

    async def wait(number: int) -> None:
        async with lock.hold(0, 10):
            order.append(number)
            await trio.testing.wait_all_tasks_blocked()
            assert lock.overlaps(0, 1)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(wait, number)
            await trio.lowlevel.checkpoint()
    assert sorted(order) == [0, 1, 2, 3]


# --- any sequence of claims -----------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A range, for how long it is held, and when, if ever, its task is cancelled after it came."""

    start: int
    length: int
    duration: int
    cancelled_after: int | None


claims = st.lists(
    st.builds(Claim, st.integers(0, 12), st.integers(1, 8), st.integers(0, 5), st.none() | st.integers(0, 12)),
    min_size=1,
    max_size=12,
)
Times = list[tuple[float | None, float]]


def cancel_time(index: int, claim: Claim) -> float:
    """Apart from every other time of cancelling, and from every time of coming and going."""
    return float("inf") if claim.cancelled_after is None else index + claim.cancelled_after + (index + 1) / 64


def expected_times(claims: list[Claim]) -> Times:
    """When each claim has its range (None: never), and when it is gone; claim n comes at time n."""
    times: Times = []
    for index, claim in enumerate(claims):
        earlier = zip(claims, times, strict=False)
        blocked_until = [
            gone
            for other, (_, gone) in earlier
            if other.start < claim.start + claim.length and claim.start < other.start + other.length
        ]
        has = max([float(index), *blocked_until])
        cancelled = cancel_time(index, claim)
        if cancelled < has:
            times.append((None, cancelled))
        else:
            times.append((has, min(has + claim.duration, cancelled)))
    return times


async def real_times(claims: list[Claim]) -> Times:
    lock, began = RangeLock(), trio.current_time()
    has = dict[int, float]()
    gone = dict[int, float]()

    async def run(index: int, claim: Claim) -> None:
        await trio.sleep_until(began + index)
        with trio.CancelScope(deadline=began + cancel_time(index, claim)):
            async with lock.hold(claim.start, claim.start + claim.length):
                has[index] = trio.current_time() - began
                await trio.sleep(claim.duration)
        gone[index] = trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for index, claim in enumerate(claims):
            nursery.start_soon(run, index, claim)
    assert not lock
    return [(has.get(index), gone[index]) for index in range(len(claims))]


@settings(max_examples=150, deadline=None)
@given(claims)
def test_each_waits_for_all_earlier_ones_that_overlap_and_no_others(claims: list[Claim]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(real_times, claims, clock=clock) == expected_times(claims)


async def test_who_closes_a_gate_waits_for_those_inside_and_lets_nobody_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, order = Gate(), list[str]()

    async def close() -> None:
        async with gate.closed():
            order.append("closed")
            assert not gate
            await trio.sleep(1)
            order.append("opens")

    async def enter(name: str) -> None:
        while gate.is_closed:
            await gate.wait_until_open()
        with gate.passed():
            order.append(name)
            await trio.sleep(1)
            order.append(f"{name} leaves")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(enter, "first")
        await trio.testing.wait_all_tasks_blocked()
        assert gate
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.is_closed
        nursery.start_soon(enter, "second")
    assert order == ["first", "first leaves", "closed", "opens", "second", "second leaves"]
    assert not gate
    assert not gate.is_closed


async def test_who_gives_up_closing_a_gate_leaves_it_open(autojump_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    gate.enter()
    with trio.move_on_after(1):
        async with gate.closed():
            raise AssertionError
    assert not gate.is_closed
    gate.leave()


async def test_a_swap_keeps_no_writers_waiting_for_one_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for its base, which may be away for long."""
    monkeypatch.setattr(stacking, "WRITES_PATIENCE", 0.01)
    gate = Gate()
    gate.enter()
    with pytest.raises(OSError, match="try again"):
        async with stacking.closed_in_time(gate, "disk"):
            pass
    assert not gate.is_closed
    gate.leave()
    async with stacking.closed_in_time(gate, "disk"):
        assert gate.is_closed
