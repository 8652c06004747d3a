"""An image without what it stands on, for a change that needs nothing of that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fvdfs.errors import FormatError
from fvdfs.image.chain import open_alone
from fvdfs.image.core import damaged_layers
from fvdfs.image.image import Image
from fvdfs.image.loading import load_chain, lock_to_write
from fvdfs.image.policy import Policy


@asynccontextmanager
async def loaded_alone(path: str, policy: Policy) -> AsyncIterator[Image]:
    """The image, locked for reading, without what it stands on. Raises ImageBusy, ImageError, OSError."""
    image = await load_chain(open_alone(path, policy))
    try:
        for name, damage in damaged_layers(image):
            raise FormatError(name, f"{damage}; fvdfs check {name} says what is lost")
        yield image
    finally:
        await image.close()


async def begin_writing(image: Image, policy: Policy) -> None:
    """Lock it against everybody else, and have it open for writing; where it was not closed, its journal is replayed.

    Raises ImageBusy, ImageError, OSError.
    """
    await lock_to_write(image, policy)
    await image.begin_writing(accept_unclean=policy.accept_unclean)
