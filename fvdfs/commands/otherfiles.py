"""New files of formats of QEMU's: targets of `fvdfs convert`, and data files of new images. Blocks."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence

import trio

from fvdfs.commands.newfiles import NewFile, NewFiles
from fvdfs.daemon import run_loop
from fvdfs.errors import UsageError
from fvdfs.format.header import Header
from fvdfs.image.policy import Policy
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import LUKS


def make_data_file(
    files: NewFiles, path: str | None, file_format: str, header: Header, zeros: Sequence[tuple[int, int]], secret: str
) -> None:
    """Make the data file at `path` for a new image with this header. `secret`: the file with the passphrase.

    `zeros`: the parts (start, size in bytes) that are read before they are written. Where it is encrypted they
    are written: nothing in it is zeros by itself. Raises UsageError, ImageError, OSError.
    """
    if path is None:
        raise UsageError("--data-file: what is made together with the image must be a file or a device of this host")
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


async def qemu_compress(file: NewFile, raw: str) -> None:
    """Make a new file a compressed qcow2 image with the content of a raw file. Raises UsageError."""
    command = ["qemu-img", "convert", "-q", "-c", "-W", "-m", "4", "-f", "raw", "-O", "qcow2", "--", raw, file.place]
    try:
        done = await trio.run_process(command, capture_stderr=True, check=False)
    except FileNotFoundError:
        raise UsageError("qemu-img is missing: install the package qemu-utils") from None
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().replace(file.place, file.path).replace(raw, file.path)
        raise UsageError(said or f"qemu-img ended with exit code {done.returncode}")


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
