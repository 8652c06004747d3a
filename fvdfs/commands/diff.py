"""`fvdfs diff`: what of a disk has changed since an earlier state of it. Blocks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from fvdfs.commands.convert import Permission, permitted
from fvdfs.commands.states import find_below, image_of, open_state
from fvdfs.daemon import run_loop
from fvdfs.image.changes import Change, changes
from fvdfs.image.core import Core
from fvdfs.sizes import human_size


def run(disk: str, *, since: str, as_json: bool, options: Sequence[str], secret: str) -> int:
    """Print the changes of DISK[@SNAPSHOT]. Raises UsageError, and as `find_changes`."""
    image = image_of(disk)
    found = run_loop(functools.partial(find_changes, image, since, permitted(options, secret)))
    if as_json:
        extents = [{"start": start, "length": stop - start, "data": data} for start, stop, data in found.changes]
        sizes = {"virtual_size": found.size, "since_size": found.since_size}
        print(json.dumps({"image": image, "since": found.since, **sizes, "extents": extents}))
        return 0
    for start, stop, data in found.changes:
        print(f"{start:>16} {stop - start:>14}  {'data' if data else 'zero'}")
    stored = sum(stop - start for start, stop, data in found.changes if data)
    zeros = sum(stop - start for start, stop, data in found.changes if not data)
    print(f"data: {human_size(stored)}; zeros: {human_size(zeros)}")
    return 0


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of a disk of `size` bytes since a state, by its path, of `since_size` bytes; None: since nothing."""

    changes: list[Change]
    size: int
    since: str | None
    since_size: int | None


async def find_changes(image: str, since: str, allowed: Permission) -> Changes:
    """What has changed since that state, by its name or path; empty: all that the disk has allocated.

    Raises UsageError where it does not stand on that, ImageBusy, ImageError, OSError.
    """
    disk = await open_state(image, allowed)
    try:
        path, earlier = find_below(disk, image, since) if since else (None, None)
        found = [change async for change in changes(disk, earlier)]
        size = None
        if earlier is not None:
            size = earlier.size if isinstance(earlier, Core) else await earlier.size()
        return Changes(found, disk.size, path, size)
    finally:
        with trio.CancelScope(shield=True):
            await disk.close()
