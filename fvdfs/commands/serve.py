"""`fvdfs serve`: give disks of a mount to other hosts over NBD, and hand them over to those that ask. Blocks.

A qemu-storage-daemon reads the raw file in the mount, past every cache, and gives for each disk NAME

- `NAME`, read-only: what the disk is now, with its holes;
- `NAME/move`, writable: a mailbox (`format/mailbox.py`), in which a target asks for the disk. Whoever reaches the
  address can write to it: what does not fit the disk's state, or is not proven, is refused before the mount does
  anything, and whoever goes on is slowed down;
- `NAME/hot`, read-only: once the disk has moved, what of it was used last (`format/hot.py`);
- `NAME/EPOCH`, read-only, once the disk has moved: that it is there proves that nobody writes the disk here any more;
- `NAME/EPOCH/own`, read-only, once the target has asked for it: what the disk has beyond its template (`cow/own.py`).

What a disk is in follows from its record alone (`format/migration.py`), which the mount keeps: whoever changes it, the
exports and QEMU's locks are brought in line with it. So nothing is lost when this process ends; another one goes on.
As long as a disk is frozen, QEMU's locks keep a machine that was stopped on this host from going on.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from fvdfs import daemon
from fvdfs.commands.attributes import explained, facts, flush
from fvdfs.commands.migration import ask_mount, kept_from_qemu
from fvdfs.commands.watching import Watch
from fvdfs.errors import FvdError, ImageBusy, ImageError, UsageError
from fvdfs.format import hot, mailbox, migration
from fvdfs.format.mailbox import Answer, Question, Wish
from fvdfs.format.migration import Outgoing, Record, Source
from fvdfs.format.proof import is_digest
from fvdfs.mountoptions import tls_credentials
from fvdfs.mounts import DEAD
from fvdfs.store.locations import Options
from fvdfs.store.nbd_server import TLS_ID, Ended, NbdServer
from fvdfs.store.qemu_nodes import server_tls
from fvdfs.store.qemu_words import PROGRAM
from fvdfs.xattrs import HOT, OWN, STATUS

log = logging.getLogger(__name__)

DEFAULT_PORT = "10809"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before a daemon is started again, twice as long each time
LOOK = 2.0  # seconds between looks that nothing has called for
LAST_ANSWER = 0.5  # seconds in which a target reads what it was answered last
REFUSED_PAUSE = 0.05  # seconds, after somebody was refused for good: he may ask at once again, and others wait for that
LINES, PERIOD = 10, 60.0  # of the log about what is asked, in so many seconds
_FROZEN = {state.value for state in Source} - {Source.SERVING.value}
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_FIRST_SOCKET = 3  # the descriptor, by sd_listen_fds(3)
_TAKEN = _FROZEN - {Source.FROZEN.value}


class _Disk:
    """A disk that is given."""

    def __init__(self, raw: str, number: int, *, once: bool = False, target: str = "") -> None:
        """`once`: not for another move, once this is given up. `target`: the only one that may have it; empty: any.

        Raises OSError.
        """
        self.raw = os.path.abspath(raw)
        self._target = target
        self._once = once
        self.name = name_of(raw)
        self.node, self.box_node, self.hot_node = f"disk{number}", f"box{number}", f"hot{number}"
        self._files = contextlib.ExitStack()
        self.box = _in_memory(self._files, mailbox.SIZE)
        self.hot = _in_memory(self._files, hot.SIZE)
        self._locks = contextlib.ExitStack()
        self._is_locked = False
        self._epoch = ""
        """That of the export that stands."""
        self._epochs = 0
        """Exports of an epoch that there were."""
        self._map = ""
        """The export of the map of what the disk has beyond its template."""
        self._maps = 0
        self._said = ""
        self._lines, self._lines_since = 0, -math.inf
        # The file in this mount: one that took the place of it is not what is exported.
        self._size = 0
        """In bytes, as the daemon knows it."""
        self._held = os.open(self.raw, os.O_PATH | os.O_CLOEXEC)
        self._only = -1
        """The descriptor whose lock keeps other servers away."""

    def nodes(self) -> list[Options]:
        """For the storage daemon. The locks are ours."""
        return [
            _node(self.node, self.raw, writable=False, direct=True),
            _node(self.box_node, self.box, writable=True, direct=False),
            _node(self.hot_node, self.hot, writable=False, direct=False),
        ]

    def begin(self) -> None:
        """Have it be given to others, here alone. Raises UsageError, ImageBusy, ImageError, OSError."""
        with explained(self.raw):
            self._only = os.open(self.raw, os.O_RDONLY | os.O_CLOEXEC)
            if not _take(self._only):
                raise ImageBusy(self.raw, "is served already; end that fvdfs serve first")
            epoch = ask_mount(self.raw, "serve")["move_epoch"]
            if self._target:
                ask_mount(self.raw, f"keep {epoch} {self._target}")
        if facts(self.raw, STATUS).get("passthrough") == "on":
            raise UsageError(
                f"{self.raw}: the kernel reads and writes its data by itself, so that it cannot be frozen while it is "
                "open; mount its folder with -o writeback=on"
            )

    def export(self, server: NbdServer) -> None:
        """Give it by a server that has just begun. Raises as `look`."""
        self._epoch = self._map = ""
        self._size = os.stat(self.raw).st_size
        server.add_export(self.node, self.node, self.name)
        server.add_export(self.box_node, self.box_node, self.name + mailbox.EXPORT, writable=True)
        server.add_export(self.hot_node, self.hot_node, self.name + hot.EXPORT)
        self.look(server)

    def look(self, server: NbdServer) -> bool:
        """Bring all in line with the disk's state, and answer who has asked; whether somebody was refused for good.

        Raises UsageError, ImageError, OSError.
        """
        self._follow(server, self._status())
        refused = False
        with open(self.box, "r+b", buffering=0) as box:
            for question in mailbox.questions(box.read()):
                answer = self._answer(server, question)
                refused = refused or not (answer.done or answer.later)
                who, result = question.name or question.target, answer.text or "done"
                self._say(f"{self.raw}: {who} asks to {question.wish.value}: {result}")
                box.seek(mailbox.question_at(question.target) + mailbox.SECTOR)
                box.write(answer.encode())
        return refused

    def is_over(self) -> bool:
        """Whether its move has ended. Raises as `_status`."""
        return self._status()["move"] in ("", Source.RELEASED.value)

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
            _refuse_unfit(_record(self._status()), question)
            with daemon.undisturbed():
                self._do(server, question)
        except (FvdError, OSError) as error:
            text = error.reason if isinstance(error, ImageError) else str(error)
            return Answer(question.number, done=False, later=not isinstance(error, UsageError), text=text)
        return Answer(question.number, done=True)

    def _do(self, server: NbdServer, question: Question) -> None:
        words = f"{question.epoch} {question.target}"
        match question.wish:
            case Wish.STAND:
                ask_mount(self.raw, f"stand {question.stamp}")
            case Wish.MAP:
                self._follow(server, ask_mount(self.raw, f"own {words} {question.stamp}"))
                self._export_map(server, question.epoch)
            case Wish.RELEASE | Wish.GO_ON as wish:
                assert question.proof is not None
                step = f"{mailbox.WORDS[wish].value} {words} {question.proof.key} {question.proof.other}"
                self._follow(server, ask_mount(self.raw, step))
            case Wish.HAND_OVER:
                if os.stat(self.raw).st_size != self._size:  # what is read of it until then would be too short
                    raise UsageError("its size has changed: start fvdfs serve anew, then receive the disk anew")
                with kept_from_qemu(self.raw):
                    flush(self.raw)
                    step = f"handover {words} {question.name or 'another host'}"
                    self._follow(server, ask_mount(self.raw, step))

    def _follow(self, server: NbdServer, status: dict[str, Any]) -> None:
        """Have locks and exports as this state wants them."""
        if not status["move"] and not self._once:
            status = ask_mount(self.raw, "serve")
        state, epoch = status["move"], str(status.get("move_epoch", ""))
        if state in _FROZEN:
            self._hold_locks(wanted=True)
        self._export_epoch(server, epoch if state in _TAKEN else "")
        if state not in _FROZEN:  # no machine goes on here before the last reader of the frozen disk is cut off
            self._hold_locks(wanted=False)
        with open(self.box, "r+b", buffering=0) as box:
            if box.read(mailbox.SECTOR) != (announcement := mailbox.announcement(epoch)):  # clients can write there
                box.seek(0)
                box.write(announcement)

    def _export_epoch(self, server: NbdServer, epoch: str) -> None:
        """Give the frozen disk under the name of this epoch alone; empty: under none."""
        if epoch == self._epoch:
            return
        node = f"frozen{self._epochs}-{self.node}"
        if self._epoch:
            self._end_map(server)
            server.remove_export(node)
            self._epoch = ""
        if epoch:
            self._tell_hot()
            # A node of its own: the other may remember as data what was none but in a writer's cache.
            self._epochs += 1
            node = f"frozen{self._epochs}-{self.node}"
            server.add_node(_node(node, self.raw, writable=False, direct=True))
            server.add_export(node, node, f"{self.name}/{epoch}")
            self._epoch = epoch

    def _export_map(self, server: NbdServer, epoch: str) -> None:
        """Give the map that the mount has made, under the name of this epoch."""
        self._end_map(server)
        self._maps += 1
        node = f"map{self._maps}-{self.node}"
        with contextlib.ExitStack() as stack:  # the node keeps it
            path, number = _in_memory(stack), 0
            with open(path, "r+b") as file:
                while part := os.getxattr(self.raw, f"{OWN}{number}"):
                    file.write(part)
                    number += 1
            server.add_node(_node(node, path, writable=False, direct=False))
        server.add_export(node, node, f"{self.name}/{epoch}{mailbox.MAP_EXPORT}")
        self._map = node

    def _end_map(self, server: NbdServer) -> None:
        if self._map:
            server.remove_export(self._map)
            self._map = ""

    def _tell_hot(self) -> None:
        """Say what was used last. A move goes on without."""
        try:
            with open(self.hot, "r+b", buffering=0) as file:
                file.write(os.getxattr(self.raw, HOT))
        except OSError as error:
            log.warning("%s: cannot tell what was used last: %s", self.raw, error.strerror)

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
        """Once: who is refused asks again at once. A few lines a minute: he may ask in ever new words."""
        if text == self._said:
            return
        self._said = text
        now = time.monotonic()
        if now - self._lines_since > PERIOD:
            if self._lines > LINES:
                log.warning("%s: asked for %d times more", self.raw, self._lines - LINES)
            self._lines, self._lines_since = 0, now
        self._lines += 1
        if self._lines <= LINES:
            log.warning("%s", text)

    def close(self) -> None:
        """End."""
        self._locks.close()
        self._files.close()
        os.close(self._held)
        if self._only >= 0:
            with contextlib.suppress(OSError):  # of a mount that has ended; nothing was written
                os.close(self._only)


def _in_memory(stack: contextlib.ExitStack, size: int = 0) -> str:
    """A file that others of this user can open by this path, and that ends with us. Raises OSError."""
    descriptor = os.memfd_create("fvdfs-serve")
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, size)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _record(status: dict[str, Any]) -> Record:
    """What an image says of its move to another host, by its status."""
    try:
        state = Source(status["move"])
    except ValueError:
        return Record()
    return Record(None, Outgoing(state, status["move_epoch"], status["move_target"], status["moved_to"]))


def _refuse_unfit(record: Record, question: Question) -> None:
    """Raise UsageError for what the mount would refuse, too, after it had begun to do it."""
    epoch, target = question.epoch, question.target
    if question.wish is Wish.HAND_OVER:
        migration.hand_over(record, epoch, target, "")
    elif question.proof is not None:
        told = migration.told_of_all if question.wish is Wish.RELEASE else migration.told_of_end
        told(record, epoch, target, question.proof)


class _Ended(Exception):
    """A signal has come."""


def run(disks: Sequence[str], *, listen: str, unix: str, systemd: bool, tls_creds: str, target: str) -> int:
    """Serve until a signal comes. Raises UsageError, ImageError, OSError."""
    serve(
        disks,
        lambda urls: print(*urls, sep="\n", flush=True),
        listen=listen,
        unix=unix,
        systemd=systemd,
        tls_creds=tls_creds,
        target=target,
    )
    return 0


def name_of(raw: str) -> str:
    """That of a disk, by its raw file."""
    return os.path.basename(raw).removesuffix(".raw")


def _take(descriptor: int) -> bool:
    """Keep other servers from this raw file, until it is closed; False: one has it. Raises OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_served(raw: str) -> bool:
    """Whether an `fvdfs serve` of this host gives the disk. Raises OSError."""
    descriptor = os.open(raw, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)


