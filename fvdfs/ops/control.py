"""What a user asks of an image through its extended attributes.

Its status; to start, pause or stop prefetching; to have room for a larger size.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from fvdfs.errors import MovedAway
from fvdfs.format.migration import Target
from fvdfs.image.image import Image
from fvdfs.ops.background import Prefetched
from fvdfs.ops.inodes import Entry, Outcome
from fvdfs.ops.moves import finish
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import ON
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.prefetcher import status as status_of_image
from fvdfs.store.host import identity_of

log = logging.getLogger(__name__)

_PAGE = 60_000  # bytes of JSON; an attribute holds 64 KiB
_REFUSED_SHOWN = 16384  # bytes of JSON; an attribute holds 64 KiB
_REASON_SHOWN = 300  # characters
_COMMAND_SHOWN = 20  # characters of what somebody wrote to an attribute


def status(entry: Entry) -> dict[str, Any]:
    """What a user wants to know of an image, ready for JSON."""
    entry.look()
    found: dict[str, Any] = {
        "name": os.fsdecode(entry.name),
        "image": os.fsdecode(entry.path),
        "open": entry.busy,
    }
    found |= {"snapshot": entry.snapshot, "snapshot_wait": entry.snapshot_wait, "snapshot_refused": entry.refused}
    found |= {"requests": entry.counters.status(), "open_failed": entry.open_failed} | moves(entry)
    if entry.image is None:
        state = "closing" if entry.busy else "closed"
        return found | entry.last_status | {"virtual_size": entry.size, "state": state}
    found["first"] = _fetched_first(entry)
    passthrough = entry.passthrough if isinstance(entry.passthrough, str) else ON
    return found | status_of_image(entry.image, entry.prefetcher) | {"passthrough": passthrough or "opening"}


def _fetched_first(entry: Entry) -> dict[str, Any] | None:
    """The profile by which an image is prefetched: how much it names, in bytes, and who has recorded it."""
    if entry.prefetcher is None or not entry.prefetcher.profile:
        return None
    origin = "source" if entry.record.incoming is not None else "profile"
    return {"from": origin, "bytes": sum(stop - start for start, stop in entry.prefetcher.profile)}


def page(entries: Sequence[Entry], first: int) -> bytes:
    """The status of these images, from the one of this number on, as many as an attribute holds, as JSON.

    `next` is the number of the first one that it has no room for; None: there are no more.
    """
    found: list[str] = []
    room = _PAGE
    for entry in entries[first:]:
        text = json.dumps(status(entry))
        room -= len(text) + 2
        if room < 0 and found:
            break
        found.append(text)
    more = first + len(found)
    return f'{{"images": [{", ".join(found)}], "next": {more if more < len(entries) else "null"}}}'.encode()


def refused(reasons: Mapping[bytes, str]) -> dict[str, Any]:
    """Images that do not appear, as part of the mount's status: some of them, and how many there are."""
    shown: list[dict[str, str]] = []
    room = _REFUSED_SHOWN
    for path, reason in reasons.items():
        shown.append({"name": os.fsdecode(os.path.basename(path)), "reason": reason[:_REASON_SHOWN]})
        room -= len(json.dumps(shown[-1]))
        if room < 0:
            shown.pop()
            break
    return {"refused": shown, "refused_count": len(reasons)}


def moves(entry: Entry) -> dict[str, Any]:
    """The part of the status about moves to and from other hosts."""
    record, refused = entry.record, entry.move_refused
    remark = entry.asked.remark if entry.asked is not None else record.remark
    if record.state == Target.ACTIVE.value and not entry.busy and entry.left_alone:
        remark += "; it is copied while a program has it open, or by fvdfs prefetch start"
    found = {"move": record.state, "move_reason": record.obstacle, "move_remark": remark, "move_refused": refused}
    if (out := record.outgoing) is not None:
        to = (out.name or out.target) if record.handed_over else ""
        found |= {"move_epoch": out.epoch, "moved_to": to, "move_target": out.target}
    return found


