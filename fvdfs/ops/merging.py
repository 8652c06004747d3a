"""Layers of disks that are open are merged: `fvdfs delete` and `commit` while machines go on.

The names in the folder change as `layers/delete.py` and `layers/commit.py` say, in their order; the image in memory as
`image/exchange.py` does it. A layer that others stand on is not written by anybody. Of the top, what is written while
it is copied is noted (`cow/dirty.py`), and copied again, until so little is left that writers may wait for it.

One merge runs at a time. It is steered, and seen, by an attribute of the mount point. One that is stopped leaves on
disk what an interrupted one of an image that is not open leaves, and in memory the same chain. Calling it again ends
it.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from fvdfs.cow.dirty import Dirty
from fvdfs.errors import FvdError, ImageBusy, ImageError, UsageError, reason_of
from fvdfs.format.header import ceil_div
from fvdfs.image.chain import image_key
from fvdfs.image.core import Core
from fvdfs.image.exchange import Other, Step, close_former
from fvdfs.image.image import Image
from fvdfs.image.loading import lock_to_change, make_writable, reopen
from fvdfs.image.locking import unlock_for_writing
from fvdfs.image.tree import SUFFIX, Node, Tree, identity_at
from fvdfs.layers import commit, delete
from fvdfs.layers.merging import catch_up, copy_some, data_file_of, hold_back, refuse_links, remove_data_file
from fvdfs.layers.merging import merge as merge_all
from fvdfs.layers.newtop import new_top, refuse_losses, replace, write_top
from fvdfs.ops.background import stop_prefetching
from fvdfs.ops.caches import is_file
from fvdfs.ops.inodes import Entry
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.snapshots import Turn, begin_copies, load_top, other_file
from fvdfs.store.base import Store
from fvdfs.store.host import HostFile, Identity
from fvdfs.store.placing import sync_folder

log = logging.getLogger(__name__)

DELETE, COMMIT, STOP = "delete", "commit", "stop"
KEPT = 20  # merges whose outcome is told
_SHOWN = 40  # characters of what somebody wrote to the attribute


class _Closed(Exception):
    """No disk that is open here has this image."""


@dataclass(frozen=True, slots=True)
class _Next:
    """What an image goes on in."""

    parts: Image
    base: Core | Store | None
    """What these stand on."""
    place: str
    """Where their file lies now."""
    finish: Step
    """What is left to do while nobody writes."""


class Merge:
    """One that runs, waits for its turn, or has ended."""

    def __init__(self, what: str, path: str) -> None:
        self.what = what
        self.path = path
        """Of the image that was named."""
        self.state = "waiting"
        """Then `running`, then `done`, `stopped`, `failed`, or `closed`: no disk that is open here has the image."""
        self.done = self.total = 0
        """Bytes of the disk."""
        self.error = ""
        self.is_mistake = False
        """Whether the error is the user's."""
        self.waited = 0.0
        """Seconds for which writers were kept out at the end."""
        self.scope = trio.CancelScope()

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def status(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = ("what", "state", "done", "total", "error", "is_mistake", "waited")
        return {"image": self.path} | {name: getattr(self, name) for name in names}


class Merges:
    """Those of a mount."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings
        self._policy = openings.folder.policy
        self._merges: dict[str, Merge] = {}
        """The last of each image, by its name."""
        self._turn = trio.Lock()

    def control(self, words: str) -> None:
        """`delete NAME.fvd`, `commit NAME.fvd`; `stop NAME.fvd`. Raises OSError: EINVAL, EROFS, EBUSY."""
        what, _, name = words.partition(" ")
        if what not in (DELETE, COMMIT, STOP) or not name.endswith(SUFFIX) or "/" in name:
            raise OSError(errno.EINVAL, f"{words[:_SHOWN]!r}: delete, commit or stop, and the name of an image")
        running = self._merges.get(name)
        if what == STOP:
            if running is not None:
                running.scope.cancel()
            return
        spawn = self._openings.background.spawn
        if not self._policy.writable or spawn is None:
            raise OSError(errno.EROFS, "mounted read-only")
        if running is not None and not running.ended:
            if running.what != what:
                raise OSError(errno.EBUSY, f"{name}: {running.what} is under way")
            return
        path = os.path.join(os.fsdecode(self._openings.folder.path), name)
        self._merges.pop(name, None)
        self._merges[name] = Merge(what, path)
        for old in [key for key, merge in self._merges.items() if merge.ended][:-KEPT]:
            del self._merges[old]
        spawn(functools.partial(self._run, self._merges[name]))

    @property
    def is_busy(self) -> bool:
        """Whether layers are being merged."""
        return any(not merge.ended for merge in self._merges.values())

    def status(self) -> list[dict[str, Any]]:
        """Ready for JSON."""
        return [merge.status() for merge in self._merges.values()]

    async def _run(self, merge: Merge) -> None:
        try:
            with merge.scope:
                async with self._turn:
                    await self.do(merge)
            merge.state = "stopped" if merge.scope.cancelled_caught else "done"
        except _Closed:
            merge.state = "closed"
        except (FvdError, OSError) as error:
            merge.error = reason_of(error)
            merge.is_mistake = isinstance(error, UsageError)
            merge.state = "failed"
            log.error("%s: %s: %s", merge.path, merge.what, merge.error)
        finally:
            if not merge.ended:
                merge.state = "stopped"

    async def do(self, merge: Merge) -> None:
        """Do it now. Raises UsageError, ImageError, OSError."""
        merge.state = "running"
        await (self._delete if merge.what == DELETE else self._commit)(merge)

    # --- what is done -----------------------------------------------------------------------------

    async def _delete(self, merge: Merge) -> None:
        path, going = merge.path, merge.path + delete.ENDING
        tree = await trio.to_thread.run_sync(Tree, os.path.dirname(path))
        user = await trio.to_thread.run_sync(delete.begin, tree, path, going, self._policy)
        if user is None:
            return
        async with self._prepared(user.identity) as (entry, upper, lower):
            assert isinstance(upper.meta, HostFile)
            assert isinstance(lower.meta, HostFile)
            look = functools.partial(_data_file_of_user, path, going, user, lower.meta.identity)
            data_file = await trio.to_thread.run_sync(look)
            mtime_ns = await _mtime_ns(entry, upper)
            await delete.remove_name(upper, path, going)
            lower.name = lower.meta.name = going
            if entry.image is not upper:
                await upper.meta.keep_mtime(mtime_ns)
            finish = await self._copy(merge, upper, lower)
            mtime_ns = await _mtime_ns(entry, upper)
            await trio.to_thread.run_sync(delete.take_over, lower.meta, upper.meta, mtime_ns)
            await self._go_on_in(merge, entry, upper, _Next(lower, lower.base, going, finish))
            await trio.to_thread.run_sync(remove_data_file, data_file)

    async def _commit(self, merge: Merge) -> None:
        _, seen, _ = await trio.to_thread.run_sync(commit.begin, merge.path)
        async with self._prepared(seen.identity) as (entry, upper, lower):
            tree, node, _ = await trio.to_thread.run_sync(commit.begin, merge.path)  # as it is under the locks
            if node.identity != seen.identity:
                raise ImageBusy(merge.path, "was replaced by somebody else meanwhile")
            assert isinstance(upper.meta, HostFile)
            refuse_losses(merge.path, upper.header)
            data_file = await trio.to_thread.run_sync(data_file_of, tree, node)
            mtime_ns = await _mtime_ns(entry, upper)
            copy_rest = await self._copy(merge, upper, lower)
            new = new_top(upper.header, upper.header.base_img)
            file, place = await trio.to_thread.run_sync(write_top, upper.name, new, upper.meta, mtime_ns)
            try:
                top = await load_top(self._openings, upper.name, file)

                async def finish() -> None:
                    await copy_rest()
                    await top.fit(upper.size)

                await self._go_on_in(merge, entry, upper, _Next(top, lower, place, finish))
            except BaseException:
                if upper.meta is not file:
                    await file.aclose()
                    await trio.to_thread.run_sync(os.unlink, place)
                raise
            await trio.to_thread.run_sync(remove_data_file, data_file)

    async def _copy(self, merge: Merge, upper: Image, lower: Image) -> Step:
        """Have the lower image show what the upper one does; what is left to do for that while nobody writes."""
        await merge_all(upper, lower, merge.progress)
        dirty = upper.dirty
        if dirty is None:
            await lower.end_writing()
            return trio.lowlevel.checkpoint
        await catch_up(upper, lower, dirty)
        await lower.fsync()  # in the end there will be less to flush

        async def finish() -> None:
            while await copy_some(upper, lower, dirty):
                pass
            if lower.size != upper.size:
                await lower.resize(upper.size, shrink=True)
            await lower.fsync()

        return finish

    async def _go_on_in(self, merge: Merge, entry: Entry, upper: Image, next_: _Next) -> None:
        assert isinstance(upper.meta, HostFile)
        assert isinstance(next_.parts.meta, HostFile)
        file, new, is_top = upper.meta, next_.parts.meta, entry.image is upper
        turn = Turn()

        async def rename() -> None:
            path = os.fsdecode(entry.path) if is_top else upper.name  # perhaps it was renamed meanwhile
            await trio.to_thread.run_sync(replace, next_.place, path, file.identity)
            new.name, turn.is_taken = path, True

        sync = functools.partial(trio.to_thread.run_sync, sync_folder, os.path.dirname(upper.name))
        other = Other(next_.parts, next_.base, next_.finish, rename, sync)
        if upper.dirty is not None:  # flushes have taken their time since
            assert isinstance(upper.base, Image)
            await hold_back(upper, upper.base, upper.dirty)
        async with entry.lock:
            with trio.CancelScope(shield=True):
                if is_top:
                    async with other_file(self._openings, entry, upper, next_.parts, turn):
                        merge.waited, former = await upper.exchange(other)
                else:
                    merge.waited, former = await upper.exchange(other)
                    upper.bases.rename(upper, image_key(new, upper.name))
        log.info("%s: %s; writers waited %.1f ms", merge.path, merge.what, merge.waited * 1000)
        with trio.CancelScope(shield=True):
            await upper.wait_for_reads()
            await close_former(former)

    # --- the chain in memory ----------------------------------------------------------------------

    @asynccontextmanager
    async def _prepared(self, file: Identity) -> AsyncIterator[tuple[Entry, Image, Image]]:
        """A disk that is open; the image of this file in its chain, and what that stands on, which may be written.

        Both are locked against everybody else. Raises _Closed, UsageError, ImageError, OSError.
        """
        found = self._find(file)
        if found is None:
            raise _Closed
        entry, upper = found
        await self._openings.open(entry.inode, write=entry.image is upper, keep_copies=False)
        try:
            if self._find(file) != (entry, upper) or not isinstance(upper.base, Image):
                raise ImageBusy(upper.name, "was changed by somebody else meanwhile; try again")
            header = upper.base.header
            if header.compact and ceil_div(upper.size, header.chunk_size) > header.table_capacity:
                raise UsageError(
                    f"{upper.base.name}: needs a larger chunk table, which moves; close the disk, and call it again"
                )
            async with self._upper(entry, upper), self._lower(upper.base) as lower:
                yield entry, upper, lower
        finally:
            with trio.CancelScope(shield=True):
                await self._openings.close(entry)

    def _find(self, file: Identity) -> tuple[Entry, Image] | None:
        for entry in self._openings.folder.inodes.open():
            layer = entry.image
            while isinstance(layer, Image):
                if is_file(layer, file):
                    return entry, layer
                layer = layer.base if isinstance(layer.base, Image) else None
        return None

    @asynccontextmanager
    async def _upper(self, entry: Entry, upper: Image) -> AsyncIterator[None]:
        if isinstance(entry.passthrough, Passthrough):
            raise UsageError(f"{upper.name}: the kernel reads and writes its data by itself; close the disk first")
        if upper.damage:
            raise ImageError(upper.name, upper.damage)
        if entry.image is upper:
            async with entry.lock:  # no snapshot is being made
                entry.merging = True
                await stop_prefetching(entry)
            upper.dirty = Dirty(upper.size)
            try:
                yield
            finally:
                upper.dirty, entry.merging = None, False
                if entry.prefetcher is None:
                    with trio.CancelScope(shield=True):
                        await begin_copies(self._openings, entry, upper)
            return
        try:
            await self._end_copies(upper)
            await reopen(upper, self._policy)
            await lock_to_change(upper, self._policy)
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._be_base(upper)

    @asynccontextmanager
    async def _lower(self, lower: Image) -> AsyncIterator[Image]:
        if lower.damage:
            raise ImageError(lower.name, lower.damage)
        self._openings.caches.left_alone.add(lower)
        try:
            await self._end_copies(lower)
            await reopen(lower, self._policy)
            await make_writable(lower, self._policy)
            await _close_fetcher(lower)
            yield lower
        finally:
            self._openings.caches.left_alone.discard(lower)
            if lower.bases.above(lower):  # else its parts are those of the upper one
                with trio.CancelScope(shield=True):
                    await self._be_base(lower)

    async def _end_copies(self, image: Image) -> None:
        """A base image is only read from now on."""
        with trio.CancelScope(shield=True):
            if image.bases.before_closing is not None:
                await image.bases.before_closing(image)
            await _close_fetcher(image)
            await image.end_writing()

    async def _be_base(self, image: Image) -> None:
        """It is one as any other again. Failures go to the log, since nobody waits for that."""
        try:
            await self._end_copies(image)
            await unlock_for_writing(image)
            await self._openings.go_on_copying(image)
        except (FvdError, OSError) as error:
            log.error("%s: %s", image.name, error)


def _data_file_of_user(path: str, going: str, user: Node, file: Identity) -> str:
    """The data file that goes with the image that stands on a snapshot, both being locked. Blocks.

    Raises UsageError, ImageBusy where somebody has changed what was seen before.
    """
    refuse_links(path, user.path)
    name = path if os.path.lexists(path) else going
    if identity_at(name) != file:
        raise ImageBusy(path, "was replaced by somebody else meanwhile")
    return data_file_of(delete.look_again(path, name, user), user)


async def _close_fetcher(image: Image) -> None:
    fetcher, image.fetcher = image.fetcher, None
    if fetcher is not None:
        await fetcher.close()


async def _mtime_ns(entry: Entry, image: Image) -> int:
    """When the disk of an image was written last."""
    if entry.image is image:
        return entry.mtime.ns
    assert isinstance(image.meta, HostFile)
    return (await trio.to_thread.run_sync(image.meta.status)).st_mtime_ns
