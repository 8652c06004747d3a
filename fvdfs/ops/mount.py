"""Serving a mount: from the mount system call to the last clean header.

While we serve, the mount point may come to lead elsewhere: it is unmounted lazily while files stay open, or something
else is mounted over it, or only a bind mount or another mount namespace keeps the mount. So what the kernel still holds
of a disk is asked for by inode number, and nothing is unmounted by a name that leads elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pyfuse3
import trio

from fvdfs import __version__, daemon, mounts
from fvdfs.errors import UsageError, printable
from fvdfs.image.image import Image
from fvdfs.image.policy import Policy
from fvdfs.logs import ReopenLog
from fvdfs.ops.attach import attach, detach
from fvdfs.ops.background import Background
from fvdfs.ops.complaints import LINES
from fvdfs.ops.device import Device
from fvdfs.ops.filesystem import Filesystem, Sync
from fvdfs.ops.folder import Folder
from fvdfs.ops.hot import let_cool
from fvdfs.ops.inodes import Entry
from fvdfs.ops.kept import Kept, adopt, hand_over_when_asked
from fvdfs.ops.naming import Permitted
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthroughs
from fvdfs.ops.unattended import follow_unattended
from fvdfs.ops.writeback import Writeback, obstacle
from fvdfs.prefetch.prefetcher import Activity
from fvdfs.prefetch.pressure import DiskPressure
from fvdfs.prefetch.scheduler import DEFAULT_JOBS, Scheduler
from fvdfs.store.mountinfo import MountPoint, mount_points
from fvdfs.store.paths import PATIENCE, LeadsBack, NoAnswer, in_time, real_path, within
from fvdfs.store.uring import use_ring

log = logging.getLogger(__name__)

DRAIN_PATIENCE = 20.0  # seconds without a write to an image that the kernel still holds data of
DRAINS = 16  # images that are drained side by side
MAX_REQUESTS = 1 << 20  # tasks, and threads: no limit, since each image has its own
GRACE = 2.0  # seconds in which everything normally ends
END_PATIENCE = 10.0
"""Seconds without progress after which the process ends although images are not closed, where only bases on shares are
waited for: what was written is safe."""
SAVE_PATIENCE = 120.0
"""The same while there is data to be saved, or a disk to be waited for."""
_COPYING = (Activity.PROFILE, Activity.RUNNING)
STATUS_INTERVAL, STATUS_PAUSE = 5.0, 1.0
"""Seconds between two lines for the service manager while something is copied, and at least."""
GC_THRESHOLDS = (20_000, 50, 100)  # a request leaves little to collect; the default collects every 700 objects


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the user chose for a mount."""

    folder: str
    mountpoint: str
    policy: Policy
    allow_other: bool = False
    kernel_options: tuple[str, ...] = ()
    """Options of mount(8) that the kernel sees to, such as noexec."""
    writeback: Writeback = Writeback.AUTO
    io_uring: bool = True
    shrink: bool = False
    sync: Sync = Sync.FLUSH
    debug: bool = False
    prefetch_jobs: int = DEFAULT_JOBS
    prefetch_max: int = 0
    """Bytes a second, of all images; 0: no cap."""
    metrics: str = ""
    """Where to answer Prometheus; empty: nowhere."""
    record_profiles: bool = False
    permitted: Permitted = field(default_factory=Permitted)
    inherited: daemon.Inherited | None = None
    """What a former daemon of the mount has left."""
    next_daemon: tuple[str, ...] = ()
    """The command that starts the next one, if this one ends before the mount; empty: nobody does."""
    directory: str = "/"
    """Where that command is run."""
    log_file: str = ""


