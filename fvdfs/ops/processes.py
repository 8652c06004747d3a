"""Which process a request comes from. The kernel names a thread; a process is its group. Blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """One process of this machine, and no later one that has its number."""

    group: int
    started: int
    """Clock ticks since the machine was booted."""


def process_of(thread: int) -> Process | None:
    """The process that has this thread; None where nobody can tell: it has ended, or is in another PID namespace."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            group = next(int(line.split()[1]) for line in file if line.startswith(b"Tgid:"))
        return Process(group, _started(group))
    except (OSError, StopIteration):
        return None


def lives(process: Process) -> bool:
    """Whether it has not ended."""
    try:
        return _started(process.group) == process.started
    except OSError:
        return False


def _started(group: int) -> int:
    """When a process began (proc(5)). Raises OSError."""
    with open(f"/proc/{group}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
