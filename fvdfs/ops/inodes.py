"""The folder of images: which files appear, under which inode, and which of them are open.

`DIR/NAME.fvd` appears as `NAME.raw` if it holds an FVD image that can be opened. Nothing watches the
folder: each lookup and listing looks at the files as they are then, in a thread, and reads a header
only where a file has changed since. Looking needs no lock; opening does (`chain.py`).

An image is loaded at its first open and given up at its last close; it becomes writable when the
first who wants to write opens it. `Entry.lock` is held across these changes. An inode number stands
for one state of a file that the kernel may keep in its cache: a file that was replaced, or whose
disk was resized behind our back, gets a new one.

No pyfuse3 here: this is what the handlers in `filesystem.py` translate to.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio

from fvdfs.alloc.chunked import Spawn
from fvdfs.chain import Judged, Policy, load_chain, lock_for_writing, look_at_chain, open_chain
from fvdfs.cow.prefetch import Prefetcher, status
from fvdfs.cow.profile import Extent
from fvdfs.cow.scheduler import Scheduler
from fvdfs.errors import ImageBusy, ImageError, NotFvd
from fvdfs.image import Image

log = logging.getLogger(__name__)

ROOT_INODE = 1
IMAGE_SUFFIX = b".fvd"
RAW_SUFFIX = b".raw"
NAME_MAX = 255  # bytes; FUSE itself hands over longer names
_COMMAND_SHOWN = 20  # characters of what somebody wrote to an attribute

BUSY_PATIENCE = 1.0  # seconds
BUSY_RETRY = 0.05

Signature = tuple[int, int, int, int, int]


def signature(status: os.stat_result) -> Signature:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_rdev, status.st_mtime_ns, status.st_size


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are of one file, changed or not."""
    return signature(one)[:3] == signature(other)[:3]


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of the raw file; sizes and usage in bytes."""

    size: int
    usage: int
    status: os.stat_result
    mtime_ns: int


class Entry:
    """An image of the folder that appears in the mount."""

    def __init__(self, inode: int, path: bytes, seen: _Seen) -> None:
        self.inode = inode
        self.path = path
        self.name = raw_name(os.path.basename(path))
        self.lock = trio.Lock()
        self.image: Image | None = None
        self.prefetcher: Prefetcher | None = None
        self.busy = False
        """Whether the image is open, or still being closed: the file changes, and is what we think it is."""
        self.opens = 0
        self.lookups = 0
        self.size = seen.size
        self.usage = seen.usage
        self.last_status: dict[str, Any] = {}
        """What of the status is still true now that the image is closed."""
        self.status = seen.status
        self.mtime_ns: int | None = None
        """The time of change that the kernel has told, while the image is open; the file gets it when it is closed."""
        self.cached_as: Signature | None = None
        """How the file was when the kernel last may have cached its content."""

    @property
    def attributes(self) -> Attributes:
        """What is known without looking at the file again."""
        mtime_ns = self.status.st_mtime_ns if self.mtime_ns is None else self.mtime_ns
        if self.image is not None:
            return Attributes(self.image.size, self.image.usage(), self.status, mtime_ns)
        return Attributes(self.size, self.usage, self.status, mtime_ns)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at a file found."""

    status: os.stat_result
    size: int
    usage: int
    known: bool = False
    """The file is as it was, or open: what is known of it stands, and size and usage here mean nothing."""


def raw_name(image_name: bytes) -> bytes:
    """The name in the mount of an image's file name."""
    return image_name[: -len(IMAGE_SUFFIX)] + RAW_SUFFIX


def image_name(name: bytes) -> bytes | None:
    """The file name of the image behind a name in the mount, or None where there is none."""
    if not name.endswith(RAW_SUFFIX) or len(name) == len(RAW_SUFFIX):
        return None
    return name[: -len(RAW_SUFFIX)] + IMAGE_SUFFIX


