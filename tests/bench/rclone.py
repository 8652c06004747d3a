"""Reads like a boot's of a template behind a web server: a disk of fvdfs over it, and `rclone mount` of the same file.

    python tests/bench/rclone.py [--rounds N] [--work DIR] [--json FILE]

The server (here, in Python) answers each request after 5 ms and sends 50 MB/s. Read are, one after another and past
the kernel's cache, 16 MiB of a template of 1 GiB: 8 files of 1.5 MiB in steps of 128 KiB, and 4 MiB in pieces of
4 to 64 KiB at random places. Then all of it is read again. Printed are how long that takes, and what crosses the link,
of what is read. rclone mounts with `--vfs-cache-mode full`, in which it keeps what was read, as it is, and with reading
ahead off as far as it can be.

Needs root, rclone, fuse3 and qemu-block-extra.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import FVDFS, MIB, Ranges, command, replay, wait_for
from bench.report import Report

SIZE = 1 << 30
RATE, DELAY = 50e6, 0.005  # bytes a second, seconds
PIECE = 64 << 10  # bytes that the server sends at a time
NAME = "template.raw"
OPTIONS = {
    "rclone": (),
    "rclone, no read-ahead": ("--buffer-size", "0", "--vfs-read-chunk-size", "1M", "--vfs-read-chunk-size-limit", "1M"),
}


class Server(ThreadingHTTPServer):
    """Gives a file, all clients together no faster than the rate."""

    daemon_threads = True

    def __init__(self, file: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.file = file
        self.sent = 0
        self._turn = threading.Lock()
        self._free = 0.0

    def wait_for_turn(self, size: int) -> None:
        """Until so many bytes have crossed the link."""
        with self._turn:
            self._free = max(self._free, time.monotonic()) + size / RATE
            self.sent += size
            free = self._free
        time.sleep(max(0.0, free - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has ended
            super().handle()

    def _answer(self, *, body: bool) -> None:
        time.sleep(DELAY)
        if self.path != f"/{NAME}":
            page = f'<a href="{NAME}">{NAME}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page if body else b"")
            return
        start, stop = 0, SIZE
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start, stop = int(found[1]), int(found[2]) + 1 if found[2] else SIZE
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 09:00:00 GMT")
        self.send_header("Content-Length", str(stop - start))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{SIZE}")
        self.end_headers()
        if body:
            self._send(start, stop)

    def _send(self, start: int, stop: int) -> None:
        with self.server.file.open("rb") as file:
            while start < stop:
                data = os.pread(file.fileno(), min(PIECE, stop - start), start)
                self.server.wait_for_turn(len(data))
                try:
                    self.wfile.write(data)
                except OSError:  # it has enough
                    self.close_connection = True
                    return
                start += len(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def boot_reads() -> Ranges:
    """What a boot would read, in order."""
    dice, found = random.Random(5), []
    for _ in range(8):
        start = dice.randrange(SIZE // MIB - 2) * MIB
        found.append([(start + at, 128 << 10) for at in range(0, 3 * MIB // 2, 128 << 10)])
    left = 4 * MIB
    while left > 0:
        length = dice.choice([4, 8, 16, 32, 64]) << 10
        found.append([(dice.randrange(SIZE // 4096 - 16) * 4096, length)])
        left -= length
    dice.shuffle(found)
    return [each for parts in found for each in parts]


@contextmanager
def by_fvdfs(work: Path, url: str) -> Iterator[Path]:
    """A disk over the template that keeps what is read."""
    images, disks = work / "images", work / "disks"
    for folder in (images, disks):
        folder.mkdir()
    command(*FVDFS, "create", images / "vm.fvd", "-b", url + NAME, "-F", "raw", "--copy-on-read")
    command(*FVDFS, "mount", images, disks, "-o", f"allow_url={url}")
    try:
        yield disks / "vm.raw"
    finally:
        command(*FVDFS, "umount", disks)


@contextmanager
def by_rclone(work: Path, url: str, options: Sequence[str]) -> Iterator[Path]:
    """The template in a mount that keeps what is read."""
    disks = work / "disks"
    disks.mkdir()
    words = ["--config", os.devnull, "--cache-dir", str(work / "cache"), "--vfs-cache-mode", "full", "--http-url", url]
    with subprocess.Popen(["rclone", "mount", ":http:", disks, "--read-only", *words, *options]) as process:
        try:
            wait_for((disks / NAME).exists)
            yield disks / NAME
        finally:
            command("fusermount3", "-u", disks)
            process.wait(60)


def measure(report: Report, server: Server, who: str, path: Path) -> None:
    reads = boot_reads()
    size = sum(length for _, length in reads)
    for what in ("first", "second"):
        before = server.sent
        report.add(f"{what} reads", "s", who, replay(reads, path))
        report.add(f"{what} reads, over the link", "of what is read", who, (server.sent - before) / size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work, prefix="fvdfs-rclone-"))
    report = Report(arguments.json)
    template = work / NAME
    with template.open("wb") as file:
        for _ in range(SIZE // MIB):
            file.write(os.urandom(MIB))
    server = Server(template)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    for round_ in range(arguments.rounds):
        ways: dict[str, Callable[[Path, str], AbstractContextManager[Path]]] = {"fvdfs": by_fvdfs}
        ways |= {who: partial(by_rclone, options=words) for who, words in OPTIONS.items()}
        for who, way in ways.items():
            place = work / f"{round_}-{who.replace(' ', '-')}"
            place.mkdir()
            with way(place, url) as path:
                measure(report, server, who, path)
    server.shutdown()
    shutil.rmtree(work)
    print(report.table())


if __name__ == "__main__":
    main()
