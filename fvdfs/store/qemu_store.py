"""A store in any format and over any protocol that QEMU knows, served by a qemu-storage-daemon of its own.

What QEMU opens is judged before (`references`): every file is looked up once, judged where it really is, locked,
and handed to the daemon as a descriptor.

The locks (`filelock`) are ours; the daemon is told to take none. It would exclude us, let others write
what is below a qcow2 image, and leave all unlocked between its death and its next start. It inherits the
locked descriptors, so that nothing is unlocked while it lives, whatever becomes of us. What it may write
is locked for writing from the start.

A daemon that dies is started again by the first operation that notices; others wait for it, and each
is done once more. What the dead one had written and not flushed may be lost: the next flush says so,
with EIO, to each caller that was waiting for it or comes first. The same is done when a server seems
to be lost: QEMU's own way to connect again (`reconnect-delay`) does not work behind its FUSE export,
at least in 7.2, and would hide that a server that was started again may have lost unflushed writes.

Not done here: reads without waiting. The export's attributes are good for a second, and any read after
that may wait for the daemon, whatever RWF_NOWAIT says; and not every kernel knows it for FUSE.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import parse_qs, urlsplit

import trio

from fvdfs.errors import FormatError, FvdError, ImageError, UnsupportedFeature
from fvdfs.store.base import Buffer, Stepwise
from fvdfs.store.blockdev import Node, blockdevs
from fvdfs.store.host import (
    HostFile,
    open_as_permitted,
)
from fvdfs.store.locations import Location, Options, join, parse_location
from fvdfs.store.qemu_daemon import PROGRAM, STOP_TIMEOUT, StorageDaemon
from fvdfs.store.references import FORMATS, PROBE_SIZE, RAW, Reader, Reference, detect, references

log = logging.getLogger(__name__)

SERVER_TIMEOUT = 10.0  # seconds that operations wait for a lost server to be there again
MAX_DEPTH = 32
_SECTOR = 512
_RETRY_INTERVAL = 0.2
_LOST_CONNECTION = (errno.ENOTCONN, errno.ECONNABORTED)
_LOST_SERVER = (errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ESHUTDOWN)

T = TypeVar("T")


class Access(Protocol):
    """Who says what names may be followed. The calls may block, and are made in threads."""

    def open_file(self, image: str, field: str, path: str) -> tuple[int, str]:
        """An O_PATH handle of the file that `field` of the image at `image` names, and the file's path.

        Relative paths start at the image's folder. Raises Refused, or ImageError with one line that
        names image, field and value. The caller closes the handle.
        """

    def unstated_format(self, image: str, field: str, name: str, looks_like: str) -> str:
        """What a base or backing file is of which nobody says it, and that does not look raw. Raises UnstatedFormat."""

    def check_url(self, image: str, field: str, location: Location) -> None:
        """Raise Refused unless this URL may be opened."""

    @property
    def secret_file(self) -> str:
        """Absolute path of the file with the passphrase of encrypted images; empty: there is none."""

    @property
    def qemu_locks(self) -> bool:
        """Whether QEMU's image locks are taken and respected."""


@dataclass(slots=True)
class _Opened:
    """A name that was judged."""

    image: str
    field: str
    location: Location
    format: str
    path: str
    """Where names in it start from, if it is local; and its name for messages."""
    stated: bool
    """Whether somebody said that it has this format."""
    handle: int
    """An O_PATH descriptor for the daemon; -1 for a URL."""
    file: HostFile | None
    """For locks, and for a look at its header."""


