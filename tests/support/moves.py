"""A disk that moves: its source, served, and the folder of a target."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from fvdfs.format import mailbox
from fvdfs.format.mailbox import SECTOR, Answer, Question
from fvdfs.format.migration import PLACE, SIZE, Record
from fvdfs.store.locations import parse_location
from fvdfs.store.nbd_client import nbd_client
from support.mounts import FVDFS, Mount, mounted, must, running

LONG = 20.0  # seconds for an answer, on a busy host
LOOK = 0.01  # seconds between looks for it


@contextlib.contextmanager
def serving(mount: Mount, log_file: Path | None = None, *more: str) -> Iterator[Path]:
    """The socket; the disk is given there. What the server says goes to this file. `more` words for the command."""
    socket = mount.folder.parent / "nbd"
    socket.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        how = {"stderr": stack.enter_context(log_file.open("a"))} if log_file is not None else {}
        words: list[str | Path] = [*FVDFS, "serve", mount.raw("vm"), "--unix", socket, *more]
        server = stack.enter_context(running(*words, stdout=subprocess.PIPE, text=True, **how))
        assert server.stdout is not None
        assert server.stdout.readline() == f"nbd+unix:///vm?socket={socket}\n"
        yield socket
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


class Client:
    """Somebody who reaches the address at which a disk is served, and writes into its mailbox what he likes."""

    def __init__(self, url: str) -> None:
        """`url`: of the disk."""
        self._location = parse_location(url)

    @classmethod
    def at(cls, socket: Path) -> Client:
        """Of the disk that is served at this socket."""
        return cls(f"nbd+unix:///vm?socket={socket}")

    def read(self, export: str = mailbox.EXPORT, offset: int = 0, length: int = mailbox.SIZE) -> bytes:
        """What is there. Raises NoExport, OSError."""

        async def read() -> bytes:
            async with nbd_client(self._location, export, "") as found:
                return await found.pread(length, offset)

        return trio.run(read)

    def write(self, offset: int, data: bytes) -> None:
        """Into the mailbox."""

        async def write() -> None:
            async with nbd_client(self._location, mailbox.EXPORT, "") as box:
                await box.pwrite(data, offset)

        trio.run(write)

    def ask(self, question: Question) -> Answer:
        """What is answered."""
        at = mailbox.question_at(question.target)
        self.write(at, question.encode())
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline:
            answer = Answer.decode(self.read(offset=at + SECTOR, length=SECTOR))
            if answer is not None and answer.number == question.number:
                return answer
            time.sleep(LOOK)
        raise AssertionError("no answer")


def number() -> str:
    """Of a question."""
    return os.urandom(8).hex()


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
    def served(self, *more: str) -> Iterator[None]:
        with serving(self.source, None, *more) as socket:
            self.url = f"nbd+unix:///vm?socket={socket}"
            yield


def record(image: Path) -> Record:
    """What an image says of its moves."""
    with image.open("rb") as file:
        file.seek(PLACE)
        return Record.decode(file.read(SIZE), str(image))
