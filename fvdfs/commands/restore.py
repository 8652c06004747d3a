"""`fvdfs restore`: put what an export holds onto a copy of the earlier state, which becomes the exported one.

Before anything is written, the target has to look like the earlier state, or like what a restore of this export has
left that did not end: so a restore can be repeated after any crash. It grows first and shrinks last.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence

import trio

from fvdfs import daemon
from fvdfs.commands.convert import PIECE, Permission, Progress, in_workers, permitted
from fvdfs.commands.exports import Export, is_earlier_state, open_export
from fvdfs.commands.in_use import refuse_open
from fvdfs.commands.sides import StoreSide
from fvdfs.commands.terminal import progress_bar
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.format.header import SECTOR, round_up
from fvdfs.image.changes import Change, gaps
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image, open_other
from fvdfs.image.policy import FVD_FORMAT, format_by_name
from fvdfs.image.tree import Tree
from fvdfs.store.host import HostFile, open_path
from fvdfs.store.references import BASE_FORMATS, RAW

Target = Image | StoreSide


def run(name: str, target: str, *, target_format: str, options: Sequence[str], force: bool, secret: str) -> int:
    """Restore, with a progress bar. Raises as `restore`."""
    if target_format and target_format not in BASE_FORMATS:
        raise UsageError(f"--target-format {target_format}: is not known; known are {', '.join(BASE_FORMATS)}")
    if not os.path.exists(target):
        raise UsageError(f"{target}: there is no such file; copy the earlier state there first")
    allowed = permitted(options, secret)
    with progress_bar() as progress:
        daemon.run_loop(functools.partial(restore, name, target, target_format, allowed, force, progress))
    return 0


async def restore(
    name: str, target_name: str, target_format: str, allowed: Permission, force: bool, progress: Progress
) -> None:
    """Write the parts of an export to a target. `force`: whatever that holds.

    Raises UsageError where the target is not the earlier state, or others stand on it; ImageBusy, ImageError, OSError.
    """
    export = await open_export(name)
    try:
        if export.note is None and not force:
            raise UsageError(f"{name}: is an overlay that fvdfs export has not made; --force to put it onto any disk")
        with named(target_name):
            target = await _open_target(target_name, target_format, export, allowed)
        try:
            await _check(export, target, target_name, force=force)
            with named(target_name):
                await _write(export, target, progress)
        finally:
            with trio.CancelScope(shield=True), named(target_name):
                await target.close()
    finally:
        with trio.CancelScope(shield=True):
            await export.close()


async def _open_target(name: str, file_format: str, export: Export, allowed: Permission) -> Target:
    """Open what is written, and lock it. Raises UsageError, ImageBusy, ImageError, OSError."""
    if not file_format:
        file_format, _ = await trio.to_thread.run_sync(format_by_name, name)
    await trio.to_thread.run_sync(_refuse_ground, name, export)
    if file_format == FVD_FORMAT:
        return await open_image(name, allowed.policy(name), write=True)
    if file_format != RAW:
        other = await open_other(name, file_format, allowed.policy(name), writable=True)
        return StoreSide(other, round_up(await other.size(), SECTOR))
    store = await trio.to_thread.run_sync(_open_raw, name)
    return StoreSide(store, round_up(await store.size(), SECTOR))


def _open_raw(name: str) -> HostFile:
    store = open_path(name, writable=True)
    try:
        store.lock(exclusive=True)
        store.claim_device()
    except BaseException:
        store.close()
        raise
    return store


def _refuse_ground(name: str, export: Export) -> None:
    """Raise UsageError where other images stand on a file, ImageBusy where somebody has it open."""
    file = open_path(name, writable=False)
    file.close()
    if file.identity == export.file.identity:
        raise UsageError(f"{name}: is the export itself; name the copy of the earlier state")
    for image, part in Tree(os.path.dirname(os.path.realpath(name))).users(file.identity):
        if image.identity != export.file.identity:
            raise UsageError(f"{name}: is the {part} of {image.path}; restore onto a copy of it")
    refuse_open(name, file.identity)


async def _check(export: Export, target: Target, name: str, *, force: bool) -> None:
    """Raise UsageError unless the target can be the earlier state, or ImageError where it cannot have all parts."""
    is_device = isinstance(target, StoreSide) and target.store.fixed_size
    if is_device and target.size < export.size:
        raise ImageError(name, f"the device has {target.size} bytes, {export.size} are needed")
    note = export.note
    if force or note is None:
        return
    state = f"{note.since}, since which {export.name} was exported"
    sizes = {note.since_size, export.size}
    if target.size not in sizes and not (is_device and target.size >= max(sizes)):
        raise UsageError(f"{name}: has {target.size} bytes, and not {note.since_size} like {state}")
    with named(name):
        is_state = await is_earlier_state(export, target.read)
    if not is_state:
        raise UsageError(f"{name}: is not {state}; nothing was written. Name a copy of that state (or --force)")


async def _write(export: Export, target: Target, progress: Progress) -> None:
    """Write all parts, and make them stable. Raises ImageError, OSError."""
    held = target.size  # what is behind that reads as zeros
    if held < export.size:
        await target.resize(export.size)
    whole = sum(stop - start for start, stop, data in export.parts if data)
    done = 0
    todo = _pieces(export.parts)

    async def work() -> None:
        nonlocal done
        for start, stop in todo:
            await target.write(start, await export.read(start, stop - start))
            done += stop - start
            progress(done, whole)
            await trio.lowlevel.checkpoint()

    for start, stop in _zeros(export):
        if start < held:
            await target.zero(start, min(stop, held))
    await in_workers(work)
    await target.fsync()
    if isinstance(target, Image):
        if target.size > export.size:
            await target.resize(export.size, shrink=True)
            await target.fsync()
    elif target.size > export.size and not target.store.fixed_size:
        await target.resize(export.size)
        await target.fsync()


def _zeros(export: Export) -> Iterator[tuple[int, int]]:
    """The parts that become zeros, what lies past the end of the earlier state among them."""
    for start, stop, data in export.parts:
        if not data:
            yield start, stop
    if export.note is not None:
        for start, stop in gaps(((start, stop) for start, stop, _ in export.parts), export.size):
            if stop > export.note.since_size:
                yield max(start, export.note.since_size), stop


def _pieces(parts: Sequence[Change]) -> Iterator[tuple[int, int]]:
    for start, stop, data in parts:
        for at in range(start, stop, PIECE) if data else ():
            yield at, min(at + PIECE, stop)
