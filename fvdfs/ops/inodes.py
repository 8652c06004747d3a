"""The images that appear in a mount: by their path, and by the inode number that the kernel knows them by.

An inode number stands for what the kernel believes of a disk. With its write-back cache the kernel asks nobody for
the size and the times of an inode that it knows. So an image gets another number at the next look

- when it was replaced, or changed by somebody else, unless the kernel has forgotten its number;
- when it was closed after a write that ended within a sector past its end;
- when the kernel had accepted a write past its end that failed.

A file handle (of an NFS server, say) holds a number, too, and must lead to the same disk after the kernel has forgotten
it, and after another mount. So numbers are made of what stays the same as long as a file is the same (`inode_number`),
and the first is taken that the kernel does not use for another state.

A daemon that takes over from another one (`kept.py`) knows the numbers that the kernel has heard from that one, with
the sizes that it was told. A disk gets the same number again if it still has that size, and the kernel drops its pages
of it before the disk is opened; such a number is never free again, since nobody has counted the references.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import trio

from fvdfs.counters import Counters
from fvdfs.cow.heat import Heat
from fvdfs.errors import FvdError, reason_of
from fvdfs.format.migration import NO_RECORD, Record, Target
from fvdfs.image.image import Image
from fvdfs.ops.freshness import Snapshot, same_file
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.processes import Process
from fvdfs.ops.remembered import WRONG, Remembered
from fvdfs.ops.times import Mtime
from fvdfs.prefetch.prefetcher import Prefetcher

ROOT_INODE = 1
IMAGE_SUFFIX = b".fvd"
RAW_SUFFIX = b".raw"
CHANGERS = 2  # threads that change the attributes of one image
_INODE_BYTES = 6
_FOR_EVER = 1 << 60
"""References that the kernel may have to what a former daemon has told it of: it may have given back any number."""
_ATTEMPTS = 8  # numbers of an image that a file handle may have


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of the raw file; sizes and usage in bytes."""

    size: int
    usage: int
    status: os.stat_result
    mtime_ns: int
    ctime_ns: int
    passed_through: bool = False
    """Whether the kernel writes to the disk without telling."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at an image file has found."""

    status: os.stat_result
    size: int = 0
    """Of the disk, in bytes."""
    usage: int = 0
    """Bytes that are allocated."""
    data_mtime_ns: int = 0
    """When the disk was written last, where the image file does not tell (`chain.Facts`)."""
    born: int = 0
    """When the file was made, in ns; 0 where nobody can say."""
    record: Record = NO_RECORD
    """What it says of moves to and from other hosts."""
    moved: Entry | None = None
    """The open image that it is, which somebody has renamed: what is known of it stands, as with `unchanged`."""
    unchanged: bool = False
    """The file is as it was, or open: what is known of it stands, and the fields above are not set."""


