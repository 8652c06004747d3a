"""Files and block devices of this host, by io_uring where it can be used (`uring`) and by threads elsewhere."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct

import trio

from fvdfs.errors import ImageBusy, ImageError
from fvdfs.store import uring
from fvdfs.store.base import Buffer, Done, FlushError, Store, append_by_steps, result_of
from fvdfs.store.filelock import FileLock, type_of_file_system
from fvdfs.store.flushing import Flusher
from fvdfs.store.worker import Worker

# Answers to opening for writing where reading may do: permissions, an immutable file, a medium that cannot be written
# (a device as well), a file that is swapped to or runs.
_DENIALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)

# Threads of each store, so that a slow one keeps only its own busy.
READERS = 8
READ_BATCH = 4  # calls that a reader takes at a time
WAITERS = 4  # that flush, zero and resize

COLD = 16  # reads, about, that were not in the page cache; the next ones will not be either

LONG_WRITE = 512 << 10  # bytes; such writes are sent on to the disk at once, so that a flush has less to wait for
_STEPS = 3  # of a stable append
DEVICE_UNIT = 4096  # bytes; what devices zero, in whole units
LARGE = 256 << 10  # bytes; more is copied by a thread, the kernel's or ours, not by the event loop

MAX_FILE_SIZE = (1 << 63) - 1  # an offset of a file has 63 bits

_BLKROGET = 0x125E  # <linux/fs.h>
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO_RANGE = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
# Answers of copy_file_range(2) between files of two file systems, and to a device.
_NO_COPIES = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
SYNC_FILE_RANGE_WRITE = 0x02  # send what is not on its way yet
SYNC_FILE_RANGE_ALL = 0x07  # wait for what is on its way, send the rest, wait for that
_ZEROS = bytes(1 << 20)
# Those on no device of their own; statfs(2): btrfs, tmpfs, ramfs, overlayfs, zfs, bcachefs.
_LOCAL_FILE_SYSTEMS = frozenset({0x9123683E, 0x01021994, 0x858458F6, 0x794C7630, 0x2FC12FC1, 0xCA451A4E})
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which Python has without its modes; False where the file cannot do it. Raises OSError."""
    while _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


Identity = tuple[int, int]
"""What tells two names of one file or device from two files."""
DEVICE = -1
"""The first part of the identity of a device."""


