"""`fvdfs delete`, `commit`, `revert`: changes of what an image that is not open stands on. Blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fvdfs.commands.terminal import progress_bar
from fvdfs.daemon import run_loop
from fvdfs.image.policy import Policy
from fvdfs.layers.commit import commit
from fvdfs.layers.delete import delete
from fvdfs.layers.revert import revert
from fvdfs.mountoptions import listed, parse_mount_options


def run_delete(image: str, *, options: Sequence[str], secret: str) -> int:
    """Delete a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    with progress_bar() as progress:
        run_loop(functools.partial(delete, image, _policy(options, secret), progress))
    return 0


def run_commit(image: str, *, options: Sequence[str], secret: str) -> int:
    """Commit an image into its base. Raises UsageError, ImageBusy, ImageError, OSError."""
    with progress_bar() as progress:
        run_loop(functools.partial(commit, image, _policy(options, secret), progress))
    return 0


def run_revert(image: str, name: str) -> int:
    """Go back to a snapshot. Raises UsageError, ImageBusy, ImageError, OSError."""
    run_loop(functools.partial(revert, image, name, Policy()))
    return 0


def _policy(options: Sequence[str], secret: str) -> Policy:
    return Policy(allowed_urls=listed(parse_mount_options(options, ("allow_url",)), "allow_url"), secret_file=secret)
