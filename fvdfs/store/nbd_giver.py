"""What a reader reads, given to a storage daemon by NBD over a pair of sockets: read only, to one client.

It speaks the fixed newstyle handshake and simple replies. It ends with the connection, and ends it where the reader
has failed: the daemon has lost its server then.
"""

from __future__ import annotations

import socket
import struct

import trio

from fvdfs.store.nbd_client import REPLY, REQUEST, REQUEST_MAGIC, SIMPLE_MAGIC, Command
from fvdfs.store.web_reader import WebReader

_WATCH_INTERVAL = 1.0  # seconds between two looks whether the server is silent
_HAVE_OPTION, _REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _TELL, _UNSUPPORTED = 1, 3, 0x8000_0001
_READ_ONLY = 1 | 1 << 1
_LONGEST = 1 << 16  # bytes of an option
_MOST = 1 << 25  # bytes of a read
_INVALID = 22


def give(reader: WebReader) -> socket.socket:
    """The daemon's end of the connection. Call in the event loop, which answers until one of both ends."""
    ours, theirs = socket.socketpair()
    trio.lowlevel.spawn_system_task(_serve, reader, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    return theirs


async def _serve(reader: WebReader, stream: trio.SocketStream) -> None:
    try:
        if await _negotiate(reader, stream):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, reader)
                await _Answers(reader, stream).run(nursery)
                nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
        pass
    finally:
        reader.stop()
        await trio.aclose_forcefully(stream)


async def _watch(reader: WebReader) -> None:
    while True:
        await trio.sleep(_WATCH_INTERVAL)
        reader.kill_if_silent()


async def _negotiate(reader: WebReader, stream: trio.SocketStream) -> bool:
    """Whether the client has opened the export."""
    await stream.send_all(struct.pack(">8s8sH", b"NBDMAGIC", _HAVE_OPTION, _FIXED_NEWSTYLE | _NO_ZEROES))
    (flags,) = struct.unpack(">I", await _exactly(stream, 4))
    export = struct.pack(">QH", reader.size, _READ_ONLY)
    while True:
        magic, option, length = struct.unpack(">8sII", await _exactly(stream, 16))
        if magic != _HAVE_OPTION or length > _LONGEST:
            return False
        await _exactly(stream, length)
        if option == _EXPORT_NAME:
            await stream.send_all(export + (b"" if flags & _NO_ZEROES else bytes(124)))
            return True
        if option in (_INFO, _GO):
            await stream.send_all(_told(option, _TELL, struct.pack(">H", 0) + export) + _told(option, _ACK))
            if option == _GO:
                return True
        elif option == _ABORT:
            await stream.send_all(_told(option, _ACK))
            return False
        else:
            await stream.send_all(_told(option, _UNSUPPORTED))


def _told(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data


class _Answers:
    """Requests of one client, answered as their answers come."""

    def __init__(self, reader: WebReader, stream: trio.SocketStream) -> None:
        self._reader = reader
        self._stream = stream
        self._sending = trio.Lock()

    async def run(self, nursery: trio.Nursery) -> None:
        """Until the client has had enough, or the reader has failed."""
        while True:
            magic, _, command, number, offset, length = REQUEST.unpack(await _exactly(self._stream, REQUEST.size))
            if magic != REQUEST_MAGIC or command == Command.DISCONNECT:
                return
            if command != Command.READ or length > _MOST or offset + length > self._reader.size:
                await self._send(REPLY.pack(SIMPLE_MAGIC, _INVALID, number))
            else:
                nursery.start_soon(self._read, nursery, number, offset, length)

    async def _read(self, nursery: trio.Nursery, number: int, offset: int, length: int) -> None:
        data = bytearray(length)
        try:
            await self._reader.pread(memoryview(data), offset)
        except OSError:
            nursery.cancel_scope.cancel()
            return
        await self._send(REPLY.pack(SIMPLE_MAGIC, 0, number) + data)

    async def _send(self, data: bytes | bytearray) -> None:
        async with self._sending:
            await self._stream.send_all(data)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Raises EOFError at the end, and what trio raises."""
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
