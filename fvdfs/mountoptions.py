r"""The options of `-o`: how they are written, and what they may be.

    name[=value][,name[=value]...]

In a value `\,` stands for a comma, `\:` for a colon that separates nothing, `\\` for a backslash. Options that name
several things (`LISTS`) may be given more than once; another one only if it says the same. Hints in messages are
quoted as a shell needs it, and can also be handed over as they stand: an option that begins with a quote is
taken apart as a shell would.

Reading them looks at nothing; `folders`, `passphrase_file` and `program` look whether what is named is there.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import stat
from collections.abc import Mapping, Sequence

from fvdfs.errors import UsageError
from fvdfs.store.paths import in_time, real_path

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
LISTS = {"base_path": ":", "base_format": ":", "allow_url": "\n"}
"""Options that add up, and what stands between their values then."""
CHOICES = {
    "io_uring": ("on", "off"),
    "writeback": ("on", "off"),
    "locking": ("on", "off"),
    "detect_zeroes": ("off", "on", "punch"),
    "sync": ("flush", "none", "always"),
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|rbd:", re.IGNORECASE)


def parse_mount_options(texts: Sequence[str]) -> dict[str, str]:
    """The options of all -o arguments; `listed` takes those of `LISTS` apart. Raises UsageError for nonsense."""
    result: dict[str, str] = {}
    for text in texts:
        for option in _split(_unquoted(text), ","):
            if not option:
                continue
            name, equals, value = option.partition("=")
            usage = MOUNT_OPTIONS.get(name)
            if usage is None:
                raise UsageError(f"-o {name}: unknown; there are: {', '.join(MOUNT_OPTIONS)}")
            if "=" in usage.split(" ")[0]:
                if not value:
                    raise UsageError(f"-o {name}: needs a value: {usage.split('  ')[0]}")
            elif equals:
                raise UsageError(f"-o {name}={value}: {name} takes no value")
            if name not in LISTS:
                value = _plain(value)
                if result.get(name, value) != value:
                    raise UsageError(f"-o {name}: is given twice, as {result[name]} and as {value}")
                result[name] = value
            else:
                result[name] = f"{result[name]}{LISTS[name]}{value}" if name in result else value
    if "ro" in result and "rw" in result:
        raise UsageError("-o ro and -o rw: choose one")
    for name, values in CHOICES.items():
        if result.get(name, values[0]) not in values:
            raise UsageError(f"-o {name}={result[name]}: must be {' or '.join(values)}")
    for url in listed(result, "allow_url"):
        if not _URL.match(url):
            raise UsageError(f"-o allow_url={url}: is no beginning of a URL, such as nbd://10.0.0.1/")
    return result


def listed(options: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The values of an option of `LISTS`."""
    return tuple(_plain(value) for value in _split(options.get(name, ""), LISTS[name]) if value)


def hint(name: str, value: str) -> str:
    """An option with one value as a user has to write it."""
    special = r"([\\,:])" if LISTS.get(name) == ":" else r"([\\,])"
    return shlex.quote(f"{name}=" + re.sub(special, r"\\\1", value))


def _unquoted(text: str) -> str:
    if not text.startswith(("'", '"')):
        return text
    try:
        return " ".join(shlex.split(text))
    except ValueError:
        return text


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators, backslashes and all; but for a comma: it separates nothing any more."""
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


def program(choice: str) -> str:
    """What grow_command says: none, stored, or the absolute path of the program. Raises UsageError."""
    if choice in ("none", "stored"):
        return choice
    found = shutil.which(choice)
    if found is None:
        raise UsageError(f"-o grow_command={choice}: there is no such program; or write none or stored")
    return os.path.abspath(found)
