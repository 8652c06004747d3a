"""The map of a disk, for `fvdfs map`: what is stored in the image, what in its base, and what nowhere.

The disk is cut into cells of equal size; the map has, for each, how many bytes are *stored* (in the
image's own storage), in the *base*, or a *hole* (allocated nowhere: they read as zeros). Both what is stored and
what is a hole are *local*: not read from the base.
"""

from __future__ import annotations

import errno
from typing import Any

from fvdfs.format.header import SECTOR, ceil_div, round_up
from fvdfs.image.core import Core, LastExtents
from fvdfs.image.image import Image

CELLS = 1000  # of a map, at most: an extended attribute has to hold it (64 KiB)
BAR_CELLS = 64  # of a map shown as a bar, at most: a line of a terminal

MEANINGS = {
    "stored": "in the image's own storage",
    "base": "only in the base, and read from there",
    "hole": "stored nowhere: zeros, and as local as what is stored",
}
"""What the kinds of a map are, for a person."""


async def image_map(image: Image, cells: int = CELLS) -> dict[str, Any]:
    """The map of an open image, ready for JSON; sizes in bytes. Raises OSError, EIO where the image is damaged."""
    if image.damage:
        raise OSError(errno.EIO, f"{image.name}: {image.damage}")
    size = max(SECTOR, round_up(ceil_div(image.size, cells), SECTOR))
    found, known = [], LastExtents()
    for start in range(0, image.size, size):
        counts = {"stored": 0, "base": 0, "hole": 0}
        for run_start, run_stop, state in await image.extents(start, min(start + size, image.size), known):
            counts[state] += run_stop - run_start
        found.append([counts["stored"], counts["base"], counts["hole"]])
    return {"cell_size": size, "states": ["stored", "base", "hole"], "cells": found} | shares(image)


def shares(image: Core) -> dict[str, Any]:
    """How much of an open image is local, as every command shows it, ready for JSON; sizes in bytes.

    `local_share` is of what the disk can have from its base, `disk_local_share` of the whole disk: what lies past the
    base's end is local, too. Both are 1 where there is no base, or it is not needed any more.
    """
    base_size = min(image.header.base_img_size, image.size)
    missing = 0 if image.bitmap is None else image.base_range()[1] - image.local_of_base()
    return {
        "virtual_size": image.size,
        "base_size": base_size,
        "local_bytes": base_size - missing,
        "local_share": (base_size - missing) / base_size if base_size else 1.0,
        "disk_local_share": (image.size - missing) / image.size if image.size else 1.0,
    }


def totals(image_map: dict[str, Any]) -> dict[str, int]:
    """Bytes of the disk in each state."""
    return {state: sum(cell[at] for cell in image_map["cells"]) for at, state in enumerate(image_map["states"])}


def merged(image_map: dict[str, Any], cells: int) -> list[list[int]]:
    """The bytes in each state of at most so many cells."""
    found: list[list[int]] = image_map["cells"]
    per_cell = max(1, ceil_div(len(found), cells))
    return [
        [sum(column) for column in zip(*found[at : at + per_cell], strict=True)]
        for at in range(0, len(found), per_cell)
    ]
