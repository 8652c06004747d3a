"""The file systems of a guest are frozen while something is done, by QEMU's guest agent. Blocks.

A guest that stays frozen hangs. So it is thawed whatever happens: an error, a signal, an agent that is late to freeze,
work that takes too long. One that somebody else has frozen is left as it is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fvdfs.errors import FvdError, UsageError
from fvdfs.qmp import GuestAgent, NoAnswer

SYNC_TIME = 3.0  # seconds in which an agent answers that runs
FREEZE_TIME = 10.0  # seconds: the guest writes out what it has in memory
THAW_TIME = 5.0  # seconds, twice
WORK_TIME = 10.0  # seconds for which a guest is kept frozen; programs in it, and other machines, wait as long
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def while_frozen(path: str, work: Callable[[], None]) -> None:
    """Do the work while the guest of the agent at this socket has its file systems frozen.

    Raises UsageError, NoAnswer, CommandRefused; as the work.
    """
    with GuestAgent(path) as agent:
        try:
            agent.sync(SYNC_TIME)
        except NoAnswer as error:
            raise NoAnswer(
                f"{error}; start qemu-guest-agent in the guest, end what else uses the socket, or leave out --freeze"
            ) from None
        if agent.call("guest-fsfreeze-status", SYNC_TIME) != "thawed":
            raise UsageError(f"{path}: the guest is frozen already; thaw it first: guest-fsfreeze-thaw")
        with _thawed_in_the_end(agent):
            agent.call("guest-fsfreeze-freeze", FREEZE_TIME)
            _in_time(path, work)


def _in_time(path: str, work: Callable[[], None]) -> None:
    """Nobody can end a call to a mount that does not answer, but we need not wait for it."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WORK_TIME)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise NoAnswer(f"{path}: thawed after {WORK_TIME:g} s, since the mount had not answered; see its log")


@contextmanager
def _thawed_in_the_end(agent: GuestAgent) -> Iterator[None]:
    """Raises NoAnswer, CommandRefused where it cannot be thawed; KeyboardInterrupt for the first signal that came."""
    going_on = True

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal going_on
        if going_on:  # once: then nothing interrupts what follows
            going_on = False
            raise KeyboardInterrupt

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _ENDING}
    try:
        try:
            for number, handler in handlers.items():
                if handler not in (signal.SIG_IGN, None):
                    signal.signal(number, end)
            yield
        finally:
            going_on = False
    finally:
        _thaw(agent)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _thaw(agent: GuestAgent) -> None:
    try:
        try:
            _thaw_by(agent)
        except NoAnswer:
            with GuestAgent(agent.path) as again:
                _thaw_by(again)
    except FvdError as error:
        raise type(error)(f"{error}; the guest may be frozen still: guest-fsfreeze-thaw, or reset it") from None


def _thaw_by(agent: GuestAgent) -> None:
    agent.sync(THAW_TIME)
    agent.call("guest-fsfreeze-thaw", THAW_TIME)
