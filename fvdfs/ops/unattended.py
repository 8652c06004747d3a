"""Disks that follow their machine from another host, and that nobody has open here: they are copied all the same.

A disk is copied while it is open (`background.py`). So one that follows, and was closed by its machine, or was not
opened yet since the mount began, is opened here, as by a program that only reads it: whoever else wants it, in another
mount or by a command, gets it (`keeping.py`), and it is tried again later.
"""

from __future__ import annotations

import functools
import logging
import math
import os

import trio

from fvdfs.errors import FvdError, told
from fvdfs.ops.inodes import Entry
from fvdfs.ops.keeping import ASKED_INTERVAL
from fvdfs.ops.moves import finish
from fvdfs.ops.openings import Openings

log = logging.getLogger(__name__)

LOOK = 3.0  # seconds between looks for such disks
_LONGEST = 60.0  # seconds before one that cannot be opened or copied is tried again; `LOOK`, then twice as long


class _Attempts:
    """To copy one disk."""

    def __init__(self) -> None:
        self.next = 0.0
        """When it is tried again, by trio's clock."""
        self._pause = LOOK
        self._said = ""

    def failed(self, why: str = "") -> str:
        """It came to nothing; the reason, where it is another one than before."""
        self.next = trio.current_time() + self._pause
        self._pause = min(2 * self._pause, _LONGEST)
        self._said, before = why, self._said
        return why if why != before else ""


async def follow_unattended(openings: Openings) -> None:
    """Copy them, for as long as the mount runs."""
    attempts: dict[Entry, _Attempts] = {}
    inodes, spawn = openings.folder.inodes, openings.background.spawn
    while openings.folder.policy.writable and spawn is not None:
        left = [entry for entry in inodes.all() if _is_left(entry) and inodes.shows(entry)]
        attempts = {entry: attempts.get(entry) or _Attempts() for entry in left}
        for entry, tries in attempts.items():
            if trio.current_time() >= tries.next:
                tries.next = math.inf
                spawn(functools.partial(_copy, openings, entry, tries))
        await trio.sleep(LOOK)


def _is_left(entry: Entry) -> bool:
    return entry.follows and not (entry.record.obstacle or entry.busy or entry.left_alone)


async def _copy(openings: Openings, entry: Entry, tries: _Attempts) -> None:
    """Until all is local, or somebody else has it."""
    try:
        await openings.open(entry.inode, write=False)
        try:
            if not _is_ours(openings, entry):
                tries.failed()
            while _is_ours(openings, entry):
                with trio.move_on_after(ASKED_INTERVAL):
                    await entry.unloaded.wait()
            await finish(openings, entry)
        finally:
            await openings.close(entry)
    except (FvdError, OSError) as error:
        if why := tries.failed(told(error)):
            log.warning("%s: follows, and cannot be copied: %s", os.fsdecode(entry.path), why)


def _is_ours(openings: Openings, entry: Entry) -> bool:
    """Whether it is to be kept open: who opens it to write has it copied, too, and closes it for all."""
    image = entry.image
    is_wanted = entry.follows and openings.folder.inodes.shows(entry) and not entry.left_alone
    return is_wanted and image is not None and image.writable and not entry.for_writing
