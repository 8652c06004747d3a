"""Prefetching one image: its profile first, then all that is still only in the base.

A prefetcher is a task of the mount. It looks for missing blocks in address order and copies them, at most
`bytes_per_prefetch` at a time, through `num_prefetch_slots` workers, each of which reads and then stores
(format.md, "Reads, writes, copies"). When a worker may go on is decided by the scheduler, which knows the other
images and the load (`scheduler.py`), and by the image's own rule (`pacing.FloorRule`). A worker writes out to
the disk what it has stored before it goes on, so that a guest's flush never waits for more than the slots hold.
When nothing is missing the image releases its base.

Nothing depends on its success: after an error of the base or the storage it waits, longer each time, and tries
again in smaller parts. A block that keeps failing is left out, and tried again at the end.
"""

from __future__ import annotations

import datetime
import enum
import logging
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from fvdfs.cow.fetching import Fetch, Fetcher
from fvdfs.cow.planner import zero_runs
from fvdfs.format.creation import DEFAULT_PREFETCH
from fvdfs.format.header import Header
from fvdfs.format.profile import Extent
from fvdfs.image.image import Image
from fvdfs.image.map import shares
from fvdfs.prefetch.linkwatch import GOOD_REQUEST
from fvdfs.prefetch.order import Piece, ProfileOrder, next_piece
from fvdfs.prefetch.pacing import FloorRule, Pacer
from fvdfs.prefetch.profile import plan
from fvdfs.prefetch.scheduler import FOLLOWING_JOBS, Flow, Link, Scheduler
from fvdfs.store.nbd_reader import Ahead, reads_ahead
from fvdfs.store.outage import Outage

log = logging.getLogger(__name__)

MAX_SLOTS = 64  # pieces in memory; with `MAX_REQUEST` this bounds what an image's header can make us allocate
MAX_REQUEST = 8 << 20  # bytes; larger requests, as an image may ask for, are cut
FIRST_RETRY = 1.0  # seconds; then twice as long each time
MAX_RETRY = 60.0  # seconds
NARROWER = 8  # a request that failed is tried again in so many parts, to find the block that fails
TRIES = 3  # at a block that fails, before it is left out
RATE_WINDOW = 5.0  # seconds over which the rate that users see is averaged
IDLE_PASS = 0.5  # seconds before blocks that others had claimed are looked at again
PROFILE_WORKERS = 3  # requests of a profile under way: a job of the mount is left for others
PROFILE_REQUEST = 256 << 10  # bytes; extents are joined up to this size, so that the guest's reads find gaps
AHEAD = 32 << 20  # bytes that the base is asked about before they are read, where a disk follows its machine
AHEAD_PAUSE = 0.05  # seconds until that goes on, where it is so far ahead
WRITE_OUT = 2 << 20  # bytes that are written out together, where a disk follows its machine
PROFILE_TRIES = 2  # at each part of a profile
PROFILE_GAP = 64 << 10  # bytes between extents of a profile that are fetched along with them


class Activity(enum.Enum):
    """What a prefetcher is doing."""

    OFF = "off"
    WAITING = "waiting"
    PROFILE = "profile"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    DONE = "done"


class _Failure(Exception):
    """A request for bytes [start, stop) of the disk failed."""

    def __init__(self, start: int, stop: int, what: str, error: OSError) -> None:
        super().__init__(f"{what}: {error.strerror or error}")
        self.start = start
        self.stop = stop


def floor_rule(header: Header, rng: random.Random) -> FloorRule:
    """The rule that the header's fields ask for; nonsense in them is bounded."""
    return FloorRule(
        read_time=max(header.prefetch_read_throughput_measure_time, 0) / 1000,
        write_time=max(header.prefetch_write_throughput_measure_time, 0) / 1000,
        alpha=min(max(header.prefetch_perf_calc_alpha, 0), 100) / 100,
        min_read=max(header.prefetch_min_read_throughput, 0) * 1024,
        min_write=max(header.prefetch_min_write_throughput, 0) * 1024,
        throttle_time=header.prefetch_throttle_time / 1000,
        rng=rng,
    )


def caps(header: Header) -> Pacer:
    """The smaller one of the header's caps on reading and storing (KiB a second); 0 and less: no cap."""
    given = (header.prefetch_max_read_throughput, header.prefetch_max_write_throughput)
    return Pacer(min((cap * 1024 for cap in given if cap > 0), default=0))


