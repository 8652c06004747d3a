"""The folder of images: which files appear, under which inode, and which of them are open.

`DIR/NAME.fvd` appears as `NAME.raw` if it holds an FVD image that can be opened. Nothing watches the
folder: each lookup and listing looks at the files as they are then, in a thread, and reads a header
only where a file has changed since. Looking needs no lock; opening does (`chain.py`). A look that takes
too long is answered by what was known before (`looks.py`); an opening waits, as that of any file on a
share that hangs, and only those who use the same image wait with it.

An image is loaded at its first open and given up at its last close; it becomes writable when the
first who wants to write opens it. So does one that is only read, but wants to keep what is read of its
base, or to fetch it ahead: as long as nobody else has it open, and only until somebody asks for it
(`filelock.py`); then it is read like any other, and tries again later. `Entry.lock` is held across
these changes.

An inode number stands for what the kernel believes of a disk. With its write-back cache it asks nobody
for size and times of an inode that it knows, so an image that was replaced, or that somebody else has
changed, gets another number at the next look, unless the kernel has forgotten the last one; so does one
that was closed after a write that ended within a sector past its end, or that the kernel had accepted
there and that could not be done. A file handle (of an NFS server, say) is a number, too, and has to lead to
the same disk when the kernel has forgotten it, and after another mount: so numbers are made of what stays
the same as long as a file is the same (`inode_number`), and the first is taken that the kernel does not
use for another state.

Pages are another matter, since a disk also changes with its data file and its base: at each load all
files are compared with how they were at the load before (`freshness.py`), and the kernel has to forget
its pages unless they are the same.

The time of change of a disk is that of its image file, but not everything that changes the one changes the other:
data may be in another file, and copies from the base, the journal and the header are nothing that a reader sees.
So it is kept here while the image is open (`Entry.mtime_ns`), and the file gets it at the end. Where the host's file
system does not set a later one at each write itself, the file gets it soon after a write, and before a flush is
answered, so that a backup after a crash does not take the disk for unchanged.

No pyfuse3 here: this is what the handlers in `filesystem.py` translate to.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import trio

from fvdfs.alloc.chunked import Spawn
from fvdfs.errors import FvdError, ImageBusy, ImageError, NotFvd, shortage
from fvdfs.format.profile import Extent
from fvdfs.image.chain import (
    Chain,
    Judged,
    is_asked_for,
    load_chain,
    lock_for_writing,
    look_at_chain,
    open_chain,
    unlock_for_writing,
)
from fvdfs.image.image import Image
from fvdfs.image.policy import Policy
from fvdfs.ops.freshness import Snapshot, same_file, signature, snapshot_of
from fvdfs.ops.looks import THREADS, Look, Looks
from fvdfs.prefetch.prefetcher import Prefetcher, status
from fvdfs.prefetch.scheduler import Scheduler
from fvdfs.store.host import HostFile
from fvdfs.store.paths import PATIENCE, LeadsBack, NoAnswer

log = logging.getLogger(__name__)

ROOT_INODE = 1
IMAGE_SUFFIX = b".fvd"
RAW_SUFFIX = b".raw"
NAME_MAX = 255  # bytes; FUSE itself hands over longer names
_INODE_BYTES = 6
_ATTEMPTS = 8  # numbers of an image that a file handle may have
_COMMAND_SHOWN = 20  # characters of what somebody wrote to an attribute

BUSY_PATIENCE = 1.0  # seconds
BUSY_RETRY = 0.05
CHANGERS = 2
TIMES_INTERVAL = 0.05  # seconds between two times of change that a file is told, if no flush comes
ASKED_INTERVAL = 0.1  # seconds between looks whether somebody else wants to open an image that keeps copies
KEEP_RETRY = 5.0  # seconds before a busy image is tried again
DISK_PATIENCE = 30.0
"""Seconds for the first look at an image while its thread is at a disk of this host: it may have to spin up."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of the raw file; sizes and usage in bytes."""

    size: int
    usage: int
    status: os.stat_result
    mtime_ns: int
    ctime_ns: int


