"""Moves of the disks of a mount to other hosts, and from them: what programs that have a disk open notice of it.

What may follow on what, `format/migration.py` says; docs/migration.md has the whole table. A step is asked for through
an extended attribute (`xattrs.MOVE`):

    serve | keep EPOCH TARGET | end | freeze | handover EPOCH TARGET NAME | thaw | thaw lose-writes
    release [EPOCH TARGET KEY OTHER] | go-on EPOCH TARGET KEY OTHER
    activate | abandon | stand STAMP | own EPOCH TARGET STAMP

A freeze: what copies from the base ends; writers are kept out, and what was written is made stable; the image is
closed, clean; its record says so, and is stable; then whoever waited to write gets EROFS, and so do all who come later.
Programs keep the disk open, and read it. Where anything fails before the record is stable, the disk is written on.

A disk that is being received is read from its source, and nothing of it is kept: what lies there may change at any
moment. `activate`, or the first change that somebody makes, takes it over, and waits for it: the source is asked to
freeze the disk and to say so; its export of this move, which is there only then, becomes the base; the record says that
the disk is active, and is stable; the kernel's pages are dropped; the image becomes writable, and copies from now on,
first what was used last at the source (`hot.py`).
Where anything fails before the record is stable, it is received on, and the change fails with EIO. The source gives the
disk to this target alone, however often it is asked. What fails afterwards has the change fail, too, and is done by the
next one; so is what fails when a disk may be written again after a freeze. `abandon` ends that for good: once the
record says so, and is stable, the source is told, and goes on by itself.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from fvdfs.errors import FvdError, MovedAway, Unreachable, UsageError, reason_of
from fvdfs.format import migration
from fvdfs.format.header import SECTOR, round_up
from fvdfs.format.mailbox import Wish
from fvdfs.format.migration import Incoming, Record, Source, Target
from fvdfs.format.proof import Proof, Word, is_digest
from fvdfs.format.stamp import is_stamp
from fvdfs.image.chain import open_named, open_source
from fvdfs.image.following import change_source, stand_on_template
from fvdfs.image.image import Image
from fvdfs.image.locking import lock_for_writing, unlock_for_writing
from fvdfs.image.migration import new_number, read_record, settle_record, write_record
from fvdfs.image.policy import HostStore, Policy
from fvdfs.ops import templates
from fvdfs.ops.caches import Cache
from fvdfs.ops.hot import fetch_hot_first, hot_blocks
from fvdfs.ops.inodes import Asked, Entry
from fvdfs.ops.keeping import begin_writing
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.snapshots import begin_copies, stop_copies
from fvdfs.store.host import HostFile
from fvdfs.store.locations import Location, parse_location
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.source import ASKED_PATIENCE, ask, tell_of_end

log = logging.getLogger(__name__)

Event = Callable[[Record], Record]
_DIGESTS = 3  # after a word that a target proves
WRITE_PATIENCE = 30.0  # seconds that a first write waits for the source
_LONG = 1.0  # seconds in vain, after which the writes that have queued up meanwhile fail at once
_NEXT = 1.0  # seconds in which they come, one after the other
FOLLOW_INTERVAL = 1.0  # seconds between looks whether all is local


async def take_step(openings: Openings, entry: Entry, text: str) -> None:
    """Do what is asked for. Raises OSError, ImageError; `Entry.move_refused` tells why in words."""
    entry.move_refused = ""
    try:
        match text.split(" "):
            case ["activate"]:
                await _activate_closed(openings, entry)
                return
            case ["abandon"]:
                await _abandon(openings, entry)
                return
            case ["stand", stamp] if is_stamp(stamp):
                await templates.stand(openings, entry, stamp)
                return
            case ["own", epoch, target, stamp] if is_stamp(stamp):
                await templates.make_map(openings, entry, epoch, target, stamp)
                return
        event = _event(text)
        with trio.CancelScope(shield=True):
            async with _opened(openings, entry) as image:
                await _change(openings, entry, image, event)
                _pass_release_on(openings, entry, image)
    except (FvdError, OSError) as error:
        entry.move_refused = reason_of(error)
        if isinstance(error, UsageError):
            raise OSError(errno.EINVAL, f"{os.fsdecode(entry.name)}: {error}") from error
        raise


async def _activate_closed(openings: Openings, entry: Entry) -> None:
    await openings.open(entry.inode, write=True)
    try:
        if entry.record.incoming is None:
            migration.activate(entry.record)
        await activate(openings, entry, ASKED_PATIENCE)
    finally:
        await openings.close(entry)


async def _abandon(openings: Openings, entry: Entry) -> None:
    """A write that waits for the source is waited for: the kernel lets nobody else at the disk meanwhile."""
    async with entry.activating:
        with trio.CancelScope(shield=True):
            async with _opened(openings, entry) as image:
                await _change(openings, entry, image, migration.abandon)
        assert entry.record.incoming is not None
        source = _source(image, entry.record.incoming)
        await tell_of_end(source, openings.folder.policy.tls_creds, entry.record.incoming, ASKED_PATIENCE)
    log.info("%s: its move to this host is given up, and its source told", os.fsdecode(entry.path))


async def activate(openings: Openings, entry: Entry, patience: float = WRITE_PATIENCE) -> None:
    """Take an open disk over from its source, unless that was done. Raises OSError."""
    async with entry.activating:
        image, into = entry.image, entry.record.incoming
        if not entry.record.receiving:
            await _begin_late(openings, entry)
            return
        assert image is not None
        assert into is not None
        if entry.record.abandoned:
            raise OSError(errno.EROFS, entry.record.obstacle)
        began, source = trio.current_time(), _source(image, into)
        if patience > ASKED_PATIENCE and began < entry.vain_until:
            entry.vain_until = began + _NEXT
            raise OSError(errno.EIO, entry.move_refused)
        entry.asked = Asked(time.time())
        try:
            if openings.folder.policy.on_loss.waits and patience > ASKED_PATIENCE:
                await _ask_or_wait(image, openings.folder.policy.tls_creds, into, patience, entry.asked.note)
            else:
                creds = openings.folder.policy.tls_creds
                await ask(source, creds, into, Wish.HAND_OVER, patience, failed=entry.asked.note)
            with trio.CancelScope(shield=True):
                async with entry.lock:
                    await _take_over(openings, entry, image)
        except (FvdError, OSError) as error:
            entry.move_refused = reason_of(error)
            log.error("%s: cannot be taken over from its source: %s", image.name, entry.move_refused)
            waits = openings.folder.policy.on_loss.waits  # then it was killed, and others wait on
            if patience > ASKED_PATIENCE and not waits and trio.current_time() - began > _LONG:
                entry.vain_until = trio.current_time() + _NEXT
            raise OSError(errno.EIO, entry.move_refused) from error
        finally:
            entry.asked = None
        entry.move_refused = ""
        log.info("%s: taken over from its source in %.3f s", image.name, trio.current_time() - began)


async def _ask_or_wait(
    image: Image, tls_creds: str, into: Incoming, patience: float, failed: Callable[[FvdError | OSError], None]
) -> None:
    """Ask for the disk. While the source is away, wait as a read does: the status tells, and who waits can be killed.

    Raises as `ask`, OSError.
    """
    source = parse_location(image.header.base_img)
    while True:
        try:
            await ask(source, tls_creds, into, Wish.HAND_OVER, patience, ASKED_PATIENCE, failed)
            return
        except (Unreachable, OSError):
            asked = time.time()
            await image.read(0, SECTOR)
            outage = image.outage
            if outage is None or outage.until is None or outage.until < asked:
                raise  # it was there all the time, and does not answer


async def _take_over(openings: Openings, entry: Entry, image: Image) -> None:
    """The source has said that it is frozen. Raises ImageError, OSError."""
    assert isinstance(image.meta, HostFile)
    after = migration.activate(entry.record)
    await lock_for_writing(image)
    given = await _open_given(openings, image, after)
    try:
        await trio.to_thread.run_sync(write_record, image.meta, after)
    except BaseException:
        await given.aclose()
        raise
    entry.record = after
    entry.to_stand = entry.to_begin = entry.to_forget = True
    await _begin(openings, entry, image, given)
    follow(openings, entry, image)


async def _open_given(openings: Openings, image: Image, record: Record) -> HostStore:
    """The disk as the source gives it for this move alone. Raises ImageError, OSError."""
    policy, header = openings.folder.policy, image.header

    def open_now() -> HostStore:
        if record.keeps_base:
            return open_source(image.name, record.source_name, policy)
        name = record.base_name(header.base_img)
        return open_named(image.name, "base_img", name, header.base_img_fmt, policy, writable=False)

    base = await trio.to_thread.run_sync(open_now)
    try:
        if isinstance(base, QemuStore):
            await base.start()
            if base.is_away:  # that it is there is the proof
                raise Unreachable(base.name, "its server is away")
            if (found := round_up(await base.size(), SECTOR)) != image.size:
                raise UsageError(
                    f"its source has {found} bytes by now, and not {image.size}: fvdfs abandon this one, then receive "
                    "the disk anew"
                )
    except BaseException:
        await base.aclose()
        raise
    return base


async def _stand_on(image: Image, given: HostStore, record: Record) -> None:
    """Have it be what the image reads from. Raises OSError, and closes it, where it is not."""

    def stands_on() -> object:
        return image.followed.data if image.followed is not None else image.base

    former = stands_on()
    try:
        if record.keeps_base:
            assert isinstance(given, QemuStore)
            await change_source(image, given)
        else:
            await image.change_base(given, (image.header.base_img_fmt, str(given.identity), ""))
    except OSError as error:
        if stands_on() is former:
            await given.aclose()
            raise
        log.warning("%s: what it has stood on could not be closed: %s", image.name, reason_of(error))


async def _begin(openings: Openings, entry: Entry, image: Image, given: HostStore | None = None) -> None:
    """Have programs that have it open for writing write it. Raises ImageError, OSError; then it can be done again.

    `given`: what it is to stand on from now on, where that is open; it is taken over.
    """
    if entry.to_stand:
        await _stand_on(image, given or await _open_given(openings, image, entry.record), entry.record)
    entry.to_stand = False
    if entry.to_forget and openings.forget_pages is not None:
        await openings.forget_pages(entry.inode)
    entry.to_forget = False
    if not image.writable:
        await begin_writing(entry, image, openings.folder.policy, openings.background)
    elif entry.prefetcher is None:
        await openings.background.begin(entry, image)
    entry.to_begin = False


async def _begin_late(openings: Openings, entry: Entry) -> None:
    """As `_begin`, where that has failed before. Raises OSError."""
    if not entry.to_begin:
        return
    with trio.CancelScope(shield=True):
        async with entry.lock:
            image = entry.image
            if image is None or not entry.to_begin or entry.record.obstacle:
                return
            try:
                await _begin(openings, entry, image)
            except (FvdError, OSError) as error:
                entry.move_refused = reason_of(error)
                log.error("%s: cannot be written yet: %s", image.name, entry.move_refused)
                raise OSError(errno.EIO, entry.move_refused) from error
            entry.move_refused = ""
            log.info("%s: can be written", image.name)
            follow(openings, entry, image)


def follow(openings: Openings, entry: Entry, image: Image) -> None:
    """An image was opened, or taken over: once all of it is here, its source is told."""
    into, spawn = entry.record.incoming, openings.background.spawn
    if into is not None and into.state is Target.ACTIVE and spawn is not None:
        spawn(functools.partial(_follow, openings, entry, image, into))


def _source(image: Image, into: Incoming) -> Location:
    return parse_location(into.url(image.header.base_img))


async def _follow(openings: Openings, entry: Entry, image: Image, into: Incoming) -> None:
    location = _source(image, into)
    if image.followed is not None:
        await templates.learn_map(openings, entry, image, into, location)
        await _begin_copying(openings, entry, image)
    await fetch_hot_first(openings, entry, image, location)
    while image.bitmap is not None and not _has_all_own(image):
        with trio.move_on_after(FOLLOW_INTERVAL):
            await entry.unloaded.wait()
            return
    await _complete(openings, entry, image, into)


async def finish(openings: Openings, entry: Entry) -> None:
    """A disk that is about to be closed may be local since a moment ago: its source is told, as `follow` would."""
    image, into = entry.image, entry.record.incoming
    if image is None or into is None or into.state is not Target.ACTIVE:
        return
    if image.bitmap is None or _has_all_own(image):
        await _complete(openings, entry, image, into)


async def _complete(openings: Openings, entry: Entry, image: Image, into: Incoming) -> None:
    location = _source(image, into)
    assert isinstance(image.meta, HostFile)
    async with entry.lock:
        if entry.image is not image or not image.writable or entry.record.incoming != into:
            return  # the next opening sees to it, or it is a snapshot's by now
        if image.followed is not None:
            await image.let_source_go()
        entry.record = migration.complete(entry.record)
        await trio.to_thread.run_sync(write_record, image.meta, entry.record)
        await stand_on_template(image)
    await _tell_source(openings, image.name, location, into, "all is local")


def follow_snapshot(openings: Openings, cache: Cache) -> None:
    """As `follow`, of a base image: a disk that follows has become a snapshot, and goes on to copy."""
    if openings.background.spawn is not None:
        openings.background.spawn(functools.partial(_follow_snapshot, openings, cache))


async def _follow_snapshot(openings: Openings, cache: Cache) -> None:
    image = cache.image
    assert isinstance(image.meta, HostFile)
    record = await trio.to_thread.run_sync(read_record, image.meta)
    into = record.incoming
    if into is None or into.state is not Target.ACTIVE:
        return
    cache.move, location = into.state.value, _source(image, into)
    while image.bitmap is not None:
        with trio.move_on_after(FOLLOW_INTERVAL):
            await cache.ended.wait()
            return
    async with cache.lock:
        if cache.ended.is_set():
            return
        await trio.to_thread.run_sync(write_record, image.meta, migration.complete(record))
    cache.move = Target.LOCAL.value
    await _tell_source(openings, image.name, location, into, "all is local")


def _pass_release_on(openings: Openings, entry: Entry, image: Image) -> None:
    """The disk went on to a third host before all of it was here: once that has all, it needs no source."""
    into, out, spawn = entry.record.incoming, entry.record.outgoing, openings.background.spawn
    if into is None or into.state is not Target.ACTIVE or out is None or out.state is not Source.RELEASED:
        return
    if spawn is not None:
        location = _source(image, into)
        why = f"{out.name or out.target} has all of it"
        spawn(functools.partial(_tell_source, openings, image.name, location, into, why))


async def _tell_source(openings: Openings, name: str, location: Location, into: Incoming, why: str) -> None:
    try:
        await ask(location, openings.folder.policy.tls_creds, into, Wish.RELEASE, ASKED_PATIENCE)
    except (FvdError, OSError) as error:
        log.warning("%s: %s; its source could not be told, run fvdfs release there: %s", name, why, error)
    else:
        log.info("%s: %s, and its source released", name, why)


def _has_all_own(image: Image) -> bool:
    """Whether only the template's is missing."""
    if image.followed is None or image.followed.bitmap is None:
        return False
    start, stop = image.missing(0, 1)
    return start == stop


