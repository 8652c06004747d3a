"""Stores behind a daemon of QEMU's, with a policy that allows one folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from fvdfs.errors import (
    ImageError,
    Refused,
)
from fvdfs.image.policy import Policy
from fvdfs.store.locations import Location, within
from fvdfs.store.outage import OnLoss
from fvdfs.store.qemu_store import QemuStore


class Inside:
    """Allows files in one folder, and URLs of some prefixes."""

    secret_file = ""
    tls_creds = ""
    qemu_locks = True
    base_formats: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, *prefixes: str, on_loss: OnLoss = OnLoss.REFUSE, credentials: Path | str = ""
    ) -> None:
        self.credentials = str(credentials)
        self.folder = folder
        self.on_loss = on_loss
        self.prefixes = prefixes

    def open_file(self, image: str, field: str, path: str) -> tuple[int, str]:
        path = os.path.join(os.path.dirname(image), path)
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(image, f"{field}={path}: {error.strerror}") from error
        real = os.readlink(f"/proc/self/fd/{handle}")
        if not real.startswith(f"{self.folder}/"):
            os.close(handle)
            raise Refused(image, f"{field}={path} leads to {real}")
        return handle, path

    def unstated_format(self, image: str, field: str, name: str, looks_like: str) -> str:
        return Policy(base_formats=self.base_formats).unstated_format(image, field, name, looks_like)

    def check_url(self, image: str, field: str, location: Location) -> None:
        if not any(within(location.url, prefix) for prefix in self.prefixes):
            raise Refused(image, f"{field}={location.url} is not allowed")


def named(
    folder: Path,
    name: str,
    file_format: str,
    *prefixes: str,
    writable: bool = False,
    on_loss: OnLoss = OnLoss.REFUSE,
    credentials: Path | str = "",
) -> QemuStore:
    access = Inside(folder, *prefixes, on_loss=on_loss, credentials=credentials)
    return QemuStore(str(folder / "image.fvd"), "base_img", name, file_format, access, writable=writable)


@contextlib.asynccontextmanager
async def opened(
    folder: Path,
    name: str,
    file_format: str,
    *prefixes: str,
    writable: bool = False,
    on_loss: OnLoss = OnLoss.REFUSE,
    credentials: Path | str = "",
) -> AsyncIterator[QemuStore]:
    store = named(folder, name, file_format, *prefixes, writable=writable, on_loss=on_loss, credentials=credentials)
    try:
        await store.start()
        yield store
    finally:
        await store.aclose()
