"""Images that are only read, and keep copies of what is read.

An image becomes writable when somebody opens it for writing. So does one that is only read, but wants to keep what is
read of its base, to prefetch, or to record a profile: as long as nobody else has it open, and until somebody asks for
it (`filelock.py`). Then it is read like any other, and tries again later.
"""

from __future__ import annotations

import contextlib
import functools
import logging

import trio

from fvdfs.errors import ImageBusy, ImageError
from fvdfs.image.image import Image
from fvdfs.image.loading import make_writable
from fvdfs.image.locking import is_asked_for, unlock_for_writing
from fvdfs.image.policy import Policy
from fvdfs.ops.background import Background, stop_prefetching
from fvdfs.ops.inodes import Entry

log = logging.getLogger(__name__)

ASKED_INTERVAL = 0.1  # seconds between looks whether somebody else wants to open an image that keeps copies
KEEP_RETRY = 5.0  # seconds before a busy image is tried again


async def begin_writing(entry: Entry, image: Image, policy: Policy, background: Background) -> None:
    """Make an image writable, and begin what it wants done then. Raises ImageBusy, ImageError, OSError."""
    await make_writable(image, policy)
    await background.begin(entry, image)


class Keeping:
    """Of the images of one mount. `Entry.lock` is held where these methods are called."""

    def __init__(self, policy: Policy, background: Background) -> None:
        self._policy = policy
        self._background = background

    async def begin(self, entry: Entry, image: Image) -> None:
        """Keep what is read of an image that was just opened for reading, if it wants that."""
        spawn = self._background.spawn
        wanted = self._policy.writable and self._background.wants_to_write(image)
        if wanted and spawn is not None and await self._try(entry, image):
            spawn(functools.partial(self._go_on, entry, image))

    async def _try(self, entry: Entry, image: Image) -> bool:
        """Have what is read be kept, if nobody else has the image open; False where that will never be."""
        try:
            await begin_writing(entry, image, self._policy, self._background)
        except ImageBusy:
            pass
        except (ImageError, OSError) as error:
            log.info("%s: what is read of the base is not kept: %s", image.name, error)
            with contextlib.suppress(OSError):
                await unlock_for_writing(image)
            return False
        return True

    async def _go_on(self, entry: Entry, image: Image) -> None:
        """Let others open the image when they ask for it, and keep copies again when they have closed it."""
        going_on = True
        while going_on:
            with trio.move_on_after(ASKED_INTERVAL if image.writable else KEEP_RETRY):
                await entry.unloaded.wait()
                return
            async with entry.lock:
                if entry.image is not image or entry.for_writing:
                    return
                if not image.writable:
                    going_on = await self._try(entry, image)
                elif await trio.to_thread.run_sync(is_asked_for, image):
                    going_on = await self._stop(entry, image)

    async def _stop(self, entry: Entry, image: Image) -> bool:
        """Only read it; whether that is so."""
        await stop_prefetching(entry)
        try:
            with trio.CancelScope(shield=True):
                await image.stop_writing()
                await entry.mtime.restore()
                await unlock_for_writing(image)
        except OSError as error:
            log.error("%s: nobody else can open it: %s", image.name, error)
            return False
        return True
