"""Disks that the kernel reads and writes by itself (FUSE passthrough, Linux 6.9): as fast as a raw file, since they are
one.

Where nothing of a disk is missing, and its data lies in a raw file of its own, a byte of the disk is the same byte of
that file. So the kernel gets the file (a *backing*) and asks us for nothing but what concerns the file as a whole:
opening, closing, fsync, size and attributes. This file decides for which disks, and says why not of the others.

The kernel's rules: it takes backings from who has CAP_SYS_ADMIN only, not beside its write-back cache, and not from
stacked file systems. All who have a disk open at a time use it in the same way. So it is decided when the image is
loaded, and holds until it is given up.

Nobody tells of reads and writes. What a mount has to know of them, it sees in the data file: its size, and the time of
its last change (`look`). What that means for the image, `image/passing.py` says.

The kernel keeps the backing, and goes on using it, as long as a program has the disk open, even after we have ended.
So the opening that it gets has a lock (`FileLock.lend`), which keeps others out for so long.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Protocol

import trio

from fvdfs.alloc.flat import FlatStorage
from fvdfs.errors import printable
from fvdfs.image.image import Image
from fvdfs.ops.times import Mtime
from fvdfs.store.host import HostFile, fallocate, reopen

log = logging.getLogger(__name__)

ON = "on"
_UNIT = 4096
"""The size is a multiple of it, in bytes: QEMU without a cache takes no other of a file whose alignment it cannot find
out, such as one that begins with a hole."""
NOT_ROOT = "only root may have it (CAP_SYS_ADMIN)"
_LOOKS, _LOOK = 50, 0.01  # seconds between two; a keeper closes at once what it is told to
_REFUSALS = {
    errno.EPERM: NOT_ROOT,
    errno.ELOOP: "its data lies on a stacked file system, such as an overlay or another mount of fvdfs",
    errno.EINVAL: "the file system of its data has no direct I/O",
    errno.ENOLCK: "the file system of its data has no locks",
}
"""Why the kernel or the host does not give it, by errno."""


class Kernel(Protocol):
    """The kernel's end of the mount (`device.Device`)."""

    has_passthrough: bool

    def open_backing(self, descriptor: int) -> int:
        """Give the kernel a file; its number. Raises OSError."""

    def close_backing(self, number: int) -> None:
        """Give no further opening this file. Raises OSError."""


def obstacle_of_image(image: Image) -> str:
    """Why the kernel cannot have the data of this image; empty where it can."""
    data, storage = image.data, image.storage
    if image.damage:
        return "the image is damaged"
    if not isinstance(storage, FlatStorage):
        return "its data lies in chunks (--compact)"
    if data is image.meta:
        return "its data lies in the image file; create it with --data-file"
    if not isinstance(data, HostFile):
        return "its data file is not a raw file of this host"
    if data.fixed_size:
        return "its data lies on a device"
    if data.may_hang:
        return "its data lies on a share"
    if image.base is not None or image.bitmap is not None:
        return "parts of it were in its base when it was opened; once all is local, close it and open it again"
    if storage.is_longer:
        end = f"truncate -s {image.size} {printable(data.name)}"
        return f"its data file goes on behind the disk; close it, then: {end}"
    if image.size % _UNIT:
        return f"its size is no multiple of {_UNIT} bytes, which QEMU may ask for; truncate -s %{_UNIT} enlarges it"
    if not storage.is_whole and not image.writable:
        return "its data file was never used; once the disk was written, close it and open it again"
    return ""


class Keeps(Protocol):
    """Has what the kernel got outlive this process (`kept.Kept`)."""

    def keep_backing(self, inode: int, number: int, descriptor: int) -> None:
        """The kernel reads and writes this file by itself, which it has by this number."""

    def forget_backing(self, inode: int) -> bool:
        """No longer; whether somebody else had it, who closes it now."""

    def backing(self, inode: int) -> tuple[int, int] | None:
        """The number and the descriptor of what the kernel got of an inode from a former process."""


