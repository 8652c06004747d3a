"""What a request that failed is answered with, and what the log says of it."""

from __future__ import annotations

import errno
import os

from fvdfs.errors import FvdError, ImageBusy, NotPermitted, NotPermittedHere, ReadOnlyImage, Refused, shortage, told
from fvdfs.ops.complaints import Complaints
from fvdfs.store.outage import Lost

# Errors that are plain answers, not worth a line in the log.
_ANSWERS = frozenset(
    {
        errno.ENOENT,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
        errno.ENAMETOOLONG,
        errno.ENODATA,
        errno.ENXIO,
        errno.EOPNOTSUPP,
    }
)


def error_number(error: BaseException, what: str, complaints: Complaints) -> int:
    """The errno for the kernel; `complaints` gets what only the log can say. `what`: the request, for the log.

    An error that nobody foresaw is logged with its traceback, and is EIO: it must not end the mount.
    """
    if isinstance(error, OSError) and error.errno:
        if error.errno not in _ANSWERS and not isinstance(error, Lost | InterruptedError):
            complaints.say(f"{what}: {told(error)}", f"{what}: {os.strerror(error.errno)}")
        return error.errno
    if isinstance(error, FvdError):
        complaints.say(str(error), str(error))
        return _number(error)
    complaints.say(f"{what}: unforeseen error", f"{what}: {type(error).__name__}", trace=error)
    return errno.EIO


def _number(error: FvdError) -> int:
    match error:
        case ImageBusy():
            return errno.EBUSY
        case ReadOnlyImage():
            return errno.EROFS
        case NotPermitted():
            return error.errno
        case NotPermittedHere():
            return errno.EPERM
        case Refused():
            return errno.EACCES
        case _:
            return shortage(error) or errno.EIO
