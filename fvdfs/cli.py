"""The command line: arguments in, an exit code out. What a command does is in `commands/`, a file for each.

Exit codes are those of `_EXIT_CODES`, whatever the command: one kind of error has one code. `check` and `compare` end
with what they have found; where they could not look, with the code that means that (`failed`), whatever the reason.

Every failure is one line on stderr, `fvdfs: ` and what is wrong and, where that is known, what to do about it; what is
not printable in it is escaped. An interrupt says nothing
(`clone`: how many it has made). A defect of fvdfs ends with a traceback, and 1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fvdfs import __version__, daemon, programs
from fvdfs.errors import NotFvd, UsageError, nearest, printable
from fvdfs.examples import EXAMPLES
from fvdfs.mountoptions import MOUNT_OPTIONS, credentials_file, passphrase_file, tls_credentials
from fvdfs.sizes import NewSize, parse_new_size, parse_size

if TYPE_CHECKING:
    from fvdfs.format.creation import CreateOptions

MAX_DELAY = (1 << 31) - 1  # seconds; the header's field holds no more
_JSON = "what it reports, for programs"
_URLS = "allow_url=PREFIX: URLs that bases and data files may have"
_LOCAL = (
    "Local is what of a disk need not be read from its base: as a share of the base (what it can have from there), "
    "or, where that is said, of the whole disk."
)
_NAMES = "base_path=DIR, allow_url=PREFIX: where names in the image may lead, beside its folder"
_CHOICE = re.compile(r"(?P<what>argument .+?: invalid choice: '(?P<name>.+?)') \(choose from (?P<choices>.+)\)")
_INTERNAL = "migrate-target"  # a command that is for another fvdfs alone
_EXIT_CODES = """\
exit codes:
  0    done
  1    an image is damaged, in use, or cannot be used; a read-only mount; no permission, space, memory; a server is away
  2    a mistake in what was asked: words that make no sense, names of nothing, files that must not be overwritten
  130  interrupted by Ctrl-C; mount, stopped by a signal before it is ready: 128 and the signal's number

  check    0 clean, 1 it could not look at everything, 2 corrupt, 3 nothing but leaked space
  compare  0 the same, 1 different, 2 they could not be compared
  doctor   1 what every mount needs is missing
  umount   3 the mount point is free, but the images stay open"""
_EMPTY_VALUE = re.compile("--[a-z-]+=")
# argparse's words are English as all others are; to look for translations, again and again, takes long.
vars(argparse)["_"] = lambda text: text


# --- types of arguments -------------------------------------------------------------------------


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _new_size(text: str) -> NewSize:
    try:
        return parse_new_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _unit(text: str) -> int:
    size = _size(text)
    if not size:
        raise argparse.ArgumentTypeError("must be more than 0")
    return size


def _journal_size(text: str) -> int:
    return 0 if text == "none" else _size(text)


def _delay(text: str) -> int:
    if not (re.fullmatch("[0-9]{1,100}", text) and 1 <= int(text) <= MAX_DELAY):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of seconds from 1 to {MAX_DELAY}")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 1 to 999999")
    return int(text)


class _Help(argparse.HelpFormatter):
    """Leaves the lines at the end of a help as they are, and fills all others."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        super().__init__(prog, width=_columns() if width is None else width)

    def add_text(self, text: str | None) -> None:
        if text and "\n" in text:
            self._add_item(lambda lines: lines + "\n", [text])
        else:
            super().add_text(text)


@functools.cache
def _columns() -> int:
    """For help; each argument that is added asks for it."""
    return shutil.get_terminal_size().columns - 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **how: Any) -> None:
        super().__init__(formatter_class=_Help, **how)

    def error(self, message: str) -> NoReturn:
        if found := _CHOICE.fullmatch(message):
            known = [name.strip("'") for name in found["choices"].split(", ") if name.strip("'") != _INTERNAL]
            message = found["what"] + (nearest(found["name"], known) or f" (choose from {', '.join(known)})")
        self.exit(self.get_default("failed") or 2, f"fvdfs: {printable(message)}; see {self.prog} --help\n")


# --- running a command --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0].startswith("/"):  # no command, but what mount.fuse has of `mount -t fuse.fvdfs`
        return programs.mount(words)
    failed = 0
    try:
        arguments = _parsed(words)
        failed = arguments.failed
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # the parser's
        return _flushed(int(end.code or 0))
    except (Exception, KeyboardInterrupt) as error:
        code = daemon.ended_by(error)
        return failed if failed and code != daemon.INTERRUPTED else code