def locations(disks: Sequence[str], listen: str, *, tls: bool) -> list[str]:
    """The URLs of what is given at this address. Raises UsageError for what makes no sense."""
    _check(disks)
    address, _ = _address(listen, "", systemd=False)
    return [_url(address, name_of(disk), (), tls=tls) for disk in disks]


def serve(
    disks: Sequence[str],
    ready: Callable[[list[str]], None],
    *,
    listen: str = "",
    unix: str = "",
    systemd: bool = False,
    tls_creds: str = "",
    once: bool = False,
    target: str = "",
) -> None:
    """Serve until a signal comes; tell the URLs. `once`: no longer than until each disk's move is over, or given up.

    `target`: the number of the only one that may have the disk; empty: who asks first.

    Raises UsageError, ImageError, OSError.
    """
    _check(disks)
    if target and (len(disks) > 1 or not is_digest(target)):
        raise UsageError(f"--for {target}: give the number that fvdfs info tells of the target's image, and one disk")
    credentials = tls_credentials("--tls-creds ", tls_creds) if tls_creds else ""
    address, inherited = _address(listen, unix, systemd=systemd)
    with contextlib.suppress(_Ended), contextlib.ExitStack() as stack:
        for number in _ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) is signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, _end))
        watch = Watch()
        stack.callback(watch.close)
        served = []
        for place, raw in enumerate(disks):
            disk = _Disk(raw, place, once=once, target=target)
            stack.callback(disk.close)
            disk.begin()
            served.append(disk)
            watch.add(disk.raw)
            watch.add(disk.box)
        how: Options = {"addr": address} | ({"tls-creds": TLS_ID} if credentials else {})
        nodes = [node for disk in served for node in disk.nodes()]
        objects = [server_tls(TLS_ID, credentials)] if credentials else []
        keeper = _Keeper(served, lambda: NbdServer(how, nodes, objects, inherited), watch, once=once)
        stack.callback(keeper.stop)
        keeper.start()
        ready([_url(address, disk.name, inherited, tls=bool(credentials)) for disk in served])
        keeper.run()


