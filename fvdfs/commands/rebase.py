"""`fvdfs rebase`: give an image another base. Blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fvdfs import mountoptions
from fvdfs.commands.base import inspect_base, open_base
from fvdfs.commands.create import leads_outside
from fvdfs.commands.terminal import progress_bar
from fvdfs.daemon import complain, run_loop
from fvdfs.errors import named
from fvdfs.image.policy import Policy
from fvdfs.layers.merging import Progress
from fvdfs.layers.rebase import check_base, rebase, rename_base


def run(image: str, *, base: str, base_format: str, unsafe: bool, options: Sequence[str], secret: str) -> int:
    """Have an image stand on `base`, relative to its folder. Raises UsageError, ImageBusy, ImageError, OSError."""
    urls = mountoptions.allowed_urls(options)
    policy = Policy(allowed_urls=urls, secret_file=secret)
    found = inspect_base(image, base, base_format, secret)
    check_base(image, base, found.format)
    with named(image):
        if unsafe:
            run_loop(functools.partial(rename_base, image, base, found.length, policy))
        else:
            with progress_bar() as progress:
                run_loop(functools.partial(_rebase, image, base, found.format, policy, progress))
    if remark := leads_outside(image, base, found.path):
        complain(remark)
    return 0


async def _rebase(image: str, base: str, base_format: str, policy: Policy, progress: Progress) -> None:
    side, _ = await open_base(image, base, base_format, policy.secret_file)
    try:
        await rebase(image, base, side, policy, progress)
    finally:
        await side.close()
