"""Keeps a storage daemon running: where one has died, the next takes its place.

The first operation that finds the daemon dead starts another one; others wait for it, and each is done once more. What
the dead one had written and not flushed may be lost: the next flush says so, with EIO, to each caller that was waiting
for it or comes first.

The same is done when a daemon seems to have lost its server. QEMU's own way to connect again (`reconnect-delay`) does
not work behind its FUSE export, at least in 7.2, and would hide that a server that was started again may have lost
unflushed writes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from fvdfs.errors import FvdError, ImageError
from fvdfs.store.qemu_daemon import PROGRAM, STOP_TIMEOUT, StorageDaemon

log = logging.getLogger(__name__)

SERVER_TIMEOUT = 10.0  # seconds that operations wait for a lost server to be there again
_RETRY_INTERVAL = 0.2  # seconds between two attempts to start a daemon
_LOST_CONNECTION = (errno.ENOTCONN, errno.ECONNABORTED)
"""Errors of an export whose daemon has ended."""
_LOST_SERVER = (errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ESHUTDOWN)
"""Errors of a daemon whose server has ended."""

T = TypeVar("T")


class Supervisor:
    """The daemon of one image, whichever it is by now."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[StorageDaemon]],
        *,
        has_server: bool,
        writes_to_server: bool,
    ) -> None:
        """`start` starts a daemon for the image `name`, a part of which may be on a server."""
        self._name = name
        self._start = start
        self._has_server = has_server
        self._writes_to_server = writes_to_server
        self._daemon: StorageDaemon | None = None
        self._replacing = trio.Lock()
        self._failures = 0
        """How often no daemon could be started."""
        self._failure = ""
        """What the last of these was."""
        self._changes = 0
        """Changes that have ended."""
        self._stable = 0
        """How many of them the last flush has made stable."""
        self._losses = 0
        """Daemons that died with changes that were not stable."""
        self._told = 0
        """How many of those a flush has told of."""

    @property
    def pid(self) -> int:
        """The process of the daemon; 0 where none runs."""
        return self._daemon.pid if self._daemon is not None else 0

    async def start(self) -> None:
        """Start the first daemon. Only from the main thread. Raises as `StorageDaemon.start`."""
        self._daemon = await self._start()

    async def aclose(self) -> None:
        """As `stop`, also while a daemon is being replaced."""
        async with self._replacing:
            await trio.to_thread.run_sync(self.stop)

    def stop(self) -> None:
        """Stop the daemon; no operation may be under way. Blocks."""
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.stop(gently=True)

    # --- operations -------------------------------------------------------------------------------

    async def call(self, operation: Callable[[StorageDaemon], Awaitable[T]], *, changes: bool = False) -> T:
        """Do it; where the daemon is found dead, do it once more with another one. Raises OSError."""
        failures = self._failures
        daemon = self._current()
        if not daemon.gone:
            try:
                return await self._attempt(daemon, operation, changes=changes)
            except OSError as error:
                if not is_dead(daemon, error) and not (self._has_server and error.errno in _LOST_SERVER):
                    raise
        await self._replace(daemon, failures)
        daemon = self._current()
        if daemon.gone:
            raise OSError(errno.EIO, f"{self._name}: {PROGRAM} died again")
        try:
            return await self._attempt(daemon, operation, changes=changes)
        except OSError as error:
            if not is_dead(daemon, error):
                raise
            raise OSError(errno.EIO, f"{self._name}: {PROGRAM} died again: {daemon.last_words}") from error

    async def flush(self) -> None:
        """Make stable what was changed. Raises OSError, also where a daemon died and took changes with it."""

        async def flush(daemon: StorageDaemon) -> None:
            try:
                await daemon.export.flush()
            except OSError:
                daemon.flush_failed = True
                raise

        told, changes = self._told, self._changes
        if self._losses == told:
            await self.call(flush)
        if self._losses > told:
            self._told = self._losses
            raise OSError(errno.EIO, f"{self._name}: {PROGRAM} died; what was written and not flushed may be lost")
        self._stable = max(self._stable, changes)

    def _current(self) -> StorageDaemon:
        if self._daemon is None:
            raise OSError(errno.EBADF, f"{self._name}: is not open")
        return self._daemon

    async def _attempt(
        self, daemon: StorageDaemon, operation: Callable[[StorageDaemon], Awaitable[T]], *, changes: bool
    ) -> T:
        daemon.users += 1
        try:
            result = await operation(daemon)
            if changes:
                self._changes += 1
                if daemon.gone:  # it died between the answer and now, and was accounted for without this
                    self._losses += 1
            return result
        finally:
            daemon.users -= 1
            if daemon.gone and not daemon.users:  # the last one closes the export
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(daemon.stop)

    # --- the next daemon --------------------------------------------------------------------------

    async def _replace(self, dead: StorageDaemon, failures: int) -> None:
        """Put another daemon in the place of a dead one, unless that was done meanwhile.

        `failures`: the count when the caller began; if it has grown, the caller has waited for a failure, and gets it.
        Raises OSError.
        """
        async with self._replacing:
            if self._daemon is not dead:
                return
            if self._failures != failures:
                raise OSError(errno.EIO, self._failure)
            if not dead.gone:
                await self._bury(dead)
            if dead.alive:  # and its last writes may come after those of the next one
                raise self._failed(f"(process {dead.pid}) does not end")
            self._daemon = await self._start_another()
            log.warning("%s: %s runs again", self._name, PROGRAM)

    async def _start_another(self) -> StorageDaemon:
        deadline = trio.current_time() + (SERVER_TIMEOUT if self._has_server else 0)
        while True:
            try:
                return await self._start()
            except (FvdError, OSError) as error:
                if not isinstance(error, ImageError) or trio.current_time() >= deadline:
                    failed = self._failed(f"cannot be started again: {error}")
                    log.error("%s", self._failure)
                    raise failed from error
            await trio.sleep(_RETRY_INTERVAL)

    def _failed(self, reason: str) -> OSError:
        self._failures += 1
        self._failure = f"{self._name}: {PROGRAM} {reason}"
        return OSError(errno.EIO, self._failure)

    async def _bury(self, dead: StorageDaemon) -> None:
        """Make sure that it is dead, and account for what was lost with it."""
        dead.gone = True
        lost, self._stable = self._changes > self._stable, self._changes
        unreachable = dead.alive and self._has_server
        with trio.CancelScope(shield=True):
            # A server that was away may have lost what it had answered, and takes a flush now as if it had not.
            if lost and dead.alive and not dead.flush_failed and not self._writes_to_server:
                lost = not await self._flush_last(dead)
            # While operations are under way they hold the export, and the last one closes it.
            await trio.to_thread.run_sync(dead.kill if dead.users else dead.stop)
        self._losses += lost
        risk = "; what was written and not flushed may be lost" if lost else ""
        what = "cannot reach its server" if unreachable else f"died: {dead.last_words}"
        log.error("%s: %s %s%s", self._name, PROGRAM, what, risk)

    @staticmethod
    async def _flush_last(daemon: StorageDaemon) -> bool:
        """Whether a daemon that has had an error can still make stable what it wrote."""
        with trio.move_on_after(STOP_TIMEOUT):
            try:
                await trio.to_thread.run_sync(daemon.export.flush_now, abandon_on_cancel=True)
            except OSError:
                return False
            return True
        return False


def is_dead(daemon: StorageDaemon, error: OSError) -> bool:
    """Whether an operation has failed because the daemon has ended."""
    return not daemon.alive or error.errno in _LOST_CONNECTION
