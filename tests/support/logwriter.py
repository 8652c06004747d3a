"""A machine without a guest: a program with QEMU's locks that writes a log to a disk, and reads what it has written.

The first part of the disk is a log: a ring of records of 4 KiB, each with its number and a checksum. After a record was
written and flushed, its number is appended to a journal outside of the disk, which is the machine's memory: whoever
goes on with the disk, on whichever host, goes on with the number that follows. Each round also reads a record that was
acknowledged at some time, and a block of the rest of the disk, which nobody writes and which says where it lies.

    python tests/support/logwriter.py DISK JOURNAL

It writes until SIGTERM comes; the exit code is 0 then, BAD where something was read that is old or foreign, and FAILED
where the disk has an error, whose name is printed.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import struct
import sys
import zlib
from pathlib import Path

from fvdfs.errors import ImageBusy
from fvdfs.store.filelock import FileLock

BLOCK = 4096  # bytes
RING = 64  # records
BLOCKS = 8192
"""Of the disk."""
BAD, FAILED = 3, 4
_HEAD = struct.Struct("<QI")


def record(number: int) -> bytes:
    """The record of this number."""
    body = random.Random(number).randbytes(BLOCK - _HEAD.size)
    return _HEAD.pack(number, zlib.crc32(body)) + body


def number_of(block: bytes) -> int | None:
    """The number of a record; 0: none was written there. None: it is damaged."""
    number, checksum = _HEAD.unpack_from(block)
    if not any(block):
        return 0
    return number if checksum == zlib.crc32(block[_HEAD.size :]) and block == record(number) else None


def _has_data(block: int) -> bool:
    return block // RING % 2 == 1


def still(block: int) -> bytes:
    """What lies in a block behind the log; every second stretch is a hole."""
    return record(1 << 40 | block) if _has_data(block) else bytes(BLOCK)


def fill(disk: Path) -> None:
    """Make it the disk of a machine that was never started."""
    with disk.open("r+b") as file:
        for first in range(RING, BLOCKS, RING):
            if _has_data(first):
                file.seek(first * BLOCK)
                file.write(b"".join(map(still, range(first, first + RING))))


def acknowledged(journal: Path) -> int:
    """The number of the last record that was flushed."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return int(lines[-1]) if lines else 0


def problem(block: int, content: bytes, last: int) -> str:
    """What is wrong with a block, where all records up to `last` were acknowledged, and perhaps one more written."""
    if block >= RING:
        return "" if content == still(block) else f"block {block} is foreign"
    oldest = last - (last - block) % RING  # the last number that was written there
    expected = {max(0, oldest), last + 1 if (last + 1) % RING == block else max(0, oldest)}
    found = number_of(content)
    return "" if found in expected else f"block {block} has record {found}, not {expected}; acknowledged: {last}"


def problems(disk: Path, journal: Path) -> list[str]:
    """What is wrong with a disk. Raises OSError."""
    last = acknowledged(journal)
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        parts = (_read(descriptor, first, RING) for first in range(0, BLOCKS, RING))
        blocks = (part[at : at + BLOCK] for part in parts for at in range(0, len(part), BLOCK))
        found = [problem(number, content, last) for number, content in enumerate(blocks)]
    finally:
        os.close(descriptor)
    return [text for text in found if text]


def _read(descriptor: int, first: int, count: int = 1) -> bytes:
    buffer = mmap.mmap(-1, BLOCK * count)
    assert os.preadv(descriptor, [buffer], first * BLOCK) == len(buffer)
    return bytes(buffer)


def _run(disk: str, journal: Path) -> None:
    descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT)
    FileLock(descriptor, disk).take(exclusive=True)
    last, buffer, chance = acknowledged(journal), mmap.mmap(-1, BLOCK), random.Random()
    log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        buffer[:] = record(last + 1)
        assert os.pwritev(descriptor, [buffer], (last + 1) % RING * BLOCK) == BLOCK
        os.fdatasync(descriptor)
        last += 1
        os.write(log, b"%d\n" % last)
        for block in (chance.randrange(RING), chance.randrange(RING, BLOCKS)):
            if wrong := problem(block, _read(descriptor, block), last):
                print(wrong, flush=True)
                sys.exit(BAD)


def _end(_number: int, _frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    try:
        _run(sys.argv[1], Path(sys.argv[2]))
    except ImageBusy:
        print("BUSY", flush=True)
        sys.exit(FAILED)
    except OSError as error:
        print(errno.errorcode[error.errno or 0], flush=True)
        sys.exit(FAILED)
