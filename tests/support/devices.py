"""Block devices and small file systems for tests."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.guest import run as run_program
from support.mounts import MIB


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A block device on a file."""
    device = subprocess.run(["losetup", "-f", "--show", file], check=True, capture_output=True, text=True).stdout
    try:
        yield Path(device.strip())
    finally:
        subprocess.run(["losetup", "-d", device.strip()], check=True)


@contextlib.contextmanager
def small_disk(point: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory; the call gives it another size."""
    point.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", point], check=True)

    mount(f"size={size}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "-l", point], check=True)


OLD = b"a former owner's secret "


@dataclass
class Device:
    """A loop device full of a former owner's bytes."""

    path: Path
    backing: Path

    def grow(self, size: int) -> None:
        """What a volume manager does: more of somebody else's bytes at the end."""
        soil(self.backing, size)
        subprocess.run(["losetup", "-c", self.path], check=True)


def soil(path: Path, size: int) -> None:
    piece = (OLD * (MIB // len(OLD) + 1))[:MIB]
    with open(path, "ab") as file:
        while (at := file.tell()) < size:
            file.write(piece[: size - at])


@contextmanager
def device(path: Path, size: int) -> Iterator[Device]:
    soil(path, size)
    loop = run_program("losetup", "-f", "--show", str(path)).strip()
    try:
        yield Device(Path(loop), path)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
