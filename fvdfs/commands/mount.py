"""`fvdfs mount`: check what the user asks for, then serve the mount, in this process or in the background.

What makes no sense is refused here, before a process is started. What takes long to import, FUSE and the event
loop, is imported by the process that serves.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from fvdfs import daemon, mounts
from fvdfs.commands.umount import clear_dead
from fvdfs.errors import UsageError
from fvdfs.logs import LogPlaces, ReopenLog
from fvdfs.mountoptions import (
    credentials_file,
    folders,
    listed,
    parse_mount_options,
    passphrase_file,
    program,
    tls_credentials,
    without_those_of_mount8,
)
from fvdfs.sizes import parse_size
from fvdfs.store.locations import is_local
from fvdfs.store.paths import real_path, within


def run(
    folder: str,
    mountpoint: str,
    options: Sequence[str],
    *,
    foreground: bool,
    read_only: bool,
    allow_other: bool,
    log_file: str,
    syslog: bool = False,
    debug: bool,
    replace_dead: bool = False,
    sloppy: bool = False,
    fake: bool = False,
    upgrade: bool = False,
) -> int:
    """Mount the images of a folder; return when requests are answered, or, in the foreground, when it is unmounted.

    `options`: the arguments of -o; `sloppy`: unknown ones are left out. `fake`: mount nothing, but refuse what would be
    refused before; `upgrade`: of what is mounted already. `replace_dead`: clear away what a daemon that has ended has
    left at the mount point. Returns the exit code. Raises UsageError.
    """
    inherited = daemon.inherited()
    own_options, kernel_options = without_those_of_mount8(options, sloppy=sloppy)
    chosen = parse_mount_options(own_options)
    log_file = log_file or chosen.get("log_file", "")
    folder, mountpoint = os.path.realpath(folder), os.path.abspath(mountpoint)
    there = inherited is not None or upgrade
    if not there:  # else the mount is there, and nobody answers yet
        if (replace_dead or "replace" in chosen) and not fake:
            clear_dead(mountpoint)
        _check_places(folder, mountpoint)
    if read_only and "rw" in chosen:
        raise UsageError("--read-only and -o rw: choose one")
    if debug and not foreground:
        raise UsageError("--debug needs -f: the requests are shown on the terminal")
    roots = (folder, *folders(chosen))
    secret = passphrase_file("-o secret=", chosen["secret"]) if "secret" in chosen else ""
    tls_creds = tls_credentials("-o tls_creds=", chosen["tls_creds"]) if "tls_creds" in chosen else ""
    credentials = credentials_file("-o credentials=", chosen["credentials"]) if "credentials" in chosen else ""
    grow_command = program(chosen.get("grow_command", "none"))
    for name in ("new_base", "new_layout"):
        if name in chosen and "create" not in chosen:
            raise UsageError(f"-o {name}: is for new disks, which need -o create")
    new_base = chosen.get("new_base", "")
    if new_base and is_local(new_base):
        new_base = os.path.abspath(new_base)
    log_file = os.path.abspath(log_file) if log_file else ""
    if log_file and not there and within(real_path(log_file), os.path.realpath(mountpoint)):
        raise UsageError(f"--log-file {log_file}: would be hidden by the mount; choose another one")

    if fake or upgrade:
        return 0
    directory = os.getcwd()
    next_daemon: tuple[str, ...] = ()
    if "keep" in chosen:
        given = [word for option in (*own_options, *kernel_options) for word in ("-o", option)]
        flags = ["--syslog"] * syslog + ["--read-only"] * read_only + ["--allow-other"] * allow_other
        flags += ["-f"] * (foreground and daemon.stores_descriptors())
        logged = ["--log-file", log_file] if log_file else []
        next_daemon = (*daemon.this_program(), "mount", *flags, *logged, *given, "--", folder, mountpoint)

    def serve_folder(ready: Callable[[], None], reopen_log: ReopenLog) -> None:
        from fvdfs.commands.newdisks import new_disks
        from fvdfs.cow.planner import Zeroes
        from fvdfs.image.policy import Policy, given_credentials, given_tls_creds
        from fvdfs.ops.filesystem import Sync
        from fvdfs.ops.mount import MountOptions, serve
        from fvdfs.ops.naming import Permitted, Template
        from fvdfs.ops.writeback import Writeback
        from fvdfs.prefetch.scheduler import DEFAULT_JOBS
        from fvdfs.store.outage import OnLoss

        given_tls_creds.set(tls_creds)
        given_credentials.set(credentials)
        policy = Policy(
            roots=roots,
            writable=not (read_only or "ro" in chosen),
            allowed_urls=listed(chosen, "allow_url"),
            secret_file=secret,
            on_loss=OnLoss.of(chosen.get("on_base_error", "eio")),
            accept_unclean="accept_unclean" in chosen,
            grow_command=grow_command,
            base_formats=listed(chosen, "base_format"),
            base_writable="allow_base_write" in chosen,
            qemu_locks=chosen.get("locking") != "off",
            zeroes=Zeroes(chosen.get("detect_zeroes", "off")),
        )
        compact, template = chosen.get("new_layout") == "compact", None
        if new_base:
            plan = new_disks(folder, new_base, policy)
            template = Template(replace(plan.options, compact=compact), plan.length, tuple(plan.profile))
        settings = MountOptions(
            folder=folder,
            mountpoint=mountpoint,
            policy=policy,
            allow_other=allow_other or "allow_other" in chosen,
            kernel_options=tuple(kernel_options),
            writeback=Writeback(chosen.get("writeback", "auto")),
            io_uring=chosen.get("io_uring") != "off",
            shrink="shrink" in chosen,
            sync=Sync(chosen.get("sync", "flush")),
            debug=debug,
            prefetch_jobs=int(chosen.get("prefetch_jobs", DEFAULT_JOBS)),
            prefetch_max=parse_size(chosen.get("prefetch_max", "0")),
            metrics=chosen.get("metrics", ""),
            record_profiles="record_profile" in chosen,
            permitted=Permitted("create" in chosen, "remove" in chosen, compact=compact, template=template),
            inherited=inherited,
            next_daemon=next_daemon,
            directory=directory,
            log_file=log_file,
        )
        serve(settings, ready, reopen_log)

    places = LogPlaces(log_file, syslog)
    if foreground:
        return daemon.in_foreground(serve_folder, places, takes_over=inherited is not None)
    return (daemon.in_background if inherited is None else daemon.in_place)(serve_folder, places)


def _check_places(folder: str, mountpoint: str) -> None:
    """Raise UsageError, or OSError, unless one directory can be shown in the other."""
    mounts.refuse_dead(folder)
    mounts.refuse_mounted(mountpoint)
    for path in (folder, mountpoint):
        if not os.path.isdir(path):
            raise UsageError(f"{path}: is not a directory; " + _instead_of(path))
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    if folder == os.path.realpath(mountpoint):
        raise UsageError(f"{mountpoint}: the images would be hidden by their own mount; choose another MOUNTPOINT")


def _instead_of(path: str) -> str:
    """What to do about a path that is no directory."""
    if not os.path.lexists(path):
        return "make it first"
    return f"give the folder of the images: {os.path.dirname(path)}" if path.endswith(".fvd") else "choose another one"
