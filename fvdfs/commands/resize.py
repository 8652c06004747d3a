"""`fvdfs resize`: change the size of a disk. Blocks.

The raw file in a mount is truncated, as any program may do it, after the mount has made room for that; an image that is
not mounted is changed here.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence

from fvdfs.commands.attributes import explained, facts, or_by_mount, unwritable
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.format.header import SECTOR, round_up
from fvdfs.image.policy import Policy
from fvdfs.layers.resize import judge, resize
from fvdfs.mountoptions import folders, parse_mount_options, program
from fvdfs.sizes import NewSize, human_size
from fvdfs.xattrs import ROOM, STATUS


def run(disk: str, wanted: NewSize, *, shrink: bool, options: Sequence[str], secret: str) -> int:
    """Change the size, and print what it is then. Raises UsageError, ImageBusy, ImageError, OSError."""
    given = parse_mount_options(options, ("base_path", "grow_command"))
    if disk.endswith(".raw"):
        if given or secret:
            raise UsageError(f"{disk}: -o and --secret are for images; what its mount may do was said when it was made")
        size = _by_mount(disk, wanted, shrink=shrink)
    else:
        folder = os.path.realpath(os.path.dirname(disk) or ".")
        policy = Policy(
            roots=(folder, *folders(given)),
            grow_command=program(given.get("grow_command", "none")),
            secret_file=secret,
        )
        with named(disk), or_by_mount():
            size = run_loop(functools.partial(resize, disk, wanted, policy, shrink=shrink))
    print(f"{disk}: {human_size(size)}")
    return 0


def _by_mount(raw: str, wanted: NewSize, *, shrink: bool) -> int:
    with explained(raw):
        image = facts(raw, STATUS)["image"]  # another file must not be cut
        old = os.stat(raw).st_size
        size = round_up(wanted.after(old), SECTOR)
        judge(raw, image, old, size, shrink=shrink)
        if size != old:
            try:
                if size > old:
                    os.setxattr(raw, ROOM, str(size).encode())
                    os.getxattr(raw, ROOM)
                os.truncate(raw, size)
            except OSError as error:
                raise _refusal(raw, image, size, error) or error from error
        return os.stat(raw).st_size


def _refusal(raw: str, image: str, size: int, error: OSError) -> Exception | None:
    """Why the mount has refused this size, in words; None: as the system says."""
    match error.errno:
        case errno.EPERM:
            return UsageError(f"{raw}: its mount lets no disk be cut: mount with -o shrink, or unmount and cut {image}")
        case errno.EROFS:
            return unwritable(raw)
        case errno.EFBIG:
            return UsageError(f"{raw}: cannot have {human_size(size)}: see the log of the mount")
        case errno.EBUSY:
            return ImageError(raw, f"{image} is in use elsewhere: see the log of the mount")
    return None
