r"""The options of `-o`: how they are written, and what they may be.

    name[=value][,name[=value]...]

In a value `\,` stands for a comma, `\:` for a colon that separates nothing, `\\` for a backslash. An option that
takes several values (`Option.separator`) may be given more than once; another one only with the same value. Hints in
messages are quoted for a shell, and work also as they stand: an option that begins with a quote is taken apart as a
shell would.

To add one, give it a row in `_ROWS` and use it in `commands/mount.py`.

Beside them stand the options of mount(8), which /etc/fstab may hold for any file system: `without_those_of_mount8`.

Reading options looks at nothing; `folders`, `passphrase_file` and `program` look whether what is named is there.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from fvdfs.errors import UsageError, nearest
from fvdfs.sizes import parse_size

MAX_PORT = 65535
MAX_JOBS = 1024  # reads of prefetching under way; more than any server answers at a time


def _anything(value: str) -> None:
    """Whether it makes sense shows when it is used."""


def _one_of(*values: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if value not in values:
            raise ValueError(f"must be {' or '.join(values)}")

    return check


def _url(value: str) -> None:
    if not re.match(r"[a-z][a-z0-9+.-]*://|rbd:", value, re.IGNORECASE):
        raise ValueError("is no beginning of a URL, such as nbd://10.0.0.1/")


def _base_format(value: str) -> None:
    from fvdfs.store.references import BASE_FORMATS

    if value not in BASE_FORMATS:
        raise ValueError(f"is not known; known are {', '.join(BASE_FORMATS)}")


def _cap(value: str) -> None:
    if not parse_size(value):
        raise ValueError("leave it out for no cap; fvdfs prefetch pauses and stops a disk's")


def _on_base_error(value: str) -> None:
    from fvdfs.store.outage import OnLoss

    OnLoss.of(value)


def _jobs(value: str) -> None:
    if not (re.fullmatch("[0-9]{1,4}", value) and 1 <= int(value) <= MAX_JOBS):
        raise ValueError(f"must be a number from 1 to {MAX_JOBS}")


def metrics_address(value: str) -> tuple[str, int | None]:
    """Host and port that `metrics` names; of a socket its path, and None. Raises ValueError."""
    if value.startswith("unix:"):
        if not os.path.isabs(path := value.removeprefix("unix:")):
            raise ValueError("must be an absolute path")
        return path, None
    found = re.fullmatch(r"\[?([^][]+?)\]?:([0-9]{1,5})", value)
    if found is None or int(found[2]) > MAX_PORT:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:9101, or unix:PATH")
    return found[1], int(found[2])


class Option(NamedTuple):
    """What an option is like."""

    form: str
    """How it is written; one without `=` takes no value."""
    help: str
    check: Callable[[str], object] = _anything
    """Raises ValueError for a value that makes no sense, or for one of several; the text says why."""
    separator: str = ""
    """What stands between several values; empty where there is one."""


_ROWS = (
    Option(
        "base_path=DIR[:DIR...]",
        "folders outside DIR that bases and data files may lie in (/: anywhere)",
        separator=":",
    ),
    Option(
        "allow_url=PREFIX", "URLs that bases and data files may be (may be given more than once)", _url, separator="\n"
    ),
    Option(
        "base_format=FMT[:FMT...]",
        "what bases are that look like it where no image says it; or raw",
        _base_format,
        separator=":",
    ),
    Option("secret=FILE", "the passphrase of encrypted bases and data files"),
    Option("credentials=FILE", "who we are for servers, and passphrases, by prefixes of URLs and paths"),
    Option("tls_creds=DIR", "certificates (ca-cert.pem, …) or pre-shared keys (keys.psk) for servers of nbds://"),
    Option(
        "on_base_error=wait[=TIME]|eio",
        "requests that need a base whose server is away: wait for it, or for so long at most, such as 60s, 5m or 1h; "
        "or fail after 10 s (default: eio)",
        _on_base_error,
    ),
    Option("accept_unclean", "write to an image that crashed without a journal"),
    Option("grow_command=none|stored|PROGRAM", "what makes a full device larger (default: none)"),
    Option(
        "detect_zeroes=off|on|punch",
        "do not store zeros where zeros are read; punch: free their space too",
        _one_of("off", "on", "punch"),
    ),
    Option("allow_base_write", "let images that ask for it (create --update-base) write to their base"),
    Option("prefetch_max=BYTES", "a second that prefetching may read, for all images together (default: no cap)", _cap),
    Option(
        "prefetch_jobs=N",
        "reads that prefetching may have under way, for all images together (default: 4), four times as many for those "
        "that follow their machine",
        _jobs,
    ),
    Option("create", "let new files NAME.raw be made, as new images, and disks be renamed"),
    Option("remove", "let disks be removed, with their images"),
    Option("new_base=FILE|URL", "what new disks become clones of, unless their maker writes more than zeros"),
    Option("new_layout=flat|compact", "how new disks are laid out (default: flat)", _one_of("flat", "compact")),
    Option("metrics=HOST:PORT|unix:PATH", "where to tell Prometheus what the mount does", metrics_address),
    Option("record_profile", "record what is read first from images that have no profile yet"),
    Option("shrink", "permit truncating a disk to a smaller size"),
    Option(
        "sync=none|flush|always",
        "when a write is made durable: some seconds later, at a flush (default), at once",
        _one_of("flush", "none", "always"),
    ),
    Option(
        "io_uring=on|off",
        "have the kernel wait for the disk where it can, instead of threads (default: on)",
        _one_of("on", "off"),
    ),
    Option(
        "writeback=auto|on|off",
        "let the kernel gather writes; auto (default): unless it may read and write data files of images by itself",
        _one_of("auto", "on", "off"),
    ),
    Option(
        "locking=on|off",
        "take QEMU's image locks, and respect them, beside fvdfs's own (default: on)",
        _one_of("on", "off"),
    ),
    Option("keep", "have disks stay open when fvdfs is killed or fails: another process goes on"),
    Option("nokeep", "the default"),
    Option("log_file=FILE", "like --log-file"),
    Option("replace", "like --replace"),
    Option("allow_other", "like --allow-other"),
    Option("ro", "like --read-only"),
    Option("rw", "the default"),
)
MOUNT_OPTIONS = {option.form.partition("=")[0]: option for option in _ROWS}

# --- the options of mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS" -----------------------------

_OF_THE_KERNEL = {"suid", "nosuid", "dev", "nodev", "exec", "noexec", "noatime", "nodiratime", "dirsync"}
"""What fusermount3 has the kernel see to."""
_OF_NO_EFFECT = {
    # For mount(8) and systemd.
    *("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "silent", "loud"),
    # What a mount of fvdfs is in any case, or what makes no difference to it.
    *("async", "default_permissions", "atime", "diratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("lazytime", "nolazytime", "symfollow", "nosymfollow", "iversion", "noiversion", "mand", "nomand"),
}
_OF_OTHERS = ("x-", "X-", "comment=", "user=")
"""How options begin that are notes for other programs."""
_OWNERS = {"uid", "gid", "umask", "fmask", "dmask"}


def without_those_of_mount8(texts: Sequence[str], *, sloppy: bool = False) -> tuple[list[str], list[str]]:
    """Our own options of all -o arguments, each by itself, and those of mount(8) that the kernel sees to.

    `sloppy`: leave out what nobody knows. Raises UsageError for what other file systems can do, and no mount of fvdfs.
    """
    ours: list[str] = []
    kernels: list[str] = []
    for option in (option for text in texts for option in _split(_unquoted(text), ",")):
        name = option.partition("=")[0]
        if option == "remount":
            raise UsageError("-o remount: the options of a mount stay; unmount it, and mount it with others")
        if name in _OWNERS:
            raise UsageError(f"-o {name}: a disk has the owner and the mode of its image; chown or chmod that")
        if option in _OF_THE_KERNEL:
            kernels.append(option)
        elif option == "sync":
            ours.append("sync=always")
        elif not (option in _OF_NO_EFFECT or option.startswith(_OF_OTHERS) or (sloppy and name not in MOUNT_OPTIONS)):
            ours.append(option.replace(",", r"\,"))
    return ours, kernels


def parse_mount_options(texts: Sequence[str], known: Collection[str] = MOUNT_OPTIONS.keys()) -> dict[str, str]:
    """The options of all -o arguments by name; of those with several values `listed` gives these.

    `known`: the names that the command permits. Raises UsageError for nonsense.
    """
    result: dict[str, str] = {}
    for text in texts:
        for option in _split(_unquoted(text), ","):
            if option:
                _add(result, option)
    if "ro" in result and "rw" in result:
        raise UsageError("-o ro and -o rw: choose one")
    if "keep" in result and "nokeep" in result:
        raise UsageError("-o keep and -o nokeep: choose one")
    for name, value in result.items():
        if name not in known:
            raise UsageError(f"-o {name}: is not for this command, which takes {', '.join(known)}")
        _check(name, listed(result, name) if MOUNT_OPTIONS[name].separator else [value])
    return result


def _add(options: dict[str, str], text: str) -> None:
    """Add an option as it is written. Raises UsageError where that is not its form, or contradicts an earlier one."""
    name, equals, value = text.partition("=")
    option = MOUNT_OPTIONS.get(name)
    if option is None:
        hint = nearest(name, MOUNT_OPTIONS) or f"; there are: {', '.join(MOUNT_OPTIONS)}"
        raise UsageError(f"-o {name}: unknown{hint}")
    if "=" in option.form and not value:
        raise UsageError(f"-o {name}: needs a value: {option.form}")
    if "=" not in option.form and equals:
        raise UsageError(f"-o {name}={value}: {name} takes no value")
    if option.separator:
        options[name] = f"{options[name]}{option.separator}{value}" if name in options else value
        return
    value = _plain(value)
    if options.get(name, value) != value:
        raise UsageError(f"-o {name}: is given twice, as {options[name]} and as {value}")
    options[name] = value


def _check(name: str, values: Sequence[str]) -> None:
    for value in values:
        try:
            MOUNT_OPTIONS[name].check(value)
        except ValueError as error:
            raise UsageError(f"-o {name}={value}: {error}") from None


def listed(options: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The values of an option that takes several."""
    return tuple(_plain(value) for value in _split(options.get(name, ""), MOUNT_OPTIONS[name].separator) if value)


