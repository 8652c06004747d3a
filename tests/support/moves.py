"""A disk that moves: its source, served, and the folder of a target."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fvdfs.format.migration import PLACE, SIZE, Record
from support.mounts import FVDFS, Mount, mounted, must, running


@contextlib.contextmanager
def serving(mount: Mount) -> Iterator[Path]:
    """The socket; the disk is given there."""
    socket = mount.folder.parent / "nbd"
    socket.unlink(missing_ok=True)
    with running(*FVDFS, "serve", mount.raw("vm"), "--unix", socket, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"nbd+unix:///vm?socket={socket}\n"
        yield socket
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


class Move:
    """A source that is mounted, and the folder of a target."""

    def __init__(self, tmp_path: Path, source: Mount) -> None:
        self.source = source
        self.folder = tmp_path / "target"
        self.folder.mkdir()
        self.image = self.folder / "vm.fvd"
        self.url = ""

    @contextlib.contextmanager
    def target(self, *options: str) -> Iterator[Mount]:
        with mounted(self.folder, "-o", ",".join(["allow_url=nbd+unix:///", *options])) as mount:
            yield mount

    def receive(self, name: str = "vm") -> None:
        must("receive", self.url, self.folder / f"{name}.fvd")

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        with serving(self.source) as socket:
            self.url = f"nbd+unix:///vm?socket={socket}"
            yield


def record(image: Path) -> Record:
    """What an image says of its moves."""
    with image.open("rb") as file:
        file.seek(PLACE)
        return Record.decode(file.read(SIZE), str(image))
