"""Whether the kernel gathers the writes of a mount (its write-back cache), or may pass disks through.

It does one of the two. With the cache a write that is not O_DIRECT returns at once, and the kernel passes it on later,
many small ones together. Passing through gains more, and for reads, too, but only for disks that have a data file of
their own. So, unless the user says otherwise, a mount has the cache where it shows no such disk.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import os

from fvdfs.cow.planner import Zeroes
from fvdfs.errors import FvdError
from fvdfs.image.chain import top_layer
from fvdfs.image.policy import RAW_FORMATS, Policy
from fvdfs.ops.folder import Folder
from fvdfs.ops.passthrough import NOT_ROOT
from fvdfs.store.paths import in_time

_WRITES_BACK = "-o writeback=on has the kernel gather writes; it does only one of the two"
_NO_DATA_FILES = (
    "no flat image here had a raw data file when it was mounted; mount the folder anew, or with -o writeback=off"
)


class Writeback(enum.Enum):
    """Whether the kernel gathers the writes of a mount before it passes them on."""

    AUTO = "auto"
    """Unless some disk of the folder may be passed through."""
    ON = "on"
    OFF = "off"


def obstacle(folder: Folder, writeback: Writeback, *, always_sync: bool) -> str:
    """Why no disk of a mount with these options is passed through; empty where some may be. Looks at the images."""
    zeroes = folder.policy.zeroes
    if zeroes is not Zeroes.OFF:
        return f"-o detect_zeroes={zeroes.value} has to see each write"
    if always_sync:
        return "-o sync=always has to see each write"
    if writeback is Writeback.ON:
        return _WRITES_BACK
    if writeback is Writeback.OFF:
        return ""
    if os.geteuid():
        return NOT_ROOT
    return "" if in_time(functools.partial(_has_data_files, folder), False) else _NO_DATA_FILES


def _has_data_files(folder: Folder) -> bool:
    """Whether any image of the folder has its data in a raw file of its own. Blocks."""
    with contextlib.suppress(OSError, FvdError):
        return any(_has_data_file(os.fsdecode(path), folder.policy) for path in folder.image_paths())
    return False


def _has_data_file(path: str, policy: Policy) -> bool:
    try:
        header = top_layer(path, policy).header
    except (OSError, FvdError):
        return False  # whoever lists the folder is told
    return bool(header.data_file) and header.data_file_fmt in RAW_FORMATS and not header.compact
