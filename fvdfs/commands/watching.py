"""Waiting for changes of files: inotify(7). Blocks."""

from __future__ import annotations

import ctypes
import os
import select

_MODIFY, _ATTRIBUTES = 0x2, 0x4
_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Of some files."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def add(self, path: str) -> None:
        """Also of this one: its content, and its attributes. Raises OSError."""
        _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), _MODIFY | _ATTRIBUTES))

    def wait(self, seconds: float, *others: int) -> None:
        """Until one has changed since, or one of the other descriptors can be read, or so long."""
        if self._fd in select.select([self._fd, *others], [], [], seconds)[0]:
            os.read(self._fd, 1 << 16)

    def close(self) -> None:
        """End."""
        os.close(self._fd)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