def _parsed(words: list[str]) -> argparse.Namespace:
    parser = _parser()
    commands = _commands(parser)
    for before, word in itertools.pairwise(["", *words]):
        if (not word and before != "-o") or _EMPTY_VALUE.fullmatch(word):
            option = word.rstrip("=") or (before if before.startswith("-") else "")
            commands.get(words[0], parser).error(f"{option or 'a name'}: what is given is empty")
    known = [name for action in parser._actions for name in action.option_strings]
    if words and words[0].startswith("-") and not any(name.startswith(words[0]) for name in known):
        parser.error(f"unrecognized arguments: {words[0]}{nearest(words[0], known)}")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        names = [name for name in unknown if name.startswith("-")]
        command = commands[arguments.command_name]
        known = [name for action in command._actions for name in action.option_strings]
        hint = nearest(names[0].partition("=")[0], known) if names else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = arguments.run
    daemon.can_complain()
    if getattr(arguments, "secret", ""):
        arguments.secret = passphrase_file("--secret ", arguments.secret)
    if getattr(arguments, "servers_creds", ""):
        from fvdfs.image.policy import given_tls_creds

        given_tls_creds.set(tls_credentials("--tls-creds ", arguments.servers_creds))
    if getattr(arguments, "credentials", ""):
        from fvdfs.image.policy import given_credentials

        given_credentials.set(credentials_file("--credentials ", arguments.credentials))
    if run is not _mount:  # which has a log
        _log_to_terminal()
    try:
        return run(arguments)
    except (NotFvd, OSError) as error:
        if run in _OF_IMAGES:
            from fvdfs.commands.attributes import refuse_other, refuse_raw

            refuse_raw(arguments.image)
            if isinstance(error, NotFvd):
                refuse_other(arguments.image)
        raise


def _log_to_terminal() -> None:
    """Show what is logged on the terminal, a line each."""
    import logging

    from fvdfs.logs import LogFormatter

    logging.raiseExceptions = False
    terminal = logging.StreamHandler()
    terminal.setFormatter(LogFormatter("fvdfs: %(message)s"))
    logging.basicConfig(handlers=[terminal])


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        return daemon.ended_by(error)
    return code


