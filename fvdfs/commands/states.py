"""A disk and its earlier states, as commands name them.

A snapshot of `vm.fvd` called N is the image `vm@N.fvd` beside it, on which `vm.fvd` stands. DISK@N names it, where DISK
is the image or, in a mount, its raw file; the image's own name does as well. Which state is below which, the chain says
and not the names.
"""

from __future__ import annotations

import os
from dataclasses import replace

from fvdfs.commands.convert import Permission
from fvdfs.commands.snapshots import image_of as image_file
from fvdfs.errors import ImageBusy, UsageError
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image
from fvdfs.image.policy import HostStore
from fvdfs.layers.snapshot import MARK, path_of, stem_of
from fvdfs.store.base import Store
from fvdfs.store.host import Identity, identity_of


def image_of(disk: str) -> str:
    """The path of the image DISK[@SNAPSHOT]. Raises UsageError where there is none, OSError."""
    path = image_file(without_mark(disk))
    if not os.path.lexists(path):
        raise UsageError(f"{disk}: there is no file {path}" if path != disk else f"{disk}: there is no such file")
    return path


def without_mark(disk: str) -> str:
    """The path of the image if DISK@SNAPSHOT is named, else what is named. Raises UsageError, OSError."""
    name, at, snapshot = disk.rpartition(MARK)
    is_raw = snapshot.endswith(".raw") and not os.path.lexists(name)  # that of a snapshot, in a mount
    if name and at and "/" not in snapshot and not is_raw and not os.path.lexists(disk):
        return snapshot_file(image_file(name), snapshot)
    return disk


def snapshot_file(image: str, snapshot: str) -> str:
    """The path of a snapshot of this image, which may be one itself. Raises UsageError."""
    folder, name = os.path.split(stem_of(image))
    return path_of(os.path.join(folder, name.partition(MARK)[0]), snapshot)


async def open_state(image: str, allowed: Permission) -> Image:
    """Open an image that `image_of` has found, for reading.

    Raises ImageBusy where it is running, with what to do about that; ImageError, OSError.
    """
    try:
        return await open_image(image, replace(allowed.policy(image), writable=False))
    except ImageBusy as error:
        if error.image != image:
            raise
        name = os.path.basename(stem_of(image))
        remedy = f"or take a snapshot (fvdfs snapshot MOUNTPOINT/{name}.raw NAME) and name that, {image}@NAME"
        raise ImageBusy(image, f"{error.reason}, {remedy}") from error


def find_below(image: Image, name: str, since: str) -> tuple[str, Image | Store]:
    """The path of a state of the disk, by its name as a snapshot or by its path, and what it is in the open chain.

    `name`: the path of the image. Raises UsageError where the disk does not stand on it.
    """
    path = since if "/" in since else snapshot_file(name, since)
    if not os.path.exists(path) and os.path.exists(since):
        path = since
    try:
        wanted = identity_of(os.stat(path))
    except (OSError, ValueError):
        raise UsageError(f"--since {since}: there is no file {path}") from None
    layer: Core | Store | None = image.base
    while layer is not None:
        if _identity(layer) == wanted:
            assert isinstance(layer, Image) or not isinstance(layer, Core)
            return path, layer
        layer = layer.base if isinstance(layer, Core) else None
    if _identity(image) == wanted:
        raise UsageError(f"--since {since}: this is {name} itself; name an earlier state")
    raise UsageError(f"--since {since}: {name} does not stand on {path}; fvdfs info {name} shows on what it does")


def _identity(layer: Core | Store) -> Identity | str | None:
    store = layer.meta if isinstance(layer, Core) else layer
    return store.identity if isinstance(store, HostStore) else None
