"""What the host says of the folder and of the files in it.

Each question is asked in a thread (`looks.py`). Where no answer comes in time, what was known before is told.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from fvdfs.ops.freshness import signature
from fvdfs.ops.inodes import Attributes, Entry
from fvdfs.ops.looks import Look, Looks, late
from fvdfs.store.paths import PATIENCE, NoAnswer, Walker

T = TypeVar("T")


class HostAttributes:
    """Of one folder. All methods run in the event loop."""

    def __init__(self, folder: bytes, walker: Walker, looks: Looks) -> None:
        self._folder = folder
        self._walker = walker
        self._looks = looks
        self._last_answers: dict[str, Any] = {}

    async def acl(self, path: bytes, name: str) -> bytes:
        """The ACL of that name.

        Raises OSError: ENODATA where there is none, EIO where no answer comes: then nobody may do what it may forbid.
        """
        try:
            return await self._ask((path, name), functools.partial(self._walker.attribute, path, name))
        except NoAnswer:
            raise late(path) from None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # which the kernel would not take for "there is none"
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None
            raise

    async def names(self, path: bytes) -> list[str]:
        """The names of the extended attributes of a file; empty if not known."""
        try:
            return await self._ask((path, ""), functools.partial(self._walker.attributes, path))
        except (OSError, NoAnswer):
            return []

    async def of(self, entry: Entry, *, changed_by_us: bool = False) -> Attributes:
        """The attributes of an image, as its file is now; of a removed one, as it was. Raises OSError."""
        try:
            status = await self._ask(entry.inode, functools.partial(self._walker.stat, entry.path))
        except NoAnswer:
            return entry.attributes
        except FileNotFoundError:
            if entry.image is None:
                raise
            return entry.attributes
        # What somebody else has changed stays news for the next look, which gives it a new number.
        if changed_by_us or entry.busy or signature(status) == signature(entry.status):
            entry.status = status
        return entry.attributes

    async def folder_status(self) -> os.stat_result:
        """What the folder itself is, or was when it last answered. Raises OSError."""
        return await self._of_folder("status", self._walker.stat)

    async def space(self) -> os.statvfs_result:
        """What the folder's file system says of itself, or has last said. Raises OSError."""
        return await self._of_folder("space", self._walker.statvfs)

    async def _of_folder(self, key: str, call: Callable[[bytes], T]) -> T:
        try:
            self._last_answers[key] = await self._ask(key, functools.partial(call, self._folder))
        except NoAnswer:
            if key not in self._last_answers:
                raise late(self._folder) from None
        return cast(T, self._last_answers[key])

    async def _ask(self, key: Hashable, call: Callable[[], T]) -> T:
        """What the call returns. Raises NoAnswer where that takes too long, OSError."""

        def ask() -> T:
            with self._walker.looking():
                return call()

        look: Look[T] = self._looks.begin(key, ask)
        await self._looks.wait([look])
        if not look.ended.is_set():
            raise NoAnswer(f"no answer within {PATIENCE:g} s")
        return look.result
