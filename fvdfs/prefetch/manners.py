"""Progress, and what its fall leads to: RUN, CHECK or YIELD. Pure; the time is passed in.

`linkwatch.py` says why, and what a check does.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import enum
import math

FAST = 0.25  # seconds; the average that shows a change
SLOW = 5.0  # seconds; the average that it is compared with
FALLEN = 0.9  # of the slow average: less than this is suspicious
LEAST_FALLEN = 0.5  # the same, where suspicion was in vain again and again
DOUBT = 0.04  # by so much less each time that it was in vain
FORGIVEN = 30.0  # seconds of progress in which that is forgotten
WARM_UP = 0.3  # seconds of progress before it is judged
REQUEST_COST = 16 << 10  # a request counts as so many bytes more, so that small ones do not look slow
SETTLE = 0.05  # seconds between the end of the last own request and the first probe; and the longest gap, four times
FIRST_YIELD = 0.75  # seconds
MAX_YIELD = 4.0
LASTING = 3  # times that others have to be found, one after the other, until the original's rule counts
CALM = 5.0  # seconds of running after which a yield begins small again


class State(enum.Enum):
    """What prefetching may do with a resource."""

    RUN = "run"
    CHECK = "check"
    YIELD = "yield"


class RateWatch:
    """Progress: the average of the moment, and what is normal."""

    def __init__(self, low: float = FALLEN) -> None:
        """`low`: the part of the normal progress below which it has fallen."""
        self._most = self._low = low
        self.fast = 0.0
        self.normal = 0.0
        self._seen = 0.0
        self._work = 0.0
        self._on_trial = False
        self._fallen_work = 0.0  # since it fell
        self._fallen_seconds = 0.0

    def add(self, work: float, seconds: float) -> None:
        """So much work was done in so many seconds of being at it."""
        self._work += work
        if seconds <= 0:
            return  # it counts with what ends next
        if not self.fallen:
            self._fallen_work = self._fallen_seconds = 0.0
        self._fallen_work += self._work
        self._fallen_seconds += seconds
        rate, self._work = self._work / seconds, 0.0
        self._seen += seconds
        self._low += (self._most - self._low) * -math.expm1(-seconds / FORGIVEN)
        # Running means at first, so that the first samples weigh alike.
        self.fast += (rate - self.fast) * max(-math.expm1(-seconds / FAST), min(1.0, seconds / self._seen))
        if self._on_trial:
            self._on_trial = self._seen < WARM_UP or self.fallen
        else:
            self.normal += (rate - self.normal) * max(-math.expm1(-seconds / SLOW), min(1.0, seconds / self._seen))

    @property
    def fallen(self) -> bool:
        """Whether the progress of the moment is well below the normal one."""
        return self._seen >= WARM_UP and self.fast < self._low * self.normal

    def catch_up(self) -> None:
        """The average of the moment is that since the fall: before, part of it is of better times."""
        if self.fallen and self._fallen_seconds > 0:
            self.fast = min(self.fast, self._fallen_work / self._fallen_seconds)

    def accept(self) -> None:
        """What is now is normal. It takes more to be suspicious again, for a while."""
        self.normal = self.fast
        self._low = max(min(LEAST_FALLEN, self._most), self._low - DOUBT)
        self._seen = min(self._seen, WARM_UP)
        self._on_trial = False

    def restart(self) -> None:
        """The moment begins anew; what is normal stays, until as much is seen again."""
        self._seen = 0.0
        self._on_trial = True


class Manners:
    """RUN, CHECK and YIELD, and how long."""

    def __init__(self) -> None:
        self.state = State.RUN
        self.since = 0.0
        self.until = 0.0
        self._yield = FIRST_YIELD

    def suspect(self, now: float) -> None:
        """Something is slower than it should be."""
        if now - self.since > CALM:
            self._yield = FIRST_YIELD
        self._enter(State.CHECK, now)

    def clear(self, now: float) -> None:
        """Nobody else is there."""
        self._enter(State.RUN, now)

    def contended(self, now: float) -> None:
        """Others are at it."""
        self._enter(State.YIELD, now)
        self.until = now + self._yield
        self._yield = min(2 * self._yield, MAX_YIELD)

    def _enter(self, state: State, now: float) -> None:
        self.state = state
        self.since = now
