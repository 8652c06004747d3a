"""The log of a mount: a file, syslog, the terminal or the journal; its last lines also in memory (`status --log`).

A message has a level: in a file its name; to syslog its number, and to the journal where stderr leads there
(sd-daemon(3): `<3>` before each line).

The log must neither stop nor end the mount. A line that cannot be written at once (a full disk, a pipe that nobody
reads, a terminal that is gone) is dropped, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fvdfs.errors import FvdError, UsageError, printable

LOG_PATIENCE = 0.1  # seconds for a line in a file that is on no disk of this host
_LOOKED_AT = 4096  # bytes of a file that is to be a log
_SYSLOG = "/dev/log"
_IN_FILES = "%(asctime)s %(levelname)s %(message)s"
MOST_KEPT = 60_000  # bytes of the last lines; an extended attribute holds 65536
_LONGEST_KEPT = 4000  # bytes of one of them: a traceback is one
_SYSLOG_DAEMON = 3 << 3  # the facility, of RFC 3164
_SYSLOG_LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

log = logging.getLogger(__name__)


class LogFormatter(logging.Formatter):
    """One line a message, whatever names are in it; the traceback of a defect follows as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def to_journal(descriptor: int) -> bool:
    """Whether what is written there gets into systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def leveled(text: str, level: int) -> str:
    """Lines as the journal takes them from a stream."""
    return "\n".join(f"<{_SYSLOG_LEVELS.get(level, 6)}>{line}" for line in text.split("\n"))


class _JournalFormatter(LogFormatter):
    """The journal knows the program, and the time."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return leveled(super().format(record), record.levelno)


class _Recent(logging.Handler):
    """Keeps the last lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LogFormatter(_IN_FILES))
        self._lines: deque[bytes] = deque()
        self._size = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).encode(errors="backslashreplace")[:_LONGEST_KEPT] + b"\n"
        self._lines.append(line)
        self._size += len(line)
        while self._size > MOST_KEPT:
            self._size -= len(self._lines.popleft())

    def text(self) -> bytes:
        """What is kept."""
        with self.lock or contextlib.nullcontext():
            return b"".join(self._lines)


recent = _Recent()
"""Of the mount that this process serves."""


class _Lines(logging.Handler):
    """Writes lines to a descriptor, without ever waiting for it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self._lost:
            text = f"{self._lost} lines before this one could not be written\n{text}"
        try:
            self._write(f"{text}\n".encode(errors="backslashreplace"))
            self._lost = 0
        except OSError:
            self._lost += 1

    def _write(self, data: bytes) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while data:
            if not poll.poll(0):
                raise BlockingIOError
            data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]


class LogFile(_Lines):
    """A log file that can be opened anew, after it was renamed."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._path = path
        self._writer: threading.Thread | None = None
        super().__init__(self._open())
        self._device = os.fstat(self._descriptor).st_dev

    def _write(self, data: bytes) -> None:
        if os.major(self._device):
            super()._write(data)
            return
        # A share may hang: one thread at a time waits for it.
        if self._writer is not None and self._writer.is_alive():
            raise BlockingIOError
        errors: list[OSError] = []

        def write() -> None:
            try:
                os.write(self._descriptor, data)
            except OSError as error:
                errors.append(error)

        self._writer = threading.Thread(target=write, daemon=True)
        self._writer.start()
        self._writer.join(LOG_PATIENCE)
        if errors:
            raise errors[0]

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o666)
        try:
            _refuse_disk(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def reopen(self, check: Callable[[str], None]) -> None:
        """Go on in the file that has the name now, unless `check` raises OSError or FvdError for it. Blocks."""
        try:
            check(self._path)
            descriptor = self._open()
        except (OSError, FvdError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            log.error("%s: cannot be opened again, the old file is kept: %s", self._path, reason)
            return
        with self.lock or contextlib.nullcontext():
            old, self._descriptor = self._descriptor, descriptor
            self._device = os.fstat(descriptor).st_dev
        os.close(old)


def _refuse_disk(descriptor: int) -> None:
    """Raise OSError for a device, or a file with bytes that no log has: it may be a disk."""
    mode = os.fstat(descriptor).st_mode
    first = b""
    if stat.S_ISREG(mode):
        with contextlib.suppress(PermissionError), open(f"/proc/self/fd/{descriptor}", "rb") as file:
            first = file.read(_LOOKED_AT)
    if stat.S_ISBLK(mode) or b"\0" in first:
        raise OSError(errno.EINVAL, "is no log, but perhaps a disk; choose another file")


class _Syslog(logging.Handler):
    """Sends lines to the system's log, without ever waiting for it."""

    def emit(self, record: logging.LogRecord) -> None:
        priority = _SYSLOG_DAEMON | _SYSLOG_LEVELS.get(record.levelno, 6)
        data = f"<{priority}>{self.format(record)}".encode(errors="backslashreplace")
        import socket  # takes long, and not every command needs it

        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect(_SYSLOG)
            sender.send(data)


ReopenLog = Callable[[Callable[[str], None]], None]
"""`LogFile.reopen`: opens the log file anew, unless the check raises OSError or FvdError for its path; blocks."""


def _keep_log(_check: Callable[[str], None]) -> None:
    """There is no log file."""


@dataclass(frozen=True, slots=True)
class LogPlaces:
    """Where a user wants the log."""

    file: str = ""
    syslog: bool = False
    """Also where there is a file, or a terminal."""


def set_up_log(places: LogPlaces, *, foreground: bool) -> ReopenLog:
    """Log to the file, or to syslog in the background, and to the terminal or the journal.

    Returns what opens the file anew. Raises UsageError where one of them cannot be had.
    """
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(recent)
    log_file = places.file
    reopen: ReopenLog = _keep_log
    if log_file:
        try:
            handler = LogFile(log_file)
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: {error.strerror}") from error
        handler.setFormatter(LogFormatter(_IN_FILES))
        root.addHandler(handler)
        reopen = handler.reopen
    if places.syslog and not os.path.exists(_SYSLOG):
        raise UsageError(f"--syslog: there is no {_SYSLOG}: no journal or syslog runs here; give --log-file")
    if places.syslog or (not foreground and not log_file and os.path.exists(_SYSLOG)):
        syslog = _Syslog()
        syslog.setFormatter(LogFormatter(f"fvdfs[{os.getpid()}]: %(levelname)s %(message)s"))
        root.addHandler(syslog)
    if foreground or not log_file:
        terminal = _Lines(2)
        terminal.setLevel(logging.INFO if foreground else logging.WARNING)
        terminal.setFormatter(_JournalFormatter() if to_journal(2) else LogFormatter("fvdfs: %(message)s"))
        root.addHandler(terminal)
    return reopen
