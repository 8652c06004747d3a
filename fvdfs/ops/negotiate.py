"""The first exchange with the kernel, amended.

The kernel's first request, INIT, and its answer settle what the two sides can do. pyfuse3 leaves the
answer to libfuse, which leaves out what matters most here:

- FUSE_HANDLE_KILLPRIV_V2. Without it the kernel asks for the extended attribute security.capability
  before *every* write, one more request each time. With it the file system promises to drop set-uid
  bits and capabilities on writing itself; ours has none to drop (`filesystem.py` never shows them).
- max_background, the number of read-ahead and writeback requests that may be under way, 12 otherwise.

So INIT is read here, handed to libfuse through a socket put in the place of its descriptor, and
libfuse's answer goes to the kernel with these fields changed. The messages are the kernel's stable
interface (linux/fuse.h). A kernel that does not offer a flag is not answered with it.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

import pyfuse3
import trio

from fvdfs.errors import UsageError

log = logging.getLogger(__name__)

FUSE_INIT = 26
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
MAX_BACKGROUND = 64
CONGESTION_THRESHOLD = 48

_IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
_INIT_IN = struct.Struct("=IIII")  # major minor max_readahead flags
_OUT_HEADER = struct.Struct("=IiQ")  # len error unique
_INIT_OUT = struct.Struct("=IIIIHH")  # major minor max_readahead flags max_background congestion_threshold
_BUFFER = 2 << 20  # what the kernel wants a reader of requests to offer, at the least


def amend(request: bytes, answer: bytes) -> bytes:
    """libfuse's answer to the INIT request, with our fields in it; as it is where it says no."""
    _, error, _ = _OUT_HEADER.unpack_from(answer)
    if error or len(answer) < _OUT_HEADER.size + _INIT_OUT.size:
        return answer
    _, _, _, offered = _INIT_IN.unpack_from(request, _IN_HEADER.size)
    major, minor, read_ahead, flags, _, _ = _INIT_OUT.unpack_from(answer, _OUT_HEADER.size)
    flags |= offered & FUSE_HANDLE_KILLPRIV_V2
    amended = bytearray(answer)
    _INIT_OUT.pack_into(
        amended, _OUT_HEADER.size, major, minor, read_ahead, flags, MAX_BACKGROUND, CONGESTION_THRESHOLD
    )
    return bytes(amended)


def negotiate(known: set[int]) -> None:
    """Exchange INIT on a mount that pyfuse3 has just made; to be called before `pyfuse3.main`.

    `known`: the descriptors of /dev/fuse from before the mount was made. Raises UsageError where the kernel does not
    speak as expected.
    """
    (device,) = fuse_descriptors() - known
    kernel = os.dup(device)
    ours, libfuses = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        request = os.read(kernel, _BUFFER)
        if _IN_HEADER.unpack_from(request)[1] != FUSE_INIT:
            raise UsageError("the kernel's first request is not INIT: is another FUSE program attached to this mount?")
        os.dup2(libfuses.fileno(), device, inheritable=False)
        libfuses.close()
        ours.send(request)
        answer = trio.run(_answer, ours)
        os.dup2(kernel, device, inheritable=False)
        os.write(kernel, amend(request, answer))
    finally:
        os.close(kernel)
        ours.close()


async def _answer(ours: socket.socket) -> bytes:
    """Have libfuse handle the one request that waits for it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.lowlevel.wait_readable(ours)
        nursery.cancel_scope.cancel()
    return ours.recv(_BUFFER)


def fuse_descriptors() -> set[int]:
    """The open descriptors of /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except OSError:
            continue  # the descriptor of this listing
    return found
