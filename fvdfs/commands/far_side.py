"""The other host, as `fvdfs migrate` reaches it: a command prefix, such as `ssh HOST`, and fvdfs there. Blocks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from fvdfs.errors import FvdError, UsageError
from fvdfs.qmp import NoAnswer

PATIENCE = 30.0  # seconds in which what is asked is done
END = 5.0  # seconds
_CHECK = 0.2  # seconds


class _Failed(FvdError):
    """What was asked for has failed there; the text is from there."""


class _Lost(NoAnswer):
    """The connection has ended."""


class FarSide:
    """A conversation with `migrate_target.py`."""

    def __init__(self, prefix: Sequence[str], program: Sequence[str], name: str, check: Callable[[], None]) -> None:
        """`name`: of the host, for messages. `check` is called while an answer is waited for, and may raise.

        Raises UsageError.
        """
        self._check = check
        self._asked = 0
        self._name = name
        self._received = b""
        words = [*prefix, *program, "migrate-target"]
        try:
            with _signals_ignored():
                self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UsageError(f"--ssh {shlex.join(prefix)}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # of ssh: the other end goes on by itself
            self._process.wait()
        self._process.stdout.close()

    def call(self, what: str, timeout: float = PATIENCE, **arguments: Any) -> Any:
        """Have something done there; what it returns. Raises UsageError, FvdError as it failed there, NoAnswer."""
        assert self._process.stdin is not None
        self._asked += 1
        request = json.dumps({"do": what, "number": self._asked, **arguments}).encode() + b"\n"
        try:
            os.write(self._process.stdin.fileno(), request)
        except OSError:
            raise self._lost() from None
        deadline = time.monotonic() + timeout
        while (answer := json.loads(self._line(deadline)))["number"] != self._asked:
            pass  # to what nobody waits for any more
        if "failed" in answer:
            kind = UsageError if answer["code"] == UsageError.exit_code else _Failed
            raise kind(f"{self._name}: {answer['failed']}")
        return answer["is"]

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            self._check()
            if not select.select([self._process.stdout], [], [], min(left, _CHECK))[0]:
                if left:
                    continue
                raise NoAnswer(f"{self._name}: does not answer")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._lost()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _lost(self) -> _Lost:
        words = shlex.join(map(str, self._process.args)) if isinstance(self._process.args, list) else ""
        return _Lost(f"{self._name}: the connection has ended: {words}")


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """What is started meanwhile ends when its stdin does, and not by Ctrl-C: it has to tidy up."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
