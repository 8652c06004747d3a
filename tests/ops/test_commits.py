"""Regular commits over stores in memory: nobody flushes, and every write is committed all the same."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.image.image import Image
from fvdfs.ops.commits import COMMIT_INTERVAL, RegularCommits
from support.builder import IMAGE, LAYOUTS, load, read_files
from support.fakes import SECTOR, FaultPlan, FaultStore, MemoryStore


class SlowDisk(MemoryStore):
    """A flush takes some seconds."""

    seconds = 0.0

    async def flush(self) -> None:
        await super().flush()
        await trio.sleep(self.seconds)


class Running:
    """An image over a slow disk that may be full, and the regular commits of its mount."""

    def __init__(self, image: Image, disk: SlowDisk, plan: FaultPlan) -> None:
        self.image = image
        self.disk = disk
        self.plan = plan
        self._commits = RegularCommits()

    @classmethod
    @asynccontextmanager
    async def begin(cls, folder: Path) -> AsyncIterator[Running]:
        next(layout for layout in LAYOUTS if layout.name == "cow-512").build(folder)
        plan = FaultPlan(error=errno.ENOSPC, kinds=("pwrite",))
        disks = {name: SlowDisk(content, name) for name, content in read_files(folder).items()}
        running = cls(await load({name: FaultStore(disk, plan) for name, disk in disks.items()}), disks[IMAGE], plan)
        await running.image.begin_writing()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running._commits.run)
            yield running
            nursery.cancel_scope.cancel()

    async def write(self, sector: int) -> None:
        """To a block that is not local yet."""
        await self.image.write(sector * SECTOR, b"w" * SECTOR)
        assert self.image.committer.uncommitted
        self._commits.note_write(self.image)


async def test_a_write_during_a_long_commit_is_committed_after_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with Running.begin(tmp_path) as running:
        running.disk.seconds = 3 * COMMIT_INTERVAL  # a commit flushes twice
        await running.write(40)
        await trio.sleep(1.5 * COMMIT_INTERVAL)
        assert not running.image.committer.uncommitted, "under way"
        await running.write(42)
        await trio.sleep(20 * COMMIT_INTERVAL)
        assert not running.image.committer.dirty


async def test_a_commit_that_finds_no_room_is_tried_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log tells of it once."""
    async with Running.begin(tmp_path) as running:
        for sector in (40, 42):
            await running.write(sector)
            running.plan.nth, running.plan.for_ever = running.plan.calls + 1, True
            await trio.sleep(5.5 * COMMIT_INTERVAL)
            assert running.plan.failures > 3
            assert [record.levelno for record in caplog.records] == [logging.ERROR]
            running.plan.nth = 0
            await trio.sleep(1.5 * COMMIT_INTERVAL)
            assert not running.image.committer.dirty
            caplog.clear()
            running.plan.failures = 0


async def test_an_image_that_failed_is_left_alone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with Running.begin(tmp_path) as running:
        running.plan.error, running.plan.nth = errno.EIO, running.plan.calls + 2
        await running.write(40)
        await trio.sleep(9.5 * COMMIT_INTERVAL)
        assert running.image.committer.failed is not None
        assert running.plan.failures == 1
        assert not running._commits._written, "it is not tried for ever"
        assert sum("commit:" in record.getMessage() for record in caplog.records) == 1


async def test_an_image_that_is_closed_is_not_kept(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    commits = RegularCommits()
    async with Running.begin(tmp_path) as running:
        commits.note_write(running.image)
        commits.forget(running.image)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commits.run)
            await running.image.write(0, b"w" * SECTOR)
            await trio.sleep(COMMIT_INTERVAL - 1)
            assert running.image.committer.uncommitted
            await trio.sleep(COMMIT_INTERVAL)
            assert running.image.committer.uncommitted, "nobody knows it any more"
            nursery.cancel_scope.cancel()
