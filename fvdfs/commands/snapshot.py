"""`fvdfs snapshot`: keep the present state of a disk, and go on with a new image over it. Blocks."""

from __future__ import annotations

import functools

from fvdfs.daemon import run_loop
from fvdfs.image.policy import Policy
from fvdfs.layers.snapshot import make_snapshot


def run(disk: str, name: str) -> int:
    """Make a snapshot, and print its path. Raises UsageError, ImageBusy, ImageError, OSError."""
    print(run_loop(functools.partial(make_snapshot, disk, name, Policy())))
    return 0
