"""Serving a mount: from the mount system call to the last clean header.

The mount point can lose its meaning while we serve: it is unmounted lazily, or something else is mounted over it,
and files stay open, or a bind mount or another mount namespace keeps the mount. So what the kernel still has of a disk
is asked for by inode number, and nothing is unmounted by a name that leads elsewhere.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pyfuse3
import trio

from fvdfs import daemon, mounts
from fvdfs.alloc.uring import use_ring
from fvdfs.chain import Policy
from fvdfs.cow.pressure import DiskPressure
from fvdfs.cow.scheduler import DEFAULT_JOBS, Scheduler
from fvdfs.errors import UsageError
from fvdfs.ops.device import Device, fuse_descriptors
from fvdfs.ops.filesystem import Filesystem, Sync
from fvdfs.ops.inodes import Folder
from fvdfs.paths import PATIENCE, LeadsBack, MountPoint, mount_points, within

log = logging.getLogger(__name__)

DRAIN_PATIENCE = 60.0  # seconds for each file
GC_THRESHOLDS = (20_000, 50, 100)  # a request leaves little to be collected; the default looks every 700 objects


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the user chose for a mount."""

    folder: str
    mountpoint: str
    policy: Policy
    allow_other: bool = False
    writeback: bool = True
    io_uring: bool = True
    shrink: bool = False
    sync: Sync = Sync.FLUSH
    debug: bool = False
    prefetch_jobs: int = DEFAULT_JOBS
    prefetch_max: int = 0
    """Bytes a second, of all images; 0: no cap."""
    record_profiles: bool = False


ReopenLog = Callable[[Callable[[str], None]], None]
"""Opens the log file anew, unless what it is given raises OSError for its path; blocks."""


def serve(options: MountOptions, ready: Callable[[], None], reopen_log: ReopenLog) -> None:
    """Mount and serve until the mount is gone, or a signal to stop comes.

    `ready` is called once requests are answered. Raises UsageError where it cannot be mounted.
    """
    point = os.path.realpath(options.mountpoint)
    _look_before_mounting(options, point)
    scheduler = Scheduler(
        jobs=options.prefetch_jobs, max_rate=options.prefetch_max, pressure=DiskPressure(options.folder)
    )
    folder = Folder(options.folder, options.policy, scheduler, record_profiles=options.record_profiles)
    filesystem = Filesystem(folder, writeback=options.writeback, shrink=options.shrink, sync=options.sync)
    fuse_options = set(pyfuse3.default_options) | {
        f"fsname={_escape(options.folder)}",
        "subtype=fvdfs",
    }
    if options.allow_other:
        fuse_options.add("allow_other")
    if not options.policy.writable:
        fuse_options.add("ro")
    if options.debug:
        fuse_options.add("debug")
    claim = mounts.claim(options.mountpoint)
    filesystem.daemon = json.dumps(_identity(claim)).encode()
    descriptors = fuse_descriptors()
    daemon.note_signals()
    try:
        pyfuse3.init(filesystem, options.mountpoint, fuse_options)
    except RuntimeError as error:
        raise UsageError(
            f"{options.mountpoint}: cannot mount: {error}; is /dev/fuse there (package fuse3), and may you use it?"
        ) from error
    mount = mounts.mount_at(options.mountpoint)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        _forbid_ways_back(options, mount)
        device = Device(filesystem, descriptors)
        try:
            trio.run(_serve, options, filesystem, device, mount, ready, reopen_log)
        finally:
            device.close(unmount=_is_still(mount))
    finally:
        pyfuse3.close()
        if claim is not None:
            claim.release()


