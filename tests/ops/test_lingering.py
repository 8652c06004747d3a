"""How long the event loop looks for more before it sleeps."""

from __future__ import annotations

from fvdfs.ops.lingering import MOST, Linger


def after_sleeps(linger: Linger, length: int, times: int) -> list[int]:
    """The windows after sleeps of this length, one after the other."""
    windows = []
    for _ in range(times):
        linger.sleeps(10**12)
        windows.append(linger.wakes(10**12 + length))
    return windows


def test_it_does_not_begin_with_the_first_request() -> None:
    assert Linger().wakes(10**12) == 0


def test_short_sleeps_are_put_off_for_longer_and_longer() -> None:
    windows = after_sleeps(Linger(), MOST - 1, 6)
    assert 0 < windows[0] < windows[1] < windows[-1] == MOST
    assert windows == sorted(windows)


def test_a_sleep_as_long_as_the_window_may_be_gains_nothing() -> None:
    assert after_sleeps(Linger(), MOST, 3) == [0, 0, 0]


def test_a_long_sleep_ends_it() -> None:
    linger = Linger()
    after_sleeps(linger, 1, 9)
    assert after_sleeps(linger, 2 * MOST, 1) == [MOST], "not one that is somewhat too long"
    assert after_sleeps(linger, 10 * MOST, 1) == [0]