class Entry:
    """An image of the folder that appears in the mount."""

    def __init__(self, inode: int, path: bytes, seen: _Seen) -> None:
        self.inode = inode
        self.born = seen.born
        self.path = path
        self.name = raw_name(os.path.basename(path))
        self.lock = trio.Lock()
        self.limiter = trio.CapacityLimiter(CHANGERS)
        """Of the threads that change its attributes."""
        self.image: Image | None = None
        self.closing: Image | None = None
        """The image while it is being closed."""
        self.prefetcher: Prefetcher | None = None
        self.busy = False
        """Whether the image is open, or still being closed: the file changes, and is what we think it is."""
        self.opens = 0
        self.for_writing = False
        """Whether somebody has opened it for writing, and not only to read it."""
        self.unloaded = trio.Event()
        self.lookups = 0
        self.size = seen.size
        self.usage = seen.usage
        self.last_status: dict[str, Any] = {}
        """What of the status is still true now that the image is closed."""
        self.status = seen.status
        self.misjudged = False
        """Whether the kernel may believe in a size or a time of it that is wrong, and cannot be told."""
        self.file: HostFile | None = None
        """The image file, while the image is open."""
        self.mtime_ns = 0
        """The time of change of the disk, while the image is open."""
        self.written_ns = 0
        """When the disk was written last."""
        self.told = False
        """Whether somebody has set the time of change since the image was opened: the kernel, or a user."""
        self.untold = False
        """Whether the disk was written since then."""
        self.apart = False
        """Whether what is written to the disk goes to another place than the image file."""
        self.lags = False
        """Whether the file's time of change tells nothing of the last write."""
        self.storing = trio.Lock()
        """Held while the file's time of change is set."""
        self.stored_soon = False
        """Whether a task is about to do that."""
        self.opened = False
        """Whether it ever was open, so that the kernel may have pages of it."""
        self.cached: Snapshot | None = None
        """How the files were when the image was loaded last; None: nobody can tell."""

    @property
    def attributes(self) -> Attributes:
        """What is known without looking at the file again."""
        mtime_ns = self.changed_ns if self.busy else self.status.st_mtime_ns
        ctime_ns = max(self.status.st_ctime_ns, self.written_ns)
        image = self.image
        size, usage = (self.size, self.usage) if image is None else (image.end, image.usage())
        return Attributes(size, usage, self.status, mtime_ns, ctime_ns)

    @property
    def is_misjudged(self) -> bool:
        """`misjudged`, or so once it is closed."""
        return self.misjudged or (self.image is not None and self.image.end != self.image.size)

    @property
    def changed_ns(self) -> int:
        """When the disk was changed last, while the image is open."""
        return self.written_ns if self.untold and not self.told else self.mtime_ns


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at a file found."""

    status: os.stat_result
    size: int
    usage: int
    born: int = 0
    """When the file was made, in ns; 0 where nobody can say."""
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


def inode_number(name: bytes, status: os.stat_result, born: int, attempt: int) -> int:
    """One of the numbers of an image, from its name in the mount and what stays the same as long as it is that file."""
    digest = hashlib.blake2b(b"%d %d %d %s" % (attempt, status.st_ino, born, name), digest_size=_INODE_BYTES)
    return ROOT_INODE + 1 + int.from_bytes(digest.digest(), "little")


def _late(path: bytes) -> OSError:
    return OSError(
        errno.EIO, f"{os.fsdecode(path)}: no answer within {PATIENCE:g} s; only what was known before is shown"
    )


def _reason(error: OSError | FvdError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


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
        self._complaints: dict[bytes, str] = {}
        self._looks = Looks()
        self._last_answers: dict[str, Any] = {}
        self.spawn: Spawn | None = None
        """Runs what open images want done in the background."""
        self.forget_pages: Callable[[int], Awaitable[None]] | None = None
        """Has the kernel drop its pages of an inode that nobody has open."""
        self.kernel_keeps_times = False
        """Whether the kernel tells the time of change that a write makes."""

    # --- looking --------------------------------------------------------------------------------

    async def lookup(self, name: bytes) -> Entry | None:
        """The image that appears as `name` now, or None. Raises OSError where nobody can say."""
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        file_name = image_name(name)
        if file_name is None:
            return None
        path = os.path.join(self.path, file_name)
        await self._until_judged(path)
        look = self._begin_look(path, {})
        await self._looks.wait([look])
        if path not in self._entries and not look.ended.is_set() and not self.policy.walker.is_at_share(look.thread):
            await self._looks.wait([look], DISK_PATIENCE)
        if look.ended.is_set():
            return look.result
        return self._as_known(path)

    async def scan(self) -> list[Entry]:
        """All images that appear now, by name. Raises OSError."""
        before = set(self._entries)
        listing: Look[list[bytes]] = self._looks.begin(self.path, self._image_paths)
        await self._looks.wait([listing])
        if not listing.ended.is_set():
            if not before:
                raise _late(self.path)
            self._complain(self.path, _late(self.path))
            return [self._entries[path] for path in sorted(self._entries)]
        paths = listing.result
        self._complaints.pop(self.path, None)
        there = set(paths)
        for path in before - there:
            self._update(path, None)
        for path in [path for path in self._complaints if path not in there]:
            del self._complaints[path]
        judged: Judged = {}
        for path in paths:
            await self._until_judged(path)
        looks = [self._begin_look(path, judged, threads=1) for path in paths]
        await self._looks.wait(looks)
        found = [self._found(path, look) for path, look in zip(paths, looks, strict=True)]
        return [entry for entry in found if entry is not None]

    async def _until_judged(self, path: bytes) -> None:
        """Where an image is being closed that will get another inode number by that, wait for it, but not for ever."""
        known = self._entries.get(path)
        if known is not None and known.lock.locked() and known.is_misjudged:
            with trio.move_on_after(PATIENCE):
                async with known.lock:
                    pass

    def _begin_look(self, path: bytes, judged: Judged, *, threads: int = THREADS) -> Look[Entry | None]:
        look = functools.partial(self._look, path, judged)
        return self._looks.begin(path, look, functools.partial(self._update, path), threads=threads)

    def _found(self, path: bytes, look: Look[Entry | None]) -> Entry | None:
        """For a listing: what a look has found, or what is known while it goes on."""
        try:
            return look.result if look.ended.is_set() else self._as_known(path)
        except OSError as error:
            self._complain(path, error)
            return None

    def _as_known(self, path: bytes, reason: OSError | None = None) -> Entry:
        """The image as it was, where nobody can say what it is now. Raises the reason where nothing is known."""
        known = self._entries.get(path)
        if known is None:
            raise reason or _late(path)
        self._complain(path, reason or _late(path))
        return known

    def entry(self, inode: int) -> Entry:
        """The entry with this inode number. Raises OSError(ESTALE) where it is gone."""
        try:
            return self._inodes[inode]
        except KeyError:
            raise OSError(errno.ESTALE, f"inode {inode} is gone") from None

    def path_of(self, inode: int) -> bytes:
        """The path of the folder, or of an image. Raises OSError(ESTALE) where it is gone."""
        return self.path if inode == ROOT_INODE else self.entry(inode).path

    async def acl(self, inode: int, name: str) -> bytes:
        """The host's ACL of that name, of the folder or an image.

        Raises OSError: ENODATA where there is none, EIO where no answer comes: then nobody may do what it may forbid.
        """
        path = self.path_of(inode)
        try:
            return await self._ask((inode, name), path, functools.partial(self.policy.walker.attribute, path, name))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # which the kernel would not take for "there is none"
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None
            raise

    async def attributes_of_host(self, inode: int) -> list[str]:
        """The names of the extended attributes of the folder or an image, as the host has them; empty if not known."""
        path = self.path_of(inode)
        try:
            return await self._ask((inode, ""), path, functools.partial(self.policy.walker.attributes, path))
        except OSError:
            return []

    async def _ask(self, key: tuple[int, str], path: bytes, call: Callable[[], T]) -> T:
        def ask() -> T:
            with self.policy.walker.looking():
                return call()

        look: Look[T] = self._looks.begin(key, ask)
        await self._looks.wait([look])
        with contextlib.suppress(NoAnswer):
            if look.ended.is_set():
                return look.result
        raise _late(path)

    async def getattr(self, inode: int, *, changed_by_us: bool = False) -> Attributes:
        """The attributes of an image, as its file is now; of a removed one, as it was."""
        entry = self.entry(inode)
        look: Look[os.stat_result] = self._looks.begin(inode, functools.partial(self._stat, entry.path))
        await self._looks.wait([look])
        try:
            if not look.ended.is_set():
                return entry.attributes  # as it was
            status = look.result
        except FileNotFoundError:
            if entry.image is None:
                raise
            return entry.attributes
        except NoAnswer:
            return entry.attributes
        # What somebody else has changed stays news for the next look, which gives it a new number.
        if changed_by_us or entry.busy or signature(status) == signature(entry.status):
            entry.status = status
        return entry.attributes

    async def status_of_folder(self) -> os.stat_result:
        """What the folder itself is, or was when it last answered. Raises OSError."""
        return await self._of_folder("status", functools.partial(self._stat, self.path))

    async def space(self) -> os.statvfs_result:
        """What its file system says of itself, or has last said. Raises OSError."""
        return await self._of_folder("space", self._space)

    async def _of_folder(self, key: str, call: Callable[[], T]) -> T:
        look: Look[T] = self._looks.begin(key, call)
        await self._looks.wait([look])
        with contextlib.suppress(NoAnswer):
            if look.ended.is_set():
                self._last_answers[key] = look.result
        if key not in self._last_answers:
            raise _late(self.path)
        return cast(T, self._last_answers[key])

    def _stat(self, path: bytes) -> os.stat_result:
        with self.policy.walker.looking():
            return self.policy.walker.stat(path)

    def _space(self) -> os.statvfs_result:
        with self.policy.walker.looking():
            return self.policy.walker.statvfs(self.path)

    def set_mtime(self, inode: int, mtime_ns: int) -> bool:
        """Remember the time of change of an image that is open for writing; False where it is not.

        The kernel tells it before each flush of a file that was written. To have the host's file system keep it each
        time would cost a commit of its journal, and it changes anyway, by the writes themselves.
        """
        entry = self._inodes.get(inode)
        if entry is None or entry.image is None or not entry.image.writable:
            return False
        self.told_mtime(entry, mtime_ns)
        return True

    def told_mtime(self, entry: Entry, mtime_ns: int) -> None:
        """Somebody has set the time of change of a disk."""
        entry.mtime_ns = mtime_ns
        entry.told, entry.untold = True, False
        self._store_mtime_soon(entry)

    def written(self, entry: Entry) -> None:
        """A disk that is open was changed."""
        entry.written_ns = time.time_ns()
        entry.untold = True
        if not self.kernel_keeps_times:
            entry.mtime_ns = entry.written_ns
        if not entry.lags:
            self._store_mtime_soon(entry)

    def _store_mtime_soon(self, entry: Entry) -> None:
        if not entry.apart or entry.image is None or self.spawn is None:
            return
        entry.lags = True
        if not entry.stored_soon:
            entry.stored_soon = True
            self.spawn(functools.partial(self._store_mtimes, entry))

    async def _store_mtimes(self, entry: Entry) -> None:
        try:
            while entry.lags:
                await self.store_mtime(entry)
                await trio.sleep(TIMES_INTERVAL)
        finally:
            entry.stored_soon = False

    async def store_mtime(self, entry: Entry) -> None:
        """Have the image file tell when the disk was changed, where it does not yet."""
        async with entry.storing:
            if entry.lags and entry.file is not None:
                entry.lags = False
                await self._keep_mtime(entry.file, entry.written_ns if entry.untold else entry.mtime_ns)

    async def _keep_mtime(self, file: HostFile, mtime_ns: int) -> None:
        try:
            await file.keep_mtime(mtime_ns)
        except OSError as error:
            log.warning("%s: its time of change cannot be set: %s", file.name, error.strerror)

    def _image_paths(self) -> list[bytes]:
        with self.policy.walker.looking():
            names = self.policy.walker.names(self.path)
        return [
            os.path.join(self.path, name)
            for name in sorted(names)
            if name.endswith(IMAGE_SUFFIX) and name != IMAGE_SUFFIX
        ]

    def _look(self, path: bytes, judged: Judged) -> _Seen | OSError | FvdError | None:
        """What the file is now; an error where it is no usable image; None where there is none.

        Raises OSError where it is the folder that cannot be looked into: then any name would do, and is not remembered.
        """
        with self.policy.walker.looking():
            return self._look_now(path, judged)

    def _look_now(self, path: bytes, judged: Judged) -> _Seen | OSError | FvdError | None:
        known = self._entries.get(path)
        busy = known is not None and known.busy
        try:
            status = self.policy.walker.stat(path)
        except (LeadsBack, NoAnswer) as error:
            return error
        except OSError as error:
            try:
                os.lstat(path)
            except FileNotFoundError:
                return None
            return None if isinstance(error, FileNotFoundError) else error
        try:
            # Who writes to a device does not change its node.
            if known is not None and (
                (busy and same_file(status, known.status))
                or (signature(status) == signature(known.status) and not stat.S_ISBLK(status.st_mode))
            ):
                return _Seen(status, 0, 0, known=True)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                return None
            size, usage = look_at_chain(os.fsdecode(path), self.policy, judged)
            return _Seen(status, size, usage, self.policy.walker.born(path))
        except FileNotFoundError:
            return None
        except (OSError, ImageError, NoAnswer) as error:
            return error

    def _update(self, path: bytes, seen: _Seen | OSError | FvdError | None) -> Entry | None:
        """Bring what is known of a path in line with what was just seen. Raises OSError where nobody answers."""
        known = self._entries.get(path)
        if isinstance(seen, NoAnswer):
            return self._as_known(path)
        if not isinstance(seen, _Seen):
            lack = shortage(seen) if seen is not None else 0
            if lack:
                return self._as_known(path, OSError(lack, f"{os.fsdecode(path)}: {os.strerror(lack)}"))
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
            if seen.known or (known.busy and same_file(seen.status, known.status)):
                if known.busy:  # else: what was seen may be older than what its closing has left
                    known.status = seen.status
                return known
            if signature(seen.status) == signature(known.status) and known.size == seen.size:
                known.usage = seen.usage
                return known
            known.misjudged = True
            del self._entries[path]
            self._drop_if_unused(known)
        name = raw_name(os.path.basename(path))
        numbers = (inode_number(name, seen.status, seen.born, attempt) for attempt in itertools.count())
        entry = Entry(next(number for number in numbers if number not in self._inodes), path, seen)
        self._entries[path] = entry
        self._inodes[entry.inode] = entry
        return entry

    def _complain(self, path: bytes, error: OSError | FvdError) -> None:
        """Say once why a file does not appear, or appears as it was."""
        text = str(error)
        if self._complaints.get(path) == text:
            return
        self._complaints[path] = text
        level = logging.INFO if isinstance(error, NotFvd) else logging.ERROR
        log.log(level, "%s", text if isinstance(error, ImageError) else f"{os.fsdecode(path)}: {_reason(error)}")

    # --- lookup counts --------------------------------------------------------------------------

    def tell(self, entry: Entry) -> Entry:
        """Count that the kernel is told of an image; the one to tell of, where its number is another one's by now."""
        entry = self._inodes.setdefault(entry.inode, entry)
        entry.lookups += 1
        return entry

    async def find(self, inode: int) -> Entry:
        """The image that a file handle with this number is of, as it is now. Raises OSError: ESTALE if it is gone."""
        if inode not in self._inodes:
            await self.scan()
        entry = self._inodes.get(inode) or self._with_number(inode)
        if entry is not None:
            entry = await self.lookup(entry.name)
        if entry is None or entry.inode != inode:
            raise OSError(errno.ESTALE, f"inode {inode} is gone")
        return entry

    def _with_number(self, inode: int) -> Entry | None:
        """The image that could have this number, which it gets, unless the kernel uses another one for it."""
        for entry in self._entries.values():
            numbers = (inode_number(entry.name, entry.status, entry.born, attempt) for attempt in range(_ATTEMPTS))
            if inode in numbers and entry.lookups <= 0 and not entry.opens and not entry.lock.locked():
                del self._inodes[entry.inode]
                entry.inode = inode
                self._inodes[inode] = entry
                return entry
        return None

    def forget(self, inode: int, count: int) -> None:
        """The kernel has dropped `count` of its references to the inode."""
        entry = self._inodes.get(inode)
        if entry is not None:
            entry.lookups -= count
            self._drop_if_unused(entry)

    def _drop_if_unused(self, entry: Entry) -> None:
        unused = entry.lookups <= 0 and not entry.opens and self._entries.get(entry.path) is not entry
        if unused and self._inodes.get(entry.inode) is entry:
            del self._inodes[entry.inode]

    # --- opening and closing --------------------------------------------------------------------

    async def open(self, inode: int, *, write: bool, keep_copies: bool = True) -> tuple[Entry, bool]:
        """Open the image; the entry, and whether the kernel may keep what it has cached of it.

        With `keep_copies`, what is read of the base is kept where the image wants that, also without `write`.

        Another mount that has just closed the image may still be at it, so a busy one is tried
        again for a moment. Raises ImageError, OSError.
        """
        deadline = trio.current_time() + BUSY_PATIENCE
        while True:
            try:
                return await self._open(inode, write=write, keep_copies=keep_copies)
            except ImageBusy:
                if trio.current_time() > deadline:
                    raise
            await trio.sleep(BUSY_RETRY)

    async def _open(self, inode: int, *, write: bool, keep_copies: bool) -> tuple[Entry, bool]:
        entry = self.entry(inode)
        async with entry.lock:
            state, keep = None, True
            if fresh := entry.image is None:
                entry.image, state = await self._load(entry)
            try:
                if fresh:
                    keep = await self._have_pages_right(entry, state)
                if write:
                    if not self.policy.writable:
                        raise OSError(errno.EROFS, "mounted read-only")
                    if not entry.image.writable:
                        await self._begin_writing(entry, entry.image)
                    entry.for_writing = True
                elif keep_copies and fresh and self._wants_to_keep(entry.image):
                    await self._keep(entry, entry.image)
            except BaseException:
                if not entry.opens:
                    await self._unload(entry)
                raise
            entry.opens += 1
            return entry, keep

    async def _begin_writing(self, entry: Entry, image: Image) -> None:
        """Raises ImageBusy, ImageError, OSError."""
        await lock_for_writing(image)
        await image.begin_writing(accept_unclean=self.policy.accept_unclean)
        await self._begin_background(entry, image)

    def _wants_to_keep(self, image: Image) -> bool:
        """Whether an image that is only read has something to write all the same."""
        header = image.header
        return (
            self.policy.writable
            and self.spawn is not None
            and image.bitmap is not None
            and (
                bool(header.copy_on_read)
                or header.prefetch_start_delay > 0
                or (header.profile_directed_prefetch_start_delay >= 0 and header.prefetch_profile_entries > 0)
                or self._wants_profile(image)
            )
        )

    def _wants_profile(self, image: Image) -> bool:
        header = image.header
        return bool(header.generate_prefetch_profile) or (self._record_profiles and not header.prefetch_profile_entries)

    async def _keep(self, entry: Entry, image: Image) -> None:
        """Keep what is read of the base, as long as nobody else wants to open the image."""
        if await self._try_to_keep(entry, image) and self.spawn is not None:
            self.spawn(functools.partial(self._keep_until_asked, entry, image))

    async def _try_to_keep(self, entry: Entry, image: Image) -> bool:
        """Have what is read be kept, if nobody else has the image open; False where that will never be."""
        try:
            await self._begin_writing(entry, image)
        except ImageBusy:
            pass
        except (ImageError, OSError) as error:
            log.info("%s: what is read of the base is not kept: %s", image.name, error)
            with contextlib.suppress(OSError):
                await unlock_for_writing(image)
            return False
        return True

    async def _keep_until_asked(self, entry: Entry, image: Image) -> None:
        """Let others open an image that is only read here, and keep what is read of its base while they have it not."""
        going_on = True
        while going_on:
            with trio.move_on_after(ASKED_INTERVAL if image.writable else KEEP_RETRY):
                await entry.unloaded.wait()
                return
            async with entry.lock:
                if entry.image is not image or entry.for_writing:
                    return
                if not image.writable:
                    going_on = await self._try_to_keep(entry, image)
                elif await trio.to_thread.run_sync(is_asked_for, image):
                    going_on = await self._stop_keeping(entry, image)

    async def _stop_keeping(self, entry: Entry, image: Image) -> bool:
        """Only read it; whether that is so."""
        if entry.prefetcher is not None:
            await entry.prefetcher.stop()
            entry.prefetcher = None
        try:
            with trio.CancelScope(shield=True):
                await image.stop_writing()
                assert entry.file is not None
                await self._keep_mtime(entry.file, entry.changed_ns)
                await unlock_for_writing(image)
        except OSError as error:
            log.error("%s: nobody else can open it: %s", image.name, error)
            return False
        return True

    async def _have_pages_right(self, entry: Entry, state: Snapshot | None) -> bool:
        """Whether what the kernel has of an image that was just loaded is right, if only because it has dropped it."""
        right = not entry.opened or (entry.cached is not None and entry.cached.is_still(state))
        entry.opened, entry.cached = True, None
        if not right and self.forget_pages is not None:
            await self.forget_pages(entry.inode)
            right = True
        entry.cached = state
        return right

    async def _begin_background(self, entry: Entry, image: Image) -> None:
        """What an image that has become writable wants done beside the requests."""
        header = image.header
        if image.bitmap is None:
            return
        if image.fetcher is not None:
            image.fetcher.observer = self.scheduler.link(image.base_server)
        if image.recorder is None and self._wants_profile(image):
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

    async def _load(self, entry: Entry) -> tuple[Image, Snapshot | None]:
        status, chain = await trio.to_thread.run_sync(self._open_chain, entry.path)
        image = await load_chain(chain)
        try:
            state = await trio.to_thread.run_sync(snapshot_of, chain.stores())
            if state is not None and state.signatures[0] != signature(status):
                raise ImageBusy(os.fsdecode(entry.path), "was changed while it was being opened")
            if image.size != entry.size:
                if self._entries.get(entry.path) is entry:  # have the next look make a new one
                    del self._entries[entry.path]
                raise OSError(errno.ESTALE, f"{os.fsdecode(entry.path)}: the disk has been resized elsewhere")
        except BaseException:
            await image.close()
            raise
        current = self._entries.get(entry.path)
        if current is None or not current.busy:  # one that was opened by its old number is the one to be seen
            self._entries[entry.path] = entry
            if current is not None and current is not entry:
                self._drop_if_unused(current)
        entry.status = status
        entry.file = chain.layers[0].meta
        entry.apart = image.data is not image.meta or image.meta.fixed_size
        entry.mtime_ns = status.st_mtime_ns
        entry.told = entry.untold = entry.lags = False
        image.run_in_background(self.spawn)
        entry.busy = True
        entry.for_writing = False
        entry.unloaded = trio.Event()
        return image, state

    def _open_chain(self, path: bytes) -> tuple[os.stat_result, Chain]:
        with self.policy.walker.looking(patient=True):
            status = self.policy.walker.stat(path)
            return status, open_chain(os.fsdecode(path), self.policy)

    async def close(self, entry: Entry) -> None:
        """Undo one `open`; the last one gives up the image. Raises OSError of what had to be written."""
        async with entry.lock:
            entry.opens -= 1
            if not entry.opens:
                await self._unload(entry)
        self._drop_if_unused(entry)

    async def _unload(self, entry: Entry) -> None:
        assert entry.image is not None
        entry.unloaded.set()
        if entry.prefetcher is not None:
            await entry.prefetcher.stop()
            entry.prefetcher = None
        now = status(entry.image, None)
        entry.last_status = {key: now[key] for key in ("base_size", "local_bytes", "local_share", "failed")}
        entry.misjudged = entry.is_misjudged
        image, entry.image = entry.image, None
        entry.closing = image
        entry.size = image.size
        entry.usage = image.usage()
        with trio.CancelScope(shield=True):
            try:
                await self._end_writing(entry, image)
            except BaseException:
                entry.cached = None  # the kernel may have what could not be written
                raise
            finally:
                await image.close()
                entry.closing = None
                entry.busy = False
                if entry.misjudged and self._entries.get(entry.path) is entry:
                    del self._entries[entry.path]  # the next look makes a new one

    async def _end_writing(self, entry: Entry, image: Image) -> None:
        was_writable = image.writable
        try:
            await image.end_writing()
        finally:
            async with entry.storing:
                assert entry.file is not None
                file, entry.file = entry.file, None
                entry.lags = False
                if was_writable:
                    await self._keep_mtime(file, entry.changed_ns)
                entry.status = await trio.to_thread.run_sync(file.status)

    def open_entries(self) -> list[Entry]:
        """The entries whose image is open."""
        return [entry for entry in self._inodes.values() if entry.image is not None]

    def shows(self, entry: Entry) -> bool:
        """Whether a path in the mount leads to this entry, and not to another one of the same name."""
        return self._entries.get(entry.path) is entry

    def unclosed(self) -> list[tuple[Entry, Image]]:
        """The images that are open or being closed."""
        images = [(entry, entry.image or entry.closing) for entry in self._inodes.values()]
        return [(entry, image) for entry, image in images if image is not None]

    async def close_all(self) -> None:
        """Give up every image, whoever still has it open, side by side; errors go to the log."""
        async with trio.open_nursery() as nursery:
            for entry in self.open_entries():
                nursery.start_soon(self._close_at_end, entry)

    async def _close_at_end(self, entry: Entry) -> None:
        # What was written must not wait for a base that does not answer, as the closing does.
        with contextlib.suppress(OSError):
            if entry.image is not None:
                await entry.image.flush()
        while entry.image is not None and entry.image.in_use:  # noqa: ASYNC110  who ends a request has more to do than to tell
            await trio.sleep(BUSY_RETRY)
        async with entry.lock:
            if entry.image is not None:
                entry.opens = 0
                try:
                    await self._unload(entry)
                except OSError as error:
                    log.error("%s: closing failed, it will be replayed when next opened: %s", entry.path, error)
