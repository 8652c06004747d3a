"""Keeps a storage daemon running: where one has died, the next takes its place.

The first operation that finds the daemon dead has another one started; all wait for that, and each is done once more.
What the dead one had written and not flushed may be lost: the next flush says so, with EIO, to each caller that was
waiting for it or comes first.

The same is done when a daemon seems to have lost its server, which is then away (`outage.Outage`), and looked for until
it is back, by a task of the event loop. QEMU's own way to connect again (`reconnect-delay`) does not work behind its
FUSE export, at least in 7.2, and would hide that a server that was started again may have lost unflushed writes. The
libraries for iSCSI and NFS do connect again, so a daemon of theirs that has lost its connection is given up as well,
and what was answered by another connection counts for nothing.

Where a raw disk on an NBD server is only read, a connection of our own (`nbd_reader`) takes the place of the daemon.

While operations are under way, the connection is watched (`connecting.silence`): a daemon whose server is not heard any
more is killed. One that is heard and answers nothing is waited for, as is any share that hangs, for a minute: then
it counts as away, too, and the connection is made anew. Not where it is written to: what it has received and not
answered it might still do, after the writes of the next connection.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from fvdfs.errors import FvdError, ImageError, Unreachable
from fvdfs.store.nbd_reader import NbdReader
from fvdfs.store.outage import OnLoss, Outage
from fvdfs.store.qemu_daemon import STOP_TIMEOUT, StorageDaemon
from fvdfs.store.qemu_words import PROGRAM
from fvdfs.store.web_reader import WebReader

log = logging.getLogger(__name__)

SERVER_TIMEOUT = 10.0  # seconds after the loss of a server in which operations wait for it
HANG_TIMEOUT = 60.0  # seconds without an answer after which a server counts as away that still has the connection
_RETRY_INTERVAL = 0.2  # seconds between two attempts to start a daemon, while operations wait
_LATER_INTERVAL = 1.0  # seconds between two attempts after that, and before one where it was lost at once again
_WATCH_INTERVAL = 1.0  # seconds between two looks at the connection
_LOST_CONNECTION = (errno.ENOTCONN, errno.ECONNABORTED)
"""Errors of an export whose daemon has ended."""
_LOST_SERVER = (errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ESHUTDOWN)
"""Errors of a daemon whose server has ended."""

T = TypeVar("T")


class Files(Protocol):
    """What the daemon opens."""

    @property
    def has_server(self) -> bool:
        """Whether any part is on a server."""

    @property
    def writes_to_server(self) -> bool:
        """Whether the daemon writes to one."""


Server = StorageDaemon | NbdReader | WebReader
"""What answers here: a daemon, or a connection to the server itself."""


class Supervisor:
    """The daemon of one image, or the connection, whichever it is by now."""

    def __init__(
        self, name: str, start: Callable[[], Awaitable[Server]], files: Files, on_loss: OnLoss = OnLoss.REFUSE
    ) -> None:
        """`start` starts a daemon for the image `name`; `on_loss`: of a server."""
        self._name = name
        self._start = start
        self._files = files
        self._on_loss = on_loss
        self._daemon: Server | None = None
        self.outage: Outage | None = None
        """The last one, while it lasts and after it."""
        self._is_hopeless = False
        self._replacing = trio.Lock()
        self._connecting = trio.CancelScope()
        self._is_watched = False
        self._under_way = 0
        """Operations of all daemons."""
        self._answered = 0.0
        """When an operation has ended last, by trio's clock."""
        self._hang: Outage | None = None
        """That operations do not end."""
        self._is_closed = False
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
        """The process of the daemon; 0 where none was started."""
        return self._daemon.pid if self._daemon is not None else 0

    @property
    def _patience(self) -> float:
        return SERVER_TIMEOUT if self._on_loss.patience is None else self._on_loss.patience

    @property
    def is_away(self) -> bool:
        """Whether the server is away, or the daemon being replaced."""
        return self.outage is not None and self.outage.is_away

    async def start(self) -> None:
        """Start the first daemon. Only from the main thread. Raises as `StorageDaemon.start`.

        Without a server that is away, unless that is to be refused.
        """
        try:
            self._daemon = await self._start()
        except Unreachable as error:
            if not self._on_loss.opens:
                raise
            self._lose_server(error.reason)

    async def aclose(self) -> None:
        """As `stop`, also while a daemon is being replaced."""
        async with self._replacing:
            self._is_closed = True
            if self.outage is not None and self.is_away:
                self._connecting.cancel()
                await self.outage.ended.wait()
            await trio.to_thread.run_sync(self.stop)

    def stop(self) -> None:
        """Stop the daemon; no operation may be under way. Blocks."""
        self._is_closed = True
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.stop(gently=True)

    def let_go(self) -> None:
        """Have all fail that wait for a server, from now on: the mount ends."""
        self._is_hopeless = True
        if self.outage is not None:
            self.outage.let_go()

    # --- operations -------------------------------------------------------------------------------

    async def call(self, operation: Callable[[Server], Awaitable[T]], *, changes: bool = False) -> T:
        """Do it; where the daemon is found dead, or without its server, do it once more with another one.

        Raises OSError; `outage.Lost` while the server is away.
        """
        has_failed, last = False, self.outage
        while True:
            daemon = await self._running(last)
            try:
                return await self._attempt(daemon, operation, changes=changes)
            except OSError as error:
                if not is_dead(daemon, error) and not self._has_lost_server(daemon, error):
                    if error.errno == errno.EFAULT:  # libnfs's word for what it does not expect, as a stale handle
                        raise OSError(errno.EIO, f"{self._name}: the server has refused it") from error
                    raise
                if has_failed and not (self._on_loss.waits and self._files.has_server):
                    again = "its server was lost" if isinstance(daemon, NbdReader | WebReader) else f"{PROGRAM} died"
                    raise OSError(errno.EIO, f"{self._name}: {again} again: {daemon.last_words}") from error
                await self._lose(daemon, error)
            has_failed = True

    async def flush(self) -> None:
        """Make stable what was changed. Raises OSError, also where a daemon died and took changes with it."""

        async def flush(daemon: Server) -> None:
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

    async def _running(self, last: Outage | None) -> Server:
        """The daemon, once there is one. `last`: the outage before the operation. Raises OSError."""
        while True:
            if self._is_closed:
                raise OSError(errno.EBADF, f"{self._name}: is not open")
            if self.outage is not None and (self.is_away or (self.outage.failure and self.outage is not last)):
                await self.outage.wait(self._name)
            elif self._daemon is not None and not self._daemon.gone:
                return self._daemon
            else:
                async with self._replacing:  # one that is being buried is replaced then
                    if (self._daemon is None or self._daemon.gone) and not self.is_away:
                        self._begin_outage("no daemon runs")

    async def _attempt(self, daemon: Server, operation: Callable[[Server], Awaitable[T]], *, changes: bool) -> T:
        if not self._under_way:
            self._answered = trio.current_time()
        self._under_way += 1
        daemon.users += 1
        self._watch()
        try:
            result = await operation(daemon)
            if daemon.is_cut_off:  # who has answered is perhaps another one, or has lost what was written before
                raise OSError(errno.ECONNRESET, "the server has ended the connection")
            if changes:
                self._changes += 1
                if daemon.gone:  # it died between the answer and now, and was accounted for without this
                    self._losses += 1
            return result
        finally:
            self._has_answered()
            self._under_way -= 1
            daemon.users -= 1
            if daemon.gone and not daemon.users:  # the last one closes the export
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(daemon.stop)

    def _has_lost_server(self, daemon: Server, error: OSError) -> bool:
        """Whether that is why an operation has failed. EIO may also be an error of the server's own disk."""
        if not self._files.has_server or (error.errno not in _LOST_SERVER and not daemon.is_cut_off):
            return False
        return error.errno != errno.EIO or not daemon.is_connected

    # --- is the server still there? ---------------------------------------------------------------

    def _watch(self) -> None:
        """Have the connection be watched while there are operations."""
        if self._files.has_server and not self._is_watched:
            self._is_watched = True
            trio.lowlevel.spawn_system_task(self._keep_watching)

    async def _keep_watching(self) -> None:
        try:
            while self._under_way:
                if (daemon := self._daemon) is not None and daemon.users and not daemon.gone:
                    await trio.to_thread.run_sync(daemon.kill_if_silent)
                await trio.sleep(_WATCH_INTERVAL)
                if self._under_way and trio.current_time() - self._answered > SERVER_TIMEOUT:
                    self._say_that_it_hangs()
                if self._under_way and trio.current_time() - self._answered > HANG_TIMEOUT:
                    await self._take_for_lost()
        finally:
            self._is_watched = False

    def _say_that_it_hangs(self) -> None:
        if self.outage is None or self.outage.until is not None:
            self.outage = self._hang = Outage(f"its server has not answered for {SERVER_TIMEOUT:.0f} s", hangs=True)
            log.error("%s: %s; what needs it waits", self._name, self._hang.reason)

    async def _take_for_lost(self) -> None:
        """It has the connection, and has not answered for too long."""
        daemon = self._daemon
        if daemon is None or daemon.gone or self._files.writes_to_server:
            return
        hang, self._hang = self._hang, None
        if hang is not None:
            hang.end()
        daemon.verdict = f"its server has not answered for {HANG_TIMEOUT:.0f} s"
        await trio.to_thread.run_sync(daemon.kill)

    def _has_answered(self) -> None:
        """Something has ended, perhaps by an error."""
        self._answered = trio.current_time()
        hang, self._hang = self._hang, None
        if hang is not None:
            hang.end()
            log.warning("%s: its server has answered after %.0f s", self._name, hang.seconds + SERVER_TIMEOUT)

    # --- the next daemon --------------------------------------------------------------------------

    async def _lose(self, dead: Server, error: OSError) -> None:
        """Bury a dead daemon, and have another one take its place, unless that was done meanwhile."""
        async with self._replacing:
            if self._daemon is not dead or dead.gone or self._is_closed:
                return
            reason = await self._bury(dead, error)
            if self._files.has_server:
                self._lose_server(reason)
            else:
                self._begin_outage(reason)

    def _lose_server(self, reason: str) -> None:
        then = "what needs it waits" if self._patience == math.inf else f"for {self._patience:.0f} s it is waited for"
        log.error("%s: its server is lost: %s; %s", self._name, reason, then)
        self._begin_outage(reason)

    def _begin_outage(self, reason: str) -> None:
        last = self.outage
        self.outage = outage = Outage(reason, patience=self._patience)
        if self._is_hopeless:
            outage.let_go()
        too_soon = last is not None and last.until is not None and outage.since - last.until < _LATER_INTERVAL
        self._connecting = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._replace, outage, self._daemon, too_soon)

    async def _replace(self, outage: Outage, dead: Server | None, too_soon: bool) -> None:
        """End the outage, by a daemon that runs, or by a failure."""
        failure = "it was closed"
        try:
            with self._connecting:
                failure = await self._start_another(outage, dead, too_soon)
        except Exception as error:
            log.exception("%s: %s cannot be started again", self._name, PROGRAM)
            failure = str(error)
        finally:
            outage.end(failure)

    async def _start_another(self, outage: Outage, dead: Server | None, too_soon: bool) -> str:
        """Start one, as often as it takes where there is a server; why there is none, or nothing."""
        if too_soon and self._files.has_server:
            await trio.sleep(_LATER_INTERVAL)
        while True:
            try:
                if dead is not None and dead.alive:  # its last writes may come after those of the next one
                    raise ImageError(self._name, f"{PROGRAM} (process {dead.pid}) does not end")
                self._daemon = await self._start()
                break
            except (FvdError, OSError) as error:
                reason = error.reason if isinstance(error, ImageError) else str(error)
                if not self._files.has_server:
                    log.error("%s: %s cannot be started again: %s", self._name, PROGRAM, reason)
                    return f"{PROGRAM} cannot be started again: {reason}"
                if not isinstance(error, Unreachable) and reason != outage.reason:
                    log.error("%s: its server is there, but: %s", self._name, reason)
                outage.reason = reason
            await trio.sleep(_RETRY_INTERVAL if outage.seconds < SERVER_TIMEOUT else _LATER_INTERVAL)
        if self._files.has_server:
            log.warning("%s: its server is back after %.1f s", self._name, outage.seconds)
        else:
            log.warning("%s: %s runs again", self._name, PROGRAM)
        return ""

    async def _bury(self, dead: Server, error: OSError) -> str:
        """Make sure that it is dead, and account for what was lost with it; why it is dead."""
        dead.gone = True
        lost, self._stable = self._changes > self._stable, self._changes
        died = not dead.alive and not dead.verdict
        with trio.CancelScope(shield=True):
            # A server that was away may have lost what it had answered, and takes a flush now as if it had not.
            if lost and dead.alive and not dead.flush_failed and not self._files.writes_to_server:
                lost = not await self._flush_last(dead)
            # While operations are under way they hold the export, and the last one closes it.
            await trio.to_thread.run_sync(dead.kill if dead.users else dead.stop)
        self._losses += lost
        if dead.verdict:
            reason = dead.verdict
        elif died:
            reason = f"{PROGRAM} died: {dead.last_words}"
        else:
            reason = f"the connection has ended ({error.strerror})"
        if died or lost:
            risk = "; what was written and not flushed may be lost" if lost else ""
            log.error("%s: %s%s", self._name, reason, risk)
        return reason

    @staticmethod
    async def _flush_last(daemon: Server) -> bool:
        """Whether a daemon that has had an error can still make stable what it wrote."""
        with trio.move_on_after(STOP_TIMEOUT):
            try:
                await trio.to_thread.run_sync(daemon.export.flush_now, abandon_on_cancel=True)
            except OSError:
                return False
            return True
        return False


def is_dead(daemon: Server, error: OSError) -> bool:
    """Whether an operation has failed because the daemon has ended."""
    return not daemon.alive or error.errno in _LOST_CONNECTION
