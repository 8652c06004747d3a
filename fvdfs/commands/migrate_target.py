"""The far end of `fvdfs migrate`: does at the target what the command at the source asks for. Blocks.

    {"do": NAME, ...} in a line on stdin ──▶ {"is": ...} or {"failed": text, "code": exit code} in a line on stdout

Once it is told to `watch`, it takes the disks over as soon as the machine runs here, without being asked. When its
stdin ends, somebody at the source was killed, or the connection was cut: then it goes on as far as it can know what
is right. A machine that comes to run here gets its disks; where none can come any more, what was made is removed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from fvdfs import daemon, mounts
from fvdfs.commands.attributes import explained, facts, mounted_by, why_missing
from fvdfs.commands.digest import FileDigest
from fvdfs.commands.migration import ask_mount
from fvdfs.commands.receive import run_receive
from fvdfs.errors import FvdError, UsageError, exit_code
from fvdfs.format.migration import Incoming, Record, Target
from fvdfs.image.migration import new_secret, read_record
from fvdfs.image.policy import given_tls_creds
from fvdfs.qmp import ANSWER, WAITS, Monitor, somebody_listens
from fvdfs.sizes import human_size
from fvdfs.store.host import open_path
from fvdfs.store.locations import parse_location, within
from fvdfs.store.mountinfo import mount_points
from fvdfs.store.source import epoch_of
from fvdfs.xattrs import PREFETCH, STATUS

APPEAR = 10.0  # seconds until a new image is seen in its mount
LOOK = 0.02  # seconds between looks whether the machine runs
QUIT = 5.0  # seconds for QEMU to end
_MOST_SAID = 4096  # bytes


def run() -> int:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    target = _Target()
    received = b""
    os.write(1, b"\n")  # a shell may have greeted, without an end
    while True:
        target.look()
        if not select.select([0], [], [], LOOK if target.is_awaiting else None)[0]:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            break
        *lines, received = (received + data).split(b"\n")
        for line in lines:
            answer = json.dumps(_answer(target, json.loads(line))).encode() + b"\n"
            with contextlib.suppress(BrokenPipeError):  # then stdin ends, too
                os.write(1, answer)
    while target.is_awaiting:
        time.sleep(LOOK)
        target.look()
    target.clear()
    return 0


def _answer(target: _Target, request: dict[str, Any]) -> dict[str, Any]:
    calls: dict[str, Callable[..., Any]] = {
        "find": target.find,
        "digest": target.digest,
        "draw": target.draw,
        "epochs": target.epochs,
        "receive": target.receive,
        "connect": target.connect,
        "start": target.start,
        "command": target.command,
        "watch": target.watch,
        "state": target.state,
        "take": target.take,
        "fetch": target.fetch,
        "disks": target.disks,
        "abandon": target.abandon,
        "remove": target.remove,
        "end": target.end,
    }
    number = {"number": request.pop("number")}
    try:
        return number | {"is": calls[request.pop("do")](**request)}
    except FvdError as error:
        return number | {"failed": str(error), "code": exit_code(error)}
    except OSError as error:
        return number | {"failed": mounts.explained(error), "code": exit_code(error)}


class _Target:
    """The mount here, the machine here, and what was made."""

    def __init__(self) -> None:
        self.point = ""
        self._folder = ""
        self._tls_creds = ""
        self._made: list[str] = []
        """Names of disks that may be removed, while they are being received."""
        self._drawn: dict[str, Incoming] = {}
        """What images that are to be made will say of their moves."""
        self._qmp = ""
        """Where its monitor is, or is to come."""
        self._monitor: Monitor | None = None
        self.is_watching = False
        self.gone = False
        """Whether the machine has ended."""
        self.runs = False
        self.due: list[str] = []
        """Disks to be taken over as soon as it runs."""
        self._refused = ""
        self._starting: subprocess.Popen[bytes] | None = None
        self._digests: dict[str, FileDigest] = {}
        self._said = -1
        """What that writes to stderr: our own may be ssh's, which ends no sooner than who has it."""

    def find(self, place: str, urls: dict[str, str], takes: dict[str, int]) -> dict[str, Any]:
        """The mount, and what there is of these disks. Raises UsageError where they cannot be received, OSError.

        `takes`: bytes that each of them takes at the source, at least.
        """
        self.point, self._folder, allowed, self._tls_creds = _mount_of(place)
        found: dict[str, Any] = {}
        for name, url in urls.items():
            location = parse_location(url)
            if not any(prefix == "" or within(location.url, prefix) for prefix in allowed):
                prefix = location.url.removesuffix(f"/{name}") + "/"
                raise UsageError(f"{self.point}: does not allow {url}; mount it with -o allow_url={prefix}")
            found[name] = self._there(name)
        space = os.statvfs(self._folder)
        needed = sum(takes[name] for name in urls if found[name] is None)
        if needed > (free := space.f_bavail * space.f_frsize):
            short, room = human_size(needed).partition(" (")[0], human_size(free).partition(" (")[0]
            raise UsageError(f"{self._folder}: has room for {room}, and {short} are to come; make room there")
        return {"point": self.point, "folder": self._folder, "disks": found}

    def _there(self, name: str) -> dict[str, str] | None:
        """What there is under this name. Raises UsageError where it is no disk that is being received."""
        image = self._image(name)
        if not os.path.lexists(image):
            if os.path.lexists(self._raw(name)):
                raise UsageError(f"{self._raw(name)}: exists already")
            return None
        into = _record_of(image).incoming
        if into is None:
            raise UsageError(f"{image}: exists already; remove it, or choose another folder")
        return {"state": into.state.value, "epoch": into.epoch, "number": into.number}

    def digest(self, template: str) -> str:
        """Of all of a template's file; empty: not known yet. Raises OSError."""
        if template not in self._digests:
            self._digests[template] = FileDigest(os.path.join(self._folder, template))
        return self._digests[template].found()

    def draw(self, name: str, epoch: str) -> str:
        """The number by which this disk will be asked for from here in this move. Raises FormatError, OSError."""
        image = self._image(name)
        if os.path.lexists(image):
            into = _record_of(image).incoming
            assert into is not None
        else:
            into = self._drawn[name] = Incoming(Target.RECEIVING, epoch, new_secret())
        return into.number

    def epochs(self, urls: list[str]) -> list[str | None]:
        """Of the moves for which these are served; None: that one is not, as far as can be seen from here."""
        return [self._epoch(url) for url in urls]

    def _epoch(self, url: str) -> str | None:
        try:
            return daemon.run_loop(functools.partial(epoch_of, parse_location(url), self._tls_creds))
        except (FvdError, OSError):
            return None

    def receive(self, name: str, url: str, size: int, keep_base: str, base_format: str) -> str:
        """Make the disk; its image. Raises UsageError, ImageError, OSError."""
        image = self._image(name)
        if not os.path.lexists(image):
            given_tls_creds.set(self._tls_creds)
            run_receive(url, image, keep_base=keep_base, base_format=base_format, into=self._drawn.get(name))
        self._made.append(name)
        self._await_disk(name, size)
        return image

    def _await_disk(self, name: str, size: int) -> None:
        raw, deadline = self._raw(name), time.monotonic() + APPEAR
        while not os.path.lexists(raw):
            if (why := why_missing(raw)) or time.monotonic() > deadline:
                raise UsageError(f"{raw}: {why or 'does not appear; the log of its mount says why'}")
            time.sleep(LOOK)
        if (there := os.stat(raw).st_size) != size:
            raise UsageError(f"{raw}: has {there} bytes, and its source {size}")

    def connect(self, path: str, names: list[str]) -> str | None:
        """To the machine here, which has these disks; its state, or None. Raises UsageError, NoAnswer."""
        self._qmp = path
        if self._starting is not None and self._starting.poll():
            code = self._starting.returncode
            raise UsageError(f"--start: the command has ended with exit code {code}{self._last_words}")
        if self._monitor is None:
            if not somebody_listens(path):
                return None
            self._monitor = Monitor(path)
        status = str(self._monitor.call("query-status", ANSWER)["status"])
        for name in names:
            if not self._monitor.opens(self._raw(name)):
                raise UsageError(f"{path}: the machine there has not {self._raw(name)} as its disk")
        return status

    def start(self, words: str) -> None:
        """Start the machine by a shell command. Raises UsageError, OSError."""
        self._said = os.memfd_create("said")
        with open(os.devnull, "r+b") as null:
            self._starting = subprocess.Popen(
                ["sh", "-c", words], stdin=null, stdout=null, stderr=self._said, start_new_session=True
            )

    @property
    def _last_words(self) -> str:
        """What the machine that was started complained of last, after a colon; empty: nothing."""
        if self._said < 0:
            return ""
        said = os.pread(self._said, _MOST_SAID, max(0, os.fstat(self._said).st_size - _MOST_SAID))
        lines = said.decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def command(self, name: str, **arguments: Any) -> Any:
        """One of QEMU's. Raises CommandRefused, NoAnswer."""
        assert self._monitor is not None
        return self._monitor.call(name, ANSWER, **arguments)

    def watch(self, names: list[str]) -> None:
        """Take these over as soon as the machine runs."""
        self.due = list(names)
        self.is_watching = True

    @property
    def is_awaiting(self) -> bool:
        """Whether a machine may come to run that has not all of its disks."""
        return self.is_watching and bool(self.due) and not self.gone

    def look(self) -> None:
        """Whether it runs, and what is due then."""
        if not self.is_watching or self._monitor is None or self.gone:
            return
        try:
            self._monitor.skip_events()
            if self.due and not self.runs:
                self.runs = self._monitor.call("query-status", ANSWER)["status"] != WAITS
        except FvdError:
            self.gone = True
        if self.runs:
            for name in list(self.due):
                try:
                    self.take(name)
                except (FvdError, OSError) as error:
                    self._refused = str(error)

    def take(self, name: str) -> None:
        """Have the disk be written here. Raises UsageError, ImageError, OSError."""
        raw = self._raw(name)
        with explained(raw):
            ask_mount(raw, "activate")
        if name in self.due:
            self.due.remove(name)

    def state(self) -> dict[str, Any]:
        """Of the machine, and of what is due; `refused`: why the last attempt was; `said`: by one that has ended."""
        self.look()
        refused, said = self._refused if self.due else "", self._last_words if self.gone else ""
        return {"runs": self.runs, "gone": self.gone, "due": self.due, "refused": refused, "said": said}

    def fetch(self, name: str) -> None:
        """Have what is missing be copied, though no machine runs. Raises OSError."""
        os.setxattr(self._raw(name), PREFETCH, b"start")

    def disks(self, names: list[str]) -> dict[str, Any]:
        """Their states. Raises OSError."""
        return {name: facts(self._raw(name), STATUS) for name in names}

    def abandon(self) -> None:
        """Take none of them over any more; a source that has handed one over goes on. Raises UsageError, OSError."""
        self.is_watching = False
        for name in self._made:
            raw = self._raw(name)
            if os.path.lexists(raw):
                with explained(raw):
                    ask_mount(raw, "abandon")

    def remove(self) -> list[str]:
        """End a machine that waits here, or is still to come, and remove what was made; what could not be, and why."""
        was_watching, self.is_watching = self.is_watching, False
        failed = []
        if self._starting is not None and self._monitor is None:
            failed += self._end_start(self._starting)
        if self._monitor is not None:
            with contextlib.suppress(FvdError):  # then it has ended
                is_ours = self._starting is not None and not was_watching  # it was to wait, and does not
                if is_ours or self._monitor.call("query-status", ANSWER)["status"] == WAITS:
                    self._monitor.call("quit", QUIT)
                    select.select([self._monitor], [], [], QUIT)
        for name in self._made:
            image = self._image(name)
            try:
                into = _record_of(image).incoming
                if into is not None and into.state in (Target.RECEIVING, Target.ABANDONED):
                    os.unlink(image)
                else:
                    failed.append(f"{image}: is no longer being received; remove it there")
            except FileNotFoundError:
                continue
            except (FvdError, OSError) as error:
                failed.append(f"{image}: {error}; remove it there")
        self._made.clear()
        return failed

    def _end_start(self, starting: subprocess.Popen[bytes]) -> list[str]:
        """Connect to the machine that was started, or end it before it is there; what could not be, and why."""
        deadline = time.monotonic() + APPEAR
        while starting.poll() == 0 and not somebody_listens(self._qmp):  # a machine in the background: it comes
            if time.monotonic() > deadline:
                return [f"{self._qmp}: the machine that --start has started does not come; end it there"]
            time.sleep(LOOK)
        failed = []
        if somebody_listens(self._qmp):
            try:
                self._monitor = Monitor(self._qmp)
            except FvdError as error:
                failed.append(f"{error}; end it there")
            else:
                return []
        if starting.poll() is not None:
            return failed
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(starting.pid, number)
                starting.wait(QUIT)
            except OSError as error:  # it is another user's
                return [f"--start: process {starting.pid}: {error.strerror}; end it there"]
            except subprocess.TimeoutExpired:
                continue
            return []
        return [f"--start: process {starting.pid} does not end; end it there"]

    def clear(self) -> None:
        """Nobody says what is to become of this: remove what no machine can need."""
        if not self.runs:
            self.remove()

    def end(self) -> None:
        """All is as it is to be."""
        self._made.clear()
        self.is_watching = False

    def _image(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.fvd")

    def _raw(self, name: str) -> str:
        return os.path.join(self.point, f"{name}.raw")


def _record_of(image: str) -> Record:
    file = open_path(image, writable=False)
    try:
        return read_record(file)
    finally:
        file.close()


def _mount_of(place: str) -> tuple[str, str, list[str], str]:
    """Mount point, folder of images, allowed URLs, and credentials, of a mount or its folder. Raises UsageError."""
    wanted = os.path.realpath(place)
    for mount in reversed(mount_points()):
        if mount.is_ours and wanted in (mount.path, os.path.realpath(mount.source)):
            mounts.refuse_dead(mount.path)
            try:
                found = facts(mount.path, STATUS)
            except PermissionError:
                raise UsageError(f"{mount.path}: permission denied; {mounted_by(mount.path)}") from None
            return mount.path, found["folder"], found["allow_url"], found["tls_creds"]
    raise UsageError(f"{place}: fvdfs is not mounted there, and no mount shows it; mount it first")


ACTIVE = {Target.ACTIVE.value, Target.LOCAL.value}
"""What a disk is that was taken over."""
