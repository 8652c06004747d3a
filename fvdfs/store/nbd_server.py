"""A qemu-storage-daemon that gives disks over NBD, and what it gives can change while it runs. Blocks.

It is told by QMP over its standard streams, and ends with this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

from fvdfs.errors import ImageError, UsageError
from fvdfs.store.locations import Options
from fvdfs.store.qemu_words import PROGRAM, complaint, of_tls

_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", 'test "$PPID" = "$0" && exec "$@"')
TLS_ID = "tls"
STOP_TIMEOUT = 5.0  # seconds


def bound_to_us(words: list[str]) -> list[str]:
    """The storage daemon with these arguments; it ends with the thread that starts it. Raises UsageError."""
    if shutil.which(PROGRAM) is None:
        raise UsageError(f"{PROGRAM} is needed to serve disks and is not installed: apt install qemu-system-common")
    return [*_WITH_PARENT, str(os.getpid()), PROGRAM, *words]


class NbdServer:
    """Start it with all that it is to open; exports can come and go."""

    def __init__(self, server: Options, nodes: list[Options], objects: list[Options]) -> None:
        """`server`: QEMU's options of an NBD server; `nodes`: each a BlockdevOptions with a node-name; `objects`: TLS.

        Raises UsageError where the program is missing or does not take this.
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
            cwd="/",
            start_new_session=True,  # the terminal's signals are not for it
        )
        try:
            self._message()
            self._call("qmp_capabilities")
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def add_node(self, node: Options) -> None:
        """Open something more. Raises ImageError."""
        self._call("blockdev-add", **node)

    def add_export(self, number: str, node: str, name: str, *, writable: bool = False) -> None:
        """Give a node under this name. Raises ImageError."""
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
            stream.close()
        os.close(self._said)

    def _call(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._process.stdin.flush()
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
            said = complaint(os.pread(self._said, 1 << 16, 0).decode(errors="replace"))
            raise UsageError(of_tls(said) or said or f"{PROGRAM} has ended")
        found: dict[str, Any] = json.loads(line)
        return found


def _flat(options: Options, prefix: str = "") -> str:
    """Nested options as QEMU's words take them: a.b=c,d=e."""
    parts = []
    for key, value in options.items():
        if isinstance(value, dict):
            parts.append(_flat(value, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key}={str(value).replace(',', ',,')}")
    return ",".join(parts)
