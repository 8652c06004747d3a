"""`fvdfs migrate`: a running machine moves to another host with its disks. Blocks.

What docs/migration.md has as single steps, in one order:

    look that all fits · serve here · receive there · QEMU moves the machine · the target takes the disks over ·
    QEMU here ends · what is missing is copied · the source is released

Before the machine runs there, an error, a signal or a target that ends leaves the source as it was: QEMU's migration is
cancelled, the epoch is over, and what was made at the target is removed. From then on the move goes on without this
command: the server here is a process of its own, which ends when the target has all; the target's mount copies, and
tells it. The same command again finds what there is, and goes on with that.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import math
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from fvdfs import daemon, mounts
from fvdfs.commands import serve
from fvdfs.commands.attributes import explained, facts
from fvdfs.commands.digest import FileDigest
from fvdfs.commands.far_side import FarSide
from fvdfs.commands.migrate_target import ACTIVE
from fvdfs.commands.migration import ask_mount, kept_from_qemu
from fvdfs.commands.terminal import progress_bar
from fvdfs.errors import FvdError, ImageBusy, UsageError
from fvdfs.logs import LogPlaces
from fvdfs.qmp import ANSWER, WAITS, CommandRefused, Monitor, NoAnswer, somebody_listens
from fvdfs.sizes import human_size
from fvdfs.store.host import open_path
from fvdfs.store.locations import is_local
from fvdfs.xattrs import STATUS

LOOK = 0.05  # seconds between looks at a machine that moves
FOLLOW_LOOK = 0.3  # seconds between looks at a disk that is copied
TOLD = 10.0  # seconds between lines about that, where there is no terminal
CANCEL = 20.0  # seconds for QEMU to end a migration
SETTLE = 10.0  # seconds after an interrupt for what cannot be undone any more to be finished
TOLD_SOURCE = 5.0  # seconds for the target to say that it has all
NOTICED = 3.0  # seconds for QEMU to notice that the one at the target has ended
BLOCK = 512  # bytes, in which stat counts
MACHINE = 600.0  # seconds to wait for the machine at the target
_HANDED_OVER = ("moved", "released")
_MOVED_OVER = "completed"
_RETURN_PATH = "return-path"
_SOURCE = "its source"
_OVER = (_MOVED_OVER, "failed", "cancelled")
_SENT = ("finish-migrate", "postmigrate")
"""What QEMU says of a machine that it has sent."""


class MoveFailed(FvdError):
    """The machine has not moved; the text says why, and what is where."""


@dataclass(frozen=True)
class Choices:
    """What the user chose."""

    qmp: str = ""
    """The monitor of the machine here; empty: none runs on the disks."""
    qmp_target: str = ""
    ssh: tuple[str, ...] = ()
    """The command that runs words at the target; empty: ssh TARGETHOST."""
    program: tuple[str, ...] = ("fvdfs",)
    """fvdfs there."""
    listen: str = ""
    tls_creds: str = ""
    start: str = ""
    """A shell command for the target that starts the machine."""
    uri: str = ""
    """Where QEMU sends the machine; empty: a free TCP port of the target."""
    log_file: str = ""
    """Of the server."""
    keep_base: str = ""
    """A template that the disks stand on here, and are to stand on there: its name from their folder there on."""
    base_format: str = ""
    """Of that."""
    trust_base: bool = False
    """Compare no more of the two templates than a sample."""


@dataclass
class _Disk:
    raw: str
    name: str
    size: int
    image: str
    state: str
    epoch: str
    target: str
    url: str = ""
    there: dict[str, str] | None = field(default=None)
    """What there is of it at the target: `migrate_target.find`."""

    @property
    def is_there(self) -> bool:
        """Whether the target has taken it over."""
        return self.there is not None and self.there["state"] in ACTIVE


def run(disks: Sequence[str], target: str, choices: Choices) -> int:
    """Move them. Raises UsageError, FvdError, OSError, KeyboardInterrupt."""
    user_host, host, place = _target(target)
    if bool(choices.qmp) != bool(choices.qmp_target):
        raise UsageError("a machine has two ends: give --qmp and --qmp-target, or neither where none runs on the disk")
    for given, what in ((choices.start, "--start"), (choices.uri, "--migrate-uri")):
        if given and not choices.qmp:
            raise UsageError(f"{what}: is for a machine; give --qmp and --qmp-target")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signals = _Signals()
    with signals.watched():
        found = [_look_at(raw) for raw in disks]
        listen = choices.listen or _own_address(host)
        urls = serve.locations(disks, listen, tls=bool(choices.tls_creds))
        for disk, url in zip(found, urls, strict=True):
            disk.url = url
        if choices.qmp and not choices.uri:
            _address_of(host)
        prefix = choices.ssh or ("ssh", user_host)
        with contextlib.ExitStack() as stack:
            for disk in found:
                _keep_others_away(disk, stack)
            far = stack.enter_context(FarSide(prefix, choices.program, host, signals.check))
            move = _Move(found, host, place, far, choices, listen, stack, signals)
            try:
                move.run()
            except BaseException:
                signals.deaf = True
                move.give_up()
                raise
    return 0


def _target(text: str) -> tuple[str, str, str]:
    """[USER@]HOST:DIR as what ssh takes, the host's name alone, and the folder. Raises UsageError."""
    if text.partition("@")[2].startswith("[") or text.startswith("["):
        before, _, place = text.partition("]:")
        user, _, host = before.rpartition("[")
        user_host = user + host
    else:
        user_host, _, place = text.partition(":")
        host = user_host.rpartition("@")[2]
    if not host or not place.startswith("/"):
        raise UsageError(
            f"{text}: to be written as HOST:DIR, DIR an absolute path: the mount of the target, or its folder"
        )
    return user_host, host, place


