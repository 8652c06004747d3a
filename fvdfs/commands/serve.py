"""`fvdfs serve`: give disks of a mount to other hosts over NBD, and hand them over to those that ask. Blocks.

A qemu-storage-daemon reads the raw file in the mount, past every cache, and gives for each disk NAME

- `NAME`, read-only: what the disk is now, with its holes;
- `NAME/move`, writable: a mailbox (`format/mailbox.py`), in which a target asks for the disk;
- `NAME/EPOCH`, read-only, once the disk has moved: that it is there proves that nobody writes the disk here any more.

What a disk is in follows from its record alone (`format/migration.py`), which the mount keeps: whoever changes it, the
exports and QEMU's locks are brought in line with it. So nothing is lost when this process ends; another one goes on.
As long as a disk is frozen, QEMU's locks keep a machine that was stopped on this host from going on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import Any

from fvdfs import daemon
from fvdfs.commands.attributes import explained, facts, flush
from fvdfs.commands.migration import ask_mount, kept_from_qemu
from fvdfs.commands.watching import Watch
from fvdfs.errors import FvdError, ImageBusy, ImageError, UsageError
from fvdfs.format import mailbox
from fvdfs.format.mailbox import Answer, Question, Wish
from fvdfs.format.migration import Source
from fvdfs.mountoptions import tls_credentials
from fvdfs.mounts import DEAD
from fvdfs.store.locations import Options
from fvdfs.store.nbd_server import TLS_ID, NbdServer
from fvdfs.store.qemu_nodes import server_tls
from fvdfs.xattrs import STATUS

log = logging.getLogger(__name__)

DEFAULT_PORT = "10809"
LOOK = 2.0  # seconds between looks that nothing has called for
_FROZEN = {state.value for state in Source} - {Source.SERVING.value}
_TAKEN = _FROZEN - {Source.FROZEN.value}


class _Disk:
    """A disk that is given."""

    def __init__(self, raw: str, number: int, folder: str) -> None:
        self.raw = os.path.abspath(raw)
        self.name = os.path.basename(raw).removesuffix(".raw")
        self.node, self.box_node = f"disk{number}", f"box{number}"
        self.box = os.path.join(folder, self.box_node)
        self._locks = contextlib.ExitStack()
        self._is_locked = False
        self._epoch = ""
        """That of the export that stands."""
        self._epochs = 0
        """Exports of an epoch that there were."""
        self._announced = ""
        self._said = ""
        # The file in this mount: one that took the place of it is not what is exported.
        self._held = os.open(self.raw, os.O_PATH | os.O_CLOEXEC)
        with open(self.box, "xb") as file:
            file.truncate(mailbox.SIZE)

    def nodes(self) -> list[Options]:
        """For the storage daemon. The locks are ours."""
        return [
            _node(self.node, self.raw, writable=False, direct=True),
            _node(self.box_node, self.box, writable=True, direct=False),
        ]

    def begin(self, server: NbdServer) -> None:
        """Raises UsageError, ImageError, OSError."""
        server.add_export(self.node, self.node, self.name)
        server.add_export(self.box_node, self.box_node, self.name + mailbox.EXPORT, writable=True)
        if facts(self.raw, STATUS).get("passthrough") == "on":
            raise UsageError(
                f"{self.raw}: the kernel reads and writes its data by itself, so that it cannot be frozen while it is "
                "open; mount its folder with -o writeback=on"
            )

    def look(self, server: NbdServer) -> None:
        """Bring all in line with the disk's state, and answer who has asked. Raises UsageError, ImageError, OSError."""
        self._follow(server, self._status())
        with open(self.box, "r+b", buffering=0) as box:
            for question in mailbox.questions(box.read()):
                answer = self._answer(server, question)
                who, result = question.name or question.target, answer.text or "done"
                self._say(f"{self.raw}: {who} asks to {question.wish.value}: {result}")
                box.seek(mailbox.question_at(question.target) + mailbox.SECTOR)
                box.write(answer.encode())

    def _status(self) -> dict[str, Any]:
        """Raises UsageError where the mount has ended, OSError."""
        try:
            return facts(f"/proc/self/fd/{self._held}", STATUS)
        except OSError as error:
            if error.errno in DEAD:
                raise UsageError(
                    f"{self.raw}: the mount that it was served from has ended; mount it again, "
                    "then start fvdfs serve again"
                ) from error
            raise

    def _answer(self, server: NbdServer, question: Question) -> Answer:
        try:
            with daemon.undisturbed():
                self._do(server, question)
        except (FvdError, OSError) as error:
            text = error.reason if isinstance(error, ImageError) else str(error)
            return Answer(question.number, done=False, later=not isinstance(error, UsageError), text=text)
        return Answer(question.number, done=True)

    def _do(self, server: NbdServer, question: Question) -> None:
        words = f"{question.epoch} {question.target}"
        if question.wish is Wish.RELEASE:
            self._follow(server, ask_mount(self.raw, f"release {words}"))
            return
        with kept_from_qemu(self.raw):
            flush(self.raw)
            self._follow(server, ask_mount(self.raw, f"handover {words} {question.name or 'another host'}"))

    def _follow(self, server: NbdServer, status: dict[str, Any]) -> None:
        """Have locks and exports as this state wants them."""
        if not status["move"]:
            status = ask_mount(self.raw, "serve")
        state, epoch = status["move"], str(status.get("move_epoch", ""))
        if state in _FROZEN:
            self._hold_locks(wanted=True)
        self._export_epoch(server, epoch if state in _TAKEN else "")
        if state not in _FROZEN:  # no machine goes on here before the last reader of the frozen disk is cut off
            self._hold_locks(wanted=False)
        if epoch != self._announced:
            with open(self.box, "r+b", buffering=0) as box:
                box.write(mailbox.announcement(epoch))
            self._announced = epoch

    def _export_epoch(self, server: NbdServer, epoch: str) -> None:
        """Give the frozen disk under the name of this epoch alone; empty: under none."""
        if epoch == self._epoch:
            return
        node = f"frozen{self._epochs}-{self.node}"
        if self._epoch:
            server.remove_export(node)
            self._epoch = ""
        if epoch:
            # A node of its own: the other may remember as data what was none but in a writer's cache.
            self._epochs += 1
            node = f"frozen{self._epochs}-{self.node}"
            server.add_node(_node(node, self.raw, writable=False, direct=True))
            server.add_export(node, node, f"{self.name}/{epoch}")
            self._epoch = epoch

    def _hold_locks(self, *, wanted: bool) -> None:
        if wanted == self._is_locked:
            return
        if not wanted:
            self._locks.close()
            self._is_locked = False
            return
        try:
            self._locks.enter_context(kept_from_qemu(self.raw))
            self._is_locked = True
        except ImageBusy as error:  # it cannot write, whatever it tries
            self._say(str(error))

    def _say(self, text: str) -> None:
        """Once: who is refused asks again at once."""
        if text != self._said:
            log.warning("%s", text)
            self._said = text

    def close(self) -> None:
        """End."""
        self._locks.close()
        os.close(self._held)


