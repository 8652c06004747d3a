"""The kernel's end of a mount: requests for a disk's bytes are answered here (`wire.NAMES`), all else by libfuse.

pyfuse3, and libfuse under it, answer one request a turn of the event loop, each in a task of its own.
That is fine for opening and listing; for READ, WRITE and FSYNC, most of a disk's traffic, it would be most of the cost;
and pyfuse3 does not know FALLOCATE, LSEEK and COPY_FILE_RANGE. So these take a shorter way.
All requests that the kernel has queued are received in one turn:

1. what needs no waiting is answered at once;
2. what can be started without a task (`Pending.start`) is answered when it has ended;
3. the rest is done by a task (`Pending.finish`).

What a former daemon had in hand when it ended (`kept.py`) the kernel sends again, with a bit in its number. By then it
may have been done, all of it or a part, and nobody knows. It is done once more:

- READ, LSEEK, GETATTR, LOOKUP, READDIR and the like change nothing.
- WRITE, FALLOCATE and COPY_FILE_RANGE leave the same bytes as before. Whoever asked still waits for the answer, so that
  others who have changed the same bytes meanwhile did so at the same time, in an order that nobody was promised.
- SETATTR sets the same size, mode, owner and times. The kernel lets nobody write to a disk while its size is set.
- FSYNC and FLUSH make durable what is there.
- OPEN gets another handle; the one that nobody was told of is given up (`Requests.abandon`).
- RELEASE and RELEASEDIR of a handle that is gone have succeeded. FORGET is not answered, and so not sent again: what
  the kernel knew before counts as known for ever (`inodes.py`).
- CREATE of a disk that the former daemon was asked to make for the same request finds it made, and opens it.
- UNLINK, RENAME and REMOVEXATTR of what is gone have succeeded: the kernel has seen it before it asked.
- SETXATTR of an access list sets the same. What is asked of a disk by such an attribute (a snapshot, a step of a move,
  a merge of layers) may have begun: the answer is EINTR, and whoever asked looks at its state, as after a crash.

A kernel before Linux 6.9 sends nothing again, and names nothing of it. But it numbers requests in their order, and
takes no offence at the answer to one that it has not handed out. So all numbers from the oldest that may have been in
hand (`Requests.in_hand`) up to the first new one are answered with EIO (`Device._give_up_lost`).

Everything else goes to libfuse through a socket, which it was given for /dev/fuse (`attach.py`), and its answers
come back that way. The messages are in `wire`.

Direct I/O (O_DIRECT) that does not begin and end at a sector is answered with EINVAL, as by file systems on disks:
programs, QEMU for one, find out in this way in which units they can read and write. If it were done, QEMU would take
4096 for the unit, and could not write a disk with an odd number of sectors.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import math
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Protocol

import outcome
import pyfuse3
import trio

from fvdfs import xattrs
from fvdfs.format.header import SECTOR
from fvdfs.ops.lingering import Linger
from fvdfs.ops.wire import (
    COPIED,
    COPY,
    CREATE_IN,
    ENTRY_OUT,
    FALLOCATE,
    FATTR_FH,
    FATTR_TIMES,
    FUSE_BATCH_FORGET,
    FUSE_COPY_FILE_RANGE,
    FUSE_COPY_FILE_RANGE_64,
    FUSE_CREATE,
    FUSE_FALLOCATE,
    FUSE_FORGET,
    FUSE_FSYNC,
    FUSE_INTERRUPT,
    FUSE_LSEEK,
    FUSE_NOTIFY_INVAL_INODE,
    FUSE_NOTIFY_RESEND,
    FUSE_OPEN,
    FUSE_READ,
    FUSE_REMOVEXATTR,
    FUSE_RENAME,
    FUSE_RENAME2,
    FUSE_SETATTR,
    FUSE_SETXATTR,
    FUSE_UNIQUE_RESEND,
    FUSE_UNLINK,
    FUSE_WRITE,
    FUSE_WRITE_CACHE,
    IN_HEADER,
    INIT_OUT,
    INVALIDATE,
    LSEEK,
    NAMES,
    OUT_HEADER,
    PLACE,
    SETATTR,
    TRANSFER,
    WRITTEN,
    agrees,
    amend,
    amend_open,
    encode,
    handle_in,
    is_whole,
    opens_direct,
    passes_through,
    resends,
    writes_back,
    writes_side_by_side,
)
from fvdfs.store import uring
from fvdfs.store.base import Buffer, Pending
from fvdfs.store.outage import Interrupt, asked_by

log = logging.getLogger(__name__)

_PER_TURN = 32  # requests that are received before other tasks get their turn
_LOOK = 0.001  # seconds between two looks whether all is answered
_IDLE_TASKS = 16  # that wait for work: to wake one costs less than to make one
_SMALL = 64 << 10  # bytes; a write up to this size is copied out of the buffer that it was received in
_SPARE_BUFFERS = 16  # of the longest message, about 1 MiB each
_PID = struct.Struct("=32xI")  # of a request: the thread that asked
_BACKING = struct.Struct("=iIQ")  # descriptor flags padding
_BACKING_NUMBER = struct.Struct("=I")
_BACKING_OPEN, _BACKING_CLOSE = 0x4010_E501, 0x4004_E502  # ioctls of linux/fuse.h
_DIRECT_AND_DURABLE = os.O_DIRECT | os.O_DSYNC
"""The flags of a WRITE that is to be durable when it is answered (O_DSYNC, RWF_DSYNC). After other writes that are, the
kernel sends FSYNC; after direct ones only where a thread waits for them, and they do not go side by side."""
_ONCE = (xattrs.SNAPSHOT, xattrs.MOVE, xattrs.LAYERS, xattrs.UPGRADE)
"""The attributes that are not to be set twice."""
NO_RESEND = "FVDFS_NO_RESEND"
"""The variable of the environment that has any kernel be taken for one before Linux 6.9."""
_STEP = 2  # from the number of one request to that of the next
_TELLING = 1.0  # seconds
_MOST_LOST = 20_000_000  # requests
_UNNUMBERED = (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT)
_GONE = (FUSE_UNLINK, FUSE_RENAME, FUSE_RENAME2, FUSE_REMOVEXATTR)
_LARGEST = 2 << 20  # bytes; the buffer for INIT that the kernel asks for; no answer of libfuse is larger


class Requests(Protocol):
    """Who does what is answered here. What fails raises an exception, which `error_number` turns into an answer."""

    def begin_read(self, fh: int, offset: int, buffer: memoryview, /) -> int | Pending:
        """`Image.begin_read`."""

    def begin_write(self, fh: int, offset: int, data: memoryview, /, *, durable: bool) -> Pending:
        """Write all of the data, which is in a writable buffer. `durable`: and have it survive a power cut."""

    def begin_fallocate(self, fh: int, mode: int, offset: int, length: int, /) -> Pending:
        """fallocate(2)."""

    def begin_seek(self, fh: int, offset: int, whence: int, /) -> int | Pending:
        """lseek(2) with SEEK_DATA or SEEK_HOLE: the place, or the search for it that has to wait."""

    def begin_copy(self, fh: int, offset: int, source_fh: int, source_offset: int, length: int, /) -> Pending:
        """copy_file_range(2) to `offset`, of at most `length` bytes; the number of bytes."""

    def begin_fsync(self, fh: int, /) -> Pending | None:
        """Make durable what was written; None: the mount does not do so."""

    def agreed(self, *, writeback: bool) -> None:
        """INIT was exchanged: whether the kernel gathers writes."""

    def exchanged(self, request: bytes, answer: bytes, /) -> None:
        """INIT was exchanged, with these messages."""

    def in_hand(self, unique: int, /) -> None:
        """No request before this one is in hand."""

    def opened(self, fh: int, unique: int, /) -> None:
        """The kernel is about to get this handle, as the answer to the request of this number."""

    def abandon(self, unique: int, /) -> None:
        """The handle that a former daemon has made for this request is nobody's."""

    def creates(self, unique: int, name: bytes, *, again: bool) -> None:
        """A disk is to be made; `again`: perhaps a former daemon has made it, for the same request."""

    def created(self, unique: int, /) -> None:
        """That request is about to be answered: the disk was made, or could not be."""

    def backing_of(self, fh: int, /) -> int:
        """The number of the file that the kernel has for a handle (`Device.open_backing`); 0: none."""

    def set_mtime(self, inode: int, mtime_ns: int, /) -> pyfuse3.EntryAttributes | None:
        """Set the mtime, if it need only be remembered; the attributes then, else None."""

    def answered(self, fh: int, what: str, result: int, nanoseconds: int, /) -> None:
        """A request was answered, so long after it was received."""

    def error_number(self, error: Exception, fh: int, what: str, /) -> int:
        """The errno to answer a failed request with; logs what the errno does not tell."""


