"""Connections to servers: made here for NBD, and handed to the daemon as descriptors.

Those for iSCSI and NFS are made by libraries in the daemon, which make new ones where one has ended, again and again,
and never tell: a read would wait for ever, and nobody would know what a server has lost that was started again. So we
take copies of their sockets from the daemon (pidfd_getfd), and see what becomes of them.

So it is known at once whether a server can be reached, and later whether the connection still lives. TCP alone would
try for minutes, twice as long each time, and stand still as long again after a network that was cut is back. So each
connection is asked for a sign of life every two seconds (keepalive), and one from which nothing was heard for
`SILENCE` is given up, however many bytes are on their way: a server that is only slow, or stopped, still acknowledges.

The connection ends with an orderly FIN, which the kernel goes on sending: a server that serves a limited number of
clients gets its place back. (TCP_USER_TIMEOUT would end it without one.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable

import trio

from fvdfs.errors import Unreachable
from fvdfs.store.locations import Location

CONNECT_TIMEOUT = 3.0  # seconds; TCP asks again after 1 and 3
SILENCE = 5.0  # seconds; four retransmissions in a row were lost, or two keepalives
_KEEPALIVE = 2  # seconds between two signs of life
_PIDFD_GETFD = 438  # of asm-generic/unistd.h, and of all processors
_PORTMAPPER = 111  # NFS asks it for ports, and hangs up
_libc = ctypes.CDLL(None, use_errno=True)
_TCP_INFO = struct.Struct("=8B24I")  # the beginning of struct tcp_info of linux/tcp.h
_MORE_TCP_INFO = struct.Struct("=104x4Q4I")  # and what follows there
_LEAST_ROUND_TRIP = 4 + 3  # microseconds, of the last minutes
_LAST_DATA_RECEIVED, _LAST_ACK_RECEIVED = 8 + 11, 8 + 12  # milliseconds ago


class NoExport(OSError):
    """The server has no export of this name."""

    def __init__(self) -> None:
        super().__init__(errno.ENOENT, "the server has no such export")


async def connect(location: Location) -> socket.socket | None:
    """A connection to the server of this URL; None where fvdfs does not know how. Raises Unreachable."""
    address = location.address
    if address is None:
        return None
    where = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            if isinstance(address, str):
                stream = await trio.open_unix_socket(address)
            else:
                stream = await trio.open_tcp_stream(*address)
    except trio.TooSlowError:
        raise Unreachable(location.shown, f"{where} does not answer within {CONNECT_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise Unreachable(location.shown, f"{where} cannot be reached: {_why(error)}") from error
    made = socket.socket(fileno=stream.socket.detach())
    made.setblocking(True)
    if made.family != socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(made)
    return made


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE)


def copies_of_connections(pid: int, others: Iterable[socket.socket]) -> list[socket.socket] | None:
    """Copies of the TCP connections that a child of ours has, and that stand, beside `others`; None: we may not.

    The caller closes them: the peer sees the end of a connection when all copies of it are closed. Raises OSError.
    """
    found: list[socket.socket] = []
    known = {os.readlink(f"/proc/self/fd/{other.fileno()}") for other in others}
    process = os.pidfd_open(pid)
    try:
        folder = f"/proc/{pid}/fd"
        for number in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                link = os.readlink(f"{folder}/{number}")
                if not link.startswith("socket:") or link in known:
                    continue
            fd = _libc.syscall(_PIDFD_GETFD, process, int(number), 0)
            if fd < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
                return None  # a container's rules, or a kernel of before 5.6
            if fd >= 0 and (copy := _standing(socket.socket(fileno=fd))):
                found.append(copy)
    finally:
        os.close(process)
    return found


def _standing(copy: socket.socket) -> socket.socket | None:
    """It, if it is a TCP connection to a server of disks; else it is closed."""
    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM and not is_closed(copy):
        with contextlib.suppress(OSError):
            if copy.getpeername()[1] != _PORTMAPPER:
                _keep_alive(copy)
                return copy
    copy.close()
    return None


def _why(error: BaseException) -> str:
    """The error of the first address that was tried."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    return (found.strerror if isinstance(found, OSError) else None) or str(found)


def silence(connection: socket.socket) -> float:
    """Seconds since the last sign of life of the peer; 0 on a socket of this host."""
    if connection.family == socket.AF_UNIX:
        return 0.0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:  # it was closed just now
        return 0.0
    if len(info) < _TCP_INFO.size:
        return 0.0
    fields: tuple[int, ...] = _TCP_INFO.unpack(info)
    return min(fields[_LAST_DATA_RECEIVED], fields[_LAST_ACK_RECEIVED]) / 1000


def round_trip(connection: socket.socket) -> float:
    """Seconds that one took at least, of late, by TCP; 0: it is not known, or there is none."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MORE_TCP_INFO.size)
    except OSError:  # it was closed just now, or is a socket of this host
        return 0.0
    return float(_MORE_TCP_INFO.unpack(info)[_LEAST_ROUND_TRIP]) / 1e6 if len(info) == _MORE_TCP_INFO.size else 0.0


def take_at_most(connection: socket.socket, size: int) -> None:
    """Have the peer send no more than so many bytes before they are received here; the kernel soon forgets it."""
    with contextlib.suppress(OSError):  # it was closed just now
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, size)


def acknowledge(connection: socket.socket) -> None:
    """Have the peer know at once what has arrived.

    Else that may take 40 ms, which its BBR takes for time on the way: then it sends the next answer too slowly.
    """
    with contextlib.suppress(OSError):  # it was closed just now, or is a socket of this host
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer, or QEMU, has ended the connection."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
