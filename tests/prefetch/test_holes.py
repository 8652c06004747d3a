"""Holes of the base cross no link: what prefetching, copy-on-read and `convert` read from a server, by its own log."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.mounts import MIB, Mount, mounted, must, running, wait_until

SIZE = 1024 * MIB
EXTENTS = [(at * MIB + (at % 3) * 4096, 2 * MIB + (at % 5) * 4096) for at in range(3, 1000, 33)]
"""Offset and length of the data: 62 MiB, not on borders of blocks."""
DATA = sum(length for _, length in EXTENTS)
ENDS = 2 * 65536 * len(EXTENTS)
"""What whole blocks at the borders may cost."""
METADATA = MIB
"""What a format reads of its own."""


@pytest.fixture
def template(folder: Path) -> Path:
    """A sparse raw file."""
    path = folder / "base.raw"
    chance = random.Random(11)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, length in EXTENTS:
            file.seek(offset)
            file.write(chance.randbytes(length))
    return path


class Server:
    """An NBD server that logs its requests."""

    def __init__(self, folder: Path) -> None:
        self.url = f"nbd+unix:///?socket={folder}/nbd.sock"
        self.log = folder / "nbd.log"

    def asked(self, what: str) -> list[int]:
        """The lengths of all requests of a kind."""
        text = self.log.read_text()
        return [int(found, 16) for found in re.findall(rf" {what} id=\d+ offset=0x\w+ count=0x(\w+)", text)]

    @property
    def read(self) -> int:
        """Bytes."""
        return sum(self.asked("Read"))


@contextmanager
def serve(folder: Path, file: Path, *filters: str, settings: Sequence[str] = ()) -> Iterator[Server]:
    server = Server(folder)
    chosen = [f"--filter={name}" for name in ("log", *filters)]
    command: list[str | Path] = ["nbdkit", "-f", "-r", "-U", folder / "nbd.sock", *chosen, "file", file]
    command += [f"logfile={server.log}", *settings]
    with running(*command, stderr=subprocess.DEVNULL):
        wait_until((folder / "nbd.sock").exists)
        yield server


def create(folder: Path, name: str, base: str, base_format: str, *options: str) -> None:
    must("create", folder / f"{name}.fvd", "--base", base, "--base-format", base_format, *options)


def prefetch(mount: Mount) -> int:
    """All of the disk; the bytes that were copied."""
    with open(mount.raw("disk"), "r+b"):
        must("prefetch", "start", mount.raw("disk"))
        wait_until(lambda: mount.status("disk")["state"] == "done", 60, lambda: str(mount.status("disk")))
        status = mount.status("disk")
    assert status["local_share"] == 1
    return int(status["prefetched"])


def same(one: Path, other: Path) -> bool:
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", one, other], check=False)
    return done.returncode == 0


ANY_URL = ("-o", "allow_url=nbd+unix:///")


@pytest.mark.parametrize("layout", [[], ["--compact"], ["--data-file", "auto"]])
def test_prefetching_reads_the_data_of_a_template(
    folder: Path, tmp_path: Path, template: Path, layout: list[str]
) -> None:
    with serve(tmp_path, template) as server:
        create(folder, "disk", server.url, "raw", *layout)
        before = server.read
        with mounted(folder, *ANY_URL) as mount:
            assert DATA <= prefetch(mount) <= DATA + ENDS
            assert DATA <= server.read - before <= DATA + ENDS
            assert len(server.asked("Extents")) <= 6 * len(EXTENTS) + 20
            assert same(mount.raw("disk"), template)
    held = sum(path.stat().st_blocks * 512 for path in folder.glob("disk.*"))
    assert held <= DATA + ENDS + 4 * MIB
    must("check", folder / "disk.fvd")


def test_of_another_format(folder: Path, tmp_path: Path, template: Path) -> None:
    file = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", template, file], check=True)
    with serve(tmp_path, file) as server:
        create(folder, "disk", server.url, "qcow2")
        before = server.read
        with mounted(folder, *ANY_URL) as mount:
            prefetch(mount)
            assert server.read - before <= DATA + ENDS + METADATA
            assert same(mount.raw("disk"), template)


def test_down_a_chain(folder: Path, tmp_path: Path, template: Path) -> None:
    create(folder, "mid", "base.raw", "raw")
    create(folder, "disk", "mid.fvd", "fvd", "--compact")  # which allows no URLs down there
    with serve(tmp_path, template) as server:
        create(folder, "mid", server.url, "raw", "--force")
        with mounted(folder, *ANY_URL) as mount, open(mount.raw("mid"), "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), b"x" * 65536, 500 * MIB)
        before = server.read
        with mounted(folder, *ANY_URL) as mount:
            prefetch(mount)
            assert server.read - before <= DATA + ENDS
            with open(template, "r+b") as file:
                file.seek(500 * MIB)
                file.write(b"x" * 65536)
            assert same(mount.raw("disk"), template)


def test_a_server_that_tells_no_holes(folder: Path, tmp_path: Path, template: Path) -> None:
    with serve(tmp_path, template, "noextents") as server:
        create(folder, "disk", server.url, "raw")
        with mounted(folder, *ANY_URL) as mount:
            prefetch(mount)
            assert server.read >= SIZE
            assert same(mount.raw("disk"), template)
    # Some of the zeros, up to some megabytes, are stored where the host is busy.
    assert (folder / "disk.fvd").stat().st_blocks * 512 <= 2 * (DATA + ENDS)


def test_a_hole_that_is_not_called_zeros_is_read(folder: Path, tmp_path: Path, template: Path) -> None:
    """A server may say that it has nothing stored, and not what reading that gives."""
    (tmp_path / "extents").write_text("0 64M hole\n64M 64M hole,zero\n128M 1G\n")
    (start, length), *_ = EXTENTS
    with serve(tmp_path, template, "extentlist", settings=[f"extentlist={tmp_path}/extents"]) as server:
        create(folder, "disk", server.url, "raw")
        with mounted(folder, *ANY_URL) as mount:
            prefetch(mount)
            assert server.read >= SIZE - 64 * MIB
            with open(mount.raw("disk"), "rb") as disk, open(template, "rb") as base:
                for file in (disk, base):
                    file.seek(start)
                assert disk.read(length) == base.read(length) != bytes(length)
                disk.seek(64 * MIB)
                assert disk.read(64 * MIB) == bytes(64 * MIB)


def test_of_a_file_on_this_host(folder: Path, template: Path) -> None:
    create(folder, "disk", "base.raw", "raw")
    with mounted(folder) as mount:

        def read() -> int:
            """Bytes that the mount has read of all files."""
            found = re.search(r"rchar: (\d+)", Path(f"/proc/{mount.pid}/io").read_text())
            assert found is not None
            return int(found[1])

        before = read()
        assert prefetch(mount) <= DATA + ENDS
        assert read() - before <= DATA + ENDS + 4 * MIB
        assert same(mount.raw("disk"), template)


def test_a_hole_of_terabytes_is_one_step(folder: Path) -> None:
    with open(folder / "base.raw", "wb") as file:
        file.truncate(4 << 40)
        file.seek(3 << 40)
        file.write(b"x" * 65536)
    create(folder, "disk", "base.raw", "raw", "--block-size", "64K")
    with mounted(folder) as mount:
        prefetch(mount)
        memory = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{mount.pid}/status").read_text())
        assert memory is not None
        assert int(memory[1]) < 250_000  # KiB; the bitmap is 8 MiB of it
        with open(mount.raw("disk"), "rb") as disk:
            disk.seek((3 << 40) - 4096)
            assert disk.read(8192) == bytes(4096) + b"x" * 4096


def test_reading_a_hole_has_all_of_it_local(folder: Path, tmp_path: Path, template: Path) -> None:
    with serve(tmp_path, template) as server:
        create(folder, "disk", server.url, "raw", "--copy-on-read")
        with mounted(folder, *ANY_URL) as mount, open(mount.raw("disk"), "r+b", buffering=0) as disk:
            start, length = EXTENTS[4]
            at = start + length + MIB
            assert os.pread(disk.fileno(), 4096, at) == bytes(4096)
            hole = EXTENTS[5][0] // 65536 * 65536 - at // 65536 * 65536
            wait_until(lambda: mount.status("disk")["local_bytes"] >= hole)
            read = server.read
            assert os.pread(disk.fileno(), 8 * MIB, at + 16 * MIB) == bytes(8 * MIB)
            assert server.read == read
            # Of data that is zeros the server is asked once.
            assert mount.status("disk")["local_bytes"] <= hole + 4 * MIB


def test_to_read_the_whole_disk_reads_its_data(folder: Path, tmp_path: Path, template: Path) -> None:
    with serve(tmp_path, template) as server:
        create(folder, "disk", server.url, "raw", "--copy-on-read")
        before = server.read
        with mounted(folder, *ANY_URL) as mount:
            with open(mount.raw("disk"), "r+b") as disk:
                disk.seek(0)
                while disk.read(MIB):
                    pass
            assert server.read - before <= SIZE // 4
            assert same(mount.raw("disk"), template)


@pytest.mark.parametrize("target", ["copy.fvd", "copy.raw", "copy.qcow2"])
def test_convert_reads_the_data(folder: Path, tmp_path: Path, template: Path, target: str) -> None:
    with serve(tmp_path, template) as server:
        must("convert", "-f", "raw", server.url, folder / target)
        assert DATA <= server.read <= DATA + ENDS + MIB
    stated = ["-f", "qcow2"] if target.endswith("qcow2") else []
    must("convert", *stated, folder / target, tmp_path / "back.raw")
    assert same(tmp_path / "back.raw", template)


def test_convert_over_a_base_reads_what_may_differ(folder: Path, tmp_path: Path, template: Path) -> None:
    """Holes of either are not read."""
    with serve(tmp_path, template) as server:
        must("convert", "-f", "raw", template, folder / "disk.fvd", "--base", server.url, "--base-format", "raw")
        assert server.read <= DATA + ENDS + MIB
    assert (folder / "disk.fvd").stat().st_blocks * 512 <= 4 * MIB


@pytest.mark.parametrize("base_format", ["raw", "qcow2", "fvd"])
def test_create_detects_holes_of_any_base(folder: Path, tmp_path: Path, template: Path, base_format: str) -> None:
    if base_format != "raw":
        must("convert", template, folder / f"base.{base_format}")
    create(folder, "disk", f"base.{base_format}", base_format, "--detect-holes", "64K")
    with mounted(folder) as mount, open(mount.raw("disk"), "r+b"):
        assert SIZE - DATA - ENDS <= mount.status("disk")["local_bytes"] <= SIZE - DATA
        assert same(mount.raw("disk"), template)


def test_create_reads_nothing_of_a_server(folder: Path, tmp_path: Path, template: Path) -> None:
    with serve(tmp_path, template) as server:
        create(folder, "disk", server.url, "raw", "--detect-holes", "64K")
        assert server.read <= MIB
        with mounted(folder, *ANY_URL) as mount, open(mount.raw("disk"), "r+b"):
            assert SIZE - DATA - ENDS <= mount.status("disk")["local_bytes"] <= SIZE - DATA
