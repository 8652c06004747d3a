"""Following paths without asking a file system that waits for us.

A thread of a mount that asks its own mount for something waits for its own process. Where the process is killed
meanwhile, nobody ever answers: the thread cannot end, so the process cannot, so its /dev/fuse stays open, and all who
use the mount hang. The same goes for another mount of fvdfs that leads back to this one, and for whatever stands on a
file of ours (a loop device, a file system on it, bindfs). So the process that serves a mount follows paths one name at
a time, by handles (O_PATH), and looks which device a handle is on before it asks that device for anything: `statx`
tells without asking the file system. Devices that lead back are refused.

A thread enters a device only if no other thread has been stuck in it for long (`NoAnswer`): so a share that hangs stops
few threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fvdfs.errors import FvdError
from fvdfs.store.devices import files_below
from fvdfs.store.mountinfo import layers, mount_points

PATIENCE = 2.0
"""Seconds after which a look at an image counts as not answered. A server answers in milliseconds, also at the far side
of the world. A disk that has to spin up takes longer, but is no share (`Walker.is_at_share`)."""

_MAX_LINKS = 40  # as the kernel
_TRUST = 1.0  # seconds for which the judgement of a device holds
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE_AND_MODE = 3
_STATX_BTIME = 0x800
_STATX = struct.Struct("=28xH98xIIII112x")  # mode; device of the device, of the file system
_STATX_BORN = struct.Struct("=I76xqI164x")  # what is known; seconds and nanoseconds
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


class NoAnswer(FvdError):
    """No answer comes in time, or others wait for it already."""


class LeadsBack(OSError):
    """A path leads back into the mount that follows it."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ELOOP, reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a file without asking its file system."""

    mode: int
    device: int
    """Of the file system that it is on."""
    node: int
    """The device that it stands for."""


