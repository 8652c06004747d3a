"""An open image goes on in other files, while it is read and written, and shows the same.

Whoever has the disk open, or stands on the image, keeps the same `Image`. What it consists of (files, bitmap, table,
committer) is exchanged for the parts of another one, which show the same. The order:

    1. The gate is closed; writes and copies that are under way end.
    2. The other parts get what was written last, and are made stable (`Other.finish`).
    3. Their file gets the image's name.
    4. The parts are exchanged, between two turns of the event loop, and the gate is opened.
    5. The name is made stable. Until then no flush is answered.
    6. Reads of the former parts end, and their files are closed.

Up to 3 everything can fail, and the image goes on as it was. A failure of 5 makes it read-only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from fvdfs.cow.locks import Gate
from fvdfs.cow.planner import Geometry
from fvdfs.image.core import Core, OwnData
from fvdfs.store.base import Store

log = logging.getLogger(__name__)

Step = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Other:
    """What an image is to go on in."""

    parts: Core
    """An image that shows the same over `base`, or will after `finish`."""
    base: Core | Store | None
    """What they stand on: that of the parts, or that of the image itself."""
    finish: Step
    """2."""
    rename: Step
    """3."""
    sync: Step
    """5."""


async def exchange(image: Core, other: Other, gate: Gate) -> tuple[float, Core]:
    """Steps 1 to 5: how long writers were kept out, in seconds, and the former parts. Raises OSError, as `rename`.

    Where `rename` has succeeded, they are exchanged.
    """
    parts = other.parts
    with trio.CancelScope(shield=True):
        async with AsyncExitStack() as until_stable:
            began = trio.current_time()
            async with gate.closed():
                await other.finish()
                await until_stable.enter_async_context(parts.committer.held())
                await other.rename()
                former = take_parts(image, parts)
                if other.base is not image.base:
                    _stand_on(image, other.base, parts)
            waited = trio.current_time() - began
            try:
                await other.sync()
            except OSError as error:
                parts.committer.fail(f"the new name of its file cannot be made stable: {error}")
                raise
    return waited, former


def take_parts(image: Core, parts: Core) -> Core:
    """Have the image consist of these; what it was, as an image that stands on nothing."""
    former = Core(
        name=image.name,
        committer=image.committer,
        meta=image.meta,
        data=image.data,
        base=None,
        storage=image.storage,
        bitmap=image.bitmap,
        table=image.table,
    )
    image.committer, image.storage, image.bitmap, image.table = (
        parts.committer, parts.storage, parts.bitmap, parts.table
    )  # fmt: skip
    image.meta, image.data = parts.meta, parts.data
    image.own = OwnData(image.data, image.storage, image.committer)
    image.geometry = Geometry(image.header.block_size, image.header.base_size)
    return former


def _stand_on(image: Core, base: Core | Store | None, parts: Core) -> None:
    """The parts were those of the image's base, on which it does not stand any more."""
    assert image.base is parts
    image.bases.drop(parts)
    if base is not None:
        image.bases.exchange(base, parts, image)
    image.base = base  # that of the parts stays: somebody may be on the way down


async def close_former(former: Core) -> None:
    """Step 6, when no read uses them any more; flushes that are under way end first."""
    with trio.CancelScope(shield=True):
        await former.storage.stop_growing()
        async with former.committer.held():
            for store in {former.meta, former.data}:
                try:
                    await store.flush()
                except OSError as error:  # nobody needs what is in it
                    log.info("%s: %s", former.name, error)
                await store.aclose()
