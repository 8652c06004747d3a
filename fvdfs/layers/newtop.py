"""The new top of a snapshot: an empty image over the old one, which takes the writes from now on.

It is laid out as the old one is: flat or compact, chunks, blocks and journal of the same size. It differs in this:

- Its data is in its own file, also where the old one has a data file: the name of that is taken.
- Where the old one has no blocks, because it has no base, they are of 4 KiB, the unit in which guests write: then few
  writes have to read what they do not cover. Larger disks get larger ones, as the format's default says.
- It neither copies what it reads nor prefetches. What the old one stores is on this host already. What that still needs
  of its own base, the old one goes on to copy and to prefetch, as a base image (`ops/caches.py`), if it did so before.
  Copies in the new top would take their space twice, with all that the old one stores.
"""

from __future__ import annotations

import dataclasses
import os

from fvdfs.cow.writethrough import MODES
from fvdfs.daemon import undisturbed
from fvdfs.errors import UsageError
from fvdfs.format.creation import CreateOptions, default_block_size
from fvdfs.format.header import DEFAULT_PROFILE_ROOM, PAGE, Header
from fvdfs.format.migration import Record
from fvdfs.image.making import NewImage, new_image
from fvdfs.image.migration import read_record
from fvdfs.image.policy import FVD_FORMAT
from fvdfs.image.tree import identity_at
from fvdfs.store.host import HostFile, Identity
from fvdfs.store.placing import fill, make_unnamed, sync_folder, take_permissions
from fvdfs.store.references import LUKS


def refuse_losses(image: str, old: Header) -> None:
    """Raise UsageError where the new top would lose what the user has asked of the old one."""
    if old.has_base and old.write_updates_base_img in MODES:
        raise UsageError(f"{image}: is a cache that writes to its base (--update-base), which a snapshot would end")
    if old.data_file and old.data_file_fmt == LUKS:
        raise UsageError(
            f"{image}: its data is encrypted, and what a snapshot's new image stores would not be; make one that is: "
            f"fvdfs create NEW.fvd --base {os.path.basename(image)} --data-file NEW.luks --data-format luks"
        )


def new_top(old: Header, base: str) -> NewImage:
    """The image that stands on the one with this header, which is to have the name `base`. Raises UsageError."""
    size = old.virtual_disk_size
    had_metadata = bool(old.base_img) or old.compact
    options = CreateOptions(
        base_img=base,
        base_img_fmt=FVD_FORMAT,
        block_size=old.block_size or max(PAGE, default_block_size(size)),
        compact=old.compact,
        chunk_size=old.chunk_size if old.compact else 0,
        grow_unit=old.storage_grow_unit if old.compact else 0,
        journal_size=old.journal_size if had_metadata else None,
        profile_room=DEFAULT_PROFILE_ROOM,
    )
    return new_image(size, size, options)


def write_top(image: str, new: NewImage, old: HostFile, mtime_ns: int) -> tuple[HostFile, str]:
    """Write the new top, stable, beside the image: the file, open for writing, and where it lies. Blocks.

    It gets owner and permissions of the old file, the time at which the disk was written last, and the old one's part
    in a move to another host, which is the disk's. Raises UsageError where that must not be, FormatError, OSError.
    """
    new = dataclasses.replace(new, record=Record(None, read_record(old).outgoing))
    descriptor, place = make_unnamed(image)
    try:
        fill(descriptor, new.file_size, new.parts())
        try:
            take_permissions(descriptor, old.fileno())
        except PermissionError:
            raise UsageError(f"{image}: belongs to somebody else; make the snapshot as its owner, or as root") from None
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        os.fsync(descriptor)
        return HostFile(descriptor, image, writable=True), place
    except BaseException:
        os.close(descriptor)
        os.unlink(place)
        raise


def replace(place: str, image: str, identity: Identity) -> None:
    """Rename a new top to the image, which has this identity. Blocks.

    Raises UsageError where somebody has replaced the image, OSError.
    """
    if identity_at(image) != identity:
        raise UsageError(f"{image}: was replaced by somebody else meanwhile")
    os.rename(place, image)


def replace_by_new(image: str, new: NewImage, old: HostFile, mtime_ns: int) -> None:
    """Have a new top take the place of the image, stable, in one step. Blocks. Raises as `write_top` and `replace`."""
    with undisturbed():
        top, place = write_top(image, new, old, mtime_ns)
        top.close()
        try:
            replace(place, image, old.identity)
        except BaseException:
            os.unlink(place)
            raise
        sync_folder(os.path.dirname(image))