_Work = Callable[[], Awaitable[None]]


class Device:
    """/dev/fuse of one mount, and the socket that libfuse has instead of it."""

    def __init__(
        self,
        requests: Requests,
        kernel: int,
        *,
        debug: bool = False,
        passthrough: bool = False,
        settled: tuple[bytes, bytes] | None = None,
        adopt: _Work | None = None,
        oldest: int = 0,
    ) -> None:
        """`kernel`: the descriptor of /dev/fuse; `close` closes it.

        `debug`: log the requests that are answered here, as libfuse does with the others. `passthrough`: have the
        kernel read and write files by itself, where it can, rather than gather writes. `settled`: a former daemon has
        exchanged these messages for INIT; None: nobody has. Then `adopt` is done before any request is received.
        `oldest`: the number of the oldest request that the former daemon may have had in hand.
        """
        self._oldest = oldest
        self._tracks = False  # whether requests that libfuse has are in `_unanswered`, too
        self._last = 0  # the number of the last request that was received
        self.gives_up_lost = False
        """Whether the next request tells which ones the former daemon had in hand."""
        self._settled = settled
        self._adopt = adopt
        self._creating: set[int] = set()
        self._repeated: set[int] = set()  # requests that may have been done before, and then fail
        self._requests = requests
        self._debug = debug
        self._kernel = kernel
        os.set_blocking(kernel, False)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
            end.setblocking(False)
        self.libfuses_end = f"/dev/fd/{theirs.detach()}"
        """What libfuse is to take for a mount point; it closes it."""
        self._head = bytearray(TRANSFER.size)
        self._max_write = 0  # bytes of the largest WRITE that the kernel sends, once INIT is exchanged
        self._payload = memoryview(bytearray())
        self._spare: list[memoryview] = []
        self._idle: list[trio.lowlevel.Task] = []
        self._idle_limit = _IDLE_TASKS
        self._linger = Linger()
        self.connected = trio.Event()
        """Set when the kernel and libfuse have agreed on how to talk."""
        self.ending = trio.Event()
        """Set when the mount is gone, or is to go."""
        self._wants_passthrough = passthrough
        self.has_passthrough = False
        """Whether the kernel can; known once it is connected."""
        self._side_by_side = False  # whether direct writes may be under way side by side
        self._opening: dict[int, bool] = {}  # OPENs that libfuse has not answered yet: whether for direct I/O
        self._started = False  # whether a task was given work in this turn
        self._begun = 0  # requests under way without a task
        self._finishing = False  # whether no more are taken up
        self._goes_on = trio.Event()  # they are again
        self._unanswered: set[int] = set()  # all requests under way
        self._interrupts: dict[int, Interrupt] = {}  # of those that have a task
        self._ended: trio.Event | None = None
        self._to_libfuse, self._for_libfuse = trio.open_memory_channel[bytearray](math.inf)

    def close(self) -> None:
        """End the connection to the kernel."""
        os.close(self._kernel)
        self._socket.close()

    def refuse_rest(self) -> None:
        """Answer what is under way with EIO, though it may go on.

        Whoever writes to the kernel's end, as `forget_pages` does, may be waiting for just that, and keep it open.
        """
        for unique in self._unanswered:
            self._answer(unique, errno.EIO)

    def terminate(self) -> None:
        """Have `serve` end."""
        self.ending.set()
        pyfuse3.terminate()

    async def forget_pages(self, inode: int) -> None:
        """Have the kernel drop what it has cached of a file, after handing over what was written to it.

        It needs no name of the file, and no mount that the file can be reached by; requests must go on being served.
        To drop it as part of the opening would not do: who opens it next could be faster.
        """
        message = OUT_HEADER.pack(OUT_HEADER.size + INVALIDATE.size, FUSE_NOTIFY_INVAL_INODE, 0)
        message += INVALIDATE.pack(inode, 0, 0)
        await trio.to_thread.run_sync(self._notify, message, abandon_on_cancel=True)

    def _notify(self, message: bytes) -> None:
        try:
            os.write(self._kernel, message)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # it has nothing of it, or the mount is gone
                raise

    def open_backing(self, descriptor: int) -> int:
        """Give the kernel a file to read and write by itself; its number. Waits for nothing.

        Raises OSError: EPERM without CAP_SYS_ADMIN, ELOOP where the file is on a stacked file system.
        """
        message = bytearray(_BACKING.pack(descriptor, 0, 0))
        return int(fcntl.ioctl(self._kernel, _BACKING_OPEN, message))

    def close_backing(self, number: int) -> None:
        """Give no further opening this file; those that have it keep it. Waits for nothing. Raises OSError."""
        fcntl.ioctl(self._kernel, _BACKING_CLOSE, bytearray(_BACKING_NUMBER.pack(number)))

    async def serve(self, main: _Work) -> None:
        """Answer what the kernel asks while `main`, pyfuse3's loop, does its part; then finish what is under way."""
        async with trio.open_nursery() as self._workers:
            async with trio.open_nursery() as lines:
                lines.start_soon(self._converse, lines)
                await main()
                lines.cancel_scope.cancel()
            self._hand_back_now()
            while self._begun:
                self._ended = trio.Event()
                await self._ended.wait()
            self._idle_limit = 0
            for task in self._idle:
                trio.lowlevel.reschedule(task)
            self._idle.clear()

    # --- requests ---------------------------------------------------------------------------------

    async def _converse(self, lines: trio.Nursery) -> None:
        """Exchange INIT, then all other messages, until the mount is gone."""
        try:
            await self._exchange_init()
            lines.start_soon(self._pass_on)
            lines.start_soon(self._hand_back)
            with uring.followed_by(self._take_turn_after_calls):
                await self._receive()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            self.terminate()

    async def _exchange_init(self) -> None:
        """Have libfuse answer INIT, the kernel's first request, and the kernel get the answer amended."""
        if self._settled is None:
            await trio.lowlevel.wait_readable(self._kernel)
            request = os.read(self._kernel, _LARGEST)
        else:
            request = self._settled[0]
        self._socket.send(request)
        await trio.lowlevel.wait_readable(self._socket)
        answer = amend(request, self._socket.recv(_LARGEST), passthrough=self._wants_passthrough)
        if self._settled is None:
            if agrees(answer):
                self._requests.exchanged(request, answer)
            os.write(self._kernel, answer)
        elif agrees(answer):
            answer = self._settled[1]
        if not agrees(answer):
            log.error("the kernel and libfuse know no common version of FUSE")
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self.has_passthrough, self._side_by_side = passes_through(answer), writes_side_by_side(answer)
        self._requests.agreed(writeback=writes_back(answer))
        self._max_write = int(INIT_OUT.unpack_from(answer, OUT_HEADER.size)[-1])
        self._payload = self._take_buffer()
        sends_again = resends(request) and not os.environ.get(NO_RESEND)
        if self._settled is not None:
            if self._adopt is not None:
                await self._adopt()
            if sends_again:
                self._notify(OUT_HEADER.pack(OUT_HEADER.size, FUSE_NOTIFY_RESEND, 0))
            else:
                self.gives_up_lost = True
        self._tracks = not sends_again
        self.connected.set()

    async def finish(self, patience: float) -> bool:
        """Take up no request any more, and wait for those that are under way, for so many seconds.

        False: some are left, and the kernel would not send them again.
        """
        self._finishing, self._goes_on = True, trio.Event()
        with trio.move_on_after(patience):
            while self._unanswered or self._begun:  # noqa: ASYNC110  once in the life of a daemon
                await trio.sleep(_LOOK)
        return not (self._tracks and (self._unanswered or self._begun))

    def go_on(self) -> None:
        """Take up requests again, after `finish`."""
        self._finishing = False
        self._goes_on.set()

    async def tell_oldest(self) -> None:
        """Say now and then which requests may be in hand, where the kernel does not send them again."""
        await self.connected.wait()
        while self._tracks:
            self._requests.in_hand(min(self._unanswered, default=self._last + _STEP))
            await trio.sleep(_TELLING)

    def _give_up_lost(self, first: int) -> None:
        """Answer what the former daemon had in hand; `first`: the number of the first request that we have received."""
        self.gives_up_lost = False
        oldest = max(self._oldest, first - _MOST_LOST * _STEP)
        for unique in range(oldest, first, _STEP):
            self._answer(unique, errno.EIO)

    async def _receive(self) -> None:
        """Raises OSError; ENODEV: it was unmounted."""
        while True:
            await trio.lowlevel.wait_readable(self._kernel)
            if self._finishing:
                await self._goes_on.wait()
            self._take_turn()

    def _take_turn(self) -> None:
        """Take up the requests that are queued, and those that come soon after one. Raises OSError."""
        if self._finishing:
            return
        ring = uring.ring()
        with ring.gathered() if ring is not None else nullcontext():
            try:
                self._take_requests(self._linger.wakes(time.perf_counter_ns()), ring)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EINTR):  # a request was taken back
                    raise

    def _take_turn_after_calls(self) -> None:
        """Calls have ended, and whoever waited for them may ask for more at once."""
        try:
            self._take_turn()
        except OSError as error:
            if error.errno != errno.ENODEV:  # `_receive` finds that, too
                raise

    def _take_requests(self, linger: int, ring: uring.Ring | None) -> None:
        self._started = False
        for _ in range(_PER_TURN):
            length = self._next_request(linger, ring)
            if not length:
                return
            self._dispatch(length)
            if length > _SMALL and self._started:
                return  # a long write: have its thread begin

    def _next_request(self, linger: int, ring: uring.Ring | None) -> int:
        """Receive a request, for which to look for `linger` ns; its length, or 0. Raises OSError."""
        deadline = 0
        while True:
            try:
                return os.readv(self._kernel, (self._head, self._payload))
            except BlockingIOError:
                now = time.perf_counter_ns()
                deadline = deadline or now + linger
                if now >= deadline or self._started:
                    self._linger.sleeps(now)
                    return 0
                if ring is not None:
                    ring.send()
                    ring.reap_now()

    def _dispatch(self, length: int) -> None:
        declared, opcode, unique, fh, offset, size, own_flags, flags = TRANSFER.unpack_from(self._head)
        if self._tracks:
            self._track(opcode, unique)
        if not is_whole(length, declared, opcode, size, self._max_write):
            if length >= IN_HEADER.size:
                self._answer(unique, errno.EINVAL)
            return
        if self._debug and opcode in NAMES and opcode != FUSE_SETATTR:
            self._log_request()
        try:
            self._take_up(length, opcode, unique, fh, offset, size, own_flags, flags)
        except Exception as error:
            self._refuse(unique, fh, NAMES.get(opcode, "request").lower(), error)

    def _track(self, opcode: int, unique: int) -> None:
        if opcode in _UNNUMBERED:
            return
        if self.gives_up_lost:
            self._give_up_lost(unique)
        self._last = max(self._last, unique)
        if opcode not in NAMES or opcode == FUSE_SETATTR:
            self._unanswered.add(unique)

    def _take_up(
        self, length: int, opcode: int, unique: int, fh: int, offset: int, size: int, own_flags: int, flags: int
    ) -> None:
        if opcode == FUSE_READ:
            if flags & os.O_DIRECT and (offset | size) % SECTOR:
                self._answer(unique, errno.EINVAL)
            else:
                self._begin_read(unique, fh, offset, size)
        elif opcode == FUSE_WRITE:
            if flags & os.O_DIRECT and (offset | size) % SECTOR and not own_flags & FUSE_WRITE_CACHE:
                self._answer(unique, errno.EINVAL)
            else:
                self._begin_write(unique, fh, offset, size, durable=flags & _DIRECT_AND_DURABLE == _DIRECT_AND_DURABLE)
        elif opcode == FUSE_SETATTR and self._set_times(unique):
            pass
        elif opcode == FUSE_FSYNC:
            self._begin_fsync(unique, fh)
        elif opcode == FUSE_FALLOCATE:
            self._begin_fallocate(unique)
        elif opcode == FUSE_LSEEK:
            self._begin_seek(unique)
        elif opcode in (FUSE_COPY_FILE_RANGE, FUSE_COPY_FILE_RANGE_64):
            self._begin_copy(unique, COPIED if opcode == FUSE_COPY_FILE_RANGE_64 else WRITTEN)
        elif opcode == FUSE_INTERRUPT:  # `fh` is the request that somebody does not want any more
            if (interrupt := self._interrupts.get(fh)) is not None:
                interrupt.interrupt()
        else:
            if opcode == FUSE_OPEN:
                self._opening[unique] = opens_direct(self._head)
            elif opcode == FUSE_CREATE:
                self._creating.add(unique)
                name = bytes(self._start_of(length)[IN_HEADER.size + CREATE_IN :]).partition(b"\0")[0]
                self._requests.creates(unique & ~FUSE_UNIQUE_RESEND, name, again=bool(unique & FUSE_UNIQUE_RESEND))
            if unique & FUSE_UNIQUE_RESEND and self._is_to_be_refused(length, opcode, unique):
                self._answer(unique, errno.EINTR)
                return
            self._to_libfuse.send_nowait((self._head + self._payload[: max(0, length - len(self._head))])[:length])

    def _is_to_be_refused(self, length: int, opcode: int, unique: int) -> bool:
        """Whether this request, which may have been done before, must not be done again."""
        if opcode in (FUSE_OPEN, FUSE_CREATE):
            self._requests.abandon(unique & ~FUSE_UNIQUE_RESEND)
        elif opcode in _GONE:
            self._repeated.add(unique)
        elif opcode == FUSE_SETXATTR:
            words = bytes(self._start_of(length)[IN_HEADER.size :])
            return any(b"%s\0" % name.encode() in words for name in _ONCE)
        return False

    def _begin_read(self, unique: int, fh: int, offset: int, size: int) -> None:
        received = time.perf_counter_ns()
        pooled = _SMALL < size <= self._max_write
        buffer = self._take_buffer() if pooled else memoryview(bytearray(OUT_HEADER.size + size))
        found = self._requests.begin_read(fh, offset, buffer[OUT_HEADER.size : OUT_HEADER.size + size])
        if isinstance(found, int):
            self._answer_read(unique, buffer, found)
            self._requests.answered(fh, "read", found, time.perf_counter_ns() - received)
        else:
            self._begin(unique, fh, "read", found, functools.partial(self._answer_read, unique, buffer))

    def _begin_write(self, unique: int, fh: int, offset: int, size: int, *, durable: bool) -> None:
        data = self._take(size)
        answer = functools.partial(self._answer_write, unique, data)
        self._begin(unique, fh, "write", self._requests.begin_write(fh, offset, data, durable=durable), answer)

    def _begin_fsync(self, unique: int, fh: int) -> None:
        pending = self._requests.begin_fsync(fh)
        if pending is None:
            self._answer(unique)
        else:
            self._begin(unique, fh, "fsync", pending, lambda _: self._answer(unique))

    def _begin_fallocate(self, unique: int) -> None:
        fh, offset, length, mode = FALLOCATE.unpack_from(self._head)
        pending = self._requests.begin_fallocate(fh, mode, offset, length)
        self._begin(unique, fh, "fallocate", pending, lambda _: self._answer(unique))

    def _begin_seek(self, unique: int) -> None:
        fh, offset, whence = LSEEK.unpack_from(self._head)
        found = self._requests.begin_seek(fh, offset, whence)
        if isinstance(found, int):
            self._answer_seek(unique, found)
        else:
            self._begin(unique, fh, "lseek", found, functools.partial(self._answer_seek, unique))

    def _begin_copy(self, unique: int, answer: struct.Struct) -> None:
        source_fh, source_offset, fh, offset, length, flags = COPY.unpack(self._start_of(COPY.size))
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        pending = self._requests.begin_copy(fh, offset, source_fh, source_offset, length)
        self._begin(unique, fh, "copy", pending, lambda count: self._answer(unique, 0, answer.pack(count)))

    def _begin(self, unique: int, fh: int, what: str, pending: Pending, answer: Callable[[int], None]) -> None:
        """Start a request, and answer when it has ended, given the result; where it cannot be started, a task does it.

        `what`: its name, for the log.
        """

        received = time.perf_counter_ns()

        def done(result: int) -> None:
            self._end()
            self._unanswered.discard(unique)
            if result >= 0:
                answer(result)
                self._requests.answered(fh, what, result, time.perf_counter_ns() - received)
            else:
                self._refuse(unique, fh, what, OSError(-result, os.strerror(-result)))

        self._begun += 1
        self._unanswered.add(unique)
        try:
            started = pending.start(done)
        except Exception as error:
            self._end()
            self._unanswered.discard(unique)
            self._refuse(unique, fh, what, error)
            return
        if not started:
            self._end()
            (pid,) = _PID.unpack_from(self._head)
            self._have_done(functools.partial(self._do, unique, fh, what, pending, answer, Interrupt(pid), received))

    def _have_done(self, work: _Work) -> None:
        """Have a task do it: one that has nothing to do if there is one."""
        self._started = True
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), outcome.Value(work))
        else:
            self._workers.start_soon(self._work, work)

    async def _work(self, work: _Work | None) -> None:
        while work is not None:
            await work()
            if len(self._idle) >= self._idle_limit:
                return
            self._idle.append(trio.lowlevel.current_task())
            work = await trio.lowlevel.wait_task_rescheduled(_given_up)

    async def _do(
        self,
        unique: int,
        fh: int,
        what: str,
        pending: Pending,
        answer: Callable[[int], None],
        interrupt: Interrupt,
        received: int,
    ) -> None:
        self._interrupts[unique] = interrupt
        asked_by.set(interrupt)
        try:
            result = await pending.finish()
        except Exception as error:
            self._refuse(unique, fh, what, error)
        else:
            answer(result)
            self._requests.answered(fh, what, result, time.perf_counter_ns() - received)
        finally:
            del self._interrupts[unique]
            self._unanswered.discard(unique)

    def _refuse(self, unique: int, fh: int, what: str, error: Exception) -> None:
        """Answer a request that failed."""
        self._answer(unique, self._requests.error_number(error, fh, what))

    def _set_times(self, unique: int) -> bool:
        """Answer a SETATTR of the mtime alone, which the kernel sends before FSYNC; False for another."""
        inode, valid, mtime, nsec = SETATTR.unpack(self._start_of(SETATTR.size))
        if valid & ~FATTR_FH != FATTR_TIMES:
            return False
        attributes = self._requests.set_mtime(inode, mtime * 10**9 + nsec)
        if attributes is None:
            return False
        if self._debug:
            self._log_request()
        self._unanswered.discard(unique)
        self._answer(unique, 0, encode(attributes))
        return True

    def _start_of(self, size: int) -> bytearray:
        """The first bytes of the request that was just received, more than a READ has."""
        return self._head + self._payload[: size - len(self._head)]

    def _log_request(self) -> None:
        length, opcode, unique, inode, _, _, pid, *_ = IN_HEADER.unpack_from(self._head)
        _, _, _, _, offset, size, _, _ = TRANSFER.unpack_from(self._head)
        where = f", offset: {offset}, size: {size}" if opcode in (FUSE_READ, FUSE_WRITE) else ""
        line = f"unique: {unique}, opcode: {NAMES[opcode]} ({opcode}), nodeid: {inode}, insize: {length}, pid: {pid}"
        log.info("%s%s", line, where, extra={"admitted": True})  # however many there are of a kind

    def _end(self) -> None:
        self._begun -= 1
        if self._ended is not None and not self._begun:
            self._ended.set()

    def _take(self, size: int) -> memoryview:
        """The data of the WRITE that was just received: its own, or in the buffer, which is replaced."""
        if size <= _SMALL:
            return memoryview(bytearray(self._payload[:size]))
        data = self._payload[:size]
        self._payload = self._take_buffer()
        return data

    def _take_buffer(self) -> memoryview:
        """Room for the longest message, with old bytes in it. A new one each time would cost a page fault a page."""
        return self._spare.pop() if self._spare else memoryview(bytearray(OUT_HEADER.size + self._max_write))

    def _give_back(self, part: memoryview) -> None:
        """Nobody needs what is in this buffer any more."""
        assert isinstance(part.obj, bytearray)
        if len(part.obj) == OUT_HEADER.size + self._max_write and len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(memoryview(part.obj))

    # --- answers ----------------------------------------------------------------------------------

    def _answer_read(self, unique: int, answer: memoryview, count: int) -> None:
        """Hand over the answer to a READ, which begins with room for its header."""
        OUT_HEADER.pack_into(answer, 0, OUT_HEADER.size + count, 0, unique)
        self._send(answer[: OUT_HEADER.size + count])
        self._give_back(answer)

    def _answer_write(self, unique: int, data: memoryview, count: int) -> None:
        self._answer(unique, 0, WRITTEN.pack(count))
        self._give_back(data)

    def _answer_seek(self, unique: int, place: int) -> None:
        self._answer(unique, 0, PLACE.pack(place))

    def _answer(self, unique: int, error: int = 0, data: Buffer = b"") -> None:
        self._send(OUT_HEADER.pack(OUT_HEADER.size + len(data), -error, unique), data)

    def _send(self, *parts: Buffer) -> None:
        try:
            os.writev(self._kernel, parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # who asked, or the mount, is gone
                raise

    # --- libfuse's part ---------------------------------------------------------------------------

    async def _pass_on(self) -> None:
        async for request in self._for_libfuse:
            while True:
                try:
                    self._socket.send(request)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)

    async def _hand_back(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            self._hand_back_now()

    def _completed(self, answer: bytes) -> bytes:
        """What libfuse has answered, with what it does not know of."""
        _, error, unique = OUT_HEADER.unpack_from(answer)
        self._unanswered.discard(unique)
        if unique in self._repeated:
            self._repeated.discard(unique)
            gone = -error in (errno.ENOENT, errno.ENODATA)
            return OUT_HEADER.pack(OUT_HEADER.size, 0, unique) if gone else answer
        created = unique in self._creating
        if created:
            self._creating.discard(unique)
            fh = handle_in(answer, ENTRY_OUT)
        elif unique in self._opening:
            side_by_side = self._opening.pop(unique) and self._side_by_side
            answer, fh = amend_open(answer, self._requests.backing_of, side_by_side=side_by_side), handle_in(answer)
        else:
            return answer
        if fh is not None:
            self._requests.opened(fh, unique & ~FUSE_UNIQUE_RESEND)
        if created:
            self._requests.created(unique & ~FUSE_UNIQUE_RESEND)
        return answer

    def _hand_back_now(self) -> None:
        try:
            while True:
                self._send(self._completed(self._socket.recv(_LARGEST)))
        except BlockingIOError:
            return


def _given_up(_: Callable[[], None]) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.SUCCEEDED