async def control_prefetch(openings: Openings, entry: Entry, command: str) -> None:
    """`start`, `pause` or `stop` prefetching an image. One that is not open is opened, until it is done.

    Raises OSError: EINVAL for another command, or one that makes no sense now; ImageError.
    """
    cache = openings.caches.of(identity_of(entry.status))
    if command == "start":
        entry.left_alone = False
        if cache is not None:
            _prefetch(openings, cache, cache.image)
        else:
            await _start(openings, entry)
        return
    if command not in ("pause", "stop"):
        raise OSError(errno.EINVAL, f"prefetch: start, pause or stop, not {command[:_COMMAND_SHOWN]!r}")
    async with entry.lock:
        prefetcher = (cache or entry).prefetcher
        if prefetcher is None or prefetcher.ended.is_set():
            raise OSError(errno.EINVAL, f"{os.fsdecode(entry.name)}: nothing is being prefetched")
        if command == "pause":
            prefetcher.pause()
        else:
            entry.left_alone = True
            await prefetcher.stop()


async def _start(openings: Openings, entry: Entry) -> None:
    await openings.open(entry.inode, write=True)
    background = openings.background
    keep_open = False
    try:
        async with entry.lock:
            assert entry.image is not None
            if entry.record.receiving:
                raise MovedAway(os.fsdecode(entry.path), entry.record.obstacle)
            if entry.merging:
                raise OSError(errno.EBUSY, f"{entry.image.name}: what it stands on is being merged into it")
            prefetcher = _prefetch(openings, entry, entry.image)
            if prefetcher is not None and not prefetcher.held and background.spawn is not None:
                prefetcher.held = keep_open = True
                background.spawn(functools.partial(_close_when_ended, openings, entry, prefetcher))
    finally:
        if not keep_open:
            await openings.close(entry)


def _prefetch(openings: Openings, owner: Prefetched, image: Image) -> Prefetcher | None:
    prefetcher = owner.prefetcher
    if prefetcher is None or prefetcher.ended.is_set():
        return openings.background.prefetch(owner, image)
    prefetcher.go_on()
    return prefetcher


async def _close_when_ended(openings: Openings, entry: Entry, prefetcher: Prefetcher) -> None:
    while True:
        await prefetcher.ended.wait()
        async with entry.lock:  # who replaces it holds that meanwhile (`hot.py`)
            next_one = entry.prefetcher
        if next_one is None or next_one.ended.is_set():
            break
        prefetcher = next_one
        prefetcher.held = True
    try:
        try:
            await finish(openings, entry)
        finally:
            await openings.close(entry)
    except OSError as error:
        log.error("%s: closing failed: %s", os.fsdecode(entry.path), error)


async def begin_room(openings: Openings, entry: Entry, size: str) -> None:
    """Begin to make room for a disk of so many bytes, if it is open. Raises OSError, EINVAL for what is no number."""
    if not size.isdecimal() or len(size) > _COMMAND_SHOWN:
        raise OSError(errno.EINVAL, f"room for a number of bytes, not {size[:_COMMAND_SHOWN]!r}")
    entry.room = None
    if entry.image is None or openings.background.spawn is None:
        return
    await openings.open(entry.inode, write=True)
    entry.room = Outcome()
    openings.background.spawn(functools.partial(_make_room, openings, entry, entry.image, int(size), entry.room))


async def _make_room(openings: Openings, entry: Entry, image: Image, size: int, outcome: Outcome) -> None:
    outcome.error = OSError(errno.EIO, os.strerror(errno.EIO))
    try:
        try:
            await image.make_room(size)
        finally:
            with trio.CancelScope(shield=True):
                await openings.close(entry)
        outcome.error = None
    except OSError as error:
        log.error("%s: %s", os.fsdecode(entry.path), error.strerror)
        outcome.error = error
    finally:
        outcome.ended.set()


async def wait_for_room(entry: Entry) -> None:
    """Wait for the end of what `begin_room` has begun last. Raises its OSError."""
    if (outcome := entry.room) is not None:
        await outcome.ended.wait()
        if outcome.error is not None:
            raise OSError(outcome.error.errno, outcome.error.strerror)
