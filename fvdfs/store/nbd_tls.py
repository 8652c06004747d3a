"""TLS to an NBD server, which a qemu-storage-daemon speaks: Python's own knows no pre-shared keys before 3.13.

The daemon opens one export by a connection that was made here, and gives it without TLS at a socket that nobody else
reaches. So credentials, names and verdicts are those of the daemon that reads the disk itself. It takes about 0.1 s.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from fvdfs.errors import FvdError, Locked, Unreachable
from fvdfs.store.connecting import NoExport, connect
from fvdfs.store.locations import Location, Options
from fvdfs.store.nbd_server import bound_to_us
from fvdfs.store.qemu_nodes import NO_CREDENTIALS, tls_object
from fvdfs.store.qemu_words import complaint, of_tls

END_TIMEOUT = 1.0  # seconds until a daemon that has closed its socket has ended
_NODE = "box"
_NO_EXPORT = "Requested export not available"


@asynccontextmanager
async def without_tls(
    location: Location, export: str, credentials: str, *, writable: bool
) -> AsyncIterator[trio.SocketStream]:
    """A connection to a server that gives this export alone; its greeting is still to be read.

    `credentials`: as `tls_object`. Errors of the body become those of TLS where that is why. Raises Unreachable, Locked
    where no credentials are named, NoExport, OSError.
    """
    user = location.tls_user
    assert user is not None
    if not credentials:
        raise Locked(location.name, NO_CREDENTIALS)
    made = await connect(location)
    assert made is not None
    with made, _memory() as said:
        ours, listener = await trio.to_thread.run_sync(_private_socket)
        with contextlib.ExitStack() as unless_launched, listener:
            unless_launched.enter_context(ours)
            server = {"type": "fd", "str": str(made.fileno())}
            node = {"server": server, "export": export, "node-name": _NODE, "read-only": not writable}
            process = _launch(tls_object(credentials, user), location.protocol | node, made, listener, said)
            unless_launched.pop_all()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            made.close()
            yield stream
        except OSError as error:
            if error.errno == errno.ECONNRESET and await trio.to_thread.run_sync(_has_ended, process):
                raise _verdict(location.name, os.pread(said, 1 << 16, 0).decode(errors="replace")) from error
            raise
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(process.wait)
            await trio.aclose_forcefully(stream)


@contextlib.contextmanager
def _memory() -> Iterator[int]:
    descriptor = os.memfd_create("said")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _launch(
    credentials: Options, node: Options, made: socket.socket, listener: socket.socket, said: int
) -> subprocess.Popen[bytes]:
    """Raises UsageError, OSError."""
    export = {"type": "nbd", "id": _NODE, "node-name": _NODE, "name": node["export"], "writable": not node["read-only"]}
    words = ["--object", json.dumps(credentials), "--blockdev", json.dumps(node)]
    words += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}", "--export", json.dumps(export)]
    return subprocess.Popen(
        bound_to_us(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        pass_fds=[made.fileno(), listener.fileno()],
        cwd="/",
        start_new_session=True,  # the terminal's signals are not for it
    )


def _private_socket() -> tuple[socket.socket, socket.socket]:
    """Both ends: ours, and one that listens and has let ours in. Nobody else can come."""
    with tempfile.TemporaryDirectory(prefix="fvdfs-tls-") as folder, contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(os.path.join(folder, "socket"))
        listener.listen(1)
        ours = stack.enter_context(socket.socket(socket.AF_UNIX))
        ours.connect(os.path.join(folder, "socket"))
        stack.pop_all()
        return ours, listener


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT)
    return process.poll() is not None


def _verdict(name: str, said: str) -> FvdError | OSError:
    """Why the daemon has ended."""
    line = complaint(said)
    return NoExport() if _NO_EXPORT in line else Unreachable(name, of_tls(line) or line)
