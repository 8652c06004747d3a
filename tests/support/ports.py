"""TCP ports for the servers of tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

PORTS = range(10_000, 30_000)
"""Below those that the kernel gives to connections, which come and go all the time."""


@contextmanager
def free_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, and which no other test is given meanwhile."""
    while (mark := _mark(port := random.SystemRandom().choice(PORTS))) is None:
        pass
    with mark:
        yield port


def _mark(port: int) -> socket.socket | None:
    """What shows to other tests that the port is taken; None: it was."""
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0a test of fvdfs has port {port}")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
    except OSError:
        mark.close()
        return None
    return mark
