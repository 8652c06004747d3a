"""Disks on a `DiskServer`: what it has, and how they are made, mounted and read."""

from __future__ import annotations

import os
import random
from pathlib import Path

from support.mounts import MIB, must
from support.servers import DiskServer

SIZE = 8 * MIB
HOLE = range(3 * MIB, 5 * MIB)


def new_data(seed: int) -> bytes:
    data = bytearray(random.Random(seed).randbytes(SIZE))
    data[HOLE.start : HOLE.stop] = bytes(len(HOLE))
    return bytes(data)


DATA = new_data(1)


def access(server: DiskServer, credentials: Path | None = None, tls_creds: Path | None = None) -> list[str]:
    """The words of a command that is to be let in."""
    tls = ["--tls-creds", str(tls_creds or server.tls)] if server.tls is not None else []
    return ["--credentials", str(credentials or server.credentials()), *tls]


def options(server: DiskServer, *more: str) -> str:
    """Those of a mount."""
    tls = [f"tls_creds={server.tls}"] if server.tls is not None else []
    return ",".join([f"allow_url={server.url}", f"credentials={server.credentials()}", *tls, *more])


def create(folder: Path, server: DiskServer, *words: str) -> None:
    base = ("--base", server.url, "--base-format", "raw", *words)
    must("create", folder / "vm.fvd", *base, *access(server))


def read(path: Path, offset: int, length: int) -> bytes:
    """Past the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), length, offset)