class Outcome:
    """How something ends that is done in the background."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: OSError | None = None


class Asked:
    """What a disk waits for that asks its source to hand it over."""

    def __init__(self, since: float) -> None:
        """`since`: seconds since the epoch."""
        self.since = since
        self.why = ""
        """Why the last attempt has failed."""

    def note(self, error: FvdError | OSError) -> None:
        """An attempt has failed."""
        self.why = reason_of(error)

    @property
    def remark(self) -> str:
        """In words."""
        since = time.strftime("%T", time.localtime(self.since))
        return f"has asked its source for the disk since {since}" + (f": {self.why}" if self.why else "")


class Entry:
    """An image that appears in the mount, or did while the kernel still knows it."""

    def __init__(self, inode: int, path: bytes, seen: Seen) -> None:
        self.inode = inode
        self.born = seen.born
        self.path = path
        self.name = raw_name(os.path.basename(path))
        self.lock = trio.Lock()
        """Held while the image is opened or closed, or becomes writable or read-only."""
        self.limiter = trio.CapacityLimiter(CHANGERS)
        """Of the threads that change its attributes."""
        self.image: Image | None = None
        self.closing: Image | None = None
        """The image while it is being closed."""
        self.prefetcher: Prefetcher | None = None
        self.passthrough: Passthrough | str = ""
        """The kernel's own way to the data of an open image; in words, why there is none."""
        self.busy = False
        """Whether the image is open, or still being closed: the file changes, and is what we think it is."""
        self.counters = Counters()
        self.opens = 0
        self.cached_writers = 0
        """Openings that write through the kernel's cache: it may hold what they have written, and not send it yet."""
        self.for_writing = False
        """Whether somebody has opened it for writing, and not only to read it."""
        self.unloaded = trio.Event()
        """Set when the image is given up."""
        self.lookups = 0
        """References that the kernel holds."""
        self.size = seen.size
        self.usage = seen.usage
        self.record = seen.record
        """What the image says of moves, as it was seen last, or changed here."""
        self.heat = Heat()
        """What of the disk programs have used lately."""
        self.hot: bytes | None = None
        """What of it was when it was frozen (`format/hot.py`)."""
        self.to_begin = False
        """Whether it may be written, and could not be made writable for who has it open: the next change tries that."""
        self.to_forget = False
        """Whether the kernel has to forget its pages first, which go round its cache as long as that is so."""
        self.to_stand = False
        """Whether what its source gives for this move is to take the place of what it reads from, first of all."""
        self.activating = trio.Lock()
        """Held while it is taken over from its source, or its move is given up."""
        self.move_refused = ""
        """Why the last step of a move that somebody asked for was refused."""
        self.left_alone = False
        """Whether a user has stopped that it is copied: it follows no further unless somebody uses it."""
        self.vain_until = -math.inf
        """Until then, by trio's clock, no write asks for it: those before have waited long enough."""
        self.asked: Asked | None = None
        """While it is asked for at its source."""
        self.own = b""
        """The map that the target of its move has asked for (`templates.py`)."""
        self.data_mtime_ns = seen.data_mtime_ns
        """Of a closed disk: when it was written last, where the image file does not tell."""
        self.last_status: dict[str, Any] = {}
        """What of the status is still true now that the image is closed."""
        self.open_failed: dict[str, str] | None = None
        """Why the last attempt to open it failed, and when, ready for JSON; None: it succeeded."""
        self.status = seen.status
        self.former: list[os.stat_result] = []
        """Of an open image, since it was opened: files that were under its path, before a snapshot, or will be."""
        self.snapshot = ""
        """The path of the last snapshot that was made of it."""
        self.snapshot_wait = 0.0
        """Seconds for which it kept writers out."""
        self.refused = ""
        """Why the last one that was asked for was not made."""
        self.room: Outcome | None = None
        """That of the last making of room for a larger size."""
        self.merging = False
        """Whether it is being merged with what it stands on (`merging.py`): it keeps its layers and its size."""
        self.blank = False
        """Whether it was made in this mount, is to become a clone, and holds nothing but zeros (`naming.py`)."""
        self.maker: Process | None = None
        """Of a blank one: who made it, where that is known."""
        self.settling: trio.Event | None = None
        """Of a blank one that its maker has closed: set when it is a clone, or is none."""
        self.mtime = Mtime()
        self.misjudged = False
        """Whether the kernel may believe in a size or a time of it that is wrong, and cannot be told."""
        self.opened = False
        """Whether it ever was open, so that the kernel may have pages of it."""
        self.cached: Snapshot | None = None
        """How the files were when the image was loaded last; None: nobody can tell."""

    @property
    def is_held_up(self) -> bool:
        """Whether a change has to wait for `moves.activate`."""
        return self.record.receiving or self.to_begin

    @property
    def follows(self) -> bool:
        """Whether the disk is on the way to this host, where its machine is already."""
        into = self.record.incoming
        return into is not None and into.state is Target.ACTIVE

    def look(self) -> None:
        """Take up what the kernel has done to the disk without telling (`passthrough.py`). Waits for nothing."""
        if isinstance(self.passthrough, Passthrough):
            self.passthrough.look()

    def is_file(self, status: os.stat_result) -> bool:
        """Whether this is the file of the image, which may have changed, or one that a snapshot has replaced."""
        return any(same_file(status, own) for own in (self.status, *self.former))

    @property
    def attributes(self) -> Attributes:
        """What is known without looking at the image file again."""
        self.look()
        written_ns = 0 if self.busy else self.data_mtime_ns
        mtime_ns = self.mtime.ns if self.busy else max(self.status.st_mtime_ns, written_ns)
        ctime_ns = max(self.status.st_ctime_ns, self.mtime.written_ns, written_ns)
        image = self.image
        size, usage = (self.size, self.usage) if image is None else (image.end, image.usage())
        passed_through = isinstance(self.passthrough, Passthrough)
        return Attributes(size, usage, self.status, mtime_ns, ctime_ns, passed_through)

    @property
    def is_misjudged(self) -> bool:
        """`misjudged`, or so once it is closed."""
        return self.misjudged or (self.image is not None and self.image.end != self.image.size)


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


