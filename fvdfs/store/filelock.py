"""Who else has a file open: locks that keep out other mounts and processes of fvdfs, and QEMU.

All are locks of the open file description (OFD): they end when it is closed, by whatever end of the process, and two
openings in one process exclude each other like any two. There are two kinds, taken one after the other:

* fvdfs's own, on one byte far behind any data: shared for who reads, exclusive for who writes.
* QEMU's image locks (`raw_apply_lock_bytes` and `raw_check_lock_bytes` in its block/file-posix.c), all of them shared.
  A lock on byte 100 + N says "I use permission N", one on byte 200 + N "others must not use permission N". After
  locking, each looks whether somebody refuses what it uses, or uses what it refuses, by asking for an exclusive lock
  without taking it. A reader here does as a backing file of QEMU's: it reads what must not change, and lets nobody
  write or resize; many readers of one file get on with each other, and with QEMU's. A writer uses these two permissions
  as well.

Whoever writes only to keep copies of a base need not keep anybody out: others ask on a third byte (`ask`), and the
writer looks there now and then (`is_asked_for`) and becomes a reader.

A base image may be filled with copies of its own base while others read it, who take what is there and the rest from
below it: what it reads as does not change. Whoever does this has the locks of a reader, and a fifth byte for himself.
Who has read the metadata of such a file, and then writes to it, has to know that it is as it was: nobody fills it while
he holds that byte, too; otherwise he reads it again.

The kernel may have a file to write to by itself (`ops/passthrough.py`), and for longer than our process lives. So the
opening that it has holds a lock of its own, on a fourth byte, shared or exclusive as ours is. Whoever takes the lock
looks there too.

fvdfs's own are taken first, so that between two mounts of fvdfs the error says so; with QEMU's alone they would exclude
each other the same way. What fails leaves the locks as they were.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import struct

from fvdfs.errors import ImageBusy

log = logging.getLogger(__name__)

_OWN = 0x7FFF_4656_4400_0000  # the byte of fvdfs's own lock: behind any data, with "FVD" in it
_ASKING = _OWN + 1
_LENT = _OWN + 2  # of the opening that the kernel has
_COPYING = _OWN + 3
_USED = 100  # QEMU's RAW_LOCK_PERM_BASE
_NOT_SHARED = 200  # QEMU's RAW_LOCK_SHARED_BASE
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # QEMU's BLK_PERM_*, as bits

_OFD_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_OFD_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)
_LOCK = struct.Struct("hhqqi4x")  # struct flock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_HELD = (errno.EACCES, errno.EAGAIN)

_SMB = (0x517B, 0xFE53_4D42, 0xFF53_4D42)
# Of file systems whose files are on another machine: NFS, Ceph, AFS, 9P, GFS2, OCFS2, Coda, Lustre.
_REMOTE = (*_SMB, 0x6969, 0xC36_400, 0x5346_414F, 0x0102_1997, 0x0116_1970, 0x7461_636F, 0x7375_7245, 0x0BD0_0BD0)
# On these, a lock forbids writing to the bytes that it covers, to its own holder too; QEMU's cover the header.
_MANDATORY = _SMB

lent_before: dict[tuple[int, int], int] = {}
"""What the kernel has had of files since a former process of this mount: the descriptor, by device and inode."""
_libc = ctypes.CDLL(None, use_errno=True)


def _used(exclusive: bool) -> tuple[int, ...]:
    return (_CONSISTENT_READ, _WRITE, _RESIZE) if exclusive else (_CONSISTENT_READ,)


_REFUSED = (_WRITE, _RESIZE)


class FileLock:
    """The locks of one open file. Calls may wait where locks are those of a server."""

    def __init__(self, fd: int, name: str) -> None:
        """`fd` stays the caller's, and has to be open for reading, for exclusive locks also for writing."""
        self._fd = fd
        self._name = name
        self._own = fcntl.F_UNLCK
        self._asks = False
        self._lent = -1
        """The descriptor of the opening that the kernel has."""
        self.was_lent = False
        """Whether it has had that since a former process."""
        self._qemu: frozenset[int] = frozenset()
        self.is_unfilled = False
        """Whether nobody can have filled the file with copies since `keep_unfilled`."""
        self.with_qemu = True
        """Whether QEMU's locks are taken and respected."""
        self.is_remote = False
        """Whether the file is on another machine; known once it is locked."""

    def take(self, exclusive: bool) -> None:
        """Take the locks for reading, or for writing, or turn those that are held into this kind.

        Raises ImageBusy where another open file holds one that excludes it, OSError.
        """
        before = self._own
        if lent_before and self._lent < 0:
            status = os.fstat(self._fd)
            self._lent = lent_before.get((status.st_dev, status.st_ino), -1)
            self.was_lent = self._lent >= 0
        kind = type_of_file_system(self._fd)
        self.is_remote = kind in _REMOTE
        try:
            if not self._take_own(exclusive):
                return
            self._refuse_lent(exclusive)
            if self.with_qemu and kind not in _MANDATORY:
                self._take_qemu(exclusive)
            if self._lent >= 0:
                self._set(self._own, _LENT, self._lent)
        except BaseException:
            if self._own != before:
                self._set(before, _OWN)
                self._own = before
            raise

    def take_copying(self) -> bool:
        """Be the only one who fills the file with copies; whether that is so. Raises OSError."""
        return self._set_copying(fcntl.F_WRLCK, where_no_locks=False)

    def keep_unfilled(self) -> None:
        """Have nobody fill the file with copies, unless somebody does so already. Raises OSError."""
        self.is_unfilled = self._set_copying(fcntl.F_RDLCK, where_no_locks=True)

    def let_fill(self) -> None:
        """Undo `keep_unfilled`. Raises OSError."""
        if self.is_unfilled:
            self._set_copying(fcntl.F_UNLCK, where_no_locks=True)
            self.is_unfilled = False

    def _set_copying(self, kind: int, *, where_no_locks: bool) -> bool:
        try:
            self._set(kind, _COPYING)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return where_no_locks
            if error.errno in _HELD:
                return False
            raise
        return True

    def is_being_filled(self) -> bool:
        """Whether another opening fills the file with copies. Raises OSError."""
        return self._is_held(_COPYING, fcntl.F_RDLCK)

    def lend(self, descriptor: int) -> None:
        """The kernel gets another opening of the file, which holds a lock from now on, of the kind that ours has.

        Raises OSError where the file system has no locks.
        """
        if self._own == fcntl.F_UNLCK:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        self._set(self._own, _LENT, descriptor)
        self._lent = descriptor

    def end_lending(self) -> bool:
        """The opening that the kernel got is closed as far as it is ours; whether a program still uses it.

        Raises OSError.
        """
        self._lent = -1
        return self._is_held(_LENT)

    def ask(self) -> None:
        """Ask those who keep us out to let us in; the question stands until we are. Raises OSError."""
        self._set(fcntl.F_RDLCK, _ASKING)
        self._asks = True

    def is_asked_for(self) -> bool:
        """Whether another open file wants in. Raises OSError."""
        return self._is_held(_ASKING)

    def _take_own(self, exclusive: bool) -> bool:
        """False where the file system has no locks."""
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        try:
            self._set(kind, _OWN)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(
                    "%s: its file system has no locks (%s): nothing guards it against other writers",
                    self._name,
                    error.strerror,
                )
                return False
            if error.errno not in _HELD:
                raise
            use = "in use" if exclusive else "open for writing"
            raise ImageBusy(
                self._name, f"{use} by another mount or process, or by an image based on it; close it there first"
            ) from None
        self._own = kind
        if self._asks:
            self._set(fcntl.F_UNLCK, _ASKING)
            self._asks = False
        return True

    def _refuse_lent(self, exclusive: bool) -> None:
        """Raise ImageBusy where a program still writes to the file by way of a mount that has ended, or reads it."""
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        if self._is_held(_LENT, kind, self._lent):
            raise ImageBusy(
                self._name,
                "still used by way of a mount whose fvdfs has ended; unmount it, and end the programs that use it",
            )

    def _take_qemu(self, exclusive: bool) -> None:
        used = _used(exclusive)
        wanted = frozenset([_USED + n for n in used] + [_NOT_SHARED + n for n in _REFUSED])
        new = wanted - self._qemu
        taken: list[int] = []
        try:
            for at in sorted(new):
                self._set(fcntl.F_RDLCK, at)
                taken.append(at)
            if new and any(map(self._is_held, [_NOT_SHARED + n for n in used] + [_USED + n for n in _REFUSED])):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            for at in taken:
                self._set(fcntl.F_UNLCK, at)
            if error.errno not in _HELD:
                raise
            use = "in use" if exclusive else "open for writing"
            raise ImageBusy(
                self._name,
                f"{use} by QEMU, qemu-storage-daemon or another program with QEMU's image locks; close it there first",
            ) from None
        for at in self._qemu - wanted:
            self._set(fcntl.F_UNLCK, at)
        self._qemu = wanted

    def _set(self, kind: int, at: int, descriptor: int = -1) -> None:
        fd = self._fd if descriptor < 0 else descriptor
        fcntl.fcntl(fd, _OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, at, 1, 0))

    def _is_held(self, at: int, kind: int = fcntl.F_WRLCK, descriptor: int = -1) -> bool:
        """Whether any other opening has locked this byte, so that it keeps out this kind of lock."""
        fd = self._fd if descriptor < 0 else descriptor
        answer = fcntl.fcntl(fd, _OFD_GETLK, _LOCK.pack(kind, os.SEEK_SET, at, 1, 0))
        return bool(_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def type_of_file_system(fd: int) -> int:
    """`f_type` of fstatfs(2), which Python leaves out; 0 where it is not known."""
    buffer = (ctypes.c_long * 64)()
    return 0 if _libc.fstatfs(fd, buffer) else buffer[0] & 0xFFFF_FFFF