class Passthrough:
    """The kernel has the data of one open image."""

    def __init__(
        self, kernel: Kernel, number: int, descriptor: int, image: Image, mtime: Mtime, ended: Callable[[], bool]
    ) -> None:
        """Takes over `descriptor`, which is what the kernel has under this number. `ended` is told of the
        end, and says whether another process has the descriptor for a moment more.
        """
        self._ended = ended
        self.number = number
        self._kernel = kernel
        self._descriptor = descriptor
        self._image = image
        self._mtime = mtime
        self._changed_ns = 0  # the time of the last change that was looked at
        self._lets_write = False

    async def let_write(self) -> None:
        """The image is writable: have the kernel write by itself. Raises OSError."""
        if not self._lets_write:
            await self._image.pass_through()
            self._mtime.is_told_by_data()
            self._changed_ns = os.fstat(self._descriptor).st_mtime_ns
            self._lets_write = True

    def look(self) -> None:
        """Take up the size and the time of change that writes have left. A local file: this waits for no disk."""
        if not self._lets_write:
            return
        status = os.fstat(self._descriptor)
        self._image.look_at_length(status.st_size)
        if status.st_mtime_ns != self._changed_ns:
            self._changed_ns = status.st_mtime_ns
            self._mtime.written(kernel_tells=False, at_ns=status.st_mtime_ns)

    def set_mtime(self, mtime_ns: int) -> None:
        """Somebody has set the disk's time: after a crash the data file tells it. Blocks. Raises OSError."""
        os.utime(self._descriptor, ns=(os.fstat(self._descriptor).st_atime_ns, mtime_ns))
        self._changed_ns = mtime_ns

    async def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2) on the data file, which is the disk. Raises OSError, EOPNOTSUPP among them."""
        if not await trio.to_thread.run_sync(fallocate, self._descriptor, mode, offset, length):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self.look()

    async def end(self) -> None:
        """The image is being closed, as far as it is ours. Raises OSError."""
        still_used = True
        try:
            self._kernel.close_backing(self.number)
            kept = self._ended()
            self.look()
            await trio.to_thread.run_sync(os.close, self._descriptor)
            assert isinstance(self._image.data, HostFile)
            still_used = self._image.data.file_lock.end_lending()
            for _ in range(_LOOKS if kept else 0):
                if not still_used:
                    break
                await trio.sleep(_LOOK)
                still_used = self._image.data.file_lock.end_lending()
        finally:
            self._image.committer.end_unseen_writes(still_used=still_used)
        if still_used:
            log.warning(
                "%s: programs that have it open go on using its data file; nobody else can open it until they end",
                self._image.name,
            )


class Passthroughs:
    """Of one mount."""

    def __init__(self, obstacle: str = "nobody has asked for it") -> None:
        """`obstacle`: why no disk is passed through (`writeback.obstacle`)."""
        self._obstacle = obstacle
        self.kernel: Kernel | None = None
        self.keeps: Keeps | None = None

    @property
    def wanted(self) -> bool:
        """Whether the mount's options permit it."""
        return not self._obstacle

    async def begin(self, inode: int, image: Image, mtime: Mtime) -> Passthrough | str:
        """Give the kernel the data of an image that was just loaded; in words why not, where that cannot be.

        Raises OSError.
        """
        kernel = self.kernel
        if kernel is not None and self.keeps is not None and (kept := self.keeps.backing(inode)) is not None:
            return self._have(kernel, *kept, inode, image, mtime)  # whatever else: the kernel has it
        if obstacle := obstacle_of_image(image) or self._obstacle:
            return obstacle
        if kernel is None or not kernel.has_passthrough:
            return "the kernel does not offer it; Linux 6.9 and newer do"
        try:
            return await self._begin(kernel, inode, image, mtime)
        except OSError as error:
            why = _REFUSALS.get(error.errno or 0, f"the kernel does not take its data file: {error.strerror}")
            log.info("%s: is not passed through: %s", image.name, why)
            return why

    async def _begin(self, kernel: Kernel, inode: int, image: Image, mtime: Mtime) -> Passthrough:
        data = image.data
        assert isinstance(data, HostFile)
        # Programs may open the disk for direct I/O, which the data file then has to know.
        flags = (os.O_RDWR if data.writable else os.O_RDONLY) | os.O_DIRECT
        descriptor = await trio.to_thread.run_sync(reopen, data.fileno(), flags, data.name)
        try:
            number = kernel.open_backing(descriptor)
            try:
                data.file_lock.lend(descriptor)
            except OSError:
                kernel.close_backing(number)
                raise
        except BaseException:
            os.close(descriptor)
            raise
        log.info("%s: is passed through: the kernel reads and writes %s by itself", image.name, data.name)
        if self.keeps is not None:
            self.keeps.keep_backing(inode, number, descriptor)
        return self._have(kernel, number, descriptor, inode, image, mtime)

    def _have(
        self, kernel: Kernel, number: int, descriptor: int, inode: int, image: Image, mtime: Mtime
    ) -> Passthrough:
        def ended() -> bool:
            return self.keeps is not None and self.keeps.forget_backing(inode)

        return Passthrough(kernel, number, descriptor, image, mtime, ended)
