"""Hosts on this machine: network namespaces, joined by links with a rate and a delay, which can be cut.

They share the files of this machine, and its mounts. They have no names, so that tests at the same time do not meet,
and are gone when the link's process (`examples/link.c`) ends, which it does when this one does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.mounts import FVDFS, Finished, Mount, mounted, running, wait_until

_SOURCE = Path(__file__).parents[2] / "examples/link.c"
GIGABIT = 1e9  # bits per second
HALF_A_MILLISECOND = 500  # microseconds, from one host to another

NO_HOSTS = (
    "only root may make network namespaces"
    if os.geteuid()
    else next((f"{name} is not installed" for name in ("gcc", "nsenter") if not shutil.which(name)), "")
    or ("" if Path("/dev/net/tun").exists() else "the kernel has no /dev/net/tun")
)
"""Why there can be no hosts here; empty: there can."""
needs_hosts = pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)


@dataclass
class Link:
    """What joins hosts."""

    _process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self._process.pid

    def cut(self, host: Host | None = None) -> None:
        """Nothing comes from this host (default: from all), or to it, any more. Programs are not told."""
        assert self._ask("cut", host) == "ok"

    def join(self, host: Host | None = None) -> None:
        assert self._ask("join", host) == "ok"

    def bytes(self) -> list[int]:
        """What each host has sent that arrived, in bytes of frames; a large frame (TSO) has one header."""
        return [int(word) for word in self._ask("bytes").split()]

    def _ask(self, word: str, host: Host | None = None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word} {host.number}\n" if host else f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@dataclass
class Host:
    """A host, from 1 on; its processes are those in its network namespace."""

    number: int
    address: str
    namespace: Path
    link: Link
    _processes: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def on(self, *command: str | Path) -> list[str]:
        """The command line that runs this one there."""
        return ["nsenter", f"--net={self.namespace}", *map(str, command)]

    def popen(self, *command: str | Path, **how: Any) -> subprocess.Popen[Any]:
        """A process, with the keywords of Popen. It is killed when the host ends, if it still runs."""
        return self._processes.enter_context(running(*self.on(*command), **how))

    def run(self, *command: str | Path, timeout: float = 60) -> Finished:
        """Run a program to its end, whatever its exit code."""
        done = subprocess.run(self.on(*command), capture_output=True, text=True, timeout=timeout, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    def fvdfs(self, *arguments: str | Path, timeout: float = 60) -> Finished:
        return self.run(*FVDFS, *arguments, timeout=timeout)

    def must(self, *arguments: str | Path, timeout: float = 60) -> str:
        """Run fvdfs, which must succeed; its output."""
        done = self.fvdfs(*arguments, timeout=timeout)
        assert done.code == 0, f"fvdfs {arguments}: exit code {done.code}: {done.err}"
        return done.out

    def mounted(self, folder: Path, *options: str) -> contextlib.AbstractContextManager[Mount]:
        """The folder, mounted beside itself, by a process of this host."""
        return mounted(folder, *options, must=self.must)

    def crash(self) -> None:
        """Cut it off, and end all that runs there, unasked. What it has mounted is dead then: see `Mount.clear`.

        `Link.join` has it back, with nothing running.
        """
        self.link.cut(self)
        self.kill()

    def kill(self, but: Sequence[int] = ()) -> None:
        """End all that runs there, unasked, but these processes and their children."""

        def inside() -> list[int]:
            return [int(entry.name) for entry, stat in self._inside() if not {int(entry.name), int(stat[1])} & {*but}]

        def none_left() -> bool:
            pids = inside()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(none_left, complaint=lambda: f"processes {inside()} do not end")

    def _inside(self) -> Iterator[tuple[Path, list[str]]]:
        """What runs there: its folder in /proc, and its state, parent and so on, by proc_pid_stat(5)."""
        mine = self.namespace.stat().st_ino
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):  # it has just ended
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if (entry / "ns/net").stat().st_ino == mine:
                        yield entry, stat

    def efforts(self) -> Iterator[tuple[int, str, float]]:
        """What runs there, and the link: process, program, seconds of processor time."""
        link = Path("/proc", str(self.link.pid))
        beside = [(link, (link / "stat").read_text().rpartition(")")[2].split())]
        for entry, stat in [*self._inside(), *beside]:
            with contextlib.suppress(OSError):
                seconds = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
                yield int(entry.name), (entry / "comm").read_text().strip(), seconds

    def _end(self) -> None:
        self.kill()
        self._processes.close()


@functools.cache
def _program() -> Path:
    """The link's, compiled once."""
    folder = tempfile.mkdtemp(prefix="link-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = Path(folder, "link")
    subprocess.run(["gcc", "-O2", "-o", program, _SOURCE], check=True)
    return program


@contextlib.contextmanager
def joined_hosts(
    count: int, *, bits: float = GIGABIT, delay_us: int = HALF_A_MILLISECOND
) -> Iterator[tuple[Sequence[Host], Link]]:
    """So many hosts, each of which sends so many bits a second at most; the time a frame needs from one to another."""
    words = [str(_program()), str(count), str(bits), str(delay_us)]
    with running(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        link = Link(process)
        assert process.stdout is not None
        hosts = []
        for number, line in enumerate(iter(process.stdout.readline, "ready\n"), 1):
            assert line, "the link has ended"
            address, namespace = line.split()
            hosts.append(Host(number, address, Path(namespace), link))
        with contextlib.ExitStack() as stack:
            for host in hosts:
                stack.callback(host._end)
            yield hosts, link


@contextlib.contextmanager
def two_hosts(*, bits: float = GIGABIT, delay_us: int = HALF_A_MILLISECOND) -> Iterator[tuple[Host, Host, Link]]:
    """As `joined_hosts`."""
    with joined_hosts(2, bits=bits, delay_us=delay_us) as ((source, target), link):
        yield source, target, link
