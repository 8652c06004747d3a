"""A store in any format and over any protocol that QEMU knows, served by a qemu-storage-daemon of its own.

What QEMU opens is judged and locked before (`qemu_files`). A daemon that dies is started again (`qemu_supervisor`).
A raw disk on an NBD server that is only read needs no daemon (`nbd_reader`).

Not done here: reads without waiting. The export's attributes are good for a second, and any read after
that may wait for the daemon, whatever RWF_NOWAIT says; and not every kernel knows it for FUSE.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable

import trio

from fvdfs.errors import ImageError, Unreachable
from fvdfs.store.base import Buffer, Stepwise, Store
from fvdfs.store.host import HostFile
from fvdfs.store.locations import Options
from fvdfs.store.nbd_reader import NbdReader, open_export
from fvdfs.store.outage import OnLoss, Outage
from fvdfs.store.qemu_daemon import StorageDaemon
from fvdfs.store.qemu_files import Access, QemuFiles, connected
from fvdfs.store.qemu_nodes import Node, blockdevs
from fvdfs.store.qemu_supervisor import Server, Supervisor, is_dead
from fvdfs.store.web_reader import WebReader, open_web

_SECTOR = 512  # bytes: QEMU's formats count in sectors


class QemuStore(Stepwise):
    """An image in some format of QEMU's, at a path or a URL; see `Store`."""

    def __init__(self, image: str, field: str, name: str, file_format: str, access: Access, *, writable: bool) -> None:
        """Judge and open what `field` of `image` names; `start` must follow. Blocks.

        Empty formats mean raw. A local file that cannot be written for lack of permission is opened
        for reading. Raises ImageError, Refused among them, of one line with image, field and value.
        """
        self._files = QemuFiles(image, field, name, file_format, access, writable=writable)
        self._supervisor: Supervisor | None = None
        self._on_loss = access.on_loss
        self._node: Node | None = None
        self._size = 0
        """Bytes, once they are known."""
        self._least_size = 0
        self._growing = trio.Lock()
        self._garbage_from: int | None = None
        """Where an encrypted image was extended by bytes that do not read as zeros yet."""
        file = self._files.file
        self.name = self._files.name
        self.writable = writable and (file is None or file.writable)
        self.denied = file.denied if file is not None else 0
        self.fixed_size = self._files.is_raw_device

    async def start(self) -> None:
        """Judge what the image refers to, and start the daemon. Only from the main thread.

        Locks all files, until they are closed: the daemon does not. A base whose server is away is opened without it,
        where the user chose that; it is judged when the server is back. Raises ImageError (Refused, ImageBusy,
        Unreachable among them), UsageError where a program or a driver is missing, OSError. `aclose` must follow in any
        case.
        """
        on_loss = OnLoss.REFUSE if self.writable else self._on_loss
        self._supervisor = Supervisor(self.name, self._start_server, self._files, on_loss)
        await self._supervisor.start()

    async def _start_server(self) -> Server:
        """Raises as `start`."""
        try:
            return await self._judge_and_run()
        except Unreachable:
            raise
        except ImageError:
            await self._files.look_for_servers()
            raise

    async def _judge_and_run(self) -> Server:
        files = self._files
        if self._node is None:
            self._node = await files.judge(writable=self.writable)
            self.fixed_size = files.is_raw_device
        if self._node.is_plain_nbd and not self.writable:
            reader = await open_export(self.name, self._node.location)
            if reader is not None:
                return self._checked(reader)
        if self._node.is_plain_web:
            if self.writable:
                raise ImageError(self.name, "a web server takes no writes")
            return self._checked(await open_web(self.name, self._node.location, files.web))
        locked = [file.fileno() for file in files.host_files]
        async with connected(self._node, files.web) as (node, connections), files.lent(node) as (node, lent):
            daemon = StorageDaemon(
                self.name,
                files.descriptors,
                [*files.objects(), *lent.objects],
                locked,
                connections=connections,
                reconnects=files.reconnects,
                lent=lent.descriptors,
                environment=lent.environment,
                holes_are_zeros=not (self.writable and files.has_device),
                quiet=self.is_away,
            )
            await self._run(daemon, blockdevs(node, writable=self.writable, node_name="disk"))
        return daemon

    def _checked(self, reader: NbdReader | WebReader) -> Server:
        try:
            self._check_size(reader)
        except BaseException:
            reader.stop()
            raise
        return reader

    async def _run(self, daemon: StorageDaemon, options: list[Options]) -> None:
        """Start it, and compare what it has opened with what is expected. Raises as `start`."""
        files = self._files
        await daemon.start(options, writable=self.writable)
        try:
            if not files.has_server:  # network libraries open files of their own, for a moment
                await trio.to_thread.run_sync(daemon.check_open_files, {file.identity for file in files.host_files})
            self._check_size(daemon)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(daemon.stop)
            raise

    def _check_size(self, daemon: Server) -> None:
        """Raise ImageError where what is back is not what was lost."""
        if self.writable:
            return
        if self._size and daemon.size != self._size:
            raise ImageError(self.name, f"has {daemon.size} bytes, and had {self._size}: is it another one?")
        if daemon.size < self._least_size:
            wanted = f"and the image over it needs {self._least_size}: is it another one?"
            raise ImageError(self.name, f"has {daemon.size} bytes, {wanted}")
        self._size = daemon.size

    @property
    def outage(self) -> Outage | None:
        """The last time that its server was away, which may last."""
        return self._supervisor.outage if self._supervisor is not None and self._files.has_server else None

    @property
    def is_away(self) -> bool:
        """Whether its server is away."""
        return self.outage is not None and self.outage.is_away

    def expect(self, size: int) -> None:
        """While its server is away: take nothing smaller for it when it is back. `size`: bytes."""
        self._least_size = max(self._least_size, size)

    def let_go(self) -> None:
        """Have all fail that wait for its server, from now on."""
        if self._supervisor is not None:
            self._supervisor.let_go()

    @property
    def pid(self) -> int:
        """The process of the daemon; 0 where none was started."""
        return self._supervisor.pid if self._supervisor is not None else 0

    @property
    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise OSError(errno.EBADF, f"{self.name}: is not open")
        return self._supervisor

    # --- Store --------------------------------------------------------------------------------------

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        return False

    async def pread(self, buffer: memoryview, offset: int) -> int:
        return await self._running.call(lambda server: server.export.pread(buffer, offset))

    async def pwrite(self, data: Buffer, offset: int) -> None:
        end = offset + len(data)

        async def write(server: Server) -> None:
            daemon = _daemon(server)
            if end > daemon.size:
                async with self._growing:
                    if end > daemon.size:
                        await self._truncate(daemon, end)
            await daemon.export.pwrite(data, offset)

        await self._running.call(write, changes=True)

    async def write_out(self, offset: int, length: int) -> None:
        """QEMU has no such call."""

    async def _truncate(self, daemon: StorageDaemon, size: int) -> None:
        if not self._files.is_raw:
            size = -(-size // _SECTOR) * _SECTOR
        if self._files.is_encrypted and size < daemon.size:  # QEMU does not truncate one
            await daemon.export.zero(size, daemon.size - size)
            return
        if self._files.is_encrypted and self._garbage_from is None:
            self._garbage_from = daemon.size
        start = self._garbage_from
        if size == (daemon.size if start is None else start):
            return
        try:
            if start is not None:
                await daemon.export.extend(start, size)
            else:
                await daemon.export.resize(size)
        except OSError as error:
            if is_dead(daemon, error) or size < daemon.size:
                raise
            why = f"it ends at {daemon.size} bytes, {size} are needed, and QEMU cannot extend it"
            raise OSError(errno.ENOSPC, f"{self.name}: {why}: {error.strerror}") from error
        daemon.size = size
        self._garbage_from = None

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        if not writes and not self._files.frees_space:
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: QEMU gives no space of it back")

        async def zero(server: Server) -> None:
            daemon = _daemon(server)
            inside = min(length, daemon.size - offset)
            if inside > 0:
                await daemon.export.zero(offset, inside, writes=writes)

        await self._running.call(zero, changes=True)

    async def reserve(self, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, f"{self.name}: QEMU reserves no space")

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        return await self._running.call(lambda server: server.export.extent(start, stop))

    async def flush(self) -> None:
        await self._running.flush()

    async def size(self) -> int:
        async def size(server: Server) -> int:
            return server.size

        return await self._running.call(size)

    async def resize(self, size: int) -> None:
        if self.fixed_size and size <= await self.size():
            return

        async def resize(server: Server) -> None:
            async with self._growing:
                await self._truncate(_daemon(server), size)

        await self._running.call(resize, changes=True)

    def usage(self) -> int:
        """Bytes of the image's own files; 0 for a URL."""
        return sum(file.usage() for file in self._files.own)

    # --- what other programs may do meanwhile -----------------------------------------------------

    @property
    def identity(self) -> tuple[int, int] | str:
        """What tells two names of one image from two images: of the top file, or the URL."""
        return self._files.identity

    @property
    def format(self) -> str:
        """What its image is read as."""
        return self._files.format

    def statuses(self) -> list[os.stat_result] | None:
        """As `HostFile.statuses`, of all its files; None where a part of it is on a server."""
        return self._files.statuses()

    @property
    def is_remote(self) -> bool:
        return self._files.is_remote

    @property
    def host_files(self) -> list[HostFile]:
        """The files and devices of this host that it is made of, what it refers to among them."""
        return self._files.host_files

    @property
    def server(self) -> str:
        return self._files.server

    def lock(self, exclusive: bool) -> None:
        """Nothing: `start` has locked all files, exclusively those that the daemon may write from then on."""

    def claim_device(self) -> None:
        """`HostFile.claim_device` for what is written."""
        for file in self._files.host_files:
            if file.writable:
                file.claim_device()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            if self._supervisor is not None:
                await self._supervisor.aclose()
            await trio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """Stop the daemon, close the files; no operation may be under way. Blocks."""
        if self._supervisor is not None:
            self._supervisor.stop()
        self._files.close()


def _daemon(server: Server) -> StorageDaemon:
    """What is written is written by a daemon."""
    assert isinstance(server, StorageDaemon)
    return server


def host_files(store: Store) -> list[HostFile]:
    """The files and devices of this host behind a store."""
    if isinstance(store, QemuStore):
        return store.host_files
    return [store] if isinstance(store, HostFile) else []


def content_of(store: Store) -> Hashable:
    """What two stores have in common whose bytes are the same, since one file or server holds them."""
    if isinstance(store, QemuStore):
        return store.identity, store.format
    return store.identity if isinstance(store, HostFile) else id(store)
