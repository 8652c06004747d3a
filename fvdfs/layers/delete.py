"""A snapshot is deleted: the image that stands on it takes over what it needs of it.

The image that stands on `vm@2.fvd` be `vm.fvd`. The order, each step stable before the next:

    1. `vm@2.fvd` gets a second name, `vm@2.fvd.deleted` (a hard link), which no mount shows.
    2. The header of `vm.fvd` names that as its base. Both names are short, so that this changes one sector.
    3. The name `vm@2.fvd` is removed: the snapshot is gone.
    4. What `vm.fvd` stores goes into `vm@2.fvd.deleted` (`merging`), whose file gets the owner, the permissions and the
       time of `vm.fvd`.
    5. `vm@2.fvd.deleted` is renamed to `vm.fvd`. If `vm.fvd` had a data file, that is removed.

`vm.fvd` is whole at every moment, and shows the same. A crash before 3 leaves two names of the snapshot, one before 5
a `vm.fvd` that stands on `vm@2.fvd.deleted`. `fvdfs delete vm@2.fvd` goes on where it ended.

A snapshot on which nothing stands is removed, with its data file. One on which several images stand has to stay.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator

import trio

from fvdfs.daemon import undisturbed
from fvdfs.errors import ImageBusy, UsageError
from fvdfs.format.header import SECTOR, Header, string_places
from fvdfs.format.migration import Record
from fvdfs.image.chain import open_alone
from fvdfs.image.image import Image
from fvdfs.image.migration import read_record, refuse_on_template, write_record
from fvdfs.image.policy import Policy
from fvdfs.image.tree import Node, Tree, identity_at
from fvdfs.layers.merging import (
    Progress,
    data_file_of,
    merge,
    opened_to_merge,
    refuse_links,
    remove_data_file,
    users_of,
)
from fvdfs.layers.snapshot import MARK, opened_alone
from fvdfs.store.host import HostFile
from fvdfs.store.placing import sync_folder, take_permissions

ENDING = ".deleted"


async def delete(path: str, policy: Policy, progress: Progress) -> None:
    """Delete a snapshot; nobody has open what stands on it.

    Raises UsageError where it must stay, ImageBusy, ImageError, OSError.
    """
    going, tree = path + ENDING, Tree(os.path.dirname(path))
    user = begin(tree, path, going, policy)
    if user is not None:
        await _merge(user, path, going, policy, progress)


def begin(tree: Tree, path: str, going: str, policy: Policy) -> Node | None:
    """The image that stands on it; where none does, it is removed. Blocks. Raises as `delete`."""
    if MARK not in os.path.basename(path):
        raise UsageError(f"{path}: is no snapshot, whose name would be DISK{MARK}NAME.fvd; to remove a disk: rm {path}")
    snapshot, rest = identity_at(path), identity_at(going)
    if snapshot is None and rest is None:
        folder = shlex.quote(os.path.dirname(path) or ".")
        raise UsageError(f"{path}: there is no such file; fvdfs snapshots {folder} shows which there are")
    if snapshot is not None and rest not in (None, snapshot):
        raise UsageError(f"{going}: is left of another one of that name; rename {path}, then delete it again")
    users = users_of(tree, path if snapshot is not None else going)
    for other in tree.names(snapshot) if snapshot is not None else ():
        if other != path and users:
            raise UsageError(f"{path}: is the same file as {other}, which would change; remove that name, or copy it")
        if other != path:
            os.unlink(path)  # a second name of the disk itself: an interrupted snapshot has left it
            sync_folder(os.path.dirname(path))
            return None
    if len(users) > 1:
        names = ", ".join(os.path.basename(user.path) for user in users)
        raise UsageError(f"{path}: {names} stand on it; delete all but one of them first, or let one go: fvdfs flatten")
    if users and not os.path.samefile(os.path.dirname(users[0].path) or ".", os.path.dirname(path) or "."):
        raise UsageError(f"{path}: {users[0].path} stands on it, and lies in another folder; move them into one")
    if not users:
        _remove(path, going, policy)
        return None
    refuse_on_template(users[0].path)
    return users[0]


@contextlib.contextmanager
def _held(path: str, going: str, user: Node | None, policy: Policy) -> Iterator[Tree]:
    """The snapshot, which nobody else has open, and on which only this image stands; who stands on what. Blocks.

    Raises UsageError, ImageBusy, ImageError, OSError.
    """
    name = path if os.path.lexists(path) else going
    chain = open_alone(name, policy)
    try:
        for store in chain.stores():
            if isinstance(store, HostFile):
                store.lock(exclusive=True)
        chain.layers[0].check_unchanged()
        yield look_again(path, name, user)
    finally:
        chain.close()


def look_again(path: str, name: str, user: Node | None) -> Tree:
    """Who stands on what, now that nobody else can change this image, under this name of the snapshot, or that. Blocks.

    Raises UsageError; ImageBusy where others stand on the snapshot than was seen before.
    """
    tree = Tree(os.path.dirname(path))
    if {other.identity for other in users_of(tree, name)} != ({user.identity} if user else set()):
        raise ImageBusy(path, "what stands on it has just changed; try again")
    return tree


def _remove(path: str, going: str, policy: Policy) -> None:
    """A snapshot on which nothing stands."""
    with _held(path, going, None, policy) as tree:
        node = tree.at(path)
        data_file = data_file_of(tree, node) if node is not None else ""
        with undisturbed():
            for name in (path, going):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            sync_folder(os.path.dirname(path))  # no crash leaves it without its data
            remove_data_file(data_file)


async def _merge(user: Node, path: str, going: str, policy: Policy, progress: Progress) -> None:
    folder = os.path.dirname(path)
    refuse_links(path, user.path)
    async with opened_alone(user.path, policy) as (upper, file):
        mtime_ns = file.status().st_mtime_ns
        with _held(path, going, user, policy) as tree:  # so that it is not itself being merged
            await remove_name(upper, path, going)
            data_file = data_file_of(tree, user)
        await file.keep_mtime(mtime_ns)
        async with opened_to_merge(going, policy) as (lower, below):
            await merge(upper, lower, progress)
            await lower.end_writing()
            with undisturbed():
                take_over(below, file, mtime_ns)
                os.rename(going, user.path)
                sync_folder(folder)
                remove_data_file(data_file)


async def remove_name(upper: Image, path: str, going: str) -> None:
    """Steps 1 to 3, from where they have ended. Raises UsageError, OSError."""
    await trio.to_thread.run_sync(_link, path, going)
    await _rename_base(upper, os.path.basename(going))
    await trio.to_thread.run_sync(_unlink, path)


def _link(path: str, going: str) -> None:
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # begun before
        os.link(path, going)
    sync_folder(os.path.dirname(path))


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_folder(os.path.dirname(path))


def take_over(new: HostFile, old: HostFile, mtime_ns: int) -> None:
    """Give the snapshot's file owner, permissions and time of the image whose place it takes, stable. Blocks.

    Of moves: where the snapshot comes from is so still; where the disk goes to, the image says.
    """
    take_permissions(new.fileno(), old.fileno())
    write_record(new, Record(read_record(new).incoming, read_record(old).outgoing))
    os.utime(new.fileno(), ns=(mtime_ns, mtime_ns))
    os.fsync(new.fileno())


async def _rename_base(image: Image, name: str) -> None:
    """Step 2. Raises UsageError where that would change more than a sector, OSError."""
    if image.header.base_img == name:
        return
    if not fits_sector(image.header, name):
        raise UsageError(f"{image.name}: the name of its base is too long to be changed at once; give it a shorter one")
    await image.committer.change_header(base_img=name)


def fits_sector(header: Header, name: str) -> bool:
    """Whether the header can get another name of the base by a change of a single sector, which is written whole."""
    at = next(offset for field, offset, _ in string_places() if field == "base_img")
    return all(at + len(os.fsencode(text)) < SECTOR for text in (header.base_img, name))
