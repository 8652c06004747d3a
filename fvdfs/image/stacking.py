"""An open image gets another one, empty, on top of it, while it is read and written: the swap of a snapshot.

Whoever has the disk open keeps the same `Image`. What it consists of (files, bitmap, table, committer) goes to a new
`Image`, its base from now on, and those of the new top take their place. The order (for the names see
`layers/snapshot.py`):

    1. What is pending is committed, while writers go on, so that there is little left to do in 3.
    2. The gate is closed; writes and copies that are under way end.
    3. What is pending is committed: all that was written is stable in the old image, whose journal says so. Without a
       journal it is closed.
    4. The new top gets the image's name.
    5. The parts are swapped, between two turns of the event loop, and the gate is opened.
    6. The name is made stable. Until then no flush is answered: a crash could still lead to the old image, which does
       not have what was written since.
    7. The old image is closed: clean, and read-only for its locks. A crash before that leaves its journal to be
       replayed by whoever reads it.

Up to 4 everything can fail, and the disk goes on as it was. A failure of 6 makes it read-only, one of 7 is only logged.

A read that began before 5 goes on with what it has found: the old image keeps its files open, and its content.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import trio

from fvdfs.cow.locks import Gate
from fvdfs.cow.planner import Geometry
from fvdfs.image.core import Core, OwnData
from fvdfs.store.host import HostFile

log = logging.getLogger(__name__)

WRITES_PATIENCE = 3.0  # seconds that writers are kept waiting for one that does not end

Image = TypeVar("Image", bound=Core)
Step = Callable[[], Awaitable[None]]


async def stack(
    image: Image,
    top: Core,
    name: str,
    make: Callable[..., Image],
    resizing: trio.Lock,
    gate: Gate,
    rename: Step,
    sync: Step,
) -> float:
    """Put `top` on an image that is open for writing; what the image was is called `name` from now on, and closed.

    How long writers were kept out, in seconds.
    `top`: an empty image of the same size, its base not set. `make`: makes the image below. `resizing`:
    `Resizer.lock`; `gate`: writers pass it. `rename`, `sync`: steps 4 and 6. Raises OSError, and as `rename`.
    """
    assert image.writable
    assert image.fetcher is None
    assert image.base_writer is None
    with trio.CancelScope(shield=True):
        async with resizing:
            for _ in range(2):  # the second has what came during the first
                await image.committer.commit()
            async with top.committer.held():
                async with closed_in_time(gate, image.name):
                    began = trio.current_time()
                    if image.header.journal_region is None:
                        await image.committer.close()
                    else:
                        await image.committer.commit()
                    await rename()
                    below = _swap(image, top, name, make)
                waited = trio.current_time() - began
                try:
                    await sync()
                except OSError as error:
                    image.committer.fail(f"the new name of what lies below cannot be made stable: {error}")
                    raise
        await _close(below)
    return waited


@contextlib.asynccontextmanager
async def closed_in_time(gate: Gate, name: str) -> AsyncIterator[None]:
    """`Gate.closed`. Raises OSError where a write does not end, as one that waits for a base that is away."""
    async with contextlib.AsyncExitStack() as stack:
        with trio.move_on_after(WRITES_PATIENCE) as waiting:
            await stack.enter_async_context(gate.closed())
        if waiting.cancelled_caught:
            raise OSError(errno.EAGAIN, f"{name}: a write to it does not end: does its base answer? try again then")
        yield


def _swap(image: Image, top: Core, name: str, make: Callable[..., Image]) -> Image:
    below = make(
        name=name,
        committer=image.committer,
        meta=image.meta,
        data=image.data,
        base=image.base,
        storage=image.storage,
        bitmap=image.bitmap,
        table=image.table,
        zeroes=image.zeroes,
        spawn=image.spawn,
        bases=image.bases,
    )
    if isinstance(below.meta, HostFile):
        below.meta.name = name
    image.committer, image.storage, image.bitmap, image.table = top.committer, top.storage, top.bitmap, top.table
    if image.base is not None:
        image.bases.exchange(image.base, image, below)
    image.bases.enter(below, image)
    image.meta, image.data, image.base = top.meta, top.data, below
    image.own = OwnData(image.data, image.storage, image.committer)
    image.geometry = Geometry(image.header.block_size, image.header.base_size)
    image.recorder = None
    return below


async def _close(below: Core) -> None:
    """Step 7."""
    try:
        await below.committer.close()
    except OSError as error:
        log.warning("%s: is not closed, so that its journal is replayed whenever it is read: %s", below.name, error)
    for store in {below.meta, below.data}:
        if isinstance(store, HostFile):
            await trio.to_thread.run_sync(store.lock, False)
