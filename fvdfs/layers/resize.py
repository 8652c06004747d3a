"""The size of a disk that is not open, and whether one may be cut: not while others stand on it."""

from __future__ import annotations

import os

from fvdfs.errors import UsageError
from fvdfs.format.header import SECTOR, round_up
from fvdfs.image.loading import make_writable
from fvdfs.image.policy import Policy
from fvdfs.image.tree import Tree
from fvdfs.layers.alone import loaded_alone
from fvdfs.layers.merging import users_of
from fvdfs.sizes import NewSize, human_size


def refuse_cut(image: str) -> None:
    """Raise UsageError where another image of the folder stands on this one, or may: it cannot be read. Blocks."""
    for user in users_of(Tree(os.path.dirname(image)), image):
        raise UsageError(f"{image}: {user.path} stands on it, and would lose what is cut off")


def judge(name: str, image: str, old: int, size: int, *, shrink: bool) -> None:
    """Raise UsageError for a size that the disk must not get. Blocks."""
    if size < old:
        if not shrink:
            raise UsageError(
                f"{name}: has {human_size(old)}; what lies past {human_size(size)} would be lost; add --shrink for that"
            )
        refuse_cut(image)


async def resize(path: str, wanted: NewSize, policy: Policy, *, shrink: bool) -> int:
    """Give the disk of an image that nobody has open this size, rounded up to a sector; the size that it has.

    Raises UsageError, ImageBusy, ImageError, OSError as `Image.resize`.
    """
    async with loaded_alone(path, policy) as image:
        await make_writable(image, policy)
        size = round_up(wanted.after(image.size), SECTOR)
        judge(path, path, image.size, size, shrink=shrink)
        if size != image.size:
            await image.resize(size, shrink=shrink)
        return image.size
