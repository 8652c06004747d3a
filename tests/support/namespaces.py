"""A program in a mount namespace of its own, which keeps no mount of a test that runs at the same time.

A new namespace is a copy of all mounts of that moment, and a copy keeps a mount in use after it is unmounted elsewhere.
As a script: MOUNTPOINT… -- COMMAND…
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

from fvdfs.store.mountinfo import MountPoint, mount_points

_CLONE_NEWNS = 0x20000  # of linux/sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000  # of linux/mount.h
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # of linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


def in_mount_namespace(*command: str | Path, keep: tuple[Path, ...] = ()) -> list[str]:
    """The command line that runs this one in a namespace where, of all that tests mount, only `keep` stays mounted."""
    return [sys.executable, "-P", __file__, *map(str, keep), "--", *map(str, command)]


def overlaid(folder: Path, *places: str) -> str:
    """Commands of a shell, in a mount namespace, after which what is written below `places` is in memory."""
    over = folder / "over"
    over.mkdir()
    lines = ["set -e", f"mount -t tmpfs none {over}"]
    for number, place in enumerate(places):
        upper, work = over / f"upper{number}", over / f"work{number}"
        lines.append(f"mkdir {upper} {work}")
        lines.append(f"mount -t overlay none -o lowerdir={place},upperdir={upper},workdir={work} {place}")
    return "\n".join([*lines, ""])


def _is_of_a_test(mount: MountPoint) -> bool:
    return mount.is_ours or mount.path.startswith(f"{tempfile.gettempdir()}/")


def _must(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _enter(keep: list[str]) -> None:
    _must(_libc.unshare(_CLONE_NEWNS))
    _must(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    for mount in reversed(mount_points()):
        if _is_of_a_test(mount) and mount.path not in keep:
            _must(_libc.umount2(os.fsencode(mount.path), _MNT_DETACH | _UMOUNT_NOFOLLOW))


if __name__ == "__main__":
    split = sys.argv.index("--")
    _enter(sys.argv[1:split])
    os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])
