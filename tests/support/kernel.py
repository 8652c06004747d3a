"""The other ends of a `Device`, played by a test: a kernel that asks, over a socket pair, and a libfuse that answers.

    Kernel ── requests ──▶ Device ── all but READ, WRITE, ... ──▶ Libfuse
           ◀── answers ───        ◀───────────────────────────────

Messages keep their bounds (SOCK_SEQPACKET), as on /dev/fuse. A socket holds no more than ten of them, of some 400 KiB.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import pyfuse3
import pytest
import trio

from fvdfs.ops.device import Device, Requests
from fvdfs.ops.wire import (
    FALLOCATE,
    FUSE_FALLOCATE,
    FUSE_FSYNC,
    FUSE_INIT,
    FUSE_INTERRUPT,
    FUSE_LSEEK,
    FUSE_READ,
    FUSE_WRITE,
    FUSE_WRITEBACK_CACHE,
    IN_HEADER,
    LSEEK,
    OUT_HEADER,
    PLACE,
)

MAX_WRITE = 128 << 10  # bytes
BUFFER = 1 << 20  # bytes; more than any message
GETATTR = 3  # an opcode that is libfuse's
_INIT = struct.Struct("=IIII48x")
_INIT_ANSWER = struct.Struct("=IIIIHHI36x")
_READ = struct.Struct("=QQII8xI4x")  # fh offset size flags, flags of the file
_FSYNC = struct.Struct("=Q8x")


class Kernel:
    """Sends requests, and collects the answers."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._last = 0
        self._arrived = trio.Event()
        self.answers: dict[int, tuple[int, bytes]] = {}
        """Those that nobody has waited for yet: error and data, by the number of the request."""
        self.answered: list[int] = []
        """The numbers of the requests that were answered, in order."""

    def send(self, opcode: int, body: bytes = b"", inode: int = 1) -> int:
        """Send a request; its number."""
        self._last += 2  # odd numbers are those of interrupts
        self._end.send(IN_HEADER.pack(IN_HEADER.size + len(body), opcode, self._last, inode, 0, 0, 0, 0, 0) + body)
        return self._last

    def send_message(self, opcode: int, message: bytes, declared: int | None = None) -> int:
        """Send a message whose header may be cut short, or say another length than it has; its number."""
        self._last += 2
        header = IN_HEADER.pack(len(message) if declared is None else declared, opcode, self._last, 1, 0, 0, 0, 0, 0)
        self._end.send(header[: len(message)] + message[len(header) :])
        return self._last

    def send_read(self, fh: int, offset: int, size: int, flags: int = 0) -> int:
        return self.send(FUSE_READ, _READ.pack(fh, offset, size, 0, flags))

    def send_write(self, fh: int, offset: int, data: bytes, flags: int = 0, own_flags: int = 0) -> int:
        return self.send(FUSE_WRITE, _READ.pack(fh, offset, len(data), own_flags, flags) + data)

    def send_fsync(self, fh: int) -> int:
        return self.send(FUSE_FSYNC, _FSYNC.pack(fh))

    def interrupt(self, unique: int) -> None:
        """Ask for the end of a request, which need not come."""
        self._end.send(IN_HEADER.pack(48, FUSE_INTERRUPT, unique | 1, 0, 0, 0, 0, 0, 0) + struct.pack("=Q", unique))

    async def message(self, unique: int) -> tuple[int, bytes]:
        """Error and data of an answer; 0: of what the kernel is told unasked, whose code is its error, negative."""
        with trio.fail_after(60):
            while unique not in self.answers:
                await self._arrived.wait()
        return self.answers.pop(unique)

    async def answer(self, unique: int) -> bytes:
        """The data of an answer. Raises OSError, where the answer is one."""
        error, data = await self.message(unique)
        if error:
            raise OSError(error, os.strerror(error))
        return data

    async def read(self, fh: int, offset: int, size: int, flags: int = 0) -> bytes:
        return await self.answer(self.send_read(fh, offset, size, flags))

    async def write(self, fh: int, offset: int, data: bytes, flags: int = 0, own_flags: int = 0) -> int:
        """How many bytes are said to be written."""
        answer = await self.answer(self.send_write(fh, offset, data, flags, own_flags))
        return int(struct.unpack("=I4x", answer)[0])

    async def fsync(self, fh: int) -> None:
        assert await self.answer(self.send_fsync(fh)) == b""

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        body = FALLOCATE.pack(fh, offset, length, mode)[IN_HEADER.size :]
        assert await self.answer(self.send(FUSE_FALLOCATE, body)) == b""

    async def seek(self, fh: int, offset: int, whence: int) -> int:
        body = LSEEK.pack(fh, offset, whence)[IN_HEADER.size :]
        return int(PLACE.unpack(await self.answer(self.send(FUSE_LSEEK, body)))[0])

    async def receive(self) -> None:
        """Collect answers, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._end)
            message = self._end.recv(BUFFER)
            length, error, unique = OUT_HEADER.unpack_from(message)
            assert length == len(message)
            assert unique not in self.answers, "answered twice"
            self.answers[unique] = -error, message[OUT_HEADER.size :]
            self.answered.append(unique)
            self._arrived.set()
            self._arrived = trio.Event()


class Libfuse:
    """Answers INIT, and every other request with ENOSYS; what there was of these."""

    init_error = 0

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end: trio.CancelScope | None = None
        self.requests: list[bytes] = []

    async def main(self, **_: object) -> None:
        """In the place of `pyfuse3.main`."""
        with trio.CancelScope() as self._end:
            while True:
                await trio.lowlevel.wait_readable(self._descriptor)
                request = os.read(self._descriptor, BUFFER)
                _, opcode, unique, *_rest = IN_HEADER.unpack_from(request)
                if opcode == FUSE_INIT and self.init_error:
                    os.write(self._descriptor, OUT_HEADER.pack(OUT_HEADER.size, -self.init_error, unique))
                elif opcode == FUSE_INIT:
                    body = _INIT_ANSWER.pack(7, 38, 1 << 17, 1 | FUSE_WRITEBACK_CACHE, 12, 9, MAX_WRITE)
                    os.write(self._descriptor, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
                else:
                    self.requests.append(request)
                    os.write(self._descriptor, OUT_HEADER.pack(OUT_HEADER.size, -errno.ENOSYS, unique))

    def terminate(self) -> None:
        """In the place of `pyfuse3.terminate`."""
        assert self._end is not None
        self._end.cancel()

    def close(self) -> None:
        """In the place of `pyfuse3.close`."""
        os.close(self._descriptor)


def run_device(
    requests: Requests,
    work: Callable[[Kernel, Device, Libfuse], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve while `work` asks; then terminate, and wait for what is under way."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        kernel = Kernel(ours)
        init = kernel.send(FUSE_INIT, _INIT.pack(7, 38, 1 << 17, 0xFFFFFFFF))
        ours.setblocking(False)
        served = Device(requests, theirs.detach())
        libfuse = Libfuse(int(os.path.basename(served.libfuses_end)))
        monkeypatch.setattr(pyfuse3, "terminate", libfuse.terminate)

        async def main() -> None:
            async with trio.open_nursery() as outer:
                outer.start_soon(kernel.receive)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(served.serve, libfuse.main)
                    answered = await kernel.message(init)
                    assert answered[0] == libfuse.init_error
                    assert len(answered[1]) == (0 if libfuse.init_error else _INIT_ANSWER.size)
                    await work(kernel, served, libfuse)
                    served.terminate()
                outer.cancel_scope.cancel()

        try:
            trio.run(main)
        finally:
            served.close()
            libfuse.close()