class _Ended(Exception):
    """A signal has come."""


def run(disks: Sequence[str], *, listen: str, unix: str, tls_creds: str) -> int:
    """Serve until a signal comes. Raises UsageError, ImageError, OSError."""
    _check(disks)
    credentials = tls_credentials("--tls-creds ", tls_creds) if tls_creds else ""
    server_options, where = _server(listen, unix, tls=bool(tls_creds))
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            stack.callback(signal.signal, number, signal.signal(number, _end))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fvdfs-serve-"))
        served = [_Disk(disk, number, folder) for number, disk in enumerate(disks)]
        for raw in disks:
            with explained(raw):
                ask_mount(raw, "serve")
        nodes = [node for disk in served for node in disk.nodes()]
        server = NbdServer(server_options, nodes, [server_tls(TLS_ID, credentials)] if credentials else [])
        stack.callback(server.stop)
        watch = Watch()
        stack.callback(watch.close)
        for disk in served:
            stack.callback(disk.close)
            disk.begin(server)
            watch.add(disk.raw)
            watch.add(disk.box)
            disk.look(server)
            print(where.format(disk.name), flush=True)
        with contextlib.suppress(_Ended):
            _serve(served, server, watch)
        return 0


def _serve(served: Sequence[_Disk], server: NbdServer, watch: Watch) -> None:
    while server.alive:
        watch.wait(LOOK)
        for disk in served:
            disk.look(server)
    raise UsageError("qemu-storage-daemon has ended; start fvdfs serve again")


def _end(_number: int, _frame: FrameType | None) -> None:
    raise _Ended


def _check(disks: Sequence[str]) -> None:
    """Raise UsageError for what can be no disk of a mount, or two of one name."""
    for disk in disks:
        if not disk.endswith(".raw"):
            raise UsageError(f"{disk}: name the raw file in a mount")
    names = [os.path.basename(disk) for disk in disks]
    if len(set(names)) < len(names):
        raise UsageError("two disks have the same name; serve them at two addresses")


def _node(name: str, path: str, *, writable: bool, direct: bool) -> Options:
    common: Options = {"read-only": not writable, "cache": {"direct": direct}}
    file = {"driver": "file", "filename": path, "locking": "off", **common}
    return {"driver": "raw", "node-name": name, "file": file, **common}


def _server(listen: str, unix: str, *, tls: bool) -> tuple[Options, str]:
    """QEMU's options of the server, and the URL of what it gives. Raises UsageError."""
    scheme = "nbds" if tls else "nbd"
    credentials: Options = {"tls-creds": TLS_ID} if tls else {}
    if bool(listen) == bool(unix):
        raise UsageError("say where to serve: either --listen ADDR[:PORT] or --unix PATH")
    if unix:
        path = os.path.abspath(unix)
        return {"addr": {"type": "unix", "path": path}, **credentials}, f"{scheme}+unix:///{{}}?socket={path}"
    host, port = _host_and_port(listen)
    shown = f"[{host}]" if ":" in host else host
    tail = "" if port == DEFAULT_PORT else f":{port}"
    return {"addr": {"type": "inet", "host": host, "port": port}, **credentials}, f"{scheme}://{shown}{tail}/{{}}"


def _host_and_port(listen: str) -> tuple[str, str]:
    if listen.startswith("["):
        host, _, rest = listen[1:].partition("]")
    elif listen.count(":") == 1:
        host, colon, port = listen.partition(":")
        rest = colon + port
    else:
        host, rest = listen, ""
    port = rest.removeprefix(":") or DEFAULT_PORT
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or (rest and not rest.startswith(":")):
        raise UsageError(f"--listen {listen}: to be written as ADDR, ADDR:PORT or [ADDR6]:PORT")
    return host, port
