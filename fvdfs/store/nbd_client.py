"""A connection to an NBD server, to read and write a few sectors of an export without a daemon of its own.

It speaks the fixed newstyle handshake, NBD_OPT_GO, and simple replies, as the protocol's document names them.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from fvdfs.errors import UnsupportedFeature
from fvdfs.store.connecting import NoExport, connect
from fvdfs.store.locations import Location
from fvdfs.store.nbd_tls import without_tls
from fvdfs.store.qemu_words import WANTS_TLS

CONNECT_TIMEOUT = 5.0  # seconds until the server has let us in
CALL_TIMEOUT = 5.0  # seconds for a read or a write
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_HAVE_OPTION = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC = 0x25609513, 0x67446698
_FLAGS = 3  # fixed newstyle, no zeroes
_GO = 7
_ACK, _INFO = 1, 3
_TLS_REQUIRED, _UNKNOWN_EXPORT = 0x8000_0005, 0x8000_0006
_READ, _WRITE, _DISCONNECT = 0, 1, 2
_LONGEST = 1 << 16  # bytes of a reply to an option


class NbdClient:
    """One export, open. Offsets in bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._calls = 0

    async def pread(self, length: int, offset: int) -> bytes:
        """Raises OSError."""
        return await self._call(_READ, offset, length, b"")

    async def pwrite(self, data: bytes, offset: int) -> None:
        """Raises OSError."""
        await self._call(_WRITE, offset, len(data), data)

    async def _call(self, kind: int, offset: int, length: int, data: bytes) -> bytes:
        self._calls += 1
        with _answered_within(CALL_TIMEOUT):
            request = _REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._calls, offset, length)
            await self._stream.send_all(request + data)
            magic, error, number = _REPLY.unpack(await _exactly(self._stream, _REPLY.size))
            if magic != _SIMPLE_MAGIC or number != self._calls:
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
            if error:
                raise OSError(errno.EIO, f"the server answers with error {error}")
            return await _exactly(self._stream, length) if kind == _READ else b""


@asynccontextmanager
async def nbd_client(
    location: Location, suffix: str, tls_creds: str, *, writable: bool = False
) -> AsyncIterator[NbdClient]:
    """Connect to the export whose name is that of this location, and this suffix. `tls_creds`: as `Policy.tls_creds`.

    `writable`: it is to be; with TLS, one that the server gives read-only is refused then.

    Raises NoExport, other OSError; Unreachable; ImageError where TLS fails for good; UnsupportedFeature where the
    location is not one of NBD.
    """
    if location.protocol.get("driver") != "nbd":
        raise UnsupportedFeature(location.name, "is not of the form nbd://HOST/NAME")
    name = str(location.protocol["export"]) + suffix
    connection = (
        _plain(location) if location.tls_user is None else without_tls(location, name, tls_creds, writable=writable)
    )
    async with connection as stream:
        with _answered_within(CONNECT_TIMEOUT):
            await _negotiate(stream, name)
        yield NbdClient(stream)
        with trio.move_on_after(1), _as_os_error():
            await stream.send_all(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))


@asynccontextmanager
async def _plain(location: Location) -> AsyncIterator[trio.SocketStream]:
    """Raises Unreachable."""
    made = await connect(location)
    assert made is not None
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(made))
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)


@contextmanager
def _answered_within(seconds: float) -> Iterator[None]:
    """Raises OSError: ETIMEDOUT, and for what trio calls a broken connection."""
    with _as_os_error():
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except trio.BrokenResourceError as error:
        raise OSError(errno.ECONNRESET, str(error.__cause__ or os.strerror(errno.ECONNRESET))) from error


async def _negotiate(stream: trio.SocketStream, name: str) -> None:
    """Open the export. Raises OSError."""
    first, second, _ = _GREETING.unpack(await _exactly(stream, _GREETING.size))
    if (first, second) != (b"NBDMAGIC", _HAVE_OPTION):
        raise OSError(errno.EPROTO, "is no NBD server, or one of before 2012")
    await stream.send_all(struct.pack(">I", _FLAGS))
    encoded = name.encode()
    await _option(stream, _GO, struct.pack(">I", len(encoded)) + encoded + struct.pack(">H", 0))


async def _option(stream: trio.SocketStream, number: int, data: bytes) -> None:
    """Ask for it, and wait until it is granted. Raises OSError."""
    await stream.send_all(_OPTION.pack(_HAVE_OPTION, number, len(data)) + data)
    while True:
        magic, _, kind, length = _OPTION_REPLY.unpack(await _exactly(stream, _OPTION_REPLY.size))
        if magic != _REPLY_MAGIC or length > _LONGEST:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        text = await _exactly(stream, length)
        if kind == _ACK:
            return
        if kind == _UNKNOWN_EXPORT:
            raise NoExport
        if kind == _TLS_REQUIRED:
            raise OSError(errno.EACCES, WANTS_TLS)
        if kind != _INFO:
            raise OSError(errno.EACCES, text.decode(errors="replace") or f"the server refuses ({kind:#x})")


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise OSError(errno.ECONNRESET, "the server has closed the connection")
        data += part
    return bytes(data)
