"""The command line: arguments in, exit codes out.

Exit codes: 0 done; 1 an image cannot be used, or the system refused; 2 the command was wrong. `check` has its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from fvdfs import __version__, daemon, mounts
from fvdfs.errors import FvdError, UsageError
from fvdfs.header import CreateOptions

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
MOUNT_OPTIONS = {
    "base_path": "base_path=DIR[:DIR...]  folders outside DIR that bases and data files may lie in (/: anywhere)",
    "allow_url": "allow_url=PREFIX  URLs that bases and data files may be (may be given more than once)",
    "base_format": "base_format=FMT[:FMT...]  what bases are that look like it where no image says it; or raw",
    "secret": "secret=FILE  the passphrase of encrypted bases and data files",
    "accept_unclean": "accept_unclean  write to an image that crashed without a journal",
    "grow_command": "grow_command=none|stored|PROGRAM  what makes a full device larger (default: none)",
    "detect_zeroes": "detect_zeroes=off|on|punch  do not store zeros where zeros are read; punch: free their space too",
    "allow_base_write": "allow_base_write  let images that ask for it (create --update-base) write to their base",
    "prefetch_max": "prefetch_max=BYTES  a second that prefetching may read, for all images together (default: no cap)",
    "prefetch_jobs": "prefetch_jobs=N  reads that prefetching may have under way, for all images together (default: 4)",
    "record_profile": "record_profile  record what is read first from images that have no profile yet",
    "shrink": "shrink  permit truncating a disk to a smaller size",
    "sync": "sync=none|flush|always  when a write is made durable: some seconds later, at a flush (default), at once",
    "io_uring": "io_uring=on|off  have the kernel wait for the disk where it can, instead of threads (default: on)",
    "writeback": "writeback=on|off  let the kernel gather writes (default: on)",
    "locking": "locking=on|off  take QEMU's image locks, and respect them, beside fvdfs's own (default: on)",
    "allow_other": "allow_other  like --allow-other",
    "ro": "ro  like --read-only",
    "rw": "rw  the default",
}


def parse_size(text: str) -> int:
    """Bytes: `512`, `64K`, `10M`, `20G`, `2T`."""
    number, unit = text, ""
    if text and not text[-1].isdigit():
        number, unit = text[:-1], text[-1].upper()
    if unit not in UNITS or not number.isdigit() or not number.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512, 64K, 10M, 20G or 2T")
    return int(number) * UNITS[unit]


def _journal_size(text: str) -> int:
    return 0 if text == "none" else parse_size(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except FvdError as error:
        daemon.complain(str(error))
        return error.exit_code
    except OSError as error:
        daemon.complain(mounts.explained(error))
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fvdfs", description="Mount Fast Virtual Disk images as flat raw files.")
    parser.add_argument("--version", action="version", version=f"fvdfs {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    create = commands.add_parser("create", help="make a new image")
    create.set_defaults(run=_create)
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("size", metavar="SIZE", nargs="?", type=parse_size, help="of the disk: 512, 64K, 10M, 20G, 2T")
    _add_layout(create)

    create.add_argument(
        "--profile", default="", metavar="FILE|IMAGE", help="fetch first what this profile, or this image's, says"
    )
    _add_secret(create)

    info = commands.add_parser("info", help="show what an image is")
    info.set_defaults(run=_info)
    info.add_argument("image", metavar="IMAGE")
    info.add_argument("--json", action="store_true")
    _add_secret(info)

    check = commands.add_parser(
        "check",
        help="find out what is wrong with an image, and mend it",
        description="Exit codes: 0 clean, 1 the check could not be completed, 2 corrupt, 3 nothing but leaked space.",
    )
    check.set_defaults(run=_check)
    check.add_argument("image", metavar="IMAGE")
    check.add_argument("--repair", action="store_true", help="mend what can be; without it nothing is written")
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
    mount.add_argument("folder", metavar="DIR")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT")
    mount.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS")
    mount.add_argument("-f", "--foreground", action="store_true")
    mount.add_argument("--read-only", action="store_true")
    mount.add_argument("--allow-other", action="store_true", help="let other users reach the mount")
    mount.add_argument("--log-file", metavar="F")
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
    return _roots("", options.get("base_path", ""))[1:], tuple(options.get("allow_url", "").split())


def _add_secret(command: argparse.ArgumentParser) -> None:
    command.add_argument("--secret", default="", metavar="FILE", help="the passphrase of encrypted images")


def _add_layout(command: argparse.ArgumentParser) -> None:
    """The options that say how a new image is laid out."""
    command.add_argument("-b", "--base", default="", metavar="FILE", help="base image, relative to the new image")
    command.add_argument("-F", "--base-format", default="", metavar="FMT", help="raw (default) or fvd")
    command.add_argument("--block-size", type=parse_size, default=0, metavar="N", help="unit of copy-on-write")
    command.add_argument("--compact", action="store_true", help="let the image allocate its own storage, in chunks")
    command.add_argument("--chunk-size", type=parse_size, default=0, metavar="N", help="default: 1M")
    command.add_argument("--grow-unit", type=parse_size, default=0, metavar="N", help="default: 100M")
    command.add_argument("--journal-size", type=_journal_size, metavar="N|none", help="default: 16M")
    command.add_argument("--data-file", default="", metavar="FILE", help="keep the data in a file of its own")
    command.add_argument("--data-format", default="", metavar="FMT", help="raw (default)")
    command.add_argument("--copy-on-read", action="store_true", help="keep what is read from the base")
    command.add_argument(
        "--prefetch-delay", type=int, default=-1, metavar="SECONDS", help="copy the whole base, so long after opening"
    )
    command.add_argument(
        "--detect-holes",
        type=parse_size,
        default=0,
        metavar="N",
        help="take zero runs of N bytes in the base as local",
    )
    command.add_argument(
        "--grow-command", default="", metavar="CMD", help="what makes the device larger; builtin:lvextend for a volume"
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
    terminal = logging.StreamHandler()
    terminal.setFormatter(daemon.LogFormatter("fvdfs: %(message)s"))
    logging.basicConfig(handlers=[terminal])


def _create(arguments: argparse.Namespace) -> int:
    from fvdfs.create import create_image
    from fvdfs.profiles import read_profile

    if arguments.profile and not arguments.base:
        raise UsageError("--profile needs a base image: give --base")
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
        print(f"fvdfs: {remark}", file=sys.stderr)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fvdfs.info import describe, render

    _set_up_terminal()
    facts = describe(arguments.image, secret_file=_absolute(arguments.secret))
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from fvdfs.check import check_image, describe, render

    _set_up_terminal()
    roots, _ = _named(arguments, "base_path")
    report = check_image(arguments.image, repair=arguments.repair, secret_file=arguments.secret, roots=roots)
    print(json.dumps(describe(report), indent=2) if arguments.json else render(report))
    return report.exit_code


def _amend(arguments: argparse.Namespace) -> int:
    from fvdfs.amend import amend

    amend(arguments.image, base_format=arguments.base_format, secret_file=arguments.secret)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import trio

    from fvdfs.convert import Permission, convert
    from fvdfs.progress import progress_bar

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
    for remark in remarks:
        print(f"fvdfs: {remark}", file=sys.stderr)
    return 0


# --- prefetching --------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace) -> int:
    from fvdfs.control import print_status, status, watch_status

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
    from fvdfs.control import control_prefetch

    control_prefetch(arguments.command, arguments.raw)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from fvdfs.cow.profile import to_text
    from fvdfs.profiles import read_profile, record_profile

    if arguments.command == "record":
        record_profile(arguments.image)
    else:
        print(to_text(read_profile(arguments.image)), end="")
    return 0


def _map(arguments: argparse.Namespace) -> int:
    from fvdfs.control import draw_map, print_map, read_map

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


def parse_mount_options(texts: Sequence[str]) -> dict[str, str]:
    """The options of all -o arguments; values of allow_url on a line each. Raises UsageError for an unknown one."""
    result: dict[str, str] = {}
    for option in ",".join(texts).split(","):
        if not option:
            continue
        name, _, value = option.partition("=")
        if name not in MOUNT_OPTIONS:
            raise UsageError(f"-o {name}: unknown; there are: {', '.join(MOUNT_OPTIONS)}")
        result[name] = f"{result[name]}\n{value}" if name == "allow_url" and name in result else value
    return result


def _mount(arguments: argparse.Namespace) -> int:
    options = parse_mount_options(arguments.options)
    folder = os.path.realpath(arguments.folder)
    mountpoint = os.path.abspath(arguments.mountpoint)
    mounts.refuse_dead(folder)
    mounts.refuse_mounted(mountpoint)
    for path in (folder, mountpoint):
        if not os.path.isdir(path):
            raise UsageError(f"{path}: is not a directory; make it first")
    if folder == os.path.realpath(mountpoint):
        raise UsageError(f"{mountpoint}: the images would be hidden by their own mount; choose another MOUNTPOINT")
    choices = {
        "io_uring": ("on", "off"),
        "writeback": ("on", "off"),
        "locking": ("on", "off"),
        "detect_zeroes": ("off", "on", "punch"),
        "sync": ("flush", "none", "always"),
    }
    for option, values in choices.items():
        if options.get(option, values[0]) not in values:
            raise UsageError(f"-o {option}={options[option]}: must be {' or '.join(values)}")
    from fvdfs.alloc.formats import BASE_FORMATS

    base_formats = tuple(options["base_format"].split(":")) if "base_format" in options else ()
    for name in base_formats:
        if name not in BASE_FORMATS:
            raise UsageError(f"-o base_format={name}: is not known; known are {', '.join(BASE_FORMATS)}")
    log_file = os.path.abspath(arguments.log_file) if arguments.log_file else None
    try:
        prefetch_max = parse_size(options["prefetch_max"]) if "prefetch_max" in options else 0
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"-o prefetch_max: {error}") from None
    prefetch_jobs = options.get("prefetch_jobs")
    if prefetch_jobs is not None and not (
        prefetch_jobs.isascii() and prefetch_jobs.isdigit() and 1 <= int(prefetch_jobs) <= 1024
    ):
        raise UsageError(f"-o prefetch_jobs={prefetch_jobs}: must be a number from 1 to 1024")

    def serve(ready: Callable[[], None], reopen_log: daemon.ReopenLog) -> None:
        from fvdfs.chain import Policy
        from fvdfs.cow.scheduler import DEFAULT_JOBS
        from fvdfs.image import Zeroes
        from fvdfs.ops.filesystem import Sync
        from fvdfs.ops.mount import MountOptions, serve

        serve(
            MountOptions(
                folder=folder,
                mountpoint=mountpoint,
                policy=Policy(
                    roots=_roots(folder, options.get("base_path", "")),
                    writable=not (arguments.read_only or "ro" in options),
                    allowed_urls=tuple(options.get("allow_url", "").split()),
                    secret_file=os.path.abspath(options["secret"]) if options.get("secret") else "",
                    accept_unclean="accept_unclean" in options,
                    grow_command=options.get("grow_command", "none"),
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


def _roots(folder: str, base_path: str) -> tuple[str, ...]:
    roots = [folder]
    for path in base_path.split(":"):
        if path:
            if not os.path.isabs(path):
                raise UsageError(f"-o base_path={path}: must be an absolute path")
            roots.append(os.path.realpath(path))
    return tuple(roots)


def _umount(arguments: argparse.Namespace) -> int:
    from fvdfs.unmount import unmount

    return unmount(os.path.abspath(arguments.mountpoint))


def entry() -> None:
    """The program `fvdfs`."""
    daemon.prepare()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
