"""The folder of images: which of its files appear in the mount.

`DIR/NAME.fvd` appears as `NAME.raw` if it holds an FVD image that can be opened. Nothing watches the folder: each
lookup and listing looks at the files as they are then, in a thread, and reads a header only where a file has changed
since. Looking needs no lock; opening does (`locking.py`). A look that takes too long is answered by what was known
before (`looks.py`).

No pyfuse3 here: this is what the handlers in `filesystem.py` translate to.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shlex
import stat

import trio

from fvdfs.errors import FormatError, FvdError, ImageError, NotFvd, shortage, told
from fvdfs.image.chain import Judged, look_at_chain
from fvdfs.image.policy import Policy
from fvdfs.mounts import user_name
from fvdfs.ops.freshness import same_file, signature
from fvdfs.ops.host_attributes import HostAttributes
from fvdfs.ops.inodes import IMAGE_SUFFIX, ROOT_INODE, Entry, Inodes, Seen, image_name
from fvdfs.ops.looks import THREADS, Look, Looks, late
from fvdfs.store.paths import PATIENCE, LeadsBack, NoAnswer

log = logging.getLogger(__name__)

NAME_MAX = 255  # bytes; FUSE itself hands over longer names
DISK_PATIENCE = 30.0
"""Seconds for the first look at an image while its thread is at a disk of this host: it may have to spin up."""


class Folder:
    """The images of one folder. All methods run in the event loop; what waits for a disk is async."""

    def __init__(self, path: str, policy: Policy) -> None:
        self.path = os.fsencode(path)
        self.policy = policy
        self.inodes = Inodes()
        self._looks = Looks()
        self.host = HostAttributes(self.path, policy.walker, self._looks)
        self._complaints: dict[bytes, str] = {}

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
        known = self.inodes.at(path) is not None
        if not known and not look.ended.is_set() and not self.policy.walker.is_at_share(look.thread):
            await self._looks.wait([look], DISK_PATIENCE)
        return look.result if look.ended.is_set() else self._as_known(path)

    async def scan(self) -> list[Entry]:
        """All images that appear now, by name. Raises OSError."""
        before = self.inodes.shown()
        listing: Look[list[bytes]] = self._looks.begin(self.path, self.image_paths)
        await self._looks.wait([listing])
        if not listing.ended.is_set():
            if not before:
                raise late(self.path)
            self._complain(self.path, late(self.path))
            return self.inodes.shown()
        paths = listing.result
        self._complaints.pop(self.path, None)
        there = set(paths)
        for entry in before:
            if entry.path not in there:
                self._update(entry.path, None)
        for path in [path for path in self._complaints if path not in there]:
            del self._complaints[path]
        judged: Judged = {}
        for path in paths:
            await self._until_judged(path)
        looks = [self._begin_look(path, judged, threads=1) for path in paths]
        await self._looks.wait(looks)
        found = [self._found(path, look) for path, look in zip(paths, looks, strict=True)]
        return [entry for entry in found if entry is not None]

    @property
    def refused(self) -> dict[bytes, str]:
        """The images that do not appear, or appear as they were, since they cannot be looked at: the path, and why."""
        return self._complaints

    async def find(self, inode: int) -> Entry:
        """The image that a file handle with this number is of, as it is now. Raises OSError: ESTALE if it is gone."""
        if self.inodes.get(inode) is None:
            await self.scan()
        entry = self.inodes.get(inode) or self.inodes.renumber(inode)
        if entry is not None:
            entry = await self.lookup(entry.name)
        if entry is None or entry.inode != inode:
            raise OSError(errno.ESTALE, f"inode {inode} is gone")
        return entry

    def path_of(self, inode: int) -> bytes:
        """The path of the folder, or of an image. Raises OSError(ESTALE) where it is gone."""
        return self.path if inode == ROOT_INODE else self.inodes[inode].path

    # --- looks ------------------------------------------------------------------------------------

    async def _until_judged(self, path: bytes) -> None:
        """If the image is closing, and will get a new inode number, wait for that, up to `PATIENCE`."""
        known = self.inodes.at(path)
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
        known = self.inodes.at(path)
        if known is None:
            raise reason or late(path)
        self._complain(path, reason or late(path))
        return known

    # In a thread.

    def image_paths(self) -> list[bytes]:
        """The paths of what is called an image, by name. Blocks. Raises OSError, NoAnswer."""
        with self.policy.walker.looking():
            names = self.policy.walker.names(self.path)
        return [
            os.path.join(self.path, name)
            for name in sorted(names)
            if name.endswith(IMAGE_SUFFIX) and name != IMAGE_SUFFIX
        ]

    def _look(self, path: bytes, judged: Judged) -> Seen | OSError | FvdError | None:
        """What the file is now; an error where it is no usable image; None where there is none.

        Raises OSError where it is the folder that cannot be looked into: then any name would do, and is not remembered.
        """
        known = self.inodes.at(path)
        busy = known is not None and known.busy  # before its file is looked at: its closing may end meanwhile
        with self.policy.walker.looking():
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
                if (known is None or not known.is_file(status)) and (moved := self._moved(path, status)):
                    return Seen(status, moved=moved)
                if known is not None and _is_unchanged(known, status, busy=busy):
                    return Seen(status, unchanged=True)
                return self._look_inside(path, status, judged)
            except FileNotFoundError:
                return None
            except (OSError, ImageError, NoAnswer) as error:
                return error

    def _moved(self, path: bytes, status: os.stat_result) -> Entry | None:
        """The open image whose file now has this path, and not its own any more: somebody has renamed it."""
        for entry in tuple(self.inodes.busy):  # at once: the event loop changes it meanwhile
            if entry.path != path and same_file(status, entry.status):
                try:
                    at_its_path = self.policy.walker.stat(entry.path)
                except FileNotFoundError:
                    return entry
                return None if entry.is_file(at_its_path) else entry
        return None

    def _look_inside(self, path: bytes, status: os.stat_result, judged: Judged) -> Seen | None:
        """Raises OSError, ImageError, NoAnswer."""
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            return None
        facts = look_at_chain(os.fsdecode(path), self.policy, judged)
        return Seen(status, facts.size, facts.usage, facts.mtime_ns, self.policy.walker.born(path), facts.record)

    def look_again(self, path: bytes) -> Seen:
        """What an image is that a former daemon had open. Blocks. Raises OSError, FvdError."""
        with self.policy.walker.looking(patient=True):
            seen = self._look_inside(path, self.policy.walker.stat(path), {})
        if seen is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return seen

    # In the event loop again.

    def _update(self, path: bytes, seen: Seen | OSError | FvdError | None) -> Entry | None:
        """Bring what is known of a path in line with what was just seen. Raises OSError where nobody answers."""
        if isinstance(seen, NoAnswer):
            return self._as_known(path)
        if isinstance(seen, Seen):
            return self._take_up(path, seen)
        if seen is not None:
            lack = shortage(seen)
            if lack:
                return self._as_known(path, OSError(lack, f"{os.fsdecode(path)}: {os.strerror(lack)}"))
            self._complain(path, seen)
        known = self.inodes.at(path)
        if known is not None:
            self.inodes.hide(known)
        return None

    def _take_up(self, path: bytes, seen: Seen) -> Entry | None:
        known = self.inodes.at(path)
        if known is None and seen.unchanged:
            return None  # vanished while we looked
        if seen.moved is not None:
            return self._take_up_moved(path, seen.moved)
        self._complaints.pop(path, None)
        if known is not None:
            if seen.unchanged or (known.busy and known.is_file(seen.status)):
                if known.busy:  # else: what was seen may be older than what its closing has left
                    known.status = seen.status
                return known
            if signature(seen.status) == signature(known.status) and known.size == seen.size:
                known.usage, known.data_mtime_ns, known.record = seen.usage, seen.data_mtime_ns, seen.record
                return known
            known.misjudged = True
            self.inodes.hide(known)
        return self.inodes.add(path, seen)

    def _take_up_moved(self, path: bytes, moved: Entry) -> Entry | None:
        if moved.misjudged and not moved.busy:
            return None  # closed while we looked, to get another number
        former = self.inodes.at(path)
        if former is not None:
            former.misjudged = True
        self._complaints.pop(path, None)
        self.inodes.move(moved, path)
        return moved

    def _complain(self, path: bytes, error: OSError | FvdError) -> None:
        """Say once why a file does not appear, or appears as it was.

        What is wrong with one base is so for all images on it: that is one line. What is wrong with many images alike
        is a few lines: the log counts them by the reason (`complaints.py`), which stands first, and is not shown there.
        """
        text = told(error) + (advice := _advice(error))
        if self._complaints.get(path) == text:
            return
        said = isinstance(error, ImageError) and text in self._complaints.values()
        self._complaints[path] = text
        if said:
            return
        level = logging.INFO if isinstance(error, NotFvd) else logging.ERROR
        if isinstance(error, ImageError):
            log.log(level, "%.0s%s", error.reason, text)
            return
        reason = (error.strerror or text) if isinstance(error, OSError) else text
        log.log(level, "%.0s%s: %s", reason, os.fsdecode(path), reason + advice)


def _advice(error: OSError | FvdError) -> str:
    """What to do about an image that does not appear, where the reason does not say so."""
    if isinstance(error, NotFvd):
        return "; fvdfs convert makes one of a disk in another format"
    if isinstance(error, FormatError):
        return f"; fvdfs check {shlex.quote(error.image)} says what is wrong"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return f"; let {user_name(os.geteuid())} read it, who has mounted"
    return ""


def _is_unchanged(known: Entry, status: os.stat_result, *, busy: bool) -> bool:
    """Whether a file that is seen with this status is what is known of it."""
    if busy and known.is_file(status):
        return True
    # Who writes to a device does not change its node.
    return signature(status) == signature(known.status) and not stat.S_ISBLK(status.st_mode)
