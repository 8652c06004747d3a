"""Machines without a guest: what their disk does, their monitor says."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.mounts import running, wait_for_end, wait_until

RAM = "64"  # MiB


def words(socket: Path, raw: Path, *more: str) -> list[str]:
    """The command line of a QEMU with this disk, its monitor at this socket; and at another, for tests."""
    node = f"driver=raw,node-name=disk,file.driver=file,file.filename={raw},file.cache.direct=on"
    program = "qemu-system-x86_64 -M q35 -nodefaults -display none -accel tcg -no-shutdown"
    disk = ["-m", RAM, "-blockdev", node, "-device", "virtio-blk-pci,drive=disk,id=d0"]
    return [*program.split(), *disk, *_monitor(socket), *_monitor(for_tests(socket)), *more]


def _monitor(socket: Path) -> list[str]:
    return ["-qmp", f"unix:{socket},server=on,wait=off"]


def for_tests(socket: Path) -> Path:
    """The other monitor: each has one user at a time."""
    return socket.with_suffix(".test")


class Machine:
    """One that runs, with a monitor at this socket."""

    def __init__(self, socket_path: Path) -> None:
        self._path, self._output = for_tests(socket_path), socket_path.with_suffix(".out")

    def __call__(self, command: str, **arguments: object) -> Any:
        """What a command returns."""
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
            wait_until(lambda: connection.connect_ex(str(self._path)) == 0)
            json.loads(lines.readline())
            for request in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}},
            ):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
        assert "return" in answer, answer
        return answer["return"]

    def kill(self) -> None:
        """End it at once, whoever has started it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._path))
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)

    @property
    def state(self) -> str:
        return str(self("query-status")["status"])

    def qemu_io(self, command: str) -> str:
        """What the machine's disk does; QEMU prints that."""
        before = len(self._output.read_text())
        self("human-monitor-command", command_line=f'qemu-io -d /machine/peripheral/d0/virtio-backend "{command}"')
        wait_until(lambda: self._output.read_text()[before:].endswith("\n"))
        return self._output.read_text()[before:]


@contextlib.contextmanager
def machine(socket_path: Path, raw: Path, *more: str) -> Iterator[Machine]:
    """A machine, which is killed at the end if it still runs."""
    output = socket_path.with_suffix(".out")
    with open(output, "w") as sink, running("stdbuf", "-oL", *words(socket_path, raw, *more), stdout=sink):
        wait_until(socket_path.exists)
        yield Machine(socket_path)


def started_by(socket_path: Path, raw: Path) -> str:
    """A shell command that starts one that waits for a migration."""
    output = socket_path.with_suffix(".out")
    return f"exec stdbuf -oL {shlex.join(words(socket_path, raw, '-incoming', 'defer'))} >{output} 2>&1"


def is_there(socket_path: Path) -> bool:
    """Whether a QEMU listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(socket_path)) == 0
