"""Opening and closing images.

An image is loaded at its first open and given up at its last close; it becomes writable when the first who wants to
write opens it, or where it is only read, but has copies to keep (`keeping.py`). `Entry.lock` is held across these
changes. An opening waits for a share that hangs, as that of any file does, and only those who use the same image wait
with it.

The kernel keeps pages of a disk that nobody has open. A disk also changes with its data file and its base: so at each
load all files are compared with how they were at the load before (`freshness.py`), and unless they are the same, the
kernel must forget its pages.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator

import trio

from fvdfs.errors import ImageBusy, ImageError, ReadOnlyImage, printable, told
from fvdfs.image.bases import Bases
from fvdfs.image.chain import Chain, image_key, open_chain, wants_copies
from fvdfs.image.core import Core, damaged_layers, stores_of
from fvdfs.image.image import Image
from fvdfs.image.loading import load_chain
from fvdfs.image.locking import let_fill, lock_for_writing
from fvdfs.image.policy import HostStore
from fvdfs.ops.background import Background, stop_prefetching
from fvdfs.ops.caches import Caches
from fvdfs.ops.complaints import LONGEST
from fvdfs.ops.folder import Folder
from fvdfs.ops.freshness import Snapshot, signature, snapshot_of
from fvdfs.ops.inodes import Entry
from fvdfs.ops.keeping import Keeping, begin_writing
from fvdfs.ops.passthrough import Passthrough, Passthroughs
from fvdfs.prefetch.prefetcher import status
from fvdfs.store.base import Store
from fvdfs.store.host import HostFile
from fvdfs.store.qemu_store import QemuStore

log = logging.getLogger(__name__)

BUSY_PATIENCE = 1.0  # seconds
BUSY_RETRY = 0.05
_STILL_TRUE = ("base_size", "local_bytes", "local_share", "disk_local_share", "failed")
"""Entries of the status of an image that are true after it was closed."""


class Openings:
    """The open images of a folder. All methods run in the event loop."""

    def __init__(self, folder: Folder, background: Background, passthroughs: Passthroughs | None = None) -> None:
        self.folder = folder
        self._inodes = folder.inodes
        self._policy = folder.policy
        self.background = background
        self.passthroughs = passthroughs or Passthroughs()
        self._keeping = Keeping(folder.policy, background)
        self._bases: Bases[Core, Store] = Bases()
        self.caches = Caches(self._bases, background)
        self.opened: Callable[[Entry, Image], None] = lambda _entry, _image: None
        """Is told of each image that was opened."""
        self.changed = trio.Event()
        """Set when an image was opened or given up; who waits for it puts another one in its place."""
        self.forget_pages: Callable[[int], Awaitable[None]] | None = None
        """Has the kernel drop its pages of an inode that nobody has open."""

    # --- opening ----------------------------------------------------------------------------------

    async def open(self, inode: int, *, write: bool, keep_copies: bool = True) -> tuple[Entry, bool]:
        """Open the image; the entry, and whether the kernel may keep what it has cached of it.

        With `keep_copies`, what is read of the base is kept where the image wants that, also without `write`.

        Another mount that has just closed the image may still be at it, so a busy one is tried again for a moment.
        Raises ImageError, OSError.
        """
        deadline = None
        with _noting_failure(self._inodes[inode]):
            while True:
                try:
                    return await self._open(inode, write=write, keep_copies=keep_copies)
                except ImageBusy:
                    deadline = deadline or trio.current_time() + BUSY_PATIENCE  # it may have waited for a closing
                    if trio.current_time() > deadline:
                        raise
                await trio.sleep(BUSY_RETRY)

    async def _open(self, inode: int, *, write: bool, keep_copies: bool) -> tuple[Entry, bool]:
        entry = self._inodes[inode]
        async with entry.lock:
            snapshot, keep = None, True
            if fresh := entry.image is None:
                entry.image, snapshot = await self._load(entry)
            try:
                if fresh:
                    keep = await self._have_pages_right(entry, snapshot)
                if write:
                    if not self._policy.writable:
                        raise OSError(errno.EROFS, "mounted read-only")
                    if isinstance(entry.passthrough, Passthrough) and (failed := entry.image.committer.failed):
                        raise OSError(errno.EIO, f"read-only since an earlier error: {failed}")
                    if (
                        entry.record.receiving and not entry.record.abandoned
                    ):  # the first write has it taken over (`moves.py`)
                        await lock_for_writing(entry.image)
                    elif not entry.image.writable:
                        await begin_writing(entry, entry.image, self._policy, self.background)
                    entry.for_writing = True
                elif keep_copies and fresh and not entry.record.receiving:
                    await self._keeping.begin(entry, entry.image)
                if entry.image.bitmap is not None and not entry.image.writable:
                    await trio.to_thread.run_sync(let_fill, entry.image)
                if fresh:
                    entry.passthrough = await self.passthroughs.begin(entry.inode, entry.image, entry.mtime)
                    self.opened(entry, entry.image)
                    self.changed.set()
                if isinstance(entry.passthrough, Passthrough):
                    keep = False  # there is nothing to keep
                    if entry.image.writable:
                        await entry.passthrough.let_write()
            except BaseException:
                if not entry.opens:
                    await self._unload(entry)
                raise
            entry.opens += 1
            return entry, keep and not entry.record.receiving

    async def _load(self, entry: Entry) -> tuple[Image, Snapshot | None]:
        status, chain = await trio.to_thread.run_sync(self._open_chain, entry.path)
        spawn = self.background.spawn
        top, record = chain.layers[0], chain.layers[0].record()
        image = await load_chain(chain, spawn, self._bases)
        try:
            await self.caches.begin(image)
            stores = [store for store in stores_of(image) if isinstance(store, HostStore)]
            snapshot = await trio.to_thread.run_sync(snapshot_of, stores)
            if snapshot is not None and snapshot.signatures[0] != signature(status):
                raise ImageBusy(os.fsdecode(entry.path), "was changed while it was being opened")
            if image.size != entry.size:
                self._inodes.hide(entry)
                raise OSError(errno.ESTALE, f"{os.fsdecode(entry.path)}: the disk has been resized elsewhere")
            changed = [status]
            if image.header.length_counts:  # perhaps nobody has seen the last writes
                parts = await trio.to_thread.run_sync(top.data.statuses)
                changed += parts or []
        except BaseException:
            await image.close()
            raise
        current = self._inodes.at(entry.path)
        if current is None or not current.busy:  # one that was opened by its old number is the one to be seen
            self._inodes.show(entry)
        for name, damage in damaged_layers(image):
            log.error("%s: %s", name, damage)
        entry.status, entry.former, entry.record = status, [], record
        data_elsewhere = image.data is not image.meta or image.meta.fixed_size
        changed_ns = max(part.st_mtime_ns for part in changed)
        entry.mtime.begin(top.meta, changed_ns, spawn if data_elsewhere else None)
        entry.data_mtime_ns = 0
        entry.busy = True
        self._inodes.busy.add(entry)
        entry.for_writing = entry.to_begin = entry.to_forget = entry.to_stand = False
        entry.unloaded = trio.Event()
        return image, snapshot

    def _open_chain(self, path: bytes) -> tuple[os.stat_result, Chain]:
        with self._policy.walker.looking(patient=True):
            status, writable = self._policy.walker.stat(path), self._policy.writable
            return status, open_chain(os.fsdecode(path), self._policy, to_write=writable, keep_copies=writable)

    async def _have_pages_right(self, entry: Entry, snapshot: Snapshot | None) -> bool:
        """Whether the kernel's cached pages of an image just loaded are valid; invalid ones are dropped first."""
        right = not entry.opened or (entry.cached is not None and entry.cached.is_still(snapshot))
        entry.opened, entry.cached = True, None
        if not right and self.forget_pages is not None:
            await self.forget_pages(entry.inode)
            right = True
        entry.cached = snapshot
        return right

    async def share(self, image: Image) -> None:
        """What this image stands on was made under it, by a snapshot: others who stand on it find it open.

        It goes on to copy from its own base, if it did as a disk. Raises ImageError, OSError.
        """
        below = image.base
        assert isinstance(below, Image)
        assert isinstance(below.meta, HostFile)
        key = image_key(below.meta, below.name)
        async with self._bases.changing([key]):
            if self._bases.find(key) is None:
                self._bases.add(key, below)
            await self._keep_copies(below)
        await self.caches.begin(image)

    async def go_on_copying(self, base: Image) -> None:
        """A base image that was changed is only read again: it goes on as `share` says. Raises OSError."""
        await self._keep_copies(base)
        for user in base.bases.above(base):
            assert isinstance(user, Image)
            await self.caches.begin(user)

    async def _keep_copies(self, base: Image) -> None:
        assert isinstance(base.meta, HostFile)
        wanted = wants_copies(base.header) and base.meta.writable and base.data.writable
        if wanted and await trio.to_thread.run_sync(base.meta.file_lock.take_copying):
            await base.begin_copies()
        else:
            await trio.to_thread.run_sync(let_fill, base)
            base.share_reads()

    # --- closing ----------------------------------------------------------------------------------

    async def close(self, entry: Entry) -> None:
        """Undo one `open`; the last one gives up the image. Raises OSError of what had to be written."""
        async with entry.lock:
            entry.opens -= 1
            if not entry.opens:
                await self._unload(entry)
        self._inodes.drop_if_unused(entry)

    async def _unload(self, entry: Entry) -> None:
        assert entry.image is not None
        entry.unloaded.set()
        await stop_prefetching(entry)
        await self.end_passthrough(entry)
        now = status(entry.image, None)
        entry.last_status = {key: now[key] for key in _STILL_TRUE}
        entry.misjudged = entry.is_misjudged
        image, entry.image = entry.image, None
        self.changed.set()
        entry.closing = image
        entry.size = image.size
        entry.usage = image.usage()
        if entry.lookups > 0:
            self._inodes.remembered.tell(entry.inode, entry.size)
        with trio.CancelScope(shield=True):
            was_writable = image.writable
            try:
                try:
                    await image.end_writing()
                finally:
                    entry.status = await entry.mtime.end(was_writable=was_writable)
            except BaseException:
                entry.cached = None  # the kernel may have what could not be written
                raise
            finally:
                await image.close()
                entry.closing = None
                entry.busy = False
                self._inodes.busy.discard(entry)
                if entry.misjudged:
                    self._inodes.hide(entry)

    async def end_passthrough(self, entry: Entry) -> None:
        """Let the kernel have the data of an image no longer, as far as nobody uses it."""
        passthrough, entry.passthrough = entry.passthrough, ""
        if isinstance(passthrough, Passthrough):
            try:
                await passthrough.end()
            except OSError as error:
                log.error("%s: %s", os.fsdecode(entry.path), error)

    def unclosed(self) -> list[tuple[Entry, Image]]:
        """The images that are open or being closed."""
        images = [(entry, entry.image or entry.closing) for entry in self._inodes.all()]
        return [(entry, image) for entry, image in images if image is not None]

    def let_go(self) -> None:
        """Have requests fail that wait for a server which is away."""
        for _, image in self.unclosed():
            for store in stores_of(image):
                if isinstance(store, QemuStore):
                    store.let_go()

    async def close_all(self) -> None:
        """Give up every image, whoever still has it open, side by side; errors go to the log."""
        async with trio.open_nursery() as nursery:
            for entry in self._inodes.open():
                nursery.start_soon(self._close_at_end, entry)

    async def _close_at_end(self, entry: Entry) -> None:
        # What was written must not wait for a base that does not answer, as the closing does.
        with contextlib.suppress(OSError):
            if entry.image is not None:
                await entry.image.fsync()
        while entry.image is not None and entry.image.in_use:  # noqa: ASYNC110  who ends a request has more to do than to tell
            await trio.sleep(BUSY_RETRY)
        async with entry.lock:
            if entry.image is not None:
                entry.opens = 0
                try:
                    await self._unload(entry)
                except OSError as error:
                    log.error(
                        "%s: closing failed, it will be replayed when next opened: %s", os.fsdecode(entry.path), error
                    )


@contextlib.contextmanager
def _noting_failure(entry: Entry) -> Iterator[None]:
    """Remember why an image could not be opened, for who asks for its status: a program is told an error number."""
    try:
        yield
    except (ImageError, OSError) as error:
        if not isinstance(error, ReadOnlyImage) and getattr(error, "errno", 0) not in (errno.EROFS, errno.ESTALE):
            at = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            reason = printable(told(error))
            entry.open_failed = {"at": at, "reason": reason[:LONGEST]}
        raise
    entry.open_failed = None