def serve(options: MountOptions, ready: Callable[[], None], reopen_log: ReopenLog) -> None:
    """Mount and serve until the mount is gone, or a signal to stop comes.

    `ready` is called once requests are answered. Raises UsageError where it cannot be mounted.
    """
    kept = Kept(options.inherited, options.next_daemon, options.directory, options.log_file)
    state = kept.remembered.state
    if kept.taken_over:
        log.info("%s: is taken over (%d): %s", options.mountpoint, state.takeovers, kept.how)
        point = state.point
    else:
        point = os.path.realpath(options.mountpoint)
        _look_before_mounting(options, point)
    if kept.is_wanted:
        options = dataclasses.replace(options, policy=dataclasses.replace(options.policy, unsettled=kept.remembered))
    scheduler = Scheduler(
        jobs=options.prefetch_jobs, max_rate=options.prefetch_max, pressure=DiskPressure(options.folder)
    )
    background = Background(scheduler, record_profiles=options.record_profiles)
    folder = Folder(options.folder, options.policy)
    folder.inodes.remembered = kept.remembered
    if kept.taken_over:
        not_passed = state.obstacle
    else:
        not_passed = obstacle(folder, options.writeback, always_sync=options.sync is Sync.ALWAYS)
    passthroughs = Passthroughs(not_passed)
    passthroughs.keeps = kept
    openings = Openings(folder, background, passthroughs)
    writeback = options.writeback is not Writeback.OFF
    filesystem = Filesystem(
        openings, writeback=writeback, shrink=options.shrink, sync=options.sync, permitted=options.permitted
    )
    with contextlib.ExitStack() as stack:
        if claim := kept.claim() if kept.taken_over else mounts.claim(options.mountpoint):
            stack.callback(claim.release)
        filesystem.mountpoint = os.fsencode(point)
        filesystem.daemon = json.dumps(_identity(claim, options, state.takeovers)).encode()
        if kept.is_wanted:
            filesystem.name_successor = kept.name_successor
        daemon.note_signals()
        answer_scrapes = stack.enter_context(_metrics(options.metrics, filesystem))
        if kept.taken_over:
            kernel, mount = kept.kernel, kept.remembered.mount
        else:
            kernel, mount = _attach(options, point)
            kept.begin(kernel, claim)
            kept.remembered.set("mount", {} if mount is None else dataclasses.asdict(mount))
            kept.remembered.set("point", point)
            kept.remembered.set("obstacle", not_passed)

        def unmount(error: type[BaseException] | None, _value: object, _traceback: object) -> None:
            if error is None or not kept.is_held:
                _unmount(point, mount)
                kept.end()

        stack.push(unmount)
        device = Device(
            filesystem,
            kernel,
            debug=options.debug,
            passthrough=passthroughs.wanted,
            settled=kept.remembered.init if kept.taken_over else None,
            adopt=functools.partial(adopt, filesystem, kept.remembered),
            oldest=state.oldest,
        )
        passthroughs.kernel = device
        stack.callback(device.close)
        if kept.taken_over:
            kept.lend()
        if mount is not None and kept.taken_over:
            options.policy.walker.own_device = mount.device
        else:
            _forbid_ways_back(options, mount)
        pyfuse3.init(filesystem, device.libfuses_end, {"debug"} if options.debug else set())
        stack.callback(pyfuse3.close)
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

        def give_up() -> None:
            device.refuse_rest()
            stack.close()

        with filesystem.complaints.filtering():
            trio.run(_serve, options, filesystem, device, mount, ready, reopen_log, give_up, answer_scrapes, kept)


def _attach(options: MountOptions, point: str) -> tuple[int, MountPoint | None]:
    """Mount; the kernel's descriptor, and the line of mountinfo."""
    words = ["allow_other"] * options.allow_other + ["ro"] * (not options.policy.writable)
    kernel = attach(options.mountpoint, options.folder, [*words, *options.kernel_options])
    # Not by a look at the mount point: nothing is answered yet.
    return kernel, next((mount for mount in reversed(mount_points()) if mount.path == point), None)