class _Keeper:
    """Keeps a storage daemon running that gives the disks."""

    def __init__(self, served: Sequence[_Disk], launch: Callable[[], NbdServer], watch: Watch, *, once: bool) -> None:
        self._served = served
        self._launch = launch
        self._watch = watch
        self._once = once
        self._server: NbdServer | None = None

    def start(self) -> None:
        """Raises UsageError, ImageError, OSError."""
        self._server = self._launch()
        for disk in self._served:
            disk.export(self._server)

    def run(self) -> None:
        """Follow the states of the disks, and replace each daemon that ends. Raises UsageError, ImageError, OSError."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                if self._server is None:
                    self.start()
                    log.warning("%s runs again", PROGRAM)
                self._follow()
                return
            except Ended as error:
                self._bury(error.reason)
            except UsageError as error:
                if self._server is not None:  # not of the daemon, which has not started
                    raise
                self._bury(str(error))
            pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            time.sleep(pause)

    def _follow(self) -> None:
        assert self._server is not None
        over_since: float | None = None
        while over_since is None or time.monotonic() - over_since < LAST_ANSWER:
            if not self._server.alive:
                raise Ended(PROGRAM, self._server.last_words)
            self._watch.wait(LOOK if over_since is None else LAST_ANSWER, self._server.fileno())
            going_on = [disk for disk in self._served if not (self._once and disk.is_over())]
            refused = [disk for disk in going_on if disk.look(self._server)]
            if refused:
                time.sleep(REFUSED_PAUSE)
            over_since = None if going_on else over_since or time.monotonic()

    def _bury(self, reason: str) -> None:
        log.error("%s has ended, and is started again: %s", PROGRAM, reason)
        self.stop()

    def stop(self) -> None:
        """End."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()


