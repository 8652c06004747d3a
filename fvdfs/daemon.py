"""The process that serves a mount: its streams, descriptors and signals.

It must keep nothing of its caller's, and end only when it is told to: a process that dies leaves a dead mount, on which
everything fails until somebody clears it away.

*Streams.* Descriptors 0 to 2 are opened on /dev/null where the caller closed them, before anything else can take their
numbers. In the background the process keeps none of the caller's descriptors, so that whoever waits for the end of a
pipe does not wait for the mount; stderr stays until the mount is ready.

*Signals.* Until it mounts, SIGTERM, SIGINT and SIGQUIT end the process at once: there is nothing to clear away. From
then on they unmount; those that come before the event loop listens are kept in `noted`. A process that takes over a
mount has them wait from its start. SIGHUP reopens the log file.
All others that would end a process are ignored, except those of a defect (SIGSEGV, SIGABRT ...). They are ignored by a
handler that does nothing, so that the programs we start get them as usual.

Commands that serve no mount end by Ctrl-C (`run_program`, `run_loop`).
"""

from __future__ import annotations

import array
import contextlib
import io
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeAlias, TypeVar

from fvdfs.errors import FvdError, exit_code, leading

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from fvdfs.logs import LogPlaces, ReopenLog

_MOST_DESCRIPTORS = (1 << 31) - 1  # an int, the largest there is
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
HANGUP = signal.SIGHUP
_FAULTS = frozenset(
    {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}
)
_HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP})
_FIXED = frozenset({signal.SIGKILL, signal.SIGSTOP})

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C has ended: as a shell has it, 128 + SIGINT."""
_COMM = 15  # bytes of a program's name that the kernel has
_LOOK, _KILLING = 0.01, 1.0  # seconds between two looks whether a program has ended, and until one that is killed has
_AGAIN = 0.01  # seconds until an interrupt is tried again that came where nothing can be raised
interrupting: list[Callable[[int, FrameType | None], object]] = []
"""Handlers of Ctrl-C that raise KeyboardInterrupt wherever it comes; event loops do without them."""
T = TypeVar("T")


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
            # Read-only for stdout: a command that has something to tell fails, instead of losing it in silence.
            descriptor = os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)


class _Output(io.FileIO):
    """Standard output; its errors say so."""

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
    """Run a command with streams that take any text, whatever the terminal's encoding; its exit code."""
    sys.stdout = _text_stream(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text_stream(_Complaints(2, "w", closefd=False), sys.stderr)
    code = run()
    try:
        sys.stdout.flush()
    except OSError:  # the command has said so; the interpreter would try again
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


def ignore_signals(*, takes_over: bool = False) -> None:
    """Ignore what is no reason to end; signals to stop end the process, whatever the caller has blocked or ignored.

    `takes_over`: there is a mount already, so they wait for `note_signals`.
    """
    for number in signal.valid_signals() - _FAULTS - _HARMLESS - _FIXED - set(STOP):
        signal.signal(number, _nothing)
    for number in (signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # a handler would have the write tried again and again
    for stop in STOP:
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, (*STOP, HANGUP) if takes_over else ())


def note_signals() -> None:
    """Keep signals for the event loop: from now on an end would leave a mount behind."""
    for number in (*STOP, HANGUP):
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP, HANGUP))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What ends a command by a signal ends it behind this block, not in it. Nothing but the main thread can do it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    ending = signal.valid_signals() - _FAULTS - _HARMLESS - _FIXED
    handlers = {number: signal.getsignal(number) for number in ending}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN and handler is not None:
            signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def run_loop(call: Callable[[], Awaitable[T]]) -> T:
    """Run an event loop for a command. Raises KeyboardInterrupt, and as `call`.

    Ctrl-C ends it at a checkpoint of the main task. Anywhere else it could strike where trio starts a task on behalf of
    one of ours, which trio does not survive, or where we clean up. SIGPIPE is ignored meanwhile: a signal that comes
    while trio closes its wakeup socket is written where nobody reads. At the end nothing is written there: where
    that socket is closed Python says so on stderr. In another thread than the main one Ctrl-C does nothing.
    """
    import trio  # takes long, and not every command needs it

    if threading.current_thread() is not threading.main_thread():
        return trio.run(call)

    async def main() -> T:
        try:
            return await call()
        finally:
            signal.set_wakeup_fd(-1)

    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)
    if handler in interrupting:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in whose place trio puts its own
    try:
        return trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:  # it has ended a nursery of trio's own
        if group.split(KeyboardInterrupt)[1] is None:
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler in interrupting:
            signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGPIPE, before)


