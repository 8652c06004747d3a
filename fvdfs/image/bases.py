"""What images stand on, open once for all of one mount: base images, files and servers.

The first who stands on a base opens it, the last who leaves closes it. Meanwhile it is one object: its bitmap and table
are in memory once, its locks are held once, and of several who want the same bytes of what is below it, one reads
them. A base that may be written to (`writethrough`) is not shared.

Who opens or closes something holds the locks of its keys (`changing`), so that nobody finds a base that is being
closed, and no two open the same one. They are taken in one order, and only those who use the same bases wait for
each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import trio

User = TypeVar("User")
Base = TypeVar("Base")

Key = tuple[str, ...]
"""What tells two bases apart: the format, the file or URL, and for an FVD image the folder that names inside are of."""


class Bases(Generic[User, Base]):
    """The bases of one mount, or of one chain: each `Base`, or a `User` that others stand on."""

    def __init__(self) -> None:
        self.before_closing: Callable[[User], Awaitable[None]] | None = None
        """Ends what others do with a base image."""
        self._open: dict[Key, Base | User] = {}
        self._keys: dict[Base | User, Key] = {}
        self._users: dict[Base | User, set[User]] = {}
        self._locks: WeakValueDictionary[Key, trio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def changing(self, keys: Iterable[Key]) -> AsyncIterator[None]:
        """Nobody else opens or closes what has these keys meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted(set(keys)):
                lock = self._locks.setdefault(key, trio.Lock())
                await stack.enter_async_context(lock)
            yield

    def find(self, key: Key) -> Base | User | None:
        """The base, if it is open."""
        return self._open.get(key)

    def add(self, key: Key, base: Base | User) -> None:
        """It is open from now on. Whoever stands on it has to `enter`, before the locks of the key are let go."""
        assert key not in self._open
        self._open[key], self._keys[base] = base, key

    def enter(self, base: Base | User, user: User) -> None:
        """`user` stands on the base."""
        self._users.setdefault(base, set()).add(user)

    def exchange(self, base: Base | User, former: User, user: User) -> None:
        """`user` stands on the base, and `former` does not any more."""
        self._users[base].add(user)
        self._users[base].discard(former)

    def drop(self, base: Base | User) -> None:
        """Nobody stands on it any more, and nobody finds it; it is not closed."""
        self._users.pop(base, None)
        if (key := self._keys.pop(base, None)) is not None:
            del self._open[key]

    def rename(self, base: Base | User, key: Key) -> None:
        """It has another key, if it had one."""
        if (former := self._keys.get(base)) is not None:
            del self._open[former]
            self._open[key], self._keys[base] = base, key

    def above(self, base: Base | User) -> set[User]:
        """Everyone who stands on it, or on one who does."""
        found: set[User] = set()
        waiting = [base]
        while waiting:
            new = self._users.get(waiting.pop(), set()) - found
            found |= new
            waiting.extend(new)
        return found

    @contextlib.asynccontextmanager
    async def leaving(self, base: Base | User, user: User) -> AsyncIterator[bool]:
        """`user` leaves the base; whether it was the last, who has to close it meanwhile."""
        users = self._users[base]
        users.discard(user)
        key = self._keys.get(base)
        async with self.changing([key] if key is not None else []):
            is_last = not users and self._users.pop(base, None) is not None
            if is_last and key is not None:
                del self._open[key], self._keys[base]
            yield is_last
