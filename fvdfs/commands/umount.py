"""`fvdfs umount`: unmount, and wait until every image is closed. Blocks.

The mount point is gone at once; the daemon then closes the images and ends. Its process is watched where it can be
seen, else the lock that it holds on the directory that the mount covered. While somebody has the mount elsewhere
neither ends, perhaps never: then the user is told who that is, and that the images are still open.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time

from fvdfs import mounts
from fvdfs.daemon import complain
from fvdfs.errors import UsageError
from fvdfs.store.mountinfo import MountPoint

STILL_OPEN = 3
"""The exit code where the mount point is free, but somebody else keeps the mount."""
PATIENCE = 1.0  # seconds, until somebody who has the mount elsewhere is taken to keep it
PATIENCE_CLOSING = 3.0  # seconds, until it is said that images are still being closed
PATIENCE_BUSY = 0.2  # seconds, until who has something open there is taken to use it
LOOK = 0.02  # seconds between two looks
_BUSY = os.strerror(errno.EBUSY)


def run(mountpoint: str, *, lazy: bool = False) -> int:
    """Unmount, and wait until every image is closed. The exit code: 0, 1 where it is refused, `STILL_OPEN`.

    `lazy`: also where it is busy; then the images stay open until nobody uses them any more. Raises UsageError where
    fvdfs is not mounted there.
    """
    mountpoint = os.path.abspath(mountpoint)
    mount = mounts.mount_at(mountpoint)
    if mount is None or not mount.is_ours:
        raise UsageError(f"{mountpoint}: fvdfs is not mounted there")
    daemon = _Daemon(mount)
    try:
        reason = _unmount_now(mount, lazy=lazy)
        if reason:
            complain(f"{mountpoint}: {reason}")
            return 1
        return daemon.wait()
    finally:
        daemon.close()


def clear_dead(mountpoint: str) -> None:
    """Unmount what a daemon that has ended has left there, if it has, though programs may still have it open.

    Raises UsageError where that is refused.
    """
    mount = mounts.mount_at(mountpoint)
    while mount is not None and mount.is_ours and mounts.is_dead(mount):
        if reason := _unmount_now(mount, lazy=True):
            raise UsageError(f"{mountpoint}: a dead mount cannot be cleared away: {reason}")
        mount = mounts.mount_at(mountpoint)


def _unmount_now(mount: MountPoint, *, lazy: bool) -> str:
    """Unmount; the reason where it is refused. Waits for who only looks at it, as df(1) and another mount's copy do."""
    begun = time.monotonic()
    while reason := _unmount_once(mount, lazy=lazy):
        if reason != _BUSY:
            return reason
        waited = time.monotonic() - begun
        users = mounts.busy_with(mount)
        if waited > (PATIENCE_BUSY if users else PATIENCE):
            return _busy(users)
        time.sleep(LOOK)
    return ""


def _unmount_once(mount: MountPoint, *, lazy: bool) -> str:
    """Unmount; the reason where it is refused: `_BUSY` where somebody uses it."""
    if os.geteuid() == 0:
        try:
            mounts.umount(mount, lazy=lazy)
        except OSError as error:
            return error.strerror or str(error)
        return ""
    command = ["fusermount3", "-u", *["-z"] * lazy, mount.path]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is missing: install the package fuse3") from None
    if not result.returncode:
        return ""
    if "busy" in result.stderr:
        return _BUSY
    why = " ".join(result.stderr.split())
    if mount.owner("user_id") != os.geteuid():
        who = mounts.user_name(mount.owner("user_id"))
        return f"{who} has mounted it; unmount as {who} ({why})"
    return why


def _busy(users: list[str]) -> str:
    """Who uses it, as far as that can be seen, and what to do about it."""
    if users:
        who = f"is busy: {mounts.listed(users)}; close that first"
    elif os.geteuid():
        who = "is busy, by processes that only root can see: ask as root"
    else:
        who = "is busy, but not by a process that can be seen from here: look outside of this container"
    return f"{who}, or take it away from here with --lazy: its images stay open until nobody uses them"


class _Daemon:
    """The process that serves a mount."""

    def __init__(self, mount: MountPoint) -> None:
        """Ask the mount. One that does not answer is taken for one whose process cannot be seen."""
        self._mount = mount
        self._connection = mounts.connection(mount.device)
        self._process: int | None = None
        self._lock: list[object] | None = None
        error, answer = mounts.ask(mount)
        self._dead = error in mounts.DEAD
        identity = mounts.identity(answer)
        process = identity.get("pid")
        if isinstance(process, int) and identity.get("pid_namespace") == _own_namespace():
            try:
                self._process = os.pidfd_open(process)
            except ProcessLookupError:
                self._dead = True
            except (OSError, OverflowError):
                pass
        lock = identity.get("locks")
        if isinstance(lock, list):
            self._lock = lock

    def close(self) -> None:
        if self._process is not None:
            os.close(self._process)

    def wait(self) -> int:
        """Wait until every image is closed, now that the mount point is free. The exit code."""
        path = self._mount.path
        begun = time.monotonic()
        said = False
        while not self._has_ended():
            waited = time.monotonic() - begun
            if waited > PATIENCE and self._is_kept():
                found = mounts.users(self._mount)
                by = (
                    f" by {mounts.listed(found)}"
                    if found
                    else ", by a mount namespace or a process not to be seen here"
                )
                complain(f"{path}: unmounted here, but still in use{by}: its images stay open until that ends")
                return STILL_OPEN
            if waited > PATIENCE_CLOSING and not self._is_seen():
                complain(f"{path}: unmounted; whether its images are closed cannot be seen from here")
                return STILL_OPEN
            if waited > PATIENCE_CLOSING and not said:
                complain(f"{path}: unmounted; its images are being closed")
                said = True
        return 0

    def _has_ended(self) -> bool:
        """Whether every image is closed; looks for a moment."""
        if self._dead and not mounts.is_locked(self._mount.path):
            return True
        if self._process is not None:
            if not select.select([self._process], [], [], LOOK)[0]:
                return False
            if self._lock is None or mounts.is_unlocked(self._mount.path, self._lock) is not False:
                return True
            # Else it was killed, and another one closes the images (`-o keep`).
        elif self._lock is not None and mounts.is_unlocked(self._mount.path, self._lock):
            return True
        time.sleep(LOOK)
        return False

    def _is_seen(self) -> bool:
        """Whether its end would be noticed."""
        if self._process is not None:
            return True
        return self._lock is not None and mounts.is_unlocked(self._mount.path, self._lock) is not None

    def _is_kept(self) -> bool:
        """Whether the kernel still has the mount, somewhere."""
        if self._connection is not None:
            return mounts.connection(self._mount.device) == self._connection
        return bool(mounts.users(self._mount))


def _own_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
