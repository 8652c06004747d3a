"""What the next daemon of a mount has to know (`-o keep`): a file in memory that the keeper has, too.

It holds lines of JSON, each a change, appended with one call before the kernel gets the answer that it is about: a
daemon that is killed leaves whole lines, and perhaps a part of one, which counts for nothing since nobody was told.
When it has become much longer than what it says, all of that is said once more, and what is before becomes a hole.

Without a keeper nothing is written, and nothing is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fvdfs.format.header import PAGE
from fvdfs.image.unsettled import Left, Notes
from fvdfs.store.host import PUNCH, fallocate
from fvdfs.store.mountinfo import MountPoint

WRONG = -1
"""In place of a size: what the kernel believes of the inode is wrong."""
_AGAIN = "again"
TIMES = 3
"""Daemons that may end while they open an image; then it is given up, so that the others go on."""
_LEAST = 1 << 20  # bytes from which on it is written anew, at the earliest


@dataclass(frozen=True, slots=True)
class Opened:
    """A handle that the kernel has."""

    inode: int
    writes: bool
    through_cache: bool
    durable: bool
    unique: int
    """The number of the request that was answered with it."""


@dataclass(slots=True)
class Disk:
    """An inode of which the kernel has handles."""

    path: str
    """Its bytes, a character each."""
    files: list[list[int]]
    """Device and inode of the image file; also of those that it was, or is about to be, while that changes."""
    shown: bool = True
    """Whether its path leads to it."""


@dataclass(slots=True)
class File:
    """An image file, as `image.unsettled.Left` has it."""

    identity: list[int]
    path: str
    writing: bool = False
    blocks: list[list[int]] = field(default_factory=list)
    chunks: dict[int, int] = field(default_factory=dict)
    taken_blocks: list[list[int]] = field(default_factory=list)
    """What a commit is going to name that has begun."""
    taken_chunks: dict[int, int] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        """Whether all of it is committed."""
        return not (self.blocks or self.chunks or self.taken_blocks or self.taken_chunks)


@dataclass(slots=True)
class State:
    """What was remembered."""

    request: str = ""
    """INIT, as hexadecimal digits."""
    answer: str = ""
    mount: dict[str, Any] = field(default_factory=dict)
    """Its line of mountinfo (`MountPoint`)."""
    point: str = ""
    """The path of the mount point."""
    obstacle: str = ""
    """Why no disk is passed through."""
    takeovers: int = 0
    oldest: int = 0
    """The number of the oldest request that may be in hand, where the kernel does not send it again."""
    opened: dict[int, Opened] = field(default_factory=dict)
    """By handle."""
    disks: dict[int, Disk] = field(default_factory=dict)
    """By inode."""
    told: dict[int, int] = field(default_factory=dict)
    """The size of each inode that the kernel knows, in bytes, or `WRONG`."""
    ends: dict[int, int] = field(default_factory=dict)
    """Where the kernel has disks end that are open, in bytes; of what is passed through, the file tells."""
    blank: dict[int, bool] = field(default_factory=dict)
    """Of inodes that were made here and hold nothing but zeros."""
    failed: dict[int, str] = field(default_factory=dict)
    """Of inodes that may not be written any more: why."""
    adopting: dict[int, int] = field(default_factory=dict)
    """By inode: how many daemons have ended while they opened it, this one included."""
    backings: dict[int, int] = field(default_factory=dict)
    """By inode: the number of the file that the kernel reads and writes by itself."""
    creating: dict[int, str] = field(default_factory=dict)
    """By request: the name of the disk that is being made."""
    files: dict[int, File] = field(default_factory=dict)
    """By a number: the image files of which something is not committed, or that are open for writing."""

    def apply(self, change: dict[str, Any]) -> None:
        """Take up a line. A later version may have said more, where a former one goes on."""
        key, value = change.get("key", 0), change["value"]
        what: str = change["what"]
        if what in _OF_FILES:
            if key in self.files:
                _OF_FILES[what](self.files[key], value)
        elif what not in self.__slots__:
            pass
        elif "key" not in change:
            setattr(self, what, value)
        elif value is None:
            getattr(self, what).pop(key, None)
        elif what == "opened":
            self.opened[key] = Opened(**value)
        elif what == "disks":
            self.disks[key] = Disk(**value)
        elif what == "files":
            value["chunks"] = {int(chunk): number for chunk, number in value["chunks"].items()}
            value["taken_chunks"] = {int(chunk): number for chunk, number in value["taken_chunks"].items()}
            self.files[key] = File(**value)
        else:
            getattr(self, what)[key] = value

    def changes(self) -> Iterator[dict[str, Any]]:
        """The lines that say all this."""
        for what in self.__slots__:
            value = getattr(self, what)
            if what == "mount" or not isinstance(value, dict):
                yield {"what": what, "value": value}
            else:
                for key, one in value.items():
                    whole = asdict(one) if what in _RECORDS else one
                    yield {"what": what, "key": key, "value": whole}


_RECORDS = ("opened", "disks", "files")


def _add_blocks(file: File, value: list[int]) -> None:
    file.blocks.append(value)


def _add_chunks(file: File, value: list[list[int]]) -> None:
    file.chunks.update((chunk, number) for chunk, number in value)


def _commit_begins(file: File, _value: object) -> None:
    file.taken_blocks += file.blocks
    file.taken_chunks |= file.chunks
    file.blocks, file.chunks = [], {}


def _commit_ends(file: File, done: bool) -> None:
    if not done:
        file.blocks = file.taken_blocks + file.blocks
        file.chunks = file.taken_chunks | file.chunks
    file.taken_blocks, file.taken_chunks = [], {}


def _in_use(file: File, writing: bool) -> None:
    file.writing = writing


_OF_FILES: dict[str, Callable[[File, Any], None]] = {
    "file blocks": _add_blocks,
    "file chunks": _add_chunks,
    "file begins": _commit_begins,
    "file ends": _commit_ends,
    "file writing": _in_use,
}


class Remembered:
    """The file, and what it says. Nothing here raises: a host without memory for a line would have none for more."""

    def __init__(self) -> None:
        self.state = State()
        self.descriptor = -1
        """The file; -1: there is none, and nothing is written."""
        self.number = 0
        """Which of several it is: the highest counts. Each daemon makes one."""
        self._files = 0
        self._length = 0
        self._begins = 0  # bytes before that mean nothing
        self._least = _LEAST

    def begin(self, number: int = 1) -> None:
        """Have a new file, with all that is known. Raises OSError."""
        self.descriptor, self.number = os.memfd_create(f"fvdfs-state-{number}", os.MFD_CLOEXEC), number
        self._say_all()

    def _say_all(self) -> None:
        """Raises OSError."""
        begins = self._length
        lines = "".join(_line(change) for change in ({"what": _AGAIN}, *self.state.changes(), {"what": "whole"}))
        data = lines.encode()
        while data:
            data = data[os.write(self.descriptor, data) :]
        self._begins, self._length, self._least = begins, begins + len(lines), max(_LEAST, 4 * len(lines))
        if unused := begins // PAGE * PAGE:
            fallocate(self.descriptor, PUNCH, 0, unused)

    def take_up(self, files: dict[int, int]) -> None:
        """Go on with what a former daemon has left: descriptors by number, which are closed. Raises OSError."""
        for number in sorted(files, reverse=True):
            if (state := _read(files[number])) is not None:
                self.state = state
                break
        for descriptor in files.values():
            os.close(descriptor)
        self.state.takeovers += 1
        self.begin(max(files, default=0) + 1)

    def note(self, what: str, key: int, value: Any) -> None:
        """Remember one of several; None: no longer."""
        if self.descriptor < 0:
            return
        known = getattr(self.state, what)
        if value is None and key not in known:
            return
        if what in _RECORDS and value is not None:
            known[key], value = value, asdict(value)
        elif value is None:
            del known[key]
        elif known.get(key) == value:
            return
        else:
            known[key] = value
        self._write({"what": what, "key": key, "value": value})

    def set(self, what: str, value: Any) -> None:
        """Remember it."""
        setattr(self.state, what, value)
        self._write({"what": what, "value": value})

    def _write(self, change: dict[str, Any]) -> None:
        self._append(_line(change))

    def _append(self, line: str) -> None:
        if self.descriptor < 0:
            return
        with contextlib.suppress(OSError):
            self._length += os.write(self.descriptor, line.encode())
            if self._length - self._begins > self._least:
                self._say_all()

    # --- what images have not committed (`image/unsettled.py`) -------------------------------------

    def notes(self, identity: tuple[int, int], name: str) -> Notes:
        """Where to report what is not committed of the file with this identity."""
        known = {tuple(file.identity): number for number, file in self.state.files.items()}
        number = known.get(identity)
        if number is None:
            self._files += 1
            number = max(self._files, max(self.state.files, default=0) + 1)
            self._files = number
        return _Notes(self, number, identity, name)

    def left(self, identity: tuple[int, int]) -> Left:
        """What is not committed of it."""
        for file in self.state.files.values():
            if tuple(file.identity) == identity:
                blocks = [(first, end) for first, end in (*file.taken_blocks, *file.blocks)]
                return Left(blocks, file.taken_chunks | file.chunks, file.writing)
        return Left()

    def report(self, number: int, what: str, value: object, text: str) -> None:
        """Remember something of a file; `text`: the value as JSON."""
        _OF_FILES[what](self.state.files[number], value)
        self._append(f'{{"what":"{what}","key":{number},"value":{text}}}\n')

    # --- what is told of disks --------------------------------------------------------------------

    def tell(self, inode: int, size: int) -> None:
        """The kernel knows this inode, and believes that it has this size."""
        self.note("told", inode, size)

    def forget(self, inode: int) -> None:
        """The kernel knows it no longer."""
        self.note("told", inode, None)

    def is_free(self, inode: int, size: int) -> bool:
        """Whether a disk of this size may have the number: what the kernel may know under it is right."""
        return self.state.told.get(inode, size) == size

    def disk(self, inode: int, path: bytes, files: list[os.stat_result], *, shown: bool) -> None:
        """A disk that the kernel has handles of."""
        identities = [[file.st_dev, file.st_ino] for file in files]
        disk = Disk(path.decode("latin-1"), identities, shown)
        if self.state.disks.get(inode) != disk:
            self.note("disks", inode, disk)

    def open(self, fh: int, opened: Opened) -> None:
        """The kernel gets a handle."""
        self.note("opened", fh, opened)

    def release(self, fh: int) -> None:
        """The kernel has given a handle back."""
        gone = self.state.opened.get(fh)
        self.note("opened", fh, None)
        if gone is not None and all(other.inode != gone.inode for other in self.state.opened.values()):
            for what in ("disks", "ends", "blank", "failed", "adopting"):
                self.note(what, gone.inode, None)

    # --- of the mount -----------------------------------------------------------------------------

    @property
    def mount(self) -> MountPoint | None:
        """Where it was mounted."""
        return MountPoint(**self.state.mount) if self.state.mount else None

    @property
    def init(self) -> tuple[bytes, bytes]:
        """The request and the answer that were exchanged."""
        return bytes.fromhex(self.state.request), bytes.fromhex(self.state.answer)


class _Notes:
    """`image.unsettled.Notes` of one file."""

    def __init__(self, remembered: Remembered, number: int, identity: tuple[int, int], name: str) -> None:
        self._remembered = remembered
        self._number = number
        self._identity = identity
        self._name = name

    def blocks_stored(self, first: int, end: int, /) -> None:
        """These blocks are stored, and no commit has named them."""
        if self._is_known():
            self._remembered.report(self._number, "file blocks", [first, end], f"[{first},{end}]")

    def chunks_allocated(self, entries: Sequence[tuple[int, int]], /) -> None:
        """These chunks got these numbers in the storage, as they stand on disk."""
        if self._is_known():
            self._remembered.report(self._number, "file chunks", entries, json.dumps(entries))

    def commit_begins(self) -> None:
        """A commit is going to name all that was reported."""
        if self._is_known() and not self._remembered.state.files[self._number].is_settled:
            self._remembered.report(self._number, "file begins", True, "true")

    def commit_ends(self, *, done: bool) -> None:
        """It has, or it failed."""
        if self._is_known() and not self._remembered.state.files[self._number].is_settled:
            self._remembered.report(self._number, "file ends", done, json.dumps(done))

    def in_use(self, *, writing: bool) -> None:
        """Whether the image is open for writing, here."""
        if writing and self._is_known():
            self._remembered.report(self._number, "file writing", True, "true")
        elif not writing:
            self._remembered.note("files", self._number, None)

    def _is_known(self) -> bool:
        if self._remembered.descriptor < 0:
            return False
        if self._number not in self._remembered.state.files:
            self._remembered.note("files", self._number, File(list(self._identity), self._name))
        return True


def path_of(disk: Disk) -> bytes:
    """The path of its image."""
    return disk.path.encode("latin-1")


def _line(change: dict[str, Any]) -> str:
    return json.dumps(change, separators=(",", ":")) + "\n"


def _read(descriptor: int) -> State | None:
    """What a file says; None where it was not written to its end."""
    state, whole = State(), False
    try:
        begins = os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError:
        return None
    data = os.pread(descriptor, os.fstat(descriptor).st_size - begins, begins)
    lines = data[max(0, data.find(_line({"what": _AGAIN}).encode())) :].split(b"\n")[:-1]
    for line in lines:
        try:
            change = json.loads(line)
        except ValueError:  # there was no memory for the rest of it
            continue
        if change["what"] == "whole":
            whole = True
        elif change["what"] != _AGAIN:  # of what is said again, nothing is new
            state.apply(change)
    return state if whole else None
