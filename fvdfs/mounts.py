"""Mount points: what is mounted where, by whom it is used, and when the last of it is gone.

Nothing here looks *into* a mount: it might be dead, or hang. The kernel lists what there is (/proc/self/mountinfo);
the number of a mount's device tells who else has it: bind mounts, other mount namespaces, open files. Only what this
process may see is found.

A daemon holds a lock on the directory that its mount covers, from before it mounts until every image is closed. Whoever
cannot see its process, in another PID namespace, say, waits for the lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import pwd
import re
import select
import shlex
import signal
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fvdfs import xattrs
from fvdfs.errors import FvdError, ImageError, UsageError, printable, told
from fvdfs.store.devices import loop_devices
from fvdfs.store.mountinfo import MountPoint, mount_points
from fvdfs.store.paths import within

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What every call fails with on a mount whose daemon has ended."""
SHOWN = 5
"""Users of a mount that are named in a message."""
LOCK_PATIENCE = 3.0  # seconds for another one to mount, or to close its images
LOOK_PATIENCE = 3.0  # seconds for a mount to answer
_LOCK_RETRY = 0.02  # seconds
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # of linux/fs.h
_AT_FDCWD, _AT_STATX_DONT_SYNC = -100, 0x4000  # of linux/fcntl.h
_STATX_MNT_ID = 0x1000  # of linux/stat.h
_STATX_SIZE = 256  # bytes of struct statx
_STATX_FIELDS = "=I132xIIQ"
"""Of struct statx: stx_mask; stx_dev_major, stx_dev_minor, stx_mnt_id."""
_libc = ctypes.CDLL(None, use_errno=True)


def place(path: str) -> str:
    """The path as mountinfo has it. What is mounted at its end is not looked at."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def mount_at(path: str) -> MountPoint | None:
    """What is mounted at exactly this path, links followed; the uppermost of several."""
    try:
        found = mount_points()
    except OSError:
        return None
    there = place(path)
    at = {mount.path: mount for mount in found}
    return at.get(there) or at.get(os.path.realpath(there))


def umount(mount: MountPoint, *, lazy: bool) -> None:
    """The system call; umount(8) would ask the mount first, and wait for one that hangs. Raises OSError."""
    if _libc.umount2(os.fsencode(mount.path), _UMOUNT_NOFOLLOW | _MNT_DETACH * lazy):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mount.path)


def refuse_dead(path: str) -> None:
    """Raise UsageError where the path leads to a mount of fvdfs that is dead, or into one."""
    at = place(path)
    while (mount := mount_at(at)) is None and at != "/":
        at = os.path.dirname(at)
    if mount is not None and mount.is_ours and is_dead(mount):
        raise UsageError(
            f"{mount.path}: the fvdfs that served this mount has ended; clear it away with: "
            f"fvdfs umount {shlex.quote(mount.path)} (or mount with --replace)"
        )


def explained(error: OSError) -> str:
    """An error of the system as a line for a person."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if name and error.errno in DEAD:
        try:
            refuse_dead(name)
        except UsageError as explanation:
            return str(explanation)
    advice = _whose(name) if name and error.errno in (errno.EACCES, errno.EPERM) else ""
    return printable(told(error)) + (advice and f"; {advice}")


def reason_with_owner(error: FvdError) -> str:
    """An error as a line for a person; of an image that may not be opened it says whose it is."""
    cause, advice = error.__cause__, ""
    if isinstance(error, ImageError) and isinstance(cause, PermissionError) and error.reason == cause.strerror:
        advice = _whose(error.image)
    return str(error) + (advice and f"; {advice}")


def _whose(path: str) -> str:
    """Whose a file is that may not be used; empty: our own, or it cannot be seen."""
    with contextlib.suppress(OSError):
        if (owner := os.stat(path).st_uid) != os.geteuid():
            return f"it belongs to {user_name(owner)}, and this is {user_name(os.geteuid())}"
    return ""


