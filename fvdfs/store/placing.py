"""How a new file comes to its name: made under one that no mount shows, with the permissions it is to have. Blocks."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterable

_ACL = "system.posix_acl_access"
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_MAX_NAME = 200  # bytes of a name that are repeated in the temporary one
_libc = ctypes.CDLL(None, use_errno=True)


def make_unnamed(final: str) -> tuple[int, str]:
    """A new, empty file in the folder of `final`, whose name it is to have: its descriptor, and where it lies now.

    Nobody but its owner may read it. Raises OSError.
    """
    folder, name = os.path.split(final)
    short = os.fsdecode(os.fsencode(name)[:_MAX_NAME])
    place = os.path.join(folder, f".{short}.{secrets.token_hex(4)}.part")
    return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), place


def fill(descriptor: int, size: int, parts: Iterable[tuple[int, bytes]]) -> None:
    """Give a new file this size in bytes, sparse, and these parts (offset, content), whole. Raises OSError."""
    os.ftruncate(descriptor, size)
    for offset, data in parts:
        done = 0
        while done < len(data):  # a full disk may take a part
            done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)


def give_name(place: str, final: str, *, replace: bool) -> None:
    """Rename a file. Raises FileExistsError where the name is taken, and what has it is not to be replaced; OSError."""
    if not replace:
        source, target = os.fsencode(place), os.fsencode(final)
        if _libc.renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # EINVAL: the file system does not know it
            raise OSError(code, os.strerror(code))
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(place, final)


def take_permissions(descriptor: int, old: int) -> None:
    """Give a new file the owner, group, mode and access list of another one. Raises OSError where that must not be."""
    remove_acl(descriptor)
    new, wanted, list_ = os.fstat(descriptor), os.fstat(old), acl(old)
    if (wanted.st_uid, wanted.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, wanted.st_uid, wanted.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(wanted.st_mode) & 0o777)
    if list_:
        os.setxattr(descriptor, _ACL, list_)


def acl(descriptor: int) -> bytes:
    """The access list of a file, as it is stored; empty: it has none."""
    try:
        return os.getxattr(descriptor, _ACL)
    except OSError:
        return b""


def remove_acl(descriptor: int) -> None:
    """Remove the access list that the folder gives to new files."""
    if acl(descriptor):
        os.removexattr(descriptor, _ACL)


def sync_folder(path: str) -> None:
    """Make the names in a folder stable, as far as its file system can. Raises OSError."""
    try:
        descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # may be written to, and not be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no such call
            raise
    finally:
        os.close(descriptor)
