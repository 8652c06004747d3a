"""Disks that are made, renamed and removed through the mount, where `-o create` and `-o remove` permit it.

A disk is made as an empty image: it has 0 bytes, and what it grows by reads as zeros, as with any new file. So `cp`,
`truncate` and `qemu-img create -f raw` find what they expect. With `-o new_base`, one that still holds nothing but
zeros when its maker has closed it becomes a clone of that template: `touch vm.raw` makes one of the template's size,
`truncate -s 40G vm.raw` one of 40 GiB. It must not come earlier: a copy skips what is a hole in its source, and has to
find zeros there; and QEMU writes zeros to the first sectors of what it makes.

Some programs give a new disk its size, close it, and open it once more to write to it; `qemu-img convert` leaves out
what is zeros then. A clone that was made of such a disk, and that nobody has written to, becomes empty again when the
process that made it opens it for writing.

No file takes the name of another, and none that other images stand on is removed or gets another name (`Tree`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

import trio

from fvdfs.errors import ImageBusy, NotPermittedHere, UsageError
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import SECTOR, round_up, with_fields
from fvdfs.format.profile import Extent
from fvdfs.image.making import NewImage, new_image
from fvdfs.image.migration import refuse_needed
from fvdfs.image.tree import Tree
from fvdfs.ops.folder import NAME_MAX, Folder
from fvdfs.ops.freshness import same_file, signature
from fvdfs.ops.inodes import Entry, image_name
from fvdfs.ops.processes import Process, lives, process_of
from fvdfs.store.host import open_path
from fvdfs.store.placing import fill, give_name, make_unnamed, sync_folder, take_permissions

log = logging.getLogger(__name__)

RENAME_NOREPLACE = 1
LARGEST_COMPACT = 2 << 40  # bytes that a new compact disk can grow to: its table, of 8 MiB, is sparse at first
SETTLING = 1.0  # seconds in which the kernel tells of the last close, unless the maker's children keep the disk open


@dataclass(frozen=True, slots=True)
class Template:
    """What new disks stand on."""

    options: CreateOptions
    length: int
    """Bytes."""
    profile: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Permitted:
    """What may be done to the disks of a mount."""

    create: bool = False
    """Make and rename them."""
    remove: bool = False
    compact: bool = False
    """How new ones are laid out."""
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class _Clone:
    """What a new disk became that its maker had given a size."""

    maker: Process
    status: os.stat_result
    size: int
    """Bytes."""


class Naming:
    """Makes, renames and removes the disks of a folder. All methods run in the event loop."""

    def __init__(self, folder: Folder, permitted: Permitted) -> None:
        self._folder = folder
        self._permitted = permitted
        self._tree: Tree | None = None
        self.may_be_made: set[bytes] = set()
        """Names of disks that a former daemon was asked to make (`device.py`): if they are there, they are made."""
        self._clones: dict[bytes, _Clone] = {}
        """By path; of makers that live, so that their number is bounded by theirs."""

    # --- making -----------------------------------------------------------------------------------

    async def create(self, name: bytes, uid: int, gid: int, thread: int) -> Entry:
        """Make an empty disk that belongs to this user, for a thread. Raises NotPermittedHere, UsageError, OSError."""
        if not self._permitted.create:
            raise NotPermittedHere("a disk cannot be made here: mount with -o create")
        path = self._path(name)
        maker = await trio.to_thread.run_sync(process_of, thread)
        again = name in self.may_be_made
        self.may_be_made.discard(name)
        try:
            await trio.to_thread.run_sync(lambda: _make(path, self._empty(0), uid, gid))
        except FileExistsError:
            if not again:
                raise
        entry = await self._blank(name)
        entry.maker = maker
        return entry

    async def _blank(self, name: bytes) -> Entry:
        """The disk of this name, which was made empty. Raises OSError."""
        entry = await self._folder.lookup(name)
        if entry is None:
            raise OSError(errno.EIO, f"{os.fsdecode(name)}: has just been made, and does not appear")
        entry.blank = self._permitted.template is not None
        return entry

    def _empty(self, size: int) -> NewImage:
        new = new_image(LARGEST_COMPACT, None, CreateOptions(compact=self._permitted.compact))
        return NewImage(with_fields(new.header, virtual_disk_size=size), new.profile, new.bitmap)

    async def open_to_write(self, entry: Entry, thread: int) -> None:
        """Before a disk is opened for writing: make a clone empty again for its maker.

        Raises OSError: ESTALE where it has, so that the kernel looks for the disk anew.
        """
        clone = self._clones.get(entry.path)
        if clone is None or await trio.to_thread.run_sync(process_of, thread) != clone.maker:
            return
        del self._clones[entry.path]
        async with entry.lock:
            if entry.opens or not self._folder.inodes.shows(entry):
                return
            if not await trio.to_thread.run_sync(self._make_empty_again, entry.path, clone):
                return
            self._folder.inodes.hide(entry)
        (await self._blank(entry.name)).maker = clone.maker
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _make_empty_again(self, path: bytes, clone: _Clone) -> bool:
        """Unless somebody has written to the clone, put another image there, or stands on it. Blocks.

        Raises OSError.
        """
        status = os.stat(path)
        untouched = same_file(status, clone.status) and status.st_mtime_ns == clone.status.st_mtime_ns
        if not untouched or self._look_at_tree().children(os.fsdecode(path)):
            return False
        _replace(path, status, self._empty(clone.size))
        return True

    async def until_settled(self, name: bytes) -> None:
        """Wait until a new disk that its maker has closed is what it is going to be."""
        file_name = image_name(name)
        entry = self._folder.inodes.at(os.path.join(self._folder.path, file_name)) if file_name else None
        if entry is not None and entry.blank and entry.settling is not None:
            with trio.move_on_after(SETTLING):
                await entry.settling.wait()

    async def settle(self, entry: Entry) -> None:
        """A new disk was closed: if it holds nothing but zeros, make it a clone. Failures are logged."""
        try:
            async with entry.lock:
                if entry.blank and not entry.opens and self._folder.inodes.shows(entry):
                    await self._stand_on_template(entry)
                    self._folder.inodes.hide(entry)
        except (OSError, UsageError) as error:
            log.error("%s: stays empty, and is no clone of the template: %s", os.fsdecode(entry.path), error)
        finally:
            if not entry.opens:
                entry.blank = False
                if entry.settling is not None:
                    entry.settling.set()
                    entry.settling = None

    async def _stand_on_template(self, entry: Entry) -> None:
        template = self._permitted.template
        assert template is not None
        size = entry.size or round_up(template.length, SECTOR)
        new = new_image(size, template.length, template.options, template.profile)
        status = await trio.to_thread.run_sync(lambda: _replace(entry.path, entry.status, new))
        makers = {clone.maker for clone in self._clones.values()}
        living = await trio.to_thread.run_sync(lambda: {maker for maker in makers if lives(maker)})
        self._clones = {path: clone for path, clone in self._clones.items() if clone.maker in living}
        if entry.size and entry.maker is not None:
            self._clones[entry.path] = _Clone(entry.maker, status, size)

    # --- other names, and none --------------------------------------------------------------------

    async def rename(self, old: bytes, new: bytes, flags: int) -> None:
        """rename(2), of an open disk, too. Raises NotPermittedHere, ImageBusy, OSError."""
        if not self._permitted.create:
            raise NotPermittedHere("a disk cannot be renamed here: mount with -o create")
        if flags & ~RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        path = self._path(new)
        entry = await self._entry(old)
        async with entry.lock:
            status = await trio.to_thread.run_sync(lambda: self._rename(entry, path, replace=not flags))
            self._folder.inodes.move(entry, path)
            if status is not None:
                entry.status = status

    def _rename(self, entry: Entry, path: bytes, *, replace: bool) -> os.stat_result | None:
        """Blocks. What the file is then; None where it is no more what was known of it."""
        tree = self._look_at_tree()
        _refuse_ground(tree, entry.path)
        before = os.stat(entry.path)
        data_file = ""
        if os.path.lexists(path):
            if not replace or tree.at(os.fsdecode(path)) is None:  # what is no image does not appear, but is there
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            if not self._permitted.remove:
                raise NotPermittedHere("a disk cannot be replaced by another one here: mount with -o remove, too")
            _refuse_ground(tree, path)
            _refuse_needed(path)
            data_file = _own_data_file(tree, path)
        give_name(os.fsdecode(entry.path), os.fsdecode(path), replace=replace and os.path.lexists(path))
        sync_folder(os.fsdecode(self._folder.path))
        _unlink_data(data_file)
        return os.stat(path) if entry.busy or signature(before) == signature(entry.status) else None

    async def remove(self, name: bytes) -> None:
        """unlink(2): who has the disk open keeps it. Raises NotPermittedHere, ImageBusy, OSError."""
        if not self._permitted.remove:
            raise NotPermittedHere("a disk cannot be removed here: mount with -o remove")
        entry = await self._entry(name)
        async with entry.lock:
            await trio.to_thread.run_sync(lambda: self._remove(entry.path))
            self._folder.inodes.hide(entry)

    def _remove(self, path: bytes) -> None:
        tree = self._look_at_tree()
        _refuse_ground(tree, path)
        _refuse_needed(path)
        data_file = _own_data_file(tree, path)
        os.unlink(path)
        sync_folder(os.fsdecode(self._folder.path))
        _unlink_data(data_file)

    def _look_at_tree(self) -> Tree:
        """Who stands on what now. Of a thousand images, only those that have changed are read. Blocks."""
        self._tree = Tree(os.fsdecode(self._folder.path), self._tree)
        return self._tree

    def _path(self, name: bytes) -> bytes:
        """The image file for a name in the mount. Raises NotPermittedHere, OSError(ENAMETOOLONG)."""
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        file_name = image_name(name)
        if file_name is None:
            raise NotPermittedHere("only files NAME.raw can be made here")
        return os.path.join(self._folder.path, file_name)

    async def _entry(self, name: bytes) -> Entry:
        entry = await self._folder.lookup(name)
        if entry is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return entry


# --- in a thread ----------------------------------------------------------------------------------


def _make(path: bytes, new: NewImage, uid: int, gid: int) -> None:
    """Write a new image, whole and stable before it has its name. Raises OSError: EEXIST where that is taken."""

    def give_to_maker(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_uid != uid or (status.st_gid != gid and not _gives_its_group(path)):
            os.fchown(descriptor, uid, -1 if _gives_its_group(path) else gid)

    _write(path, new, give_to_maker, replace=False)


def _gives_its_group(path: bytes) -> bool:
    return bool(os.stat(os.path.dirname(path)).st_mode & stat.S_ISGID)


def _replace(path: bytes, known: os.stat_result, new: NewImage) -> os.stat_result:
    """The same in place of an image that nobody has open; what is there then.

    Raises OSError: EBUSY where somebody has changed that.
    """
    old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if signature(os.fstat(old)) != signature(known):
            raise OSError(errno.EBUSY, "somebody else has changed it")
        _write(path, new, lambda descriptor: take_permissions(descriptor, old), replace=True)
        return os.stat(path)
    finally:
        os.close(old)


def _write(path: bytes, new: NewImage, set_permissions: Callable[[int], None], *, replace: bool) -> None:
    final = os.fsdecode(path)
    descriptor, place = make_unnamed(final)
    try:
        fill(descriptor, new.file_size, new.parts())
        set_permissions(descriptor)
        os.fsync(descriptor)
        give_name(place, final, replace=replace)
    except BaseException:
        os.unlink(place)
        raise
    finally:
        os.close(descriptor)
    sync_folder(os.path.dirname(final))


def _refuse_needed(path: bytes) -> None:
    """Raise MovedAway where a target on another host still reads the image of this name."""
    file = open_path(os.fsdecode(path), writable=False)
    try:
        refuse_needed(file)
    finally:
        file.close()


def _refuse_ground(tree: Tree, path: bytes) -> None:
    """Raise ImageBusy where other images stand on the one of this name."""
    above = [os.path.basename(node.path) for node in tree.children(os.fsdecode(path))]
    if above:
        who = f"{above[0]} stands" if len(above) == 1 else f"{above[0]} and {len(above) - 1} more stand"
        raise ImageBusy(os.fsdecode(path), f"{who} on it; it can be neither removed nor renamed")


def _own_data_file(tree: Tree, path: bytes) -> str:
    """The data file that goes with this image: a file beside it that no other image has; empty: none."""
    node = tree.at(os.fsdecode(path))
    if node is None or os.path.basename(node.header.data_file) != node.header.data_file:
        return ""
    found = tree.data_file(node)
    shared = not found or len(tree.names(node.identity)) > 1 or not stat.S_ISREG(os.lstat(found).st_mode)
    return "" if shared else found


def _unlink_data(path: str) -> None:
    """Its image is gone already, so that a crash leaves no image without its data."""
    if path:
        try:
            os.unlink(path)
        except OSError as error:
            log.error("%s: the data file of an image that was removed is left: %s", path, error.strerror)
