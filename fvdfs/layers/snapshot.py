"""A snapshot: the present state of a disk becomes a base that nobody writes, and a new top takes the writes.

The snapshot N of `vm.fvd` is the old file under the name `vm@N.fvd`; `vm.fvd` becomes a new, empty image over it
(`newtop`). The order, each step stable before the next:

    1. The new top, which names `vm@N.fvd` as its base, is written as `.vm.fvd.*.part`.
    2. `vm@N.fvd` becomes a second name (a hard link) of the old file.
    3. The new top is renamed to `vm.fvd`.

`vm.fvd` is whole at every moment: the old image until 3, the new one from then on, with the same content. A crash
before 2 leaves a file that no mount shows, one between 2 and 3 a second name of `vm.fvd` beside it. Such a name is no
snapshot: it shows what is written to the disk. The next snapshot takes it over, or removes it where it is to have
another name; so does `fvdfs delete`. `fvdfs snapshots` says that both are the same file.

The old image is closed, clean and stable, before 2. An open one is replaced by `ops/snapshots.py`, in the same order.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fvdfs.daemon import undisturbed
from fvdfs.errors import UsageError
from fvdfs.image.image import Image
from fvdfs.image.loading import make_writable
from fvdfs.image.policy import Policy
from fvdfs.image.tree import SUFFIX, Tree, identity_at
from fvdfs.layers.alone import loaded_alone
from fvdfs.layers.newtop import new_top, refuse_losses, replace, write_top
from fvdfs.store.host import HostFile, Identity
from fvdfs.store.placing import sync_folder

MARK = "@"
NAME_MAX = 255 - len(".deleted")  # bytes of a file name, which can be given this ending (`delete.py`)


def stem_of(image: str) -> str:
    """The path of an image without .fvd, which its snapshots' names begin with."""
    return image[: -len(SUFFIX)] if image.endswith(SUFFIX) else image


def path_of(image: str, name: str) -> str:
    """The path that this snapshot of an image is to have. Raises UsageError for what can be no name of one."""
    name = name.removesuffix(SUFFIX)
    if not name or "/" in name or not name.isprintable():
        raise UsageError(f"{name!r}: is no name of a snapshot; take letters, digits, dots and dashes")
    path = f"{stem_of(image)}{MARK}{name}{SUFFIX}"
    if len(os.fsencode(os.path.basename(path))) > NAME_MAX:
        raise UsageError(f"{name}: is too long for a name of a file; take a shorter one")
    return path


def snapshot_path(image: str, name: str, identity: Identity) -> str:
    """`path_of` what the user calls it, or else of the next number. Blocks. Raises UsageError where that is taken."""
    path = path_of(image, name or _next_number(image, identity))
    if os.path.lexists(path) and identity_at(path) != identity:
        raise UsageError(f"{path} exists already; choose another name: fvdfs snapshot {image} NAME")
    return path


def _next_number(image: str, identity: Identity) -> str:
    """One more than the highest there is; or what a snapshot that was interrupted has left."""
    highest = 0
    for path, name in _names(image):
        if identity_at(path) == identity:
            return name
        if re.fullmatch("[0-9]{1,9}", name):
            highest = max(highest, int(name))
    return str(highest + 1)


def _names(image: str) -> Iterator[tuple[str, str]]:
    """Path and name of what are called snapshots of this image."""
    folder, start = os.path.split(stem_of(image) + MARK)
    for name in sorted(os.listdir(folder or ".")):
        if name.startswith(start) and name.endswith(SUFFIX) and len(name) > len(start) + len(SUFFIX):
            yield os.path.join(folder, name), name[len(start) : -len(SUFFIX)]


def refuse_what_cannot_be(image: str) -> None:
    """Raise UsageError for an image that can have no snapshot: no regular file, a base of others. Blocks.

    Raises as `refuse_losses`; OSError.
    """
    status = os.lstat(image)
    over = f"fvdfs create NEW.fvd --base {os.path.basename(image)} --base-format fvd"
    if stat.S_ISLNK(status.st_mode):
        target = os.path.realpath(image)
        if stat.S_ISBLK(os.stat(image).st_mode):
            raise UsageError(f"{image}: lies on a device, which has no second name; make an image over it: {over}")
        raise UsageError(f"{image}: is a link to {target}; make a snapshot of that")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{image}: is no regular file, and has no second name; make an image over it: {over}")
    tree = Tree(os.path.dirname(image))
    if children := tree.children(image):
        raise UsageError(f"{image}: {children[0].path} stands on it, so it is a snapshot already; make one of that")
    if (node := tree.at(image)) is not None:  # else it cannot be opened either
        refuse_losses(image, node.header)


def add_name(image: str, snapshot: str, identity: Identity) -> None:
    """Step 2: give the image its name as a snapshot, and remove what interrupted ones have left. Blocks.

    Raises UsageError where the file system has no hard links, OSError.
    """
    try:
        os.link(image, snapshot)
    except FileExistsError:
        if identity_at(snapshot) != identity:
            raise UsageError(f"{snapshot} exists already; somebody else has made it meanwhile") from None
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise UsageError(f"{image}: its file system cannot give a file a second name (a hard link)") from None
        raise
    for path, _ in list(_names(image)):
        if path != snapshot and identity_at(path) == identity:
            os.unlink(path)
    sync_folder(os.path.dirname(image))


def remove_name(snapshot: str, identity: Identity) -> None:
    """Undo step 2, as far as that can be. Blocks."""
    if identity_at(snapshot) == identity:
        os.unlink(snapshot)


async def make_snapshot(image: str, name: str, policy: Policy) -> str:
    """Make a snapshot of an image that nobody has open; the path of the snapshot.

    Raises UsageError, ImageBusy, ImageError, OSError.
    """
    refuse_what_cannot_be(image)
    async with opened_alone(image, policy) as (old, file):
        path = snapshot_path(image, name, file.identity)
        new = new_top(old.header, os.path.basename(path))
        with undisturbed():
            top, place = write_top(image, new, file, file.status().st_mtime_ns)
            top.close()
            try:
                add_name(image, path, file.identity)
                try:
                    replace(place, image, file.identity)
                except BaseException:
                    remove_name(path, file.identity)
                    raise
            except BaseException:
                os.unlink(place)
                raise
            sync_folder(os.path.dirname(image))
    return path


@asynccontextmanager
async def opened_alone(path: str, policy: Policy) -> AsyncIterator[tuple[Image, HostFile]]:
    """An image without what it stands on, locked against everybody else, closed and clean; and its file.

    Where it was not closed, its journal is replayed first. Raises ImageBusy, ImageError, OSError.
    """
    async with loaded_alone(path, policy) as image:
        assert isinstance(image.meta, HostFile)
        mtime_ns = image.meta.status().st_mtime_ns
        await make_writable(image, policy)
        await image.end_writing()
        await image.meta.keep_mtime(mtime_ns)
        yield image, image.meta
