"""Servers of disks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def nbd_server(file: Path, socket: Path, *, read_only: bool = True) -> Iterator[str]:
    server = subprocess.Popen(["nbdkit", "-f", *["-r"] * read_only, "-U", socket, "file", file])
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()
