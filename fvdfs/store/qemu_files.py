"""What QEMU is to open for an image, with all that the image refers to: judged, open and locked.

Every file is looked up once, judged where it really is, locked, and handed to the daemon as a descriptor. What an image
refers to is read from it here (`references`), before QEMU sees it.

The locks (`filelock`) are ours; the daemon is told to take none. It would exclude us, let others write what is below a
qcow2 image, and leave all unlocked between its death and its next start. It inherits the locked descriptors, so that
nothing is unlocked while it lives, whatever becomes of us. What it may write is locked for writing from the start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

import trio

from fvdfs.errors import FormatError, ImageError, Locked, UnsupportedFeature
from fvdfs.store.connecting import connect
from fvdfs.store.host import HostFile, open_as_permitted
from fvdfs.store.lending import Lent, lend
from fvdfs.store.locations import Location, Options, join, parse_location
from fvdfs.store.nbd_giver import give
from fvdfs.store.outage import OnLoss
from fvdfs.store.qemu_daemon import StorageDaemon
from fvdfs.store.qemu_nodes import NO_CREDENTIALS, SECRET_ID, Node, blockdevs, tls_object
from fvdfs.store.references import FORMATS, LUKS, PROBE_SIZE, RAW, Reader, Reference, detect, references
from fvdfs.store.web_reader import DRIVERS, Web, open_web

log = logging.getLogger(__name__)

MAX_DEPTH = 32  # images that stand on one another; a real chain is shorter by far


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
    def tls_creds(self) -> str:
        """Absolute path of the file of `qemu_nodes.TLS_FILES` with the credentials for nbds://; empty: none."""

    @property
    def credentials(self) -> str:
        """Absolute path of the file with the credentials for servers (`credentials`); empty: there is none."""

    @property
    def on_loss(self) -> OnLoss:
        """What becomes of requests while a server is away."""

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
    handle: int = -1
    """An O_PATH descriptor for the daemon; -1 for a URL."""
    file: HostFile | None = None
    """For locks, and for a look at its header; None for a URL."""

    @property
    def is_device(self) -> bool:
        """Whether it is a block device of this host."""
        return self.file is not None and self.file.fixed_size


