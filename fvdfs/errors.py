"""What can go wrong, by whose fault it is.

`UsageError` is the user's mistake: one line that says what to do, and an exit code. `ImageError` is
the image's: it cannot be opened, or not further. Errors of the operating system stay `OSError`; a
broken invariant of fvdfs itself is an `AssertionError`.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable, Iterator

_PASSWORDS = re.compile(
    r"""(://[^/@\s:%'"]*[:%])[^/@\s'"]+(?=@)|(\w*(?:pass(?:word|wd)|cookie)"?\s*[:=]\s*"?|:key=)[^",:\s]+"""
)
"""As in https://user:password@host/, iscsi://user%password@host/, "password": "…" of json:{...}, rbd:p/image:key=…"""


def without_passwords(text: str) -> str:
    """Text, with what a user may have written into a URL, though none is taken from there, left out."""
    return _PASSWORDS.sub(lambda found: (found[1] or found[2]) + "…", text)


def printable(text: str) -> str:
    """Text as one line that does nothing to a terminal or a log: names in images are any bytes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to ask who has written an unknown name: whether a known one was meant. Empty: none is like it."""
    import difflib  # takes long, and is seldom needed

    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


_NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a name that is nothing, or not what it should be."""
_REFUSALS = (
    *(errno.EACCES, errno.EROFS, errno.EBUSY, errno.ETXTBSY, errno.EIO),
    *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
)
"""What it says of names that are right."""


def leading(error: BaseException) -> BaseException:
    """The one error that a group comes to: an interrupt before a defect, that before what is anybody's fault."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    return min((leading(each) for each in error.exceptions), key=_rank)


def _rank(error: BaseException) -> int:
    if not isinstance(error, Exception):
        return 0
    return 2 if isinstance(error, FvdError | OSError) else 1


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Errors of the system tell which file they are about."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if error.filename or name in text:
            raise
        raise OSError(error.errno, f"{name}: {text}") from error


def reason_of(error: FvdError | OSError) -> str:
    """An error in words; one of the system: what, and not of which file."""
    if isinstance(error, FvdError):
        return str(error)
    return error.strerror or str(error)


def told(error: FvdError | OSError) -> str:
    """An error in words; one of the system: which file, where that is known, and what."""
    name = None if isinstance(error, FvdError) else error.filename
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    return (f"{name}: " if isinstance(name, str) and name else "") + reason_of(error)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that the error has ended; `cli` tells what they mean.

    Where something that was named cannot be used as it is, it matters not that the user has named it: the code is 1.
    """
    cause = error.__cause__
    while isinstance(error, UsageError) and isinstance(cause, UsageError):
        cause = cause.__cause__
    if isinstance(cause, _UNUSABLE) or (isinstance(cause, OSError) and cause.errno in _REFUSALS):
        return FvdError.exit_code
    if isinstance(error, FvdError):
        return error.exit_code
    return UsageError.exit_code if isinstance(error, OSError) and error.errno in _NAMES else FvdError.exit_code


def shortage(error: BaseException) -> int:
    """The error number where it is the host, or this process, that lacks something, and not the image; else 0."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return seen.errno
        seen = seen.__cause__
    return 0


class FvdError(Exception):
    """Base of fvdfs's own errors; its text is one line for a person."""

    exit_code = 1

    def __init__(self, text: str) -> None:
        super().__init__(without_passwords(printable(text)))


class UsageError(FvdError):
    """The user asked for something that cannot be done; the text says what to do instead."""

    exit_code = 2


class ImageError(FvdError):
    """An image cannot be used as it is; the text names the image, and field and value if one is to blame."""

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"{image}: {reason}")
        self.image = image
        self.reason = reason


class FormatError(ImageError):
    """The image breaks a rule of the format."""


class NotFvd(FormatError):
    """The file does not hold an FVD image at all."""


class UnsupportedFeature(ImageError):
    """The image asks for something that this version does not do."""


class UnstatedFormat(ImageError):
    """Nobody says what a base is that looks like another format than raw; the text says how to."""

    def __init__(self, image: str, reason: str, looks_like: str) -> None:
        super().__init__(image, reason)
        self.looks_like = looks_like


class Unreachable(ImageError):
    """What answers for a file of the image is away: a server, or the network to it."""


class Locked(ImageError):
    """A file of the image is encrypted, and its passphrase is missing or wrong."""


class Refused(ImageError):
    """The image points somewhere the user did not allow; the text names the option that would."""


class ImageBusy(ImageError):
    """Another process, or another mount, has the image open in a way that excludes this one."""


class ReadOnlyImage(ImageError):
    """The image, or its state, does not permit writing."""


class MovedAway(ReadOnlyImage):
    """The disk has moved to another host, or is not here yet; the text says what to do."""


class NotPermitted(ImageError):
    """The host does not let us write to a file of the image; `errno` is its answer."""

    def __init__(self, image: str, reason: str, errno: int) -> None:
        super().__init__(image, reason)
        self.errno = errno


class NotPermittedHere(FvdError):
    """The mount was not made to do this; the text names the option that would."""


_UNUSABLE = (FormatError, Unreachable, Locked, ImageBusy, NotPermitted)
