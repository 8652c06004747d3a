"""`fvdfs delete`, `commit`, `flatten`, `revert`: changes of what an image stands on. Blocks.

Where a mount has the disk open, it is told to do it, and shows how far it is: `delete` and `commit` by an attribute of
the mount point, `flatten` by having all prefetched.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fvdfs import mountoptions
from fvdfs.commands import prefetch
from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.commands.mounted import mount_of
from fvdfs.commands.states import without_mark
from fvdfs.commands.terminal import progress_bar
from fvdfs.daemon import run_loop
from fvdfs.errors import FvdError, ImageError, UsageError, named
from fvdfs.image.policy import Policy
from fvdfs.layers.commit import commit
from fvdfs.layers.delete import delete
from fvdfs.layers.flatten import flatten
from fvdfs.layers.merging import Progress
from fvdfs.layers.revert import revert
from fvdfs.xattrs import LAYERS, STATUS

INTERVAL = 0.2  # seconds between looks at what prefetching, or a merge, has done
_ENDED = ("done", "closed", "off", "failed")
"""What a disk is of which nothing is being prefetched."""
Change = Callable[[str, Policy, Progress], Awaitable[object]]


def run_delete(image: str, *, options: Sequence[str], secret: str) -> int:
    """Delete a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    return _run("delete", delete, image, options, secret)


def run_commit(image: str, *, options: Sequence[str], secret: str) -> int:
    """Commit an image into its base. Raises UsageError, ImageBusy, ImageError, OSError."""
    return _run("commit", commit, image, options, secret)


def _run(what: str, change: Change, image: str, options: Sequence[str], secret: str) -> int:
    """By the mount that has the disk open, if there is one; else here."""
    image = without_mark(image)
    folder, name = os.path.split(image)
    if image.endswith(".raw"):
        refuse_of_raw(image, options, secret)
        with explained(image):
            mountpoint = folder or "."
            folder, name = facts(mountpoint, STATUS)["folder"], name.removesuffix(".raw") + ".fvd"
            image = os.path.join(folder, name)
    else:
        mountpoint = mount_of(folder)
    with named(image), progress_bar() as progress:
        if not mountpoint or not _by_mount(what, mountpoint, name, progress):
            run_loop(functools.partial(change, image, policy_of(options, secret), progress))
    return 0


def _by_mount(what: str, mountpoint: str, name: str, progress: Progress) -> bool:
    """Have the mount do it; False where no disk that it has open needs that. Raises FvdError, OSError."""
    try:
        os.setxattr(mountpoint, LAYERS, f"{what} {name}".encode("utf-8", "surrogateescape"))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
            return False
        raise
    try:
        while True:
            found = _merge(mountpoint, name)
            progress(found["done"], found["total"])
            if found["state"] not in ("waiting", "running"):
                break
            time.sleep(INTERVAL)
    except KeyboardInterrupt:
        os.setxattr(mountpoint, LAYERS, f"stop {name}".encode("utf-8", "surrogateescape"))
        while _merge(mountpoint, name)["state"] in ("waiting", "running"):
            time.sleep(INTERVAL)
        raise
    if found["state"] == "failed":
        raise (UsageError if found["is_mistake"] else FvdError)(found["error"])
    if found["state"] == "stopped":
        raise ImageError(name, f"{what} was stopped by somebody else; call it again")
    return bool(found["state"] == "done")


def _merge(mountpoint: str, name: str) -> dict[str, Any]:
    for found in facts(mountpoint, LAYERS)["merges"]:
        if os.path.basename(found["image"]) == name:
            return dict(found)
    raise ImageError(name, f"the mount at {mountpoint} has been made anew meanwhile; see fvdfs snapshots")


def run_flatten(disk: str, *, options: Sequence[str], secret: str) -> int:
    """Have a disk let go of its base. Raises UsageError, ImageBusy, ImageError, OSError."""
    with progress_bar() as progress:
        if disk.endswith(".raw"):
            _flatten_in_mount(disk, progress)
        else:
            with named(disk), or_by_mount():
                run_loop(functools.partial(flatten, disk, policy_of(options, secret), progress))
    return 0


def _flatten_in_mount(raw: str, progress: Progress) -> None:
    prefetch.run("start", raw)
    with explained(raw):
        while True:
            found = facts(raw, STATUS)
            local, size = found.get("local_bytes", 0), found.get("base_size", 0)
            progress(local, size)
            if found["state"] in _ENDED:
                if local < size:
                    why = found.get("reason") or found["state"]
                    raise ImageError(raw, f"{size - local} bytes are still in its base ({why}); see fvdfs status")
                return
            time.sleep(INTERVAL)


def run_revert(image: str, name: str, *, options: Sequence[str] = (), secret: str = "") -> int:
    """Go back to a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    with named(image):
        run_loop(functools.partial(revert, image, name, policy_of(options, secret)))
    return 0


def policy_of(options: Sequence[str], secret: str) -> Policy:
    """What -o allow_url of a command, and its --secret, permit. Raises UsageError."""
    return Policy(allowed_urls=mountoptions.allowed_urls(options), secret_file=secret)


def refuse_of_raw(raw: str, options: Sequence[str], secret: str) -> None:
    """Raise UsageError where these are given for a raw file in a mount."""
    if options or secret:
        raise UsageError(f"{raw}: -o and --secret are for images; a mount has its own")