async def _begin_copying(openings: Openings, entry: Entry, image: Image) -> None:
    async with entry.lock:
        prefetcher = entry.prefetcher
        if entry.image is image and image.writable and (prefetcher is None or prefetcher.ended.is_set()):
            openings.background.prefetch(entry, image)


def _event(text: str) -> Event:
    """Raises UsageError for what makes no sense."""
    match text.split(" ", 3):
        case ["serve"]:
            return functools.partial(migration.serve, new_epoch=new_number())
        case ["end"]:
            return migration.end
        case ["freeze"]:
            return functools.partial(migration.freeze, new_epoch=new_number())
        case ["keep", epoch, target] if migration.is_number(epoch) and is_digest(target):
            return functools.partial(migration.keep_for, epoch=epoch, target=target)
        case ["handover", epoch, target, name] if migration.is_number(epoch) and is_digest(target):
            return functools.partial(migration.hand_over, epoch=epoch, target=target, name=name)
        case ["thaw"]:
            return functools.partial(migration.thaw, lose_writes=False)
        case ["thaw", "lose-writes"]:
            return functools.partial(migration.thaw, lose_writes=True)
        case ["release"]:
            return migration.release
    match text.split(" "):
        case [Word.RELEASE.value | Word.GO_ON.value as word, epoch, *digests] if migration.is_number(epoch):
            if len(digests) == _DIGESTS and all(map(is_digest, digests)):
                target, key, other = digests
                told = migration.told_of_all if word == Word.RELEASE.value else migration.told_of_end
                return functools.partial(told, epoch=epoch, target=target, proof=Proof(key, other))
    raise UsageError("is no step of a move")