# --- the parser ---------------------------------------------------------------------------------


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fvdfs",
        description="Mount Fast Virtual Disk images as flat raw files.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"fvdfs {__version__}")
    parser.set_defaults(
        failed=0
    )  # the exit code of a command that has failed, whatever the error; 0: that of the error
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command_name")

    create = commands.add_parser("create", help="make a new image")
    create.set_defaults(run=_create)
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("size", metavar="SIZE", nargs="?", type=_size, help="of the disk: 512, 64K, 10M, 20G, 2T")
    _add_layout(create)

    _add_profile(create)
    _add_secret(create)

    clone = commands.add_parser(
        "clone",
        help="make new disks that start as a template",
        description="A clone has the template's size and stands on it: it keeps what it reads of it, and fetches the "
        "rest by and by. Where the folder has a cache of the template, NAMEcache.fvd made by "
        "fvdfs create --base TEMPLATE --copy-on-read, the clones stand on that, which fetches once for all. "
        "All clones are made, or none.",
    )
    clone.set_defaults(run=_clone)
    clone.add_argument("template", metavar="TEMPLATE", help="a file, of any format, or a URL")
    clone.add_argument("names", metavar="NAME", nargs="+", help="of a new image; .fvd is added where it is missing")
    clone.add_argument("-n", "--count", type=_count, metavar="COUNT", help="make NAME-0001.fvd and so on, so many")
    clone.add_argument("--into", default="", metavar="DIR", help="the folder of the new images (default: this one)")
    clone.add_argument(
        "-F", "--base-format", default="", metavar="FMT", help="of the template; default: raw, for NAME.fvd fvd"
    )
    clone.add_argument(
        "--profile",
        default="",
        metavar="FILE|IMAGE",
        help="fetch first what this profile, or this image's, says; default: TEMPLATE.profile, or the template's",
    )
    _add_secret(clone)

    info = commands.add_parser("info", help="show what an image is")
    info.set_defaults(run=_info)
    info.add_argument("image", metavar="IMAGE")
    info.add_argument("--json", action="store_true", help=_JSON)
    _add_names(info, _URLS)
    _add_secret(info)

    check = commands.add_parser(
        "check",
        help="find out what is wrong with an image, and repair it",
        description="Exit codes: 0 clean, 1 the check could not be completed, 2 corrupt, 3 nothing but leaked space.",
    )
    check.set_defaults(run=_check, failed=1)
    check.add_argument("image", metavar="IMAGE")
    check.add_argument("--repair", action="store_true", help="repair what is repairable; without it nothing is written")
    check.add_argument("--json", action="store_true", help=_JSON)
    _add_names(check, "base_path=DIR: where a data file may lie that --repair writes to, beside the image's folder")
    _add_secret(check)

    amend = commands.add_parser("amend", help="change what an image says of its base")
    amend.set_defaults(run=_amend)
    amend.add_argument("image", metavar="IMAGE")
    amend.add_argument(
        "-F", "--base-format", required=True, metavar="FMT", help="what the base is: raw, fvd, qcow2 ..."
    )
    _add_secret(amend, "the passphrase of an encrypted base")

    convert = commands.add_parser("convert", help="make an image with the content of another one, in any format")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="a file, a URL, or -: raw, from standard input")
    convert.add_argument(
        "target", metavar="DST", help="a new file, nbd://… with --force, or -: raw, to standard output"
    )
    convert.add_argument("-f", "--source-format", default="", metavar="FMT", help="default: raw, for NAME.fvd fvd")
    convert.add_argument("-O", "--target-format", default="", metavar="FMT", help="default: by its name, else raw")
    _add_names(convert, "base_path=DIR, allow_url=PREFIX: where names in the source may lead, beside its folder")
    convert.add_argument("-c", "--compress", action="store_true", help="compress a new qcow2 image")
    _add_secret(convert)
    _add_layout(convert)
    _add_profile(convert)

    measure = commands.add_parser("measure", help="say what a conversion would take")
    measure.set_defaults(run=_measure)
    measure.add_argument("source", metavar="SRC")
    measure.add_argument("-f", "--source-format", default="", metavar="FMT", help="default: raw, for NAME.fvd fvd")
    measure.add_argument("-O", "--target-format", default="fvd", metavar="FMT", help="fvd (default) or raw")
    measure.add_argument("--json", action="store_true", help=_JSON)
    _add_names(measure, "base_path=DIR, allow_url=PREFIX: where names in the source may lead, beside its folder")
    _add_secret(measure)
    _add_layout(measure)

    compare = commands.add_parser(
        "compare",
        help="say whether two disks have the same content, in whatever formats",
        description="Exit codes: 0 the disks are the same, 1 they differ, 2 they could not be compared.",
    )
    compare.set_defaults(run=_compare, failed=2)
    compare.add_argument("first", metavar="A")
    compare.add_argument("second", metavar="B")
    compare.add_argument("-f", "--first-format", default="", metavar="FMT", help="of A; default: raw, for NAME.fvd fvd")
    compare.add_argument("-F", "--second-format", default="", metavar="FMT", help="of B; the same default")
    compare.add_argument("-s", "--strict", action="store_true", help="a size of their own makes disks differ")
    compare.add_argument("--json", action="store_true", help=_JSON)
    _add_names(compare, "base_path=DIR, allow_url=PREFIX: where names in A and B may lead, beside their folders")
    _add_secret(compare)

    _add_backup(commands)

    mount = commands.add_parser(
        "mount",
        help="show a folder of images as a folder of raw files",
    )
    _end_with(
        mount,
        "options for -o, separated by commas",
        "\n".join(f"{option.form}  {option.help}" for option in MOUNT_OPTIONS.values()),
    )
    mount.set_defaults(run=_mount)
    mount.add_argument("folder", metavar="DIR", help="the folder of images NAME.fvd")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory, where they appear as NAME.raw")
    mount.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see below")
    mount.add_argument("-f", "--foreground", action="store_true", help="serve in this process, and log to the terminal")
    mount.add_argument("--read-only", action="store_true", help="write to no image, not even what is read")
    mount.add_argument("--allow-other", action="store_true", help="let other users reach the mount")
    mount.add_argument(
        "--log-file", default="", metavar="FILE", help="log there; SIGHUP reopens it (default: the system's log)"
    )
    mount.add_argument("--replace", action="store_true", help="clear a dead mount away that is left at MOUNTPOINT")
    mount.add_argument("--syslog", action="store_true", help="log to the system's log, with -f or --log-file, too")
    mount.add_argument("--debug", action="store_true", help="log every request (with -f)")

    status = commands.add_parser(
        "status", help="show how far the images of a mount are local, and what prefetching does", description=_LOCAL
    )
    status.set_defaults(run=_status)
    status.add_argument("mountpoint", metavar="MOUNTPOINT|RAW", help="a mount, or one disk in it")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help=_JSON)
    how.add_argument("--log", action="store_true", help="the last lines of the mount's log")
    how.add_argument("--watch", action="store_true", help="again and again; top shows more")

    top = commands.add_parser(
        "top",
        help="a live table of the disks of a mount that are open, with keys to steer them",
        description=_LOCAL,
    )
    top.set_defaults(run=_top)
    top.add_argument("mountpoint", metavar="MOUNTPOINT")

    doctor = commands.add_parser("doctor", help="say what works on this host, what does not, and what to do about it")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help=_JSON)

    prefetch = commands.add_parser("prefetch", help="copy all that is missing of a mounted disk from its base")
    prefetch.set_defaults(run=_prefetch)
    prefetch.add_argument("command", choices=["start", "pause", "stop"], metavar="start|pause|stop")
    prefetch.add_argument("raw", metavar="MOUNTPOINT/NAME.raw")

    profile = commands.add_parser("profile", help="record, and show, what a machine reads first")
    profile.set_defaults(run=_profile)
    profile.add_argument(
        "command",
        choices=["record", "show"],
        metavar="record|show",
        help="record: at the next opening; show: as create --profile takes it",
    )
    profile.add_argument("image", metavar="IMAGE")
    profile.add_argument("--json", action="store_true", help=_JSON)

    map_ = commands.add_parser(
        "map", help="show what of a disk is stored in the image, in the base, or nowhere", description=_LOCAL
    )
    map_.set_defaults(run=_map)
    map_.add_argument("image", metavar="IMAGE|RAW", help="an image, or a raw file in a mount")
    map_.add_argument("--json", action="store_true", help=_JSON)
    _add_names(map_, _URLS)
    map_.add_argument("--png", default="", metavar="FILE", help="draw a picture; -: to standard output")
    map_.add_argument("--html", default="", metavar="FILE", help="make a page for a browser; -: to standard output")
    _add_secret(map_)

    resize = commands.add_parser("resize", help="change the size of a disk")
    resize.set_defaults(run=_resize)
    resize.add_argument("disk", metavar="DISK", help="an image that is not open, or a raw file in a mount")
    resize.add_argument("size", metavar="SIZE", type=_new_size, help="512, 64K, 10M, 20G, 2T, or +SIZE to add that")
    resize.add_argument("--shrink", action="store_true", help="permit a smaller size: what lies past it is lost")
    _add_names(resize, "base_path=DIR: where a data file may lie; grow_command=...: what enlarges a full device")
    _add_secret(resize)

    snapshot = commands.add_parser(
        "snapshot", help="keep the present state of a disk, and go on in a new image over it"
    )
    snapshot.set_defaults(run=_snapshot)
    snapshot.add_argument("disk", metavar="DISK", help="an image that is not open, or a raw file in a mount")
    snapshot.add_argument("name", metavar="NAME", nargs="?", default="", help="default: the next number")
    snapshot.add_argument(
        "--freeze",
        default="",
        metavar="SOCKET",
        help="of the guest agent: its file systems are frozen for the moment of the snapshot",
    )
    _add_names(snapshot, _URLS)
    _add_secret(snapshot)

    delete = commands.add_parser("delete", help="delete a snapshot; what stands on it takes over what it needs")
    delete.set_defaults(run=_delete)
    delete.add_argument("image", metavar="SNAPSHOT", help="DISK@NAME: of an image, or of its raw file in a mount")
    _add_names(delete, _URLS)
    _add_secret(delete)

    commit = commands.add_parser("commit", help="write what an image stores into the FVD image that it stands on")
    commit.set_defaults(run=_commit)
    commit.add_argument(
        "image", metavar="IMAGE", help="or its raw file in a mount; it is empty afterwards, and shows the same"
    )
    _add_names(commit, _URLS)
    _add_secret(commit)

    flatten = commands.add_parser("flatten", help="copy all that a disk needs of its base, and let go of that")
    flatten.set_defaults(run=_flatten)
    flatten.add_argument("disk", metavar="DISK", help="an image that is not open, or a raw file in a mount")
    _add_names(flatten, _URLS)
    _add_secret(flatten)

    rebase = commands.add_parser("rebase", help="have an image stand on another base, and show the same")
    rebase.set_defaults(run=_rebase)
    rebase.add_argument("image", metavar="IMAGE", help="not open")
    rebase.add_argument("-b", "--base", required=True, metavar="FILE", help="relative to the image")
    rebase.add_argument("-F", "--base-format", default="", metavar="FMT", help="that of the old base")
    rebase.add_argument("--unsafe", action="store_true", help="compare nothing: it is the old base in another place")
    _add_names(rebase, _URLS)
    _add_secret(rebase)

    revert = commands.add_parser("revert", help="go back to a snapshot: what was written since is lost")
    revert.set_defaults(run=_revert)
    revert.add_argument("image", metavar="IMAGE", help="of a disk that is not open")
    revert.add_argument(
        "name", metavar="NAME|FILE", nargs="?", default="", help="its name, or its file; default: what it stands on"
    )
    _add_names(revert, _URLS)
    _add_secret(revert)

    snapshots = commands.add_parser("snapshots", help="show which images stand on which")
    snapshots.set_defaults(run=_snapshots)
    snapshots.add_argument("disk", metavar="DISK|DIR", help="an image, a raw file in a mount, or a folder of images")
    snapshots.add_argument("--json", action="store_true", help=_JSON)

    _add_moves(commands)

    upgrade = commands.add_parser("upgrade", help="have this version go on with a mount that is kept (-o keep)")
    upgrade.set_defaults(run=_upgrade)
    upgrade.add_argument("mountpoint", metavar="MOUNTPOINT")
    upgrade.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="more options, or other values of them; writeback, sync, allow_other, ro and those of mount(8) stay",
    )

    umount = commands.add_parser("umount", help="unmount, and wait until every image is closed")
    umount.set_defaults(run=_umount)
    umount.add_argument("mountpoint", metavar="MOUNTPOINT")
    umount.add_argument(
        "-l", "--lazy", action="store_true", help="take it out of the tree now, though it is busy; images stay open"
    )
    for name, text in EXAMPLES.items():
        _end_with(commands.choices[name], "examples", text)
    return parser


