"""A raw disk on an NBD server, read by a connection of our own: no daemon stands between.

Requests go out as they come, as many as there are, and are answered in any order: who waits for one does not have the
link stand still, and answers are received straight into the buffers of those who asked. (QEMU's FUSE export has what
came first wait for what came later, and every byte is copied twice more; see docs/measured.md.) With structured
replies zeros are not sent, and the server is asked where its holes are.

What is read ahead of who waits for it (`reads_ahead`) goes by a connection of its own, where the server takes one more.
Much may be under way there, so that neither server nor link stand still where processors are short; but TCP has no more
of it on the link than that can hold. So the answer that somebody waits for overtakes all that still is at the server.

It takes the place of a storage daemon under a `qemu_supervisor.Supervisor`, which makes the next connection where one
has ended. All but plain reading by plain NBD is left to the daemon: writing, TLS, formats, servers of before 2016.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar

import trio

from fvdfs.errors import FvdError, ImageError, Unreachable
from fvdfs.format.header import round_up
from fvdfs.store.connecting import SILENCE, acknowledge, connect, round_trip, silence, take_at_most
from fvdfs.store.locations import Location
from fvdfs.store.nbd_client import REPLY, REQUEST, REQUEST_MAGIC, SIMPLE_MAGIC, Command, Export, negotiate

log = logging.getLogger(__name__)

OPEN_TIMEOUT = 10.0  # seconds until the server has opened the export
_LONGEST_STATUS = 1 << 31  # bytes that a server is asked about at a time
_LONGEST_TEXT = 1 << 16  # bytes of a chunk that is no data
_ASIDE = 64 << 10  # bytes received at a time that nobody wants any more
_ENOUGH = 128 << 10  # bytes that have to be there until the event loop is woken for the rest of an answer
_PACE, _PACES = 0.1, 50  # seconds over which a rate is measured, and how many of them count
_LEAST_ROOM = 128 << 10  # bytes that the way to the server may hold in any case
_HICCUP = 0.0025  # seconds that it goes on for while nobody receives: programs wait for a processor
_GAIN = 1.5  # as long as the link can hold more than it has, its rate is taken for lower than it is
_IN_A_ROW = 32  # times that something is received before other tasks get their turn
_MOST_GAPS = 1024  # of one answer, whose parts come in any order
_STRUCTURED_MAGIC = 0x668E33EF
_CHUNK = struct.Struct(">IHHQI")
_ONE_PART, _ONE_EXTENT = 1 << 2, 1 << 3  # flags of a request
_DATA_KNOWN = 64  # extents with data that are remembered
_DONE = 1  # flag of a chunk: the last one
_NOTHING, _DATA, _HOLE, _STATUS = 0, 1, 2, 5
_ERROR = 1 << 15
_ZERO = 1 << 1  # of an extent: reads as zeros
_ERRORS = (errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP)


class Ahead:
    """Somebody who reads ahead."""

    room = 0
    """Bytes that are on the way to him at the most, where he has a connection for himself; 0: he has none."""


reads_ahead: ContextVar[Ahead | None] = ContextVar("reads_ahead", default=None)
"""Whoever this task, and all that it starts, reads ahead for."""


class _Pace:
    """How fast answers come, and so how much the way to the server can hold. Times are seconds, sizes bytes."""

    def __init__(self) -> None:
        self._since = self._bytes = 0.0
        self._rates: deque[float] = deque([0.0], maxlen=_PACES)

    def came(self, now: float, size: int) -> None:
        """Something was received."""
        if now - self._since > 2 * _PACE:  # it was idle
            self._since, self._bytes = now, 0.0
            return
        self._bytes += size
        if now - self._since > _PACE:
            self._rates.append(self._bytes / (now - self._since))
            self._since, self._bytes = now, 0.0

    def room(self, round_trip: float) -> int:
        """Bytes that the way should hold at the most; others wait for what it holds."""
        rate = max(self._rates)
        return int(max(_LEAST_ROOM, rate * _HICCUP) + _GAIN * rate * round_trip)


class _Asked:
    """A request that is under way."""

    __slots__ = ("done", "error", "extent", "gaps", "offset", "size", "view")

    def __init__(self, offset: int, view: memoryview | None) -> None:
        """`view`: to be filled with what is there from `offset` on; None: nothing is read."""
        self.offset = offset
        self.view = view
        self.size = len(view) if view is not None else 0
        self.gaps = [(0, self.size)] if self.size else []
        """What is not filled yet, from the beginning of `view` on."""
        self.error: OSError | None = None
        self.extent: tuple[int, int] | None = None  # its length, and flags
        self.done = trio.Event()

    def take(self, start: int, stop: int) -> bool:
        """Fill this part, which is wanted, and was not filled before; whether that is so."""
        for number, (first, end) in enumerate(self.gaps):
            if first <= start < stop <= end:
                self.gaps[number : number + 1] = [gap for gap in ((first, start), (stop, end)) if gap[0] < gap[1]]
                return len(self.gaps) <= _MOST_GAPS
        return False


class NbdReader:
    """One connection to one export. Offsets and sizes in bytes."""

    pid = 0
    flush_failed = False
    is_cut_off = False

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        export: Export,
        another: Callable[[], Awaitable[NbdReader | None]] | None = None,
    ) -> None:
        """`connection`: with the export open. Call in the event loop, which receives until `stop`.

        `another`: makes one more of the same, for what is read ahead. Raises FvdError, OSError.
        """
        self._name = name
        self._socket = connection
        self._export = export
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._data: deque[tuple[int, int]] = deque(maxlen=_DATA_KNOWN)
        """Where the server has said that there is some; nobody writes there as long as this is read."""
        self._another = another if export.takes_more and connection.family != socket.AF_UNIX else None
        self._beside: NbdReader | None = None
        self._making = trio.Lock()
        self._pace = _Pace()
        self._sending = trio.Lock()
        self._ending = threading.Lock()
        """Held while the socket is shut down or closed."""
        self._enough = 1
        self._in_a_row = 0
        self._aside = memoryview(bytearray(_ASIDE))
        self._failure: OSError | None = None
        self._stopped = False
        self.size = export.size
        self.users = 0
        self.gone = False
        self.verdict = ""
        trio.lowlevel.spawn_system_task(self._receive)

    # --- as a daemon (`qemu_supervisor.Server`) -----------------------------------------------------

    @property
    def export(self) -> NbdReader:
        """What it reads."""
        return self

    @property
    def alive(self) -> bool:
        """Whether it was not stopped."""
        return not self._stopped

    @property
    def is_connected(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._failure is None and not self._stopped

    @property
    def last_words(self) -> str:
        """How it has ended."""
        return self.verdict or (self._failure.strerror if self._failure is not None else "") or "it was stopped"

    def kill_if_silent(self) -> None:
        """`stop`, where nothing is heard from the server."""
        beside = self._beside
        is_silent = beside is not None and beside.is_connected and silence(beside._socket) > SILENCE
        if self.is_connected and (is_silent or silence(self._socket) > SILENCE):
            self.verdict = f"nothing was heard from its server for {SILENCE:.0f} s"
            self.kill()

    def kill(self) -> None:
        """`stop`."""
        self.stop()

    def stop(self, *, gently: bool = False) -> None:
        """End the connection; what is under way fails. From any thread."""
        self._stopped = True
        if self._beside is not None:
            self._beside.stop()
        with self._ending:
            if not self._sending.locked():
                with suppress(OSError):  # it has ended already, or does not take it
                    self._socket.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0))
            self._shut_down()

    def _shut_down(self) -> None:
        """Have the receiver end."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    async def flush(self) -> None:
        """Nothing: nothing is written."""

    def flush_now(self) -> None:
        """The same."""

    # --- reading ------------------------------------------------------------------------------------

    async def pread(self, buffer: memoryview, offset: int) -> int:
        """As `Store.pread`."""
        ahead = reads_ahead.get()
        if ahead is not None and (beside := await self._reader_beside()) is not None:
            count = await beside._pread(buffer, offset, self._data)
            ahead.room = beside._make_room()
            return count
        return await self._pread(buffer, offset, self._data)

    async def _reader_beside(self) -> NbdReader | None:
        """For what is read ahead; None: there is none."""
        if self._another is None:
            return self._beside
        async with self._making:
            if self._another is not None and not self._stopped:
                try:
                    self._use(await self._another())
                except (FvdError, OSError) as error:
                    log.warning("%s: no connection for what is read ahead: %s", self._name, error)
                self._another = None
        return self._beside

    def _use(self, made: NbdReader | None) -> None:
        """For what is read ahead."""
        if made is not None and (made.size != self.size or self._stopped):
            made.stop()
        else:
            self._beside = made

    def _make_room(self) -> int:
        room = self._pace.room(round_trip(self._socket))
        take_at_most(self._socket, room)
        return room

    async def _pread(self, buffer: memoryview, offset: int, data: Iterable[tuple[int, int]]) -> int:
        """`data`: where the server has said that there is some."""
        count = max(0, min(len(buffer), self.size - offset))
        at = 0
        while at < count:
            part = min(count - at, self._export.largest - self._export.alignment)
            await self._read(buffer[at : at + part], offset + at, data)
            at += part
        return count

    async def _read(self, view: memoryview, offset: int, data: Iterable[tuple[int, int]]) -> None:
        start, stop = self._aligned(offset, offset + len(view))
        # A server that has called it data need not look for holes again, which takes qemu-storage-daemon a call.
        flags = _ONE_PART if any(first <= start and stop <= end for first, end in data) else 0
        if stop - start == len(view):
            await self._ask(Command.READ, start, stop - start, _Asked(start, view), flags)
            return
        around = memoryview(bytearray(stop - start))
        await self._ask(Command.READ, start, stop - start, _Asked(start, around), flags)
        view[:] = around[offset - start : offset - start + len(view)]

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """As `Store.extent`. What reads as zeros is a hole, whether the server has stored that or not."""
        if not self._export.has_extents or start >= self.size:
            return stop, False
        first, end = self._aligned(start, min(stop, start + _LONGEST_STATUS))
        asked = _Asked(first, None)
        await self._ask(Command.BLOCK_STATUS, first, end - first, asked, _ONE_EXTENT)
        if asked.extent is None or first + asked.extent[0] <= start:
            raise OSError(errno.EIO, f"{self._name}: the server does not say what is at {start}")
        length, flags = asked.extent
        if self._export.takes_one_part and not flags & _ZERO:
            self._data.append((first, first + length))
        return min(first + length, stop), bool(flags & _ZERO)

    def _aligned(self, start: int, stop: int) -> tuple[int, int]:
        unit = self._export.alignment
        return start // unit * unit, min(round_up(stop, unit), self.size)

    async def _ask(self, command: Command, offset: int, length: int, asked: _Asked, flags: int = 0) -> None:
        """Send a request, and wait for its answer. Raises OSError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._failure is not None or self._stopped:
            raise self._lost()
        self._number = number = self._number + 1
        self._asked[number] = asked
        try:
            await self._send(REQUEST.pack(REQUEST_MAGIC, flags, command, number, offset, length))
            await asked.done.wait()
        finally:
            asked.view = None  # who was cancelled may use the buffer for something else
        if asked.error is not None:
            raise asked.error

    async def _send(self, request: bytes) -> None:
        """All of it, even if cancelled: what follows would make no sense."""
        with trio.CancelScope(shield=True):
            async with self._sending:
                left = memoryview(request)
                while left and self.is_connected:
                    try:
                        left = left[self._socket.send(left) :]
                    except BlockingIOError:
                        with suppress(trio.ClosedResourceError):  # by the receiver
                            await trio.lowlevel.wait_writable(self._socket)
                    except OSError:  # the receiver finds out why, and tells all
                        self._shut_down()
                        return

    # --- receiving ----------------------------------------------------------------------------------

    async def _receive(self) -> None:
        failure = OSError(errno.ECONNRESET, "the connection was ended")
        try:
            while True:
                await (self._receive_chunk() if self._export.has_chunks else self._receive_answer())
        except OSError as error:
            failure = error
        finally:
            self._failure = failure
            trio.lowlevel.notify_closing(self._socket)
            with self._ending:
                self._socket.close()
            for asked in self._asked.values():
                asked.error = self._lost()
                asked.done.set()
            self._asked.clear()

    def _lost(self) -> OSError:
        """For who asks a connection that has ended."""
        return OSError(errno.ECONNRESET, self.last_words)

    async def _receive_answer(self) -> None:
        """One simple reply."""
        magic, error, number = REPLY.unpack(await self._exactly(REPLY.size))
        asked = self._asked.get(number)
        if magic != SIMPLE_MAGIC or asked is None:
            raise _nonsense("no simple reply to what was asked")
        if error:
            asked.error = self._refusal(error, "")
        else:
            await self._fill(asked, asked.offset, asked.size)
        self._finish(number)

    async def _receive_chunk(self) -> None:
        """One part of a structured reply."""
        magic, flags, kind, number, length = _CHUNK.unpack(await self._exactly(_CHUNK.size))
        asked = self._asked.get(number)
        if magic != _STRUCTURED_MAGIC or asked is None:
            raise _nonsense("no structured reply to what was asked")
        if kind == _DATA and length > 8:
            (offset,) = struct.unpack(">Q", await self._exactly(8))
            await self._fill(asked, offset, length - 8)
        elif kind == _HOLE and length == 12:
            await self._fill(asked, *struct.unpack(">QI", await self._exactly(12)), zeros=True)
        elif kind == _STATUS and 12 <= length <= _LONGEST_TEXT:
            asked.extent = struct.unpack_from(">II", await self._exactly(length), 4)
        elif kind & _ERROR and 6 <= length <= _LONGEST_TEXT:
            code, size = struct.unpack_from(">IH", text := await self._exactly(length))
            asked.error = self._refusal(code, text[6 : 6 + size].decode(errors="replace"))
        elif kind != _NOTHING or length:
            raise _nonsense(f"a chunk of kind {kind:#x} and {length} bytes")
        if flags & _DONE:
            if asked.gaps and asked.error is None:
                raise _nonsense(f"{sum(stop - start for start, stop in asked.gaps)} bytes are missing")
            self._finish(number)

    def _finish(self, number: int) -> None:
        acknowledge(self._socket)
        self._asked.pop(number).done.set()

    def _refusal(self, code: int, text: str) -> OSError:
        code = code if code in (*_ERRORS, errno.ESHUTDOWN) else errno.EIO
        return OSError(code, f"{self._name}: the server says: {text or os.strerror(code)}")

    async def _fill(self, asked: _Asked, offset: int, length: int, *, zeros: bool = False) -> None:
        """Receive so much of what is read, or take it for zeros."""
        at = offset - asked.offset
        if not asked.take(at, at + length):
            raise _nonsense(f"{length} bytes at {offset}, which were not asked for, or are there already")
        if zeros and asked.view is not None:
            asked.view[at : at + length] = bytes(length)
        stop = at + (0 if zeros else length)
        while at < stop:  # whoever asked may be cancelled while this waits
            at += await self._some(asked.view[at:stop] if asked.view is not None else self._aside[: stop - at])

    async def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            left = left[await self._some(left) :]
        return bytes(data)

    async def _some(self, view: memoryview) -> int:
        """Receive something, if it is there, or else wait for that first; the number of bytes, perhaps 0.

        0 where others had their turn meanwhile: the view may be another's by then.
        """
        self._in_a_row += 1
        if self._in_a_row > _IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
            return 0
        try:
            count = self._socket.recv_into(view)
            self._pace.came(trio.current_time(), count)
        except BlockingIOError:
            enough = min(len(view), _ENOUGH)
            if enough != self._enough:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
                self._enough = enough
            self._in_a_row = 0
            await trio.lowlevel.wait_readable(self._socket)
            return 0
        if not count:
            raise OSError(errno.ECONNRESET, "the server has closed the connection")
        return count


def _nonsense(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the server's answer makes no sense: {what}")


async def open_export(name: str, location: Location) -> NbdReader | None:
    """Connect to what is at this location; None where the server does not speak as is needed here.

    `name`: for messages. Raises Unreachable; ImageError where the server refuses.
    """
    made = await connect(location)
    assert made is not None
    try:
        with trio.fail_after(OPEN_TIMEOUT):
            export = await negotiate(trio.SocketStream(trio.socket.from_stdlib_socket(made)), _export_of(location))
        another = functools.partial(open_export, name, location)
        reader = NbdReader(name, made, export, another) if export is not None else None
    except BaseException as error:
        made.close()
        if isinstance(error, trio.TooSlowError):
            raise Unreachable(name, f"no answer within {OPEN_TIMEOUT:.0f} seconds") from None
        if isinstance(error, OSError) and error.errno != errno.ECONNRESET:
            raise ImageError(name, error.strerror or str(error)) from error
        if isinstance(error, OSError):
            raise Unreachable(name, error.strerror or str(error)) from error
        raise
    if reader is None:
        made.close()
    return reader


def _export_of(location: Location) -> str:
    return str(location.protocol["export"])
