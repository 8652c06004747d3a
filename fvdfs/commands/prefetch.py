"""`fvdfs prefetch`: start, pause or stop prefetching a mounted disk. Blocks.

The process that serves the mount is told so, through an extended attribute.
"""

from __future__ import annotations

import errno
import os

from fvdfs.commands.attributes import explained, facts, unwritable
from fvdfs.errors import UsageError
from fvdfs.xattrs import PREFETCH, STATUS


def run(command: str, raw: str) -> int:
    """Start, pause or stop prefetching the image behind a raw file. Raises UsageError, OSError."""
    with explained(raw):
        # Another file system might take the attribute, and think nothing of it.
        facts(raw, STATUS)
        try:
            os.setxattr(raw, PREFETCH, command.encode())
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"{raw}: nothing is being prefetched; see fvdfs status") from None
            if error.errno == errno.EROFS:
                raise unwritable(raw) from error
            raise
        if command == "start" and facts(raw, STATUS).get("base_size") == 0:
            raise UsageError(f"{raw}: has no base, and so nothing to prefetch")
    return 0
