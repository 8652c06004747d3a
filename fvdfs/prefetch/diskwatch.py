"""When others want the local disk: pure decisions, with the time passed in.

The disk is watched by the kernel's pressure information (the share of time in which some task waits for
it; `DiskWatch`) while others than us use it (`pressure.py`), and where there is none by the progress of own writes.
Pressure is ours if it is gone when we pause; then it is not asked again for a while. A disk that others never leave
alone still gets a few requests a second.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import math

from fvdfs.prefetch.manners import LASTING, REQUEST_COST, SETTLE, Manners, RateWatch, State

PRESSURE_HIGH = 0.3  # of the time some task waits for the disk
PRESSURE_LOW = 0.15
DISK_FALLEN = 0.5  # of the normal progress of writes, which vary much
PRESSURE_WINDOW = 0.4  # seconds
PAUSE_TO_LOOK = 0.4  # seconds without own requests, to see whose pressure it is
FIRST_TRUST = 2.0  # seconds that pressure is not asked after it was found to be ours
MAX_TRUST = 15.0
TRICKLE = 0.25  # seconds; one request in so many is stored however busy others keep the disk


class DiskWatch:
    """The disk where copies are stored."""

    def __init__(self) -> None:
        self.manners = Manners()
        self._rate = RateWatch(DISK_FALLEN)
        self._last: tuple[float, float] | None = None
        """The last sample of pressure."""
        self._window: tuple[float, float] | None = None
        """The sample with which the window that is being measured began."""
        self._trust = FIRST_TRUST
        self._trusted_until = -math.inf
        self._share = 0.0  # of the last window, in which somebody waited
        self._found = 0
        self._last_turn = math.inf  # none yet

    @property
    def beset(self) -> bool:
        """Whether others are there, and not for a moment only."""
        return self.manners.state is not State.RUN and self._found >= LASTING

    def took(self, now: float) -> None:
        """A request has had its turn."""
        self._last_turn = now

    def delay(self, now: float) -> float:
        """Seconds until something may be copied again; at the longest, until it is time for the next trickle."""
        return min(self._delay(now), max(0.0, self._last_turn + TRICKLE - now))

    def _delay(self, now: float) -> float:
        manners = self.manners
        if manners.state is State.YIELD:
            if now < manners.until:
                return manners.until - now
            if self._last is None:
                manners.suspect(now)
        if manners.state is State.CHECK and self._last is None:
            return max(0.0, manners.since + PAUSE_TO_LOOK - now)
        return 0.0 if manners.state is State.RUN else math.inf

    def pressure(self, now: float, stalled: float) -> None:
        """A sample: seconds in which somebody has waited for the disk while others than us used it, in all."""
        self._last = (now, stalled)
        if self._begins_to_look(now) or self._window is None:
            self._window = self._last
        state = self.manners.state
        seconds = now - self._window[0]
        if seconds < (PAUSE_TO_LOOK if state is State.CHECK else PRESSURE_WINDOW):
            return
        self._share = (stalled - self._window[1]) / seconds
        self._window = self._last
        if state is State.RUN and self._share > PRESSURE_HIGH and now >= self._trusted_until:
            self.manners.suspect(now)
        elif state is State.CHECK and self._share > PRESSURE_LOW:
            self._found_others(now)
            self._trust = FIRST_TRUST
        elif state is State.CHECK:
            self._found_ours(now)

    def _begins_to_look(self, now: float) -> bool:
        """Whether the samples up to now say nothing about whose pressure it is; a yield that ends becomes a check."""
        manners = self.manners
        if manners.state is State.YIELD and now >= manners.until - PAUSE_TO_LOOK:
            manners.suspect(now)
            return True
        # Our last requests may still have been under way then.
        is_settling = self._window is None or self._window[0] < manners.since + SETTLE
        return manners.state is State.CHECK and is_settling

    def written(self, now: float, size: int, seconds: float) -> None:
        """A copy was stored. Without pressure information that is all there is to go by; with it, a reason to look."""
        manners = self.manners
        if manners.state is State.RUN:
            self._rate.add(size + REQUEST_COST, seconds)
            if self._rate.fallen and (now >= self._trusted_until if self._last is None else self._share > PRESSURE_LOW):
                manners.suspect(now)
        elif manners.state is State.CHECK and seconds > 0 and self._last is None:
            if (size + REQUEST_COST) / seconds < DISK_FALLEN * self._rate.normal:
                self._found_others(now)
                self._rate.restart()
            else:
                self._found_ours(now)

    def _found_others(self, now: float) -> None:
        self._found += 1
        self.manners.contended(now)

    def _found_ours(self, now: float) -> None:
        self._rate.accept()
        self._found = 0
        self._trusted_until = now + self._trust
        self._trust = min(2 * self._trust, MAX_TRUST)
        self.manners.clear(now)
