"""Power cuts while a command changes the files of a folder and their names.

`record` runs the command, and notes each call that changes a file or a name, or makes one stable. What a cut leaves:

    files    Stable is what was written before a flush of the file began that has ended. Each sector that was written
             since holds what it held then, or what any later write has left in it; the size is any since then.
    names    Stable is what was done before a flush of the folder began that has ended. Each later creation, link,
             rename and removal has happened, or has not, whatever became of the others.

A file that has no name is gone, whatever is stable of it. That is less than any file system promises: most keep names
in order, and make a name stable along with the file.

What a cut leaves, one just before the next flush ends may leave, too. So these are tried, and what a kill leaves: all
that was done until then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fvdfs.store import host

SECTOR = 512
NEVER = 1 << 60
FEW = 3  # changes of names of which all subsets are tried


# --- what was done --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Write:
    """A change of a file, and the times between which it was made. `data`: None where it got the size `offset`."""

    begin: int
    end: int
    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
            content.extend(bytes(self.offset - len(content)))
        else:
            content.extend(bytes(max(0, self.offset - len(content))))
            content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self, size: int) -> range:
        """Those that it changes, in a file of this size before."""
        start, stop = self.offset, self.offset + len(self.data) if self.data is not None else size
        if start > size:
            start, stop = size, max(stop, start)
        return range(start // SECTOR, -(-max(start, stop) // SECTOR))


@dataclass(frozen=True, slots=True)
class _Naming:
    """A name is given to a file, or taken from it, or both at once."""

    begin: int
    end: int
    file: _File
    gone: str
    new: str

    def apply(self, names: dict[str, _File]) -> None:
        if names.get(self.gone) is self.file:
            del names[self.gone]
        if self.new:
            names[self.new] = self.file


@dataclass(frozen=True, slots=True)
class _Flush:
    """A flush of a file, or, where that is None, of the folder."""

    begin: int
    end: int
    file: _File | None


@dataclass(eq=False, slots=True)
class _File:
    start: bytes
    writes: list[_Write] = field(default_factory=list)


@dataclass
class Recording:
    """What was done in a folder."""

    names: dict[str, _File]
    """As it began."""
    namings: list[_Naming] = field(default_factory=list)
    flushes: list[_Flush] = field(default_factory=list)
    clock: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    ended: int = 0
    """When it was over."""

    def now(self) -> int:
        """A time that is behind all that was done, and before all that will be."""
        return next(self.clock)

    def states(self, rng: random.Random, randoms: int) -> Iterator[tuple[int, State]]:
        """What cuts may leave, and when: at each time that matters the extremes, and so many others and kills."""
        times = sorted({flush.end - 1 for flush in self.flushes} | {NEVER})
        for before, at in itertools.pairwise((0, *times)):
            subsets = self._subsets(at, rng)
            for kept, data in itertools.product(subsets, (0.0, 1.0)):
                yield at, self._state(at, kept, data, rng)
            for _ in range(randoms):
                yield at, self._state(at, rng.choice(subsets), rng.choice((0.1, 0.5, 0.9)), rng)
                kill = rng.randrange(before, min(at, self.ended) + 1)
                yield kill, self._state(kill, self._unstable(kill), 1.0, rng)

    def newest(self) -> State:
        """What the folder holds at the end."""
        return self._state(NEVER, self._unstable(NEVER), 1.0, random.Random(0))

    def _stable(self, at: int, file: _File | None) -> int:
        """The time before which all that was done to a file is stable, or, where that is None, to names."""
        return max((flush.begin for flush in self.flushes if flush.end <= at and flush.file is file), default=0)

    def _unstable(self, at: int) -> Sequence[_Naming]:
        stable = self._stable(at, None)
        return [naming for naming in self.namings if naming.begin <= at and naming.end >= stable]

    def _subsets(self, at: int, rng: random.Random) -> list[Sequence[_Naming]]:
        """What a cut may leave of the changes of names that are not stable: all subsets of a few, else some."""
        unstable = self._unstable(at)
        if len(unstable) <= FEW:
            return [c for count in range(len(unstable) + 1) for c in itertools.combinations(unstable, count)]
        return [(), unstable, *([each for each in unstable if rng.random() < 0.5] for _ in range(1 << FEW))]

    def _state(self, at: int, kept: Sequence[_Naming], data: float, rng: random.Random) -> State:
        """`data`: how likely it is that a sector that is not stable is kept."""
        stable = self._stable(at, None)
        names = dict(self.names)
        for naming in self.namings:
            if naming.end < stable or naming in kept:
                naming.apply(names)
        files = list(dict.fromkeys(names.values()))
        contents = [_content(file, at, self._stable(at, file), data, rng) for file in files]
        return State({name: files.index(names[name]) for name in sorted(names)}, tuple(contents))


def _content(file: _File, at: int, stable: int, kept: float, rng: random.Random) -> bytes:
    newest = bytearray(file.start)
    versions: dict[int, list[bytes]] = {}  # of sectors that are not stable, the newest last
    sizes = [len(newest)]
    for write in file.writes:
        if write.begin > at:
            break
        sectors, is_stable = write.sectors(len(newest)), write.end < stable
        for sector in () if is_stable else sectors:
            versions.setdefault(sector, [_sector(newest, sector)])
        write.apply(newest)
        for sector in sectors:
            if is_stable:
                versions.pop(sector, None)
            else:
                versions[sector].append(_sector(newest, sector))
        sizes = [len(newest)] if is_stable else [*sizes, len(newest)]
    size = sizes[-1] if rng.random() < kept else sizes[0] if kept in (0, 1) else rng.choice(sizes)
    result = newest[:size].ljust(size, b"\0")
    for sector, old in versions.items():
        if rng.random() >= kept and sector * SECTOR < size:
            version = old[0] if kept == 0 else rng.choice(old[:-1])
            result[sector * SECTOR : (sector + 1) * SECTOR] = version[: size - sector * SECTOR]
    return bytes(result)


def _sector(content: bytearray, sector: int) -> bytes:
    return bytes(content[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")


@dataclass(frozen=True)
class State:
    """A folder: the number of the file that each name leads to, and the files."""

    names: dict[str, int]
    contents: tuple[bytes, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells states apart."""
        return tuple(self.names.items()), self.contents

    def put(self, folder: Path) -> None:
        """Make a folder hold this alone."""
        for path in list(folder.iterdir()):
            path.unlink()
        first: dict[int, Path] = {}
        for name, number in self.names.items():
            if number in first:
                os.link(first[number], folder / name)
            else:
                first[number] = folder / name
                first[number].write_bytes(self.contents[number])


