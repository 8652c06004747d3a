"""Serving a mount: from the mount system call to the last clean header."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pyfuse3
import trio

from fvdfs.alloc.uring import use_ring
from fvdfs.chain import Policy
from fvdfs.cow.pressure import DiskPressure
from fvdfs.cow.scheduler import DEFAULT_JOBS, Scheduler
from fvdfs.errors import UsageError
from fvdfs.ops.device import Device, fuse_descriptors
from fvdfs.ops.filesystem import Filesystem, Sync
from fvdfs.ops.inodes import Folder
from fvdfs.paths import PATIENCE, LeadsBack, mount_points, within

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 4096
MAX_DIRTY_PERCENT = 40  # of what the kernel lets wait to be written, which is little else, so that writers wait for us
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


def serve(options: MountOptions, ready: Callable[[], None]) -> None:
    """Mount and serve until the mount is gone, or SIGTERM or SIGINT comes.

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
    descriptors = fuse_descriptors()
    try:
        pyfuse3.init(filesystem, options.mountpoint, fuse_options)
    except RuntimeError as error:
        raise UsageError(
            f"{options.mountpoint}: cannot mount: {error}; is /dev/fuse there (package fuse3), and may you use it?"
        ) from error
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        _forbid_ways_back(options, point)
        device = Device(filesystem, descriptors)
        try:
            trio.run(_serve, options, filesystem, device, ready)
        finally:
            device.close()
    finally:
        pyfuse3.close()


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


def _forbid_ways_back(options: MountOptions, point: str) -> None:
    """Have nobody follow a path into the mount that was just made, or what stands on it. Raises UsageError."""
    policy = options.policy
    policy.walker.own_device = [mount.device for mount in mount_points() if mount.path == point][-1]
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


async def _serve(options: MountOptions, filesystem: Filesystem, device: Device, ready: Callable[[], None]) -> None:
    filesystem.folder.forget_pages = device.forget_pages
    # The ring outlives all who may wait for what is under way in it: that cannot be cancelled.
    async with use_ring() if options.io_uring else contextlib.nullcontext():
        try:
            async with trio.open_nursery() as nursery:
                filesystem.folder.spawn = lambda work: nursery.start_soon(_guard, work)
                nursery.start_soon(_stop_on_signal, options.mountpoint, filesystem)
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
    _raise_limits(filesystem.folder.policy.walker.own_device)
    ready()


def _raise_limits(device: int) -> None:
    """Let the kernel read ahead, and gather writes, as far as pays with a file system that answers in user space."""
    folder = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}"
    for name, value in (("read_ahead_kb", READ_AHEAD_KIB), ("max_ratio", MAX_DIRTY_PERCENT)):
        try:
            with open(f"{folder}/{name}", "w", encoding="ascii") as file:
                file.write(str(value))
        except OSError as error:
            log.info("%s/%s stays as it is (%s): long transfers will be slower", folder, name, error.strerror)


async def _stop_on_signal(mountpoint: str, filesystem: Filesystem) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: signal %s", mountpoint, signal.Signals(number).name)
            await _drain_kernel_cache(mountpoint, filesystem)
            pyfuse3.terminate()


async def _drain_kernel_cache(mountpoint: str, filesystem: Filesystem) -> None:
    """Have the kernel hand over what it has accepted from writers but not yet sent to us."""
    for entry in filesystem.folder.open_entries():
        path = os.path.join(os.fsencode(mountpoint), entry.name)
        try:
            await trio.to_thread.run_sync(_fsync_path, path)
        except OSError as error:
            log.error("%s: what the kernel still had may be lost: %s", os.fsdecode(path), error)


def _fsync_path(path: bytes) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