def _identity(claim: mounts.Claim | None) -> dict[str, object]:
    """What `fvdfs umount` has to know to see the end of this process."""
    return {
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


def _look_before_mounting(options: MountOptions, point: str) -> None:
    """Raise UsageError where the mount would hide what it needs."""
    policy = options.policy
    what = {"the folder of images": options.folder, "secret": policy.secret_file}
    what |= {f"base_path={root}": root for root in policy.roots if root != options.folder}
    if os.path.isabs(policy.grow_command):
        what["grow_command"] = policy.grow_command
    for name, path in what.items():
        if path and within(os.path.realpath(path), point):
            raise UsageError(f"{options.mountpoint}: {name} would be hidden by the mount; choose another MOUNTPOINT")


def _forbid_ways_back(options: MountOptions, mount: MountPoint | None) -> None:
    """Have nobody follow a path into the mount that was just made, or what stands on it. Raises UsageError."""
    policy = options.policy
    if mount is not None:
        policy.walker.own_device = mount.device
    for path in (options.folder, policy.secret_file, policy.grow_command):
        if os.path.isabs(path):
            try:
                policy.walker.check(path)
            except LeadsBack as error:
                raise UsageError(f"{path}: {error.strerror}") from error
            except OSError:
                continue  # whoever needs it will say so


def _escape(value: str) -> str:
    """A value inside a comma-separated list of mount options, in ASCII."""
    text = value.encode("ascii", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace(",", "\\,")


async def _serve(
    options: MountOptions,
    filesystem: Filesystem,
    device: Device,
    mount: MountPoint | None,
    ready: Callable[[], None],
    reopen_log: ReopenLog,
) -> None:
    filesystem.folder.forget_pages = device.forget_pages
    # The ring outlives all who may wait for what is under way in it: that cannot be cancelled.
    async with use_ring() if options.io_uring else contextlib.nullcontext():
        try:
            async with trio.open_nursery() as nursery:
                filesystem.folder.spawn = lambda work: nursery.start_soon(_guard, work)
                nursery.start_soon(_obey_signals, options.mountpoint, filesystem, device, mount, reopen_log)
                nursery.start_soon(filesystem.commit_regularly)
                nursery.start_soon(filesystem.complaints.sum_up)
                nursery.start_soon(_announce, filesystem, ready)
                await device.serve(pyfuse3.main)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await filesystem.folder.close_all()
            log.info("%s: unmounted", options.mountpoint)


async def _guard(work: Callable[[], Awaitable[None]]) -> None:
    """Run what an image wants done in the background; its failure must not end the mount."""
    try:
        await work()
    except Exception:
        log.exception("a task in the background has ended by an error")


async def _announce(filesystem: Filesystem, ready: Callable[[], None]) -> None:
    """Say that the mount is ready, once the kernel and we have agreed on how to talk."""
    with trio.move_on_after(PATIENCE):
        try:
            await filesystem.folder.scan()
        except OSError as error:
            log.error("%s: %s", os.fsdecode(filesystem.folder.path), error.strerror)
    filesystem.limits.raise_all(filesystem.folder.policy.walker.own_device)
    ready()


async def _obey_signals(
    mountpoint: str, filesystem: Filesystem, device: Device, mount: MountPoint | None, reopen_log: ReopenLog
) -> None:
    """Unmount when a signal to stop comes; open the log anew when it is SIGHUP."""
    with trio.open_signal_receiver(*daemon.STOP, daemon.HANGUP) as signals:
        while True:
            while daemon.noted:
                number = daemon.noted.pop(0)
                if number == daemon.HANGUP:
                    await trio.to_thread.run_sync(reopen_log, filesystem.folder.policy.walker.check)
                    continue
                log.info("%s: signal %s", mountpoint, signal.Signals(number).name)
                await _drain_kernel_cache(mountpoint, filesystem, device, mount)
                pyfuse3.terminate()
                return
            daemon.noted.append(await anext(signals))


async def _drain_kernel_cache(
    mountpoint: str, filesystem: Filesystem, device: Device, mount: MountPoint | None
) -> None:
    """Have the kernel hand over what it has accepted from writers but not yet sent to us.

    fsync does it in long pieces, where a path leads there still; what is left, inode by inode, in pages.
    """
    reachable = await trio.to_thread.run_sync(_is_still, mount)
    for entry in filesystem.folder.open_entries():
        name = os.fsdecode(entry.path)
        if reachable:
            path = os.path.join(os.fsencode(mountpoint), entry.name)
            with trio.move_on_after(DRAIN_PATIENCE), contextlib.suppress(OSError):
                if await trio.to_thread.run_sync(_fsync_path, path, entry.inode, abandon_on_cancel=True):
                    continue
        try:
            await device.forget_pages(entry.inode)
        except OSError as error:
            log.error("%s: what the kernel still had may be lost: %s", name, error)


def _fsync_path(path: bytes, inode: int) -> bool:
    """Flush the file, if it is the one with this number."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino != inode:
            return False
        os.fsync(descriptor)
        return True
    finally:
        os.close(descriptor)
