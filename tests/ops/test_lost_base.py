"""A base whose server goes away and comes back: killed, stopped, cut off; while disks are open, and before they are."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support.cables import Network
from support.mounts import MIB, Mount, fvdfs, mounted, must, running, wait_until

BLOCK = 64 << 10
SIZE = 8 * MIB
DATA = random.Random(5).randbytes(SIZE)
WAIT = ("-o", "allow_url=nbd+unix:///,on_base_error=wait")
EIO = ("-o", "allow_url=nbd+unix:///")
LIMIT = 30  # seconds; far more than anything takes that does not wait


class Server:
    """nbdkit with the template, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "nbd.sock"
        self.file = folder / "template"
        self.file.write_bytes(DATA)
        self.url = f"nbd+unix:///?socket={self.socket}"
        self._stack = contextlib.ExitStack()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-r", "-U", str(self.socket), "file", str(self.file)]
        self.process = self._stack.enter_context(running(*command, stderr=subprocess.DEVNULL))
        wait_until(self.socket.exists)

    def kill(self) -> None:
        self._stack.close()
        self.process = None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def make_disk(folder: Path, server: Server) -> None:
    options = ("--block-size", "64K", "--copy-on-read")
    must("create", folder / "disk.fvd", "--base", server.url, "--base-format", "raw", *options)
    must("create", folder / "other.fvd", "1M")


def dd(disk: Path, block: int, *more: str) -> tuple[str, ...]:
    """Read a block of the disk, past the page cache."""
    return ("dd", f"if={disk}", f"bs={BLOCK}", f"skip={block}", "count=1", "iflag=direct", "status=none", *more)


def read(disk: Path, block: int) -> bytes:
    return subprocess.run(dd(disk, block), capture_output=True, check=True, timeout=LIMIT).stdout


def fails(disk: Path, block: int) -> bool:
    done = subprocess.run(dd(disk, block), capture_output=True, check=False, timeout=LIMIT)
    return b"Input/output error" in done.stderr


def write(disk: Path, offset: int, size: int) -> tuple[str, ...]:
    """Write so many x in one request, past the page cache."""
    to = f"dd of={disk} bs={size} seek={offset} oflag=direct,seek_bytes conv=notrunc,fsync iflag=fullblock status=none"
    return ("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x | exec {to}")


