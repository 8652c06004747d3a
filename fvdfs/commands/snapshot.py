"""`fvdfs snapshot`: keep the present state of a disk, and go on with a new image over it. Blocks.

The process that serves a mount is told so, through an extended attribute; an image that is not mounted is changed here.
"""

from __future__ import annotations

import errno
import functools
import os

from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageError, UsageError
from fvdfs.image.policy import Policy
from fvdfs.layers.snapshot import make_snapshot, path_of
from fvdfs.xattrs import SNAPSHOT, STATUS


def run(disk: str, name: str) -> int:
    """Make a snapshot, and print its path. Raises UsageError, ImageBusy, ImageError, OSError."""
    if disk.endswith(".raw"):
        print(_ask_mount(disk, name))
        return 0
    with or_by_mount():
        print(run_loop(functools.partial(make_snapshot, disk, name, Policy())))
    return 0


def _ask_mount(raw: str, name: str) -> str:
    with explained(raw):
        # Another file system might take the attribute, and think nothing of it.
        image = facts(raw, STATUS)["image"]
        path_of(image, name or "1")
        _flush(raw)
        try:
            os.setxattr(raw, SNAPSHOT, name.encode())
        except OSError as error:
            if error.errno == errno.EROFS:
                raise UsageError(f"{raw}: cannot be written: see the log of the mount") from None
            if error.errno == errno.EPERM:
                raise UsageError(f"{raw}: only its owner, or root, may make a snapshot") from None
            refused = facts(raw, STATUS).get("snapshot_refused")
            if not refused:
                raise
            raise (UsageError(refused) if error.errno == errno.EINVAL else ImageError(raw, refused)) from error
        return str(facts(raw, STATUS)["snapshot"])


def _flush(raw: str) -> None:
    """Have the mount get what programs have written and the kernel has gathered."""
    descriptor = os.open(raw, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
