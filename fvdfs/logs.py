"""The log of a mount: a file, syslog, the terminal.

It must neither stop nor end the mount. A line that cannot be written at once (a full disk, a pipe that nobody reads, a
terminal that is gone) is dropped, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
from collections.abc import Callable

from fvdfs.errors import FvdError, UsageError, printable

LOG_PATIENCE = 0.1  # seconds for a line in a file that is on no disk of this host
_LOOKED_AT = 4096  # bytes of a file that is to be a log
_SYSLOG = "/dev/log"
_SYSLOG_DAEMON = 3 << 3  # the facility, of RFC 3164
_SYSLOG_LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

log = logging.getLogger(__name__)


class LogFormatter(logging.Formatter):
    """One line a message, whatever names are in it; the traceback of a defect follows as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


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
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect(_SYSLOG)
            sender.send(data)


ReopenLog = Callable[[Callable[[str], None]], None]
"""`LogFile.reopen`: opens the log file anew, unless the check raises OSError or FvdError for its path; blocks."""


def _keep_log(_check: Callable[[str], None]) -> None:
    """There is no log file."""


def set_up_log(log_file: str | None, *, foreground: bool) -> ReopenLog:
    """Log to the file, or to syslog in the background, and to the terminal.

    Returns what opens the file anew. Raises UsageError where it cannot be opened.
    """
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    reopen: ReopenLog = _keep_log
    if log_file:
        try:
            handler = LogFile(log_file)
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: {error.strerror}") from error
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
        reopen = handler.reopen
    elif not foreground and os.path.exists(_SYSLOG):
        syslog = _Syslog()
        syslog.setFormatter(LogFormatter(f"fvdfs[{os.getpid()}]: %(levelname)s %(message)s"))
        root.addHandler(syslog)
    if foreground or not log_file:
        terminal = _Lines(2)
        terminal.setLevel(logging.INFO if foreground else logging.WARNING)
        terminal.setFormatter(LogFormatter("fvdfs: %(message)s"))
        root.addHandler(terminal)
    return reopen
