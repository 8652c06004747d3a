"""What an image stores goes into the image that it stands on.

Each block that is local in the upper image, and so covers what lies below it, is written to the lower one, zeros as
holes; the lower one gets the size of the upper one first. What the upper one shows never changes meanwhile: no byte of
the lower one that shows through it is touched. So a merge may end at any moment, and be begun anew. What the lower one
shows is neither its old content nor the new until the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable

import trio

from fvdfs.cow.dirty import Dirty
from fvdfs.errors import UsageError, told
from fvdfs.image.core import LastExtents
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.image.tree import Node, Tree, identity_at
from fvdfs.store.base import together
from fvdfs.store.host import HostFile

PIECE = 4 << 20  # bytes that are copied at a time
STEP = 1 << 30  # bytes of the disk that are looked at at a time
PART = 256 << 10  # bytes that are copied again at a time
PARTS = 8  # side by side
ENOUGH = 16  # dirty units for which writers wait in the end: a few milliseconds
ROUND = 1.0  # seconds, in which less has to become dirty than is copied
SLICE = 0.01  # seconds for which writers are kept out
LONGEST_BREAK = 0.01  # seconds between two slices, at first; half as long after each
SHORTEST_BREAK = 0.0005  # what is written in one is little enough
Progress = Callable[[int, int], None]
"""Told bytes done, and bytes in all."""


def refuse_links(*paths: str) -> None:
    """Raise UsageError for what is no file itself: another one would take the place of the link. Blocks."""
    for path in paths:
        if os.path.islink(path):
            raise UsageError(f"{path}: is a link to {os.path.realpath(path)}; name that")


async def merge(upper: Image, lower: Image, progress: Progress) -> None:
    """Have the lower image, which is open for writing, show what the upper one shows, and make that stable.

    Raises OSError: EFBIG where the lower one cannot become as large.
    """
    with trio.CancelScope(shield=True):  # an image that is open is of use afterwards
        if lower.size != upper.size:
            await lower.resize(upper.size, shrink=True)
    known = LastExtents()
    for start in range(0, upper.size, STEP):
        await merge_part(upper, lower, start, start + STEP, known, progress)
    with trio.CancelScope(shield=True):
        await lower.fsync()
    progress(upper.size, upper.size)


async def merge_part(
    upper: Image, lower: Image, start: int, stop: int, known: LastExtents, progress: Progress = lambda done, total: None
) -> None:
    """Of bytes [start, stop), as far as the disk reaches, write to the lower image what the upper one stores.

    `known`: as for `Core.extents`. Raises OSError.
    """
    for run_start, run_stop, where in await upper.extents(start, min(stop, upper.size), known):
        if where == "hole":
            with trio.CancelScope(shield=True):
                await lower.zero(run_start, run_stop)
        elif where == "stored":
            for at in range(run_start, run_stop, PIECE):
                data = await upper.read(at, min(PIECE, run_stop - at))
                with trio.CancelScope(shield=True):
                    await lower.write(at, data)
                progress(at, upper.size)
        await trio.lowlevel.checkpoint()


async def catch_up(upper: Image, lower: Image, dirty: Dirty) -> None:
    """Copy what is written to the upper image meanwhile, until little is left. Raises OSError."""
    left = dirty.units + 1
    while ENOUGH < dirty.units < left:
        left = dirty.units
        until = trio.current_time() + ROUND
        while trio.current_time() < until and await copy_some(upper, lower, dirty):
            pass
    await hold_back(upper, lower, dirty)


async def hold_back(upper: Image, lower: Image, dirty: Dirty) -> None:
    """`catch_up` with writers that are faster: they are kept out for `SLICE` again and again, with shorter breaks."""
    pause = LONGEST_BREAK
    while dirty.units > ENOUGH and pause > SHORTEST_BREAK:
        left = dirty.units
        async with upper.without_writers():
            until = trio.current_time() + SLICE
            while trio.current_time() < until and await copy_some(upper, lower, dirty):
                pass
        await trio.sleep(pause)
        if dirty.units >= left:
            pause /= 2


async def copy_some(upper: Image, lower: Image, dirty: Dirty) -> bool:
    """Copy some of what is dirty, side by side; False where nothing is. Raises OSError."""
    parts = [part for _ in range(PARTS) if (part := dirty.take(PART)) is not None]
    if not parts:
        await trio.lowlevel.checkpoint()
        return False
    with trio.CancelScope(shield=True):
        await together([functools.partial(merge_part, upper, lower, *part, LastExtents()) for part in parts])
    await trio.lowlevel.checkpoint()
    return True


@contextlib.asynccontextmanager
async def opened_to_merge(path: str, policy: Policy) -> AsyncIterator[tuple[Image, HostFile]]:
    """An image with all that it stands on, open for writing; and its file. Raises ImageError, OSError."""
    image = await open_image(path, policy, write=True)
    try:
        assert isinstance(image.meta, HostFile)
        yield image, image.meta
    finally:
        await image.close()


def users_of(tree: Tree, path: str) -> list[Node]:
    """The images that stand on the one at `path`. Raises UsageError where nobody can know them all."""
    for unknown, why in tree.unreadable.items():
        todo = "repair it, or move it elsewhere, first"
        raise UsageError(f"{unknown}: nobody knows what it stands on; {todo}: {told(why)}") from why
    return tree.children(path)


def data_file_of(tree: Tree, node: Node) -> str:
    """The path of the data file that belongs to this image alone; empty: it has none, or one that is not ours."""
    path = tree.data_file(node)
    if not os.path.isfile(path):
        return ""
    return path if os.path.dirname(os.path.realpath(path)) == os.path.realpath(tree.folder) else ""


def remove_data_file(path: str) -> None:
    """Remove the data file of an image that is gone. Blocks."""
    if path and identity_at(path):
        os.unlink(path)