def run_program(main: Callable[[], int]) -> int:
    """Run a command with `with_streams`; its exit code. Ctrl-C is a KeyboardInterrupt meanwhile, and then ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # a shell has it ignored in the background
        return with_streams(main)
    sys.unraisablehook = _unraisable
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return with_streams(main)
    except KeyboardInterrupt:  # while the command said how it has ended
        return INTERRUPTED
    finally:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unraisable(problem: sys.UnraisableHookArgs) -> None:
    """What nobody can catch. Ctrl-C in a finalizer comes once more, elsewhere."""
    if isinstance(problem.exc_value, KeyboardInterrupt):
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    elif not (isinstance(problem.exc_value, BrokenPipeError) and problem.object is None):
        # That is the wakeup fd of signals, which trio has just closed; the signal is not lost.
        sys.__unraisablehook__(problem)


def end_children(program: str, patience: float) -> None:
    """Have the children end that run this program, and would outlive exec; after so many seconds, by force. Blocks."""
    deadline = time.monotonic() + patience
    for child in _children(program):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    while (children := _children(program)) and (now := time.monotonic()) < deadline + _KILLING:
        for child in children:
            with contextlib.suppress(ChildProcessError):  # a thread has waited for it
                if os.waitpid(child, os.WNOHANG) == (0, 0) and now > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(_LOOK)


def _children(program: str) -> list[int]:
    """Those of this process that run it."""
    found: list[int] = []
    if os.readlink("/proc/self") != str(os.getpid()):  # it is of another namespace
        return found
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
            runs, _, rest = file.read().partition("(")[2].rpartition(")")
            if runs == program[:_COMM] and int(rest.split()[1]) == os.getpid():
                found.append(int(name))
    return found


# --- foreground and background ------------------------------------------------------------------

Serve: TypeAlias = "Callable[[Callable[[], None], ReopenLog], None]"
"""Serves a mount; is given what to call when it is ready, and what opens the log file anew."""


def in_foreground(serve: Serve, places: LogPlaces, *, takes_over: bool = False) -> int:
    """Serve in this process, which may take over a mount; the exit code. Raises FvdError."""
    from fvdfs.logs import set_up_log

    ignore_signals(takes_over=takes_over)
    os.chdir("/")
    os.umask(os.umask(0o022) | 0o022)
    reopen_log = set_up_log(places, foreground=True)
    serve(lambda: notify("READY=1"), reopen_log)
    return 0


class Inherited(NamedTuple):
    """What a former daemon of the mount has left (`keeper.py`)."""

    descriptors: dict[str, int]
    """By name."""
    how: str
    """How that daemon has ended."""


def inherited() -> Inherited | None:
    """What this process is to take over; None: it begins anew. Asked once."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    from fvdfs import keeper

    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    if keeper.FUSE not in names:
        for number, name in enumerate(names, keeper.FIRST):
            if name.startswith(keeper.OURS):  # of a mount that has ended
                with contextlib.suppress(OSError):
                    os.close(number)
                notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        return None
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, HANGUP))  # until they can be obeyed
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        del os.environ[name]
    for number in range(keeper.FIRST, keeper.FIRST + len(names)):
        os.set_inheritable(number, False)
    numbers = {name: number for number, name in enumerate(names, keeper.FIRST)}
    return Inherited(numbers, os.environ.pop(keeper.FORMER, "the service manager has started another process"))


def this_program() -> list[str]:
    """The words of a command line that run this program, as it was run; arguments follow."""
    own = len(sys.orig_argv) - len(sys.argv) + 1
    if os.path.basename(sys.argv[0]) in ("fvdfs", "__main__.py") and sys.orig_argv[own:] == sys.argv[1:]:
        return [sys.executable, *sys.orig_argv[1:own]]
    return [sys.executable, "-P", "-m", "fvdfs"]  # it is mount(8)'s


