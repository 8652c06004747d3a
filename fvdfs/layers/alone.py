"""An image without what it stands on, for a change that needs nothing of that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fvdfs.image.chain import open_alone
from fvdfs.image.image import Image
from fvdfs.image.loading import load_chain, refuse_damaged
from fvdfs.image.policy import Policy


@asynccontextmanager
async def loaded_alone(path: str, policy: Policy) -> AsyncIterator[Image]:
    """The image, locked for reading, without what it stands on. Raises ImageBusy, ImageError, OSError."""
    image = await load_chain(open_alone(path, policy))
    try:
        refuse_damaged(image)
        yield image
    finally:
        await image.close()
