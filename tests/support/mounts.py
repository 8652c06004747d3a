"""The program as its users run it: its commands, and folders that it mounts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands.umount import STILL_OPEN
from support import forks

FVDFS = (sys.executable, "-m", "fvdfs")
MIB = 1 << 20
BUSY = 20.0  # seconds, after which somebody is taken to use a mount
LONG = 60.0  # seconds, for which something is waited for that a busy host takes its time for

RELEASE = tuple(int(part) for part in os.uname().release.split(".")[:2])
NO_PASSTHROUGH = (
    "only root is given passthrough" if os.geteuid() else "the kernel has no passthrough" if RELEASE < (6, 9) else ""
)
"""Why no disk can be passed through here; empty: it can."""
needs_passthrough = pytest.mark.skipif(bool(NO_PASSTHROUGH), reason=NO_PASSTHROUGH)
PASSED_THROUGH = "writeback=off"
"""The options of a mount that passes disks through."""


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def fvdfs(*arguments: str | Path, cwd: str | Path = ".", timeout: float = 60) -> Finished:
    """Run the program, whatever its exit code."""
    words = [*map(str, arguments)]
    done = forks.run(words, cwd, timeout)
    if done is None:
        done = subprocess.run([*FVDFS, *words], capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def must(*arguments: str | Path, timeout: float = 60) -> str:
    """Run the program, which must succeed, silently but for its output."""
    done = fvdfs(*arguments, timeout=timeout)
    assert done.code == 0, f"fvdfs {arguments}: exit code {done.code}: {done.err}"
    return done.out


@dataclass
class Mount:
    """A mounted folder."""

    folder: Path
    point: Path
    log_file: Path
    pid: int = 0
    options: tuple[str, ...] = field(default=())
    passes: str = ""
    """A disk that the kernel has to read and write by itself, so that no test of that passes without."""
    must: Callable[..., str] = must
    """Runs the program."""

    def mount(self) -> None:
        """Mount, which must succeed."""
        self.must("mount", self.folder, self.point, "--log-file", self.log_file, *self.options)
        self.pid = int(os.getxattr(self.point, "user.fvdfs.pid"))
        if self.passes:
            self.expect_passthrough(self.passes)

    def umount(self) -> None:
        """Unmount, which must succeed; every image is closed then.

        On a busy host a program takes its time to end, and to close its files, and so does what another test has
        begun in a copy of all mounts.
        """
        deadline = time.monotonic() + BUSY
        while (done := fvdfs("umount", self.point)).code == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert done.code in (0, STILL_OPEN), f"umount: {done.err}"
        if done.code:
            wait_for_end(self.pid)
        self.pid = 0

    def remount(self) -> None:
        self.umount()
        self.mount()

    def kill(self) -> None:
        """End the process at once, and clear the dead mount away."""
        os.kill(self.pid, 9)
        self.clear()

    def clear(self) -> None:
        """Clear the mount away of a process that was killed."""
        subprocess.run(["umount", "-l", self.point], check=True)
        wait_for_end(self.pid)
        self.pid = 0

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def raw(self, name: str) -> Path:
        return self.point / f"{name}.raw"

    def passthrough(self, name: str) -> str:
        """Whether the kernel reads and writes a disk by itself: "on", or why not; the disk has to be open."""
        return os.getxattr(self.raw(name), "user.fvdfs.passthrough").decode()

    def expect_passthrough(self, name: str) -> None:
        """The disk must be passed through when it is opened."""
        with open(self.raw(name), "rb"):
            assert self.passthrough(name) == "on"

    def status(self, name: str) -> dict[str, Any]:
        """What the mount says of an image."""
        found: dict[str, Any] = json.loads(os.getxattr(self.raw(name), "user.fvdfs.status"))
        return found


@contextlib.contextmanager
def fuse_connection(device: int) -> Iterator[Path]:
    """What the kernel tells of the connection behind a mounted file system."""
    with tempfile.TemporaryDirectory() as control:
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
        try:
            yield Path(control) / str(os.minor(device))
        finally:
            subprocess.run(["umount", control], check=True)


@contextlib.contextmanager
def running(*command: str | Path, **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process, with the keywords of Popen, that is killed at the end if it still runs, and whose pipes are closed."""
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(
    condition: Callable[[], object], timeout: float = LONG, complaint: Callable[[], str] = lambda: "it does not happen"
) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.01)


def wait_for_end(pid: int, timeout: float = LONG) -> None:
    """Wait until a process that is not our child has ended, though nobody may have reaped it yet."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], timeout)[0], f"process {pid} does not end"
    finally:
        os.close(descriptor)


def wait_for_log(mount: Mount, text: str, timeout: float = LONG) -> None:
    """Wait until the log holds the text."""
    wait_until(lambda: text in mount.log, timeout, lambda: f"{text!r} does not appear in the log:\n{mount.log}")


@contextlib.contextmanager
def mounted(folder: Path, *options: str, passes: str = "", must: Callable[..., str] = must) -> Iterator[Mount]:
    """The folder, mounted beside itself; unmounted at the end whatever happens. `passes` and `must`: as of `Mount`."""
    point = folder.parent / f"{folder.name}.mnt"
    point.mkdir(exist_ok=True)
    mount = Mount(folder, point, folder.parent / f"{folder.name}.log", options=options, passes=passes, must=must)
    try:
        mount.mount()
        yield mount
    finally:
        if mount.pid:
            try:
                mount.umount()
            except BaseException:
                subprocess.run(["umount", "-l", point], check=False)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(mount.pid, 9)
                raise


@contextlib.contextmanager
def mounted_disk(tmp_path: Path, base: bytes, words: Sequence[str], *options: str) -> Iterator[Mount]:
    """A mount of a new folder with vm.fvd, which `create` makes by these words, and the base.raw beside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(base)
    must("create", folder / "vm.fvd", *words)
    with mounted(folder, *options) as mount:
        yield mount
