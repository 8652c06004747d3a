"""`fvdfs upgrade`: have the version that runs this command go on with a mount that is kept. Blocks.

The version that asks is the one that goes on, with the program that runs it. So what it cannot do it refuses here,
before the present daemon hears of it: options that it does not know, modules that are not installed. What shows only
later has the former version go on (`keeper.py`).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from fvdfs import __version__, mounts
from fvdfs.daemon import complain, this_program
from fvdfs.errors import UsageError
from fvdfs.mountoptions import MOUNT_OPTIONS, parse_mount_options, without_those_of_mount8
from fvdfs.store.mountinfo import MountPoint
from fvdfs.xattrs import UPGRADE

FIXED = ("keep", "nokeep", "writeback", "sync", "allow_other", "ro", "rw")
"""Options that the kernel was told of, or goes by, when it was mounted."""
PATIENCE = 60.0  # seconds
LOOK = 0.02  # seconds between two looks


def run(mountpoint: str, options: Sequence[str], *, check: Callable[[list[str]], object]) -> int:
    """Have this version go on, once it answers, return 0; 1 where it cannot, and the former version goes on.

    `options`: the arguments of -o, beside those that it was mounted with, or with other values; none: the same.
    `check`: refuses the command line of a mount that is there, after the program's name. Raises UsageError.
    """
    path = os.path.abspath(mountpoint)
    mount = mounts.mount_at(path)
    if mount is None or not mount.is_ours:
        raise UsageError(f"{path}: fvdfs is not mounted there")
    mounts.refuse_dead(path)
    if not (identity := _identity(mount)):
        raise UsageError(f"{path}: does not answer; look into the log of the mount")
    if not (former := identity.get("command")):
        raise UsageError(
            f"{path}: is not kept, so no other process can go on; unmount it, and mount it with -o keep: "
            f"fvdfs umount {shlex.quote(path)}"
        )
    with contextlib.suppress(OSError):
        os.chdir(identity["directory"])  # where the next daemon begins: options may hold relative paths
    words = former[former.index("mount") :]
    if options:
        words = _with_options(words, options)
    check(words)
    _refuse_what_lacks_modules(path)
    command = [*this_program(), *words]
    try:
        os.setxattr(path, UPGRADE, "".join(f"{word}\0" for word in command).encode("utf-8", "surrogateescape"))
    except OSError as error:
        _refuse(path, error)
    return _wait(mount, identity, command)


def _identity(mount: MountPoint) -> dict[str, Any]:
    _, answer = mounts.ask(mount)
    return mounts.identity(answer)


def _refuse_what_lacks_modules(path: str) -> None:
    """Raises UsageError where what serves a mount cannot be imported."""
    for name in ("trio", "pyfuse3"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{path}: this version cannot serve it: {name} is not installed")


def _with_options(words: list[str], texts: Sequence[str]) -> list[str]:
    """The command line with more options, or other values. Raises UsageError for what cannot change."""
    end = words.index("--")
    at = [number for number in range(end) if words[number] == "-o"]
    given = [words[number + 1] for number in at]
    flags = [word for number, word in enumerate(words[:end]) if number not in at and number - 1 not in at]
    own, kernels = without_those_of_mount8(given)
    wanted, wanted_kernels = without_those_of_mount8(texts)
    before, after = parse_mount_options(own), parse_mount_options(wanted)
    for name in [*(name for name in after if name in FIXED), *wanted_kernels]:
        if name not in kernels and before.get(name) != after.get(name, ""):
            raise UsageError(f"-o {name}: cannot change while it is mounted; unmount it, and mount it so")
    more = {name for name in after if MOUNT_OPTIONS[name].separator}
    kept = [option for option in own if (name := option.partition("=")[0]) not in after or name in more]
    chosen = [word for option in (*kept, *wanted, *kernels) for word in ("-o", option)]
    return [*flags, *chosen, *words[end:]]


def _refuse(path: str, error: OSError) -> None:
    """Raises UsageError, or the error where it has another reason."""
    if error.errno == errno.EINTR:  # it was handed over before the answer came
        return
    reasons = {
        errno.EPERM: "only who has mounted it, or root, can do that",
        errno.EBUSY: "layers are being merged, or another upgrade is under way: try again when that is done",
        errno.EOPNOTSUPP: "its keeper has ended, or it is an older version: unmount it, and mount it anew",
    }
    if (reason := reasons.get(error.errno or 0)) is None:
        raise error
    raise UsageError(f"{path}: {reason}") from None


def _wait(mount: MountPoint, former: dict[str, Any], command: list[str]) -> int:
    """Wait until another daemon answers; the exit code."""
    deadline = time.monotonic() + PATIENCE
    while (found := _identity(mount)).get("takeovers", 0) <= former.get("takeovers", 0):
        if time.monotonic() > deadline or (former.get("in_place") and _has_ended(former["pid"])):
            complain(f"{mount.path}: does not answer; look into the log of the mount")
            return 1
        time.sleep(LOOK)
    if found.get("command") != command:
        complain(
            f"{mount.path}: this version could not go on, so the former one does ({found.get('version')}); "
            f"the log of the mount says why"
        )
        return 1
    print(f"{mount.path}: is served by fvdfs {__version__}, process {found.get('pid')}")
    return 0


def _has_ended(pid: int) -> bool:
    """Whether a process of which systemd is the parent is gone: it starts another one when this command has ended."""
    return not os.path.exists(f"/proc/{pid}")
