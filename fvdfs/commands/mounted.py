"""Images that a mount has open: which mount that is, and what it says of them. Blocks."""

from __future__ import annotations

import os

from fvdfs import mounts
from fvdfs.commands.attributes import facts
from fvdfs.errors import FvdError, ImageBusy
from fvdfs.store.mountinfo import MountPoint, mount_points
from fvdfs.xattrs import STATUS


def mount_of(folder: str) -> str:
    """The mount point of the mount that shows a folder, and answers us; empty: there is none."""
    real = os.path.realpath(folder or ".")
    for point in _mounts_of(real):
        try:
            if facts(point.path, STATUS).get("folder") == real:
                return point.path
        except (OSError, FvdError):  # dead, or of another user
            continue
    return ""


def raw_file(image: str, error: ImageBusy) -> str:
    """The raw file of an image in the mount that has it open, since it could not be opened here; empty: none says so.

    Raises ImageBusy where another user has mounted the folder: the error, and who that is.
    """
    folder, name = os.path.split(os.path.realpath(image))
    whose = ""
    for point in _mounts_of(folder):
        raw = os.path.join(point.path, name.removesuffix(".fvd") + ".raw")
        try:
            found = facts(raw, STATUS)
            if found["open"] and os.path.realpath(found["image"]) == os.path.join(folder, name):
                return raw
        except PermissionError:
            user = mounts.user_name(point.owner("user_id"))
            whose = f"{user} has mounted its folder at {point.path}: ask as {user}"
        except (OSError, FvdError):  # dead, or it does not appear
            continue
    if whose:
        raise ImageBusy(error.image, f"{error.reason}; {whose}") from error
    return ""


def _mounts_of(real: str) -> list[MountPoint]:
    """The mounts of a folder, which may be dead, or of other users."""
    try:
        return [point for point in mount_points() if point.is_ours and point.source == real]
    except OSError:
        return []