@asynccontextmanager
async def _opened(openings: Openings, entry: Entry) -> AsyncIterator[Image]:
    """The image, its entry locked; open for writing, so that it is recovered after a crash, where it may be written."""
    try:
        await openings.open(entry.inode, write=True)
    except MovedAway:
        await openings.open(entry.inode, write=False)
    try:
        async with entry.lock:
            assert entry.image is not None
            yield entry.image
    finally:
        await openings.close(entry)


async def _change(openings: Openings, entry: Entry, image: Image, event: Event) -> None:
    assert isinstance(image.meta, HostFile)
    before = await trio.to_thread.run_sync(read_record, image.meta)
    entry.record = before
    after = event(before)
    if after == before:
        await trio.to_thread.run_sync(settle_record, image.meta)
        return
    if entry.merging:
        raise UsageError(
            f"{image.name}: what it stands on is being merged into it; wait for that, or end it by Ctrl-C there"
        )
    await _refuse_passthrough(openings, entry)
    policy = openings.folder.policy
    if image.writable and after.obstacle:
        await _freeze(openings, entry, image)
    elif not image.writable:
        await lock_for_writing(image)
    try:
        await trio.to_thread.run_sync(write_record, image.meta, after)
        if after.obstacle and not before.obstacle:
            entry.hot = hot_blocks(entry)
        entry.record = after
        log.info("%s: move: %s", image.name, after.obstacle or after.state or "over")
    finally:
        await entry.mtime.restore()
        if not image.writable:
            await unlock_for_writing(image)
        if not image.writable and not entry.record.obstacle and entry.for_writing:
            await _go_on(openings, policy, entry, image)


