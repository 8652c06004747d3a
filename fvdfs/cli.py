"""The command line: arguments in, exit codes out.

Exit codes: 0 done; 1 an image cannot be used, or the system refused; 2 the command was wrong. `check` has its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fvdfs import __version__, daemon, mounts
from fvdfs.errors import FvdError, UsageError, leading, printable
from fvdfs.format.creation import CreateOptions
from fvdfs.mountoptions import MOUNT_OPTIONS, folders, listed, parse_mount_options, passphrase_file, program
from fvdfs.store.paths import real_path, within

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def parse_size(text: str) -> int:
    """Bytes: `512`, `64K`, `10M`, `20G`, `2T`."""
    number, unit = text, ""
    if text and not text[-1].isdigit():
        number, unit = text[:-1], text[-1].upper()
    if unit not in UNITS or not number.isdigit() or not number.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512, 64K, 10M, 20G or 2T")
    size = int(number[:_DIGITS]) * UNITS[unit]
    if len(number) > _DIGITS or size >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:_DIGITS]!r} is more than any file can hold")
    return size


_DIGITS = 100
_EMPTY_VALUE = re.compile("--[a-z-]+=")


def _unit(text: str) -> int:
    size = parse_size(text)
    if not size:
        raise argparse.ArgumentTypeError("must be more than 0")
    return size


def _journal_size(text: str) -> int:
    return 0 if text == "none" else parse_size(text)


def _delay(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and 1 <= int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of seconds from 1 to {(1 << 31) - 1}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fvdfs: {printable(message)}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except SystemExit as end:  # the parser's
        return _flushed(int(end.code or 0))
    except (Exception, KeyboardInterrupt) as error:
        return _ended_by(error)


def _run(words: list[str]) -> int:
    parser = _parser()
    for before, word in itertools.pairwise(["", *words]):
        if (not word and before != "-o") or _EMPTY_VALUE.fullmatch(word):
            parser.error(f"{word.rstrip('=') or before or 'a name'}: what is given is empty")
    arguments = parser.parse_args(words)
    run: Callable[[argparse.Namespace], int] = arguments.run
    if getattr(arguments, "secret", ""):
        passphrase_file("--secret ", arguments.secret)
    return run(arguments)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        return _ended_by(error)
    return code


def _ended_by(error: BaseException) -> int:
    """Say in a line why a command has ended early; its exit code. What is a defect is raised again."""
    error = leading(error)
    if isinstance(error, FvdError):
        daemon.complain(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        daemon.complain(mounts.explained(error))
    elif isinstance(error, MemoryError):
        daemon.complain("there is not enough memory for this")
    else:
        raise error
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fvdfs", description="Mount Fast Virtual Disk images as flat raw files.")
    parser.add_argument("--version", action="version", version=f"fvdfs {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    create = commands.add_parser("create", help="make a new image")
    create.set_defaults(run=_create)
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("size", metavar="SIZE", nargs="?", type=parse_size, help="of the disk: 512, 64K, 10M, 20G, 2T")
    _add_layout(create)

    create.add_argument(
        "--profile",
        default="",
        metavar="FILE|IMAGE",
        help="fetch first what this profile, or this image's, says",
    )
    _add_secret(create)

    info = commands.add_parser("info", help="show what an image is")
    info.set_defaults(run=_info)
    info.add_argument("image", metavar="IMAGE")
    info.add_argument("--json", action="store_true")
    _add_secret(info)

    check = commands.add_parser(
        "check",
        help="find out what is wrong with an image, and repair it",
        description="Exit codes: 0 clean, 1 the check could not be completed, 2 corrupt, 3 nothing but leaked space.",
    )
    check.set_defaults(run=_check)
    check.add_argument("image", metavar="IMAGE")
    check.add_argument("--repair", action="store_true", help="repair what is repairable; without it nothing is written")
    check.add_argument("--json", action="store_true")
    _add_names(check, "base_path=DIR: where a data file may lie that --repair writes to, beside the image's folder")
    _add_secret(check)

    amend = commands.add_parser("amend", help="change what an image says of its base")
    amend.set_defaults(run=_amend)
    amend.add_argument("image", metavar="IMAGE")
    amend.add_argument(
        "-F", "--base-format", required=True, metavar="FMT", help="what the base is: raw, fvd, qcow2 ..."
    )
    amend.add_argument("--secret", default="", metavar="FILE", help="the passphrase of an encrypted base")

    convert = commands.add_parser("convert", help="make an image with the content of another one, in any format")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("target", metavar="DST")
    convert.add_argument("-f", "--source-format", default="", metavar="FMT", help="default: raw, for NAME.fvd fvd")
    convert.add_argument("-O", "--target-format", default="", metavar="FMT", help="default: by its name, else raw")
    _add_names(convert, "base_path=DIR, allow_url=PREFIX: where names in the source may lead, beside its folder")
    _add_secret(convert)
    _add_layout(convert)

    mount = commands.add_parser(
        "mount",
        help="show a folder of images as a folder of raw files",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="options for -o, separated by commas:\n  " + "\n  ".join(MOUNT_OPTIONS.values()),
    )
    mount.set_defaults(run=_mount)
    mount.add_argument("folder", metavar="DIR", help="the folder of images NAME.fvd")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory, where they appear as NAME.raw")
    mount.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see below")
    mount.add_argument("-f", "--foreground", action="store_true", help="serve in this process, and log to the terminal")
    mount.add_argument("--read-only", action="store_true", help="write to no image, not even what is read")
    mount.add_argument("--allow-other", action="store_true", help="let other users reach the mount")
    mount.add_argument("--log-file", metavar="FILE", help="log there; SIGHUP reopens it (default: the system's log)")
    mount.add_argument("--debug", action="store_true", help="log every request (with -f)")

    status = commands.add_parser(
        "status", help="show how far the images of a mount are local, and what prefetching does"
    )
    status.set_defaults(run=_status)
    status.add_argument("mountpoint", metavar="MOUNTPOINT")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true")
    how.add_argument("--watch", action="store_true", help="live progress bars")

    prefetch = commands.add_parser("prefetch", help="copy all that is missing of a mounted disk from its base")
    prefetch.set_defaults(run=_prefetch)
    prefetch.add_argument("command", choices=["start", "pause", "stop"])
    prefetch.add_argument("raw", metavar="MOUNTPOINT/NAME.raw")

    profile = commands.add_parser("profile", help="record, and show, what a machine reads first")
    profile.set_defaults(run=_profile)
    profile.add_argument(
        "command", choices=["record", "show"], help="record: at the next opening; show: as create --profile takes it"
    )
    profile.add_argument("image", metavar="IMAGE")

    map_ = commands.add_parser("map", help="show what of a disk is local, in the base, or nowhere")
    map_.set_defaults(run=_map)
    map_.add_argument("image", metavar="IMAGE|RAW", help="an image, or a raw file in a mount")
    map_.add_argument("--json", action="store_true")
    map_.add_argument("--png", metavar="FILE", help="draw a picture")
    _add_secret(map_)

    umount = commands.add_parser("umount", help="unmount, and wait until every image is closed")
    umount.set_defaults(run=_umount)
    umount.add_argument("mountpoint", metavar="MOUNTPOINT")
    return parser


def _add_names(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help=text)


def _named(arguments: argparse.Namespace, *known: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders and URLs that a command's -o options allow. Raises UsageError."""
    options = parse_mount_options(arguments.options)
    for option in options:
        if option not in known:
            raise UsageError(f"-o {option}: is for mount; here there are: {', '.join(known)}")
    return folders(options), listed(options, "allow_url")