def kind(handle: int, name: bytes = b"") -> Kind:
    """Of the file behind a handle, or of a name in that folder, which may be a link. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    flags = _AT_STATX_DONT_SYNC | _AT_SYMLINK_NOFOLLOW | (0 if name else _AT_EMPTY_PATH)
    if _libc.statx(handle, name, flags, _STATX_TYPE_AND_MODE, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mode, *numbers = _STATX.unpack(buffer.raw)
    return Kind(mode, os.makedev(numbers[2], numbers[3]), os.makedev(numbers[0], numbers[1]))


def born(handle: int) -> int:
    """When the file behind a handle was made, in ns; 0 where that is not known. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATX_BORN.size)
    if _libc.statx(handle, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    known, seconds, ns = _STATX_BORN.unpack(buffer.raw)
    return seconds * 10**9 + ns if known & _STATX_BTIME else 0


def in_time(call: Callable[[], T], otherwise: T) -> T:
    """What the call returns, which must not raise; `otherwise` where that takes too long."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else otherwise


def real_path(path: str) -> str:
    """os.path.realpath; the path as it is where a share on the way does not answer."""

    def follow() -> str:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)  # does not ask what is mounted at its end
        except OSError:
            return os.path.realpath(path)
        try:
            return os.readlink(f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)

    return in_time(follow, os.path.abspath(path))


def within(path: str, folder: str) -> bool:
    """Whether a path is a folder, or below it; both without links."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


class Walker:
    """Follows paths for the threads of one process."""

    def __init__(self, own_device: int = -1) -> None:
        """`own_device`: of the mount that this process serves; -1: none, and any path is followed."""
        self.own_device = own_device
        self._judged: dict[int, tuple[float, str]] = {}
        self._folders: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._patient: set[int] = set()
        self._inside: dict[int, tuple[int, float]] = {}  # by thread: the device, and since when

    # --- threads that wait --------------------------------------------------------------------------

    @contextlib.contextmanager
    def looking(self, *, patient: bool = False) -> Iterator[None]:
        """What this thread does meanwhile may take long: others learn from it where not to go. May be nested.

        A patient thread waits for a share all the same.
        """
        thread = threading.get_ident()
        with self._lock:
            before = self._inside.get(thread)
            becomes_patient = patient and thread not in self._patient
            if becomes_patient:
                self._patient.add(thread)
        try:
            yield
        finally:
            with self._lock:
                if before is None:
                    self._inside.pop(thread, None)
                else:
                    self._inside[thread] = before
                if becomes_patient:
                    self._patient.discard(thread)

    def enter(self, device: int) -> None:
        """This thread is about to ask a device. Raises NoAnswer where another one has waited there for long."""
        now = time.monotonic()
        thread = threading.get_ident()
        with self._lock:
            for other, (where, since) in self._inside.items():
                if (
                    other != thread
                    and thread not in self._patient
                    and where == device
                    and now - since > PATIENCE
                    and is_share(device)
                ):
                    raise NoAnswer(f"{self.place(device)} does not answer")
            self._inside[thread] = device, now

    def is_at_share(self, thread: int) -> bool:
        """Whether this thread waits for something that is no disk of this host."""
        with self._lock:
            where = self._inside.get(thread)
        return where is not None and is_share(where[0])

    def place(self, device: int) -> str:
        """Where a device is mounted, for messages."""
        paths = [point.path for point in mount_points() if point.device == device]
        return paths[-1] if paths else f"device {os.major(device)}:{os.minor(device)}"

    # --- paths ---------------------------------------------------------------------------------------

    def open(self, path: str | bytes) -> int:
        """An O_PATH handle of what the path leads to, links and all. Raises LeadsBack, NoAnswer, OSError."""
        if self.own_device < 0:
            return os.open(path, os.O_PATH | os.O_CLOEXEC)
        return self._open(os.fsencode(path), frozenset())

    def stat(self, path: bytes) -> os.stat_result:
        """os.stat of a file in a folder that the operator named. Raises LeadsBack, NoAnswer, OSError."""
        if self.own_device < 0:
            return os.stat(path)
        folder, name = os.path.split(path)
        with self._folder(folder) as handle:
            found = kind(handle, name)
            if name and found.device == kind(handle).device and not stat.S_ISLNK(found.mode):
                return os.stat(name, dir_fd=handle, follow_symlinks=False)
        with self._file(path) as handle:
            return os.fstat(handle)

    def born(self, path: bytes) -> int:
        """`born`, likewise. Raises as `stat`."""
        with self._file(path) as handle:
            return born(handle)

    def attribute(self, path: bytes, name: str) -> bytes:
        """os.getxattr, likewise. Raises as `stat`."""
        with self._file(path) as handle:
            return os.getxattr(f"/proc/self/fd/{handle}", name)

    def attributes(self, path: bytes) -> list[str]:
        """os.listxattr, likewise. Raises as `stat`."""
        with self._file(path) as handle:
            return os.listxattr(f"/proc/self/fd/{handle}")

    @contextlib.contextmanager
    def _file(self, path: bytes) -> Iterator[int]:
        handle = self.open(path)
        try:
            yield handle
        except OSError as error:  # it may have the handle's name
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(handle)

    def names(self, folder: bytes) -> list[bytes]:
        """os.listdir of a folder that the operator named. Raises as `stat`."""
        with self._folder(folder) as handle:
            listing = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return [os.fsencode(name) for name in os.listdir(listing)]
            finally:
                os.close(listing)

    def statvfs(self, folder: bytes) -> os.statvfs_result:
        """os.statvfs of a folder that the operator named. Raises as `stat`."""
        with self._folder(folder) as handle:
            return os.statvfs(handle)

    @contextlib.contextmanager
    def _folder(self, path: bytes) -> Iterator[int]:
        """A handle; its path was judged when it was named, and is one of folders, without links."""
        if path in self._folders:
            self.enter(self._folders[path])
        handle = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = kind(handle).device
            self._arrive(device, frozenset())
            self._folders[path] = device
            yield handle
        finally:
            os.close(handle)

    def check(self, path: str | bytes) -> None:
        """Raise LeadsBack where the path, as far as it exists, leads back. Raises NoAnswer, OSError of another kind."""
        with self.looking(), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.close(self.open(path))

    def _open(self, path: bytes, above: frozenset[int]) -> int:
        names = deque(path.split(b"/"))
        at = os.open("/" if path.startswith(b"/") else ".", _HANDLE)
        try:
            device = kind(at).device
            self._arrive(device, above)
            links = 0
            while names:
                name = names.popleft()
                if name in (b"", b"."):
                    if names:
                        continue
                    name = b"."
                step = _step(at, name, more=bool(names))
                here = step
                try:
                    found = kind(step)
                    if found.device != device:
                        self._arrive(found.device, above)
                    if stat.S_ISLNK(found.mode):
                        links += 1
                        if links > _MAX_LINKS:
                            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                        target = os.readlink(b"", dir_fd=step)
                        names.extendleft(reversed(target.split(b"/")))
                        if target.startswith(b"/"):
                            root = os.open("/", _HANDLE)
                            os.close(at)
                            at, device = root, kind(root).device
                        continue
                    here, at = at, step
                    device = found.device
                finally:
                    os.close(here)
                if stat.S_ISBLK(found.mode):
                    self._judge(found.node, above)
            return at
        except BaseException:
            os.close(at)
            raise

    def _arrive(self, device: int, above: frozenset[int]) -> None:
        self._judge(device, above)
        self.enter(device)

    def _judge(self, device: int, above: frozenset[int]) -> None:
        """Raise LeadsBack where a device stands on our mount. `above`: the devices that stand on this one."""
        if device in above:
            return
        if device == self.own_device:
            raise LeadsBack("leads into this mount itself")
        when, reason = self._judged.get(device, (0.0, ""))
        now = time.monotonic()
        if not when or now - when > _TRUST:
            reason = self._find_reason(device, above | {device})
            if not above:
                self._judged[device] = now, reason
        if reason:
            raise LeadsBack(reason)

    def _find_reason(self, device: int, above: frozenset[int]) -> str:
        below = list(files_below(device))
        for point in mount_points():
            if point.device != device:
                continue
            if point.is_ours:
                return f"leads into {point.path}, a mount of fvdfs: name the image itself, with the format fvd"
            below += layers(point)
        for path in dict.fromkeys(below):
            try:
                os.close(self._open(os.fsencode(path), above))
            except LeadsBack as error:
                return f"stands on {path}, which {error.strerror}"
            except OSError:
                continue  # it is not there, at least not for us
        return ""


def _step(at: int, name: bytes, *, more: bool) -> int:
    if more:  # only a folder that is followed is mounted by an automounter
        try:
            return os.open(name, _HANDLE | os.O_DIRECTORY, dir_fd=at)
        except NotADirectoryError:
            pass  # a link, or the end of it
    return os.open(name, _HANDLE, dir_fd=at)


def is_share(device: int) -> bool:
    """Whether a device is no disk of this host: then no answer may ever come."""
    return os.major(device) == 0
