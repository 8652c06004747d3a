"""`fvdfs convert`: the content of any image as another one.

Pieces of the source are read, several at a time, and written where the new image does not read so
already: zeros are not stored, and over a base only what differs from it is. Where both are stored
nowhere nothing is read.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from typing import Protocol

import trio

from fvdfs.alloc.formats import detect
from fvdfs.alloc.store import Buffer, HostFile, Store, open_path
from fvdfs.chain import FVD_FORMAT, Policy, open_image, open_other
from fvdfs.create import create_image
from fvdfs.errors import ImageError, UsageError
from fvdfs.header import SECTOR, CreateOptions, round_up
from fvdfs.image import Image

PIECE = 1 << 20  # bytes
UNIT = 64 << 10  # bytes; what is compared, and written or not
_ZEROS = bytes(PIECE)
WORKERS = 4
QEMU_TARGETS = ("qcow2", "vdi", "vmdk", "vhdx", "vpc", "qed")
Progress = Callable[[int, int], None]
"""Told bytes done, and bytes in all."""


class Side(Protocol):
    """What is converted from or to. Offsets in bytes; errors are OSError."""

    size: int

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on."""

    async def next_data(self, start: int, stop: int) -> int:
        """The first byte of [start, stop) that may be no zero; `stop` where there is none."""

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""

    async def flush(self) -> None:
        """Make it stable."""

    async def close(self) -> None:
        """Finish; what was written is then complete."""


class StoreSide:
    """A store as a side: a raw file, or another format behind one."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self.size = size

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await self._store.pread(memoryview(buffer), offset)
        return buffer

    async def next_data(self, start: int, stop: int) -> int:
        return await self._store.next_data(start, stop)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._store.pwrite(data, offset)

    async def flush(self) -> None:
        await self._store.flush()

    async def close(self) -> None:
        await self._store.aclose()


def format_of_file(path: str) -> str:
    """The format that a file's first bytes show; raw where they show none. Raises OSError."""
    store = open_path(path, writable=False)
    try:
        first = bytearray(SECTOR)
        store.pread_now(memoryview(first), 0)
        return detect(bytes(first)) or "raw"
    finally:
        store.close()


def format_of_name(path: str) -> str:
    """The format that a new file's name asks for."""
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    return ending if ending in (FVD_FORMAT, *QEMU_TARGETS) else "raw"


def exists(path: str) -> bool:
    """Whether there is a file of this name. (A tool that does one thing may wait for its disk.)"""
    return os.path.exists(path)


async def open_source(name: str, file_format: str) -> Side:
    """Open what is to be converted. Raises ImageError, OSError."""
    if file_format == FVD_FORMAT:
        return await open_image(name, Policy(writable=False, allowed_urls=("",)))
    if file_format == "raw" and exists(name):
        store: Store = open_path(name, writable=False)
    else:
        store = await open_other(name, file_format, Policy(allowed_urls=("",)), writable=False)
    return StoreSide(store, round_up(await store.size(), SECTOR))


async def open_target(
    path: str, file_format: str, size: int, options: CreateOptions, *, force: bool
) -> tuple[Side, list[str]]:
    """Make a new image of `size` bytes and open it; remarks for the user. Raises UsageError, ImageError, OSError."""
    if file_format == FVD_FORMAT:
        make = functools.partial(create_image, path, size, options, force=force)
        remarks = await trio.to_thread.run_sync(make)
        return await open_image(path, Policy(allowed_urls=("",)), write=True), remarks
    if options != CreateOptions():
        raise UsageError(f"{path}: options of FVD images do not go with the format {file_format}")
    if exists(path) and not force:
        raise UsageError(f"{path} exists already; choose another name, or --force to overwrite it")
    if file_format == "raw":
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.ftruncate(descriptor, size)
        return StoreSide(HostFile(descriptor, path, writable=True), size), []
    if file_format not in QEMU_TARGETS:
        known = ", ".join(("raw", FVD_FORMAT, *QEMU_TARGETS))
        raise UsageError(f"--target-format {file_format}: can make {known}")
    command = ["qemu-img", "create", "-q", "-f", file_format, "--", path, str(size)]
    try:
        done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    except FileNotFoundError:
        raise UsageError("qemu-img is missing: install the package qemu-utils") from None
    if done.returncode:
        raise UsageError(done.stdout.decode(errors="replace").strip())
    return StoreSide(await open_other(path, file_format, Policy(), writable=True), size), []


async def copy(source: Side, target: Side, progress: Progress) -> None:
    """Make the target's content the source's; the target is new, and at least as large. Raises OSError."""
    over_base = isinstance(target, Image) and target.bitmap is not None
    sides = (source, target) if over_base else (source,)
    size = source.size
    looking = trio.Lock()
    at = 0

    async def next_piece() -> tuple[int, int]:
        """The next part of the disk to look into; empty where there is none."""
        nonlocal at
        async with looking:
            data = min([await side.next_data(at, size) for side in sides]) if at < size else size
            start = max(at, data // UNIT * UNIT)
            at = min(start + PIECE, size)
            progress(at, size)
            return start, at

    async def work() -> None:
        while True:
            start, stop = await next_piece()
            if start >= stop:
                return
            data = await source.read(start, stop - start)
            if len(data) < stop - start:
                raise ImageError("source", f"it ends at {start + len(data)} bytes")
            old = await target.read(start, len(data)) if over_base else _ZEROS
            for begin, end in _differences(data, old):
                await target.write(start + begin, memoryview(data)[begin:end])
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(work)
    await target.flush()


def _differences(data: Buffer, old: Buffer) -> list[tuple[int, int]]:
    """The parts of `data`, in whole units, that differ from `old`, adjacent ones joined.

    Not by comparing memoryviews, which takes a hundred times as long.
    """
    parts: list[tuple[int, int]] = []
    for start in range(0, len(data), UNIT):
        stop = min(start + UNIT, len(data))
        if bytes(data[start:stop]) == bytes(old[start:stop]):
            continue
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts


async def convert(
    source_name: str,
    target_name: str,
    *,
    source_format: str = "",
    target_format: str = "",
    options: CreateOptions | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Make `target_name` an image with the content of `source_name`; remarks for the user.

    Formats that are not given are taken from the source's first bytes and the target's name. Raises
    UsageError, ImageError, OSError; a target that could not be completed is left incomplete.
    """
    if not source_format:
        source_format = format_of_file(source_name) if exists(source_name) else "raw"
    source = await open_source(source_name, source_format)
    try:
        target, remarks = await open_target(
            target_name,
            target_format or format_of_name(target_name),
            source.size,
            options or CreateOptions(),
            force=force,
        )
        try:
            await copy(source, target, progress)
        finally:
            with trio.CancelScope(shield=True):
                await target.close()
    finally:
        with trio.CancelScope(shield=True):
            await source.close()
    return remarks
