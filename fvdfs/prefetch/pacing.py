"""Rules and caps of an image or a mount: pure, with the time passed in.

`FloorRule` is the rule of the original (format.md, "Reads, writes, copies"): throughput is measured in rounds,
and an image whose average is below a minimum tosses a coin: pause for a random time, or forget the average and
go on, so that not all who compete pause together. The original takes less than the minimum (5 MiB/s, if nothing
else was said) for congestion. Here it counts only while others have been found there several times in a row
(`LinkWatch.beset`, `DiskWatch.beset`): below it, the image does not even take an eighth. A link that is slower
by nature is used.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import math
import random


class _Rounds:
    """The moving average of a throughput over rounds, each of so much time at work."""

    def __init__(self, measure_time: float, alpha: float, minimum: float) -> None:
        self._measure_time = measure_time
        self._alpha = alpha
        self._minimum = minimum
        self.average: float | None = None
        self._bytes = 0
        self._seconds = 0.0

    def add(self, size: int, seconds: float) -> bool:
        """Count it; whether a round has ended with too low an average."""
        self._bytes += size
        self._seconds += seconds
        if self._seconds <= self._measure_time:
            return False
        throughput = self._bytes / self._seconds
        self._bytes, self._seconds = 0, 0.0
        if self.average is None:
            self.average = throughput
        else:
            self.average = self._alpha * self.average + (1 - self._alpha) * throughput
        return self.average < self._minimum

    def forget(self) -> None:
        self.average = None
        self._bytes, self._seconds = 0, 0.0


class Stopwatch:
    """The time in which at least one of several things is under way."""

    def __init__(self) -> None:
        self._under_way = 0
        self._since = 0.0

    def start(self, now: float) -> None:
        """One begins."""
        if not self._under_way:
            self._since = now
        self._under_way += 1

    def stop(self, now: float) -> float:
        """One has ended; seconds since the last one ended, or the first began."""
        self._under_way -= 1
        spent, self._since = now - self._since, now
        return spent


class FloorRule:
    """Pause an image at random where its reads or writes are too slow. Minima in bytes a second."""

    def __init__(
        self,
        *,
        read_time: float,
        write_time: float,
        alpha: float,
        min_read: float,
        min_write: float,
        throttle_time: float,
        rng: random.Random,
    ) -> None:
        """`alpha`: weight of the old average, 0..1; `throttle_time` <= 0: never pause."""
        self._reads = _Rounds(read_time, alpha, min_read)
        self._writes = _Rounds(write_time, alpha, min_write)
        self._throttle_time = throttle_time
        self._rng = rng
        self._paused_until = -math.inf
        self.reason = ""

    def read(self, now: float, size: int, seconds: float) -> None:
        """So much was read from the base, in so many seconds."""
        if self._reads.add(size, seconds):
            self._toss(now, self._reads, "reading from the base")

    def wrote(self, now: float, size: int, seconds: float) -> None:
        """So much was stored, in so many seconds."""
        if self._writes.add(size, seconds):
            self._toss(now, self._writes, "storing")

    def _toss(self, now: float, rounds: _Rounds, what: str) -> None:
        average = rounds.average
        assert average is not None
        if self._throttle_time > 0 and self._rng.random() < 0.5:
            self._paused_until = now + self._rng.uniform(0, self._throttle_time)
            self.reason = f"{what} gets {average / 1024:.0f} KiB/s, below the image's minimum"
        rounds.forget()

    def delay(self, now: float) -> float:
        """Seconds until the image may go on."""
        return max(0.0, self._paused_until - now)


class Pacer:
    """A cap on throughput, with a short burst."""

    BURST = 0.1  # seconds of the rate that may be sent at once after a rest

    def __init__(self, rate: float) -> None:
        """`rate`: bytes a second; 0: no cap."""
        self._rate = rate
        self._next = -math.inf

    def delay(self, now: float) -> float:
        """Seconds until the next request may be sent."""
        return max(0.0, self._next - now) if self._rate else 0.0

    def spent(self, now: float, size: int) -> None:
        """So much is sent now."""
        if self._rate:
            self._next = max(self._next, now - self.BURST) + size / self._rate