class Folder:
    """The images of one folder. All methods run in the event loop; what waits for a disk is async."""

    def __init__(
        self, path: str, policy: Policy, scheduler: Scheduler | None = None, *, record_profiles: bool = False
    ) -> None:
        """`record_profiles`: of every image that has none yet."""
        self.path = os.fsencode(path)
        self.policy = policy
        self.scheduler = scheduler or Scheduler()
        self._record_profiles = record_profiles
        self._entries: dict[bytes, Entry] = {}
        self._inodes: dict[int, Entry] = {}
        self._next_inode = ROOT_INODE + 1
        self._complaints: dict[bytes, str] = {}
        self.spawn: Spawn | None = None
        """Runs what open images want done in the background."""

    # --- looking --------------------------------------------------------------------------------

    async def lookup(self, name: bytes) -> Entry | None:
        """The image that appears as `name` now, or None. Raises OSError where nobody can say."""
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        file_name = image_name(name)
        if file_name is None:
            return None
        path = os.path.join(self.path, file_name)
        known = self._entries.get(path)
        seen = await trio.to_thread.run_sync(self._look, path, known, {})
        return self._update(path, seen)

    async def scan(self) -> list[Entry]:
        """All images that appear now, by name."""
        found = await trio.to_thread.run_sync(self._look_at_all, dict(self._entries))
        for path in [path for path in self._entries if path not in found]:
            self._update(path, None)
        for path in [path for path in self._complaints if path not in found]:
            del self._complaints[path]
        entries = [self._update(path, seen) for path, seen in found.items()]
        return [entry for entry in entries if entry is not None]

    def entry(self, inode: int) -> Entry:
        """The entry with this inode number. Raises OSError(ESTALE) where it is gone."""
        try:
            return self._inodes[inode]
        except KeyError:
            raise OSError(errno.ESTALE, f"inode {inode} is gone") from None

    async def getattr(self, inode: int) -> Attributes:
        """The attributes of an image, as its file is now; of a removed one, as it was."""
        entry = self.entry(inode)
        try:
            entry.status = await trio.to_thread.run_sync(os.stat, entry.path)
        except FileNotFoundError:
            if entry.image is None:
                raise
        return entry.attributes

    def set_mtime(self, inode: int, mtime_ns: int) -> bool:
        """Remember the time of change of an image that is open for writing; False where it is not.

        The kernel tells it before each flush of a file that was written. To have the host's file system keep it each
        time would cost a commit of its journal, and it changes anyway, by the writes themselves.
        """
        entry = self._inodes.get(inode)
        if entry is None or entry.image is None or not entry.image.writable:
            return False
        entry.mtime_ns = mtime_ns
        return True

    def _look_at_all(self, known: dict[bytes, Entry]) -> dict[bytes, _Seen | OSError | ImageError]:
        names = sorted(name for name in os.listdir(self.path) if name.endswith(IMAGE_SUFFIX) and name != IMAGE_SUFFIX)
        found: dict[bytes, _Seen | OSError | ImageError] = {}
        judged: Judged = {}
        for name in names:
            path = os.path.join(self.path, name)
            try:
                seen = self._look(path, known.get(path), judged)
            except OSError as error:
                seen = error
            if seen is not None:
                found[path] = seen
        return found

    def _look(self, path: bytes, known: Entry | None, judged: Judged) -> _Seen | OSError | ImageError | None:
        """What the file is now; an error where it is no usable image; None where there is none.

        Raises OSError where it is the folder that cannot be looked into: then any name would do, and is not remembered.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            try:
                os.lstat(path)
            except FileNotFoundError:
                return None
            return None if isinstance(error, FileNotFoundError) else error
        try:
            if known is not None and (
                signature(status) == signature(known.status) or (known.busy and same_file(status, known.status))
            ):
                return _Seen(status, 0, 0, known=True)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                return None
            return _Seen(status, *look_at_chain(os.fsdecode(path), self.policy, judged))
        except FileNotFoundError:
            return None
        except (OSError, ImageError) as error:
            return error

    def _update(self, path: bytes, seen: _Seen | OSError | ImageError | None) -> Entry | None:
        """Bring what is known of a path in line with what was just seen."""
        known = self._entries.get(path)
        if not isinstance(seen, _Seen):
            if seen is not None:
                self._complain(path, seen)
            if known is not None:
                del self._entries[path]
                self._drop_if_unused(known)
            return None
        if known is None and seen.known:
            return None  # vanished while we looked
        self._complaints.pop(path, None)
        if known is not None:
            if seen.known:
                known.status = seen.status
                return known
            if same_file(seen.status, known.status) and (known.busy or known.size == seen.size):
                known.status = seen.status
                if not known.busy:
                    known.usage = seen.usage
                return known
            del self._entries[path]
            self._drop_if_unused(known)
        entry = Entry(self._next_inode, path, seen)
        self._next_inode += 1
        self._entries[path] = entry
        self._inodes[entry.inode] = entry
        return entry

    def _complain(self, path: bytes, error: OSError | ImageError) -> None:
        """Say once why a file does not appear."""
        text = str(error)
        if self._complaints.get(path) == text:
            return
        self._complaints[path] = text
        level = logging.INFO if isinstance(error, NotFvd) else logging.ERROR
        log.log(level, "%s", text if isinstance(error, ImageError) else f"{os.fsdecode(path)}: {error.strerror}")

    # --- lookup counts --------------------------------------------------------------------------

    def forget(self, inode: int, count: int) -> None:
        """The kernel has dropped `count` of its references to the inode."""
        entry = self._inodes.get(inode)
        if entry is not None:
            entry.lookups -= count
            self._drop_if_unused(entry)

    def _drop_if_unused(self, entry: Entry) -> None:
        if entry.lookups <= 0 and not entry.opens and self._entries.get(entry.path) is not entry:
            self._inodes.pop(entry.inode, None)

    # --- opening and closing --------------------------------------------------------------------

    async def open(self, inode: int, *, write: bool) -> tuple[Entry, bool]:
        """Open the image; the entry, and whether the kernel may keep what it has cached of it.

        Another mount that has just closed the image may still be at it, so a busy one is tried
        again for a moment. Raises ImageError, OSError.
        """
        deadline = trio.current_time() + BUSY_PATIENCE
        while True:
            try:
                return await self._open(inode, write=write)
            except ImageBusy:
                if trio.current_time() > deadline:
                    raise
            await trio.sleep(BUSY_RETRY)

    async def _open(self, inode: int, *, write: bool) -> tuple[Entry, bool]:
        entry = self.entry(inode)
        async with entry.lock:
            fresh = entry.image is None
            if entry.image is None:
                entry.image = await self._load(entry)
            try:
                if write and not entry.image.writable:
                    if self.policy.writable:
                        lock_for_writing(entry.image)
                        await entry.image.begin_writing(accept_unclean=self.policy.accept_unclean)
                        await self._begin_background(entry, entry.image)
                    else:
                        raise OSError(errno.EROFS, "mounted read-only")
            except BaseException:
                if not entry.opens:
                    await self._unload(entry)
                raise
            entry.opens += 1
            keep = not fresh or entry.cached_as == signature(entry.status)
            return entry, keep

    async def _begin_background(self, entry: Entry, image: Image) -> None:
        """What an image that has become writable wants done beside the requests."""
        header = image.header
        if image.bitmap is None:
            return
        if image.fetcher is not None:
            image.fetcher.observer = self.scheduler.link(image.base_server)
        if header.generate_prefetch_profile or (self._record_profiles and not header.prefetch_profile_entries):
            image.record_profile()
        profile: list[Extent] = []
        if header.profile_directed_prefetch_start_delay >= 0:
            profile = await image.read_profile()
        whole = header.prefetch_start_delay > 0
        if profile or whole:
            self._prefetch(entry, image, profile, whole=whole, delay=header.prefetch_start_delay)

    def _prefetch(
        self, entry: Entry, image: Image, profile: Sequence[Extent] = (), *, whole: bool = True, delay: float = 0
    ) -> Prefetcher | None:
        if self.spawn is None:
            return None
        prefetcher = entry.prefetcher = Prefetcher(image, self.scheduler, whole=whole)
        profile_delay = max(0, image.header.profile_directed_prefetch_start_delay)
        self.spawn(functools.partial(prefetcher.run, profile=profile, profile_delay=profile_delay, delay=delay))
        return prefetcher

    async def control_prefetch(self, inode: int, command: str) -> None:
        """`start`, `pause` or `stop` prefetching an image. One that is not open is opened, until it is done.

        Raises OSError: EINVAL for another command, or one that makes no sense now; ImageError.
        """
        entry = self.entry(inode)
        if command not in ("start", "pause", "stop"):
            raise OSError(errno.EINVAL, f"prefetch: start, pause or stop, not {command[:_COMMAND_SHOWN]!r}")
        if command == "start":
            await self._start_prefetch(entry)
            return
        async with entry.lock:
            prefetcher = entry.prefetcher
            if prefetcher is None or prefetcher.ended.is_set():
                raise OSError(errno.EINVAL, f"{os.fsdecode(entry.name)}: nothing is being prefetched")
            if command == "pause":
                prefetcher.pause()
            elif command == "stop":
                await prefetcher.stop()

    async def _start_prefetch(self, entry: Entry) -> None:
        await self.open(entry.inode, write=True)
        keep_open = False
        try:
            async with entry.lock:
                assert entry.image is not None
                prefetcher = entry.prefetcher
                if prefetcher is None or prefetcher.ended.is_set():
                    prefetcher = self._prefetch(entry, entry.image)
                else:
                    prefetcher.go_on()
                if prefetcher is not None and not prefetcher.held and self.spawn is not None:
                    prefetcher.held = keep_open = True
                    self.spawn(functools.partial(self._close_when_ended, entry, prefetcher))
        finally:
            if not keep_open:
                await self.close(entry)

    async def _close_when_ended(self, entry: Entry, prefetcher: Prefetcher) -> None:
        await prefetcher.ended.wait()
        try:
            await self.close(entry)
        except OSError as error:
            log.error("%s: closing failed: %s", os.fsdecode(entry.path), error)

    def status(self, inode: int) -> dict[str, Any]:
        """What a user wants to know of an image, ready for JSON."""
        entry = self.entry(inode)
        found: dict[str, Any] = {
            "name": os.fsdecode(entry.name),
            "image": os.fsdecode(entry.path),
            "open": entry.busy,
        }
        if entry.image is None:
            state = "closing" if entry.busy else "closed"
            return found | entry.last_status | {"virtual_size": entry.size, "state": state}
        return found | status(entry.image, entry.prefetcher)

    async def _load(self, entry: Entry) -> Image:
        status = await trio.to_thread.run_sync(os.stat, entry.path)
        chain = await trio.to_thread.run_sync(open_chain, os.fsdecode(entry.path), self.policy)
        image = await load_chain(chain)
        entry.status = status
        if image.size != entry.size:
            await image.close()
            raise OSError(errno.ESTALE, f"{os.fsdecode(entry.path)}: the disk has been resized elsewhere")
        image.run_in_background(self.spawn)
        entry.busy = True
        return image

    async def close(self, entry: Entry) -> None:
        """Undo one `open`; the last one gives up the image. Raises OSError of what had to be written."""
        async with entry.lock:
            entry.opens -= 1
            if not entry.opens:
                await self._unload(entry)
        self._drop_if_unused(entry)

    async def _unload(self, entry: Entry) -> None:
        assert entry.image is not None
        if entry.prefetcher is not None:
            await entry.prefetcher.stop()
            entry.prefetcher = None
        now = status(entry.image, None)
        entry.last_status = {key: now[key] for key in ("base_size", "local_bytes", "local_share", "failed")}
        image, entry.image = entry.image, None
        entry.size = image.size
        entry.usage = image.usage()
        try:
            with trio.CancelScope(shield=True):
                await image.close()
        finally:
            mtime_ns, entry.mtime_ns = entry.mtime_ns, None
            try:
                entry.status = os.stat(entry.path)
                if mtime_ns is not None:
                    os.utime(entry.path, ns=(entry.status.st_atime_ns, mtime_ns))
                    entry.status = os.stat(entry.path)
                entry.cached_as = signature(entry.status)
            except OSError:
                entry.cached_as = None
            entry.busy = False

    def open_entries(self) -> list[Entry]:
        """The entries whose image is open."""
        return [entry for entry in self._inodes.values() if entry.image is not None]

    async def close_all(self) -> None:
        """Give up every image, whoever still has it open; errors go to the log."""
        for entry in self.open_entries():
            async with entry.lock:
                if entry.image is None:
                    continue
                entry.opens = 0
                try:
                    await self._unload(entry)
                except OSError as error:
                    log.error("%s: closing failed, it will be replayed when next opened: %s", entry.path, error)
