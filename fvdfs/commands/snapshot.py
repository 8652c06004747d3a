"""`fvdfs snapshot`: keep the present state of a disk, and go on with a new image over it. Blocks.

The process that serves a mount is told so, through an extended attribute; an image that is not mounted is changed here.
The guest can be frozen meanwhile (`freeze.py`).
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence

from fvdfs.commands.attributes import explained, facts, flush, or_by_mount, unwritable
from fvdfs.commands.freeze import while_frozen
from fvdfs.commands.layers import policy_of, refuse_of_raw
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.layers.snapshot import make_snapshot, path_of
from fvdfs.xattrs import SNAPSHOT, STATUS


def run(disk: str, name: str, *, freeze: str = "", options: Sequence[str] = (), secret: str = "") -> int:
    """Make a snapshot, and print its path; `freeze`: the socket of the agent in the guest that uses the disk.

    Raises FvdError, OSError.
    """
    if disk.endswith(".raw"):
        refuse_of_raw(disk, options, secret)
        _refuse_what_cannot_be(disk, name)
        if freeze:
            while_frozen(freeze, functools.partial(_by_mount, disk, name))
        else:
            _by_mount(disk, name)
        return 0
    if freeze:
        raise UsageError(f"{disk}: nobody writes it meanwhile; with --freeze name the raw file that the guest uses")
    if os.path.isdir(disk):
        raise UsageError(f"{disk}: is a folder; name a disk")
    with named(disk), or_by_mount():
        print(run_loop(functools.partial(make_snapshot, disk, name, policy_of(options, secret))))
    return 0


def _refuse_what_cannot_be(raw: str, name: str) -> None:
    with explained(raw):
        # Another file system might take the attribute, and think nothing of it.
        path_of(facts(raw, STATUS)["image"], name or "1")


def _by_mount(raw: str, name: str) -> None:
    with explained(raw):
        flush(raw)
        try:
            os.setxattr(raw, SNAPSHOT, name.encode())
        except OSError as error:
            if error.errno == errno.EROFS:
                raise unwritable(raw) from error
            if error.errno == errno.EPERM:
                raise UsageError(f"{raw}: only its owner, or root, may make a snapshot") from None
            refused = facts(raw, STATUS).get("snapshot_refused")
            if not refused:
                raise
            raise (UsageError(refused) if error.errno == errno.EINVAL else ImageError(raw, refused)) from error
        print(facts(raw, STATUS)["snapshot"])
