"""Block devices and small file systems for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.guest import CommandError
from support.guest import run as run_program
from support.mounts import MIB, wait_until


@contextmanager
def loop_device(file: Path, *, direct: bool = False) -> Iterator[Path]:
    """A block device on a file, whose user it no longer is at the end; `direct`: by direct I/O."""
    mode = "on" if direct else "off"
    device = Path(run_program("losetup", "--find", "--show", f"--direct-io={mode}", file).strip())
    backing = Path("/sys/block", device.name, "loop")
    try:
        assert (backing / "dio").read_text().strip() == str(int(direct)), f"{device}: direct I/O"
        yield device
    finally:
        run_program("losetup", "--detach", device)
        # The device lets go of the file only when its last user has closed it.
        wait_until(lambda: not (backing / "backing_file").exists(), complaint=lambda: f"{device} is still in use")


@contextmanager
def ext4(disk: Path, point: Path, *, direct: bool, options: str = "rw") -> Iterator[None]:
    """The file system on a disk, mounted by way of a loop device."""
    point.mkdir(exist_ok=True)
    with loop_device(disk, direct=direct) as device:
        run_program("mount", "-t", "ext4", "-o", options, device, point)
        try:
            yield
        finally:
            try:
                run_program("umount", point)
            except CommandError:
                run_program("umount", "--lazy", point, check=False)
                raise


@contextmanager
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
