"""The process that serves a mount: its streams, descriptors, signals and log.

It owes its surroundings two things: to keep nothing of theirs, and to end only as it was told to. A
process that dies leaves a dead mount, on which everything fails until somebody clears it away.

*Streams.* Descriptors 0 to 2 are opened on /dev/null where the caller closed them, before anything else could
take their numbers. In the background the process keeps none of the caller's descriptors, so that nobody who
waits for the end of a pipe waits for the mount; stderr stays until the mount is ready.

*Signals.* Until it mounts, SIGTERM, SIGINT and SIGQUIT end the process at once: there is nothing to clear away.
From then on `noted` takes them down until the event loop listens, and they unmount. SIGHUP reopens the log
file. All others that would end a process are ignored; not those that tell of a defect (SIGSEGV, SIGABRT ...).
Signals are ignored by a handler that does nothing: a program that is started has them as usual, then.

*The log* must neither stop nor end the mount. A line that cannot be written at once, to a full disk, a pipe
that nobody reads, a terminal that is gone, is given up, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import resource
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from fvdfs import mounts
from fvdfs.errors import FvdError, UsageError, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_LOOKED_AT = 4096  # bytes of a file that is to be a log
LOG_PATIENCE = 0.1  # seconds for a line in a file that is on no disk of this host
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
HANGUP = signal.SIGHUP
_FAULTS = frozenset(
    {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}
)
_HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP})
_FIXED = frozenset({signal.SIGKILL, signal.SIGSTOP})
_SYSLOG = "/dev/log"
_SYSLOG_DAEMON = 3 << 3
_SYSLOG_LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

log = logging.getLogger(__name__)


# --- streams and limits -------------------------------------------------------------------------


def prepare() -> None:
    """Make up for what the caller has left: closed streams, few descriptors, children that cannot be waited for."""
    _open_missing_streams()
    _raise_file_limit()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _open_missing_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # What a command has to tell is not lost in silence where stdout is closed: to write to it fails.
            descriptor = os.open(
                os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR
            )  # the lowest free number: this one
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)


class _Output(io.FileIO):
    """Standard output, whose errors tell that it is."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Complaints(io.FileIO):
    """Standard error: what cannot be written there can be told nowhere."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def with_streams(run: Callable[[], int]) -> int:
    """Run a command whose output takes any text, whatever the terminal's encoding; its exit code."""
    sys.stdout = _text_stream(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text_stream(_Complaints(2, "w", closefd=False), sys.stderr)
    code = run()
    try:
        sys.stdout.flush()
    except OSError:  # it was told; the interpreter is going to try again
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)
    return code


def _text_stream(raw: io.FileIO, old: TextIO | None) -> io.TextIOWrapper:
    encoding = old.encoding if old is not None else None
    is_line = raw.fileno() == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=is_line)


def _raise_file_limit() -> None:
    """Have as many descriptors as the system allows: each image takes one, and one for each that it stands on."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- signals ------------------------------------------------------------------------------------

noted: list[int] = []
"""The signals to stop or to reopen the log that came before anybody listened."""


def _note(number: int, _frame: FrameType | None) -> None:
    noted.append(number)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def ignore_signals() -> None:
    """Ignore what is no reason to end. Those to stop end the process, whatever the caller has blocked or ignored."""
    for number in signal.valid_signals() - _FAULTS - _HARMLESS - _FIXED - set(STOP):
        signal.signal(number, _nothing)
    for number in (signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # a handler would have the write tried again and again
    for stop in STOP:
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def note_signals() -> None:
    """From now on a mount would be left behind: take down the signals that the event loop will act on."""
    for number in (*STOP, HANGUP):
        signal.signal(number, _note)


# --- the log ------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """One line a message, whatever the names in it are; the traceback of a defect follows as it is."""

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
        # A share that hangs is waited for once, and by a thread.
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
    """Raise OSError where it is a device, or a file that holds what no log does: it may be a disk."""
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


def set_up_log(log_file: str | None, *, foreground: bool) -> ReopenLog:
    """Log to the file, or to syslog in the background, and to the terminal.

    Returns `LogFile.reopen`. Raises UsageError where there can be no file.
    """
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    reopen: ReopenLog = lambda _: None  # noqa: E731
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


# --- foreground and background ------------------------------------------------------------------

Serve = Callable[[Callable[[], None], ReopenLog], None]
"""Serves a mount; is given what to call when it is ready, and what opens the log file anew."""


def in_foreground(serve: Serve, log_file: str | None) -> int:
    """Serve in this process; the exit code. Raises FvdError."""
    ignore_signals()
    os.chdir("/")
    serve(lambda: None, set_up_log(log_file, foreground=True))
    return 0


def in_background(serve: Serve, log_file: str | None) -> int:
    """Serve in a process of its own; return when it is ready, or has failed. The exit code.

    Until it is ready its messages go to the terminal as well. Who stops this process before that stops the other,
    and waits until it has ended.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    ends = {*STOP, HANGUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    child = os.fork()
    if not child:
        os.close(read_end)
        _serve_in_child(serve, log_file, write_end)
    os.close(write_end)
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second ends this process
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    for number in ends:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with os.fdopen(read_end, "rb") as pipe:
        is_ready = pipe.read()
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # from here on it is too late to stop it
    if is_ready and not stopped:
        return 0
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    if stopped:
        return 128 + stopped[0]
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print(f"fvdfs: the mount was ended by {signal.Signals(-code).name} before it was ready", file=sys.stderr)
    return code if code > 0 else 1


def _serve_in_child(serve: Serve, log_file: str | None, write_end: int) -> None:
    """Serve, tell `write_end` when it is ready, and end the process."""
    code = 1
    try:
        ignore_signals()
        os.setsid()
        os.closerange(3, write_end)
        os.closerange(write_end + 1, _MOST_DESCRIPTORS)
        with open(os.devnull, "r+b") as null:
            os.dup2(null.fileno(), 0)
            os.dup2(null.fileno(), 1)
        os.chdir("/")
        os.umask(os.umask(0o022) | 0o022)
        reopen_log = set_up_log(log_file, foreground=False)

        def ready() -> None:
            with open(os.devnull, "r+b") as null:
                os.dup2(null.fileno(), 2)
            with contextlib.suppress(OSError):  # who waited is gone
                os.write(write_end, b"1")
            os.close(write_end)

        serve(ready, reopen_log)
        code = 0
    except FvdError as error:
        complain(str(error))
        code = error.exit_code
    except OSError as error:
        complain(mounts.explained(error))
    except BaseException:
        log.critical("the mount has ended by an error", exc_info=True)
    finally:
        os._exit(code)


_MOST_DESCRIPTORS = (1 << 31) - 1


def complain(text: str) -> None:
    """Say it on stderr, if anybody still listens."""
    with contextlib.suppress(OSError):
        print(f"fvdfs: {text}", file=sys.stderr, flush=True)
