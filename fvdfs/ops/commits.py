"""Regular commits of what nobody flushes: a crash loses no more than the last seconds."""

from __future__ import annotations

import logging

import trio

from fvdfs.image.image import Image

log = logging.getLogger(__name__)

COMMIT_INTERVAL = 5.0
"""Seconds after which a write is committed that nobody flushed, and after which a commit that failed is tried again."""


class RegularCommits:
    """Of all images of a mount that are written."""

    def __init__(self) -> None:
        self._written: set[Image] = set()
        """Those with a write that no regular commit begun since may cover."""
        self._some = trio.Event()
        self._committing: set[Image] = set()
        self._failing: set[Image] = set()
        """Those of whose failure the log tells already."""

    def note_write(self, image: Image) -> None:
        """An image was written."""
        self._written.add(image)
        self._some.set()

    def forget(self, image: Image) -> None:
        """It is closed, and takes memory for nothing."""
        self._written.discard(image)
        self._failing.discard(image)

    async def run(self) -> None:
        """Commit what was written, `COMMIT_INTERVAL` after the first write. Runs for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._some.wait()
                await trio.sleep(COMMIT_INTERVAL)
                self._some = trio.Event()
                ready = self._written - self._committing  # the others come back when their commit has ended
                self._written -= ready
                self._committing |= ready
                for image in ready:
                    nursery.start_soon(self._commit, image)  # none waits for another one's disk

    async def _commit(self, image: Image) -> None:
        try:
            if image.committer.uncommitted and image.committer.failed is None:
                await image.fsync()
            self._failing.discard(image)
        except OSError as error:
            if image not in self._failing:
                log.error("%s: commit: %s", image.name, error)
            self._failing.add(image)
            self._written.add(image)
        finally:
            self._committing.remove(image)
            if image in self._written:
                self._some.set()