def user_name(number: int) -> str:
    """The name of a user; of one without, the number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def is_dead(mount: MountPoint) -> bool:
    """Whether the daemon of the mount has ended. One that does not answer has not."""
    return ask(mount)[0] in DEAD


def ask(mount: MountPoint) -> tuple[int, bytes]:
    """What a mount says of its daemon, and the error number where it does not; EAGAIN where there is no answer.

    A process of its own asks: it can be killed where a thread would wait for ever, and keep the mount busy. For root it
    becomes the user who mounted, since the kernel lets nobody else ask.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.set_wakeup_fd(-1)
            if os.geteuid() == 0:
                _become_owner(mount)
            os.write(write_end, b"0 " + os.getxattr(mount.path, xattrs.DAEMON))
        except OSError as error:
            os.write(write_end, b"%d " % (error.errno or 0))
        finally:
            os._exit(0)
    os.close(write_end)
    answer = b""
    try:
        if select.select([read_end], [], [], LOOK_PATIENCE)[0]:
            answer = os.read(read_end, 65536)
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + LOOK_PATIENCE
    while not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    number, _, value = answer.partition(b" ")
    return (int(number), value) if number else (errno.EAGAIN, b"")


def identity(answer: bytes) -> dict[str, Any]:
    """What a daemon says of itself, of the bytes that `ask` returns; it may be anybody's, and say anything."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _become_owner(mount: MountPoint) -> None:
    """Be the user who mounted, for good. Raises OSError."""
    user, group = mount.owner("user_id"), mount.owner("group_id")
    if user:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)


def refuse_mounted(mountpoint: str) -> None:
    """Raise UsageError where fvdfs is mounted there already, or was, and is dead."""
    mount = mount_at(mountpoint)
    if mount is not None and mount.is_ours:
        refuse_dead(mountpoint)
        raise UsageError(f"{mountpoint}: fvdfs is mounted there already; unmount it first: fvdfs umount {mountpoint}")


# --- the lock -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """The directory that a mount covers, held by its daemon."""

    descriptor: int
    locked: bool

    def identity(self) -> list[int]:
        """What others know the directory by: its device and inode."""
        status = os.fstat(self.descriptor)
        return [status.st_dev, status.st_ino]

    def release(self) -> None:
        """Every image is closed."""
        os.close(self.descriptor)


def claim(mountpoint: str) -> Claim | None:
    """Lock the directory, before mounting on it; None where it cannot be opened.

    Raises UsageError where fvdfs is mounted there, also by somebody who was a moment earlier.
    """
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        refuse_mounted(mountpoint)
        try:
            descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        locked = lock(descriptor, fcntl.LOCK_EX)
        try:
            refuse_mounted(mountpoint)
        except BaseException:
            os.close(descriptor)
            raise
        if locked or time.monotonic() > deadline:
            return Claim(descriptor, bool(locked))
        os.close(descriptor)
        time.sleep(_LOCK_RETRY)  # somebody is mounting there, or has unmounted and still closes images


def lock(descriptor: int, kind: int) -> bool | None:
    """Lock without waiting; None where there are no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_unlocked(mountpoint: str, identity: list[object]) -> bool | None:
    """Whether the daemon has closed every image; None where the directory that it covered, or its lock, is not seen."""
    found = _look_at_lock(mountpoint)
    return found[1] if found is not None and found[0] == identity else None


def is_locked(mountpoint: str) -> bool:
    """Whether somebody holds the directory as a daemon does."""
    found = _look_at_lock(mountpoint)
    return found is not None and found[1] is False


def _look_at_lock(mountpoint: str) -> tuple[list[int], bool | None] | None:
    """Which directory this is, and whether nobody has locked it; None where it cannot be opened."""
    try:
        descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        return [status.st_dev, status.st_ino], lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


# --- who uses a mount ---------------------------------------------------------------------------


