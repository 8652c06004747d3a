"""Random operations on one file, each checked against a model of it in memory.

The file is read and written by calls, by direct I/O and through mappings; truncated; punched, zeroed, allocated and
copied within; asked for data and holes; flushed, dropped from the page cache, closed and opened again. Everything
follows from the seed, the file's first content and the `Target`. What is written says which operation wrote it and
where (`stamp`), so that a byte in a wrong place tells where it came from. On a mismatch `Mismatch` has the seed, the
number of the operation, and the last operations, of all and of those that touched the place.

    python tests/support/fsx.py FILE [--ops N] [--seed N] [--sector N] ...

exercises a file, which keeps its first content but for what is written.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # modes of fallocate
PAGE = mmap.PAGESIZE
MAX_LENGTH = 300 << 10  # bytes of most operations, at the most
CELL = 8  # bytes: the number of the operation, and the cell's own number
KEPT = 25  # operations in a report
CLOSING_TIME = 10.0  # seconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); Python has only posix_fallocate, which writes where the file system cannot. Raises OSError."""
    if _libc.fallocate(descriptor, mode, offset, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def stamp(number: int, start: int, stop: int) -> bytes:
    """What the operation writes to bytes [start, stop)."""
    first, end = start // CELL, -(-stop // CELL)
    cells = array("Q", range((number << 32) + first, (number << 32) + end)).tobytes()
    return cells[start - first * CELL : stop - first * CELL]


def seek(descriptor: int, at: int, what: int) -> int | None:
    """lseek(2) for data or a hole; None: past the end."""
    try:
        return os.lseek(descriptor, at, what)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


@dataclass(frozen=True)
class Target:
    """The file, and what it does otherwise than a file of the host."""

    path: Path
    limit: int
    """Bytes that it may have at the most."""
    shrink: bool = True
    """Whether it can be truncated to a smaller size."""
    sector: int = 1
    """What its size is a multiple of, after truncating and once it is closed."""
    direct: int = 512
    """What direct I/O is aligned to."""
    whole: int = 1
    """What its size is made a multiple of before it is closed."""
    chunk: int = 64 << 10
    """A unit of the storage, near whose borders much is done."""
    maps_hide: bool = False
    """Whether data that nobody has flushed may be told as a hole where it was written through the page cache, though
    the file is open for direct I/O alone: through a mapping, or after the flag was taken away."""
    refuses: frozenset[str] = frozenset()
    """The operations that fail with EOPNOTSUPP; no other may."""


class Mismatch(AssertionError):
    """The file is not what the model says."""


WEIGHTS = {
    "read": 12, "write": 16, "mapped_read": 5, "mapped_write": 7, "truncate": 3,
    "punch": 6, "zero": 4, "zero_keep": 4, "allocate": 2, "allocate_keep": 2, "copy": 4,
    "seek": 6, "walk": 1, "flush": 4, "drop": 2, "reopen": 3,
}  # fmt: skip
SESSIONS = ("cached", "direct", "direct", "both", "both")
"""How the file is opened: only for direct I/O (its mappings still use the page cache), only without, or twice."""


class Exerciser:
    """The file, open, and its model."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target = target
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._rng = random.Random(f"fsx {seed}")
        self._number = 0
        self._log: list[tuple[str, int, int]] = []
        self._open: list[tuple[int, bool]] = []  # descriptors: whether for direct I/O
        self._map: mmap.mmap | None = None  # kept over operations
        self._map_start = 0
        self._hidden = False  # `Target.maps_hide`: something may be
        self._toggled = False  # opened for direct I/O, but used without
        self._buffer = mmap.mmap(-1, MAX_LENGTH + 2 * target.direct)  # aligned, as direct I/O wants it
        self._model = bytearray(target.path.read_bytes())
        self._open_some_way()

    def run(self, ops: int, compare_every: int = 500) -> None:
        """Raises Mismatch, and OSError where an operation fails that must not."""
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        for _ in range(ops):
            self._number += 1
            name = self._rng.choices(names, weights)[0]
            try:
                getattr(self, f"_{name}")()
                self._check_size()
                if self._number % compare_every == 0:
                    self.compare()
            except OSError as error:
                problem = f"{name}: {error}"
            else:
                problem = ""
            if problem:
                self._fail(problem)
            self.counts[name] += 1
        self._reopen()
        self.compare()

    def close(self) -> None:
        """Let go of the file."""
        if self._map is not None:
            self._map.close()
            self._map = None
        for descriptor, _ in self._open:
            os.close(descriptor)
        self._open = []

    # --- where ------------------------------------------------------------------------------------

    def _place(self, stop: int, unit: int = 1, longest: int = MAX_LENGTH) -> tuple[int, int]:
        """A range [start, end) before `stop`, at multiples of the unit; empty where there is none."""
        rng = self._rng
        border = rng.choice((1, 512, PAGE, 64 << 10, self.target.chunk, max(len(self._model), 1)))
        start = rng.randrange(stop // border + 1) * border
        length = int(2 ** rng.uniform(0, (longest + 1).bit_length()))
        if rng.random() < 0.4:
            length = -(-length // border) * border
        if rng.random() < 0.4:
            start += rng.choice((-512, -1, 1, 512, rng.randrange(-700, 700), -length, -length // 2))
        start = min(max(start, 0), stop) // unit * unit
        end = min(start + min(length, longest), stop)
        return start, max(start, -(-end // unit) * unit if -(-end // unit) * unit <= stop else end // unit * unit)

    def _descriptor(self) -> tuple[int, int]:
        """One of the open ones, and what its I/O is aligned to."""
        descriptor, direct = self._rng.choice(self._open)
        return descriptor, self.target.direct if direct else 1

    # --- reading and writing ----------------------------------------------------------------------

    def _read(self) -> None:
        descriptor, unit = self._descriptor()
        start, stop = self._place(-(-len(self._model) // unit) * unit, unit)
        self._note(f"read {'direct' if unit > 1 else ''}", start, stop)
        if start < stop:
            self._same(start, self._pread(descriptor, start, stop), min(stop, len(self._model)))

    def _pread(self, descriptor: int, start: int, stop: int) -> bytes:
        with memoryview(self._buffer) as whole, whole[: stop - start] as piece:
            done = os.preadv(descriptor, [piece], start)
            return bytes(piece[:done])

    def _write(self) -> None:
        descriptor, unit = self._descriptor()
        start, stop = self._place(self.target.limit // unit * unit, unit)
        zeros = self._rng.random() < 0.08
        self._note(f"write {'direct' if unit > 1 else ''} {'zeros' if zeros else ''}", start, stop)
        if start == stop:
            return
        data = bytes(stop - start) if zeros else stamp(self._number, start, stop)
        self._hidden |= self._toggled
        with memoryview(self._buffer) as whole, whole[: stop - start] as piece:
            piece[:] = data
            done = os.pwritev(descriptor, [piece], start)
        if done != len(data):
            self._fail(f"wrote {done} bytes of {len(data)}")
        self._put(start, data)

    def _put(self, start: int, data: bytes) -> None:
        if start > len(self._model):
            self._model.extend(bytes(start - len(self._model)))
        self._model[start : start + len(data)] = data

    @contextlib.contextmanager
    def _mapped(self, write: bool) -> Iterator[tuple[mmap.mmap, int, int, int]]:
        """A mapping, where in the file it starts, and a range in it to read or write."""
        if self._map is None or self._rng.random() < 0.5:
            start, stop = self._place(len(self._model))
            start = min(start, len(self._model) - 1)
            stop = max(stop, start + 1)
            first = start // PAGE * PAGE
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            with mmap.mmap(self._descriptor()[0], stop - first, access=access, offset=first) as area:
                yield area, first, start, stop
            return
        first, end = self._map_start, min(self._map_start + len(self._map), len(self._model))
        start, stop = self._place(max(end - first, 0))
        yield self._map, first, first + start, first + stop

    def _mapped_read(self) -> None:
        if not self._model:
            return
        with self._mapped(False) as (area, first, start, stop):
            self._note("mapped read", start, stop)
            self._same(start, area[start - first : stop - first], stop)

    def _mapped_write(self) -> None:
        if not self._model:
            return
        with self._mapped(True) as (area, first, start, stop):
            sync = self._rng.random() < 0.4
            self._note(f"mapped write {'msync' if sync else ''}", start, stop)
            data = stamp(self._number, start, stop)
            area[start - first : stop - first] = data
            self._model[start:stop] = data
            self._hidden = True
            if sync:
                area.flush()

    # --- size and space ---------------------------------------------------------------------------

    def _truncate(self) -> None:
        lowest = 0 if self.target.shrink else len(self._model)
        size = self._place(self.target.limit)[0]
        size = len(self._model) + self._rng.randrange(700) if size < lowest else size
        self._truncate_to(min(size, self.target.limit))

    def _truncate_to(self, size: int) -> None:
        self._note("truncate", min(size, len(self._model)), max(size, len(self._model)))
        os.ftruncate(self._descriptor()[0], size)
        self._resize(self._rounded(size))

    def _rounded(self, size: int) -> int:
        return -(-size // self.target.sector) * self.target.sector

    def _resize(self, size: int) -> None:
        del self._model[size:]
        self._model.extend(bytes(size - len(self._model)))

    def _fallocate(self, name: str, mode: int, *, zeros: bool) -> None:
        whole = self._rng.random() < 0.02
        start, stop = (0, self.target.limit) if whole else self._place(self.target.limit, longest=2 * MAX_LENGTH)
        stop = max(stop, start + 1)
        if stop > self.target.limit:
            return
        self._note(name, start, stop)
        if not self._done(name, lambda: fallocate(self._descriptor()[0], mode, start, stop - start)):
            return
        if zeros:
            there = min(stop, len(self._model))
            self._model[start:there] = bytes(max(there - start, 0))
        if not mode & KEEP_SIZE:
            self._resize(max(stop, len(self._model)))

    def _done(self, name: str, call: object) -> bool:
        """Whether the operation is done; False: it is refused, as the target says that it is."""
        assert callable(call)
        try:
            call()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or name not in self.target.refuses:
                raise
            return False
        if name in self.target.refuses:
            self._fail("done, though it is said to be refused")
        return True

    def _punch(self) -> None:
        self._fallocate("punch", PUNCH_HOLE | KEEP_SIZE, zeros=True)

    def _zero(self) -> None:
        self._fallocate("zero", ZERO_RANGE, zeros=True)

    def _zero_keep(self) -> None:
        self._fallocate("zero_keep", ZERO_RANGE | KEEP_SIZE, zeros=True)

    def _allocate(self) -> None:
        self._fallocate("allocate", 0, zeros=False)

    def _allocate_keep(self) -> None:
        self._fallocate("allocate_keep", KEEP_SIZE, zeros=False)

    def _copy(self) -> None:
        source, target = self._descriptor(), self._descriptor()
        unit = max(source[1], target[1])  # the kernel reads and writes as a program with these descriptors would
        start, stop = self._place(len(self._model) // unit * unit, unit)
        to = self._place((self.target.limit - (stop - start)) // unit * unit, unit)[0]
        if start == stop or (start < to + stop - start and to < stop):
            return
        self._note(f"copy of {start}..{stop}", to, to + stop - start)
        data = bytes(self._model[start:stop])
        self._hidden |= self._toggled
        at = 0
        while at < len(data):
            done = os.copy_file_range(source[0], target[0], len(data) - at, start + at, to + at)
            if done == 0:
                self._fail(f"copied {at} bytes of {len(data)}")
            at += done
        self._put(to, data)

    # --- data and holes ---------------------------------------------------------------------------

    def _seeker(self) -> int:
        """A descriptor to ask."""
        descriptor = self._descriptor()[0]
        if self._hidden and self.target.maps_hide and all(direct for _, direct in self._open):
            self._note("fsync, to see all", 0, 0)
            os.fsync(descriptor)
            self._hidden = False
        return descriptor

    def _seek(self) -> None:
        """One look, at any place."""
        descriptor = self._seeker()
        at, size = self._place(self.target.limit)[0], len(self._model)
        self._note("seek", at, at)
        data, hole = seek(descriptor, at, os.SEEK_DATA), seek(descriptor, at, os.SEEK_HOLE)
        if at >= size:
            if (data, hole) != (None, None):
                self._fail(f"data at {data}, a hole at {hole}: there is nothing past the end, {size}")
            return
        self._is_hole(at, size if data is None else data)
        if hole is None or not at <= hole <= size:
            self._fail(f"a hole at {hole}: not between {at} and the end, {size}")
        if (data == at) == (hole == at):
            self._fail(f"{at} is data and hole at once, or neither: data at {data}, a hole at {hole}")
        if hole < size and self._model[hole]:
            self._fail(f"a hole at {hole}, which is no zero", hole)

    def _walk(self) -> None:
        """All data and all holes."""
        descriptor, size, at = self._seeker(), len(self._model), 0
        self._note("walk", 0, 0)
        while at < size:
            data = seek(descriptor, at, os.SEEK_DATA)
            self._is_hole(at, size if data is None else data)
            if data is None:
                break
            if data == at > 0:
                self._fail(f"{at} is said to be a hole, and then to be data")
            hole = seek(descriptor, data, os.SEEK_HOLE)
            if hole is None or not data < hole <= size:
                self._fail(f"a hole at {hole}: not behind the data at {data} and before the end, {size}")
            at = hole

    def _is_hole(self, start: int, stop: int) -> None:
        if not start <= stop <= len(self._model):
            self._fail(f"data at {stop}: not between {start} and the end, {len(self._model)}")
        if any(self._model[start:stop]):
            bad = start + next(i for i, byte in enumerate(self._model[start:stop]) if byte)
            self._fail(f"a hole from {start} to {stop}, in which there is data at {bad}", bad)

    # --- the page cache, and openings ---------------------------------------------------------------

    def _flush(self) -> None:
        call = self._rng.choice((os.fsync, os.fdatasync))
        self._note(call.__name__, 0, 0)
        call(self._descriptor()[0])

    def _drop(self) -> None:
        start, stop = self._place(len(self._model)) if self._rng.random() < 0.5 else (0, 0)
        self._note("drop", start, stop)
        descriptor = self._descriptor()[0]
        if self._rng.random() < 0.7:
            os.fsync(descriptor)
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _reopen(self) -> None:
        if len(self._model) % self.target.whole:
            self._truncate_to(-(-len(self._model) // self.target.whole) * self.target.whole)
        self._note("close", 0, 0)
        self.close()
        self._resize(self._rounded(len(self._model)))
        deadline = time.monotonic() + CLOSING_TIME
        while os.stat(self.target.path).st_size != len(self._model) and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel does not wait for the closing of a file
        self._open_some_way()

    def _open_some_way(self) -> None:
        session = self._rng.choice(SESSIONS)
        self._note(f"open {session}", 0, 0)
        self._hidden = self._toggled = False
        for direct in ([False] if session != "direct" else []) + ([True] if session != "cached" else []):
            self._open.append((os.open(self.target.path, os.O_RDWR | (os.O_DIRECT if direct else 0)), direct))
        if self._model and self._rng.random() < 0.5:
            start, stop = self._place(len(self._model))
            self._map_start = start // PAGE * PAGE
            if stop > self._map_start:
                self._map = mmap.mmap(self._descriptor()[0], stop - self._map_start, offset=self._map_start)
        if session == "direct" and self._rng.random() < 0.2:  # what is opened for direct I/O need not stay so
            descriptor = self._open[0][0]
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._toggled = True

    # --- judging ------------------------------------------------------------------------------------

    def compare(self) -> None:
        """The whole file, through an opening of its own."""
        found = self.target.path.read_bytes()
        self._same(0, found, len(self._model))
        if len(found) != len(self._model):
            self._fail(f"the file has {len(found)} bytes, not {len(self._model)}")

    def _check_size(self) -> None:
        for descriptor, _ in self._open:
            size = os.fstat(descriptor).st_size
            if size != len(self._model):
                self._fail(f"the size is {size}, not {len(self._model)}")

    def _same(self, start: int, found: bytes, stop: int) -> None:
        if found == self._model[start:stop]:
            return
        expected = bytes(self._model[start:stop])
        bad = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
        if not bad:
            self._fail(f"read {len(found)} bytes from {start} on, not {len(expected)}", start + len(found))
        at = start + bad[0]
        self._fail(
            f"{len(bad)} bytes of {start}..{stop} differ, from {at} to {start + bad[-1]}: "
            f"{_told(found, start, at)}, not {_told(expected, start, at)}",
            at,
        )

    def _note(self, what: str, start: int, stop: int) -> None:
        self._log.append((f"{self._number:6} {what.strip()}", start, stop))

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        lines = [f"{self.target}", f"seed {self._seed}, operation {self._number}: {what}", "the last operations:"]
        lines += [f"{text} {start}..{stop}" for text, start, stop in self._log[-KEPT:]]
        if at is not None:
            near = [f"{text} {start}..{stop}" for text, start, stop in self._log if start <= at < stop]
            lines += [f"the last ones at {at} (page {at // PAGE}, chunk {at // self.target.chunk}):", *near[-KEPT:]]
        raise Mismatch("\n".join(lines))


def _told(data: bytes, start: int, at: int) -> str:
    """Who has written what stands there."""
    cell = at // CELL * CELL - start
    if cell < 0 or cell + CELL > len(data):
        return f"byte {data[at - start]:#x}"
    value = int.from_bytes(data[cell : cell + CELL], sys.byteorder)
    if not value:
        return "zeros"
    return f"what operation {value >> 32} wrote at {(value & 0xFFFFFFFF) * CELL} ({data[cell : cell + CELL].hex()})"


def exercise(target: Target, ops: int, seed: int) -> Counter[str]:
    """Do so many operations; how many of each. Raises Mismatch."""
    exerciser = Exerciser(target, seed)
    try:
        exerciser.run(ops)
    finally:
        exerciser.close()
    return exerciser.counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Exercise one file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--ops", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, default=4 << 20, help="bytes; the largest size")
    parser.add_argument("--no-shrink", action="store_true", help="never truncate to a smaller size")
    parser.add_argument("--sector", type=int, default=1, help="bytes that sizes are rounded up to")
    parser.add_argument("--direct", type=int, default=512, help="alignment of direct I/O")
    parser.add_argument("--whole", type=int, default=1, help="bytes that the size is a multiple of when it is closed")
    parser.add_argument("--chunk", type=int, default=64 << 10)
    parser.add_argument("--maps-hide", action="store_true", help="flush what was mapped before asking for holes")
    parser.add_argument("--refuses", default="", help="operations that fail with EOPNOTSUPP, with commas between")
    given = parser.parse_args()
    target = Target(
        given.file,
        given.limit,
        shrink=not given.no_shrink,
        sector=given.sector,
        direct=given.direct,
        whole=given.whole,
        chunk=given.chunk,
        maps_hide=given.maps_hide,
        refuses=frozenset(filter(None, given.refuses.split(","))),
    )
    print(dict(exercise(target, given.ops, given.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