class QemuFiles:
    """The top image, and after `judge` all that it refers to."""

    def __init__(self, image: str, field: str, name: str, file_format: str, access: Access, *, writable: bool) -> None:
        """Judge and open what `field` of `image` names. Blocks. Raises ImageError, Refused among them."""
        self._access = access
        self._opened: list[_Opened] = []
        self.writes_to_server = False
        self.web = Web(lambda location: access.check_url(image, field, location), access.credentials)
        """For those of its files that are on web servers."""
        self._top = self._open(image, field, name, file_format, writable)
        self.file = self._top.file
        """Of the top image; None for a URL."""
        self.name = self._top.path
        self.own = [] if self.file is None else [self.file]
        """The files that hold the image's own data."""

    # --- judging ----------------------------------------------------------------------------------

    async def judge(self, *, writable: bool) -> Node:
        """Open and lock what the image refers to. Only from the main thread; `close` must follow in any case.

        Can be called again after a failure. Raises ImageError (Refused, ImageBusy, Unreachable among them), UsageError
        where a program is missing, OSError.
        """
        for opened in self._opened[1:]:
            await trio.to_thread.run_sync(_close, opened)
        del self._opened[1:]
        self.own = self.own[:1]
        return await self._node(self._top, writable, 0)

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
        opened = _Opened(image, field, location, file_format, location.shown, stated)
        if location.path is None:
            self._access.check_url(image, field, location)
            is_loop = any(location.url == other.location.url for other in self._opened)
            self.writes_to_server |= writable
        else:
            self._open_file(opened, location.path, writable)
            assert opened.file is not None
            is_loop = any(other.file and other.file.identity == opened.file.identity for other in self._opened)
        if is_loop:
            _close(opened)
            raise FormatError(image, f"{field}={name}: the chain is a loop")
        self._opened.append(opened)
        return opened

    def _open_file(self, opened: _Opened, path: str, writable: bool) -> None:
        image, field = opened.image, opened.field
        handle, opened.path = self._access.open_file(image, field, path)
        try:
            opened.file = open_as_permitted(handle, opened.path, writable=writable)
        except (OSError, ImageError) as error:
            os.close(handle)
            reason = error.strerror if isinstance(error, OSError) else error.reason
            raise ImageError(image, f"{field}={opened.location.name}: {reason}") from error
        opened.handle = handle
        opened.file.file_lock.with_qemu = self._access.qemu_locks

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
                self.own.append(inner.file)
            found[kind] = await self._node(inner, may_write, depth + 1)
        return Node(
            opened.format,
            opened.location,
            opened.handle,
            opened.is_device,
            found.get("backing"),
            found.get("data-file"),
            opened.path if opened.file is not None else "",
        )

    async def _references(self, opened: _Opened) -> list[Reference]:
        if opened.file is not None:
            return await trio.to_thread.run_sync(self._read_references, opened, opened.file)
        if opened.format == RAW and opened.stated:
            return []
        alone = Node(RAW, opened.location)
        async with connected(alone, self.web) as (node, connections), self.lent(node) as (node, lent):
            daemon = StorageDaemon(
                opened.path,
                [],
                [*self.objects(), *lent.objects],
                connections=connections,
                lent=lent.descriptors,
                environment=lent.environment,
                quiet=True,
            )
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
        """Decide what an image is of which nobody says it. Raises UnstatedFormat, UnsupportedFeature."""
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

    # --- for the daemon ---------------------------------------------------------------------------

    @property
    def descriptors(self) -> list[tuple[int, str]]:
        """What the daemon opens files by, and their names."""
        return [(opened.handle, opened.path) for opened in self._opened if opened.handle >= 0]

    def objects(self) -> list[Options]:
        """The passphrase of what is encrypted, and the keys for servers. Raises Locked where one is not named."""
        found: dict[str, Options] = {}
        for opened in self._opened:
            user = opened.location.tls_user
            if user is not None and not self._access.tls_creds:
                raise Locked(opened.path, NO_CREDENTIALS)
            if user is not None:
                credentials = tls_object(self._access.tls_creds, user)
                found[str(credentials["id"])] = credentials
            if opened.format == LUKS and self._access.secret_file:
                found[SECRET_ID] = {"qom-type": "secret", "id": SECRET_ID, "file": self._access.secret_file}
        return list(found.values())

    @contextlib.asynccontextmanager
    async def lent(self, node: Node) -> AsyncIterator[tuple[Node, Lent]]:
        """The node and all that a daemon needs to be let in by servers, and to open what is encrypted.

        Raises ImageError, Locked among them where a passphrase is missing, UsageError.
        """
        node, lent = await trio.to_thread.run_sync(lend, node, self._access.credentials)
        try:
            self._check_passphrases(node)
            yield node, lent
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lent.close)

    def _check_passphrases(self, node: Node) -> None:
        if node.format == LUKS and node.secret == SECRET_ID and not self._access.secret_file:
            how = "--secret FILE, or -o secret=FILE for a mount"
            raise Locked(node.path or node.location.name, f"is encrypted: name the file with its passphrase: {how}")
        for each in (node.backing, node.data_file):
            if each is not None:
                self._check_passphrases(each)

    async def look_for_servers(self) -> None:
        """Connect to those that QEMU connects to by itself, and close that again. Raises Unreachable."""
        for opened in self._opened:
            is_known = opened.location.protocol.get("driver") == "nbd"
            connection = None if is_known else await connect(opened.location)
            if connection is not None:
                connection.close()

    # --- what is known of them --------------------------------------------------------------------

    @property
    def format(self) -> str:
        """That of the top image."""
        return self._top.format

    @property
    def is_raw(self) -> bool:
        """Whether the top image is raw."""
        return self._top.format == RAW

    @property
    def is_encrypted(self) -> bool:
        """Whether the top image is encrypted."""
        return self._top.format == LUKS

    @property
    def is_raw_device(self) -> bool:
        """Whether it is all bytes of a device, of this host or behind a server."""
        return self.is_raw and (self._top.location.is_device or self._top.is_device)

    @property
    def has_device(self) -> bool:
        """Whether any of them is a device: a hole in one that is written to may hold anything."""
        return any(opened.location.is_device or opened.is_device for opened in self._opened)

    @property
    def frees_space(self) -> bool:
        """Whether a discard gives back space of the top image. QEMU frees none in other formats.

        Behind a URL it frees some of a raw one, but does not say whether that reads as zeros.
        """
        return self._top.format == "qcow2"

    @property
    def has_server(self) -> bool:
        """Whether any of them is behind a URL."""
        return any(opened.file is None for opened in self._opened)

    @property
    def reconnects(self) -> bool:
        """Whether a library connects to a server, perhaps again where that has ended, and tells nobody.

        With one that may end its connections whenever it likes (ftp) nothing can be made of the end of one.
        """
        drivers = {str(opened.location.protocol.get("driver")) for opened in self._opened}
        return bool(drivers & {"iscsi", "nfs", "ssh"}) and not drivers & {"ftp", "ftps", "rbd"}

    @property
    def is_remote(self) -> bool:
        """Whether reading them asks another machine."""
        return any(opened.file is None or opened.file.is_remote for opened in self._opened)

    @property
    def host_files(self) -> list[HostFile]:
        """Those that are files and devices of this host."""
        return [opened.file for opened in self._opened if opened.file is not None]

    @property
    def identity(self) -> tuple[int, int] | str:
        """What tells two names of one image from two images: of the top file, or the URL."""
        return self._top.location.url if self.file is None else self.file.identity

    @property
    def server(self) -> str:
        """As `Store.server`, of the top image."""
        if self.file is not None:
            return self.file.server
        parts = urlsplit(self._top.location.url)
        socket = parse_qs(parts.query).get("socket", [""])[0]
        return f"{parts.scheme}://{parts.netloc or socket}"

    def statuses(self) -> list[os.stat_result] | None:
        """As `HostFile.statuses`, of all; None where one of them is on a server."""
        found: list[os.stat_result] = []
        for opened in self._opened:
            statuses = opened.file.statuses() if opened.file is not None else None
            if statuses is None:
                return None
            found += statuses
        return found

    def close(self) -> None:
        """Close all. Blocks."""
        for opened in self._opened:
            _close(opened)
        self._opened = []
        self.own = []


