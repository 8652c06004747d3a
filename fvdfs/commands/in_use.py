"""What a file is to others before a command replaces it: open somewhere, under a device. Blocks.

Whoever has a replaced file open goes on in the old one, and what is written there is lost. Those with locks are kept
out by the locks (`HostFile.lock`); the kernel lists the others, as far as this user may see them: loop devices, and
processes that have the file open, by whatever name.
"""

from __future__ import annotations

import contextlib
import os

from fvdfs import mounts
from fvdfs.errors import ImageBusy
from fvdfs.image.tree import identity_at
from fvdfs.store.devices import loop_devices, stands_on
from fvdfs.store.host import DEVICE, Identity


def with_all_below(identity: Identity) -> list[Identity]:
    """The file or device, and all that a device stands on: its disk, its parts, the file behind a loop device."""
    found = [identity]
    for kind, device in found:
        if kind == DEVICE:
            below, file = stands_on(device)
            found += [(DEVICE, other) for other in below]
            if file and (behind := identity_at(file)):
                found.append(behind)
    return found


def refuse_open(path: str, identity: Identity) -> None:
    """Raise ImageBusy where somebody else has this file open, or it is under a loop device.

    Of devices only the latter is looked at: programs that look at all devices open them for a moment at any time.
    """
    for device, file in loop_devices():
        if identity_at(file) == identity:
            raise ImageBusy(path, f"{device} is over it; detach that first: losetup -d {device}")
    if identity[0] == DEVICE:
        return
    for process in mounts.processes():
        if process != str(os.getpid()) and _has_open(process, identity):
            raise ImageBusy(path, f"process {process} ({mounts.command(process)}) has it open; close it there first")


def _has_open(process: str, identity: Identity) -> bool:
    folder = f"/proc/{process}"
    try:
        names = os.listdir(f"{folder}/fd")
    except OSError:
        return False  # it has ended, or is not ours to look at
    for name in names:
        with contextlib.suppress(OSError), open(f"{folder}/fdinfo/{name}", "rb") as file:  # or just closed
            # Only a file of this number is asked for its device: others may be on a share that hangs.
            if b"ino:\t%d\n" % identity[1] in file.read() and identity_at(f"{folder}/fd/{name}") == identity:
                return True
    return False