def _look_at(raw: str) -> _Disk:
    """A disk here. Raises UsageError where it cannot move, OSError."""
    if not raw.endswith(".raw"):
        raise UsageError(f"{raw}: name the raw file in its mount")
    raw = os.path.abspath(raw)
    with explained(raw):
        status = facts(raw, STATUS)
        found = os.stat(raw)
    if os.geteuid() not in (0, found.st_uid):
        raise UsageError(f"{raw}: only its owner, {mounts.user_name(found.st_uid)}, or root, may move it")
    state = status["move"]
    if status.get("passthrough") == "on":
        raise UsageError(
            f"{raw}: the kernel reads and writes its data by itself, so that it cannot be frozen; "
            "mount its folder with -o writeback=on"
        )
    if state == "receiving":
        raise UsageError(f"{raw}: {status['move_reason']}")
    if state == "frozen":
        raise UsageError(f"{raw}: {status['move_reason']}")
    epoch, target = status.get("move_epoch", ""), status.get("move_target", "")
    return _Disk(raw, serve.name_of(raw), found.st_size, status["image"], state, epoch, target)


def _keep_others_away(disk: _Disk, stack: contextlib.ExitStack) -> None:
    """No other command moves this disk meanwhile, and takes back what this one does. Raises UsageError, OSError."""
    file = open_path(disk.image, writable=False)
    stack.callback(file.close)
    if mounts.lock(file.fileno(), fcntl.LOCK_EX) is False:
        raise UsageError(f"{disk.raw}: another fvdfs migrate moves it; wait for that, or end it by Ctrl-C there")


def _own_address(host: str) -> str:
    """That from which this host reaches the other one. Raises UsageError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, serve.DEFAULT_PORT, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise UsageError(
            f"{host}: {error.strerror}; write its address, and, where only ssh knows that name: --ssh 'ssh {host}'"
        ) from None
    try:
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own: str = probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"{host}: {error.strerror}; name a host that is reached, or give --listen ADDR") from None
    return f"[{own}]" if ":" in own else own


def _address_of(host: str) -> str:
    """That to which QEMU sends a machine. Raises UsageError."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageError(f"{host}: {error.strerror}; give --migrate-uri tcp:ADDR:PORT") from None
    return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address