def stores_descriptors() -> bool:
    """Whether the service manager that started this process keeps descriptors for the next one."""
    return is_notified() and os.environ.get("FDSTORE", "0") != "0"


def is_notified() -> bool:
    """Whether a service manager started this process."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(text: str, *descriptors: int) -> None:
    """Tell the service manager that started this process, if one did: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    import socket  # takes long, and not every command needs it

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # it must not have the mount wait
        place = f"\0{address[1:]}" if address.startswith("@") else address
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        sender.sendmsg([text.encode()], passed, 0, place)  # of send_fds, Python up to 3.12 forgets the address


def in_place(serve: Serve, places: LogPlaces) -> int:
    """Serve in this process, which the keeper has started for that; the exit code."""
    import logging

    from fvdfs import mounts
    from fvdfs.logs import set_up_log

    log = logging.getLogger(__name__)
    try:
        ignore_signals(takes_over=True)
        os.setsid()
        os.chdir("/")
        os.umask(os.umask(0o022) | 0o022)
        serve(lambda: None, set_up_log(places, foreground=False))
    except FvdError as error:
        log.error("%s", error)
        return exit_code(error)
    except OSError as error:
        log.error("%s", mounts.explained(error))
        return exit_code(error)
    except BaseException:
        log.critical("ended by an error", exc_info=True)
        return 1
    return 0


def in_background(serve: Serve, places: LogPlaces) -> int:
    """Serve in a process of its own; return when it is ready, or has failed. The exit code.

    Until it is ready its messages go to the terminal as well. A signal that stops this process before that stops the
    other one, and is waited for.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    ends = {*STOP, HANGUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    child = os.fork()
    if not child:
        os.close(read_end)
        _serve_in_child(serve, places, write_end)
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


def spawn(serve: Serve, places: LogPlaces) -> int:
    """Serve in a process of its own; its number, once it is ready. Where it fails it has said why on stderr.

    Raises NotReady; an interrupt ends it.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP, HANGUP})
    child = os.fork()
    if not child:
        os.close(read_end)
        _serve_in_child(serve, places, write_end)
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as pipe:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if pipe.read():
                return child
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    os.waitpid(child, 0)
    raise NotReady


class NotReady(Exception):
    """A process was started that has ended before it was ready."""


def _serve_in_child(serve: Serve, places: LogPlaces, write_end: int) -> None:
    """Serve, tell `write_end` when it is ready, and end the process."""
    import logging

    from fvdfs import mounts
    from fvdfs.logs import set_up_log

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
        reopen_log = set_up_log(places, foreground=False)

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
        code = exit_code(error)
    except OSError as error:
        complain(mounts.explained(error))
        code = exit_code(error)
    except BaseException:
        logging.getLogger(__name__).critical("ended by an error", exc_info=True)
    finally:
        os._exit(code)


def can_complain() -> None:
    """Have what `complain` and `ended_by` need, while there are descriptors and memory for that."""
    from fvdfs import logs, mounts

    del logs, mounts


def complain(text: str) -> None:
    """Say it on stderr, if anybody still listens."""
    import logging

    from fvdfs.logs import leveled, to_journal

    with contextlib.suppress(OSError):
        print(leveled(text, logging.ERROR) if to_journal(2) else f"fvdfs: {text}", file=sys.stderr, flush=True)


def ended_by(error: BaseException) -> int:
    """Say in a line why a command has ended early; its exit code. Defects are raised again."""
    error = leading(error)
    if isinstance(error, FvdError):
        from fvdfs.mounts import reason_with_owner

        complain(reason_with_owner(error))
        return exit_code(error)
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        # The cause: where it came while a class was made, in an import, Python raises RuntimeError from it.
        return INTERRUPTED
    if isinstance(error, OSError):
        from fvdfs import mounts

        complain(mounts.explained(error))
    elif isinstance(error, MemoryError):
        complain("there is not enough memory for this")
    else:
        raise error
    return exit_code(error)
