"""The messages of the kernel's FUSE interface (linux/fuse.h), as far as `device` reads or writes them.

libfuse's answer to INIT leaves out what matters most here, so it is amended:

- FUSE_HANDLE_KILLPRIV_V2. Without it the kernel asks for the extended attribute security.capability
  before *every* write, one more request each time. With it the file system promises to drop set-uid
  bits and capabilities on writing itself; ours has none to drop (`filesystem.py` never shows them).
- Not FUSE_AUTO_INVAL_DATA, which libfuse asks for. With it, and without the write-back cache, each write makes the
  kernel ask for the attributes at the next read, find another mtime, and drop all its pages of the disk. It tells
  nothing new: an open disk changes only through the kernel, which knows (locks keep other mounts and commands from
  it), and one that changed while it was closed loses its pages at the opening (`Openings._have_pages_right`). Of a
  disk that is passed through, whose data file might change, the kernel has no pages.
- FUSE_PASSTHROUGH, where it is asked for. Then the kernel may read and write a file by itself (`passthrough.py`), which
  also OPEN's answer has to say. It does not go together with the write-back cache, which is not asked for then.
- FUSE_DIRECT_IO_ALLOW_MMAP. Then the answer to an OPEN with O_DIRECT may have FOPEN_DIRECT_IO, without which
  FOPEN_PARALLEL_DIRECT_WRITES has no effect, and such a file can still be mapped. Otherwise threads that write to one
  disk (QEMU with cache=none) wait for each other. The kernel sends changed pages before it reads or writes directly,
  and drops those of what it has written. It writes one after the other past the end, to append, and where a page cache
  is in use: another opening, a mapping. It is asked for only
  - from Linux 6.18 on: earlier ones may keep a page that was read during the write, unless they have got a fix, which
    INIT does not tell; and before 6.12 whoever opens the disk could wait for ever;
  - without the write-back cache, with which the kernel keeps the mtime, and such writes do not change it.
  The kernel leaves O_DSYNC of such writes to us (`device.py`).
- max_background, the number of read-ahead and writeback requests that may be under way, 12 otherwise. Those of an image
  whose base hangs count, so there are far more than a disk needs; read-ahead stops at a smaller number by itself.

A kernel that does not offer a flag is not answered with it. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pyfuse3

MAX_BACKGROUND = 256  # requests
CONGESTION_THRESHOLD = 48

FUSE_FORGET = 2
FUSE_SETATTR = 4
FUSE_UNLINK = 10
FUSE_RENAME = 12
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_FSYNC = 20
FUSE_SETXATTR = 21
FUSE_REMOVEXATTR = 24
FUSE_INIT = 26
FUSE_CREATE = 35
FUSE_INTERRUPT = 36
FUSE_BATCH_FORGET = 42
FUSE_FALLOCATE = 43
FUSE_RENAME2 = 45
FUSE_LSEEK = 46
FUSE_COPY_FILE_RANGE = 47
FUSE_COPY_FILE_RANGE_64 = 53  # Linux 6.18; the same, but its answer has 64 bits
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_RESEND = 7  # Linux 6.9
FUSE_UNIQUE_RESEND = 1 << 63
"""In the number of a request that a former daemon has received, and not answered; it belongs to the answer, too."""
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_INIT_EXT = 1 << 30
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 4  # of flags2, as the next
FUSE_PASSTHROUGH = 1 << 5
FUSE_HAS_RESEND = 1 << 7
_SIDE_BY_SIDE_MINOR = 45  # of FUSE 7: Linux 6.18
STACK_DEPTH = 1  # of file systems on file systems: what the kernel writes to must not be stacked itself
NAMES = {
    FUSE_SETATTR: "SETATTR",
    FUSE_READ: "READ",
    FUSE_WRITE: "WRITE",
    FUSE_FSYNC: "FSYNC",
    FUSE_INTERRUPT: "INTERRUPT",
    FUSE_FALLOCATE: "FALLOCATE",
    FUSE_LSEEK: "LSEEK",
    FUSE_COPY_FILE_RANGE: "COPY_FILE_RANGE",
    FUSE_COPY_FILE_RANGE_64: "COPY_FILE_RANGE_64",
}
IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
INIT_IN = struct.Struct("=IIII")  # major minor max_readahead flags
INIT_OUT = struct.Struct("=IIIIHHI")  # major minor max_readahead flags max_background congestion_threshold max_write
INIT_IN_MORE = struct.Struct("=16xI")  # flags2
INIT_OUT_MORE = struct.Struct("=II")  # flags2 max_stack_depth
_MORE_AT = 32  # bytes from INIT_OUT to INIT_OUT_MORE
OPEN_OUT = struct.Struct("=QIi")  # fh open_flags backing_id
ENTRY_OUT = 128  # bytes, which CREATE's answer has before those of OPEN
CREATE_IN = 16  # bytes before the name
OPEN_IN = struct.Struct("=I4x")  # flags of open(2)
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
# READ, and WRITE without its data, header and all: len opcode unique fh offset size, its own flags, those of the file.
# FSYNC has its fh there, too.
TRANSFER = struct.Struct("=IIQ8x16xQQII8xI4x")
# SETATTR: nodeid, valid, mtime and its nanoseconds.
SETATTR = struct.Struct("=16xQ16xI36xQ8x4xI24x")
FALLOCATE = struct.Struct("=40xQQQI4x")  # fh offset length mode
LSEEK = struct.Struct("=40xQQI4x")  # fh offset whence
PLACE = struct.Struct("=Q")  # LSEEK's answer
COPY = struct.Struct("=40xQQ8xQQQQ")  # fh and offset to copy from; fh and offset to copy to, length, flags
COPIED = struct.Struct("=Q")  # size
FUSE_WRITE_CACHE = 1 << 0  # written by the kernel, for whoever changed the page
FATTR_FH = 1 << 6
FATTR_TIMES = 1 << 5 | 1 << 10  # of the last change of content, and of attributes
# The answer: timeout s and ns; ino size blocks atime mtime ctime, their ns, mode nlink uid gid rdev blksize.
ATTRIBUTES = struct.Struct("=QI4xQQQqqqIIIIIIIII4x")
WRITTEN = struct.Struct("=I4x")  # size
SHORTEST = {
    FUSE_SETATTR: SETATTR.size,
    FUSE_READ: TRANSFER.size,
    FUSE_FSYNC: IN_HEADER.size + 16,
    FUSE_FALLOCATE: FALLOCATE.size,
    FUSE_LSEEK: LSEEK.size,
    FUSE_COPY_FILE_RANGE: COPY.size,
    FUSE_COPY_FILE_RANGE_64: COPY.size,
}
"""Bytes of the requests that are answered here, but WRITE, which has its data behind what READ has."""
INVALIDATE = struct.Struct("=Qqq")  # inode offset length; 0: all


def is_whole(length: int, declared: int, opcode: int, size: int, largest: int) -> bool:
    """Whether a message of `length` bytes is as long as it says, and as its kind must be.

    `size`: bytes to read or write; `largest`: how many that may be.
    """
    if length != declared or length < SHORTEST.get(opcode, IN_HEADER.size):
        return False
    if opcode == FUSE_WRITE:
        return length == TRANSFER.size + size
    return opcode != FUSE_READ or size <= largest


def encode(attributes: pyfuse3.EntryAttributes) -> bytes:
    """The answer to GETATTR or SETATTR (`fuse_attr_out`)."""
    atime, mtime, ctime = (
        divmod(time_ns, 10**9) for time_ns in (attributes.st_atime_ns, attributes.st_mtime_ns, attributes.st_ctime_ns)
    )
    return ATTRIBUTES.pack(
        int(attributes.attr_timeout),
        0,
        attributes.st_ino,
        attributes.st_size,
        attributes.st_blocks,
        atime[0],
        mtime[0],
        ctime[0],
        atime[1],
        mtime[1],
        ctime[1],
        attributes.st_mode,
        attributes.st_nlink,
        attributes.st_uid,
        attributes.st_gid,
        attributes.st_rdev,
        attributes.st_blksize,
    )


def agrees(answer: bytes) -> bool:
    """Whether an answer to INIT says yes."""
    return len(answer) >= OUT_HEADER.size + INIT_OUT.size and OUT_HEADER.unpack_from(answer)[1] == 0


def amend(request: bytes, answer: bytes, *, passthrough: bool = False) -> bytes:
    """libfuse's answer to the INIT request, with our fields in it; as it is where it says no or one is cut short.

    `passthrough`: ask for FUSE_PASSTHROUGH, in place of the write-back cache.
    """
    if not agrees(answer) or len(request) < IN_HEADER.size + INIT_IN.size:
        return answer
    _, kernels_minor, _, offered = INIT_IN.unpack_from(request, IN_HEADER.size)
    major, minor, read_ahead, flags, _, _, max_write = INIT_OUT.unpack_from(answer, OUT_HEADER.size)
    flags = flags & ~FUSE_AUTO_INVAL_DATA | offered & FUSE_HANDLE_KILLPRIV_V2
    offered2 = _offered2(request, answer)
    flags2 = offered2 & FUSE_PASSTHROUGH if passthrough else 0
    if flags2:
        flags &= ~FUSE_WRITEBACK_CACHE
    if not flags & FUSE_WRITEBACK_CACHE and kernels_minor >= _SIDE_BY_SIDE_MINOR:
        flags2 |= offered2 & FUSE_DIRECT_IO_ALLOW_MMAP
    amended = bytearray(answer)
    if flags2:
        flags |= FUSE_INIT_EXT
        INIT_OUT_MORE.pack_into(amended, OUT_HEADER.size + _MORE_AT, flags2, STACK_DEPTH)
    fields = (major, minor, read_ahead, flags, MAX_BACKGROUND, CONGESTION_THRESHOLD, max_write)
    INIT_OUT.pack_into(amended, OUT_HEADER.size, *fields)
    return bytes(amended)


def _offered2(request: bytes, answer: bytes) -> int:
    """The second flags that the kernel offers; none where the answer has no room for them."""
    if len(request) < IN_HEADER.size + INIT_IN_MORE.size:
        return 0
    if not INIT_IN.unpack_from(request, IN_HEADER.size)[3] & FUSE_INIT_EXT:
        return 0
    has_room = len(answer) >= OUT_HEADER.size + _MORE_AT + INIT_OUT_MORE.size
    return int(INIT_IN_MORE.unpack_from(request, IN_HEADER.size)[0]) if has_room else 0


def writes_back(answer: bytes) -> bool:
    """Whether an answer to INIT asks for the write-back cache."""
    return bool(INIT_OUT.unpack_from(answer, OUT_HEADER.size)[3] & FUSE_WRITEBACK_CACHE)


def _flags2(answer: bytes) -> int:
    """The second flags of an answer to INIT."""
    at = OUT_HEADER.size + _MORE_AT
    if len(answer) < at + INIT_OUT_MORE.size or not INIT_OUT.unpack_from(answer, OUT_HEADER.size)[3] & FUSE_INIT_EXT:
        return 0
    return int(INIT_OUT_MORE.unpack_from(answer, at)[0])


def passes_through(answer: bytes) -> bool:
    """Whether an answer to INIT asks for FUSE_PASSTHROUGH."""
    return bool(_flags2(answer) & FUSE_PASSTHROUGH)


def writes_side_by_side(answer: bytes) -> bool:
    """Whether an answer to INIT has what direct writes side by side take."""
    return bool(_flags2(answer) & FUSE_DIRECT_IO_ALLOW_MMAP)


def resends(request: bytes) -> bool:
    """Whether the kernel, by its INIT request, can send again what was not answered."""
    if len(request) < IN_HEADER.size + INIT_IN_MORE.size:
        return False
    offered = INIT_IN_MORE.unpack_from(request, IN_HEADER.size)[0]
    return bool(INIT_IN.unpack_from(request, IN_HEADER.size)[3] & FUSE_INIT_EXT and offered & FUSE_HAS_RESEND)


def handle_in(answer: bytes, before: int = 0) -> int | None:
    """The handle in an answer to OPEN, which stands behind so many bytes in that to CREATE; None: it failed."""
    if OUT_HEADER.unpack_from(answer)[1] or len(answer) < OUT_HEADER.size + before + OPEN_OUT.size:
        return None
    return int(OPEN_OUT.unpack_from(answer, OUT_HEADER.size + before)[0])


def opens_direct(request: bytes | bytearray) -> bool:
    """Whether this OPEN is for direct I/O."""
    return bool(OPEN_IN.unpack_from(request, IN_HEADER.size)[0] & os.O_DIRECT)


def amend_open(answer: bytes, backing: Callable[[int], int], *, side_by_side: bool) -> bytes:
    """libfuse's answer to OPEN, in which the kernel is told how to read and write through this handle.

    `backing`: the number of the file that the kernel has for a handle, and is to use; 0: there is none. `side_by_side`:
    if there is none, it need not wait for one direct write before it sends the next.
    """
    if OUT_HEADER.unpack_from(answer)[1] or len(answer) < OUT_HEADER.size + OPEN_OUT.size:
        return answer
    handle, flags, _ = OPEN_OUT.unpack_from(answer, OUT_HEADER.size)
    number = backing(handle)
    if number:
        flags = flags & ~FOPEN_KEEP_CACHE | FOPEN_PASSTHROUGH
    elif side_by_side:
        flags |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    return answer[: OUT_HEADER.size] + OPEN_OUT.pack(handle, flags, number)
