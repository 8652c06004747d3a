"""A disk goes back to a snapshot: a new, empty image over the snapshot takes the place of the disk's image.

It is written as `.NAME.*.part`, and renamed (`newtop`). What was written since the snapshot is lost with the old image,
and its data file. Snapshots that were made in between stay.
"""

from __future__ import annotations

import os

from fvdfs.errors import UsageError
from fvdfs.image.migration import refuse_on_template
from fvdfs.image.policy import Policy
from fvdfs.image.tree import SUFFIX, Tree
from fvdfs.layers.alone import loaded_alone
from fvdfs.layers.merging import data_file_of, refuse_links, remove_data_file, users_of
from fvdfs.layers.newtop import new_top, refuse_losses, replace_by_new
from fvdfs.layers.snapshot import MARK, opened_alone, path_of


async def revert(image: str, name: str, policy: Policy) -> str:
    """Revert a disk that nobody has open; the path of the snapshot.

    `name`: that of the snapshot, or its file; empty for what the disk stands on.

    Raises UsageError where that must not be, ImageBusy, also where somebody writes the snapshot, ImageError, OSError.
    """
    _begin(image)  # what is refused is not even replayed
    async with opened_alone(image, policy) as (old, file):
        tree = _begin(image)  # as it is now that nobody else can change the image
        if name:
            path = _path_of(image, name)
            base, target = os.path.basename(path), tree.at(path)
        else:
            base, target = old.header.base_img, next(iter(tree.chain(image)[1:]), None)
        if target is None:
            what = f"has no snapshot {name}" if name else "stands on no FVD image"
            raise UsageError(f"{image}: {what}; fvdfs snapshots {image} shows what there is")
        if target.identity == file.identity:
            raise UsageError(f"{image}: {target.path} is the same file, and no snapshot")
        async with loaded_alone(target.path, policy) as below:  # which nobody writes meanwhile
            refuse_losses(target.path, below.header)
            node = tree.at(image)
            data_file = data_file_of(tree, node) if node is not None else ""
            replace_by_new(image, new_top(below.header, base), file, target.mtime_ns)
            remove_data_file(data_file)
    return target.path


def _begin(image: str) -> Tree:
    refuse_links(image)
    tree = Tree(os.path.dirname(image))
    for user in users_of(tree, image):
        raise UsageError(f"{image}: {user.path} stands on it, and would change with it")
    refuse_on_template(image)
    return tree


def _path_of(image: str, name: str) -> str:
    """That of a snapshot beside the image, by name or by file: those of a disk that was renamed keep its former name.

    Raises UsageError.
    """
    if "/" not in name and not (name.endswith(SUFFIX) and os.path.exists(name)):
        return path_of(image, name)
    if os.path.realpath(os.path.dirname(name)) != os.path.realpath(os.path.dirname(image)):
        raise UsageError(f"{name}: is not beside {image}; name a snapshot in its folder")
    if MARK not in os.path.basename(name):
        raise UsageError(f"{name}: is no snapshot, whose name would be DISK{MARK}NAME{SUFFIX}")
    return os.path.join(os.path.dirname(image), os.path.basename(name))
