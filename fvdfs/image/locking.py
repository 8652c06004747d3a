"""Locks on the files of images: shared while one is open, exclusive on its own files while it is written.

Which locks these are, ours and QEMU's, `store.filelock` says. Whoever writes only to keep copies gives way to others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import trio

from fvdfs.errors import ImageBusy, ImageError, NotPermitted
from fvdfs.image.chain import Layer
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.image.policy import HostStore
from fvdfs.store.base import Store
from fvdfs.store.host import HostFile

ASKING_TIME = 1.0  # seconds that another process may take to stop writing
ASKING_INTERVAL = 0.02  # seconds between attempts to lock


async def lock_for_reading(stores: Sequence[HostStore], layers: Sequence[Layer] = ()) -> None:
    """Lock all for reading, then check that the headers of these layers are as they were read.

    Who writes to one of them only to keep copies is asked to stop, for `ASKING_TIME`. Raises ImageBusy, OSError.
    """
    deadline = trio.current_time() + ASKING_TIME
    while True:
        try:
            await trio.to_thread.run_sync(_lock_for_reading_now, stores, layers)
            return
        except ImageBusy:
            if trio.current_time() > deadline or not await trio.to_thread.run_sync(_ask, stores):
                raise
        await trio.sleep(ASKING_INTERVAL)


def _lock_for_reading_now(stores: Sequence[HostStore], layers: Sequence[Layer]) -> None:
    for store in stores:
        store.lock(exclusive=False)
    for layer in layers:
        layer.check_unchanged()


def _ask(stores: Sequence[HostStore]) -> bool:
    """Ask whoever holds a lock to let us in; False where there are no such locks."""
    try:
        for store in stores:
            if isinstance(store, HostFile):
                store.file_lock.ask()
    except OSError:
        return False
    return True


async def lock_for_writing(image: Image) -> None:
    """Make the locks on the image's own files exclusive, all or none.

    Raises ImageBusy, or NotPermitted where the files are not open for writing.
    """
    await trio.to_thread.run_sync(_lock_for_writing, image.name, _written(image))


def _lock_for_writing(name: str, stores: list[Store]) -> None:
    locked: list[HostStore] = []
    try:
        for store in stores:
            if not store.writable:
                denied = (isinstance(store, HostStore) and store.denied) or errno.EACCES
                reason = f"no permission to write to it ({os.strerror(denied)})"
                raise NotPermitted(store.name, reason, denied)
            if isinstance(store, HostStore):
                store.lock(exclusive=True)
                locked.append(store)
                store.claim_device()
    except (ImageError, OSError) as error:
        for store in locked:
            store.lock(exclusive=False)
        if isinstance(error, ImageBusy) and error.image != name:
            raise ImageBusy(name, str(error)) from error
        raise


async def unlock_for_writing(image: Image) -> None:
    """Make the locks shared again. Raises OSError."""
    stores = [store for store in _written(image) if isinstance(store, HostStore)]

    def unlock() -> None:
        for store in stores:
            store.lock(exclusive=False)
        let_fill(image)

    await trio.to_thread.run_sync(unlock)


def let_fill(image: Image) -> None:
    """It is only read: others may fill it with copies from now on. May wait for a server. Raises OSError."""
    if isinstance(image.meta, HostFile):
        image.meta.file_lock.let_fill()


def is_asked_for(image: Image) -> bool:
    """Whether somebody wants to read what `lock_for_writing` has locked. May wait for a server. Raises OSError."""
    return any(isinstance(store, HostFile) and store.file_lock.is_asked_for() for store in _written(image))


def _written(image: Image) -> list[Store]:
    """What an image that is open for writing may write to."""
    stores: list[Store] = [image.meta] if image.data is image.meta else [image.meta, image.data]
    if image.base_may_be_written:
        assert image.base is not None
        assert not isinstance(image.base, Core)
        stores.append(image.base)
    return stores
