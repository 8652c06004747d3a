"""Mounting and unmounting by fusermount3, which has the privilege to do so, and hands over the kernel's descriptor.

libfuse does the same. Done here, the descriptor is ours from the start, and libfuse gets a socket (`device.py`).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable

from fvdfs.errors import FvdError, UsageError

_PROGRAM = "fusermount3"
_FIRST = "/usr/bin:/bin"
"""Where it lies normally; any other folder of PATH may be on a share that hangs."""


def attach(mountpoint: str, fsname: str, options: Iterable[str]) -> int:
    """Mount a FUSE file system; the descriptor of /dev/fuse. Raises FvdError where that cannot be done."""
    words = [f"fsname={_escape(fsname)}", "subtype=fvdfs", "default_permissions", *options]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = _run("-o", ",".join(words), "--", mountpoint, descriptor=theirs.fileno())
        if done.returncode:
            lines = done.stderr.replace(f"{done.args[0]}: ", "").splitlines()
            raise FvdError(f"{mountpoint}: cannot mount: {'; '.join(lines) or f'{_PROGRAM} has failed'}")
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(descriptor, False)
    return descriptor


def detach(mountpoint: str) -> None:
    """Unmount it, whoever uses it."""
    _run("-u", "-z", "-q", "--", mountpoint)


def _run(*arguments: str, descriptor: int = -1) -> subprocess.CompletedProcess[str]:
    """Run the program; `descriptor` is the socket that it sends the kernel's descriptor through."""
    program = shutil.which(_PROGRAM, path=f"{_FIRST}:{os.environ.get('PATH', '')}")
    if program is None:
        raise UsageError(f"{_PROGRAM} is needed to mount and is not installed: apt install fuse3")
    return subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        errors="replace",
        env={**os.environ, "_FUSE_COMMFD": str(descriptor)} if descriptor >= 0 else None,
        pass_fds=[descriptor] if descriptor >= 0 else [],
        check=False,
    )


def _escape(value: str) -> str:
    """A value inside a comma-separated list of mount options, in ASCII."""
    text = value.encode("ascii", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace(",", "\\,")