class _Signals:
    """What ends the command: signals, and a terminal that is closed, are as Ctrl-C.

    Where something was changed they count at `check` only, so that no conversation is broken off in the middle.
    """

    def __init__(self) -> None:
        self.at_once = True
        self.deaf = False
        """Whether nothing counts any more."""
        self._came = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        before = [signal.signal(number, self._note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt."""
        if self._came and not self.deaf:
            self._came = False
            raise KeyboardInterrupt


class _Move:
    """Of some disks, and the machine that runs on them."""

    def __init__(
        self, disks: list[_Disk], host: str, place: str, far: FarSide, choices: Choices, listen: str,
        stack: contextlib.ExitStack,
        signals: _Signals,
    ) -> None:  # fmt: skip
        self._disks = disks
        self._names = [disk.name for disk in disks]
        self._host, self._place, self._far, self._choices, self._listen = host, place, far, choices, listen
        self._stack = stack
        self._signals = signals
        far.check = self._check
        self._began = time.monotonic()
        self._point = ""
        self._folder = ""
        self._monitor: Monitor | None = None
        self._server = 0
        """Its process, where we have started it."""
        self._ran = True
        """Whether the machine here ran, and was not paused."""
        self._changed = False
        self._migrating = False
        """Whether the machine may be on its way."""
        self._set_return_path = False
        """Whether that is ours, and to be taken back."""
        self._switched = False
        """Whether the target has the disks."""

    def say(self, text: str) -> None:
        """A step, with its time. Raises KeyboardInterrupt, OSError."""
        self._signals.check()
        print(f"{time.monotonic() - self._began:8.2f} s  {text}", flush=True)

    def _pause(self, seconds: float) -> None:
        """Raises as `_check`."""
        time.sleep(seconds)
        self._check()

    def _check(self) -> None:
        """Called often. Raises KeyboardInterrupt, MoveFailed, OSError."""
        self._signals.check()
        if self._server and not self._signals.deaf and os.waitpid(self._server, os.WNOHANG)[0]:
            self._server = 0
            if any(facts(disk.raw, STATUS)["move"] not in ("", "released") for disk in self._disks):
                daemon.complain(f"the server of {self._all} has ended; another one is started")
                self._start_server()

    # --- the order of all -------------------------------------------------------------------------

    def run(self) -> None:
        """Raises UsageError, FvdError, OSError, KeyboardInterrupt."""
        self._prepare()
        if all(disk.state == "released" for disk in self._disks):
            self.say(f"{self._all} moved to {self._host} before; nothing is left to do")
            return
        self._switched = all(disk.is_there for disk in self._disks)
        self._signals.at_once = False
        self._changed = True
        if not self._switched:
            self._keep()
        self._serve()
        if not self._switched:
            self._receive()
            if self._monitor is not None:
                self._move_machine(self._monitor)
            else:
                self._take()
        self._end_machine()
        self._follow()
        self._release()

    @property
    def _all(self) -> str:
        return ", ".join(f"{name}.raw" for name in self._names)

    def _prepare(self) -> None:
        """Look that all fits; nothing is changed."""
        urls = {disk.name: disk.url for disk in self._disks}
        takes = {disk.name: os.stat(disk.raw).st_blocks * BLOCK for disk in self._disks}
        found = self._far.call("find", place=self._place, urls=urls, takes=takes)
        self._point, self._folder = found["point"], found["folder"]
        for disk in self._disks:
            disk.there = there = found["disks"][disk.name]
            if there is not None and there["epoch"] != disk.epoch:
                raise UsageError(
                    f"{self._host}:{self._folder}/{disk.name}.fvd: exists already, of another move; remove it"
                )
            if there is None and disk.state in _HANDED_OVER:
                raise UsageError(f"{disk.raw}: has moved, and {self._host}:{self._folder} has no {disk.name}.fvd")
        if self._choices.qmp and not all(disk.is_there for disk in self._disks):
            self._monitor = self._look_at_machine(self._choices.qmp)
        elif self._choices.qmp:
            self._monitor = self._left_behind(self._choices.qmp)
        else:
            for disk in self._disks:
                if disk.state not in _HANDED_OVER:
                    try:
                        with explained(disk.raw), kept_from_qemu(disk.raw):
                            pass
                    except ImageBusy:
                        raise UsageError(
                            f"{disk.raw}: a machine runs on it; move it, too (--qmp, --qmp-target), or stop it"
                        ) from None
        if self._choices.keep_base and not self._choices.trust_base:
            for folder in {os.path.dirname(disk.image) for disk in self._disks if disk.there is None}:
                self._compare_template(folder)
        sizes = ", ".join(f"{disk.name}.raw ({human_size(disk.size).partition(' (')[0]})" for disk in self._disks)
        self.say(f"{sizes}: to {self._host}:{self._point}")

    def _compare_template(self, folder: str) -> None:
        """That here and that there are the same, in all that they have. Raises UsageError, FvdError, OSError."""
        name = self._choices.keep_base
        here = os.path.join(folder, name)
        if not is_local(name) or not os.path.isfile(here):
            daemon.complain(f"{here}: is not here under this name: of the templates a sample is compared alone")
            return
        ours = FileDigest(here)
        while not ((theirs := self._far.call("digest", template=name)) and ours.found()):
            self._pause(LOOK)
        if theirs != ours.found():
            raise UsageError(
                f"{here}: is another file than that at {self._host}; make them the same, leave out --keep-base, or, "
                "where only their formats differ, give --trust-base"
            )

    def _look_at_machine(self, path: str) -> Monitor:
        monitor = Monitor(path)
        self._stack.callback(monitor.close)
        for disk in self._disks:
            if not monitor.opens(disk.raw):
                raise UsageError(f"{path}: the machine there has not {disk.raw} as its disk")
        if monitor.call("query-migrate", ANSWER).get("status") in ("setup", "active", "device", "cancelling"):
            raise UsageError(f"{path}: the machine there migrates already; cancel that first: migrate_cancel")
        self._migrating = self._was_sent(monitor)
        self._ran = self._migrating or bool(monitor.call("query-status", ANSWER)["running"])
        self._far.call("connect", path=self._choices.qmp_target, names=[])
        return monitor

    def _left_behind(self, path: str) -> Monitor | None:
        """The machine here that was sent, if it has not ended."""
        if not somebody_listens(path):
            return None
        monitor = Monitor(path)
        self._stack.callback(monitor.close)
        has_them = all(monitor.opens(disk.raw) for disk in self._disks)
        return monitor if has_them and self._was_sent(monitor) else None

    # --- the disks --------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Have the disks be given to nobody but this target, before anybody can ask."""
        for disk in self._disks:
            disk.epoch = str(ask_mount(disk.raw, "serve")["move_epoch"])
            number = self._far.call("draw", name=disk.name, epoch=disk.epoch)
            ask_mount(disk.raw, f"keep {disk.epoch} {number}")

    def _serve(self) -> None:
        """Have a server that outlives this command."""
        if all(disk.state for disk in self._disks) and self._is_served():
            self.say(f"is served already at {self._urls}")
        else:
            self._start_server()

    def _start_server(self) -> None:
        """Raises MoveFailed."""
        raws = [disk.raw for disk in self._disks]
        creds = os.path.abspath(self._choices.tls_creds) if self._choices.tls_creds else ""

        def give(ready: Callable[[], None], _reopen_log: object) -> None:
            serve.serve(raws, lambda _urls: ready(), listen=self._listen, tls_creds=creds, once=True)

        try:
            self._server = daemon.spawn(give, LogPlaces(self._choices.log_file))
        except daemon.NotReady:
            raise MoveFailed(
                f"{self._all}: cannot be served at {self._listen}; if that is in use: --listen ADDR:PORT"
            ) from None
        self.say(f"served at {self._urls} (process {self._server})")

    @property
    def _urls(self) -> str:
        return ", ".join(disk.url for disk in self._disks)

    def _is_served(self) -> bool:
        """Whether the target finds the disks there: only it has what TLS takes to ask."""
        epochs = self._far.call("epochs", urls=[disk.url for disk in self._disks])
        ours = [facts(disk.raw, STATUS).get("move_epoch") for disk in self._disks]
        return None not in epochs and bool(epochs == ours)

    def _receive(self) -> None:
        for disk in self._disks:
            image = self._far.call(
                "receive",
                name=disk.name,
                url=disk.url,
                size=disk.size,
                keep_base=self._choices.keep_base,
                base_format=self._choices.base_format,
            )
            self.say(f"received at {self._host} as {image}")

    def _take(self) -> None:
        """Without a machine."""
        for disk in self._disks:
            self._far.call("take", name=disk.name)
            self._switched = True
            self._far.call("fetch", name=disk.name)
        self.say(f"{self._host} has taken {self._all} over: written there, and nowhere else")

    # --- the machine ------------------------------------------------------------------------------

    def _move_machine(self, monitor: Monitor) -> None:
        state = self._machine_there()
        if state == WAITS:
            self._far.call("watch", names=self._names)
            if not self._was_sent(monitor):
                self._migrate(monitor)
        elif not self._was_sent(monitor):
            raise UsageError(
                f"{self._choices.qmp_target}: the machine at {self._host} waits for none (it is {state}); "
                "start it with -incoming defer"
            )
        else:
            self._far.call("watch", names=self._names)
        self._switch(None)

    def _machine_there(self) -> str:
        """Its state, once it is there."""
        path, names = self._choices.qmp_target, self._names
        state: str | None = self._far.call("connect", path=path, names=names)
        if state is None:
            if self._choices.start:
                self._far.call("start", words=self._choices.start)
            else:
                self.say(f"waiting for the machine at {self._host}: start it with -incoming defer, its QMP at {path}")
            began, told = time.monotonic(), not self._choices.start
            while state is None:
                waited = time.monotonic() - began
                if waited > MACHINE:
                    raise MoveFailed(f"{self._host}: no machine has come to {path} within {MACHINE / 60:g} minutes")
                if waited > TOLD and not told:
                    told = True
                    self.say(f"waiting for the machine at {self._host}: nothing listens at {path} yet")
                self._pause(LOOK)
                state = self._far.call("connect", path=path, names=names)
        return state

    def _migrate(self, monitor: Monitor) -> None:
        uri = self._incoming_uri()
        if uri.startswith(("tcp:", "unix:")):  # so that the source learns of a target that could not go on
            self._have_return_path(monitor)
        self._migrating = True
        monitor.call("migrate", ANSWER, uri=uri)
        self.say(f"QEMU sends the machine to {uri}")
        with progress_bar() as show:
            while (status := self._migration(monitor))["status"] not in _OVER:
                if status["status"] == "pre-switchover":
                    monitor.call("migrate-continue", ANSWER, state="pre-switchover")
                if resized := self._resized:
                    raise MoveFailed(f"{resized}; the same command again moves it as it is now")
                there = self._far.call("state")
                if there["gone"] and not self._is_settled(monitor):
                    raise MoveFailed(f"{self._host}: the machine there has ended{there['said']}")
                ram = status.get("ram", {})
                show(ram.get("total", 0) - ram.get("remaining", 0), ram.get("total", 0))
                self._pause(LOOK)
        if status["status"] != _MOVED_OVER:
            why = status.get("error-desc", "")
            why = f": {why}" if why else ""
            if said := self._far.call("state")["said"]:
                why += f"; the machine at {self._host} has ended{said}"
            raise MoveFailed(f"QEMU: the migration was {status['status']}{why}")
        ram = human_size(status["ram"]["transferred"]).partition(" (")[0]
        self.say(f"the machine was sent ({ram}); it stood still for {status.get('downtime', '?')} ms")

    @property
    def _resized(self) -> str:
        """Which disk has another size than at the target, which cannot take it over then; empty: none."""
        for disk in self._disks:
            if (size := os.stat(disk.raw).st_size) != disk.size:
                return f"{disk.raw}: has {size} bytes by now, and not {disk.size}"
        return ""

    def _have_return_path(self, monitor: Monitor) -> None:
        with contextlib.suppress(CommandRefused):
            found = {each["capability"]: each["state"] for each in monitor.call("query-migrate-capabilities", ANSWER)}
            if not found.get(_RETURN_PATH, True):
                _set_capability(monitor, _RETURN_PATH, True)
                self._set_return_path = True

    def _is_settled(self, monitor: Monitor) -> bool:
        """Whether QEMU here ends the migration by itself: it notices that the other one is gone, or was told to."""
        deadline = time.monotonic() + NOTICED
        while self._migration(monitor)["status"] not in _OVER:
            if time.monotonic() > deadline:
                return False
            self._pause(LOOK)
        return True

    @staticmethod
    def _migration(monitor: Monitor) -> dict[str, Any]:
        found: dict[str, Any] = monitor.call("query-migrate", ANSWER)
        if found.get("status") == _MOVED_OVER and found.get("total-time") == 0:  # its times come a moment later
            time.sleep(LOOK)
            found = monitor.call("query-migrate", ANSWER)
        return {"status": "none", **found}

    def _was_sent(self, monitor: Monitor) -> bool:
        """Whether the machine here has gone; one that runs tells the same of the migration by which it came."""
        if self._migration(monitor)["status"] != _MOVED_OVER:
            return False
        return monitor.call("query-status", ANSWER)["status"] in _SENT

    def _incoming_uri(self) -> str:
        """Where the machine there waits; it is told to."""
        if self._choices.uri:
            with contextlib.suppress(UsageError, FvdError):  # it may wait there already
                self._far.call("command", name="migrate-incoming", uri=self._choices.uri)
            return self._choices.uri
        shown = _address_of(self._host)
        refused = ""
        try:
            self._far.call("command", name="migrate-incoming", uri=f"tcp:{shown}:0")
        except FvdError as error:
            refused = str(error)
        for place in self._far.call("command", name="query-migrate").get("socket-address", []):
            if place["type"] == "inet":
                return f"tcp:{shown}:{place['port']}"
            if place["type"] == "unix":
                return f"unix:{place['path']}"
        raise MoveFailed(refused or f"{self._host}: QEMU there does not say where it waits; give --migrate-uri")

    def _switch(self, patience: float | None) -> None:
        """QEMU has sent all: the target takes the disks over. `patience`: seconds; None: no end.

        Raises MoveFailed where that is no more to come: the machine runs here again.
        """
        began = time.monotonic()
        said = ""
        while True:
            state = self._far.call("state")
            if not state["due"]:
                break
            if state["gone"]:
                self._come_home(state["said"])
            if len(state["due"]) == len(self._disks) and (resized := self._resized):
                with contextlib.suppress(FvdError):  # it has ended
                    self._far.call("command", name="quit")  # it never gets its disks
                self._come_home(f": {resized}")
            if state["refused"] and state["refused"] != said:
                said = state["refused"]
                daemon.complain(f"{self._host}: {said}; trying again")
            if patience is not None and time.monotonic() - began > patience:
                return
            self._pause(LOOK / 5)
        self._switched = True
        machine = f"the machine {'runs' if self._ran else 'is, paused as it was here,'} at {self._host}"
        self.say(f"{machine}; {self._all}: written there, and nowhere else")

    def _come_home(self, said: str) -> None:
        """The machine there has ended before it had the disks: it goes on here, unless one was taken just now.

        `said`: why, after a colon; empty: nobody knows.
        """
        with contextlib.suppress(FvdError):  # one that was taken over refuses
            self._far.call("abandon")
        taken = []
        for disk in self._disks:
            try:
                ask_mount(disk.raw, "end")
            except UsageError:
                taken.append(disk)
        if taken:
            self._switched = True
            names = ", ".join(f"{disk.name}.raw" for disk in taken)
            raise MoveFailed(f"{self._host}: the machine there has ended, after {names} was taken over{said}")
        raise MoveFailed(f"{self._host}: the machine there has ended at the switch-over{said}")

    def _end_machine(self) -> None:
        """That here has no disk any more: it must not go on."""
        if self._monitor is None:
            return
        monitor, self._monitor = self._monitor, None
        try:
            monitor.call("quit", ANSWER)
        except NoAnswer:
            pass  # it has ended
        except CommandRefused as error:
            daemon.complain(f"{error}; end the machine here: its disk is frozen")
            return
        self.say("QEMU here has ended")

    # --- afterwards -------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Until all is local there. A connection that is cut is waited for, for as long as ssh does."""
        self._far.patience = math.inf
        told = time.monotonic()
        machine_told = False
        obstacles: dict[str, str] = {}
        with progress_bar() as show:
            while True:
                found = self._far.call("disks", names=self._names)
                left = [disk for disk in found.values() if disk["move"] in ("receiving", "active")]
                if not left:
                    break
                self._tell_obstacles(found, obstacles)
                if self._choices.qmp and not machine_told and self._far.call("state")["gone"]:
                    machine_told = True
                    daemon.complain(f"{self._host}: the machine there has ended; its disk is still copied")
                for name, disk in found.items():
                    if disk["move"] == "active" and not disk["open"]:  # nothing copies what nobody uses
                        self._far.call("fetch", name=name)
                done = sum(disk.get("local_bytes", 0) for disk in found.values())
                total = done + sum(disk.get("to_copy", 0) for disk in found.values())
                show(done, total)
                if time.monotonic() - told > TOLD and not sys.stderr.isatty():
                    told = time.monotonic()
                    self.say(f"{done / max(total, 1):.1%} of {self._all} is local at {self._host}{_pace(left)}")
                self._pause(FOLLOW_LOOK)
        self.say(f"all of {self._all} is local at {self._host}")

    def _tell_obstacles(self, found: dict[str, dict[str, Any]], told: dict[str, str]) -> None:
        """Why disks are not copied, where they are not, and that they are again; once. `told`: what they lacked."""
        for name, disk in found.items():
            lacks, why = _obstacle(disk)
            if lacks == told.get(name, ""):
                continue
            told[name] = lacks
            if why:
                daemon.complain(f"{self._host}: {name}.raw: {why}; trying again")
            else:
                self.say(f"{name}.raw: goes on")
            if lacks == _SOURCE and not self._server and not all(serve.is_served(each.raw) for each in self._disks):
                self._start_server()

    def _release(self) -> None:
        deadline = time.monotonic() + TOLD_SOURCE
        for disk in self._disks:
            while facts(disk.raw, STATUS)["move"] != "released":
                if time.monotonic() > deadline:
                    ask_mount(disk.raw, "release")
                self._pause(LOOK)
        self._far.call("end")
        self._end_server()
        images = ", ".join(disk.image for disk in self._disks)
        self.say(f"done; {images} may be removed here")

    def _end_server(self) -> None:
        """It ends by itself, once nothing is left to serve."""
        server, self._server = self._server, 0
        if not server:
            return
        deadline = time.monotonic() + 2 * serve.LOOK
        while not os.waitpid(server, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(server, signal.SIGTERM)
                os.waitpid(server, 0)
                return
            time.sleep(LOOK)

    # --- giving up --------------------------------------------------------------------------------

    def give_up(self) -> None:
        """Something ended us: have all as before, or, where that cannot be, say what is where."""
        if not self._changed:
            return
        if self._migrating and not self._switched and self._monitor is not None:
            with contextlib.suppress(FvdError, OSError):
                self._settle(self._monitor)
        if self._switched or not self._undo():
            self._tell()

    def _settle(self, monitor: Monitor) -> None:
        """End QEMU's migration; if that is too late, finish what has begun. Raises FvdError, OSError."""
        with contextlib.suppress(NoAnswer):  # it has ended, perhaps when it had sent all
            if self._migration(monitor)["status"] not in _OVER:
                with contextlib.suppress(CommandRefused):  # it may have ended just now
                    monitor.call("migrate_cancel", ANSWER)
            deadline = time.monotonic() + CANCEL
            while self._migration(monitor)["status"] not in _OVER and time.monotonic() < deadline:
                time.sleep(LOOK)
        if self._has_gone(monitor):
            self._switch(SETTLE)
            if self._switched:
                self._end_machine()

    def _undo(self) -> bool:
        """Have the source as it was, and nothing at the target; False where it is too late for that."""
        if self._may_run_there():
            return False
        removed = not self._migrating and self._remove_there()  # who opens the disk there is still answered
        for disk in self._disks:
            try:
                ask_mount(disk.raw, "end")
            except (FvdError, OSError) as error:
                daemon.complain(str(error) if isinstance(error, FvdError) else f"{disk.raw}: {error.strerror}")
                return False
        if self._monitor is not None and self._set_return_path:
            with contextlib.suppress(FvdError):  # it has ended
                _set_capability(self._monitor, _RETURN_PATH, False)
        if self._monitor is not None and self._ran:
            try:
                if not self._monitor.call("query-status", ANSWER)["running"]:
                    self._monitor.call("cont", ANSWER)
            except FvdError as error:
                daemon.complain(str(error))
        self._end_server()
        if not removed:
            self._remove_there()
        daemon.complain(f"{self._all}: not moved; all is as before")
        return True

    def _remove_there(self) -> bool:
        """What was made at the target, and the machine that waits there. True: it was tried, whatever came of it."""
        try:
            for failed in self._far.call("remove"):
                daemon.complain(f"{self._host}: {failed}")
        except FvdError as error:
            daemon.complain(f"{error}; what was made there is removed as soon as fvdfs there notices")
        return True

    def _may_run_there(self) -> bool:
        """Whether the machine may have come to run there, as far as can be known here."""
        if not self._migrating or self._monitor is None or not self._has_gone(self._monitor):
            return False
        try:
            return not self._far.call("state")["gone"]
        except FvdError:
            return True

    def _has_gone(self, monitor: Monitor) -> bool:
        """Whether the machine was sent; where QEMU here has ended, whether it may have been."""
        try:
            return self._was_sent(monitor)
        except FvdError:
            pass
        try:
            return bool(self._far.call("state")["runs"])
        except FvdError:
            return True

    def _tell(self) -> None:
        """What is where, and how to go on."""
        by = f"process {self._server}" if self._server else "fvdfs serve"
        have = "has" if self._switched else "may have"
        stayed = [f"{disk.name}.raw" for disk in self._disks if self._switched and self._is_here(disk)]
        gone = ", ".join(name for name in (f"{disk.name}.raw" for disk in self._disks) if name not in stayed)
        daemon.complain(
            f"{self._host} {have} {gone}: {self._point} there is to be used from now on, and nothing here; "
            f"what is missing is copied in the background. Until all is there, {by} has to run on this host: it ends "
            "by itself then. The same command again shows how far it is, and goes on."
            + (f" Not moved, and to be used here: {', '.join(stayed)}." if stayed else "")
        )

    @staticmethod
    def _is_here(disk: _Disk) -> bool:
        """Whether it has not moved, as far as can be seen."""
        try:
            return facts(disk.raw, STATUS)["move"] not in _HANDED_OVER
        except (FvdError, OSError):
            return False


def _set_capability(monitor: Monitor, name: str, state: bool) -> None:
    monitor.call("migrate-set-capabilities", ANSWER, capabilities=[{"capability": name, "state": state}])


def _obstacle(disk: dict[str, Any]) -> tuple[str, str]:
    """What a disk at the target lacks to be copied, and that in words; empty: nothing."""
    outage = disk.get("base_outage")
    if outage is not None and outage["until"] is None:  # the times in it are by the clock there
        return _SOURCE, f"cannot be read from here since {time.strftime('%T')}: {outage['reason']}"
    if failed := disk.get("failed"):
        return failed, failed
    if disk["state"] == "failed":
        reason = disk["reason"].partition("; again in")[0]
        return reason, f"does not copy: {reason}"
    return "", ""


def _pace(left: list[dict[str, Any]]) -> str:
    rate = sum(disk.get("rate") or 0 for disk in left)
    eta = max((disk.get("eta") or 0 for disk in left), default=0)
    return (f", {rate / 1e6:.1f} MB/s" if rate else "") + (f", {eta} s left" if eta else "")


def prefix(text: str) -> tuple[str, ...]:
    """The words of a command. Raises UsageError."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{text}: {error}") from None
