"""A disk that moves: its source, served."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.mounts import FVDFS, Mount, running


@contextlib.contextmanager
def serving(mount: Mount) -> Iterator[Path]:
    """The socket; the disk is given there."""
    socket = mount.folder.parent / "nbd"
    socket.unlink(missing_ok=True)
    with running(*FVDFS, "serve", mount.raw("vm"), "--unix", socket, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"nbd+unix:///vm?socket={socket}\n"
        yield socket
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