def _close(opened: _Opened) -> None:
    if opened.file is not None:
        opened.file.close()
        os.close(opened.handle)


def _reader(file: HostFile) -> Reader:
    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            count = file.pread_now(view, offset)
        return bytes(buffer[:count])

    return read


@contextlib.asynccontextmanager
async def connected(node: Node, web: Web) -> AsyncIterator[tuple[Node, list[socket.socket]]]:
    """The node with connections to its NBD and web servers, which the caller closes where nothing is raised.

    Raises ImageError, Unreachable among them, UsageError.
    """
    sockets: list[socket.socket] = []
    try:
        yield await _connected(node, sockets, web), sockets
    except BaseException:
        for each in sockets:
            each.close()
        raise


async def _connected(node: Node, sockets: list[socket.socket], web: Web) -> Node:
    if node.location.protocol.get("driver") == "nbd":
        made = await connect(node.location)
        assert made is not None
        sockets.append(made)
        node = replace(node, fd=made.fileno())
    elif node.location.protocol.get("driver") in DRIVERS:
        made = give(await open_web(node.location.shown, node.location, web))
        sockets.append(made)
        node = replace(node, fd=made.fileno())
    backing = await _connected(node.backing, sockets, web) if node.backing is not None else None
    data_file = await _connected(node.data_file, sockets, web) if node.data_file is not None else None
    return replace(node, backing=backing, data_file=data_file)