def _add_secret(command: argparse.ArgumentParser) -> None:
    command.add_argument("--secret", default="", metavar="FILE", help="the passphrase of encrypted images")


def _add_layout(command: argparse.ArgumentParser) -> None:
    """The options that say how a new image is laid out."""
    command.add_argument("-b", "--base", default="", metavar="FILE", help="base image, relative to the new image")
    command.add_argument(
        "-F", "--base-format", default="", metavar="FMT", help="raw, fvd, qcow2 or another one of QEMU's"
    )
    command.add_argument("--block-size", type=_unit, default=0, metavar="N", help="unit of copy-on-write")
    command.add_argument("--compact", action="store_true", help="let the image allocate its own storage, in chunks")
    command.add_argument("--chunk-size", type=_unit, default=0, metavar="N", help="default: 1M")
    command.add_argument("--grow-unit", type=_unit, default=0, metavar="N", help="default: 100M")
    command.add_argument("--journal-size", type=_journal_size, metavar="N|none", help="default: 16M")
    command.add_argument("--data-file", default="", metavar="FILE", help="keep the data in a file of its own")
    command.add_argument("--data-format", default="", metavar="FMT", help="raw (default)")
    command.add_argument("--copy-on-read", action="store_true", help="keep what is read from the base")
    command.add_argument(
        "--prefetch-delay",
        type=_delay,
        default=-1,
        metavar="SECONDS",
        help="copy the whole base, so long after opening",
    )
    command.add_argument(
        "--detect-holes",
        type=_unit,
        default=0,
        metavar="N",
        help="take zero runs of N bytes in the base as local",
    )
    command.add_argument(
        "--grow-command",
        default="",
        metavar="CMD",
        help="what makes the device larger; builtin:lvextend for a volume",
    )
    command.add_argument(
        "--update-base",
        default="",
        choices=["no", "writethrough", "writeback"],
        help="write to the base as well (if the mount allows it): the image is a cache in front of it",
    )
    command.add_argument("--force", action="store_true", help="overwrite files that exist")