def connection(device: int) -> int | None:
    """What tells the kernel's connection to a daemon from a later one of the same number; None where /sys lacks it."""
    try:
        return os.stat(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}").st_ino
    except OSError:
        return None


def users(mount: MountPoint) -> list[str]:
    """Who keeps the mount, in words for a person; only what this process may see."""
    here = [other.path for other in _mounts_or_none("self") if other.device == mount.device]
    found = [f"{point} (mounted)" for point in here] + _loop_devices(*here)
    own = _namespace("self")
    namespaces = {own}
    for process in processes():
        found += _has_open(process, (file.path for file in _open_files(process) if file.device == mount.device))
        namespace = _namespace(process)
        if namespace in namespaces:
            continue
        namespaces.add(namespace)
        there = (other.path for other in _mounts_or_none(process) if other.device == mount.device)
        points = [point for point in there if point not in here]  # a namespace begins as a copy of ours
        if points:
            found.append(f"process {process} ({command(process)}) has {points[0]} in its mount namespace")
    return found


def busy_with(mount: MountPoint) -> list[str]:
    """Who keeps this mount point from being unmounted."""
    below = [f"{other.path} (mounted)" for other in _mounts_or_none("self") if other.parent == mount.number]
    found = [*below, *_loop_devices(mount.path)]
    for process in processes():
        files = (file for file in _open_files(process) if file.device == mount.device)
        found += _has_open(process, (file.path for file in files if file.mount in (mount.number, None)))
    return found


def _has_open(process: str, paths: Iterable[str]) -> list[str]:
    """What a process has open, in words; nothing where that is nothing."""
    found = sorted(set(paths))
    return [f"process {process} ({command(process)}) has {listed(found)} open"] if found else []


def listed(found: list[str]) -> str:
    """Some users, or files, in a line."""
    more = len(found) - SHOWN
    return ", ".join(found[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def processes() -> list[str]:
    """The numbers of all processes."""
    return sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int)


def _namespace(process: str) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/mnt")
    except OSError:
        return None


def _mounts_or_none(process: str) -> list[MountPoint]:
    try:
        return mount_points(process)
    except OSError:
        return []


def command(process: str) -> str:
    """The name of the program that a process runs, as ps(1) shows it."""
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """What a process has of a file system."""

    path: str
    device: int
    mount: int | None
    """Which of its mounts; the kernel uses the number again once that is gone. None: not known."""


def _open_files(process: str) -> Iterator[_OpenFile]:
    """What a process has: open files, its working and root directory, mapped files."""
    try:
        links = [f"fd/{name}" for name in os.listdir(f"/proc/{process}/fd")]
        for link in (f"/proc/{process}/{name}" for name in ("cwd", "root", *links)):
            try:
                yield _OpenFile(os.readlink(link), *_device_and_mount(link))
            except OSError:
                continue  # just closed, or on a file system that does not tell
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                words = line.rstrip("\n").split(maxsplit=5)
                if len(words) == 6 and words[5].startswith("/"):
                    major, minor = words[3].split(":")
                    yield _OpenFile(words[5], os.makedev(int(major, 16), int(minor, 16)), None)
    except OSError:
        return  # it has ended, or is not ours to look at


def _device_and_mount(path: str) -> tuple[int, int | None]:
    """What stat has of neither: the file system is not asked, and need not answer. Raises OSError."""
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_MNT_ID, answer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    known, major, minor, mount = struct.unpack_from(_STATX_FIELDS, answer)
    return os.makedev(major, minor), mount if known & _STATX_MNT_ID else None


def _loop_devices(*points: str) -> list[str]:
    """Loop devices over files below mount points: no process has these open."""
    found = []
    for device, file in loop_devices():
        if any(within(file, point) for point in points):
            parts = re.compile(re.escape(device) + r"(p\d+)?")
            at = [mount.path for mount in _mounts_or_none("self") if parts.fullmatch(mount.source)]
            found.append(f"{device} is over {file}" + f", and mounted at {listed(at)}" * bool(at))
    return found