class QemuStore(Stepwise):
    """An image in some format of QEMU's, at a path or a URL; see `Store`."""

    def __init__(self, image: str, field: str, name: str, file_format: str, access: Access, *, writable: bool) -> None:
        """Judge and open what `field` of `image` names; `start` must follow. Blocks.

        Empty formats mean raw. A local file that cannot be written for lack of permission is opened
        for reading. Raises ImageError, Refused among them, of one line with image, field and value.
        """
        self._access = access
        self._opened: list[_Opened] = []
        self._writes_to_server = False
        self._daemon: StorageDaemon | None = None
        self._options: list[Options] = []
        self._local_only = False
        self._starting = trio.Lock()
        self._growing = trio.Lock()
        self._closed = False
        self._failed_starts = 0
        self._failure = ""
        # Changes that ended, and how many of them the last flush has made stable.
        self._changes = 0
        self._stable = 0
        # Daemons that died with changes that were not stable, and how many of those a flush has told of.
        self._losses = 0
        self._told = 0
        top = self._open(image, field, name, file_format, writable)
        self._top = top
        self._own = [] if top.file is None else [top.file]
        self.name = top.path
        self.writable = writable and (top.file is None or top.file.writable)
        self.denied = top.file.denied if top.file is not None else 0
        self.fixed_size = self._is_raw_device
        self._holes = True

    # ---- What QEMU is to open ----

    @property
    def _is_raw_device(self) -> bool:
        return self._top.format == RAW and (self._top.location.is_device or self._is_device(self._top))

    @staticmethod
    def _is_device(opened: _Opened) -> bool:
        return opened.file is not None and opened.file.fixed_size

    def _open(self, image: str, field: str, name: str, file_format: str, writable: bool) -> _Opened:
        try:
            location = parse_location(name)
        except UnsupportedFeature as error:
            raise UnsupportedFeature(image, f"{field}={error}") from None
        except ImageError as error:
            raise ImageError(image, f"{field}={error}") from None
        stated = bool(file_format or location.format)
        if file_format in ("", RAW):
            file_format = location.format or RAW
        elif location.format not in ("", file_format):
            raise ImageError(image, f"{field}={name}: it says {location.format}, and the image {file_format}")
        if location.path is None:
            self._access.check_url(image, field, location)
            if any(location.url == other.location.url for other in self._opened):
                raise FormatError(image, f"{field}={name}: the chain is a loop")
            self._writes_to_server |= writable
            opened = _Opened(image, field, location, file_format, location.name, stated, -1, None)
        else:
            handle, path = self._access.open_file(image, field, location.path)
            try:
                file = open_as_permitted(handle, path, writable=writable)
            except (OSError, ImageError) as error:
                os.close(handle)
                reason = error.strerror if isinstance(error, OSError) else error.reason
                raise ImageError(image, f"{field}={name}: {reason}") from error
            file.file_lock.with_qemu = self._access.qemu_locks
            opened = _Opened(image, field, location, file_format, path, stated, handle, file)
            if any(other.file is not None and other.file.identity == file.identity for other in self._opened):
                os.close(handle)
                file.close()
                raise FormatError(image, f"{field}={name}: the chain is a loop")
        self._opened.append(opened)
        return opened

    async def _node(self, opened: _Opened, writable: bool, depth: int) -> Node:
        """The image with all that it stands on, all of it opened."""
        if depth > MAX_DEPTH:
            raise FormatError(opened.path, f"more than {MAX_DEPTH} backing files")
        found: dict[str, Node] = {}
        for reference in await self._references(opened):
            kind, field, name = reference.kind, reference.kind.replace("-", "_"), reference.name
            may_write = writable and kind == "data-file"
            if opened.file is None:
                name = join(opened.location, name)
            inner = await trio.to_thread.run_sync(self._open, opened.path, field, name, reference.format, may_write)
            if opened is self._top and kind == "data-file" and inner.file is not None:
                self._own.append(inner.file)
            found[kind] = await self._node(inner, may_write, depth + 1)
        return Node(
            opened.format,
            opened.location,
            opened.handle,
            self._is_device(opened),
            found.get("backing"),
            found.get("data-file"),
        )

    async def _references(self, opened: _Opened) -> list[Reference]:
        if opened.file is not None:
            return await trio.to_thread.run_sync(self._read_references, opened, opened.file)
        if opened.format == RAW and opened.stated:
            return []
        daemon = StorageDaemon(opened.path, [])
        node = Node(RAW, opened.location)
        await daemon.start(blockdevs(node, writable=False, node_name="disk"), writable=False)
        try:
            return await trio.to_thread.run_sync(self._read_references, opened, daemon.export)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(daemon.stop)

    def _read_references(self, opened: _Opened, file: HostFile) -> list[Reference]:
        if opened.file is not None:
            opened.file.lock(opened.file.writable)
        read = _reader(file)
        try:
            if not opened.stated:
                self._state_format(opened, detect(read(0, PROBE_SIZE)))
            return references(opened.format, opened.path, read, file.size_now())
        except OSError as error:
            raise ImageError(opened.path, f"cannot be read: {error.strerror}") from error

    def _state_format(self, opened: _Opened, looks_like: str | None) -> None:
        """Settle what it is, of which nobody says it. Raises UnstatedFormat, UnsupportedFeature."""
        opened.stated = True
        if looks_like is None:
            return
        if opened.field == "data_file":  # a guest writes its first bytes: they say nothing
            log.warning("%s: looks like %s, but no format is stated: it is read as raw", opened.path, looks_like)
            return
        opened.format = self._access.unstated_format(opened.image, opened.field, opened.location.name, looks_like)
        if opened.format not in (RAW, *FORMATS):
            raise UnsupportedFeature(
                opened.image, f"{opened.field}={opened.path}: a {opened.format} image must be a file"
            )

    async def start(self) -> None:
        """Judge what the image refers to, and start the daemon. Only from the main thread.

        Locks all files, until they are closed: the daemon does not. Raises ImageError (Refused, ImageBusy
        among them), UsageError where a program or a driver is missing, OSError. `aclose` must follow in any case.
        """
        assert self._daemon is None
        node = await self._node(self._top, self.writable, 0)
        self.fixed_size = self._is_raw_device
        self._options = blockdevs(node, writable=self.writable, node_name="disk")
        self._local_only = all(opened.file is not None for opened in self._opened)
        # A hole in a device may hold anything.
        self._holes = not any(opened.location.is_device or self._is_device(opened) for opened in self._opened)
        self._daemon = await self._new_daemon()

    async def _new_daemon(self) -> StorageDaemon:
        secret = ""
        for opened in self._opened:
            if opened.format == "luks":
                secret = self._access.secret_file
                if not secret:
                    raise ImageError(
                        opened.path,
                        "is encrypted: name the file with its passphrase: --secret FILE, or -o secret=FILE for a mount",
                    )
        descriptors = [(opened.handle, opened.path) for opened in self._opened if opened.handle >= 0]
        locked = [opened.file.descriptor for opened in self._opened if opened.file is not None]
        daemon = StorageDaemon(self.name, descriptors, secret, locked)
        await daemon.start(self._options, writable=self.writable)
        try:
            if self._local_only:  # network libraries open files of their own, for a moment
                files = [opened.file for opened in self._opened if opened.file is not None]
                await trio.to_thread.run_sync(daemon.check_open_files, {file.identity for file in files})
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(daemon.stop)
            raise
        return daemon

    # ---- A daemon that dies ----

    async def _call(self, operation: Callable[[StorageDaemon], Awaitable[T]], *, changes: bool = False) -> T:
        """Do it; if the daemon is found dead, start another one and do it once more. Raises OSError."""
        failed_before = self._failed_starts
        for again in (True, False):
            daemon = self._daemon
            if daemon is None:
                raise OSError(errno.EBADF, f"{self.name}: is not open")
            if daemon.gone:
                await self._revive(daemon, failed_before)
                continue
            daemon.users += 1
            try:
                result = await operation(daemon)
            except OSError as error:
                if daemon.alive and error.errno not in _LOST_CONNECTION:
                    if self._local_only or not again or error.errno not in _LOST_SERVER:
                        raise
                elif not again:
                    raise OSError(errno.EIO, f"{self.name}: {PROGRAM} died again: {daemon.last_words}") from error
            else:
                if changes:
                    self._changes += 1
                    if daemon.gone:  # it died between the answer and now, and was accounted for without this
                        self._losses += 1
                return result
            finally:
                daemon.users -= 1
                if daemon.gone and not daemon.users:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(daemon.stop)
            await self._revive(daemon, failed_before)
        raise OSError(errno.EIO, f"{self.name}: {PROGRAM} died again")

    async def _revive(self, dead: StorageDaemon, failed_before: int) -> None:
        """Replace a daemon; `failed_before` tells whether that failed while the caller was waiting already."""
        async with self._starting:
            if self._closed or self._daemon is not dead:
                return
            if self._failed_starts != failed_before:
                raise OSError(errno.EIO, self._failure)
            if not dead.gone:
                await self._bury(dead)
            if dead.alive:  # and its last writes may come after those of the next one
                self._failed_starts += 1
                self._failure = f"{self.name}: {PROGRAM} (process {dead.pid}) does not end"
                raise OSError(errno.EIO, self._failure)
            deadline = trio.current_time() + (0 if self._local_only else SERVER_TIMEOUT)
            while True:
                try:
                    self._daemon = await self._new_daemon()
                except (FvdError, OSError) as error:
                    if trio.current_time() < deadline and isinstance(error, ImageError):
                        await trio.sleep(_RETRY_INTERVAL)
                        continue
                    self._failed_starts += 1
                    self._failure = f"{self.name}: {PROGRAM} cannot be started again: {error}"
                    log.error("%s", self._failure)
                    raise OSError(errno.EIO, self._failure) from error
                log.warning("%s: %s runs again", self.name, PROGRAM)
                return

    async def _bury(self, dead: StorageDaemon) -> None:
        """Make sure that it is dead, and account for what was lost with it."""
        dead.gone = True
        lost, self._stable = self._changes > self._stable, self._changes
        unreachable = dead.alive and not self._local_only
        with trio.CancelScope(shield=True):
            # A server that was away may have lost what it had answered, and takes a flush now as if it had not.
            if lost and dead.alive and not dead.flush_failed and not self._writes_to_server:
                lost = not await self._flush_last(dead)
            # While operations are under way they hold the export, and the last one closes it.
            await trio.to_thread.run_sync(dead.kill if dead.users else dead.stop)
        self._losses += lost
        risk = "; what was written and not flushed may be lost" if lost else ""
        what = "cannot reach its server" if unreachable else f"died: {dead.last_words}"
        log.error("%s: %s %s%s", self.name, PROGRAM, what, risk)

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

    @property
    def pid(self) -> int:
        """The process of the daemon; 0 where none was started."""
        return self._daemon.pid if self._daemon is not None else 0

    # ---- Store ----

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        return False

    async def pread(self, buffer: memoryview, offset: int) -> int:
        return await self._call(lambda daemon: daemon.export.pread(buffer, offset))

    async def pwrite(self, data: Buffer, offset: int) -> None:
        end = offset + len(data)

        async def write(daemon: StorageDaemon) -> None:
            if end > daemon.size:
                async with self._growing:
                    if end > daemon.size:
                        await self._truncate(daemon, end)
            await daemon.export.pwrite(data, offset)

        await self._call(write, changes=True)

    async def write_out(self, offset: int, length: int) -> None:
        """QEMU has no such call."""

    async def _truncate(self, daemon: StorageDaemon, size: int) -> None:
        if self._top.format != RAW:
            size = -(-size // _SECTOR) * _SECTOR  # QEMU's formats count in sectors
        if size == daemon.size:
            return
        try:
            await daemon.export.resize(size)
        except OSError as error:
            if error.errno in _LOST_CONNECTION or not daemon.alive or size < daemon.size:
                raise
            why = f"it ends at {daemon.size} bytes, {size} are needed, and QEMU cannot extend it"
            raise OSError(errno.ENOSPC, f"{self.name}: {why}: {error.strerror}") from error
        daemon.size = size

    async def zero(self, offset: int, length: int) -> None:
        async def zero(daemon: StorageDaemon) -> None:
            inside = min(length, daemon.size - offset)
            if inside > 0:
                await daemon.export.zero(offset, inside)

        await self._call(zero, changes=True)

    async def next_data(self, start: int, stop: int) -> int:
        if not self._holes:
            return start
        return await self._call(lambda daemon: daemon.export.next_data(start, stop))

    async def flush(self) -> None:
        async def flush(daemon: StorageDaemon) -> None:
            try:
                await daemon.export.flush()
            except OSError:
                daemon.flush_failed = True
                raise

        told, upto = self._told, self._changes
        if self._losses == told:
            await self._call(flush)
        if self._losses > told:
            self._told = self._losses
            raise OSError(errno.EIO, f"{self.name}: {PROGRAM} died; what was written and not flushed may be lost")
        self._stable = max(self._stable, upto)

    async def size(self) -> int:
        async def size(daemon: StorageDaemon) -> int:
            return daemon.size

        return await self._call(size)

    async def resize(self, size: int) -> None:
        if self.fixed_size and size <= await self.size():
            return

        async def resize(daemon: StorageDaemon) -> None:
            async with self._growing:
                await self._truncate(daemon, size)

        await self._call(resize, changes=True)

    def usage(self) -> int:
        """Bytes of the image's own files; 0 for a URL."""
        return sum(file.usage() for file in self._own)

    # ---- What other programs may do meanwhile ----

    @property
    def identity(self) -> tuple[int, int] | str:
        """What tells two names of one image from two images: of the top file, or the URL."""
        return self._top.location.url if self._top.file is None else self._top.file.identity

    def statuses(self) -> list[os.stat_result] | None:
        """As `HostFile.statuses`, of all its files; None where a part of it is on a server."""
        found: list[os.stat_result] = []
        for opened in self._opened:
            statuses = opened.file.statuses() if opened.file is not None else None
            if statuses is None:
                return None
            found += statuses
        return found

    @property
    def is_remote(self) -> bool:
        return any(opened.file is None or opened.file.is_remote for opened in self._opened)

    @property
    def host_files(self) -> list[HostFile]:
        """The files and devices of this host that it is made of, what it refers to among them."""
        return [opened.file for opened in self._opened if opened.file is not None]

    @property
    def server(self) -> str:
        if self._top.file is not None:
            return self._top.file.server
        parts = urlsplit(self._top.location.url)
        socket = parse_qs(parts.query).get("socket", [""])[0]
        return f"{parts.scheme}://{parts.netloc or socket}"

    def lock(self, exclusive: bool) -> None:
        """Nothing: `start` has locked all files, exclusively those that the daemon may write from then on."""

    def claim_device(self) -> None:
        """`HostFile.claim_device` for what is written."""
        for opened in self._opened:
            if opened.file is not None and opened.file.writable:
                opened.file.claim_device()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._starting:
                await trio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """Stop the daemon, close the files; no operation may be under way. Blocks."""
        self._closed = True
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.stop(gently=True)
        for opened in self._opened:
            if opened.file is not None:
                opened.file.close()
                os.close(opened.handle)
        self._opened = []
        self._own = []


def _reader(file: HostFile) -> Reader:
    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            count = file.pread_now(view, offset)
        return bytes(buffer[:count])

    return read
