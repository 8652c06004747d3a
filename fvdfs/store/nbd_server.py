"""A qemu-storage-daemon that gives disks over NBD, and what it gives can change while it runs. Blocks.

It is told by QMP over its standard streams, and ends with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from fvdfs.errors import ImageError, UsageError
from fvdfs.store.locations import Options
from fvdfs.store.qemu_words import PROGRAM, complaint, of_tls

_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", 'test "$PPID" = "$0" && exec "$@"')
TLS_ID = "tls"
STOP_TIMEOUT = 5.0  # seconds


class Ended(ImageError):
    """The daemon runs no more."""


def bound_to_us(words: list[str]) -> list[str]:
    """The storage daemon with these arguments; it ends with the thread that starts it. Raises UsageError."""
    if shutil.which(PROGRAM) is None:
        raise UsageError(f"{PROGRAM} is needed to serve disks and is not installed: apt install qemu-system-common")
    return [*_WITH_PARENT, str(os.getpid()), PROGRAM, *words]


class NbdServer:
    """Start it with all that it is to open; exports can come and go."""

    def __init__(
        self, server: Options, nodes: Sequence[Options], objects: Sequence[Options], inherited: Sequence[int] = ()
    ) -> None:
        """`server`: QEMU's options of an NBD server; `nodes`: each a BlockdevOptions with a node-name; `objects`: TLS.

        `inherited`: descriptors that they name. Raises UsageError where the program is missing or does not take this.
        """
        words = []
        for options in objects:
            words += ["--object", json.dumps(options)]
        words += ["--nbd-server", _flat(server)]
        for node in nodes:
            words += ["--blockdev", json.dumps(node)]
        words += ["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]
        self._said = os.memfd_create("said")
        self._process = subprocess.Popen(
            bound_to_us(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            pass_fds=inherited,
            cwd="/",
            start_new_session=True,  # the terminal's signals are not for it
        )
        self._end = os.pidfd_open(self._process.pid)
        try:
            self._message()
            self._call("qmp_capabilities")
        except Ended as error:
            self.stop()
            raise UsageError(error.reason) from None
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def last_words(self) -> str:
        """How it has ended, or what it complained of last."""
        code = self._process.poll()
        if code is not None and code < 0:
            return f"killed by signal {-code}"
        said = complaint(os.pread(self._said, 1 << 16, 0).decode(errors="replace"))
        return of_tls(said) or said or "it has ended"

    def fileno(self) -> int:
        """What can be read once it has ended."""
        return self._end

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def add_node(self, node: Options) -> None:
        """Open something more. Raises ImageError."""
        self._call("blockdev-add", **node)

    def add_export(self, number: str, node: str, name: str, *, writable: bool = False) -> None:
        """Give a node under this name. Raises ImageError, Ended among them, as all of these."""
        self._call("block-export-add", type="nbd", id=number, name=name, writable=writable, **{"node-name": node})

    def remove_export(self, number: str) -> None:
        """Give it no longer; who reads it is cut off. Raises ImageError."""
        self._call("block-export-del", id=number, mode="hard")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        os.close(self._said)
        os.close(self._end)

    def _call(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._has_ended() from None
        while True:
            message = self._message()
            if "error" in message:
                raise ImageError(PROGRAM, f"{command}: {message['error'].get('desc')}")
            if "return" in message:
                return

    def _message(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._has_ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _has_ended(self) -> Ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT)
        return Ended(PROGRAM, self.last_words)


def _flat(options: Options, prefix: str = "") -> str:
    """Nested options as QEMU's words take them: a.b=c,d=e."""
    parts = []
    for key, value in options.items():
        if isinstance(value, dict):
            parts.append(_flat(value, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key}={str(value).replace(',', ',,')}")
    return ",".join(parts)
