"""`fvdfs migrate` between two mounts of this machine, each of which stands for a host, and what ends it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.machines import Machine, is_there, started_by
from support.mounts import FVDFS, MIB, Finished, Mount, fvdfs, running, wait_until

SIZE = 32 * MIB


class Ground:
    """Two mounts, and a machine on the disk of the first."""

    def __init__(self, tmp_path: Path, source: Mount, port: int) -> None:
        self.tmp_path = tmp_path
        self.source = source
        self.listen = f"127.0.0.1:{port}"
        self.folder = tmp_path / "target"
        self.folder.mkdir()
        self.target: Mount
        self.here, self.there = tmp_path / "here.qmp", tmp_path / "there.qmp"

    def words(self, *more: str | Path, disks: tuple[str, ...] = ("vm",)) -> list[str]:
        raws = [self.source.raw(name) for name in disks]
        how = ["--ssh", "env", "--program", f"{sys.executable} -m fvdfs", "--listen", self.listen]
        return ["migrate", *map(str, raws), f"127.0.0.1:{self.target.point}", *how, *map(str, more)]

    def with_machine(self) -> list[str]:
        start = started_by(self.there, self.target.raw("vm"))
        return ["--qmp", str(self.here), "--qmp-target", str(self.there), "--start", start]

    def migrate(self, *more: str | Path, disks: tuple[str, ...] = ("vm",)) -> Finished:
        return fvdfs(*self.words(*more, disks=disks))

    @property
    def is_served(self) -> bool:
        host, port = self.listen.split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def expect_as_before(self, name: str = "vm") -> None:
        assert self.source.status(name)["move"] == ""
        assert list(self.folder.iterdir()) == []
        wait_until(lambda: not self.is_served)
        wait_until(lambda: not is_there(self.there))


def there(ground: Ground) -> Machine:
    return Machine(ground.there)


def slow_down(here: Machine) -> None:
    """So that the migration does not end by itself."""
    here("migrate-set-parameters", max_bandwidth=2000)


@contextlib.contextmanager
def under_way(
    ground: Ground, step: str, *more: str, disks: tuple[str, ...] = ("vm",)
) -> Iterator[subprocess.Popen[Any]]:
    """The command, which has just told this step: with a machine, but for other words or disks."""
    words = ground.words(*(more or ground.with_machine() if disks == ("vm",) else more), disks=disks)
    with running(*FVDFS, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, step)
        yield process


def wait_for_step(process: subprocess.Popen[Any], step: str) -> None:
    """Until the command tells this one."""
    assert process.stdout is not None
    while step not in (line := process.stdout.readline()):
        assert line, process.stderr and process.stderr.read()


def ended(process: subprocess.Popen[Any]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def far_side_of(process: subprocess.Popen[Any]) -> int:
    """The process at the target."""
    return child_of(process, b"migrate-target")


def child_of(process: subprocess.Popen[Any], word: bytes) -> int:
    """A process of the command, with this in its command line."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if word in Path(f"/proc/{pid}/cmdline").read_bytes())
