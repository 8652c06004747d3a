"""`fvdfs amend`: change the header of an image that nobody uses. Blocks.

The fields that are changed together lie in one sector, which is written whole or not at all; it is stable before the
command ends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from fvdfs.commands.base import inspect_base
from fvdfs.daemon import run_loop
from fvdfs.errors import UsageError
from fvdfs.format.header import HEADER_SIZE, SECTOR, round_up
from fvdfs.image.chain import Layer, open_chain
from fvdfs.image.commit import Committer
from fvdfs.image.migration import refuse_moved
from fvdfs.image.policy import Policy
from fvdfs.store.references import BASE_FORMATS


@contextlib.contextmanager
def opened_to_amend(path: str) -> Iterator[Layer]:
    """The image alone, locked against everybody else. Raises UsageError, ImageBusy, ImageError, OSError."""
    layer = open_chain(path, Policy(), top_only=True).layers[0]
    try:
        if not layer.meta.writable:
            raise UsageError(f"{path}: no permission to write to it")
        layer.meta.lock(exclusive=True)
        layer.check_unchanged()
        refuse_moved(layer.meta)
        layer.meta.claim_device()
        yield layer
    finally:
        layer.meta.close()


def change_header(layer: Layer, **changes: int | str) -> None:
    """Change fields of the header, and make that stable. Raises OSError."""
    raw = layer.raw_header[: round_up(HEADER_SIZE, SECTOR)]
    committer = Committer(layer.header, raw, layer.meta, layer.meta, None, None)

    run_loop(functools.partial(committer.change_header, **changes))


def run(image: str, *, base_format: str, secret: str) -> int:
    """Have the image say of which format its base is.

    Raises UsageError where it has no base, or the base is not of this format; ImageBusy, ImageError, OSError.
    """
    with opened_to_amend(image) as layer:
        header = layer.header
        if base_format not in BASE_FORMATS:
            raise UsageError(f"--base-format {base_format}: is not known; known are {', '.join(BASE_FORMATS)}")
        if not header.base_img:
            raise UsageError(f"{image}: has no base image, and so nothing to amend; fvdfs info shows what an image is")
        if header.has_base:
            inspect_base(image, header.base_img, base_format, secret)
        change_header(layer, base_img_fmt=base_format)
    return 0
