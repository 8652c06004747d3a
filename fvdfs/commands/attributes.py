"""Reading and setting the extended attributes through which a mount is seen and steered from outside. Blocks."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fvdfs.errors import ImageBusy, NotFvd, UsageError, named
from fvdfs.mounts import DEAD, mount_at, refuse_dead, user_name
from fvdfs.store.references import PROBE_SIZE, detect
from fvdfs.xattrs import STATUS

_NOT_OURS = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Errors of the system about this raw file, in words that say what is wrong, where that is known."""
    try:
        with named(path):
            yield
    except OSError as error:
        if error.errno in _NOT_OURS:
            raise _not_ours(path) from None
        if error.errno == errno.ENOENT:
            raise UsageError(f"{path}: {why_missing(path) or 'there is no such file'}") from None
        if error.errno in DEAD:
            refuse_dead(path)
        if error.errno == errno.EACCES and (whose := mounted_by(os.path.dirname(os.path.abspath(path)))):
            raise UsageError(f"{path}: permission denied; {whose}") from error
        if error.errno == errno.EBUSY:
            raise ImageBusy(path, "its image is open in another mount or process; close it there first") from error
        raise


def mounted_by(point: str) -> str:
    """Who has mounted fvdfs there for himself alone, and how others reach it; empty: nobody else has."""
    mount = mount_at(point)
    if mount is None or not mount.is_ours or "allow_other" in mount.options.split(","):
        return ""
    if (uid := mount.owner("user_id")) == os.getuid():
        return ""
    who = user_name(uid)
    return f"{who} has mounted it: ask as {who}, or have it mounted with --allow-other"


def why_missing(raw: str) -> str:
    """Why the mount does not show an image as this raw file; empty: it does not say, or there is no such image."""
    try:
        refused = facts(os.path.dirname(os.path.abspath(raw)), STATUS).get("refused", [])
    except (OSError, UsageError):
        return ""
    image = f"{os.path.basename(raw).removesuffix('.raw')}.fvd"
    return next((f"does not appear: {each['reason']}" for each in refused if each["name"] == image), "")


def refuse_raw(path: str) -> None:
    """Raise UsageError for a raw file in a mount, in which a command has found no image."""
    if not path.endswith(".raw"):
        return
    try:
        image = facts(path, STATUS)["image"]
    except (OSError, UsageError):
        return
    raise UsageError(f"{path}: is a raw file in a mount; name its image: {image}")


def refuse_other(path: str) -> None:
    """Raise NotFvd for a file of another format, or a raw one, in which a command has found no image."""
    with open(path, "rb") as file:
        kind = detect(file.read(PROBE_SIZE))
    if kind is None and path.endswith(".raw"):
        raise NotFvd(path, f"is not an FVD image; if it is a raw disk, {_made_of(path)}")
    if kind not in (None, "fvd"):
        raise NotFvd(path, f"is a {kind} file, not an FVD image; qemu-img info shows it")


def unwritable(raw: str) -> UsageError:
    """Why the mount lets nobody write this raw file, as far as it says so. Raises OSError."""
    why = facts(raw, STATUS).get("move_reason")
    if not why and os.statvfs(raw).f_flag & os.ST_RDONLY:
        why = "cannot be written: the mount is read-only"
    return UsageError(f"{raw}: {why}" if why else f"{raw}: cannot be written: see the log of the mount")


@contextmanager
def or_by_mount() -> Iterator[None]:
    """An image that is busy may be one that a mount has open: say that its raw file can be named."""
    try:
        yield
    except ImageBusy as error:
        raise ImageBusy(error.image, f"{error.reason}, or name the raw file in its mount") from error


def flush(raw: str) -> None:
    """Have the mount get what programs have written and the kernel has gathered, and make it stable."""
    descriptor = os.open(raw, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def facts(path: str, attribute: str) -> dict[str, Any]:
    """What an attribute tells. Raises UsageError where somebody else has made it, OSError."""
    value = os.getxattr(path, attribute)
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _not_ours(path)
    return found


def _not_ours(path: str) -> UsageError:
    """Of what is no disk of a mount: what it may be instead."""
    if not os.path.isfile(path):
        return UsageError(f"{path}: is not a raw file in a mount of fvdfs; name one, or an image NAME.fvd")
    image = _image_name(path)
    there = f"its image may be {image}" if os.path.exists(image) else _made_of(path)
    return UsageError(f"{path}: is not a raw file in a mount of fvdfs; {there}")


def _image_name(raw: str) -> str:
    return raw.removesuffix(".raw") + ".fvd"


def _made_of(raw: str) -> str:
    return f"fvdfs convert {shlex.quote(raw)} {shlex.quote(_image_name(raw))} makes an image of it"
