"""One qemu-storage-daemon: started, its export attached, watched, stopped.

The daemon exports the image as a file over FUSE, on an empty file in a private folder. As soon as that file is open
here, mount and folder are removed: the open file keeps the export alive, and nothing is left to clean up later. The
daemon ends with this process, by a signal that the kernel sends when the thread that started it ends; so `start` must
be called in the main thread.

It opens no file by itself: it inherits descriptors that are open and locked already. When it runs, its open files are
compared with those that it was given: the image may have been changed in between.

Punching a hole in the export is only a hint to QEMU 7.2: it leaves parts of clusters as they were, and in most formats
all. What is no hole after that is zeroed. Holes are left alone: QEMU would give a place to the zeros that it writes to
one, and make tables for one that it discards.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

import trio

from fvdfs.errors import FvdError, ImageError, Locked, Refused, Unreachable, UsageError
from fvdfs.store.connecting import SILENCE, copies_of_connections, is_closed, silence
from fvdfs.store.host import (
    FALLOC_FL_ZERO_RANGE,
    PUNCH,
    ZERO_RANGE,
    HostFile,
    Identity,
    fallocate,
    identity_of,
)
from fvdfs.store.locations import Options
from fvdfs.store.qemu_words import PROGRAM, of_rbd, of_servers, of_tls

log = logging.getLogger(__name__)

START_TIMEOUT = 10.0  # seconds until the export answers; a server may be far away
KEY_TIMEOUT = 60.0  # the same of an encrypted image: QEMU makes its key cost two seconds of an idle processor
STOP_TIMEOUT = 10.0  # seconds to write out what is left, then it is killed
RADOS_TIMEOUT = 8  # seconds until an answer of Ceph's, fewer than `START_TIMEOUT`; by itself librados waits for ever
_ABANDONED = 600.0  # seconds; a folder is there while its daemon starts
_PREFIX = "fvdfs-"
_POLL_INTERVAL = 0.002  # seconds between looks whether it is ready
_PACKAGES = {
    PROGRAM: "qemu-system-common",
    "setpriv": "util-linux",
    "fusermount3": "fuse3",
}
_BLOCK_PACKAGE = "qemu-block-extra"
# A parent that died before setpriv had asked for the signal is noticed by the shell.
_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "sh", "-c", 'test "$PPID" = "$0" && exec "$@"')


def _missing(program: str) -> UsageError:
    package = _PACKAGES[program]
    return UsageError(f"{program} is needed for this image and is not installed: apt install {package}")


def _failure(name: str, line: str) -> FvdError:
    """The error for a daemon that ended with this line."""
    if "Unknown driver" in line or "Unknown protocol" in line:
        return UsageError(f"{name}: QEMU lacks the driver for this: apt install {_BLOCK_PACKAGE} ({line})")
    if "'fuse'" in line:
        return UsageError(f"{name}: {PROGRAM} is built without FUSE exports ({line})")
    if reason := of_servers(line):
        return Locked(name, reason)
    if "Invalid password" in line:
        right = "name the file with the right one: --secret FILE, or -o secret=FILE for a mount"
        return Locked(name, f"the passphrase is wrong: {right} ({line})")
    if reason := of_tls(line) or of_rbd(line):
        return ImageError(name, reason)
    if line.endswith(f": {os.strerror(errno.ETIMEDOUT)}"):
        return Unreachable(name, f"QEMU cannot open it: {line}")
    return ImageError(name, f"QEMU cannot open it: {line}")


def _environment(writable: bool) -> dict[str, str]:
    """What it is started with.

    That Ceph does not answer any more shall be noticed of what is only read. What is written waits for ever, as for a
    share that hangs: nobody could tell whether a write that is given up will be done after all.
    """
    if writable:
        return dict(os.environ)
    options = ("rados-osd-op-timeout", "rados-mon-op-timeout", "client-mount-timeout")
    words = [os.environ.get("CEPH_ARGS", ""), *(f"--{option}={RADOS_TIMEOUT}" for option in options)]
    return os.environ | {"CEPH_ARGS": " ".join(filter(None, words))}


def _clear_abandoned() -> None:
    """Remove folders of processes that were killed while their daemons started."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with contextlib.suppress(OSError):
                    _clear(entry)