async def _refuse_passthrough(openings: Openings, entry: Entry) -> None:
    """Raise UsageError where the kernel writes the disk by itself: nobody could keep it from that."""
    if isinstance(entry.passthrough, Passthrough):
        if entry.opens > 1:
            raise UsageError(
                f"{os.fsdecode(entry.path)}: the kernel reads and writes its data by itself; close the disk first, "
                "or mount its folder with -o writeback=on"
            )
        await openings.end_passthrough(entry)


async def _freeze(openings: Openings, entry: Entry, image: Image) -> None:
    """Have nobody write the image, and close it as far as others can see. Raises UsageError, OSError."""
    if image.base_writer is not None:
        raise UsageError(f"{image.name}: is a cache that writes to its base (--update-base), which cannot move")
    if image.damage:
        raise OSError(errno.EIO, f"{image.name}: {image.damage}")
    try:
        await stop_copies(entry, image)
        await image.freeze()
    except BaseException:
        await _go_on(openings, openings.folder.policy, entry, image)
        raise


async def _go_on(openings: Openings, policy: Policy, entry: Entry, image: Image) -> None:
    """Programs that have it open for writing may write again. After a failure the next change tries again."""
    try:
        if image.writable:
            await begin_copies(openings, entry, image)
            return
        await begin_writing(entry, image, policy, openings.background)
    except (FvdError, OSError) as error:
        entry.to_begin = True
        log.error("%s: cannot be written yet: %s", image.name, error)
