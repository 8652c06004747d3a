"""Servers of all kinds that are gone for half a minute, at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from support.block_servers import Iscsi, Nbdkit, NbdServer, Nfs, Qsd
from support.mounts import MIB, Mount, mounted, must, wait_until
from support.ports import free_port
from support.servers import S3, DiskServer, Https, Ssh

KINDS: tuple[type[DiskServer], ...] = (Ssh, Https, S3, Iscsi, Nfs, NbdServer, Nbdkit, Qsd)
DATA = random.Random(9).randbytes(MIB)
BLOCK = 4096
GONE = 30.0  # seconds


def read(mount: Mount, number: int) -> bytes:
    with mount.raw("vm").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), BLOCK, number * BLOCK)


def block(number: int) -> bytes:
    return DATA[number * BLOCK : (number + 1) * BLOCK]


def mount_of(server: DiskServer, folder: Path, on_loss: str) -> contextlib.AbstractContextManager[Mount]:
    """A disk that stands on it."""
    folder.mkdir(parents=True)
    tls = ["--tls-creds", str(server.tls)] if server.tls is not None else []
    base = ("--base", server.url, "--base-format", "raw", "--credentials", server.credentials())
    must("create", folder / "vm.fvd", *base, *tls)
    options = [f"allow_url={server.url}", f"credentials={server.credentials()}", f"on_base_error={on_loss}"]
    return mounted(folder, "-o", ",".join([*options, *(f"tls_creds={folder}" for folder in tls[1:])]))


@pytest.mark.slow
def test_gone_for_half_a_minute(tmp_path: Path) -> None:
    """With `wait` a read has waited, and goes on when its server is back; with `eio` it has failed by then."""
    found: dict[tuple[str, str], bytes | int | None] = {}

    def look(name: str, on_loss: str, mount: Mount) -> None:
        try:
            found[name, on_loss] = read(mount, 100)
        except OSError as error:
            found[name, on_loss] = error.errno

    with contextlib.ExitStack() as stack:
        servers: list[DiskServer] = []
        mounts: dict[tuple[str, str], Mount] = {}
        for kind in KINDS:
            if kind.missing():
                continue
            server = kind(tmp_path / kind.__name__, stack.enter_context(free_port()))
            servers.append(server)
            stack.callback(server.close)
            stack.callback(server.stop)
            server.put(DATA)
            server.start()
            for on_loss in ("wait", "eio"):
                folder = tmp_path / f"{on_loss}-{kind.__name__}"
                mounts[kind.__name__, on_loss] = stack.enter_context(mount_of(server, folder, on_loss))
        for mount in mounts.values():
            assert read(mount, 0) == block(0)
        for server in servers:
            server.stop()
        began = time.monotonic()
        readers = [threading.Thread(target=look, args=(*key, mount)) for key, mount in mounts.items()]
        for reader in readers:
            reader.start()
        wait_until(lambda: len(found) == len(servers))
        time.sleep(max(0.0, began + GONE - time.monotonic()))
        assert found == {key: errno.EIO for key in mounts if key[1] == "eio"}
        for server in servers:
            server.start()
        for reader in readers:
            reader.join(60)
        assert found == {key: errno.EIO if key[1] == "eio" else block(100) for key in mounts}
        assert [key for key, mount in mounts.items() if read(mount, 200) != block(200)] == []
