"""New files of formats of QEMU's: targets of `fvdfs convert`, and data files of new images. Blocks."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from subprocess import PIPE

import trio

from fvdfs.commands.newfiles import NewFile, NewFiles
from fvdfs.daemon import run_loop
from fvdfs.errors import UsageError
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.policy import Policy
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import LUKS, RAW

_SHARE = re.compile(rb"\(([0-9.]+)/100%\)")
"""How qemu-img says how far it is, in percent."""
_TOLD = 100  # bytes of its output; more than one of these takes


def make_data_file(
    files: NewFiles, path: str | None, file_format: str, header: Header, zeros: Sequence[tuple[int, int]], secret: str
) -> None:
    """Make the data file at `path` for a new image with this header. `secret`: the file with the passphrase.

    `zeros`: the parts (start, size in bytes) that are read before they are written. Where it is encrypted they
    are written: nothing in it is zeros by itself. Raises UsageError, ImageError, OSError.
    """
    if path is None:
        raise UsageError(
            "--data-file: what is made of another format together with the image must be a file of this host"
        )
    file = files.add(path)
    if file.is_device:
        raise UsageError(f"--data-file {path}: is a device; make the {file_format} image in a file, or leave it raw")
    is_encrypted = file_format == LUKS
    if is_encrypted and not secret:
        raise UsageError(f"--data-file {path}: is to be encrypted: name the file with its passphrase: --secret FILE")
    try:
        size = 0 if header.compact and is_encrypted else header.virtual_disk_size
        qemu_create(file, file_format, size, secret)
    except UsageError as error:
        raise UsageError(f"--data-file: {error}") from None
    if is_encrypted and zeros:
        run_loop(functools.partial(_write_zeros, file, file_format, zeros, secret))


async def _write_zeros(file: NewFile, file_format: str, zeros: Sequence[tuple[int, int]], secret: str) -> None:
    policy = Policy(unnamed=((file.path, file.place),), secret_file=secret)
    name = os.path.basename(file.path)
    store = QemuStore(file.path, "image", name, file_format, policy, writable=True)
    try:
        await store.start()
        for start, size in zeros:
            await store.zero(start, size)
        await store.flush()
    finally:
        await store.aclose()


def take_disk_of_server(
    image: str, url: str, size: int, zeros: Sequence[tuple[int, int]], secret: str, *, force: bool
) -> None:
    """Make a raw disk that is there, at a server, the data file of a new image: at least `size` bytes.

    `zeros`: as of `make_data_file`. Raises UsageError where it is too small and cannot grow, or does not look empty and
    `force` is not given; ImageError, OSError.
    """
    run_loop(functools.partial(_take_disk_of_server, image, url, size, zeros, secret, force))


async def _take_disk_of_server(
    image: str, url: str, size: int, zeros: Sequence[tuple[int, int]], secret: str, force: bool
) -> None:
    policy = Policy(allowed_urls=("",), secret_file=secret)
    store = await trio.to_thread.run_sync(
        functools.partial(QemuStore, image, "data_file", url, RAW, policy, writable=True)
    )
    try:
        await store.start()
        first = bytearray(HEADER_SPACE)
        await store.pread(memoryview(first), 0)
        if not force and any(first):
            raise UsageError(f"--data-file {url}: does not look empty; --force to overwrite it")
        if (found := await store.size()) < size:
            if store.fixed_size:
                raise UsageError(f"--data-file {url}: has {found} bytes, {size} are needed")
            await store.resize(size)
        for start, length in zeros:
            await store.zero(start, length)
        await store.flush()
    finally:
        await store.aclose()


async def qemu_compress(file: NewFile, raw: str, progress: Callable[[float], None]) -> None:
    """Make a new file a compressed qcow2 image with the content of a raw file. Raises UsageError.

    `progress` is told the share that is done.
    """
    command = ["qemu-img", "convert", "-p", "-c", "-W", "-m", "4", "-f", "raw", "-O", "qcow2", "--", raw, file.place]
    said = b""

    async def follow(output: trio.abc.ReceiveStream) -> None:
        told = b""
        async for data in output:
            told = (told + data)[-_TOLD:]
            if found := _SHARE.findall(told):
                progress(float(found[-1]) / 100)

    async def keep(output: trio.abc.ReceiveStream) -> None:
        nonlocal said
        async for data in output:
            said += data

    try:
        async with trio.open_nursery() as nursery:
            start = functools.partial(trio.run_process, command, stdout=PIPE, stderr=PIPE, check=False)
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(follow, process.stdout)
            nursery.start_soon(keep, process.stderr)
    except* FileNotFoundError:
        raise UsageError("qemu-img is missing: install the package qemu-utils") from None
    if process.returncode:
        why = os.fsdecode(said).strip().replace(file.place, file.path).replace(raw, file.path)
        raise UsageError(why or f"qemu-img ended with exit code {process.returncode}")


def qemu_create(file: NewFile, file_format: str, size: int, secret: str = "") -> None:
    """Make a new file an image of `size` bytes of a format of QEMU's. Raises UsageError.

    `secret`: the file with the passphrase of an encrypted one.
    """
    command = ["qemu-img", "create", "-q", "-f", file_format]
    if file_format == LUKS:
        # In the option's syntax a comma ends a value, and two stand for one.
        command += ["--object", f"secret,id=secret,file={secret.replace(',', ',,')}", "-o", "key-secret=secret"]
    try:
        subprocess.run([*command, "--", file.place, str(size)], check=True, capture_output=True)
    except FileNotFoundError:
        raise UsageError("qemu-img is missing: install the package qemu-utils") from None
    except subprocess.CalledProcessError as error:
        said: str = os.fsdecode(error.stderr).strip().replace(file.place, file.path)
        raise UsageError(said or f"qemu-img ended with exit code {error.returncode}") from None