def _end_with(command: _Parser, title: str, text: str) -> None:
    """Have its help end with this as well, line by line."""
    paragraph = f"{title}:\n" + "\n".join(f"  {line}" for line in text.splitlines())
    command.epilog = f"{command.epilog}\n\n{paragraph}" if command.epilog else paragraph


def _add_backup(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Commands on what has changed since an earlier state of a disk."""
    diff = commands.add_parser("diff", help="list what of a disk has changed since a snapshot of it")
    diff.set_defaults(run=_diff)
    diff.add_argument("disk", metavar="DISK[@SNAPSHOT]", help="an image, or a raw file in a mount")
    diff.add_argument(
        "--since", default="", metavar="SNAPSHOT", help="its name, or its file; default: all that is stored"
    )
    diff.add_argument("--json", action="store_true", help=_JSON)
    _add_names(diff, _NAMES)
    _add_secret(diff)

    export = commands.add_parser("export", help="write what of a disk has changed since a snapshot into an overlay")
    export.set_defaults(run=_export)
    export.add_argument("disk", metavar="DISK[@SNAPSHOT]", help="an image, or a raw file in a mount")
    export.add_argument("--since", required=True, metavar="SNAPSHOT", help="its name, or its file")
    export.add_argument("target", metavar="OUT")
    export.add_argument("--format", default="", metavar="FMT", help="fvd or qcow2; default: by the name")
    export.add_argument(
        "-b", "--base", default="", metavar="FILE", help="what OUT is to name as its base: the snapshot, or a copy"
    )
    export.add_argument("-F", "--base-format", default="", metavar="FMT", help="of that; default: fvd, for qcow2 raw")
    export.add_argument("--force", action="store_true", help="overwrite a file that exists")
    _add_names(export, _NAMES)
    _add_secret(export)

    restore = commands.add_parser("restore", help="put what was exported onto a copy of the earlier state")
    restore.set_defaults(run=_restore)
    restore.add_argument("export", metavar="EXPORT")
    restore.add_argument("target", metavar="TARGET")
    restore.add_argument("-O", "--target-format", default="", metavar="FMT", help="default: raw, for NAME.fvd fvd")
    restore.add_argument("--force", action="store_true", help="whatever the target holds")
    _add_names(restore, _NAMES)
    _add_secret(restore)


def _add_keep_base(command: _Parser, names: str) -> None:
    command.add_argument(
        "--keep-base",
        default="",
        metavar="TEMPLATE",
        help=f"stand on this there, as the disk does here: only the rest is copied; {names}",
    )
    command.add_argument(
        "-F", "--base-format", default="", metavar="FMT", help="of the template; default: raw, for NAME.fvd fvd"
    )


def _add_moves(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Commands that move a disk to another host."""
    serve = commands.add_parser(
        "serve",
        help="give disks of a mount to other hosts over NBD, and hand them over to who receives them",
        description="Reads past every cache; runs until a signal comes. Whoever reaches the address reads the disks, "
        "and can take over those that no machine runs on: use --tls-creds, or an address that only your hosts reach.",
    )
    serve.set_defaults(run=_serve)
    serve.add_argument("disks", metavar="DISK", nargs="+", help="a raw file in a mount")
    serve.add_argument("--listen", default="", metavar="ADDR[:PORT]", help="an address of this host; port 10809")
    serve.add_argument("--unix", default="", metavar="PATH", help="a Unix socket")
    serve.add_argument(
        "--systemd", action="store_true", help="the one socket that systemd has activated the service with"
    )
    serve.add_argument(
        "--tls-creds",
        default="",
        metavar="DIR",
        help="TLS alone, by certificates (ca-cert.pem, server-cert.pem, server-key.pem) or pre-shared keys (keys.psk)",
    )

    serve.add_argument(
        "--for",
        dest="target",
        default="",
        metavar="NUMBER",
        help="of the only target that may have the disk, as fvdfs info tells it of the image there (asks as)",
    )

    receive = commands.add_parser(
        "receive",
        help="make a disk that another host gives by fvdfs serve, and can hand over",
        description="Until it is taken over, by fvdfs activate or by the first write, it is read from there, and "
        "nothing of it is kept here. The mount of IMAGE has to allow the URL: -o allow_url=nbd://HOST/",
    )
    receive.set_defaults(run=_receive)
    receive.add_argument("url", metavar="URL", help="as fvdfs serve prints it: nbd://HOST/NAME, nbds://HOST/NAME")
    receive.add_argument("image", metavar="IMAGE", help="the new image")
    _add_keep_base(receive, "a name from the folder of IMAGE on, or a URL")
    receive.add_argument(
        "--profile",
        choices=["auto", "none"],
        default="auto",
        help="auto: copy first what was used last at the source (default); none: copy by address",
    )
    _add_tls_creds(receive)

    migrate = commands.add_parser(
        "migrate",
        help="move a running machine to another host with its disks, or disks without a machine",
        description="Serves the disks here, receives them there, has QEMU move the machine, and copies until all is "
        "there. fvdfs must be installed there, and a mount allow this host: -o allow_url=nbd://ADDR/. Ctrl-C before "
        "the machine runs there leaves all as before; after that it ends the display alone.",
    )
    migrate.set_defaults(run=_migrate)
    migrate.add_argument("disks", metavar="DISK", nargs="+", help="a raw file in a mount")
    migrate.add_argument("target", metavar="HOST:DIR", help="the mount there, or its folder of images")
    migrate.add_argument("--qmp", default="", metavar="SOCKET", help="the monitor of the machine here")
    migrate.add_argument(
        "--qmp-target",
        default="",
        metavar="SOCKET",
        help="there, of a machine started with -incoming defer; it may start while this waits, since its disk is there "
        "only then",
    )
    migrate.add_argument("--start", default="", metavar="COMMAND", help="a shell command that starts it there")
    migrate.add_argument("--ssh", default="", metavar="COMMAND", help="what runs a program there; default: ssh HOST")
    migrate.add_argument("--program", default="fvdfs", metavar="COMMAND", help="fvdfs there; default: fvdfs")
    migrate.add_argument(
        "--listen", default="", metavar="ADDR[:PORT]", help="of this host, for the disks; default: that which HOST sees"
    )
    migrate.add_argument(
        "--migrate-uri", default="", metavar="URI", help="for the machine, as QEMU has it; default: a free port of HOST"
    )
    migrate.add_argument(
        "--tls-creds", default="", metavar="DIR", help="serve by TLS alone; there the mount's -o tls_creds counts"
    )
    _add_keep_base(migrate, "as it is named there, from the folder of the images on, or a URL")
    migrate.add_argument(
        "--trust-base",
        action="store_true",
        help="compare a sample of that template with the one here, and not all of both before anything is done",
    )
    migrate.add_argument("--log-file", default="", metavar="FILE", help="of the server (default: the system's log)")

    migrate_target = commands.add_parser(_INTERNAL)  # started by migrate, at the other host
    migrate_target.set_defaults(run=_migrate_target)

    activate = commands.add_parser("activate", help="take a disk over from its source: it is written here from now on")
    activate.set_defaults(run=_activate)
    activate.add_argument("disk", metavar="DISK", help="a raw file in a mount")
    activate.add_argument(
        "--qmp",
        default="",
        metavar="SOCKET",
        help="the monitor of the machine that is to come (QEMU with -incoming): as soon as that runs, not before",
    )

    abandon = commands.add_parser(
        "abandon",
        help="give up a move at its target, which has not taken the disk over: its source goes on",
        description="For good: the image is never written again, and may be removed. The source is told, and needs no "
        "fvdfs thaw --lose-writes then. What has been taken over is refused.",
    )
    abandon.set_defaults(run=_abandon)
    abandon.add_argument("disk", metavar="DISK", help="a raw file in a mount, or an image that is not open")
    _add_tls_creds(abandon)

    freeze = commands.add_parser("freeze", help="have nobody write a disk on this host, since it moves to another")
    freeze.set_defaults(run=_freeze)
    freeze.add_argument("disk", metavar="DISK", help="a raw file in a mount, or an image that is not open")
    _add_names(freeze, _URLS)
    _add_secret(freeze)

    thaw = commands.add_parser("thaw", help="have a frozen disk be written here again: its move was cancelled")
    thaw.set_defaults(run=_thaw)
    thaw.add_argument("disk", metavar="DISK", help="a raw file in a mount, or an image that is not open")
    thaw.add_argument("--lose-writes", action="store_true", help="though a target has it, and may have written to it")

    release = commands.add_parser("release", help="say that the target has all of a disk: its image may be removed")
    release.set_defaults(run=_release)
    release.add_argument("disk", metavar="DISK", help="a raw file in a mount, or an image that is not open")
    _add_tls_creds(release)


def _add_names(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help=text)


def _add_secret(command: argparse.ArgumentParser, help_text: str = "the passphrase of encrypted images") -> None:
    command.add_argument("--secret", default="", metavar="FILE", help=help_text)
    command.add_argument(
        "--credentials", default="", metavar="FILE", help="who we are for servers, and passphrases, as in the guide"
    )
    _add_tls_creds(command)


def _add_tls_creds(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tls-creds",
        default="",
        dest="servers_creds",
        metavar="DIR",
        help="certificates (ca-cert.pem, …) or pre-shared keys (keys.psk) for servers of nbds://",
    )


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--profile",
        default="",
        metavar="FILE|IMAGE",
        help="fetch first what this profile, or this image's, says",
    )


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
    command.add_argument(
        "--data-file",
        default="",
        metavar="FILE|auto",
        help="keep the data in a file of its own; auto: IMAGE.data",
    )
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