# --- create and info ----------------------------------------------------------------------------


def _layout_options(arguments: argparse.Namespace) -> CreateOptions:
    if arguments.update_base in ("writethrough", "writeback") and arguments.base_format == "fvd":
        raise UsageError(f"--update-base {arguments.update_base} needs another base: an FVD image is never written to")
    return CreateOptions(
        base_img=arguments.base,
        base_img_fmt=arguments.base_format,
        block_size=arguments.block_size,
        compact=arguments.compact,
        chunk_size=arguments.chunk_size,
        grow_unit=arguments.grow_unit,
        journal_size=arguments.journal_size,
        data_file=arguments.data_file,
        data_file_fmt=arguments.data_format,
        copy_on_read=arguments.copy_on_read,
        prefetch_delay=arguments.prefetch_delay,
        detect_holes=arguments.detect_holes,
        grow_command=arguments.grow_command,
        update_base=arguments.update_base,
    )


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _set_up_terminal() -> None:
    """Remarks of a command that ends by itself go to the terminal, a line each."""
    logging.raiseExceptions = False
    terminal = logging.StreamHandler()
    terminal.setFormatter(daemon.LogFormatter("fvdfs: %(message)s"))
    logging.basicConfig(handlers=[terminal])


def _create(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.create import create_image
    from fvdfs.commands.profiles import read_profile

    if arguments.profile and not arguments.base:
        raise UsageError("--profile needs a base image: give --base")
    if arguments.secret and not arguments.base:
        raise UsageError("--secret needs a base image: give --base")
    if hint := _never_appears(arguments.image):
        raise UsageError(hint)
    data_file = os.path.join(os.path.dirname(arguments.image), arguments.data_file)
    if arguments.grow_command and not _is_device(data_file if arguments.data_file else arguments.image):
        raise UsageError("--grow-command makes a device larger: neither IMAGE nor --data-file is one")
    remarks = create_image(
        arguments.image,
        arguments.size,
        _layout_options(arguments),
        force=arguments.force,
        secret_file=arguments.secret,
        profile=read_profile(arguments.profile) if arguments.profile else (),
        read=[name for name in (arguments.profile, arguments.secret) if name],
    )
    for remark in remarks:
        daemon.complain(remark)
    return 0


def _is_device(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)


def _never_appears(image: str) -> str:
    """What to do where a new file has a name that no mount shows; empty where a mount does."""
    name = os.path.basename(image)
    if _is_device(image) or (name.endswith(".fvd") and name != ".fvd"):
        return ""
    return f"{image}: a mount shows files NAME.fvd only; add .fvd to the name, or rename the image later"


def _info(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.info import describe, render

    _set_up_terminal()
    facts = describe(arguments.image, secret_file=_absolute(arguments.secret))
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from fvdfs.check.check import check_image, describe, render

    _set_up_terminal()
    roots, _ = _named(arguments, "base_path")
    report = check_image(arguments.image, repair=arguments.repair, secret_file=arguments.secret, roots=roots)
    print(json.dumps(describe(report), indent=2) if arguments.json else render(report))
    return report.exit_code


def _amend(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.amend import amend

    amend(arguments.image, base_format=arguments.base_format, secret_file=arguments.secret)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import trio

    from fvdfs.commands.convert import Permission, convert
    from fvdfs.commands.progress import progress_bar

    _set_up_terminal()
    roots, urls = _named(arguments, "base_path", "allow_url")
    permission = Permission(roots, urls, secret_file=_absolute(arguments.secret))
    with progress_bar() as progress:
        work = functools.partial(
            convert,
            arguments.source,
            arguments.target,
            source_format=arguments.source_format,
            target_format=arguments.target_format,
            options=_layout_options(arguments),
            force=arguments.force,
            permission=permission,
            progress=progress,
        )
        remarks = trio.run(work)
    if arguments.target_format == "fvd" and (hint := _never_appears(arguments.target)):
        remarks.append(hint)
    for remark in remarks:
        daemon.complain(remark)
    return 0


# --- prefetching --------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.control import print_status, status, watch_status

    mountpoint = os.path.abspath(arguments.mountpoint)
    mounts.refuse_dead(mountpoint)
    if arguments.watch:
        watch_status(mountpoint)
    elif arguments.json:
        print(json.dumps(status(mountpoint), indent=2))
    else:
        print_status(mountpoint)
    return 0


def _prefetch(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.control import control_prefetch

    control_prefetch(arguments.command, arguments.raw)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.profiles import read_profile, record_profile
    from fvdfs.format.profile import to_text

    if arguments.command == "record":
        record_profile(arguments.image)
    else:
        print(to_text(read_profile(arguments.image)), end="")
    return 0


def _map(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.control import draw_map, print_map, read_map

    _set_up_terminal()
    found = read_map(arguments.image, secret_file=_absolute(arguments.secret))
    if arguments.png:
        draw_map(found, arguments.png, arguments.image)
    if arguments.json:
        print(json.dumps(found))
    elif not arguments.png:
        print_map(found)
    return 0


# --- mount and umount ---------------------------------------------------------------------------


def _mount(arguments: argparse.Namespace) -> int:
    options = parse_mount_options(arguments.options)
    folder = os.path.realpath(arguments.folder)
    mountpoint = os.path.abspath(arguments.mountpoint)
    mounts.refuse_dead(folder)
    mounts.refuse_mounted(mountpoint)
    for path in (folder, mountpoint):
        if not os.path.isdir(path):
            raise UsageError(f"{path}: is not a directory; " + _instead_of(path))
    if folder == os.path.realpath(mountpoint):
        raise UsageError(f"{mountpoint}: the images would be hidden by their own mount; choose another MOUNTPOINT")
    from fvdfs.store.references import BASE_FORMATS

    base_formats = listed(options, "base_format")
    for name in base_formats:
        if name not in BASE_FORMATS:
            raise UsageError(f"-o base_format={name}: is not known; known are {', '.join(BASE_FORMATS)}")
    if arguments.read_only and "rw" in options:
        raise UsageError("--read-only and -o rw: choose one")
    if arguments.debug and not arguments.foreground:
        raise UsageError("--debug needs -f: the requests are shown on the terminal")
    roots = (folder, *folders(options))
    secret = passphrase_file("-o secret=", options["secret"]) if "secret" in options else ""
    grow_command = program(options.get("grow_command", "none"))
    log_file = os.path.abspath(arguments.log_file) if arguments.log_file else None
    if log_file and within(real_path(log_file), os.path.realpath(mountpoint)):
        raise UsageError(f"--log-file {log_file}: would be hidden by the mount; choose another one")
    try:
        prefetch_max = parse_size(options["prefetch_max"]) if "prefetch_max" in options else 0
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"-o prefetch_max: {error}") from None
    if "prefetch_max" in options and not prefetch_max:
        raise UsageError("-o prefetch_max=0: leave it out for no cap; fvdfs prefetch pauses and stops a disk's")
    prefetch_jobs = options.get("prefetch_jobs")
    if prefetch_jobs is not None and not (
        re.fullmatch("[0-9]{1,4}", prefetch_jobs) and 1 <= int(prefetch_jobs) <= 1024
    ):
        raise UsageError(f"-o prefetch_jobs={prefetch_jobs}: must be a number from 1 to 1024")

    def serve(ready: Callable[[], None], reopen_log: daemon.ReopenLog) -> None:
        from fvdfs.image.image import Zeroes
        from fvdfs.image.policy import Policy
        from fvdfs.ops.filesystem import Sync
        from fvdfs.ops.mount import MountOptions, serve
        from fvdfs.prefetch.scheduler import DEFAULT_JOBS

        serve(
            MountOptions(
                folder=folder,
                mountpoint=mountpoint,
                policy=Policy(
                    roots=roots,
                    writable=not (arguments.read_only or "ro" in options),
                    allowed_urls=listed(options, "allow_url"),
                    secret_file=secret,
                    accept_unclean="accept_unclean" in options,
                    grow_command=grow_command,
                    base_formats=base_formats,
                    base_writable="allow_base_write" in options,
                    qemu_locks=options.get("locking", "on") == "on",
                    zeroes=Zeroes(options.get("detect_zeroes", "off")),
                ),
                allow_other=arguments.allow_other or "allow_other" in options,
                writeback=options.get("writeback", "on") == "on",
                io_uring=options.get("io_uring", "on") == "on",
                shrink="shrink" in options,
                sync=Sync(options.get("sync", "flush")),
                debug=arguments.debug,
                prefetch_jobs=DEFAULT_JOBS if prefetch_jobs is None else int(prefetch_jobs),
                prefetch_max=prefetch_max,
                record_profiles="record_profile" in options,
            ),
            ready,
            reopen_log,
        )

    go = daemon.in_foreground if arguments.foreground else daemon.in_background
    return go(serve, log_file)


def _instead_of(path: str) -> str:
    """What to do about a path that is no directory."""
    if not os.path.lexists(path):
        return "make it first"
    return f"give the folder of the images: {os.path.dirname(path)}" if path.endswith(".fvd") else "choose another one"


def _umount(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.unmount import unmount

    return unmount(os.path.abspath(arguments.mountpoint))


def entry() -> None:
    """The program `fvdfs`."""
    daemon.prepare()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(daemon.with_streams(main))