def take(folder: Path) -> State:
    """What a folder holds."""
    numbers: dict[int, int] = {}
    contents: list[bytes] = []
    names = {}
    for path in sorted(folder.iterdir()):
        inode = path.stat().st_ino
        if inode not in numbers:
            numbers[inode] = len(contents)
            contents.append(path.read_bytes())
        names[path.name] = numbers[inode]
    return State(names, tuple(contents))


# --- noting it ------------------------------------------------------------------------------------

PATCHED: dict[str, ModuleType] = {
    **dict.fromkeys(("open", "pwrite", "ftruncate", "link", "rename", "unlink", "fsync", "fdatasync"), os),
    "fallocate": host,
}
"""The calls, and where they are looked for."""


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class _Recorder:
    """Takes the place of the calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = _inode(folder.stat())
        self.files: dict[tuple[int, int], _File] = {}  # by device and inode
        self.before = {name: getattr(where, name) for name, where in PATCHED.items()}
        names = {}
        for path in sorted(folder.iterdir()):
            file = self.files.setdefault(_inode(path.stat()), _File(path.read_bytes()))
            names[path.name] = file
        self.recording = Recording(names)

    def _name(self, path: str | Path) -> str:
        """The name in the folder; empty where it lies elsewhere."""
        folder, name = os.path.split(os.fspath(path))
        return name if _inode(os.stat(folder or ".")) == self._folder else ""

    def open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        call = self.before["open"]
        if not flags & os.O_CREAT or not (name := self._name(path)):
            return int(call(path, flags, *more, **named))
        assert flags & os.O_EXCL, f"{path}: whether it is new is not known"
        begin = self.recording.now()
        descriptor = int(call(path, flags, *more, **named))
        file = self.files[_inode(os.fstat(descriptor))] = _File(b"")
        self.recording.namings.append(_Naming(begin, self.recording.now(), file, "", name))
        return descriptor

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        begin, file = self.recording.now(), self.files.get(_inode(os.fstat(descriptor)))
        count = int(self.before["pwrite"](descriptor, data, offset))
        if file is not None and count:
            file.writes.append(_Write(begin, self.recording.now(), offset, bytes(memoryview(data)[:count])))
        return count

    def ftruncate(self, descriptor: int, size: int) -> None:
        begin, file = self.recording.now(), self.files.get(_inode(os.fstat(descriptor)))
        self.before["ftruncate"](descriptor, size)
        if file is not None:
            file.writes.append(_Write(begin, self.recording.now(), size, None))

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> bool:
        begin, status = self.recording.now(), os.fstat(descriptor)
        file = self.files.get(_inode(status))
        done = bool(self.before["fallocate"](descriptor, mode, offset, length))
        if file is not None and done and mode != host.FALLOC_FL_KEEP_SIZE:
            count = min(length, status.st_size - offset)
            if count > 0:
                file.writes.append(_Write(begin, self.recording.now(), offset, bytes(count)))
        return done

    def fsync(self, descriptor: int) -> None:
        self._flush("fsync", descriptor)

    def fdatasync(self, descriptor: int) -> None:
        self._flush("fdatasync", descriptor)

    def _flush(self, call: str, descriptor: int) -> None:
        begin, status = self.recording.now(), os.fstat(descriptor)
        self.before[call](descriptor)
        file = self.files.get(_inode(status))
        if file is not None or _inode(status) == self._folder:
            assert (file is None) == stat.S_ISDIR(status.st_mode)
            self.recording.flushes.append(_Flush(begin, self.recording.now(), file))

    def link(self, source: Any, target: Any) -> None:
        begin = self.recording.now()
        self.before["link"](source, target)
        self._named(begin, _inode(os.stat(target)), "", self._name(target))

    def rename(self, source: Any, target: Any) -> None:
        begin = self.recording.now()
        self.before["rename"](source, target)
        self._named(begin, _inode(os.stat(target)), self._name(source), self._name(target))

    def unlink(self, path: Any) -> None:
        begin, inode = self.recording.now(), _inode(os.lstat(path))
        self.before["unlink"](path)
        self._named(begin, inode, self._name(path), "")

    def _named(self, begin: int, inode: tuple[int, int], gone: str, new: str) -> None:
        if gone or new:
            self.recording.namings.append(_Naming(begin, self.recording.now(), self.files[inode], gone, new))


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[Recording]:
    """What the block does in the folder, which is complete at its end: it explains all that the folder then holds."""
    recorder = _Recorder(folder)
    for name, where in PATCHED.items():
        setattr(where, name, getattr(recorder, name))
    try:
        yield recorder.recording
    finally:
        for name, where in PATCHED.items():
            setattr(where, name, recorder.before[name])
    recording = recorder.recording
    for file in recorder.files.values():
        file.writes.sort(key=lambda write: write.begin)
    recording.ended = recorder.recording.now()
    everything = recording.newest()
    assert _by_name(everything) == _by_name(take(folder)), "something was done that was not noted"


def _by_name(state: State) -> dict[str, bytes]:
    return {name: state.contents[number] for name, number in state.names.items()}


# --- judging --------------------------------------------------------------------------------------


def try_cuts(
    recording: Recording,
    folder: Path,
    look: Callable[[int], None],
    *,
    limit: int,
    randoms: int,
    seed: int,
) -> int:
    """Put states that cuts leave into a folder, and have them looked at; how many different ones there are.

    At most `limit` of them, chosen at random. `look` gets the time of the cut. `randoms`: as for `Recording.states`.
    """
    rng = random.Random(seed)
    found: dict[object, tuple[int, State]] = {}
    for at, state in recording.states(rng, randoms):
        before, _ = found.get(state.key, (0, state))
        found[state.key] = max(at, before), state
    chosen = list(found.values())
    for at, state in chosen if len(chosen) <= limit else rng.sample(chosen, limit):
        state.put(folder)
        try:
            look(at)
        except Exception as error:
            error.add_note(f"cut at {at} of {recording.ended}, which has left {state.names}")
            raise
    return len(found)