def allowed_urls(options: Sequence[str]) -> tuple[str, ...]:
    """What a command that takes `-o allow_url` alone was given. Raises UsageError."""
    return listed(parse_mount_options(options, ("allow_url",)), "allow_url")


def hint(name: str, value: str) -> str:
    """An option with one value as a user has to write it."""
    special = r"([\\,:])" if MOUNT_OPTIONS[name].separator == ":" else r"([\\,])"
    return shlex.quote(f"{name}=" + re.sub(special, r"\\\1", value))


def _unquoted(text: str) -> str:
    if not text.startswith(("'", '"')):
        return text
    try:
        return " ".join(shlex.split(text))
    except ValueError:
        return text


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators. Backslashes stay, but one before a comma that was no separator goes."""
    parts = [""]
    at = 0
    while at < len(text):
        if text[at] == "\\" and at + 1 < len(text):
            parts[-1] += "," if text[at + 1] == separator == "," else text[at : at + 2]
            at += 2
        elif text[at] == separator:
            parts.append("")
            at += 1
        else:
            parts[-1] += text[at]
            at += 1
    return parts


def _plain(value: str) -> str:
    return re.sub(r"\\([\\:])", r"\1", value)


def folders(options: Mapping[str, str]) -> tuple[str, ...]:
    """Real paths of the folders, or single files and devices, of base_path. Raises UsageError."""
    from fvdfs.store.paths import in_time, real_path

    found = []
    for path in listed(options, "base_path"):
        if not os.path.isabs(path):
            raise UsageError(f"-o base_path={path}: must be an absolute path")
        if not in_time(functools.partial(os.path.exists, path), True):
            raise UsageError(f"-o base_path={path}: there is no such directory")
        found.append(real_path(path))
    return tuple(found)


def passphrase_file(option: str, path: str) -> str:
    """The absolute path of a file with a passphrase. Raises UsageError where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"{option}{path}: is no regular file; name the file with the passphrase")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UsageError(f"{option}{path}: {error.strerror}") from error
    return os.path.abspath(path)


def tls_credentials(option: str, folder: str) -> str:
    """The absolute path of the file that says what the credentials in a folder are. Raises UsageError."""
    from fvdfs.store.paths import in_time
    from fvdfs.store.qemu_nodes import TLS_FILES

    for name in TLS_FILES:
        path = os.path.join(os.path.abspath(folder), name)
        if in_time(functools.partial(os.access, path, os.R_OK), True):
            return path
    raise UsageError(f"{option}{folder}: has neither {TLS_FILES[0]} nor {TLS_FILES[1]} that can be read")


def credentials_file(option: str, path: str) -> str:
    """The absolute path of a file with credentials. Raises UsageError where it, or what it names, cannot be used."""
    from fvdfs.store.lending import read_credentials

    path = os.path.abspath(path)
    try:
        read_credentials(path)
    except UsageError as error:
        raise UsageError(f"{option}{error}") from error
    return path


def program(choice: str) -> str:
    """What grow_command says: none, stored, or the absolute path of the program. Raises UsageError."""
    if choice in ("none", "stored"):
        return choice
    found = shutil.which(choice)
    if found is None:
        raise UsageError(f"-o grow_command={choice}: there is no such program; or write none or stored")
    return os.path.abspath(found)
