"""An image is committed: what it stores goes into its base, which then shows the same, and the image becomes empty.

    1. What the image stores goes into the base (`merging`), and is stable there.
    2. A new, empty image over the base is written as `.NAME.*.part`, and renamed to the image (`newtop`). If the image
       had a data file, that is removed.

The image is whole at every moment, and shows the same. The base shows a mixture of old and new from 1 on; after a
crash, committing again ends it. Nothing else may stand on the base, since its content changes.
"""

from __future__ import annotations

import os

from fvdfs.errors import UsageError
from fvdfs.image.migration import refuse_on_template
from fvdfs.image.policy import Policy
from fvdfs.image.tree import Node, Tree
from fvdfs.layers.merging import (
    Progress,
    data_file_of,
    merge,
    opened_to_merge,
    refuse_links,
    remove_data_file,
    users_of,
)
from fvdfs.layers.newtop import new_top, refuse_losses, replace_by_new
from fvdfs.layers.snapshot import opened_alone


async def commit(path: str, policy: Policy, progress: Progress) -> str:
    """Commit an image into the FVD image that it stands on, whose path it returns; nobody has either open.

    Raises UsageError where that must not be, ImageBusy, ImageError, OSError.
    """
    begin(path)  # what is refused is not even replayed
    async with opened_alone(path, policy) as (upper, file):
        tree, node, base = begin(path)  # as it is now that nobody else can change the image
        refuse_losses(path, upper.header)
        data_file = data_file_of(tree, node)
        async with opened_to_merge(base, policy) as (lower, _):
            await merge(upper, lower, progress)
            await lower.end_writing()
            new = new_top(upper.header, upper.header.base_img)
            replace_by_new(path, new, file, file.status().st_mtime_ns)
        remove_data_file(data_file)
    return base


def begin(path: str) -> tuple[Tree, Node, str]:
    """The images of the folder, this one, and the path of the one that it stands on alone. Blocks.

    Raises UsageError where that cannot be changed, ImageError, OSError.
    """
    refuse_links(path)
    os.stat(path)
    tree = Tree(os.path.dirname(path))
    if path in tree.unreadable:
        raise tree.unreadable[path]
    chain = tree.chain(path)
    if len(chain) <= 1:
        raise UsageError(f"{path}: stands on no FVD image that it could be committed to; fvdfs convert makes a copy")
    refuse_on_template(path)
    node, base = chain[0], chain[0].base
    for other in (*users_of(Tree(os.path.dirname(base)), base), *users_of(tree, base)):
        if other.identity != node.identity:
            raise UsageError(f"{path}: {other.path} stands on {base}, too, whose content would change")
    return tree, node, base
