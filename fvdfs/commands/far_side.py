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

from fvdfs.daemon import complain
from fvdfs.errors import FvdError, UsageError
from fvdfs.qmp import NoAnswer

LOGIN = 120.0  # seconds for somebody to type a password
PATIENCE = 30.0  # seconds in which what is asked is done
SHORT = 5.0  # seconds: the same, of one that has not answered before
TOLD = 10.0  # seconds after which it is told that there is no answer; to end a machine there takes half of that
END = 5.0  # seconds
_CHECK = 0.2  # seconds


_NOT_THERE = {
    127: "fvdfs is not found there; install it, or name it by --program",
    UsageError.exit_code: "fvdfs there does not know what it is asked for; have the same version at both hosts",
}
"""What the exit code of something that never answered says."""


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
        self.check = check
        """Called while an answer is waited for; it may raise."""
        self.patience = PATIENCE
        """Seconds for an answer."""
        self._asked = 0
        self._silent_since: float | None = None
        """When what was told not to be answered was asked, by the clock that does not jump."""
        self._name = name
        self._received = b""
        self._is_there = False
        """Whether it has ever answered."""
        self._greeting = ""
        """What else was said last: by a shell, as a login begins."""
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
        self._end()
        self._process.stdout.close()

    def _end(self) -> None:
        """Where it does not end by itself, it is ssh: the other end, if there is one, goes on."""
        patience = END if self._is_there else 0  # ssh may wait for a password
        for end in (self._process.terminate, self._process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                return
            end()
            patience = END
        self._process.wait()

    def call(self, what: str, **arguments: Any) -> Any:
        """Have something done there; what it returns. Raises UsageError, FvdError as it failed there, NoAnswer."""
        assert self._process.stdin is not None
        self._asked += 1
        request = json.dumps({"do": what, "number": self._asked, **arguments}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # then what it has said ends, too
            os.write(self._process.stdin.fileno(), request)
        began = time.monotonic()
        patience = SHORT if self._silent_since is not None else self.patience
        deadline = began + (patience if self._is_there else LOGIN)
        while (answer := self._answer(self._line(began, deadline))).get("number") != self._asked:
            pass  # to what nobody waits for any more
        self._is_there = True
        self._tell_that_it_answers()
        if "failed" in answer:
            kind = UsageError if answer["code"] == UsageError.exit_code else _Failed
            raise kind(f"{self._name}: {answer['failed']}")
        return answer["is"]

    def _answer(self, line: bytes) -> dict[str, Any]:
        """Empty: it is none."""
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        self._greeting = line.decode(errors="replace").strip() or self._greeting
        return {}

    def _tell_silence(self, began: float) -> None:
        """Once, until it answers again."""
        if self._is_there and self._silent_since is None and time.monotonic() - began > TOLD:
            self._silent_since = began
            since = time.strftime("%T", time.localtime(time.time() - (time.monotonic() - began)))
            complain(f"{self._name}: has not answered since {since}; waiting for it")

    def _tell_that_it_answers(self) -> None:
        silent, self._silent_since = self._silent_since, None
        if silent is not None:
            complain(f"{self._name}: answers again, after {time.monotonic() - silent:.0f} s")

    def _line(self, began: float, deadline: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            self.check()
            self._tell_silence(began)
            if not select.select([self._process.stdout], [], [], min(left, _CHECK))[0]:
                if left:
                    continue
                raise NoAnswer(f"{self._name}: does not answer: {self._words}")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._lost()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _lost(self) -> _Lost:
        self._answer(self._received)
        why = "the connection has ended"
        if not self._is_there:
            with contextlib.suppress(subprocess.TimeoutExpired):
                why = _NOT_THERE.get(self._process.wait(END), why)
        return _Lost(f"{self._name}: {why}: {self._words}")

    @property
    def _words(self) -> str:
        """What was started, and what it said where it never answered."""
        words = shlex.join(map(str, self._process.args)) if isinstance(self._process.args, list) else ""
        return words if self._is_there or not self._greeting else f"{words}: it says {self._greeting!r}"


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
