"""How long to look for the next request, or the end of a call, before sleeping: as KVM does where a guest is idle.

To sleep and to be woken takes 20 to 50 us, as long as a fast disk does. So after a sleep that turned out to be short,
the next one is put off for longer, up to `MOST`; after a long one, not at all. So who is slower than that costs
nothing. It pays on CPUs that others use, too: who sleeps there has to wait for its turn again.
"""

from __future__ import annotations

MOST = 100_000
"""ns. With more, a client that needs the CPU for its next request has to wait for it."""
_LEAST = 20_000  # ns; where it begins
_LONG = 5 * MOST  # ns; a sleep after which nothing was to be gained


class Linger:
    """Of one event loop. Times in ns, by any clock."""

    def __init__(self) -> None:
        self._window = 0
        self._asleep = 0

    def sleeps(self, now: int) -> None:
        """There is nothing more to do."""
        self._asleep = now

    def wakes(self, now: int) -> int:
        """There is; for how long to look for more after it."""
        slept = now - self._asleep
        if slept < MOST:
            self._window = min(MOST, max(_LEAST, 2 * self._window))
        elif slept > _LONG:
            self._window = 0
        return self._window