def _end(_number: int, _frame: FrameType | None) -> None:
    for number in _ENDING:  # nothing interrupts what follows
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)
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


def _address(listen: str, unix: str, *, systemd: bool) -> tuple[Options, Sequence[int]]:
    """Where to serve, as QEMU's SocketAddress, and the descriptor that this names. Raises UsageError."""
    if [bool(listen), bool(unix), systemd].count(True) != 1:
        raise UsageError("say where to serve: --listen ADDR[:PORT], --unix PATH or --systemd")
    if unix:
        return {"type": "unix", "path": os.path.abspath(unix)}, ()
    if listen:
        host, port = _host_and_port(listen)
        return {"type": "inet", "host": host, "port": port}, ()
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise UsageError("--systemd: is for a service with one socket (sd_listen_fds(3)); else say --listen or --unix")
    return {"type": "fd", "str": str(_FIRST_SOCKET)}, (_FIRST_SOCKET,)


def _url(address: Options, name: str, inherited: Sequence[int], *, tls: bool) -> str:
    """What is given under this name at this address."""
    scheme = "nbds" if tls else "nbd"
    host, port, path = (str(address.get(key, "")) for key in ("host", "port", "path"))
    for descriptor in inherited:
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            found = listener.getsockname()
            host, port, path = ("", "", found) if isinstance(found, str) else (found[0], str(found[1]), "")
    if path:
        return f"{scheme}+unix:///{name}?socket={path}"
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}{'' if port == DEFAULT_PORT else ':' + port}/{name}"


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