def identity_of(status: os.stat_result) -> Identity:
    """Of the file or device that this status is of."""
    return (DEVICE, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


class HostFile:
    """A regular file or a block device of the host."""

    def __init__(self, fd: int, name: str, writable: bool) -> None:
        """Takes over `fd`."""
        self._fd = fd
        self.name = name
        self.writable = writable
        self.denied = 0
        """The errno with which the host refused to open it for writing, where that was tried."""
        status = os.fstat(fd)
        self.fixed_size = stat.S_ISBLK(status.st_mode)
        device = status.st_rdev if self.fixed_size else status.st_dev
        self.identity = identity_of(status)
        self.server = f"disk {os.major(device)}:{os.minor(device)}"
        self.may_hang = not self.fixed_size and _may_hang(fd, device)
        """Whether a server or a program answers for the file, so that any call may hang."""
        self._usage = status.st_blocks * 512
        self._claim = -1
        self.file_lock = FileLock(fd, name)
        self._misses = 0  # grows with each read that the page cache did not have, shrinks with the others
        self._untried = 0
        # Writes to a file wait for one another anyway; what waits for the disk must not hold them up.
        self._writer = Worker("write")
        self._reader = Worker("read", threads=READERS, batch=READ_BATCH)
        self._waiter = Worker("flush", threads=WAITERS, batch=1)
        self._flusher = Flusher(fd, self._waiter)

    def fileno(self) -> int:
        """The descriptor, to hand it on, or for attributes of the file; its bytes go through the other calls."""
        return self._fd

    def status(self) -> os.stat_result:
        """What stat(2) says of it. Blocks."""
        return os.fstat(self._fd)

    def statuses(self) -> list[os.stat_result] | None:
        """What tells whether somebody has written to it; None for a device, whose node does not know. Blocks."""
        return None if self.fixed_size else [self.status()]

    async def keep_mtime(self, mtime_ns: int) -> None:
        """Have it tell this as its mtime, or a later time where it is not ours. Raises OSError."""
        await self._waiter.run(lambda: self._keep_mtime(mtime_ns))

    def _keep_mtime(self, mtime_ns: int) -> None:
        status = self.status()
        if status.st_mtime_ns == mtime_ns:
            return
        try:
            os.utime(self._fd, ns=(status.st_atime_ns, mtime_ns))
        except PermissionError:
            if status.st_mtime_ns < mtime_ns:
                os.utime(self._fd)  # the present time needs only permission to write

    @property
    def is_remote(self) -> bool:
        return self.file_lock.is_remote

    def claim_device(self) -> None:
        """Open a device exclusively, which keeps out others that do the same. Raises ImageBusy, OSError."""
        if not self.fixed_size or self._claim >= 0:
            return
        try:
            self._claim = reopen(self._fd, os.O_RDONLY | os.O_EXCL, self.name)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise ImageBusy(self.name, "the device is in use (mounted, or held by another program)") from None

    def lock(self, exclusive: bool) -> None:
        """`FileLock.take`: our own lock and QEMU's. May wait for a server. Raises ImageBusy, OSError."""
        assert self._fd >= 0
        self.file_lock.take(exclusive)

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        if self.may_hang or offset + len(buffer) > MAX_FILE_SIZE or self._is_cold():
            return False
        try:
            if os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer):
                self._misses = max(0, self._misses - COLD // 2)
                return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        self._misses = min(self._misses + 1, 2 * COLD)
        return False

    def _is_cold(self) -> bool:
        """Whether not even to try a read without waiting: the last ones failed, and the event loop is busy.

        A try that fails takes it as long as to send the disk a request.
        """
        if self._misses < COLD:
            return False
        ring = uring.ring()
        if ring is None or not ring.is_busy:
            return False
        self._untried += 1
        return self._untried % COLD != 0

    def start_pread(self, buffer: memoryview, offset: int, done: Done) -> bool:
        ring, size = self._ring(buffer, offset), len(buffer)
        if ring is None:
            return False

        def ended(results: list[int]) -> None:
            count = results[0]
            if count == size or (count < 0 and count not in uring.NOT_DONE):
                done(count)
            else:  # a part, or nothing: perhaps the end of the file
                have = max(0, count)
                self._reader.start(lambda: have + self.pread_now(buffer[have:], offset + have), done)

        how = uring.READ_ASIDE if self.may_hang or size > LARGE else uring.READ
        ring.begin(((how, self._fd, buffer, offset),), ended)
        return True

    def _ring(self, buffer: memoryview, offset: int) -> uring.Ring | None:
        """The ring, where it is there and can do the call."""
        return uring.ring() if offset + len(buffer) <= MAX_FILE_SIZE else None

    async def pread(self, buffer: memoryview, offset: int) -> int:
        count = await result_of(functools.partial(self.start_pread, buffer, offset))
        return count if count is not None else await self._reader.run(lambda: self.pread_now(buffer, offset))

    def pread_now(self, buffer: memoryview, offset: int) -> int:
        """`pread` for callers that are in a thread already."""
        if offset + len(buffer) > MAX_FILE_SIZE:  # where a damaged chunk table may lead
            buffer = buffer[: max(0, MAX_FILE_SIZE - offset)]
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def start_pwrite(self, data: memoryview, offset: int, done: Done) -> bool:
        ring, size = self._ring(data, offset), len(data)
        if ring is None or self.may_hang or size > LARGE:
            return False

        def ended(results: list[int]) -> None:
            count = results[0]
            if count == size or (count < 0 and count not in uring.NOT_DONE):
                self._flusher.changed()
                done(count)
            else:
                self._complete_write(data, offset, max(0, count), done)

        write = (uring.WRITE, self._fd, data, offset)
        if self._flusher.is_expected:
            self._flusher.write_ahead(ring, write, ended, size)
        else:
            ring.begin((write,), ended)
        return True

    def _complete_write(self, data: memoryview, offset: int, have: int, done: Done) -> None:
        """Write what follows the first `have` bytes, by a thread."""

        def ended(count: int) -> None:
            self._flusher.changed()
            done(count)

        self._writer.start(lambda: have + self.pwrite_now(data[have:], offset + have), ended)

    async def pwrite(self, data: Buffer, offset: int) -> None:
        await self._writer.run(lambda: self.pwrite_now(data, offset))
        self._flusher.changed()

    def pwrite_now(self, data: Buffer, offset: int) -> int:
        """`pwrite` for callers that are in a thread already; the number of bytes."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            count = os.pwrite(self._fd, view[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"{self.name}: nothing was written at {offset + done}")
            done += count
        if len(view) >= LONG_WRITE:
            _sync_range(self._fd, offset, len(view), SYNC_FILE_RANGE_WRITE)
        return done

    async def write_out(self, offset: int, length: int) -> None:
        await self._waiter.run(lambda: self._write_out(offset, length))

    def _write_out(self, offset: int, length: int) -> None:
        # Each opening is told of a failure once, by a flush or, here, by the wait: ours has to be told by its flush.
        try:
            other = reopen(self._fd, os.O_RDONLY, self.name)
        except OSError:
            return
        try:
            _sync_range(other, offset, length, SYNC_FILE_RANGE_ALL)
        finally:
            os.close(other)

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        try:
            await self._waiter.run(lambda: self.zero_now(offset, length, writes=writes))
        finally:
            self._flusher.changed()

    def zero_now(self, offset: int, length: int, *, writes: bool = True) -> None:
        """`zero` for callers that are in a thread already."""
        stop = offset + length
        if not self.fixed_size:
            if length and not fallocate(self._fd, PUNCH, offset, length):
                self._check_zeros_may_be_written(writes)
                self._write_zeros(offset, min(stop, self.size_now()))
            return
        # A device takes whole units.
        first = min(-(-offset // DEVICE_UNIT) * DEVICE_UNIT, stop)
        end = max(stop // DEVICE_UNIT * DEVICE_UNIT, first)
        if first < end and not self._zero_device(PUNCH, first, end - first):
            self._check_zeros_may_be_written(writes)
            if not self._zero_device(ZERO_RANGE, first, end - first):
                self._write_zeros(first, end)
        self._write_zeros(offset, first)
        self._write_zeros(end, stop)

    def _check_zeros_may_be_written(self, writes: bool) -> None:
        if not writes:
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: gives no space back")

    def _zero_device(self, mode: int, offset: int, length: int) -> bool:
        for last in (False, True):
            try:
                return fallocate(self._fd, mode, offset, length)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # It is claimed by another descriptor, ours, and has unwritten data there in memory.
                if not last:
                    self._write_out(offset, length)
        return False

    def _write_zeros(self, start: int, stop: int) -> None:
        while start < stop:
            count = min(stop - start, len(_ZEROS))
            self.pwrite_now(memoryview(_ZEROS)[:count], start)
            start += count

    async def copy(self, source: Store, where: int, offset: int, length: int) -> None:
        far = where + length > MAX_FILE_SIZE
        if far or not isinstance(source, HostFile) or (source.may_hang and source.server != self.server):
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: the host cannot copy from {source.name}")
        try:
            await self._waiter.run(lambda: self._copy(source, where, offset, length))
        finally:
            self._flusher.changed()

    def _copy(self, source: HostFile, where: int, offset: int, length: int) -> None:
        done = 0
        while done < length:
            try:
                count = os.copy_file_range(source.fileno(), self._fd, length - done, where + done, offset + done)
            except OSError as error:
                if error.errno in _NO_COPIES:
                    raise OSError(errno.EOPNOTSUPP, f"{self.name}: {error.strerror}: {source.name}") from None
                raise
            if count == 0:
                raise OSError(errno.EOPNOTSUPP, f"{source.name}: ends at byte {where + done}")
            done += count
        if length >= LONG_WRITE:
            _sync_range(self._fd, offset, length, SYNC_FILE_RANGE_WRITE)

    async def reserve(self, offset: int, length: int) -> None:
        if length and not self.fixed_size:
            await self._waiter.run(lambda: self._reserve(offset, length))
            self._flusher.changed()

    def _reserve(self, offset: int, length: int) -> None:
        if not fallocate(self._fd, FALLOC_FL_KEEP_SIZE, offset, length):
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: its file system reserves no space")

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        return await self._reader.run(lambda: self.extent_now(start, stop))

    def extent_now(self, start: int, stop: int) -> tuple[int, bool]:
        """`extent` for callers that are in a thread already."""
        if self.fixed_size:
            return stop, False
        try:
            data = min(stop, os.lseek(self._fd, start, os.SEEK_DATA))
            if data > start:
                return data, True
            return min(stop, os.lseek(self._fd, start, os.SEEK_HOLE)), False
        except OSError as error:
            if error.errno == errno.ENXIO:
                return stop, True
            raise

    def start_flush(self, done: Done) -> bool:
        return self._flusher.start(done)

    async def flush(self) -> None:
        await self._flusher.flush()

    async def append_stable(self, data: Buffer, offset: int, *, flush_first: bool) -> None:
        ring = uring.ring() if not self.may_hang else None
        if ring is not None:
            done = await self._append_in_ring(ring, data, offset, flush_first=flush_first)
            if done == _STEPS:
                return
            flush_first = flush_first and not done
        await append_by_steps(self, data, offset, flush_first=flush_first)

    async def _append_in_ring(self, ring: uring.Ring, data: Buffer, offset: int, *, flush_first: bool) -> int:
        """`append_stable`, as far as the kernel does it: how many of its steps (flush, write, flush) are done."""
        flush = (uring.FSYNC, self._fd, None, 0)
        write = (uring.WRITE, self._fd, memoryview(bytearray(data)), offset)
        async with self._flusher.alone() as flushed:
            begin = 0 if flush_first and not flushed else 1
            calls = (flush, write, flush)[begin:]
            for step, (call, result) in enumerate(zip(calls, await ring.do(*calls), strict=True), begin):
                if result == (len(data) if call is write else 0):
                    continue
                if result >= 0 or result in uring.NOT_DONE:  # the chain ended here, and the disk did not fail
                    return step
                if call is flush:
                    raise FlushError(-result, os.strerror(-result))
                raise OSError(-result, f"{self.name}: {os.strerror(-result)}: at byte {offset}")
        return _STEPS

    async def size(self) -> int:
        return await self._reader.run(self.size_now)

    def size_now(self) -> int:
        """`size` for callers that are in a thread already."""
        if self.fixed_size:
            return os.lseek(self._fd, 0, os.SEEK_END)
        status = os.fstat(self._fd)
        self._usage = status.st_blocks * 512
        return status.st_size

    async def resize(self, size: int) -> None:
        if size > MAX_FILE_SIZE:
            raise OSError(errno.EFBIG, f"{self.name}: {size} bytes are more than any file has")
        if self.fixed_size:
            have = await self.size()
            if size > have:
                raise OSError(errno.ENOSPC, f"{self.name}: the device ends at {have} bytes, {size} are needed")
            return
        await self._waiter.run(lambda: os.ftruncate(self._fd, size))
        self._flusher.changed()

    def usage(self) -> int:
        if not self.may_hang:  # else: as it was when somebody last asked
            size = self.size_now()
            return size if self.fixed_size else self._usage
        return self._usage

    async def aclose(self) -> None:
        # A server is told that the file is closed, a disk that one is gone which was removed.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """`aclose` for callers that are in a thread already."""
        for worker in (self._writer, self._reader, self._waiter):
            worker.close()
        closed = self._fd, self._claim
        self._fd = self._claim = -1  # before: an interrupt may come in between, and nothing is to be closed twice
        for fd in closed:
            if fd >= 0:
                os.close(fd)


def _may_hang(fd: int, device: int) -> bool:
    return not os.major(device) and type_of_file_system(fd) not in _LOCAL_FILE_SYSTEMS


def _sync_range(fd: int, offset: int, length: int, how: int) -> None:
    """sync_file_range(2), whose result is of no use here."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), how)


def reopen(handle: int, flags: int, name: str) -> int:
    """Open what a descriptor stands for once more. Raises OSError, which names the file by `name`."""
    try:
        return os.open(f"/proc/self/fd/{handle}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from None


def open_host_file(handle: int, name: str, *, writable: bool) -> HostFile:
    """Open what the O_PATH descriptor `handle` stands for, which stays the caller's.

    Raises ImageError where it is neither a regular file nor a block device (a FIFO is never
    opened), OSError where it cannot be opened.
    """
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImageError(name, "neither a regular file nor a block device")
    fd = reopen(handle, os.O_RDWR if writable else os.O_RDONLY, name)
    if writable and stat.S_ISBLK(mode) and _is_read_only(fd):
        os.close(fd)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
    return HostFile(fd, name, writable)


def _is_read_only(device: int) -> bool:
    """Whether it is a device that can be opened for writing, but whose writes fail."""
    return bool(struct.unpack("i", fcntl.ioctl(device, _BLKROGET, bytes(4)))[0])


def open_as_permitted(handle: int, name: str, *, writable: bool) -> HostFile:
    """`open_host_file` for writing if that is wanted and permitted, else for reading."""
    denied = 0
    if writable:
        try:
            return open_host_file(handle, name, writable=True)
        except OSError as error:
            if error.errno not in _DENIALS:
                raise
            denied = error.errno
    file = open_host_file(handle, name, writable=False)
    file.denied = denied
    return file


def open_path(path: str, *, writable: bool) -> HostFile:
    """Open the file or device at a path that the user gave. Errors as `open_host_file`."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return open_host_file(handle, path, writable=writable)
    finally:
        os.close(handle)
