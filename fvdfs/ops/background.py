"""What images want done beside the requests: recording a profile, and prefetching."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import trio

from fvdfs.alloc.chunked import Spawn
from fvdfs.format.profile import Extent
from fvdfs.image.image import Image
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import Scheduler

log = logging.getLogger(__name__)


class Prefetched(Protocol):
    """Who has an image that may be prefetched."""

    prefetcher: Prefetcher | None

    @property
    def follows(self) -> bool:
        """Whether its disk is on the way to this host."""


class Background:
    """Of all images of a mount."""

    def __init__(self, scheduler: Scheduler | None = None, *, record_profiles: bool = False) -> None:
        """`record_profiles`: of every image that has none yet."""
        self._scheduler = scheduler or Scheduler()
        self._record_profiles = record_profiles
        self.spawn: Spawn | None = None
        """Starts a task; None where there are none."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        """Tasks can be started while this lasts, in this nursery; at its end they are cancelled."""
        async with trio.open_nursery() as nursery:
            self.spawn = lambda work: nursery.start_soon(_guard, work)
            yield nursery
            nursery.cancel_scope.cancel()

    def wants_to_write(self, image: Image) -> bool:
        """Whether an image that is only read has something to write all the same."""
        header = image.header
        return (
            self.spawn is not None
            and image.bitmap is not None
            and (
                image.followed is not None
                or bool(header.copy_on_read)
                or header.prefetch_start_delay > 0
                or (header.profile_directed_prefetch_start_delay >= 0 and header.prefetch_profile_entries > 0)
                or self._wants_profile(image)
            )
        )

    def _wants_profile(self, image: Image) -> bool:
        header = image.header
        return bool(header.generate_prefetch_profile) or (self._record_profiles and not header.prefetch_profile_entries)

    async def begin(self, owner: Prefetched, image: Image) -> None:
        """The image has become writable. Raises ImageError, OSError."""
        header = image.header
        if image.bitmap is None:
            return
        if image.fetcher is not None:
            image.fetcher.observer = self._scheduler.link(image.base_server)
        if image.recorder is None and self._wants_profile(image):
            image.record_profile()
        profile: list[Extent] = []
        if header.profile_directed_prefetch_start_delay >= 0:
            profile = await image.read_profile()
        whole = header.prefetch_start_delay > 0
        if image.followed is not None and image.followed.bitmap is not None:
            self.prefetch(owner, image, profile)
        elif profile or whole:
            self.prefetch(owner, image, profile, whole=whole, delay=header.prefetch_start_delay)

    def prefetch(
        self, owner: Prefetched, image: Image, profile: Sequence[Extent] = (), *, whole: bool = True, delay: float = 0
    ) -> Prefetcher | None:
        """Fetch the profile, then all that is missing if `whole`, `delay` seconds from now; None without tasks."""
        if self.spawn is None:
            return None
        prefetcher = owner.prefetcher = Prefetcher(image, self._scheduler, whole=whole, follows=owner.follows)
        profile_delay = max(0, image.header.profile_directed_prefetch_start_delay)
        self.spawn(functools.partial(prefetcher.run, profile=profile, profile_delay=profile_delay, delay=delay))
        return prefetcher


async def _guard(work: Callable[[], Awaitable[None]]) -> None:
    """Do what an image wants done; its failure must not end the mount."""
    try:
        await work()
    except Exception:
        log.exception("a task in the background has ended by an error")


async def stop_prefetching(owner: Prefetched) -> None:
    """Stop the prefetcher of an image, if any."""
    if owner.prefetcher is not None:
        await owner.prefetcher.stop()
        owner.prefetcher = None
