"""What is compared: raw disks of 1 GiB, served by fvdfs in each layout and by its peers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.lab import FVDFS, command, running, wait_for

SIZE = 1 << 30


@dataclass(frozen=True)
class Served:
    """A disk that can be used, and the processes that serve it."""

    disk: Path
    servers: tuple[int, ...] = ()

    def cpu_seconds(self) -> float:
        """What its servers have used up to now, in user space and in the kernel."""
        ticks = 0
        for pid in self.servers:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


Serve = Callable[[Path, Path], Iterator[Served]]
"""Makes a fresh disk in a folder, over a base or not, serves it, and ends that."""


@dataclass(frozen=True)
class Target:
    """A way to serve a disk."""

    serve: Serve
    cow: bool = False
    """Whether it stands on the base."""
    peer: bool = False
    needs: str = ""
    """A program; where it is not installed, the target is left out."""
    guests: bool = False
    """Whether guests are booted on it, which takes long."""
    empty: bool = False
    """Whether it holds nothing, so that only writing to it tells something."""

    @contextmanager
    def served(self, folder: Path, base: Path) -> Iterator[Served]:
        yield from self.serve(folder, base)


def _fvdfs(*options: str, device: bool = False, mount: str = "", data: str = "") -> Serve:
    """`data`: the data file, which gets the content of the base."""

    def serve(work: Path, base: Path) -> Iterator[Served]:
        folder, point = work / "images", work / "disks"
        folder.mkdir()
        point.mkdir()
        image, loop = folder / "disk.fvd", ""
        chosen = [str(base) if option == "BASE" else option for option in options]
        try:
            if device:
                backing = work / "device"
                backing.touch()
                os.truncate(backing, 2 * SIZE)
                loop = command("losetup", "-f", "--show", backing).strip()
                image.symlink_to(loop)
            command(*FVDFS, "create", loop or image, str(SIZE), *chosen)
            if data:
                shutil.copyfile(base, folder / data)
            command(*FVDFS, "mount", folder, point, "-o", f"base_path={base.parent}{mount}")
            try:
                yield Served(point / "disk.raw", (int(os.getxattr(point, "user.fvdfs.pid")),))
            finally:
                command(*FVDFS, "umount", point)
        finally:
            if loop:
                command("losetup", "-d", loop)

    return serve


def _raw(work: Path, base: Path) -> Iterator[Served]:
    disk = work / "disk.raw"
    shutil.copyfile(base, disk)
    yield Served(disk)


def _sparse(work: Path, base: Path) -> Iterator[Served]:
    disk = work / "disk.raw"
    disk.touch()
    os.truncate(disk, SIZE)
    yield Served(disk)


def _daemon(image_format: str, *, cow: bool = False) -> Serve:
    def serve(work: Path, base: Path) -> Iterator[Served]:
        disk, export = work / "disk", work / "export"
        backing = ["-b", str(base), "-F", "raw"] if cow else []
        command("qemu-img", "create", "-q", "-f", image_format, *backing, disk, str(SIZE))
        export.touch()
        node = f"driver={image_format},node-name=disk,file.driver=file,file.filename={disk}"
        fuse = f"type=fuse,id=e,node-name=disk,mountpoint={export},writable=on"
        with running("qemu-storage-daemon", "--blockdev", node, "--export", fuse) as daemon:
            wait_for(lambda: export.stat().st_size == SIZE)
            yield Served(export, (daemon.pid,))

    return serve


def _nbdkit(work: Path, base: Path) -> Iterator[Served]:
    export, socket = work / "export", work / "socket"
    export.touch()
    with running("nbdkit", "-f", "-U", socket, "--filter=cow", "file", base) as server:
        wait_for(socket.exists)
        with running("nbdfuse", export, "--unix", socket) as client:
            wait_for(lambda: export.stat().st_size == SIZE)
            try:
                yield Served(export, (server.pid, client.pid))
            finally:
                subprocess.run(["fusermount3", "-u", export], check=False)
                client.wait(20)


_COW = ("-b", "BASE", "-F", "raw")
_DAEMON = "qemu-storage-daemon"
TARGETS = {
    "raw file": Target(_raw, guests=True),
    "sparse raw file": Target(_sparse, empty=True),
    "fvdfs cow": Target(_fvdfs(*_COW), cow=True, guests=True),
    "fvdfs cow on device": Target(_fvdfs(*_COW, device=True), cow=True),
    "fvdfs compact cow": Target(_fvdfs(*_COW, "--compact", "--block-size", "64K"), cow=True),
    "fvdfs cow writeback=off": Target(_fvdfs(*_COW, mount=",writeback=off"), cow=True),
    "fvdfs passthrough": Target(_fvdfs("--data-file", "auto", data="disk.fvd.data"), guests=True),
    "fvdfs plain": Target(_fvdfs()),
    "fvdfs compact": Target(_fvdfs("--compact")),
    "fvdfs compact on device": Target(_fvdfs("--compact", device=True)),
    "qcow2 cow": Target(_daemon("qcow2", cow=True), cow=True, peer=True, needs=_DAEMON, guests=True),
    "nbdkit cow": Target(_nbdkit, cow=True, peer=True, needs="nbdfuse", guests=True),
    "qcow2": Target(_daemon("qcow2"), peer=True, needs=_DAEMON),
    "raw over FUSE": Target(_daemon("raw"), peer=True, needs=_DAEMON),
}
