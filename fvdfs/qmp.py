"""QEMU's monitor (QMP) and its guest agent: JSON over a Unix socket, a message a line. Blocks.

What is on the other side may be busy, hang, or say anything. So each call has a time in which it has to be answered,
and a message has a limit. An agent answers those, too, who have gone away since: `GuestAgent.sync` skips that.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import time
from types import TracebackType
from typing import Any, Self

from fvdfs.errors import FvdError, UsageError

CONNECT = 3.0  # seconds
WAITS = "inmigrate"
"""The state of a machine that is to come."""
_WAIT = 0.02  # seconds between tries to connect
ANSWER = 10.0  # seconds in which a monitor answers, on a host that is busy
_MOST = 16 << 20  # bytes of a message; QMP's longest, a schema, has a quarter of a megabyte
_SENTINEL = b"\xff"  # in no JSON: begins an agent's answer to a sync, and ends what its parser is in the middle of


class NoAnswer(FvdError):
    """The other side is gone, does not answer in time, or says what makes no sense."""


class CommandRefused(FvdError):
    """It has answered a command with an error; the text is its own."""


class Connection:
    """One to a monitor or an agent. Use it as a context manager."""

    def __init__(self, path: str) -> None:
        """Raises UsageError where nobody listens there."""
        self.path = path
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT)
        try:
            self._connect()
        except OSError as error:
            self._socket.close()
            raise UsageError(f"{path}: {error.strerror or error}; name the Unix socket of a QEMU that runs") from None

    def _connect(self) -> None:
        """One that has just started lets few wait until it accepts them. Raises OSError."""
        deadline = time.monotonic() + CONNECT
        while True:
            try:
                return self._socket.connect(self.path)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def call(self, command: str, timeout: float, **arguments: Any) -> Any:
        """What the command returns, within so many seconds. Raises CommandRefused, NoAnswer."""
        deadline = time.monotonic() + timeout
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._send(json.dumps(request).encode() + b"\n", deadline)
        while True:
            answer = self._message(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                error = answer["error"]
                what = error.get("desc") if isinstance(error, dict) else error
                raise CommandRefused(f"{self.path}: {command}: {what}")
            self._told(answer)

    def _told(self, message: dict[str, Any]) -> None:
        """Something that answers nothing: an event. Skipped here."""

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(self._left(deadline))
            self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from None

    def _message(self, deadline: float) -> dict[str, Any]:
        """The next one. Raises NoAnswer."""
        line = self._until(b"\n", deadline)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise NoAnswer(f"{self.path}: says {bytes(line[:40])!r}, which is no answer of QEMU's")
        return found

    def _until(self, end: bytes, deadline: float) -> bytes:
        """What comes before this byte, which is dropped. Raises NoAnswer."""
        while (at := self._received.find(end)) < 0:
            if len(self._received) > _MOST:
                raise NoAnswer(f"{self.path}: says more than {_MOST} bytes without an end")
            try:
                self._socket.settimeout(self._left(deadline))
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise self._gone(error) from None
            if not data:
                raise NoAnswer(f"{self.path}: has closed the connection")
            self._received += data
        found = bytes(self._received[:at])
        del self._received[: at + 1]
        return found

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _gone(self, error: OSError) -> NoAnswer:
        return NoAnswer(f"{self.path}: {'no answer' if isinstance(error, TimeoutError) else error.strerror or error}")


def somebody_listens(path: str) -> bool:
    """Whether this is a Unix socket that can be connected to."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


class GuestAgent(Connection):
    """One to the agent in a guest (qemu-ga), which answers one command after the other."""

    def sync(self, timeout: float) -> None:
        """Skip what others, or we, have not waited for. Raises NoAnswer."""
        deadline = time.monotonic() + timeout
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._send(_SENTINEL + json.dumps(request).encode() + b"\n", deadline)
        while True:
            self._until(_SENTINEL, deadline)
            if self._message(deadline).get("return") == number:
                return


class Monitor(Connection):
    """One to the monitor of a QEMU, ready for commands."""

    def __init__(self, path: str) -> None:
        """Raises UsageError where nobody listens there, or somebody else is connected; NoAnswer, CommandRefused."""
        super().__init__(path)
        try:
            try:
                self._message(time.monotonic() + ANSWER)
            except NoAnswer as error:
                raise UsageError(f"{error}; a monitor has one user at a time: give QEMU another -qmp socket") from None
            self.call("qmp_capabilities", ANSWER)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For select: readable where there is news."""
        return self._socket.fileno()

    def close(self) -> None:
        """Leave it to others."""
        self._socket.close()

    def skip_events(self) -> None:
        """Read what there is. Raises NoAnswer where QEMU has ended."""
        while select.select([self._socket], [], [], 0)[0]:
            self._message(time.monotonic() + ANSWER)

    @property
    def has_ended(self) -> bool:
        """Whether QEMU has closed the connection; what it says meanwhile is skipped."""
        try:
            self.skip_events()
        except NoAnswer:
            return True
        return False

    def opens(self, file: str) -> bool:
        """Whether the machine has this file as a disk. Raises CommandRefused, NoAnswer, OSError."""
        wanted = os.stat(file)
        for node in self.call("query-named-block-nodes", ANSWER):
            try:
                if os.path.samestat(os.stat(str(node.get("file"))), wanted):
                    return True
            except (OSError, ValueError):
                continue  # json:{...}, or of another name space
        return False
