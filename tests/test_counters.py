"""What requests came to is counted: how many, their bytes, how long they took."""

from __future__ import annotations

import bisect
import math

from hypothesis import given
from hypothesis import strategies as st

from fvdfs.counters import BOUNDS, Count, Counters, quantile


@given(st.lists(st.integers(0, 10**11)))
def test_each_time_is_below_its_bound_and_above_the_one_before(times: list[int]) -> None:
    count = Count()
    expected = [0] * (len(BOUNDS) + 1)
    for nanoseconds in times:
        count.add(1, nanoseconds)
        expected[bisect.bisect_right(BOUNDS, nanoseconds / 1e9)] += 1
    assert count.times == expected
    assert count.requests == count.bytes == len(times)
    assert count.nanoseconds == sum(times)


@given(st.lists(st.integers(0, 10**11), min_size=1), st.floats(0.01, 1))
def test_a_share_of_all_is_within_its_quantile(times: list[int], share: float) -> None:
    count = Count()
    for nanoseconds in times:
        count.add(0, nanoseconds)
    bound = quantile(count.times, share)
    assert bound is not None
    assert sum(time / 1e9 <= bound for time in times) >= math.floor(share * len(times))


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile(Count().times, 0.5) is None


def test_a_place_is_no_number_of_bytes_and_unknown_kinds_are_not_counted() -> None:
    counters = Counters()
    assert counters.status() == {}
    counters.answered("lseek", 1 << 40, 1)
    counters.answered("write", 512, 1)
    counters.failed("write")
    counters.failed("interrupt")
    status = counters.status()
    assert {kind: (count["requests"], count["bytes"], count["errors"]) for kind, count in status.items()} == {
        "lseek": (1, 0, 0),
        "write": (1, 512, 1),
    }
