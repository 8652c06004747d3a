"""When prefetching has to step back: pure decisions, with the time passed in.

Prefetching may use a resource (the link to a base's server, the local disk) only while nobody else
wants it, and nobody tells it so. It finds out from its own progress, as MS Manners does (Douceur and
Bolosky, "Progress-based regulation of low-importance processes", SOSP 1999): while it competes, it is
slower than it was. Progress alone cannot tell a rival from a link that has become slow, or a rate limit
that was reached, so a second step decides, in the way of Vegas and LEDBAT (RFC 6817), which compare the
delay now with that of an idle link:

    RUN ──── progress falls ────▶ CHECK ──── idle, it is as quick as ever ────▶ RUN, the new progress is normal
     ▲                             │  ▲
     │                             │  └─ after 0.25, 0.5, 1, 2, 2 … s ─┐
     │                     idle, it is slow all the same               │
     └── quick again ──────        └─────────────────────────────▶ YIELD

CHECK lets all own requests end and sends a few probes, one at a time, of data that is needed anyway:
small ones, which show a queue, and large ones, which show that throughput is shared. If they take about as
long as on an idle link, the slowness was of our own making: a cap, or our own queue. Then the lower
progress is normal, and is looked into again after a while. If not, others are at it, and prefetching yields
to them, but for a check now and then.

*Progress* is work a second while a request of ours is under way (`RateWatch`): the average of the last quarter
of a second against that of the last seconds. It is the same for one image or fifty that share a link, and
reads that guests wait for count as progress: they are not rivals to be yielded to by a pause, but go
first at every single request (`LinkWatch.delay`).

The disk is watched by the kernel's pressure information (the share of time in which some task waits for
it; `DiskWatch`), and where there is none by the progress of own writes. Pressure is ours if it is gone
when we pause; then it is not asked again for a while. A disk that others never leave alone still gets a
request every two seconds, so that the copy ends some day.

Beside these stands the rule of the original (`FloorRule`; format.md, section 7): throughput is measured in
rounds, and an image whose average is below a minimum tosses a coin: pause for a random time, or forget the
average and go on, so that not all who compete pause together.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass

FAST = 0.25  # seconds; the average that shows a change
SLOW = 5.0  # seconds; the average that it is compared with
FALLEN = 0.85  # of the slow average: less than this is suspicious
WARM_UP = 0.5  # seconds of progress before it is judged
REQUEST_COST = 64 << 10  # a request counts as so many bytes more, so that small ones do not look slow

PROBE_SIZE = 64 << 10
MAX_PROBE = 1 << 20
PROBE_TIME = 0.03  # seconds that a probe should take on an idle link, at the most
GAPS = (1.0, 1.2, 0.5, 1.5, 0.7, 1.3)  # of SETTLE, before each probe; uneven: not in step with a rival
PROBES = len(GAPS)  # every other one large
SETTLE = 0.05  # seconds between the end of the last own request and the first probe, and between probes
SLOWER = 1.5  # times as long as on an idle link
NOISE = 0.0003  # seconds of delay that mean nothing
FIRST_YIELD = 0.25  # seconds
MAX_YIELD = 2.0
FIRST_RECHECK = 2.0  # seconds after which it is looked again whether less progress was of our own making
MAX_RECHECK = 60.0
CALM = 5.0  # seconds of running after which a yield begins small again

LONGEST_REQUEST = 0.1  # seconds that a request should take on an idle link
LONGEST_BESIDE_GUEST = 0.004  # the same, while a guest reads from there as well
GUEST_PATIENCE = 0.02  # seconds that a request waits for guests' reads to end, if they never do
GUEST_ACTIVE = 1.0  # seconds after a guest's read during which another is expected
SMALLEST_REQUEST = 64 << 10


class State(enum.Enum):
    """What prefetching may do with a resource."""

    RUN = "run"
    CHECK = "check"
    YIELD = "yield"


class RateWatch:
    """Progress: the average of the moment, and what is normal."""

    def __init__(self, low: float = FALLEN) -> None:
        """`low`: the part of the normal progress below which it has fallen."""
        self._low = low
        self.fast = 0.0
        self.normal = 0.0
        self._seen = 0.0

    def add(self, work: float, seconds: float) -> None:
        """So much work was done in so many seconds of being at it."""
        if seconds <= 0:
            return
        rate = work / seconds
        self._seen += seconds
        # Running means at first, so that the first samples weigh alike.
        self.fast += (rate - self.fast) * max(1 - math.exp(-seconds / FAST), min(1.0, seconds / self._seen))
        self.normal += (rate - self.normal) * max(1 - math.exp(-seconds / SLOW), min(1.0, seconds / self._seen))

    @property
    def fallen(self) -> bool:
        """Whether the progress of the moment is well below the normal one."""
        return self._seen >= WARM_UP and self.fast < self._low * self.normal

    def accept(self) -> None:
        """What is now is normal."""
        self.normal = self.fast
        self._seen = min(self._seen, WARM_UP)

    def restart(self) -> None:
        """What is normal stays; the moment begins anew."""
        self.fast = self.normal
        self._seen = 0.0


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


@dataclass(slots=True)
class Request:
    """A request of prefetching that is under way."""

    started: float
    size: int
    probe: bool
    beside_guest: bool


class LinkWatch:
    """The way to a base's server, shared by all images whose base is there."""

    def __init__(self, now: float) -> None:
        self.rate = RateWatch()
        self.manners = Manners()
        self.manners.suspect(now)  # the first probes show what an idle link is
        self.idle: dict[int, float] = {}
        """Size of a probe: seconds that it takes when nobody else is there, as far as is known."""
        self._under_way = 0
        self._guests = 0
        self._guests_since = 0.0
        self._guest_last = -math.inf
        self._busy_since = 0.0
        self._free_at = now
        self._trust = FIRST_RECHECK
        self._recheck_at = math.inf
        self._probes: list[bool] = []

    # --- requests of guests ---

    def guest_started(self, now: float) -> None:
        """Somebody waits for a read from there."""
        if not self._guests:
            self._guests_since = now
        self._guests += 1
        self._guest_last = now

    def guest_finished(self, now: float, size: int) -> None:
        """That read has ended."""
        self._guests -= 1
        self._guest_last = now
        if self._under_way:
            self._progress(now, size)

    # --- requests of prefetching ---

    def delay(self, now: float, turns: int = 0) -> float:
        """Seconds until the next request may be sent; infinite: not before another one ends.

        `turns`: requests that have been admitted, whether or not they are sent already.
        """
        manners = self.manners
        busy = self._under_way or turns
        if manners.state is State.YIELD:
            if now < manners.until:
                return manners.until - now
            manners.suspect(now)
            self._probes.clear()
        if manners.state is State.CHECK:
            if busy:
                return math.inf
            return max(0.0, self._free_at + SETTLE * GAPS[len(self._probes)] - now)
        if self._guests:
            return max(0.0, self._guests_since + GUEST_PATIENCE - now) or (math.inf if busy else 0.0)
        if busy and now - self._guest_last < GUEST_ACTIVE:
            return math.inf
        return 0.0

    def size_limit(self, now: float) -> int:
        """The largest size that the next request should have."""
        if self.manners.state is State.CHECK:
            return self._probe_size()
        longest = LONGEST_BESIDE_GUEST if now - self._guest_last < GUEST_ACTIVE else LONGEST_REQUEST
        return max(SMALLEST_REQUEST, int(self.rate.fast * longest)) if self.rate.fast else PROBE_SIZE

    def started(self, now: float, size: int, *, urgent: bool = False) -> Request:
        """A request is sent; an `urgent` one without having asked for the delay."""
        if not self._under_way:
            self._busy_since = now
        self._under_way += 1
        return Request(now, size, self.manners.state is State.CHECK and not urgent, self._guests > 0)

    def finished(self, now: float, request: Request, *, failed: bool = False) -> None:
        """It has been answered; where it failed, it says nothing."""
        self._progress(now, 0 if failed else request.size + REQUEST_COST)
        self._under_way -= 1
        if not self._under_way:
            self._free_at = now
        if failed:
            return
        if request.probe:
            if self.manners.state is State.CHECK:
                self._probed(now, request.size, now - request.started, request.beside_guest or self._guests > 0)
        elif self.manners.state is State.RUN and (self.rate.fallen or now >= self._recheck_at):
            self.manners.suspect(now)
            self._probes.clear()

    def _probe_size(self) -> int:
        """As large as says most, and no larger than what a cap lets pass at once after a pause."""
        large = PROBE_SIZE
        room = self.rate.fast * SETTLE if self.rate.fast else math.inf
        while self.idle and 2 * large <= min(MAX_PROBE, room) and self._idle_time(2 * large) <= PROBE_TIME:
            large *= 2
        return large if len(self._probes) % 2 or large not in self.idle else PROBE_SIZE

    def _idle_time(self, size: int) -> float:
        """What a probe takes when nobody else is there: at the most, where that size was never tried."""
        if size in self.idle:
            return self.idle[size]
        return min((seconds * max(1, size / known) for known, seconds in self.idle.items()), default=math.inf)

    def _probed(self, now: float, size: int, seconds: float, beside_guest: bool) -> None:
        """A probe was answered. Beside a guest's read it can only have been late for that."""
        known = self._idle_time(size)
        late = seconds > SLOWER * known + NOISE and not beside_guest
        if seconds < self.idle.get(size, math.inf) and not late and not beside_guest:
            self.idle[size] = seconds
        self._probes.append(late)
        if len(self._probes) < PROBES:
            return
        contended = any(2 * sum(kind) > len(kind) for kind in (self._probes[::2], self._probes[1::2]))
        self._probes.clear()
        if contended:
            self.manners.contended(now)
            self.rate.restart()
            self._trust, self._recheck_at = FIRST_RECHECK, math.inf
            return
        if self.rate.fallen or now >= self._recheck_at:
            if self.rate.fallen:
                self.rate.accept()
            self._recheck_at = now + self._trust
            self._trust = min(2 * self._trust, MAX_RECHECK)
        self.manners.clear(now)

    def _progress(self, now: float, work: int) -> None:
        """So much has come while requests of ours were under way."""
        if self.manners.state is State.RUN:
            self.rate.add(work, now - self._busy_since)
        self._busy_since = now


