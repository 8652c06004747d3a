"""The base that a user names for an image: whether it can be read, and what has to be known of it. Blocks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from fvdfs.commands.sides import Side, StoreSide
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageBusy, ImageError, UnstatedFormat, UsageError
from fvdfs.image.chain import open_chain, top_layer
from fvdfs.image.loading import open_image
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS, Policy, format_by_name
from fvdfs.store.base import Store
from fvdfs.store.host import Identity, open_path
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore, host_files


@dataclass(frozen=True, slots=True)
class BaseImage:
    """What creation has to know of a base."""

    path: str | None
    """None: a URL, or a format whose files are not looked at here."""
    length: int
    """Bytes of its disk."""
    format: str
    """What it is."""
    files: list[tuple[Identity, str]]
    """What must not be overwritten: identity and name of each file of this host that it is made of."""


def inspect_base(image: str, name: str, base_format: str, secret_file: str = "") -> BaseImage:
    """The base that `name` means in an image at `image`.

    Raises UsageError where there is none, or where it cannot be read as this format.
    """
    path = os.path.join(os.path.dirname(image), name)
    try:
        if not is_local(name) or base_format not in (*RAW_FORMATS, FVD_FORMAT):
            return run_loop(functools.partial(_inspect_other, image, name, base_format, secret_file))
        if not base_format:
            base_format, looks_like = format_by_name(path)
            if looks_like:
                raise _unstated(name, looks_like)
        return _inspect_fvd(path) if base_format == FVD_FORMAT else _inspect_raw(path, base_format)
    except OSError as error:
        where = ""
        if not os.path.isabs(name) and os.path.exists(name):
            where = "; a name is relative to the folder of the image, not to where you are"
        raise UsageError(f"--base {name}: {path}: {error.strerror}{where}") from error
    except UnstatedFormat as error:
        if error.image != image:  # an image further down
            raise UsageError(f"--base {name}: {error}") from error
        raise _unstated(name, error.looks_like) from error
    except ImageError as error:
        raise UsageError(f"--base {name}: {error}") from error


def _unstated(name: str, looks_like: str) -> UsageError:
    return UsageError(f"--base {name}: looks like {looks_like}; say what it is: --base-format {looks_like}, or raw")


def _inspect_raw(path: str, base_format: str) -> BaseImage:
    store = open_path(path, writable=False)
    try:
        return BaseImage(path, store.size_now(), base_format, _identities([store]))
    finally:
        store.close()


def _inspect_fvd(path: str) -> BaseImage:
    chain = open_chain(path, Policy(writable=False, allowed_urls=("",)))  # no server is asked
    try:
        if chain.layers[0].record().receiving:
            raise ImageError(path, f"{chain.layers[0].record().obstacle}; until then nothing can stand on it")
        size = chain.layers[0].header.virtual_disk_size
        return BaseImage(path, size, FVD_FORMAT, _identities(chain.stores()))
    finally:
        chain.close()


async def _inspect_other(image: str, name: str, file_format: str, secret_file: str) -> BaseImage:
    """A base that QEMU opens. Raises ImageError, UsageError, OSError."""
    policy = Policy(allowed_urls=("",), secret_file=secret_file)
    store = QemuStore(image, "base_img", name, file_format, policy, writable=False)
    try:
        await store.start()
        return BaseImage(None, await store.size(), file_format, _identities([store]))
    finally:
        await store.aclose()


def refuse_changing(base: BaseImage) -> None:
    """Raise ImageBusy where somebody writes to a base file, which must not change below a new image. Blocks."""
    if base.path is None or (base.format == FVD_FORMAT and top_layer(base.path, Policy()).header.copy_on_read):
        return  # the latter is perhaps open for its copies, which change no content
    store = open_path(base.path, writable=False)
    try:
        store.lock(exclusive=False)
    except ImageBusy as error:
        raise ImageBusy(base.path, f"{error.reason}; or let the new image stand on a snapshot of it") from error
    finally:
        store.close()


async def open_base(image: str, name: str, file_format: str, secret_file: str) -> tuple[Side, bool]:
    """The base that `inspect_base` has found, locked for reading; and whether it is on a server.

    Raises ImageError, UsageError, OSError.
    """
    path = os.path.join(os.path.dirname(image), name)
    if file_format == FVD_FORMAT:
        opened = await open_image(path, Policy(writable=False, secret_file=secret_file))
        return opened, opened.is_remote
    if is_local(name) and file_format in RAW_FORMATS:
        file = open_path(path, writable=False)
        try:
            file.lock(exclusive=False)
        except BaseException:
            file.close()
            raise
        return StoreSide(file, file.size_now()), False
    policy = Policy(allowed_urls=("",), secret_file=secret_file)
    store = QemuStore(image, "base_img", name, file_format, policy, writable=False)
    try:
        await store.start()
        return StoreSide(store, await store.size()), store.is_remote
    except BaseException:
        await store.aclose()
        raise


def _identities(stores: Iterable[Store]) -> list[tuple[Identity, str]]:
    return [(file.identity, file.name) for store in stores for file in host_files(store)]