def outage(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = mount.status("disk")["base_outage"]
    return found


def test_requests_wait_until_the_server_is_back(folder: Path, server: Server) -> None:
    make_disk(folder, server)
    with mounted(folder, *WAIT) as mount, open(mount.raw("disk"), "r+b"):
        disk = mount.raw("disk")
        assert read(disk, 0) == DATA[:BLOCK]
        assert outage(mount) is None
        server.kill()
        with running(*dd(disk, 1), stdout=subprocess.PIPE) as reading, contextlib.ExitStack() as writing:
            wait_until(lambda: outage(mount) is not None)
            assert read(disk, 0) == DATA[:BLOCK]
            subprocess.run(write(disk, 512, 4096), check=True, timeout=LIMIT)  # it is local
            subprocess.run(write(disk, 3 * BLOCK, BLOCK), check=True, timeout=LIMIT)  # it needs nothing
            assert len(read(mount.raw("other"), 1)) == BLOCK
            part = writing.enter_context(running(*write(disk, 2 * BLOCK + 512, 4096)))
            time.sleep(0.5)
            assert reading.poll() is None
            assert part.poll() is None
            lost = outage(mount)
            assert lost["until"] is None
            assert "cannot be reached" in lost["reason"]
            assert f"base lost since {lost['since'][:10]}" in must("status", mount.point)
            server.start()
            assert reading.communicate(timeout=LIMIT)[0] == DATA[BLOCK : 2 * BLOCK]
            assert part.wait(LIMIT) == 0
        assert outage(mount)["until"] is not None
        assert "base back since" in must("status", mount.point)
        assert mount.log.count("its server is lost") == 1
        assert mount.log.count("its server is back") == 1
        assert len(mount.log.splitlines()) < 8, mount.log
        expected = bytearray(DATA[: 4 * BLOCK])
        for at, length in ((2 * BLOCK + 512, 4096), (512, 4096), (3 * BLOCK, BLOCK)):
            expected[at : at + length] = b"x" * length
        assert b"".join(read(disk, block) for block in range(4)) == expected
    assert "clean" in must("check", folder / "other.fvd")


@pytest.mark.parametrize(("waits", "seconds"), [("1s", 1), ("1h", 3600)])
def test_requests_wait_for_as_long_as_the_user_says(folder: Path, server: Server, waits: str, seconds: int) -> None:
    make_disk(folder, server)
    option = f"allow_url=nbd+unix:///,on_base_error=wait={waits}"
    with mounted(folder, "-o", option) as mount, open(mount.raw("disk"), "r+b"):
        disk = mount.raw("disk")
        server.kill()
        with running(*dd(disk, 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
            wait_until(lambda: outage(mount) is not None)
            lost = outage(mount)
            since, fails_at = (datetime.fromisoformat(lost[key]) for key in ("since", "fails_at"))
            assert abs((fails_at - since).total_seconds() - seconds) <= 1  # both are rounded
            assert f"what needs it waits, until {fails_at.isoformat(' ')[:19]} at most" in must("status", mount.point)
            wait_until(lambda: f"for {seconds} s it is waited for" in mount.log)
            if seconds == 1:
                assert b"Input/output error" in reading.communicate(timeout=LIMIT)[1]
                assert outage(mount)["until"] is None
            server.start()
            if seconds > 1:
                assert reading.communicate(timeout=LIMIT)[0] == DATA[BLOCK : 2 * BLOCK]
        wait_until(lambda: outage(mount)["until"] is not None)
        assert read(disk, 2) == DATA[2 * BLOCK : 3 * BLOCK]


@pytest.mark.parametrize("kind", ["read", "write"])
def test_who_waits_can_be_killed(folder: Path, server: Server, kind: str) -> None:
    make_disk(folder, server)
    with mounted(folder, *WAIT) as mount, open(mount.raw("disk"), "r+b"):
        disk = mount.raw("disk")
        read(disk, 0)
        server.kill()
        part = ("dd", "if=/dev/zero", f"of={disk}", "bs=4096", "seek=17", "count=1", "oflag=direct", "conv=notrunc")
        command = dd(disk, 1) if kind == "read" else part
        with running(*command, stdout=subprocess.DEVNULL) as waiting:
            wait_until(lambda: outage(mount) is not None)
            time.sleep(0.3)
            assert waiting.poll() is None
            waiting.kill()
            assert waiting.wait(LIMIT) == -signal.SIGKILL
        server.start()
        assert read(disk, 1) == DATA[BLOCK : 2 * BLOCK]


def test_a_mount_ends_while_requests_wait(folder: Path, server: Server) -> None:
    make_disk(folder, server)
    with mounted(folder, *WAIT) as mount, open(mount.raw("disk"), "r+b") as file:
        read(mount.raw("disk"), 0)
        subprocess.run(write(mount.raw("disk"), 0, 4096), check=True)
        server.kill()
        with running(*dd(mount.raw("disk"), 1), stderr=subprocess.PIPE) as waiting:
            wait_until(lambda: outage(mount) is not None)
            began = time.monotonic()
            os.kill(mount.pid, signal.SIGTERM)
            assert waiting.wait(LIMIT) != 0
            with contextlib.suppress(OSError):
                file.close()
            wait_until(lambda: not os.path.ismount(mount.point))
            assert time.monotonic() - began < LIMIT
        mount.pid = 0
        server.start()
        mount.mount()
        assert read(mount.raw("disk"), 0)[:4096] == b"x" * 4096


# --- opened while the server is away ------------------------------------------------------------


@pytest.mark.parametrize("options", [WAIT, EIO], ids=["wait", "eio"])
def test_a_disk_is_opened_without_its_base(folder: Path, server: Server, options: tuple[str, str]) -> None:
    make_disk(folder, server)
    with mounted(folder, *options) as mount:
        disk = mount.raw("disk")
        with open(disk, "r+b"):
            read(disk, 0)
        server.kill()
        with open(disk, "r+b"):
            assert read(disk, 0) == DATA[:BLOCK]
            subprocess.run(write(disk, 0, 4096), check=True, timeout=LIMIT)
            assert outage(mount)["until"] is None
            with running(*dd(disk, 1), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reading:
                time.sleep(0.3)
                assert reading.poll() is None
                server.start()
                assert reading.communicate(timeout=LIMIT)[0] == DATA[BLOCK : 2 * BLOCK]
            assert read(disk, 0) == b"x" * 4096 + DATA[4096:BLOCK]
    assert "its server is back" in mount.log


def test_commands_do_not_wait(folder: Path, server: Server, tmp_path: Path) -> None:
    make_disk(folder, server)
    server.kill()
    done = fvdfs("convert", "-o", "allow_url=nbd+unix:///", folder / "disk.fvd", tmp_path / "copy.raw")
    assert done.code == 1
    assert "cannot be reached" in done.err


# --- a network that is cut ----------------------------------------------------------------------


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := Network.missing():
        pytest.skip(reason)
    network = Network()
    yield network
    network.remove()


@pytest.mark.slow
def test_a_network_that_is_cut_for_a_while(folder: Path, tmp_path: Path, network: Network) -> None:
    """The disk goes on as soon as the network is back, not when TCP tries again."""
    (tmp_path / "template").write_bytes(DATA)
    server = ["nbdkit", "-f", "-r", "-i", network.there, "-p", "10809", "file", str(tmp_path / "template")]
    with running(*network.inside, *server, stderr=subprocess.DEVNULL):
        url = f"nbd://{network.there}/"
        wait_until(lambda: fvdfs("create", folder / "disk.fvd", "--base", url, "--base-format", "raw").code == 0)
        with mounted(folder, "-o", f"allow_url={url},on_base_error=wait") as mount, open(mount.raw("disk"), "r+b"):
            disk = mount.raw("disk")
            read(disk, 0)
            network.cut()
            with running(*dd(disk, 1), stdout=subprocess.PIPE) as reading:
                wait_until(lambda: outage(mount) is not None)
                assert "nothing was heard" in mount.log
                network.join()
                began = time.monotonic()
                assert reading.communicate(timeout=LIMIT)[0] == DATA[BLOCK : 2 * BLOCK]
                assert time.monotonic() - began < 3
