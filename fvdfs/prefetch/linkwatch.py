"""When prefetching has to step back: pure decisions, with the time passed in.

Prefetching may use a resource (the link to a base's server, the local disk) only while nobody else
wants it, and nobody tells it so. It finds out from its own progress, as MS Manners does (Douceur and
Bolosky, "Progress-based regulation of low-importance processes", SOSP 1999): while it competes, it is
slower than it was. But so it is where a cap was reached, a link has become slow, or processors are short,
and then nobody has anything from its stepping back. What tells them apart is what a lower load of our own
does, as in the micro-experiments of PCC (Dong et al., NSDI 2015):

    RUN ──── progress falls ────▶ CHECK ──── alone, a request is no slower ────▶ RUN, the new progress is normal
     ▲                              │
     │                              └─ slower ─▶ YIELD
     └── after 0.75, 1.5, 3, 4, 4 … s: ───────────┘
         does progress come back?

CHECK sends single requests, small and large ones in turns, with gaps. If only we are there, a single request is
served at least at the rate at which several of ours at a time were since the fall; behind a bucket of tokens at
once, since the gap has saved for it. If others are there they take what we leave, and a single one gets a
smaller part than several did; the large ones feel them even where a cap serves small requests first. So both
halves of the comparison are of the last second, and neither is a memory of better times. What a single request
took when nobody was there is remembered as well (the middle one of some): no slower than that is never late,
and what it took beside being served is not held against it. Nor is what programs wait for a processor here
(`lag`). It takes three late ones of four of a size to say that others are there. A check costs half of the
progress or less while it lasts, so being suspicious is cheap; where it was in vain again and again it takes a
deeper fall.

YIELD does not stop: one request at a time, an eighth of the time. So nothing starves where the judgement errs, and
what others lose is bounded. Then it runs, for a trial: has the progress come back that was normal before, others have
gone; if not, a CHECK follows. After others were found somewhere, it has to be seen three times that a single
request is no slower before a lower progress is normal: a rival who is found too seldom costs us little, one
who is overlooked loses much.

How many requests are under way at a time follows from what single ones take: as many as fill the link and no
more (`LinkWatch.limit`), for each more makes others wait, and hides that they do.

*Progress* is work a second while a request of ours is under way (`RateWatch`): the average of the last quarter
of a second against that of the last seconds. It is the same for one image or fifty that share a link, and
reads that guests wait for count as progress: they are not rivals to be yielded to by a pause, but go
first at every single request (`LinkWatch.delay`). Holes say nothing: a server may find them sooner than data.

Not found are rivals whose load does not grow when ours shrinks, and who therefore lose no throughput, but time:
reads of a few KiB, one after another, wait for our requests of `LONGEST_REQUEST`. Nor is a single reader found
on a link that serves a request in less time than programs wait for a processor on the way: it is lost in the
noise. Nor, on a link of 2 MB/s whose cap serves small requests first (nbdkit's does), one whose requests are
larger than ours: they do not slow ours down.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from fvdfs.prefetch.manners import CALM, LASTING, REQUEST_COST, SETTLE, Manners, RateWatch, State

SURE = 0.1  # seconds that it has to be so: the average of the moment is then near what it falls to
PROBE_SIZE = 64 << 10  # the smallest
MAX_PROBE = 512 << 10
PROBE_TIME = 0.15  # seconds that a large probe should take; one smaller than a rival's requests overtakes them
SMALL = 4  # times smaller are the small ones
KIND = 4  # probes of each size, if it comes to that
LATE = 3  # of a size have to be late
GAPS = (1.5, 1.8, 1.3, 2.0, 1.4, 1.9, 1.6, 1.7)  # times what a probe should take, before it; not in step with a rival
SLOWER = 1.15  # times as long as in the crowd of our own
SLOWER_THAN_IDLE = 1.4  # times as long as a single one when nobody was there
NOISE = 0.0005  # seconds of delay that mean nothing
HOPS = 5  # times that a request waits for a processor, at us and at the programs behind us
REMEMBERED = 9  # times of single requests of a size, of which the middle one counts
SHARE = 8  # one part in so many of the time has a request of ours under way while others are there
LONGEST_REST = 2.0  # seconds between such requests
DOUBTS = 2  # times that a link that is no slower alone is left to others all the same, after they were found there
FIRST_RECHECK = 2.0  # seconds after which it is looked again whether less progress was of our own making
MAX_RECHECK = 60.0
LONGEST_REQUEST = 0.03  # seconds that a request should take on an idle link
GOOD_REQUEST = 256 << 10  # bytes; where processors are short, larger ones take longer: sockets hold no more
SHORT_REQUEST = 0.0025  # seconds; a link that is so quick gets larger ones, which cost us less a byte
LAZY_REQUEST = 0.02  # the same, where there are processors enough
SHORT_OF_TIME = 0.0005  # seconds of lag from which on processors are short
FEWEST = 2  # requests at a time: while one is being dealt with here, the other one is on its way
ENOUGH = 1.7  # times as many at a time as an idle link serves at that rate
LONGEST_BESIDE_GUEST = 0.004  # the same, while a guest reads from there as well
GUEST_PATIENCE = 0.02  # seconds that a request waits for guests' reads to end, if they never do
GUEST_ACTIVE = 1.0  # seconds after a guest's read during which another is expected
SMALLEST_REQUEST = 64 << 10


@dataclass(slots=True)
class Request:
    """A request of prefetching that is under way."""

    started: float
    size: int
    single: State | None
    """The state that had it sent alone, to learn from it."""
    beside_guest: bool


@dataclass(frozen=True, slots=True)
class _Probe:
    """What a single request has shown."""

    size: int
    """0: nothing, since a guest read beside it."""
    seconds: float
    slow: bool
    """Slower than when nobody was there."""
    late: bool
    """Slower than in a crowd of our own, too."""


class LinkWatch:
    """The way to a base's server, shared by all images whose base is there."""

    def __init__(self, now: float) -> None:
        self.rate = RateWatch()
        self.manners = Manners()
        self.lag = 0.0
        """Seconds that a program waits for a processor here at the moment."""
        self._idle: dict[int, deque[float]] = {}  # size of a probe: seconds that it took when nobody was there
        self._under_way = 0
        self._guests = 0
        self._guests_since = 0.0
        self._guest_last = -math.inf
        self._busy_since = 0.0
        self._free_at = now
        self._rest = 0.0
        self._after_hole: float | None = None  # seconds that it took, where the last answer was one
        self._plain = 1.0  # the part of progress that is bytes; the rest is what requests count as beside their size
        self._found = 0
        self._trust = FIRST_RECHECK
        self._recheck_at = math.inf
        self._doubts = 0
        self._fallen_at = math.inf
        self._probes: list[_Probe] = []
        self.look(now)  # the first probes show what an idle link is

    def look(self, now: float) -> None:
        """See whether others are there."""
        self.rate.catch_up()
        self.manners.suspect(now)
        self._probes.clear()
        self._fallen_at = math.inf

    @property
    def beset(self) -> bool:
        """Whether others are there, and not for a moment only."""
        return self._found >= LASTING

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
        busy = max(self._under_way, turns)
        if manners.state is State.YIELD and now >= manners.until:
            manners.clear(now)  # have they gone? Progress tells.
            self.rate.restart()
        if manners.state is not State.RUN:
            if busy:
                return math.inf
            rest = self._rest if manners.state is State.YIELD else self._gap()
            return max(0.0, self._free_at + rest - now)
        if self._guests:
            return max(0.0, self._guests_since + GUEST_PATIENCE - now) or (math.inf if busy else 0.0)
        if busy >= (1 if now - self._guest_last < GUEST_ACTIVE else self.limit):
            return math.inf
        return 0.0

    @property
    def limit(self) -> int:
        """How many requests at a time fill the link: as many as it serves while one goes through it, and some more.

        Each one more makes others wait longer, and hides from us that they do: progress falls less.
        """
        size = self._request_size(LONGEST_REQUEST)
        single = self._idle_time(size)
        if not self.rate.fast or math.isinf(single):
            return FEWEST
        return max(FEWEST, math.ceil(ENOUGH * self.rate.fast * single / (size + REQUEST_COST)))

    def _request_size(self, longest: float) -> int:
        """Of a request that takes so many seconds at the most, and not less than it has to for our own sake."""
        rate = self.rate.fast
        far = self._idle_time(PROBE_SIZE) if self._idle else 0.0  # what is on its way does not keep others waiting
        longest = max(longest, far / FEWEST)
        least = SHORT_REQUEST if self.lag > SHORT_OF_TIME else LAZY_REQUEST
        return max(SMALLEST_REQUEST, int(min(rate * longest, max(GOOD_REQUEST, rate * max(least, far / FEWEST)))))

    def size_limit(self, now: float) -> int:
        """The largest size that the next request should have."""
        if self.manners.state is not State.RUN:
            return self._probe_size()
        longest = LONGEST_BESIDE_GUEST if now - self._guest_last < GUEST_ACTIVE else LONGEST_REQUEST
        return self._request_size(longest)

    def started(self, now: float, size: int, *, urgent: bool = False) -> Request:
        """A request is sent; an `urgent` one without having asked for the delay."""
        if not self._under_way:
            self._busy_since = now
        self._under_way += 1
        state = self.manners.state
        single = None if urgent or state is State.RUN or self._under_way > 1 else state
        return Request(now, size, single, self._guests > 0)

    def finished(self, now: float, request: Request, *, failed: bool = False, hole: bool = False) -> None:
        """It has been answered; where it failed, or brought a hole, which a server may find sooner, it says nothing."""
        says_nothing = failed or hole
        self._progress(now, request.size + REQUEST_COST, says_nothing=says_nothing)
        self._under_way -= 1
        if not self._under_way:
            self._free_at = now
        self._after_hole = now - request.started if hole else None
        state = self.manners.state
        if request.single is State.YIELD and not failed:
            self._rest = min((SHARE - 1) * (now - request.started), LONGEST_REST)
        if says_nothing:
            return
        if request.single is State.CHECK and state is State.CHECK:
            self._probed(now, request.size, now - request.started, request.beside_guest or self._guests > 0)
        elif state is State.RUN:
            self._plain += (request.size / (request.size + REQUEST_COST) - self._plain) / KIND
            if not self.rate.fallen:
                self._fallen_at = math.inf
            elif self._fallen_at > now:
                self._fallen_at = now
            if now - self._fallen_at >= SURE or now >= self._recheck_at:
                self.look(now)
            elif now - self.manners.since > CALM:
                self._found = self._doubts = 0

    def _probe_size(self) -> int:
        """Large and small in turns, as powers of two, so that there are several to compare."""
        goal = self.rate.fast * PROBE_TIME if self.rate.fast else PROBE_SIZE * SMALL
        large = min(max(PROBE_SIZE, 1 << int(goal).bit_length() - 1 if goal >= 1 else 0), MAX_PROBE)
        return large if len(self._probes) % 2 else max(PROBE_SIZE, large // SMALL)

    def _gap(self) -> float:
        """Seconds between the last request and the next probe: our own queue is gone, and a cap has saved for it."""
        if self._after_hole is not None:
            return self._after_hole
        if not self._probes or not self.rate.fast:
            return SETTLE
        return min(4 * SETTLE, GAPS[len(self._probes) % len(GAPS)] * self._probe_size() / self.rate.fast)

    def _idle_time(self, size: int) -> float:
        """What a single request takes when nobody else is there: at the most, where that size was never tried."""
        if size in self._idle:
            return statistics.median(self._idle[size])
        times = ((statistics.median(seconds), known) for known, seconds in self._idle.items())
        return min((seconds * max(1, size / known) for seconds, known in times), default=math.inf)

    def _probed(self, now: float, size: int, seconds: float, beside_guest: bool) -> None:
        """A probe was answered. Beside a guest's read it can only have been late for that."""
        idle = self._idle_time(size)
        crowd = math.inf
        if self.rate.fast:
            apart = idle - size / (self.rate.normal * self._plain)  # what a request takes beside being served
            crowd = SLOWER * size / (self.rate.fast * self._plain) + (max(0.0, apart) if idle < math.inf else 0.0)
        slack = NOISE + HOPS * self.lag
        slow = seconds > SLOWER_THAN_IDLE * idle + slack and not beside_guest
        late = slow and seconds > crowd + slack
        self._probes.append(_Probe(0 if beside_guest else size, seconds, slow, late))
        kinds = [self._probes[first::2] for first in (0, 1)]
        if any(sum(probe.late for probe in kind) >= LATE for kind in kinds):
            self._found += 1
            self._doubts = max(0, self._doubts - 1)
            self._contended(now, seconds)
        elif all(sum(not probe.late for probe in kind) > KIND - LATE for kind in kinds):
            # No slower alone than in a crowd of our own: the link is slower than it was. Or that was measured badly.
            if self._found and self._doubts < DOUBTS and 2 * sum(probe.slow for probe in self._probes) > KIND:
                self._doubts += 1
                self._contended(now, seconds)
            else:
                self._nobody(now)

    def _contended(self, now: float, seconds: float) -> None:
        self._probes.clear()
        self._rest = min((SHARE - 1) * seconds, LONGEST_REST)
        self._trust, self._recheck_at = FIRST_RECHECK, math.inf
        self.manners.contended(now)

    def _nobody(self, now: float) -> None:
        for probe in self._probes:
            if probe.size:
                self._idle.setdefault(probe.size, deque(maxlen=REMEMBERED)).append(probe.seconds)
        self._probes.clear()
        if self.rate.fallen or now >= self._recheck_at:
            if self.rate.fallen:
                self.rate.accept()
            self._recheck_at = now + self._trust
            self._trust = min(2 * self._trust, MAX_RECHECK)
        self._found = self._doubts = 0
        self.manners.clear(now)

    def _progress(self, now: float, work: int, *, says_nothing: bool = False) -> None:
        """So much has come while requests of ours were under way."""
        if self.manners.state is State.RUN and not says_nothing:
            self.rate.add(work, now - self._busy_since)
        self._busy_since = now
