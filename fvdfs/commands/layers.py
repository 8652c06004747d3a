"""`fvdfs delete`, `commit`, `flatten`, `revert`: changes of what an image stands on. Blocks.

None but `flatten` changes an image that is open; it has the mount prefetch all, and waits for that.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from fvdfs import mountoptions
from fvdfs.commands import prefetch
from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.commands.terminal import progress_bar
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageError, named
from fvdfs.image.policy import Policy
from fvdfs.layers.commit import commit
from fvdfs.layers.delete import delete
from fvdfs.layers.flatten import flatten
from fvdfs.layers.merging import Progress
from fvdfs.layers.revert import revert
from fvdfs.xattrs import STATUS

INTERVAL = 0.2  # seconds between looks at what prefetching has done
_ENDED = ("done", "closed", "off", "failed")
"""What a disk is of which nothing is being prefetched."""


def run_delete(image: str, *, options: Sequence[str], secret: str) -> int:
    """Delete a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    with named(image), progress_bar() as progress:
        run_loop(functools.partial(delete, image, _policy(options, secret), progress))
    return 0


def run_commit(image: str, *, options: Sequence[str], secret: str) -> int:
    """Commit an image into its base. Raises UsageError, ImageBusy, ImageError, OSError."""
    with named(image), progress_bar() as progress:
        run_loop(functools.partial(commit, image, _policy(options, secret), progress))
    return 0


def run_flatten(disk: str, *, options: Sequence[str], secret: str) -> int:
    """Have a disk let go of its base. Raises UsageError, ImageBusy, ImageError, OSError."""
    with progress_bar() as progress:
        if disk.endswith(".raw"):
            _flatten_in_mount(disk, progress)
        else:
            with named(disk), or_by_mount():
                run_loop(functools.partial(flatten, disk, _policy(options, secret), progress))
    return 0


def _flatten_in_mount(raw: str, progress: Progress) -> None:
    prefetch.run("start", raw)
    with explained(raw):
        while True:
            found = facts(raw, STATUS)
            local, size = found.get("local_bytes", 0), found.get("base_size", 0)
            progress(local, size)
            if found["state"] in _ENDED:
                if local < size:
                    why = found.get("reason") or found["state"]
                    raise ImageError(raw, f"{size - local} bytes are still in its base ({why}); see fvdfs status")
                return
            time.sleep(INTERVAL)


def run_revert(image: str, name: str) -> int:
    """Go back to a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    with named(image):
        run_loop(functools.partial(revert, image, name, Policy()))
    return 0


def _policy(options: Sequence[str], secret: str) -> Policy:
    return Policy(allowed_urls=mountoptions.allowed_urls(options), secret_file=secret)
