"""io_uring: reads, writes and flushes that wait for a disk without a thread to wait in.

A thread that works for the event loop takes the interpreter's lock from it twice a call, and wakes it
at the end; under load that costs more than the disk does. The kernel does it for less: a call is put
into a ring of memory that both sides share, and its result appears in another one, which makes a
descriptor readable. Calls that are handed over together (`Ring.gathered`) cost one entry to the kernel,
and one notification of a virtual disk, which is most of what a small read costs.

Only what the stores need is here. Where the kernel lacks io_uring, or forbids it (as in many
containers), or the processor may reorder what must not be (`MACHINES`), or the ring is full, the stores
use threads (`worker`). The rings are the kernel's stable interface (linux/io_uring.h, io_uring(7)).

Why no library: `liburing` of PyPI (2026.3.30) is faster (a cached read of 4 KiB takes 1.5 us, here 4.1; six
together 0.9 and 2.8 each), but it takes no part of a buffer (a bytearray for a read, bytes for a write),
cannot limit the kernel's threads (`KERNEL_THREADS`), calls itself alpha and its fsync untested. It exists as
a binary for x86-64 only, and building it takes Zig. Other packages serve asyncio, whole files, or only Python
3.13 and newer. The C library would take a call through ctypes, more than 1 us, for each step of a read: its
barriers are inline C.

Memory ordering: the kernel uses the rings at the same time, and Python has no memory barriers.

- Submission: entries and tail are in order on every processor, since the kernel looks at them only within
  io_uring_enter, in the thread that wrote them (there is no SQPOLL).
- Completion: threads of the kernel add to the ring on other processors. So the tail must be loaded before
  the entries (and the data) that it announces, and an entry before the head is stored that gives its place
  back. x86 reorders neither loads with loads nor a load with a later store (Intel SDM, volume 3, "Memory
  Ordering"); ARM, POWER and RISC-V may do both.
- Heads and tails are never seen half written: each is an aligned 32-bit item of a memoryview, which CPython
  copies by a memcpy of four bytes; optimized, that is one instruction (checked for 3.11). No compiler
  reorders them, since each access is another pass through the interpreter.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import cast

import outcome
import trio

from fvdfs.store.base import uncancellable

log = logging.getLogger(__name__)

MACHINES = ("x86_64", "i686")  # with the memory ordering that the ring needs, as uname(2) calls them
CALLS = 512  # that may be under way
BUSY = 2  # groups of linked calls under way from which on the ring counts as busy
LONGEST = 3  # calls that are linked
GATHERED = 6  # calls that are handed over together: with more, the disk would be idle meanwhile
KERNEL_THREADS = 512  # that calls may block: so many, lest one dead server hold up all others
NOT_DONE = (-errno.ECANCELED, -errno.EAGAIN, -errno.EINTR)
"""Results of calls that the kernel has not done: it could not take them, or the one before in the link did not end
well. They say nothing about the file."""

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls; the numbers are the same on all machines
_SETUP_SUBMIT_ALL, _SETUP_COOP_TASKRUN = 1 << 7, 1 << 8
_REGISTER_IOWQ_MAX_WORKERS = 19
_OFFSET_SQES = 0x10000000
_IO_LINK = 1 << 2
_FSYNC_DATASYNC = 1
FSYNC, READ, WRITE = 3, 22, 23
READ_ASIDE = READ | 1 << 4 << 8  # by a thread of the kernel from the start

Call = tuple[int, int, memoryview | None, int]
"""FSYNC, READ, READ_ASIDE or WRITE; descriptor; a writable buffer, for READ and WRITE; offset."""

# io_uring_params: entries of both rings, flags; at 40 and 80 the offsets of what is in them.
_PARAMS_SIZE = 120
_PARAMS = struct.Struct("=III")
_SQ_OFFSETS = struct.Struct("=40xIIIIIII")  # head tail ring_mask ring_entries flags dropped array
_CQ_OFFSETS = struct.Struct("=80xIIIIII")  # head tail ring_mask ring_entries overflow cqes
_SQE = struct.Struct("=BBHiQQIIQ24x")  # opcode flags ioprio fd offset address length op_flags user_data
_CQE = struct.Struct("=Qi4x")  # user_data result

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long] * 7
_syscall.restype = ctypes.c_long
_NO_MORE = (0,) * 6


class Ring:
    """A pair of rings, for the tasks of one event loop. What has begun cannot be taken back."""

    def __init__(self) -> None:
        """Raises OSError where there is no io_uring, or the processor is none of `MACHINES`."""
        if platform.machine() not in MACHINES:
            raise OSError(errno.ENOSYS, "memory ordering unknown")
        parameters = bytearray(_PARAMS_SIZE)
        _PARAMS.pack_into(parameters, 0, 0, 0, _SETUP_SUBMIT_ALL | _SETUP_COOP_TASKRUN)
        self._fd = _system_call(_SETUP, CALLS, _address(parameters))
        try:
            self._map(parameters)
            limits = bytearray(struct.pack("=II", KERNEL_THREADS, 0))
            _system_call(_REGISTER, self._fd, _REGISTER_IOWQ_MAX_WORKERS, _address(limits), 2)
        except BaseException:
            os.close(self._fd)
            raise
        # The calls themselves are kept since the kernel uses their buffers.
        self._under_way: dict[
            int, tuple[Sequence[Call], dict[int, int], Callable[[list[int]], None], Callable[[int], None] | None]
        ] = {}
        self._last_id = 0
        self._unsent = 0  # calls in the ring that the kernel has not been told of
        self._gathering = False
        self.then: Callable[[], None] | None = None
        """What to do in the same turn of the event loop after calls have ended."""
        self._loop = trio.lowlevel.current_trio_token()

    def _map(self, parameters: bytearray) -> None:
        sq_entries, cq_entries, _ = _PARAMS.unpack_from(parameters)
        _, sq_tail, sq_mask, _, _, _, array = _SQ_OFFSETS.unpack_from(parameters)
        cq_head, cq_tail, cq_mask, _, _, self._cqes = _CQ_OFFSETS.unpack_from(parameters)
        size = max(array + 4 * sq_entries, self._cqes + _CQE.size * cq_entries)
        self._ring = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._sqes = mmap.mmap(
            self._fd, _SQE.size * sq_entries, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFFSET_SQES
        )
        self._words = memoryview(self._ring).cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = (offset // 4 for offset in (sq_tail, cq_head, cq_tail))
        self._sq_mask, self._cq_mask = self._words[sq_mask // 4], self._words[cq_mask // 4]
        for number in range(sq_entries):
            self._words[array // 4 + number] = number

    def close(self) -> None:
        """Give it up; nothing may be under way."""
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)

    @property
    def is_busy(self) -> bool:
        """Whether so much is under way that the event loop's time is scarcer than that of one call."""
        return len(self._under_way) >= BUSY

    @property
    def has_room(self) -> bool:
        """Whether calls may be made now."""
        return len(self._under_way) * LONGEST < CALLS

    def begin(
        self,
        calls: Sequence[Call],
        done: Callable[[list[int]], None],
        first_done: Callable[[int], None] | None = None,
    ) -> None:
        """Do the calls, each after the one before has wholly succeeded.

        `done` is told their results later, in this order: how many bytes, or a negative errno; those after a failed or
        short one, and those that the kernel could not take, are -ECANCELED. `first_done` is told of the first before.
        """
        words = self._words
        self._last_id += 1
        tail, user_data, left = words[self._sq_tail], self._last_id * LONGEST, len(calls)
        for opcode, fd, data, offset in calls:
            left -= 1
            address, length, flags = (0, 0, _FSYNC_DATASYNC) if data is None else (_address(data), len(data), 0)
            place = (tail & self._sq_mask) * _SQE.size
            how = opcode >> 8 | (_IO_LINK if left else 0)
            _SQE.pack_into(self._sqes, place, opcode & 0xFF, how, 0, fd, offset, address, length, flags, user_data)
            tail, user_data = tail + 1 & 0xFFFFFFFF, user_data + 1
        words[self._sq_tail] = tail
        self._under_way[self._last_id] = calls, {}, done, first_done
        self._unsent += len(calls)
        if not self._gathering or self._unsent >= GATHERED:
            self.send()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hand over calls that begin meanwhile together, `GATHERED` at a time, the last ones at the end."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False
            self.send()

    def send(self) -> None:
        """Hand over what was gathered. An error says that the kernel has taken no more of it."""
        while self._unsent:
            try:
                self._unsent -= _system_call(_ENTER, self._fd, self._unsent, 0, 0, 0, 0)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
                    log.error("io_uring: %s", error)
                self._take_back()

    def _take_back(self) -> None:
        """Cancel what the kernel has not taken."""
        tail = self._words[self._sq_tail] = self._words[self._sq_tail] - self._unsent & 0xFFFFFFFF
        for number in range(tail, tail + self._unsent):
            user_data = _SQE.unpack_from(self._sqes, (number & self._sq_mask) * _SQE.size)[-1]
            self._loop.run_sync_soon(self._tell, user_data, -errno.ECANCELED)
        self._unsent = 0

    async def do(self, *calls: Call) -> list[int]:
        """`begin`, and wait for the results. Cannot be cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        self.begin(calls, lambda results: trio.lowlevel.reschedule(task, outcome.Value(results)))
        return cast("list[int]", await trio.lowlevel.wait_task_rescheduled(uncancellable))

    def reap_now(self) -> None:
        """Tell of those calls that have ended."""
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        while head != tail:
            user_data, result = _CQE.unpack_from(self._ring, self._cqes + (head & self._cq_mask) * _CQE.size)
            head = head + 1 & 0xFFFFFFFF
            words[self._cq_head] = head
            self._tell(user_data, result)

    def _tell(self, user_data: int, result: int) -> None:
        """Take the result of one call: in order, but what was taken back may come before what goes on."""
        group, number = divmod(user_data, LONGEST)
        calls, results, done, first_done = self._under_way[group]
        results[number] = result
        if first_done is not None and number == 0:
            first_done(result)
        if len(results) == len(calls):
            del self._under_way[group]
            done([results[each] for each in range(len(calls))])

    async def reap(self, nursery: trio.Nursery, until: trio.CancelScope) -> None:
        """Tell of calls as they end, until `until` is cancelled; what one who is told raises ends the nursery.

        It goes on meanwhile: others wait for calls, which cannot be cancelled.
        """
        with until:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                try:
                    with self.gathered():
                        self.reap_now()
                        if self.then is not None:
                            self.then()
                except Exception as error:
                    nursery.start_soon(_raise, error)


async def _raise(error: Exception) -> None:
    raise error


_ring: trio.lowlevel.RunVar[Ring | None] = trio.lowlevel.RunVar("ring", None)


def ring() -> Ring | None:
    """The ring to be used by whoever calls, if there is one with room."""
    found = _ring.get()
    return found if found is not None and found.has_room else None


@contextmanager
def followed_by(then: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, do this in the same turn of the event loop after calls have ended."""
    found = _ring.get()
    if found is not None:
        found.then = then
    try:
        yield
    finally:
        if found is not None:
            found.then = None


@asynccontextmanager
async def use_ring() -> AsyncIterator[bool]:
    """Have the stores of this event loop use io_uring meanwhile; says whether that can be."""
    try:
        found = Ring()
    except OSError:
        yield False
        return
    try:
        async with trio.open_nursery() as nursery:
            until = trio.CancelScope(shield=True)
            nursery.start_soon(found.reap, nursery, until)
            _ring.set(found)
            try:
                yield True
            finally:
                _ring.set(None)
                until.cancel()
    finally:
        found.close()


def _address(buffer: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _system_call(number: int, *arguments: int) -> int:
    """Raises OSError."""
    while (result := _syscall(number, *arguments, *_NO_MORE[len(arguments) :])) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return int(result)