class Prefetcher:
    """Copies what an open image is missing; `run` is its task."""

    def __init__(
        self,
        image: Image,
        scheduler: Scheduler,
        *,
        whole: bool = True,
        follows: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        """`whole`: fetch all that is missing, not only a profile. `follows`: as of `Flow`."""
        self.image = image
        self.copied = 0
        """Bytes that were copied; those of holes were not."""
        self.profile: Sequence[Extent] = ()
        """What it fetches first."""
        self._localized = 0  # the same with holes
        self._unwritten: list[tuple[int, int]] = []
        """What was stored and may be in memory alone."""
        self._looking = trio.Lock()
        self.ended = trio.Event()
        self.held = False
        """Whether somebody keeps the image open until this task has ended."""
        self._whole = whole
        self._follows = follows
        self._ahead = Ahead()
        self._now = trio.Event()
        self._scheduler = scheduler
        self._rule = floor_rule(image.header, rng or random.Random())
        self._state = Activity.WAITING
        self._reason = ""
        self._resume = trio.Event()
        self._resume.set()
        self._scope = trio.CancelScope()
        self._recent: deque[tuple[float, int]] = deque()
        self._flow: Flow | None = None
        self._at = 0
        self._careful = (0, 0)
        """After a request failed: up to this offset, requests have at most this size."""
        self._failures: dict[int, int] = {}
        self._complaint = ""

    # --- seen and controlled from outside ---------------------------------------------------------

    @property
    def state(self) -> Activity:
        """What it is doing."""
        if self._state in (Activity.RUNNING, Activity.PROFILE) and self.reason:
            return Activity.PAUSED
        return self._state

    @property
    def reason(self) -> str:
        """Why it waits; empty while it runs, and when it has ended."""
        if self._state in (Activity.RUNNING, Activity.PROFILE):
            return "as asked" if not self._resume.is_set() else self._stands_back()
        return self._reason

    def _stands_back(self) -> str:
        if self._is_away():
            return "the server of the base is away"
        if self._rule.delay(trio.current_time()) > 0:
            return self._rule.reason
        return self._scheduler.yielding(self._flow) if self._flow is not None else ""

    @property
    def rate(self) -> float:
        """Bytes a second, over `RATE_WINDOW`."""
        self._forget_old()
        return sum(size for _, size in self._recent) / RATE_WINDOW

    def pause(self) -> None:
        """Ask for nothing new, until `go_on`."""
        if self._resume.is_set():
            self._resume = trio.Event()

    def go_on(self) -> None:
        """Fetch all that is missing, at once."""
        self._whole = True
        self._resume.set()
        self._now.set()

    def _is_away(self) -> bool:
        outage = self.image.outage
        return outage is not None and outage.is_away

    async def _until_lost(self) -> None:
        """Wait until the server is away: what is asked of it then would take jobs that others could use."""
        while True:
            if self._is_away():
                return
            await trio.sleep(IDLE_PASS)

    async def _until_back(self) -> None:
        while (outage := self.image.outage) is not None and outage.is_away:
            await outage.ended.wait()

    async def _wait_for_now(self, seconds: float) -> None:
        """Wait so long, or until `go_on` is called, or not at all where it has been."""
        with trio.move_on_after(seconds):
            await self._now.wait()
        self._now = trio.Event()

    async def stop(self) -> None:
        """End the task, and wait for that."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self.ended.wait()

    # --- the task ---------------------------------------------------------------------------------

    async def run(self, *, profile: Sequence[Extent] = (), profile_delay: float = 0, delay: float = 0) -> None:
        """Fetch the profile after one delay, all that is missing after the other (seconds after the start)."""
        try:
            with self._scope:
                await self._run(profile, profile_delay, trio.current_time() + delay)
        except Exception:
            log.exception("%s: prefetching ended by an error", self.image.name)
            self._state, self._reason = Activity.FAILED, "an error that is in the log"
        finally:
            if self._state is not Activity.DONE and (self._state is not Activity.FAILED or self._scope.cancel_called):
                self._state, self._reason = Activity.OFF, ""
            self.ended.set()

    async def _run(self, profile: Sequence[Extent], profile_delay: float, start: float) -> None:
        image = self.image
        self.profile = profile
        if self._follows:
            reads_ahead.set(self._ahead)
        fetcher = image.start_fetching(copy_on_read=False)
        if fetcher is None or image.base is None:
            self._state = Activity.DONE
            return
        link = self._scheduler.link(image.base_server)
        fetcher.observer = link
        if image.followed is not None:
            self._reason = "it is not known yet what the source has beyond the template"
            await image.map_known.wait()
        requests = plan(profile, image.base_range()[1], PROFILE_GAP, PROFILE_REQUEST)
        if requests:
            self._reason = f"starts {profile_delay:g} s after opening"
            await trio.sleep(profile_delay)
            with self._sharing(link, Activity.PROFILE) as flow:
                await self._fetch_profile(flow, fetcher, requests)
        if not self._whole:
            return
        if start > trio.current_time():
            self._state, self._reason = Activity.WAITING, "its delay is not over"
            await self._wait_for_now(start - trio.current_time())
        with self._sharing(link, Activity.RUNNING) as flow:
            await self._fetch_all(flow, fetcher)

    @contextmanager
    def _sharing(self, link: Link, activity: Activity) -> Iterator[Flow]:
        self._state = activity
        with self._scheduler.flow(link, caps(self.image.header), follows=self._follows) as flow:
            self._flow = flow
            try:
                yield flow
            finally:
                self._flow = None

    async def _fetch_profile(self, flow: Flow, fetcher: Fetcher, requests: Sequence[Extent]) -> None:
        """Copy what a profile names. It is advice: what fails twice is left to the guest's own reads."""
        retry, failed = FIRST_RETRY, True
        orders = [ProfileOrder(self.image, fetcher, requests, PROFILE_REQUEST) for _ in range(PROFILE_TRIES)]
        while orders and failed:
            order, failed = orders.pop(), False
            while order.has_more():
                before = self._localized
                try:
                    await self._pass(flow, fetcher, PROFILE_WORKERS * (FOLLOWING_JOBS if self._follows else 1), order)
                except _Failure as failure:
                    failed = True
                    order.leave_out(failure.start)
                    retry = await self._wait_after(failure, retry, progress=self._localized > before)
                    self._state = Activity.PROFILE

    async def _fetch_all(self, flow: Flow, fetcher: Fetcher) -> None:
        """Copy until nothing is missing; after a failure wait and try again."""
        retry = FIRST_RETRY
        while True:
            before = self._localized
            try:
                await self._pass(flow, fetcher, self._slots())
                if await self._finish():
                    return
            except _Failure as failure:
                self._skip(failure)
                retry = await self._wait_after(failure, retry, progress=self._localized > before)
                self._state = Activity.RUNNING
            else:
                if self._localized == before:
                    await trio.sleep(IDLE_PASS)

    async def _wait_after(self, failure: _Failure, retry: float, *, progress: bool) -> float:
        """Say what failed, and wait so long, or the shortest time after `progress`. The next wait, in seconds."""
        if progress:
            retry = FIRST_RETRY
        if self._complaint != str(failure):
            self._complaint = str(failure)
            log.error("%s: prefetching: %s; it is tried again", self.image.name, failure)
        self._state, self._reason = Activity.FAILED, f"{failure}; again in {retry:g} s"
        await self._wait_for_now(retry)
        return min(2 * retry, MAX_RETRY)

    def _skip(self, failure: _Failure) -> None:
        """Go on in smaller parts, or behind a block that fails again and again."""
        block_size = self.image.base_range()[0]
        self._at = failure.start
        if failure.stop - failure.start > block_size:
            # Perhaps only a part of it cannot be read.
            self._careful = failure.stop, max((failure.stop - failure.start) // NARROWER, block_size)
            return
        self._failures[failure.start] = tries = self._failures.get(failure.start, 0) + 1
        if tries >= TRIES:
            self._at += block_size

    async def _finish(self) -> bool:
        start, stop = self.image.missing(0, 1)
        if start < stop:
            self._at = 0
            return False
        try:
            if await self.image.release_base():
                log.info("%s: everything is local; the base is no longer needed", self.image.name)
        except OSError as error:
            raise _Failure(self._at, self._at, "letting go of the base", error) from error
        self._state, self._reason = Activity.DONE, ""
        return True

    async def _pass(self, flow: Flow, fetcher: Fetcher, slots: int, order: ProfileOrder | None = None) -> None:
        """Copy, `slots` pieces at a time, to the end of the order; None: by address. Raises _Failure.

        Or until the server is away, which is no failure.
        """
        failures: list[_Failure] = []
        lost = False
        await self._until_back()
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope

            async def end_when_lost() -> None:
                nonlocal lost
                await self._until_lost()
                lost = True
                scope.cancel()

            async def work() -> None:
                try:
                    while await self._copy_next(flow, fetcher, order):
                        pass
                except _Failure as failure:
                    failures.append(failure)
                    scope.cancel()

            nursery.start_soon(self._scheduler.watch)
            nursery.start_soon(end_when_lost)
            if self._follows and order is None:
                nursery.start_soon(self._ask_ahead, fetcher)
            async with trio.open_nursery() as workers:
                for _ in range(slots):
                    workers.start_soon(work)
            scope.cancel()
        if lost and order is not None:
            order.leave_out(-1)
        elif failures and not lost:
            raise min(failures, key=lambda failure: failure.start)

    def _slots(self) -> int:
        """How many pieces may be in memory: as many bytes as the image's slots hold, in pieces of a good size."""
        slots = min(max(self.image.header.num_prefetch_slots, 1), MAX_SLOTS)
        return max(slots, min(slots * self._largest() // GOOD_REQUEST, MAX_SLOTS))

    def _largest(self) -> int:
        size = self.image.header.bytes_per_prefetch
        return min(size if size > 0 else DEFAULT_PREFETCH, MAX_REQUEST)

    async def _copy_next(self, flow: Flow, fetcher: Fetcher, order: ProfileOrder | None) -> bool:
        """Read and store one piece, or store a hole; False where there is none left. Raises _Failure."""
        await self._wait_until_wanted()
        urgent = order is not None
        async with self._scheduler.turn(flow, urgent=urgent) as limit:
            piece = order.next() if order is not None else await self._next(limit, fetcher)
            if piece is None:
                return False
            if not piece.hole:
                fetch = fetcher.begin_ahead(piece.start, piece.stop, is_slow=self._ahead.room > 0)
                try:
                    self._scheduler.spend(flow, piece.stop - piece.start)
                    await self._read(flow, fetcher, fetch, urgent=urgent)
                except BaseException:
                    fetcher.give_up(fetch)
                    raise
        try:
            if piece.hole:
                await self._store_hole(flow, piece, urgent=urgent)
            else:
                await self._store(fetcher, fetch, urgent=urgent)
        except OSError as error:
            raise _Failure(piece.start, piece.stop, "storing", error) from error
        if order is not None:
            order.under_way.remove(piece)
        return True

    async def _wait_until_wanted(self) -> None:
        """Wait while it is paused, by the user or its own rule."""
        while not self._resume.is_set() or (pause := self._rule.delay(trio.current_time())) > 0:
            if self._resume.is_set():
                await trio.sleep(pause)
            else:
                await self._resume.wait()

    async def _store(self, fetcher: Fetcher, fetch: Fetch, *, urgent: bool) -> None:
        """Store what was read. Raises OSError."""
        size = fetch.stop - fetch.start
        self._scheduler.storing.start(trio.current_time())
        try:
            stored = await fetcher.store(fetch)
            if stored and not urgent:
                await self._write_out(fetch.start, fetch.stop)
        finally:
            now = trio.current_time()
            seconds = self._scheduler.storing.stop(now)
        self._scheduler.disk.written(now, size, seconds)
        if self._scheduler.disk.beset and not self._follows:
            self._rule.wrote(now, size, seconds)
        self.copied += stored
        self._localized += stored
        self._recent.append((now, stored))
        self._forget_old()
        if urgent:
            await fetcher.follow_hole(fetch)

    async def _write_out(self, start: int, stop: int) -> None:
        """Write out to the disk what was stored; while a disk follows, not piece by piece, which takes longer."""
        self._unwritten.append((start, stop))
        if self._follows and sum(stop - start for start, stop in self._unwritten) < WRITE_OUT:
            return
        ranges, self._unwritten = sorted(self._unwritten), []
        start, stop = ranges[0]
        for next_start, next_stop in ranges[1:]:
            if next_start > stop:
                await self.image.write_out(start, stop)
                start = next_start
            stop = next_stop
        await self.image.write_out(start, stop)

    async def _store_hole(self, flow: Flow, piece: Piece, *, urgent: bool) -> None:
        """Make a hole local, which takes a turn for each step that writes zeros. Raises OSError."""
        at = piece.start
        while True:
            end, stored = await self.image.store_hole(at, piece.stop, writes=True)
            self._localized += stored
            if end >= piece.stop:
                return
            await self.image.write_out(at, end)
            at = end
            await self._wait_until_wanted()
            async with self._scheduler.turn(flow, urgent=urgent):
                self._scheduler.spend(flow, 0)

    async def _read(self, flow: Flow, fetcher: Fetcher, fetch: Fetch, *, urgent: bool) -> None:
        link, size = flow.link, len(fetch.data)
        now = trio.current_time()
        request = link.watch.started(now, size, urgent=urgent or self._follows)
        sent = link.window.started(now, size)
        self._scheduler.sent(flow)
        link.reading.start(now)
        failed, hole = True, False
        try:
            await fetcher.fill(fetch)
            failed, hole = False, is_mostly_zeros(fetch.data)
        except OSError as error:
            raise _Failure(fetch.start, fetch.stop, "reading from the base", error) from error
        finally:
            now = trio.current_time()
            link.watch.finished(now, request, failed=failed, hole=hole)
            link.window.finished(now, sent, says_nothing=failed or hole)
            link.window.room = self._ahead.room
            seconds = link.reading.stop(now)
        if link.watch.beset and not self._follows:
            self._rule.read(now, size, seconds)

    async def _next(self, limit: int, fetcher: Fetcher) -> Piece | None:
        """The next piece that is missing and that nobody fetches; None where there is none."""
        block_size, base_size = self.image.base_range()
        async with self._looking:
            while True:
                is_careful = self._at < self._careful[0]
                size = min(self._largest(), limit, *(self._careful[1:] if is_careful else ()))
                start, stop = next_piece(self.image, fetcher, self._at, math.inf, size)
                if start >= stop:
                    return None
                self._at, hole = await fetcher.extents.blocks(start, stop, block_size, base_size)
                if hole:
                    self._at = min(self._at, start + size) if is_careful else self._at
                    return Piece(start, self._at, hole=True)
                start, stop = next_piece(self.image, fetcher, start, self._at, size)  # others were there meanwhile
                if start < stop:
                    self._at = stop = min(stop, self._at)
                    return Piece(start, stop)

    async def _ask_ahead(self, fetcher: Fetcher) -> None:
        """Ask where the base has holes before that is needed: with many, the link would stand still for it."""
        base_size, at = self.image.base_range()[1], 0
        while at < base_size:
            await self._wait_until_wanted()
            at = max(at, self._at)
            at = max(at, self.image.missing(at, base_size)[0])
            if at - self._at > AHEAD:
                await trio.sleep(AHEAD_PAUSE)
            elif at < base_size:
                at, _ = await fetcher.extents.at(at, base_size)
                await trio.lowlevel.checkpoint()

    def _forget_old(self) -> None:
        oldest = trio.current_time() - RATE_WINDOW
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()


def is_mostly_zeros(data: memoryview) -> bool:
    """Whether more than half of it is zeros, in steps of 64 KiB."""
    return 2 * sum(stop - start for start, stop, zero in zero_runs(0, data) if zero) > len(data)


def told_of(outage: Outage | None) -> dict[str, Any] | None:
    """What a user wants to know of the last time that a server was away, ready for JSON. Times: ISO 8601, local."""
    if outage is None:
        return None
    fails = None if outage.patience == math.inf else outage.since + outage.patience
    since, until, fails_at = (
        at and datetime.datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")
        for at in (outage.since, outage.until, fails)
    )
    return {"since": since, "until": until, "reason": outage.reason, "fails_at": fails_at}


def status(image: Image, prefetcher: Prefetcher | None) -> dict[str, Any]:
    """What `fvdfs status` shows of an open image, ready for JSON; sizes in bytes, rates in bytes a second."""
    journal = image.header.journal_region
    rate = prefetcher.rate if prefetcher is not None else 0.0
    missing = image.left_to_copy()
    state = prefetcher.state if prefetcher is not None else Activity.OFF
    if image.bitmap is None:
        state = Activity.DONE
    return shares(image) | {
        "to_copy": missing,
        "state": state.value,
        "reason": prefetcher.reason if prefetcher is not None else "",
        "rate": round(rate),
        "eta": round(missing / rate) if rate and missing else None,
        "prefetched": prefetcher.copied if prefetcher is not None else 0,
        "base_read": image.base_read,
        "commits": image.committer.commits,
        "journal_used": image.committer.journal_used,
        "journal_size": journal.size if journal is not None else 0,
        "failed": image.damage,
        "base_outage": told_of(image.outage),
        "writable": image.writable,
    }
