"""How much is under way for a disk that follows its machine from another host: what fills the link, and hardly more.

As long as such a disk is not all here, the machine depends on two hosts and what is between them. So prefetching does
not step back for others, as it does else (`linkwatch.py`); caps bound it. But what was asked before a read of the
machine's is served before it: each request more than the link needs costs the machine time, and brings nothing. How
many it needs follows from two measures, as in BBR (Cardwell et al., ACM Queue 14(5), 2016): the highest rate at which
answers came lately, and the shortest time that a request took beside being served. Where processors are short, or the
machine reads, means would fall; less and smaller requests would follow from that, and be slower still. Then requests
wait for processors, not for the link, and some more of them do no harm.

Where what is copied has a connection for itself (`store.nbd_reader`), that one bounds what is on the link (`room`), and
measures better what it holds. More may be under way then, at the server, so that it always has something to send.

Times are seconds, sizes bytes. `now` never goes backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fvdfs.prefetch.linkwatch import GOOD_REQUEST, SHORT_OF_TIME, SMALLEST_REQUEST

T = TypeVar("T")

LATELY = 5.0  # seconds; what was measured counts for one or two times as long
LONGEST = 0.004  # seconds that a request is served: the machine's reads wait for that at least
LARGEST_REQUEST = 1 << 20  # bytes; those above `GOOD_REQUEST` gain little, but where the link is far
FEWEST = 2  # requests at a time: while one is being dealt with here, the other one is on its way
GAIN = 1.5  # as long as too few are under way, the rate is taken for lower than it is: this has them grow
BEHIND = 0.015  # seconds; what is under way beyond `Window.room`, so that the server always has something to do
LARGEST_APART = 512 << 10  # bytes of a request where there is such room: the machine's reads hardly wait for it
MORE = 2  # where they wait for processors


class _Extreme(Generic[T]):
    """The greatest, or least, of the last measures."""

    def __init__(self, choose: Callable[[T, T], T], none: T) -> None:
        """`none`: where there are no measures."""
        self._choose = choose
        self._none = self._before = self._now = none
        self._since = -math.inf

    def add(self, now: float, value: T) -> None:
        if now - self._since > LATELY:
            self._before, self._now, self._since = self._now, self._none, now
        self._now = self._choose(self._now, value)

    @property
    def value(self) -> T:
        return self._choose(self._now, self._before)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that is under way."""

    at: float
    size: int
    answered: int
    """Bytes that had been answered by then,"""
    last: float
    """and when the last ones were, or the request was sent on an idle link."""


class Window:
    """Of one link, for all disks that follow over it."""

    def __init__(self) -> None:
        self.lag = 0.0
        """Seconds that a program waits for a processor here at the moment."""
        self.room = 0
        """Bytes that are on the link at the most, whatever is asked for; 0: what is asked for bounds it alone."""
        self._rate = _Extreme[float](max, 0.0)
        self._shortest = _Extreme[tuple[float, int]](min, (math.inf, 0))  # what a request of so many bytes took
        self._under_way = 0
        self._bytes = 0  # the same, in bytes
        self._answered = 0
        self._last = 0.0

    @property
    def _on_the_way(self) -> float:
        """Bytes that the link can have under way, besides the request that is served."""
        seconds, size = self._shortest.value
        return GAIN * max(0.0, self._rate.value * seconds - size) if self._rate.value else 0.0

    @property
    def size(self) -> int:
        """Bytes that a request should have at most."""
        if self.room:
            return min(LARGEST_APART, max(SMALLEST_REQUEST, int(self._rate.value * LONGEST)))
        served = min(GOOD_REQUEST, int(self._rate.value * LONGEST))
        return min(LARGEST_REQUEST, max(SMALLEST_REQUEST, served, int(self._on_the_way / FEWEST)))

    @property
    def limit(self) -> int:
        """Requests of this size that may be under way at a time."""
        needed = max(FEWEST, 1 + math.ceil(self._on_the_way / self.size))
        return needed + (MORE if self.lag > SHORT_OF_TIME else 0)

    def is_full(self, turns: int) -> bool:
        """Whether enough is under way, where so many may read, some of whom have not sent their request yet.

        What counts are bytes: requests for small pieces of data fill a link no more than one for all of them.
        """
        size = self.size
        most = self.room + int(self._rate.value * BEHIND) if self.room else self.limit * size
        return self._bytes + (turns - self._under_way) * size >= most

    def started(self, now: float, size: int) -> Sent:
        """A request is sent."""
        if not self._under_way:
            self._last = now
        self._under_way += 1
        self._bytes += size
        return Sent(now, size, self._answered, self._last)

    def finished(self, now: float, sent: Sent, *, says_nothing: bool) -> None:
        """It was answered, which `says_nothing` where it failed, or the server found a hole."""
        self._under_way -= 1
        self._bytes -= sent.size
        self._last = now
        if says_nothing:
            return
        self._answered += sent.size
        if now > sent.last:
            self._rate.add(now, (self._answered - sent.answered) / (now - sent.last))
        self._shortest.add(now, (now - sent.at, sent.size))
