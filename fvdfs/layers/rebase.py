"""An image gets another base.

    1. What of the image shows through from its base, and is not the same in the new one, is copied into the image. So
       is all that the new one is too short for.
    2. Data, table and bitmap are stable, and the journal is empty.
    3. If the new base is shorter, the header takes no more than that from the base. Then bits past that are cleared.
    4. The image is closed, and the header names the new base.

The header of 3 and that of 4 change one sector each, which is written whole or not at all. The image shows the same at
every moment. A crash before 4 leaves it on its old base, with copies of it. Only 4 is done where the user says that the
new base is the old one, in another place (`rename_base`): that cannot be checked.

The format of the base stays: it is stated in another sector than the name, and a crash between the two would leave a
base that is taken for what it is not.
"""

from __future__ import annotations

import os
from typing import Protocol

from fvdfs.errors import UsageError
from fvdfs.format.header import SECTOR, Header, round_up, with_fields
from fvdfs.image.chain import top_layer
from fvdfs.image.image import Image
from fvdfs.image.migration import refuse_following
from fvdfs.image.policy import Policy
from fvdfs.image.reading import Readable
from fvdfs.image.tree import Tree, identity_at
from fvdfs.layers.delete import fits_sector
from fvdfs.layers.merging import PIECE, Progress, opened_to_merge, users_of
from fvdfs.layers.snapshot import opened_alone
from fvdfs.store.base import next_data
from fvdfs.store.locations import is_local
from fvdfs.store.references import RAW


class Disk(Readable, Protocol):
    """What an image is to stand on."""

    size: int
    """Bytes."""


def check_base(path: str, name: str, file_format: str) -> Header:
    """The header of an image that can be given what `name` means in it, of this format, as its base. Blocks.

    Raises UsageError where it cannot, ImageError, OSError.
    """
    header = top_layer(path, Policy()).header
    if not header.has_base:
        raise UsageError(f"{path}: stands on nothing, and needs no other base")
    old = header.base_img_fmt or RAW
    if old != (file_format or RAW):
        raise UsageError(
            f"{path}: its base is {old}, the new one {file_format}; only one of the same format can take its place"
        )
    if not fits_sector(header, name):
        raise UsageError(f"{path}: the name of the old or of the new base is too long to be changed at once")
    if is_local(name):
        below = Tree(os.path.dirname(path)).chain(os.path.join(os.path.dirname(path), name))
        if any(node.identity == identity_at(path) for node in below):
            raise UsageError(f"{path}: {name} stands on it, and cannot be its base")
    return header


async def rebase(path: str, name: str, new: Disk, policy: Policy, progress: Progress) -> None:
    """Have an image that nobody has open stand on what `name` means in it, which `new` reads, and show the same.

    `check_base` has found that it can. Raises ImageBusy, ImageError, OSError.
    """
    async with opened_to_merge(path, policy) as (image, file):
        refuse_following(file)
        mtime_ns = file.status().st_mtime_ns
        length = min(image.header.base_img_size, round_up(new.size, SECTOR))
        await _copy_differences(image, new, progress)
        await image.committer.checkpoint(clear_journal=True)
        if length < image.header.base_img_size:
            region = with_fields(image.header, base_img_size=length).bitmap_region
            bitmap_size = region.size if region is not None else image.header.bitmap_size
            await image.committer.change_header(base_img_size=length, bitmap_size=bitmap_size)
            assert image.bitmap is not None
            image.bitmap.shrink(image.header.blocks)
        await image.end_writing()
        await image.committer.change_header(base_img=name)
        await file.keep_mtime(mtime_ns)


async def rename_base(path: str, name: str, length: int, policy: Policy) -> None:
    """Have an image that nobody has open name another base, whatever that holds; `length`: bytes of it.

    Others may stand on the image only where the old base is no file that is there, and could be compared. `check_base`
    has found that it can be named. Raises UsageError where it is too short, ImageBusy, ImageError, OSError.
    """
    tree = Tree(os.path.dirname(path))
    node = tree.at(path)
    if node is None or node.base_identity is not None:
        for user in users_of(tree, path):
            raise UsageError(
                f"{path}: {user.path} stands on it, and might change with it; leave out --unsafe: both bases are there"
            )
    async with opened_alone(path, policy) as (image, file):
        refuse_following(file)
        if round_up(length, SECTOR) < image.header.base_size:
            raise UsageError(f"{path}: takes {image.header.base_size} bytes from its base, and {name} has {length}")
        mtime_ns = file.status().st_mtime_ns
        await image.committer.change_header(base_img=name)
        await file.keep_mtime(mtime_ns)


async def _copy_differences(image: Image, new: Disk, progress: Progress) -> None:
    """Copy the blocks that are missing, and are not the same in both bases, or past the end of the new one.

    Raises OSError.
    """
    block_size, base_size = image.base_range()
    at, length = 0, round_up(new.size, SECTOR)
    while True:
        start, stop = image.missing(at, PIECE)
        if start >= stop:
            return
        at = stop
        end, hole = await image.base_extent(start, stop)
        if hole and end >= stop <= new.size and await next_data(new, start, stop) >= stop:
            continue
        old = bytearray(stop - start)
        await image.read_base(memoryview(old), start)
        other = bytes(await new.read(start, stop - start)).ljust(stop - start, b"\0")
        if old != other or stop > length:
            for block in range(0, stop - start, block_size):
                part = memoryview(old)[block : block + block_size]
                if part != other[block : block + block_size] or start + block + len(part) > length:
                    await image.store_copy(start + block, part)
        progress(stop, base_size)