def _clear(entry: os.DirEntry[str]) -> None:
    """Remove a folder if it is abandoned, and has nothing of anybody else's. Raises OSError."""
    found = entry.stat(follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or time.time() - found.st_mtime < _ABANDONED:
        return
    names = {*os.listdir(entry.path)}
    if "disk" not in names or not names <= {"disk", "pid"}:
        return
    _unmount(os.path.join(entry.path, "disk"))
    shutil.rmtree(entry.path)


def _unmount(path: str) -> None:
    subprocess.run(["fusermount3", "-u", "-z", "-q", path], capture_output=True, check=False)


class _Export(HostFile):
    """The file that a daemon exports."""

    holes_are_zeros = True
    """Whether holes read as zeros."""

    def zero_now(self, offset: int, length: int, *, writes: bool = True) -> None:
        for start, stop in self._data(offset, offset + length):
            fallocate(self._fd, PUNCH, start, stop - start)
            for left, left_stop in self._data(start, stop):
                if not fallocate(self._fd, ZERO_RANGE, left, left_stop - left):
                    self._check_zeros_may_be_written(writes)
                    self._write_zeros(left, left_stop)

    def _data(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What is no hole of bytes [start, stop), which may change meanwhile. Raises OSError."""
        while start < stop:
            end, hole = self.extent_now(start, stop)
            if not hole:
                yield start, end
            start = end

    def extent_now(self, start: int, stop: int) -> tuple[int, bool]:
        return super().extent_now(start, stop) if self.holes_are_zeros else (stop, False)

    async def extend(self, start: int, stop: int) -> None:
        """Make it `stop` bytes long, and have bytes [start, stop) read as zeros. Raises OSError.

        Of an encrypted image: QEMU does not extend one by itself, but where it is going to write the zeros.
        """
        if not await self._waiter.run(lambda: fallocate(self._fd, FALLOC_FL_ZERO_RANGE, start, stop - start)):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def flush_now(self) -> None:
        """`flush` for callers that are in a thread already."""
        os.fdatasync(self._fd)


class StorageDaemon:
    """One running qemu-storage-daemon, and the file that it exports."""

    def __init__(
        self,
        name: str,
        descriptors: Sequence[tuple[int, str]],
        objects: Sequence[Options] = (),
        locked: Sequence[int] = (),
        *,
        connections: Sequence[socket.socket] = (),
        reconnects: bool = False,
        lent: Sequence[int] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        holes_are_zeros: bool = True,
        quiet: bool = False,
    ) -> None:
        """`name`: of the image, for messages. `descriptors`: what it opens files by, and their names.

        `objects`: passphrases and keys (`QemuFiles.objects`). `locked`: descriptors whose locks last as long as it.
        `connections`: to servers; `stop` closes them. `reconnects`: it makes more by itself, and new ones where these
        end. `lent`: more descriptors, and `environment`: more variables, that it inherits as it starts.
        `holes_are_zeros`: whether holes in the image read as zeros, as those of a device need not. `quiet`: what it
        says is not for the log until it has started.
        """
        self._quiet = quiet
        self._connections = connections
        self._reconnects = reconnects
        self._copies: list[socket.socket] | None = None
        """Of the connections that it has made; None: it makes none, or we may not have them."""
        self._lent = lent
        self._environment = environment
        self._holes_are_zeros = holes_are_zeros
        self._locked = locked
        self._objects = objects
        self.name = name
        self.size = 0
        """Bytes; what it was when last looked at."""
        self.users = 0
        """Operations under way."""
        self.gone = False
        """Whether it was given up: another one takes its place."""
        self.verdict = ""
        """Why it was killed."""
        self.flush_failed = False
        """Whether a flush has failed: what that lost, the next one does not tell of."""
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None
        self._export: _Export | None = None
        self._folder = ""
        self._arguments: list[str] = []
        self._lines: collections.deque[str] = collections.deque(maxlen=20)
        self._listener: threading.Thread | None = None
        self._guard = threading.Lock()
        self._stopping = False

    @property
    def export(self) -> _Export:
        """The image as a raw file."""
        assert self._export is not None
        return self._export

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    @property
    def last_words(self) -> str:
        """What it complained of last, or else how it ended."""
        code = None if self._process is None else self._process.poll()
        if self.verdict:
            return self.verdict
        if code is not None and code < 0:
            return f"killed by signal {-code}"
        lines = list(self._lines)
        own = [line.removeprefix(PROGRAM + ": ") for line in lines if line.startswith(PROGRAM + ": ")]
        return [f"exit code {code}", *lines, *own][-1]

    async def start(self, options: Sequence[Options], *, writable: bool) -> None:
        """Run it with these `BlockdevOptions`; the node-name of the last is `disk`. Only from the main thread.

        Raises UsageError where a program or a driver is missing, ImageError, Unreachable among them, OSError.
        """
        # A folder of PATH may be on a share that hangs; so the event loop, which has to start the process, gets a path.
        paths = await trio.to_thread.run_sync(lambda: {program: shutil.which(program) for program in _PACKAGES})
        for program, path in paths.items():
            if path is None:
                raise _missing(program)
        patience = KEY_TIMEOUT if any("key-secret" in node for node in options) else START_TIMEOUT
        try:
            with trio.fail_after(patience):
                await trio.to_thread.run_sync(self._make_folder)
                self._launch(options, writable, str(paths[_WITH_PARENT[0]]))
                await self._wait_until_ready()
                await trio.to_thread.run_sync(self._attach, writable, abandon_on_cancel=True)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.stop)
            if isinstance(error, trio.TooSlowError):
                text = f"no answer within {patience:.0f} seconds"
                raise Unreachable(self.name, f"QEMU cannot open it: {text}") from None
            raise
        self._quiet = False

    def _make_folder(self) -> None:
        _clear_abandoned()
        self._folder = tempfile.mkdtemp(prefix=_PREFIX)
        Path(self._folder, "disk").touch(0o600)

    def _launch(self, options: Sequence[Options], writable: bool, setpriv: str) -> None:
        disk = os.path.join(self._folder, "disk")
        export = {
            "type": "fuse",
            "id": "export",
            "node-name": "disk",
            "mountpoint": disk,
            "writable": writable,
            "growable": writable,
            "allow-other": "off",
        }
        nodes = [json.dumps(node) for node in options]
        self._arguments = [*nodes, json.dumps(export)]
        command = [PROGRAM]
        for each in self._objects:
            command += ["--object", json.dumps(each)]
        for node in nodes:
            command += ["--blockdev", node]
        command += ["--export", self._arguments[-1]]
        command += ["--pidfile", os.path.join(self._folder, "pid")]
        self._process = subprocess.Popen(
            [setpriv, *_WITH_PARENT[1:], str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[
                *(fd for fd, _ in self._descriptors),
                *self._locked,
                *self._lent,
                *(c.fileno() for c in self._connections),
            ],
            cwd="/",
            env={**_environment(writable), **self._environment},
            start_new_session=True,  # the terminal's signals are not for it
        )
        assert self._process.stderr is not None
        self._listener = threading.Thread(
            target=self._listen, args=(self._process.stderr,), name=f"log of {PROGRAM}", daemon=True
        )
        self._listener.start()

    def _listen(self, stream: IO[bytes]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                for argument in self._arguments:
                    for option in ("--blockdev", "--export"):
                        line = line.replace(f"{option} {argument}: ", "")
                for fd, name in self._descriptors:
                    line = line.replace(f"/proc/self/fd/{fd}'", f"{name}'").replace(f"/proc/self/fd/{fd}]", f"{name}]")
                if line:
                    self._lines.append(line)
                    level = logging.DEBUG if self._stopping or self._quiet else logging.WARNING
                    log.log(level, "%s: %s", self.name, line)

    def _is_ready(self) -> bool:
        """Whether the pid file is written, which is done when the export stands."""
        try:
            return os.stat(os.path.join(self._folder, "pid")).st_size > 0
        except FileNotFoundError:
            return False

    async def _wait_until_ready(self) -> None:
        while not self._is_ready():
            if not self.alive:
                if self._listener is not None:
                    await trio.to_thread.run_sync(self._listener.join, 1.0)
                raise _failure(self.name, self.last_words)
            await trio.sleep(_POLL_INTERVAL)

    def _attach(self, writable: bool) -> None:
        """Open the export, and take mount and folder away."""
        disk = os.path.join(self._folder, "disk")
        # Reads of a read-only export bypass the page cache: the kernel would read ahead, 128 KiB at a time. Writes do
        # not: with O_DIRECT, QEMU 7.2's export garbles the first bytes of a buffer that does not begin on a page.
        # Root could open a read-only export for writing as well: so that is not tried, but told by `writable`.
        fd = os.open(disk, (os.O_RDWR if writable else os.O_RDONLY | os.O_DIRECT) | os.O_CLOEXEC)
        export = _Export(fd, self.name, writable)
        export.holes_are_zeros = self._holes_are_zeros
        try:
            if os.fstat(fd).st_dev == os.stat(self._folder).st_dev:
                raise ImageError(self.name, "QEMU exports nothing")
            self.size = export.size_now()
            self._take_away()
            if self._reconnects:
                self._copies = copies_of_connections(self.pid, self._connections)
            with self._guard:
                if self._stopping:
                    raise OSError(errno.ECANCELED, "stopped while it started")
                self._export = export
        except BaseException:
            with contextlib.suppress(OSError):
                export.close()
            raise

    def _take_away(self) -> None:
        """Remove mount and folder, if they are there; the export stays as long as it is open."""
        if not self._folder or not os.path.isdir(self._folder):
            return
        _unmount(os.path.join(self._folder, "disk"))
        shutil.rmtree(self._folder, ignore_errors=True)
        if os.path.isdir(self._folder):
            log.warning("%s: %s cannot be removed", self.name, self._folder)

    def check_open_files(self, allowed: set[Identity]) -> None:
        """Raise Refused if it has a file or device open that is not among these."""
        folder = f"/proc/{self.pid}/fd"
        for fd in os.listdir(folder):
            path = os.path.join(folder, fd)
            try:
                status = os.stat(path)
                where = os.readlink(path)
            except FileNotFoundError:
                continue
            is_own = where.startswith((self._folder + "/", "/memfd:"))
            is_data = stat.S_ISBLK(status.st_mode) or (stat.S_ISREG(status.st_mode) and not is_own)
            if is_data and identity_of(status) not in allowed:
                raise Refused(self.name, f"it made QEMU open {where}, which it did not name before; it was changed")

    def stop(self, *, gently: bool = False) -> None:
        """End the process, and close the export. Blocks, for `STOP_TIMEOUT` seconds at most.

        `gently`: it has that time to write what is left.
        """
        with self._guard:
            self._stopping = True
            export, self._export = self._export, None
        process = self._process
        gently = gently and not self.is_cut_off  # else it would wait for the server
        killer = None
        if process is not None and gently:
            killer = threading.Timer(STOP_TIMEOUT, process.kill)
            killer.daemon = True
            killer.start()
        elif process is not None:
            process.kill()
        if export is not None:
            with contextlib.suppress(OSError):  # closing asks the daemon for a flush
                export.close()
        if process is not None:
            process.terminate()
            self._wait(process)
        if killer is not None:
            killer.cancel()
        for connection in self._known:
            connection.close()
        self._copies = None
        self._take_away()

    @property
    def _known(self) -> list[socket.socket]:
        return [*self._connections, *(self._copies or ())]

    @property
    def is_connected(self) -> bool:
        """Whether its connections still stand, as far as is known."""
        return bool(self._known) and not any(map(is_closed, self._known))

    @property
    def is_cut_off(self) -> bool:
        """Whether a connection of its own has ended: it has a new one, or tries to, and does not tell."""
        return self._copies is not None and not self.is_connected

    def kill_if_silent(self) -> None:
        """`kill`, where nothing is heard from its server, or it would not tell that it is cut off. Blocks."""
        if any(silence(connection) > SILENCE for connection in self._known):
            self.verdict = f"nothing was heard from its server for {SILENCE:.0f} s"
            self.kill()
        elif self.is_cut_off:
            self.verdict = "the server has ended the connection"
            self.kill()

    def kill(self) -> None:
        """End the process, and leave the export to its users, whose calls fail from now on. Blocks."""
        if self._process is not None:
            self._process.kill()
            self._wait(self._process)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(2 * STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.error("%s: %s (process %d) does not end", self.name, PROGRAM, process.pid)
        if self._listener is not None:
            self._listener.join(1.0)
