"""Regular commits of what nobody flushes: a crash loses no more than the last seconds."""

from __future__ import annotations

import logging

import trio

from fvdfs.image.image import Image
from fvdfs.ops.inodes import Inodes

log = logging.getLogger(__name__)

COMMIT_INTERVAL = 5.0  # seconds after which a write is committed that nobody flushed


class RegularCommits:
    """Of all open images of a mount."""

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes
        self._written = trio.Event()
        self._committing: set[Image] = set()

    def note_write(self) -> None:
        """An image was written."""
        self._written.set()

    async def run(self) -> None:
        """Commit what was written, `COMMIT_INTERVAL` after the first write. Runs for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._written.wait()
                await trio.sleep(COMMIT_INTERVAL)
                self._written = trio.Event()
                for entry in self._inodes.open():
                    image = entry.image
                    if image is not None and image.committer.uncommitted and image not in self._committing:
                        nursery.start_soon(self._commit, image)  # none waits for another one's disk

    async def _commit(self, image: Image) -> None:
        self._committing.add(image)
        try:
            await image.fsync()
        except OSError as error:
            log.error("%s: commit: %s", image.name, error)
        finally:
            self._committing.remove(image)