PRESSURE_HIGH = 0.3  # of the time some task waits for the disk
PRESSURE_LOW = 0.15
DISK_FALLEN = 0.5  # of the normal progress of writes, which vary much
PRESSURE_WINDOW = 0.4  # seconds
PAUSE_TO_LOOK = 0.4  # seconds without own requests, to see whose pressure it is
FIRST_TRUST = 2.0  # seconds that pressure is not asked after it was found to be ours
MAX_TRUST = 60.0
TRICKLE = 2.0  # seconds; one request in so many is stored however busy others keep the disk


class DiskWatch:
    """The disk where copies are stored."""

    def __init__(self) -> None:
        self.manners = Manners()
        self._rate = RateWatch(DISK_FALLEN)
        self._last: tuple[float, float] | None = None
        self._window: tuple[float, float] | None = None
        self._trust = FIRST_TRUST
        self._trusted_until = -math.inf
        self._last_turn = math.inf  # none yet

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
        """A sample of the kernel's counter: seconds in which some task has waited for a disk, in all."""
        manners = self.manners
        self._last = (now, stalled)
        if self._window is None:
            self._window = self._last
        if manners.state is State.CHECK and self._window[0] < manners.since + SETTLE:
            self._window = self._last  # until then our last requests may still have been at it
            return
        seconds = now - self._window[0]
        if manners.state is State.YIELD and now >= manners.until - PAUSE_TO_LOOK:
            manners.suspect(now)
            self._window = self._last
            return
        if seconds < (PAUSE_TO_LOOK if manners.state is State.CHECK else PRESSURE_WINDOW):
            return
        share = (stalled - self._window[1]) / seconds
        self._window = self._last
        if manners.state is State.RUN:
            if share > PRESSURE_HIGH and now >= self._trusted_until:
                manners.suspect(now)
        elif manners.state is State.CHECK:
            if share > PRESSURE_LOW:
                manners.contended(now)
                self._trust = FIRST_TRUST
            else:
                self._found_ours(now)

    def written(self, now: float, size: int, seconds: float) -> None:
        """A copy was stored. Without pressure information this is all that is known; with it, a hint to look."""
        manners = self.manners
        if manners.state is State.RUN:
            self._rate.add(size + REQUEST_COST, seconds)
            if self._rate.fallen and (now >= self._trusted_until or self._last is not None):
                manners.suspect(now)
        elif manners.state is State.CHECK and seconds > 0 and self._last is None:
            if (size + REQUEST_COST) / seconds < DISK_FALLEN * self._rate.normal:
                manners.contended(now)
                self._rate.restart()
            else:
                self._found_ours(now)

    def _found_ours(self, now: float) -> None:
        self._rate.accept()
        self._trusted_until = now + self._trust
        self._trust = min(2 * self._trust, MAX_TRUST)
        self.manners.clear(now)


# --- the rule of the original ---------------------------------------------------------------------


class _Rounds:
    """The moving average of a throughput, of rounds that each last some time of being at it."""

    def __init__(self, measure_time: float, alpha: float, minimum: float) -> None:
        self._measure_time = measure_time
        self._alpha = alpha
        self._minimum = minimum
        self.average: float | None = None
        self._bytes = 0
        self._seconds = 0.0

    def add(self, size: int, seconds: float) -> bool:
        """Count it in; whether a round has ended with too low an average."""
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
    """Time spent with something of which several may be under way at once."""

    def __init__(self) -> None:
        self._under_way = 0
        self._since = 0.0

    def start(self, now: float) -> None:
        """One begins."""
        if not self._under_way:
            self._since = now
        self._under_way += 1

    def stop(self, now: float) -> float:
        """One has ended; the time spent since the last one ended, or the first began."""
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

    BURST = 0.1  # seconds

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