# --- commands -----------------------------------------------------------------------------------
# Each imports what it runs only now: some take long to import.


def _layout(arguments: argparse.Namespace, image: str) -> CreateOptions:
    """What `_add_layout` has read, for this new image. Raises UsageError."""
    from fvdfs.commands.create import data_file_name
    from fvdfs.format.creation import CreateOptions

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
        data_file=data_file_name(arguments.data_file, image),
        data_file_fmt=arguments.data_format,
        copy_on_read=arguments.copy_on_read,
        prefetch_delay=arguments.prefetch_delay,
        detect_holes=arguments.detect_holes,
        grow_command=arguments.grow_command,
        update_base=arguments.update_base,
    )


def _create(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.create import run

    return run(
        arguments.image,
        arguments.size,
        _layout(arguments, arguments.image),
        profile=arguments.profile,
        force=arguments.force,
        secret=arguments.secret,
    )


def _clone(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.clone import run

    return run(
        arguments.template,
        arguments.names,
        count=arguments.count,
        into=arguments.into,
        base_format=arguments.base_format,
        profile=arguments.profile,
        secret=arguments.secret,
    )


def _info(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.info import run

    return run(arguments.image, as_json=arguments.json, options=arguments.options, secret=arguments.secret)


def _check(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.check import run

    return run(
        arguments.image,
        repair=arguments.repair,
        as_json=arguments.json,
        options=arguments.options,
        secret=arguments.secret,
    )


def _amend(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.amend import run

    return run(arguments.image, base_format=arguments.base_format, secret=arguments.secret)


def _convert(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.convert import run

    return run(
        arguments.source,
        arguments.target,
        source_format=arguments.source_format,
        target_format=arguments.target_format,
        layout=_layout(arguments, arguments.target),
        options=arguments.options,
        force=arguments.force,
        secret=arguments.secret,
        profile=arguments.profile,
        compress=arguments.compress,
    )


def _measure(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.measure import run

    return run(
        arguments.source,
        source_format=arguments.source_format,
        target_format=arguments.target_format,
        layout=_layout(arguments, "new.fvd"),
        as_json=arguments.json,
        options=arguments.options,
        secret=arguments.secret,
    )


def _compare(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.compare import run

    return run(
        (arguments.first, arguments.second),
        (arguments.first_format, arguments.second_format),
        strict=arguments.strict,
        as_json=arguments.json,
        options=arguments.options,
        secret=arguments.secret,
    )


def _diff(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.diff import run

    return run(
        arguments.disk,
        since=arguments.since,
        as_json=arguments.json,
        options=arguments.options,
        secret=arguments.secret,
    )


def _export(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.export import Backing, run

    if arguments.base_format and not arguments.base:
        raise UsageError("--base-format needs a base: give --base")
    return run(
        arguments.disk,
        arguments.target,
        since=arguments.since,
        target_format=arguments.format,
        backing=Backing(arguments.base, arguments.base_format),
        options=arguments.options,
        force=arguments.force,
        secret=arguments.secret,
    )


def _restore(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.restore import run

    return run(
        arguments.export,
        arguments.target,
        target_format=arguments.target_format,
        options=arguments.options,
        force=arguments.force,
        secret=arguments.secret,
    )


def _mount(arguments: argparse.Namespace, *, upgrade: bool = False) -> int:
    from fvdfs.commands.mount import run

    return run(
        arguments.folder,
        arguments.mountpoint,
        arguments.options,
        foreground=arguments.foreground,
        read_only=arguments.read_only,
        allow_other=arguments.allow_other,
        log_file=arguments.log_file,
        syslog=arguments.syslog,
        replace_dead=arguments.replace,
        debug=arguments.debug,
        upgrade=upgrade,
    )


def _status(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.status import run

    return run(arguments.mountpoint, as_json=arguments.json, watch=arguments.watch, log=arguments.log)


def _top(arguments: argparse.Namespace) -> int:
    try:
        from fvdfs.commands.top import run
    except ModuleNotFoundError as error:
        raise UsageError(f"top: {error.name} is not installed: pip install 'fvdfs[top]'") from None
    run(arguments.mountpoint)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.doctor import run

    return run(as_json=arguments.json)


def _prefetch(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.prefetch import run

    return run(arguments.command, arguments.raw)


def _profile(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.profile import run

    return run(arguments.command, arguments.image, as_json=arguments.json)


def _map(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.map import run

    return run(
        arguments.image,
        as_json=arguments.json,
        png=arguments.png,
        page=arguments.html,
        options=arguments.options,
        secret=arguments.secret,
    )


def _resize(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.resize import run

    return run(
        arguments.disk, arguments.size, shrink=arguments.shrink, options=arguments.options, secret=arguments.secret
    )


def _snapshot(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.snapshot import run

    return run(
        arguments.disk,
        arguments.name,
        freeze=arguments.freeze,
        options=arguments.options,
        secret=arguments.secret,
    )


def _delete(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.layers import run_delete

    return run_delete(arguments.image, options=arguments.options, secret=arguments.secret)


def _commit(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.layers import run_commit

    return run_commit(arguments.image, options=arguments.options, secret=arguments.secret)


def _flatten(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.layers import run_flatten

    return run_flatten(arguments.disk, options=arguments.options, secret=arguments.secret)


def _rebase(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.rebase import run

    return run(
        arguments.image,
        base=arguments.base,
        base_format=arguments.base_format,
        unsafe=arguments.unsafe,
        options=arguments.options,
        secret=arguments.secret,
    )


def _revert(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.layers import run_revert

    return run_revert(arguments.image, arguments.name, options=arguments.options, secret=arguments.secret)


def _snapshots(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.snapshots import run

    return run(arguments.disk, as_json=arguments.json)


def _serve(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.serve import run

    return run(
        arguments.disks,
        listen=arguments.listen,
        unix=arguments.unix,
        systemd=arguments.systemd,
        tls_creds=arguments.tls_creds,
        target=arguments.target,
    )


def _receive(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.receive import run_receive

    return run_receive(
        arguments.url,
        arguments.image,
        keep_base=arguments.keep_base,
        base_format=arguments.base_format,
        hot_first=arguments.profile == "auto",
    )


def _migrate(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.migrate import Choices, prefix, run

    choices = Choices(
        qmp=arguments.qmp,
        qmp_target=arguments.qmp_target,
        ssh=prefix(arguments.ssh),
        program=prefix(arguments.program),
        listen=arguments.listen,
        tls_creds=arguments.tls_creds,
        start=arguments.start,
        uri=arguments.migrate_uri,
        log_file=arguments.log_file,
        keep_base=arguments.keep_base,
        base_format=arguments.base_format,
        trust_base=arguments.trust_base,
    )
    return run(arguments.disks, arguments.target, choices)


def _migrate_target(_arguments: argparse.Namespace) -> int:
    from fvdfs.commands.migrate_target import run

    return run()


def _activate(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.receive import run_activate

    return run_activate(arguments.disk, arguments.qmp)


def _abandon(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.receive import run_abandon

    return run_abandon(arguments.disk)


def _freeze(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.migration import run_freeze

    return run_freeze(arguments.disk, options=arguments.options, secret=arguments.secret)


def _thaw(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.migration import run_thaw

    return run_thaw(arguments.disk, lose_writes=arguments.lose_writes)


def _release(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.migration import run_release

    return run_release(arguments.disk)


def _upgrade(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.upgrade import run

    def check(words: list[str]) -> None:
        _mount(_parser().parse_args(words), upgrade=True)

    return run(arguments.mountpoint, arguments.options, check=check)


def _umount(arguments: argparse.Namespace) -> int:
    from fvdfs.commands.umount import run

    return run(arguments.mountpoint, lazy=arguments.lazy)


_OF_IMAGES = (_info, _check, _amend, _profile, _rebase, _revert)
"""What takes no raw files of a mount."""


def entry() -> None:
    """The program `fvdfs`."""
    daemon.prepare()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(daemon.run_program(main))
