"""Guests that witness how their disk fares while they move from host to host (`witness.c`), and their machines.

    witness = Witness(tmp_path, MIB_OF_DISK)
    witness.fill(raw)
    source = witness.boot(host, drive(raw, cache="none"))
    source.wait_for(5)
    target = witness.boot(other, drive(raw_there, cache="none"), incoming=f"tcp:{other.address}:4444")
    move(source, f"tcp:{other.address}:4444")
    target.wait_for(50)
    course = follow(source, target)
    assert course.is_right, course

The guest's clock stands while it moves. So times are those of this machine, at which a line came from a console.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fvdfs.qmp import Connection
from support.guest import build_initrd, find_kernel, run
from support.hosts import Host
from support.mounts import wait_until

_TICK = re.compile(rb"TICK seq=(\d+) append=(\d+) write=(\d+) reads=([\d,]+) wrong=(\d+) failed=(\d+)\s*$")
_FILED = re.compile(rb"FILED (\d+)\s*$")
_SECTORS = 2048  # in a MiB
_FIRST_PARTITION, _LINUX, _SIGNATURE = 446, 0x83, 0xAA55  # of a table of partitions
_ANSWER = 30.0  # seconds for an answer of a monitor
_MACHINE = (
    *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "qemu64"),  # others do not survive a move in emulation
    *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
)


@dataclass(frozen=True)
class Tick:
    """What a guest said, ten times a second."""

    when: float
    """As time.monotonic."""
    sequence: int
    append: int
    """Microseconds for a record of the log and its flush."""
    write: int
    """Microseconds, of the slowest of 4 writes."""
    reads: tuple[int, ...]
    """Microseconds of 4 reads of hot blocks, and of 4 others."""
    wrong: int
    """Blocks and records that were not what they should be, since it runs."""
    failed: int
    """Errors since it runs."""


class MachineEnded(AssertionError):
    """It ended by itself. The text is the end of what it said.

    Of ten emulated guests that move, one or two meet a panic of their kernel, whatever their disk is.
    """


class Console:
    """What a machine says, each line with the time at which it was whole."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.lines: list[tuple[float, bytes]] = []
        self.rest = b""
        """Of a line that has not ended: a machine may move in the middle of one."""
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        output = self._process.stdout
        assert isinstance(output, io.BufferedReader)
        with contextlib.suppress(ValueError):  # it was closed
            while data := output.read1():
                *whole, self.rest = (self.rest + data).split(b"\n")
                now = time.monotonic()
                self.lines += [(now, line) for line in whole]


class Machine:
    """A QEMU on a host."""

    def __init__(self, host: Host, folder: Path, arguments: Sequence[str | Path], socket: Path | None = None) -> None:
        """`socket`: where its monitor listens to somebody else, so that it is left alone here."""
        self.host = host
        self.folder = Path(tempfile.mkdtemp(dir=folder, prefix="machine-"))
        self.socket = socket or self.folder / "qmp"
        self._errors = self.folder / "errors"
        with self._errors.open("w") as errors:
            self.process = host.popen(
                *arguments, "-qmp", f"unix:{self.socket},server=on,wait=off",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.console = Console(self.process)
        wait_until(lambda: self._listens() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        if socket is None:
            self.monitor("query-status")  # it answers when it listens for a move, too

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def said(self) -> str:
        """The end of its console, and its complaints."""
        lines = b"\n".join([*(line for _, line in self.console.lines[-8:]), self.console.rest])
        return f"{lines.decode(errors='replace')}\n{self._errors.read_text()[-2000:]}"

    def monitor(self, command: str, **arguments: Any) -> Any:
        """What a QMP command returns. It has one client at a time: this leaves it to others between two calls."""
        with Connection(str(self.socket)) as connection:
            connection.call("qmp_capabilities", _ANSWER)
            return connection.call(command, _ANSWER, **arguments)

    @property
    def ticks(self) -> list[Tick]:
        return follow(self).ticks

    def wait_for(self, ticks: int, timeout: float = 60) -> None:
        """Wait until its guest has said so many ticks here, or until the machine has ended."""

        def there() -> bool:
            found = sum(b"TICK" in line for _, line in list(self.console.lines))
            return found >= ticks or self.process.poll() is not None

        wait_until(there, timeout, lambda: f"no {ticks} ticks: {self.said()}")
        if self.process.poll() is not None:
            raise MachineEnded(self.said())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def move(source: Machine, to: str, at_switchover: Callable[[Connection], object] | None = None) -> dict[str, Any]:
    """Move a machine, as QEMU's `migrate`; what `query-migrate` says at the end.

    `at_switchover` is called with the source's monitor while neither machine runs.
    """
    capabilities = {"events": True, "pause-before-switchover": at_switchover is not None}
    source.monitor(
        "migrate-set-capabilities", capabilities=[{"capability": c, "state": s} for c, s in capabilities.items()]
    )
    source.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 30})  # bytes per second: the link's
    with Connection(str(source.socket)) as connection:
        connection.call("qmp_capabilities", _ANSWER)
        connection.call("migrate", _ANSWER, uri=to)
        while True:
            found: dict[str, Any] = connection.call("query-migrate", _ANSWER)
            status = found.get("status")
            if status == "pre-switchover" and at_switchover is not None:
                at_switchover(connection)
                connection.call("migrate-continue", _ANSWER, state="pre-switchover")
                at_switchover = None
            assert status not in ("failed", "cancelled"), found
            if status == "completed" and found["total-time"]:  # the times come a moment after the status
                return found
            time.sleep(0.005)


