"""Servers of disks."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def listens(at: Path) -> bool:
    """Whether a server lets clients in at this socket, which is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(at)) == 0


@contextmanager
def nbd_server(file: Path, at: Path, *, read_only: bool = True) -> Iterator[str]:
    server = subprocess.Popen(["nbdkit", "-f", *["-r"] * read_only, "-U", at, "file", file])
    try:
        deadline = time.monotonic() + 30
        while not listens(at):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={at}"
    finally:
        server.terminate()
        server.wait()
