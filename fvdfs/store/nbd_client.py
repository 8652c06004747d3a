"""A connection to an NBD server, to read and write a few sectors of an export without a daemon of its own.

It speaks the fixed newstyle handshake, NBD_OPT_GO, and simple replies, as the protocol's document names them. The
handshake is also that of `nbd_reader`, which asks for structured replies and extents as well.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from fvdfs.errors import UnsupportedFeature
from fvdfs.store.connecting import NoExport, connect
from fvdfs.store.locations import Location
from fvdfs.store.nbd_tls import without_tls
from fvdfs.store.qemu_words import WANTS_TLS

CONNECT_TIMEOUT = 5.0  # seconds until the server has let us in
CALL_TIMEOUT = 5.0  # seconds for a read or a write
ALIGNMENT = 512  # bytes; what any server takes that states no other
LARGEST = 1 << 25  # bytes of a request; the same
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, command, number, offset, length."""
REPLY = struct.Struct(">IIQ")
"""A simple one: magic, error, number."""
_HAVE_OPTION = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT = 1, 3, 4
_UNSUPPORTED, _TLS_REQUIRED, _UNKNOWN_EXPORT = 0x8000_0001, 0x8000_0005, 0x8000_0006
_BLOCK_SIZE = 3  # a kind of information
_TAKES_ONE_PART, _TAKES_MORE_CONNECTIONS = 1 << 7, 1 << 8  # flags of an export
_INFO_EXPORT = struct.Struct(">HQH")  # kind (0), size, flags
_INFO_BLOCK_SIZE = struct.Struct(">HIII")  # kind, the smallest, the preferred and the largest
_ANY_BLOCK_SIZE = _INFO_BLOCK_SIZE.pack(_BLOCK_SIZE, ALIGNMENT, ALIGNMENT, LARGEST)
_EXTENTS = b"base:allocation"
_LONGEST = 1 << 16  # bytes of a reply to an option
_MOST = 64  # replies to an option
_LARGEST_ALIGNMENT = 1 << 16  # bytes, by the protocol


class Command(enum.IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    BLOCK_STATUS = 7


@dataclass(frozen=True, slots=True)
class Export:
    """What a server has opened."""

    size: int
    """Bytes."""
    has_chunks: bool
    """Whether replies are structured."""
    has_extents: bool
    """Whether it can be asked where it has holes."""
    alignment: int = ALIGNMENT
    """Bytes: a request begins and ends at a multiple, or at the end of all."""
    largest: int = LARGEST
    """Bytes of a request."""
    takes_one_part: bool = False
    """Whether it can be asked to answer in one part, without a look where it has holes."""
    takes_more: bool = False
    """Whether more than one connection may be made, which see the same."""


class _Refused(OSError):
    """A server does not grant an option."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(
            errno.EACCES, WANTS_TLS if kind == _TLS_REQUIRED else text or f"the server refuses ({kind:#x})"
        )
        self.kind = kind


class NbdClient:
    """One export, open. Offsets in bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._calls = 0

    async def pread(self, length: int, offset: int) -> bytes:
        """Raises OSError."""
        return await self._call(Command.READ, offset, length, b"")

    async def pwrite(self, data: bytes, offset: int) -> None:
        """Raises OSError."""
        await self._call(Command.WRITE, offset, len(data), data)

    async def _call(self, kind: Command, offset: int, length: int, data: bytes) -> bytes:
        self._calls += 1
        with _answered_within(CALL_TIMEOUT):
            request = REQUEST.pack(REQUEST_MAGIC, 0, kind, self._calls, offset, length)
            await self._stream.send_all(request + data)
            magic, error, number = REPLY.unpack(await _exactly(self._stream, REPLY.size))
            if magic != SIMPLE_MAGIC or number != self._calls:
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
            if error:
                raise OSError(errno.EIO, f"the server answers with error {error}")
            return await _exactly(self._stream, length) if kind is Command.READ else b""


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
            await stream.send_all(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))


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
    if not await _greet(stream):
        raise OSError(errno.EPROTO, "is an NBD server of before 2012")
    await _go(stream, name)


async def negotiate(stream: trio.SocketStream, name: str) -> Export | None:
    """Open the export, with structured replies and extents where the server has them.

    None where it does not speak the fixed newstyle, or wants requests of sizes that serve nobody. Raises OSError,
    NoExport among them.
    """
    with _as_os_error():
        if not await _greet(stream):
            return None
        has_chunks = await _optional(stream, _STRUCTURED_REPLY, b"") is not None
        query = _counted(name.encode()) + struct.pack(">I", 1) + _counted(_EXTENTS)
        contexts = await _optional(stream, _SET_META_CONTEXT, query) if has_chunks else None
        try:
            found = {info[:2]: info for info in await _go(stream, name, _BLOCK_SIZE)}
        except _Refused as error:
            if error.kind == _UNSUPPORTED:
                return None
            raise
    try:
        _, size, flags = _INFO_EXPORT.unpack(found[b"\0\0"])
        _, least, _, most = _INFO_BLOCK_SIZE.unpack(found.get(b"\0\3", _ANY_BLOCK_SIZE))
    except (KeyError, struct.error):
        raise OSError(errno.EPROTO, "the server does not tell what it has opened") from None
    alignment, largest = max(least, ALIGNMENT), min(most, LARGEST)
    if least.bit_count() != 1 or alignment > _LARGEST_ALIGNMENT or largest < 2 * alignment:
        return None
    one_part, more = bool(flags & _TAKES_ONE_PART), bool(flags & _TAKES_MORE_CONNECTIONS)
    return Export(size, has_chunks, bool(contexts), alignment, largest, has_chunks and one_part, more)


async def _greet(stream: trio.SocketStream) -> bool:
    """Whether the server speaks the fixed newstyle. Raises OSError."""
    first, second, flags = _GREETING.unpack(await _exactly(stream, _GREETING.size))
    if first != b"NBDMAGIC":
        raise OSError(errno.EPROTO, "is no NBD server")
    if second != _HAVE_OPTION or not flags & _FIXED_NEWSTYLE:
        return False
    await stream.send_all(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
    return True


async def _go(stream: trio.SocketStream, name: str, *wanted: int) -> list[bytes]:
    """Open the export; what the server tells of it, and of what is `wanted` to be known. Raises OSError."""
    return await _option(stream, _GO, _counted(name.encode()) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted))


def _counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


async def _optional(stream: trio.SocketStream, number: int, data: bytes) -> list[bytes] | None:
    """`_option`; None where it is not granted."""
    try:
        return await _option(stream, number, data)
    except _Refused:
        return None


async def _option(stream: trio.SocketStream, number: int, data: bytes) -> list[bytes]:
    """Ask for it, and wait until it is granted; what the server tells of it. Raises OSError."""
    await stream.send_all(_OPTION.pack(_HAVE_OPTION, number, len(data)) + data)
    told: list[bytes] = []
    while True:
        magic, _, kind, length = _OPTION_REPLY.unpack(await _exactly(stream, _OPTION_REPLY.size))
        if magic != _REPLY_MAGIC or length > _LONGEST or len(told) > _MOST:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        text = await _exactly(stream, length)
        if kind == _ACK:
            return told
        if kind == _UNKNOWN_EXPORT:
            raise NoExport
        if kind not in (_INFO, _META_CONTEXT):
            raise _Refused(kind, text.decode(errors="replace"))
        told.append(text)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise OSError(errno.ECONNRESET, "the server has closed the connection")
        data += part
    return bytes(data)
