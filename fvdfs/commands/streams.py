"""Disks that come from standard input, and go to standard output: raw, from their first byte to the last.

A new image has to know its size before it is made: what comes through a pipe is kept in a file without a name, beside
the target, until all is there. Zeros take no space in it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable

import trio

from fvdfs.commands.sides import Side
from fvdfs.cow.extents import Extents
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.store.base import Buffer

STREAM = "-"
"""The name of standard input, as a source, and of standard output, as a target."""
INPUT, OUTPUT = "standard input", "standard output"
PIECE = 1 << 20  # bytes that are read and written at a time
UNIT = 64 << 10  # bytes; zeros of whole units are holes
_ZEROS = bytes(PIECE)


async def receive(folder: str) -> int:
    """A descriptor of what standard input has: of the file that it is, or of one in this folder that gets all of it.

    Raises UsageError where it is a terminal, OSError.
    """
    if os.isatty(0):
        raise UsageError(f"{INPUT}: is a terminal; give it a file, or the output of a program")
    kind = os.fstat(0).st_mode
    if (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) and not os.lseek(0, 0, os.SEEK_CUR):
        return os.dup(0)
    with named(folder or "."):
        descriptor, path = tempfile.mkstemp(prefix=".fvdfs-", dir=folder or ".")
        os.unlink(path)
        os.fchmod(descriptor, 0o666)  # whoever may read the target may read what came
        try:
            size = 0
            while data := await trio.to_thread.run_sync(os.read, 0, PIECE, abandon_on_cancel=True):
                await trio.to_thread.run_sync(_keep, descriptor, data, size)
                size += len(data)
            os.ftruncate(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _keep(descriptor: int, data: bytes, at: int) -> None:
    if not data.startswith(_ZEROS[: len(data)]):
        _write_all(descriptor, data, at)


def _write_all(descriptor: int, data: Buffer, at: int | None = None) -> None:
    """All of it, `at` that byte, or where the descriptor is."""
    view = memoryview(data)
    while view:
        done = os.write(descriptor, view) if at is None else os.pwrite(descriptor, view, at)
        view, at = view[done:], None if at is None else at + done


async def send(source: Side, progress: Callable[[int, int], None]) -> None:
    """Write all of a disk to standard output; a file there gets its holes. `progress`: as of `convert.copy`.

    Raises UsageError where that is a terminal, ImageError, OSError.
    """
    if os.isatty(1):
        raise UsageError(f"{OUTPUT}: is a terminal; send it to a file or to a program")
    is_file = stat.S_ISREG(os.fstat(1).st_mode) and not fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND
    start = os.lseek(1, 0, os.SEEK_CUR) if is_file else 0
    extents = Extents("convert", source.extent)
    at = 0
    while at < source.size:
        progress(at, source.size)
        stop, is_hole = await extents.blocks(at, min(at + PIECE, source.size), UNIT, source.size)
        if is_hole and is_file:
            at = stop
            continue
        stop = min(stop, at + PIECE)
        data: Buffer = _ZEROS[: stop - at]
        if not is_hole:
            began = trio.current_time()
            data = await source.read(at, stop - at)
            extents.was_read(stop - at, trio.current_time() - began)
            if len(data) < stop - at:
                raise ImageError("source", f"it ends at {at + len(data)} bytes")
        with named(OUTPUT):
            where = start + at if is_file else None
            await trio.to_thread.run_sync(_write_all, 1, data, where, abandon_on_cancel=True)
        at = stop
    progress(at, source.size)
    with named(OUTPUT):
        if is_file:
            os.ftruncate(1, start + source.size)
            os.lseek(1, start + source.size, os.SEEK_SET)
            await trio.to_thread.run_sync(os.fsync, 1)