@dataclass(frozen=True)
class Course:
    """What a guest went through, on all hosts on which it ran."""

    ticks: list[Tick]
    lost: list[int]
    """Sequence numbers after which another than the next one came."""
    gap: float
    """The longest time between two ticks, in seconds."""
    complaints: list[str]
    filed: int = -1
    """The file that it has written last, and flushed."""

    @property
    def is_right(self) -> bool:
        """All that it has flushed is there, it ran once only, and no read or write was wrong or failed."""
        return bool(self.ticks) and not self.lost and not self.complaints and self.ticks[0].sequence == 0


def follow(*machines: Machine) -> Course:
    """The course of a guest that ran in these machines, one after the other."""
    ticks, complaints, rest, filed = [], [], b"", -1
    for machine in machines:
        lines = list(machine.console.lines)
        if rest and lines:
            lines[0] = lines[0][0], rest + lines[0][1]
        rest = machine.console.rest
        for when, line in lines:
            if match := _TICK.search(line):
                sequence, append, write, reads, wrong, failed = match.groups()
                ticks.append(
                    Tick(
                        *(when, int(sequence), int(append), int(write)),
                        *(tuple(map(int, reads.split(b","))), int(wrong), int(failed)),
                    )
                )
            elif match := _FILED.search(line):
                filed = int(match[1])
            elif re.search(rb"WRONG|FAILED|Oops|BUG:|panic", line):
                complaints.append(line.decode(errors="replace").strip())
    lost = [one.sequence for one, other in pairwise(ticks) if other.sequence != one.sequence + 1]
    gap = max((other.when - one.when for one, other in pairwise(ticks)), default=0.0)
    return Course(ticks, lost, gap, complaints, filed)


@functools.cache
def _program() -> Path:
    """Compiled once."""
    folder = tempfile.mkdtemp(prefix="witness-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = Path(folder, "witness")
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-o", program, source], check=True)
    return program


_WRITE_FILES = """\
mkdir /files
mount -t ext4 /dev/vda1 /files
n=0
while [ $n -lt 1000000 ]; do
    seq $n $((n + 3000)) >/files/new
    mv /files/new /files/$((n % 20))
    sync
    echo FILED $n
    n=$((n + 1))
done &
"""


class Witness:
    """A disk of so many MiB, so full in percent, and guests on it; `dirty` MiB of their memory change all the time.

    `files`: MiB behind that, in a partition with ext4, in which they write files.
    """

    def __init__(
        self, folder: Path, mib: int, *, percent: int = 30, hz: int = 10, dirty: int = 0, files: int = 0
    ) -> None:
        self.folder = folder
        self.mib, self.files = mib, files
        self._layout = (str(mib), str(percent))
        script = f"{_WRITE_FILES if files else ''}exec witness run /dev/vda {mib} {percent} {hz} {dirty}\n"
        modules = ["ext4"] if files else []
        self._initrd = build_initrd(folder, script, modules, programs=[_program()])

    @property
    def size(self) -> int:
        """Of the disk, in MiB."""
        return self.mib + self.files

    def fill(self, file: Path) -> None:
        """Make it the disk's content; a file that is shorter gets longer."""
        run(str(_program()), "fill", file, *self._layout, timeout=600)
        if self.files:
            start, count = self.mib * _SECTORS, self.files * _SECTORS
            with file.open("r+b") as disk:  # the first MiB is nobody else's
                disk.seek(_FIRST_PARTITION)
                disk.write(struct.pack("<4xB3xII48xH", _LINUX, start, count, _SIGNATURE))
            run("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", f"offset={self.mib << 20}", file, f"{self.files}M")

    def reset(self, file: Path) -> None:
        """Undo what guests have written."""
        run(str(_program()), "reset", file, *self._layout, timeout=600)

    def check(self, file: Path) -> str:
        """See that it holds the data and a log without a gap. Raises CommandError; what was found."""
        return run(str(_program()), "check", file, *self._layout, timeout=600)

    def check_files(self, file: Path, course: Course) -> None:
        """See that its file system is right, and has what was filed last. Raises CommandError."""
        copy = self.folder / "files.ext4"
        with file.open("rb") as disk:
            disk.seek(self.mib << 20)
            copy.write_bytes(disk.read(self.files << 20))
        run("e2fsck", "-y", "-E", "journal_only", copy)
        run("e2fsck", "-fn", copy)
        for number in range(max(0, course.filed - 5), course.filed + 1):
            found = run("debugfs", "-R", f"cat {number % 20}", copy).split()[-3001:]
            first = int(found[0])
            assert first in (number, number + 20), (number, first)  # the next one may be there already
            assert found == [str(first + line) for line in range(3001)], number

    def boot(
        self,
        host: Host,
        drive: Sequence[str],
        *,
        incoming: str = "",
        memory: int = 192,
        socket: Path | None = None,
    ) -> Machine:
        """A machine on this disk (`guest.drive`) with so many MiB of memory; `incoming`: where a move comes to.

        `socket`: as of `Machine`.
        """
        kernel, _ = find_kernel()
        append = "console=ttyS0 panic=-1 quiet no_timer_check"
        words: list[str | Path] = [
            *_MACHINE,
            "-m",
            str(memory),
            "-kernel",
            kernel,
            "-initrd",
            self._initrd,
            "-append",
            append,
            *drive,
        ]
        return Machine(host, self.folder, [*words, *(["-incoming", incoming] if incoming else [])], socket)