def _identity(claim: mounts.Claim | None, options: MountOptions, takeovers: int) -> dict[str, object]:
    """What `fvdfs umount` has to know to see the end of this process, and `fvdfs upgrade` to have another one go on."""
    return {
        "version": __version__,
        "command": list(options.next_daemon),
        "directory": options.directory,
        "in_place": daemon.stores_descriptors(),
        "takeovers": takeovers,
        "pid": os.getpid(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "locks": claim.identity() if claim is not None and claim.locked else None,
    }


def _is_still(mount: MountPoint | None) -> bool:
    """Whether the mount point still leads to this mount."""
    if mount is None:
        return True
    there = [other.number for other in mount_points() if other.path == mount.path]
    return there[-1:] == [mount.number]


def _unmount(point: str, mount: MountPoint | None) -> None:
    """Unmount, unless the mount is gone, or something else has its place."""
    if _is_still(mount):
        detach(point)


@contextlib.contextmanager
def _metrics(address: str, filesystem: Filesystem) -> Iterator[Callable[[], Awaitable[None]]]:
    """What answers Prometheus while it is mounted. Raises UsageError where it cannot listen there."""
    if not address:
        yield trio.lowlevel.checkpoint
        return
    try:
        from fvdfs.ops.metrics import listening, serve
    except ModuleNotFoundError as error:
        raise UsageError(f"-o metrics: {error.name} is not installed: pip install 'fvdfs[metrics]'") from None
    with listening(address) as server:
        yield functools.partial(serve, server, filesystem)


def _look_before_mounting(options: MountOptions, point: str) -> None:
    """Raise UsageError where the mount would hide what it needs."""
    policy = options.policy
    what = {"the folder of images": options.folder}
    what |= {f"base_path={root}": root for root in policy.roots if root != options.folder}
    for name, path in (
        ("secret", policy.secret_file),
        ("tls_creds", policy.tls_creds),
        ("credentials", policy.credentials),
        ("grow_command", policy.grow_command),
        ("metrics", options.metrics.removeprefix("unix:")),
    ):
        if os.path.isabs(path):
            what[name] = real_path(path)
    for name, path in what.items():
        if within(path, point):
            raise UsageError(f"{options.mountpoint}: {name} would be hidden by the mount; choose another MOUNTPOINT")


def _forbid_ways_back(options: MountOptions, mount: MountPoint | None) -> None:
    """Let no path be followed into the mount that was just made, or what stands on it. Raises UsageError."""
    policy = options.policy
    if mount is not None:
        policy.walker.own_device = mount.device
    for path in (options.folder, policy.secret_file, policy.tls_creds, policy.credentials, policy.grow_command):
        if os.path.isabs(path) and (reason := in_time(functools.partial(_way_back, policy, path), "")):
            raise UsageError(f"{path}: {reason}")


def _way_back(policy: Policy, path: str) -> str:
    """Why the path must not be followed; empty where it may be, or where it cannot: whoever needs it will say so."""
    try:
        policy.walker.check(path)
    except LeadsBack as error:
        return error.reason
    except (OSError, NoAnswer):
        pass
    return ""


async def _serve(
    options: MountOptions,
    filesystem: Filesystem,
    device: Device,
    mount: MountPoint | None,
    ready: Callable[[], None],
    reopen_log: ReopenLog,
    give_up: Callable[[], None],
    answer_scrapes: Callable[[], Awaitable[None]],
    kept: Kept,
) -> None:
    filesystem.openings.forget_pages = device.forget_pages
    # The ring outlives all who may wait for what is under way in it: that cannot be cancelled.
    trio.to_thread.current_default_thread_limiter().total_tokens = MAX_REQUESTS  # each image has limits of its own
    async with trio.open_nursery() as last, use_ring() if options.io_uring else contextlib.nullcontext():
        last.start_soon(_end_in_time, filesystem, device, give_up)
        try:
            async with filesystem.openings.background.running() as nursery:
                nursery.start_soon(_obey_signals, options.mountpoint, filesystem, device, mount, reopen_log, kept)
                nursery.start_soon(filesystem.commits.run)
                nursery.start_soon(let_cool, filesystem.folder.inodes)
                nursery.start_soon(follow_unattended, filesystem.openings)
                nursery.start_soon(filesystem.complaints.sum_up)
                nursery.start_soon(answer_scrapes)
                nursery.start_soon(_announce, options.mountpoint, filesystem, device, ready)
                nursery.start_soon(_keep, kept, filesystem, device)
                if kept.is_wanted:
                    nursery.start_soon(device.tell_oldest)
                # One task each: requests for an image whose base hangs must not be all that there may be.
                await device.serve(functools.partial(pyfuse3.main, max_tasks=MAX_REQUESTS))
        except BaseException:
            if kept.is_held:  # as it is: the next process knows how to go on from there
                log.critical("ended by an error; another process goes on", exc_info=True)
                logging.shutdown()
                os._exit(1)
            raise
        finally:
            with trio.CancelScope(shield=True):
                await filesystem.openings.close_all()
            log.info("%s: unmounted", options.mountpoint)
        last.cancel_scope.cancel()


async def _keep(kept: Kept, filesystem: Filesystem, device: Device) -> None:
    """Have somebody hold what the next daemon needs, from the moment on when there is a mount to be kept."""
    await device.connected.wait()
    async with trio.open_nursery() as nursery:
        if device.gives_up_lost:  # somebody has to ask for something
            nursery.start_soon(trio.to_thread.run_sync, _run_stat_program, kept.remembered.state.point)
        nursery.start_soon(kept.run, device.ending)
        nursery.start_soon(hand_over_when_asked, kept, filesystem, device)
        await device.ending.wait()
        nursery.cancel_scope.cancel()


async def _end_in_time(filesystem: Filesystem, device: Device, give_up: Callable[[], None]) -> None:
    """End the process even if something hangs that cannot be cancelled: a call to a share."""
    await device.ending.wait()
    filesystem.openings.let_go()
    daemon.notify(f"STOPPING=1\nSTATUS=closing images: {len(filesystem.openings.unclosed())}")
    await trio.sleep(GRACE)
    openings = filesystem.openings
    async with trio.open_nursery() as nursery:
        nursery.start_soon(openings.close_all)
        left, since = openings.unclosed(), trio.current_time()
        while True:
            await trio.sleep(GRACE)
            if openings.unclosed() != left:
                left, since = openings.unclosed(), trio.current_time()
                daemon.notify(f"STATUS=closing images: {len(left)}")
            hopeless = all(image.needs_share and not image.committer.dirty for _, image in left)
            if trio.current_time() - since > (END_PATIENCE if hopeless else SAVE_PATIENCE):
                _end_at_once([image for _, image in left], give_up)


def _end_at_once(left: list[Image], give_up: Callable[[], None]) -> NoReturn:
    """End the process, with threads in it that cannot end."""
    for image in left:
        risk = "what was written last may be lost" if image.committer.dirty else "nothing that was written is lost"
        log.error("%s: cannot be closed, since something that it needs does not answer; %s", image.name, risk)
    with contextlib.suppress(Exception):
        give_up()
    logging.shutdown()
    os._exit(1 if left else 0)


async def _announce(mountpoint: str, filesystem: Filesystem, device: Device, ready: Callable[[], None]) -> None:
    """Say that the mount is ready, once requests are answered and the folder was looked at; then what it does."""
    await device.connected.wait()
    path = os.fsdecode(filesystem.folder.path)
    with trio.move_on_after(PATIENCE):
        try:
            await filesystem.folder.scan()
            if (missing := len(filesystem.folder.refused)) > LINES:
                log.error("%s: %d images do not appear; the first are named above", path, missing)
        except OSError as error:
            log.error("%s: %s", path, error.strerror)
    filesystem.limits.raise_all(filesystem.folder.policy.walker.own_device)
    log.info("%s: ready; shows the images of %s", mountpoint, path)
    daemon.notify("STATUS=" + (said := _summary(mountpoint, filesystem)))
    ready()
    while daemon.is_notified():
        openings = filesystem.openings
        with trio.move_on_after(STATUS_INTERVAL) if _prefetches(filesystem) else contextlib.nullcontext():
            await openings.changed.wait()
        openings.changed = trio.Event()
        if said != (said := _summary(mountpoint, filesystem)):
            daemon.notify("STATUS=" + said)
        await trio.sleep(STATUS_PAUSE)


def _summary(mountpoint: str, filesystem: Filesystem) -> str:
    """What the mount does, in a line for the service manager."""
    inodes, path = filesystem.folder.inodes, os.fsdecode(filesystem.folder.path)
    disks = inodes.open()
    text = f"{mountpoint} shows the images of {path}: {len(disks)} of {len(inodes.shown())} disks open"
    copied = sum(bool(disk.prefetcher and disk.prefetcher.state in _COPYING) for disk in disks)
    return printable(text + f", {copied} being copied" * bool(copied))


def _prefetches(filesystem: Filesystem) -> bool:
    """Whether prefetching may begin or end without an image being opened or closed."""
    return any(disk.prefetcher and not disk.prefetcher.ended.is_set() for disk in filesystem.folder.inodes.open())


async def _obey_signals(
    mountpoint: str, filesystem: Filesystem, device: Device, mount: MountPoint | None, reopen_log: ReopenLog, kept: Kept
) -> None:
    """Unmount when a signal to stop comes; open the log anew when it is SIGHUP.

    A mount that is taken over is taken over first: what the former daemon had not committed has to be.
    """
    with trio.open_signal_receiver(*daemon.STOP, daemon.HANGUP) as signals:
        while True:
            while daemon.noted:
                number = daemon.noted.pop(0)
                if number == daemon.HANGUP:
                    await trio.to_thread.run_sync(reopen_log, filesystem.folder.policy.walker.check)
                    continue
                log.info("%s: signal %s", mountpoint, signal.Signals(number).name)
                kept.is_over = True
                if kept.taken_over:
                    await device.connected.wait()
                daemon.notify("STOPPING=1\nSTATUS=writing what the kernel still holds")
                await _drain_kernel_cache(mountpoint, filesystem, device, mount)
                device.terminate()
                return
            daemon.noted.append(await anext(signals))


async def _drain_kernel_cache(
    mountpoint: str, filesystem: Filesystem, device: Device, mount: MountPoint | None
) -> None:
    """Have the kernel hand over what it has accepted from writers but not yet sent to us, of all images side by side.

    fsync does that in long pieces, while a path still leads there; otherwise it is done inode by inode, in pages.
    Another process calls fsync: a thread of ours that waits for our own answers could not end if we are killed
    meanwhile.
    """
    reachable = await trio.to_thread.run_sync(_is_still, mount)
    limiter = trio.CapacityLimiter(DRAINS)

    async def drain(entry: Entry, image: Image) -> None:
        path = os.path.join(os.fsencode(mountpoint), entry.name)
        if reachable and filesystem.folder.inodes.shows(entry):
            with contextlib.suppress(OSError):  # there is no such program
                if await trio.to_thread.run_sync(_run_sync_program, path, abandon_on_cancel=True):
                    return
        try:
            await device.forget_pages(entry.inode)
        except OSError as error:
            log.error("%s: what the kernel still had may be lost: %s", image.name, error)

    async def drain_in_time(entry: Entry, image: Image) -> None:
        async with limiter:
            if not await _while_written(functools.partial(drain, entry, image), image):
                log.error("%s: what the kernel still had may be lost: nothing can be written", image.name)

    async with trio.open_nursery() as nursery:
        for entry in filesystem.folder.inodes.open():
            if entry.image is not None and entry.image.writable:
                nursery.start_soon(drain_in_time, entry, entry.image)


async def _while_written(work: Callable[[], Awaitable[None]], image: Image) -> bool:
    """Do the work; False where it was given up because no write reaches the image any more."""
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def run() -> None:
            await work()
            ended.set()

        nursery.start_soon(run)
        writes = -1
        while image.committer.writes != writes:
            writes = image.committer.writes
            with trio.move_on_after(DRAIN_PATIENCE):
                await ended.wait()
            if ended.is_set():
                return True
        nursery.cancel_scope.cancel()
    return False


def _run_stat_program(path: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(["stat", "--", path], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _run_sync_program(path: bytes) -> bool:
    done = subprocess.run(["sync", path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode == 0