class Inodes:
    """All entries of a mount. A path leads to one at most; the kernel may know more by their numbers."""

    def __init__(self) -> None:
        self.remembered = Remembered()
        """What the next daemon is to know."""
        self._shown: dict[bytes, Entry] = {}
        self._by_number: dict[int, Entry] = {}
        self.busy: set[Entry] = set()
        """Those that are (`Entry.busy`)."""
        self.used = trio.Event()
        """Set when a program uses a disk (`Entry.heat`)."""

    # --- by path ----------------------------------------------------------------------------------

    def at(self, path: bytes) -> Entry | None:
        """The entry that the path of an image leads to."""
        return self._shown.get(path)

    def shown(self) -> list[Entry]:
        """The entries that paths lead to, by name."""
        return [self._shown[path] for path in sorted(self._shown)]

    def shows(self, entry: Entry) -> bool:
        """Whether its path leads to this entry, and not to another one."""
        return self._shown.get(entry.path) is entry

    def add(self, path: bytes, seen: Seen) -> Entry:
        """Make an entry of the image at a path, which leads to it from now on."""
        name = raw_name(os.path.basename(path))
        numbers = (inode_number(name, seen.status, seen.born, attempt) for attempt in itertools.count())
        free = (number for number in numbers if number not in self._by_number and self._is_free(number, seen.size))
        entry = self._new(next(free), path, seen)
        self._shown[path] = entry
        return entry

    def _is_free(self, number: int, size: int) -> bool:
        return not self.remembered.state.takeovers or self.remembered.is_free(number, size)

    def adopt(self, inode: int, path: bytes, seen: Seen, *, shown: bool) -> Entry:
        """The entry of an image that a former daemon had open, under its number."""
        entry = self._new(inode, path, seen)
        entry.lookups = _FOR_EVER
        entry.opened = False  # what the kernel has of it is right: it was open
        if shown:
            self._shown[path] = entry
        return entry

    def _new(self, inode: int, path: bytes, seen: Seen) -> Entry:
        entry = Entry(inode, path, seen)
        if self.remembered.state.takeovers:
            entry.opened = True  # the kernel may have pages of it
            entry.lookups = _FOR_EVER * (inode in self.remembered.state.told)
        entry.heat = Heat(lambda: self.used.set())
        self._by_number[entry.inode] = entry
        return entry

    def show(self, entry: Entry) -> None:
        """Have its path lead to this entry."""
        former = self._shown.get(entry.path)
        self._shown[entry.path] = entry
        if former is not None:
            self.drop_if_unused(former)

    def move(self, entry: Entry, path: bytes) -> None:
        """The image has another name, and so another path, which leads to this entry from now on."""
        if self.shows(entry):
            del self._shown[entry.path]
        entry.path, entry.name = path, raw_name(os.path.basename(path))
        if entry.image is not None:
            entry.image.name = os.fsdecode(path)
        self.show(entry)
        self.note(entry)

    def note(self, entry: Entry) -> None:
        """Which file an image is has changed, or its path: if the kernel has handles of it, that is remembered."""
        if entry.inode in self.remembered.state.disks:
            self.remembered.disk(entry.inode, entry.path, [entry.status, *entry.former], shown=self.shows(entry))

    def hide(self, entry: Entry) -> None:
        """Have no path lead to this entry: the next look makes another one."""
        if self.shows(entry):
            del self._shown[entry.path]
            self.note(entry)
            self.drop_if_unused(entry)
        if entry.misjudged and entry.lookups > 0:
            self.remembered.tell(entry.inode, WRONG)

    # --- by number --------------------------------------------------------------------------------

    def __getitem__(self, inode: int) -> Entry:
        """The entry with this number. Raises OSError(ESTALE) where it is gone."""
        try:
            return self._by_number[inode]
        except KeyError:
            raise OSError(errno.ESTALE, f"inode {inode} is gone") from None

    def get(self, inode: int) -> Entry | None:
        """The entry with this number."""
        return self._by_number.get(inode)

    def all(self) -> list[Entry]:
        """Every entry that is shown, open, or known to the kernel."""
        return list(self._by_number.values())

    def open(self) -> list[Entry]:
        """The entries whose image is open."""
        return [entry for entry in self._by_number.values() if entry.image is not None]

    def tell(self, entry: Entry) -> Entry:
        """Count that the kernel is told of an image; the one to tell of, where its number is another one's by now."""
        entry = self._by_number.setdefault(entry.inode, entry)
        entry.lookups += 1
        if entry.lookups == 1:
            self.remembered.tell(entry.inode, entry.size)
        return entry

    def forget(self, inode: int, count: int) -> None:
        """The kernel has dropped `count` of its references to the inode."""
        entry = self._by_number.get(inode)
        if entry is not None:
            entry.lookups -= count
            self.drop_if_unused(entry)

    def drop_if_unused(self, entry: Entry) -> None:
        """Let go of an entry that nobody has open, no path leads to, and the kernel does not know."""
        unused = entry.lookups <= 0 and not entry.opens and not self.shows(entry)
        if unused and self._by_number.get(entry.inode) is entry:
            del self._by_number[entry.inode]
        if entry.lookups <= 0:
            self.remembered.forget(entry.inode)

    def renumber(self, inode: int) -> Entry | None:
        """The image that could have this number, which it gets, unless the kernel uses another one for it."""
        for entry in self._shown.values():
            numbers = (inode_number(entry.name, entry.status, entry.born, attempt) for attempt in range(_ATTEMPTS))
            if inode in numbers and entry.lookups <= 0 and not entry.opens and not entry.lock.locked():
                del self._by_number[entry.inode]
                entry.inode = inode
                self._by_number[inode] = entry
                return entry
        return None
