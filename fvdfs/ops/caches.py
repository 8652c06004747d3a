"""Base images that keep what is read through them: a host's cache of a template.

Many disks stand on one such image, whose own base is far away. What one of them reads is there for all others, and
prefetching fills the rest once for the host; then the base is let go. `image.bases` has these images open; here is
what they want done meanwhile.

Nobody flushes copies. A crash loses those that are in no bitmap yet: they are read again. So that it is not all of
a long session's, what was copied is made stable now and then.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import trio

from fvdfs.errors import ImageError
from fvdfs.image.bases import Bases
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.ops.background import Background, stop_prefetching
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.prefetcher import status as status_of_image
from fvdfs.store.base import Store
from fvdfs.store.host import HostFile, Identity

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL = 30.0  # seconds, of which a crash may lose the copies


class Cache:
    """A base image that is filled."""

    follows = False

    def __init__(self, image: Image) -> None:
        self.image = image
        self.prefetcher: Prefetcher | None = None
        self.checkpoints = trio.CancelScope()
        self.ended = trio.Event()
        """When no checkpoint is under way, and none will be."""
        self.lock = trio.Lock()
        """Held while its record is written."""
        self.move = ""
        """What it is of a disk that follows (`migration.Target`)."""


class Caches:
    """Those of a mount."""

    def __init__(self, bases: Bases[Core, Store], background: Background) -> None:
        self._bases = bases
        self._background = background
        self._caches: dict[Core, Cache] = {}
        self.left_alone: set[Core] = set()
        """Base images that are written for another reason (`merging.py`)."""
        self.begun: Callable[[Cache], None] = lambda _cache: None
        """Is told of each that begins."""
        bases.before_closing = self._end

    async def begin(self, image: Image) -> None:
        """An image was opened: begin what those below it want done, if nobody has yet. Failures go to the log."""
        layer = image.base
        while isinstance(layer, Image):
            fills = layer.writable and layer not in self._caches and layer not in self.left_alone
            if fills and self._background.spawn is not None:
                cache = self._caches[layer] = Cache(layer)
                self._background.spawn(functools.partial(_make_stable, cache))
                try:
                    await self._background.begin(cache, layer)
                except (ImageError, OSError) as error:
                    log.error("%s: it is not prefetched: %s", layer.name, error)
                self.begun(cache)
            layer = layer.base

    def of(self, file: Identity) -> Cache | None:
        """The one that is this file."""
        return next((cache for cache in self._caches.values() if is_file(cache.image, file)), None)

    def status(self) -> list[dict[str, Any]]:
        """What a user wants to know of each, ready for JSON."""
        return [
            {
                "name": os.path.basename(image.name),
                "image": image.name,
                "open": True,
                "disks": sum(user.base is image for user in self._bases.above(image)),
                "passthrough": "others stand on it",
                "move": cache.move,
            }
            | status_of_image(cache.image, cache.prefetcher)
            for image, cache in self._caches.items()
        ]

    async def _end(self, image: Core) -> None:
        cache = self._caches.pop(image, None)
        if cache is not None:
            await stop_prefetching(cache)
            cache.checkpoints.cancel()
            await cache.ended.wait()
            async with cache.lock:
                pass


def is_file(image: Core, file: Identity) -> bool:
    """Whether this is the image's own file."""
    return isinstance(image.meta, HostFile) and image.meta.identity == file


async def _make_stable(cache: Cache) -> None:
    committer = cache.image.committer
    try:
        with cache.checkpoints:
            writes = committer.writes
            while committer.failed is None:
                await trio.sleep(CHECKPOINT_INTERVAL)
                if committer.writes != writes:
                    writes = committer.writes
                    await committer.checkpoint()
    except OSError as error:
        log.error("%s: what is read of its base is not kept any more: %s", cache.image.name, error)
    finally:
        cache.ended.set()
