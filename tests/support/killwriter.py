"""A program that writes to a disk until the disk fails, and keeps a journal outside of what it was promised.

The disk is a sequence of areas of 8 KiB. Each of a few threads has the areas of its own remainder, so that threads
share blocks and chunks of the image but no page. A write puts one generation number into some sectors of an area:
each sector is then its own number and the generation, over and over (`sector`). Some get a hole or zeros instead, by
fallocate. Before a write the journal gets

    w THREAD SECTOR COUNT GENERATION

with `z` for zeros, and after an fsync, or a close, that was answered, for all that the thread had written before,

    s THREAD

The journal's lines are single appends to a file: they outlive this program, and the process that serves the disk.
Now and then all threads close the disk together, so that the image is closed and opened under them, and a long range
becomes a hole (thread `m`). Some writes go past the end.

    python tests/support/killwriter.py DISK JOURNAL SEED FIRST-GENERATION
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Callable

SECTOR = 512
AREA = 16  # sectors
GROWTH = 6 * AREA  # sectors past the end, at each opening, that may be written
MAX_SIZE = 16 << 10  # sectors, from which on the disk stays as it is
THREADS = 3
LONG = 1 << 11  # sectors, the longest hole
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_ENTRY = struct.Struct("<QQ")


def sector(number: int, generation: int) -> bytes:
    """The content of a sector."""
    return _ENTRY.pack(number, generation) * (SECTOR // _ENTRY.size)


def generation_of(number: int, content: bytes) -> int | None:
    """The generation that a sector holds; None where it is none of ours, or parts of several."""
    found, generation = _ENTRY.unpack_from(content)
    return generation if found == number and content == sector(number, generation) else None


def make_zeros(disk: int, mode: int, first: int, count: int) -> None:
    """fallocate(2); offsets in sectors. Raises OSError."""
    if _libc.fallocate(disk, mode, ctypes.c_int64(first * SECTOR), ctypes.c_int64(count * SECTOR)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Writer:
    """The threads of one run."""

    def __init__(self, disk: str, journal: str, seed: int, generation: int) -> None:
        self._disk = disk
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._rng = random.Random(seed)
        self._generation = generation
        self._lock = threading.Lock()

    def run(self) -> None:
        """Write until the disk fails."""
        while True:
            until = time.monotonic() + self._rng.choice([0.01, 0.05, 0.2, 5])
            seeds = [self._rng.random() for _ in range(THREADS)]
            alive = [False] * THREADS

            def work(thread: int) -> None:
                alive[thread] = self._work(thread, random.Random(seeds[thread]), until)  # noqa: B023

            threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not all(alive) or not self._make_long_hole():
                return

    def _make_long_hole(self) -> bool:
        try:
            descriptor = os.open(self._disk, os.O_RDWR)
        except OSError:
            return False
        try:
            size = os.fstat(descriptor).st_size // SECTOR
            first = self._rng.randrange(size)
            count = min(self._rng.randrange(1, LONG), size - first)
            self._generation += 1
            self._note(f"z m {first} {count} {self._generation}\n")
            make_zeros(descriptor, _PUNCH_HOLE | _KEEP_SIZE, first, count)
            os.close(descriptor)
            self._note("s m\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            return False
        return True

    def _note(self, line: str) -> None:
        os.write(self._journal, line.encode())

    def _work(self, thread: int, rng: random.Random, until: float) -> bool:
        direct = thread == 0
        try:
            descriptor = os.open(self._disk, os.O_RDWR | (os.O_DIRECT if direct else 0))
        except OSError:
            return False
        try:
            self._write(thread, rng, descriptor, self._direct if direct else os.pwrite, until)
            os.close(descriptor)
            self._note(f"s {thread}\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            return False
        return True

    def _write(
        self, thread: int, rng: random.Random, disk: int, pwrite: Callable[[int, bytes, int], int], until: float
    ) -> None:
        size = os.fstat(disk).st_size // SECTOR
        areas = (size + (GROWTH if size < MAX_SIZE else 0)) // AREA
        near = rng.randrange(areas)
        last = 0
        while time.monotonic() < until:
            area = (
                near + rng.randrange(12) if rng.random() < 0.7 else rng.randrange(areas)
            ) // THREADS * THREADS + thread
            if area >= areas:
                near = rng.randrange(areas)
                continue
            first = rng.randrange(AREA)
            count = rng.randrange(1, AREA - first + 1)
            first += area * AREA
            if first >= size:
                count = (area + 1) * AREA - first  # so that the disk ends with an area
            modes = [_ZERO_RANGE] if first + count > size else [_ZERO_RANGE, _PUNCH_HOLE | _KEEP_SIZE]
            zeros = rng.random() < 0.25
            with self._lock:
                self._generation += 1
                last = self._generation
                self._note(f"{'z' if zeros else 'w'} {thread} {first} {count} {last}\n")
            if zeros:
                make_zeros(disk, rng.choice(modes), first, count)
            else:
                pwrite(disk, b"".join(sector(number, last) for number in range(first, first + count)), first * SECTOR)
            if rng.random() < 0.15:
                os.fsync(disk)
                self._note(f"s {thread}\n")

    @staticmethod
    def _direct(disk: int, data: bytes, offset: int) -> int:
        with mmap.mmap(-1, len(data)) as page:
            page[:] = data
            return os.pwritev(disk, [page], offset)


if __name__ == "__main__":
    Writer(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).run()
