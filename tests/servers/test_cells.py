"""Disks on real servers of each kind: every cell of the table in docs/storage-on-servers.md.

To add a kind: its class in support/servers.py, and a line in `SERVERS`.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.block_servers import Iscsi, Nbdkit, NbdServer, Nfs, Qsd
from support.cells import DATA, HOLE, SIZE, access, create, new_data, options, read
from support.ceph import Rbd
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until
from support.ports import free_port
from support.servers import S3, DiskServer, Https, Ssh

SERVERS: dict[str, type[DiskServer]] = {
    "ssh": Ssh,
    "https": Https,
    "s3": S3,
    "iscsi": Iscsi,
    "nfs": Nfs,
    "nbd-server": NbdServer,
    "nbdkit": Nbdkit,
    "qemu-storage-daemon": Qsd,
    "ceph": Rbd,
}


@pytest.fixture(scope="module", params=[*SERVERS])
def running_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskServer]:
    kind = SERVERS[request.param]
    if reason := kind.missing():
        pytest.skip(reason)
    with free_port() as port:
        server = kind(tmp_path_factory.mktemp(request.param) / "server", port)
        server.put(DATA)
        try:
            server.start()
            yield server
        finally:
            server.stop()
            server.close()


@pytest.fixture
def server(running_server: DiskServer) -> DiskServer:
    """With the disk as it was, and running."""
    if running_server.content() != DATA:
        running_server.put(DATA)
    return running_server


def all_that_is_seen(mount: Mount) -> str:
    """What anybody can see of a mount: its log, its status, all command lines."""
    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    status = must("status", mount.point, "--json")
    return "\n".join([lines, status, must("status", mount.point), mount.log])


def test_a_base_is_read_kept_and_let_go(folder: Path, server: DiskServer) -> None:
    """Copy-on-read, a restart in the middle, prefetching to the end; then nobody needs the server."""
    create(folder, server, "--copy-on-read", "--prefetch-delay", "1000")
    with mounted(folder, "-o", options(server)) as mount:
        raw = mount.raw("vm")
        assert read(raw, 0, MIB) == DATA[:MIB]
        server.restart()
        assert read(raw, MIB, MIB) == DATA[MIB : 2 * MIB]
        seen = all_that_is_seen(mount)
        assert not [secret for secret in server.secrets if secret in seen]
        wait_until(lambda: mount.status("vm")["local_bytes"] >= 2 * MIB)
        with raw.open("rb"):
            must("prefetch", "start", raw)
            wait_until(lambda: "is local" in mount.log or mount.status("vm")["local_share"] == 1)
        server.stop()
        try:
            assert raw.read_bytes() == DATA
        finally:
            server.start()


def test_its_holes(folder: Path, server: DiskServer) -> None:
    """They are holes of the disk, where the server tells of them, and zeros in any case."""
    create(folder, server)
    with mounted(folder, "-o", options(server)) as mount, mount.raw("vm").open("rb") as disk:
        if server.tells_holes:
            assert os.lseek(disk.fileno(), MIB, os.SEEK_HOLE) == HOLE.start
            assert os.lseek(disk.fileno(), HOLE.start, os.SEEK_DATA) == HOLE.stop
        disk.seek(0)
        assert disk.read() == DATA


def test_a_data_file_is_written(folder: Path, server: DiskServer) -> None:
    """What was flushed is at the server, and there after a restart."""
    if not server.writes:
        pytest.skip("the protocol does not write")
    must(
        "create",
        folder / "vm.fvd",
        str(SIZE),
        "--data-file",
        server.url,
        "--data-format",
        "raw",
        "--force",
        *access(server),
    )
    new = new_data(2)
    with mounted(folder, "-o", options(server)) as mount:
        with mount.raw("vm").open("r+b", buffering=0) as disk:
            for at in range(0, SIZE, MIB):
                os.pwrite(disk.fileno(), new[at : at + MIB], at)
            os.fsync(disk.fileno())
            assert server.content()[:SIZE] == new
            server.restart()
            os.pwrite(disk.fileno(), new[:MIB], MIB)
            os.fsync(disk.fileno())
        assert server.content()[MIB : 2 * MIB] == new[:MIB]
        assert mount.raw("vm").read_bytes() == new[:MIB] + new[:MIB] + new[2 * MIB :]


def test_a_read_waits_while_it_is_gone(folder: Path, server: DiskServer) -> None:
    """And status says since when; with a limit it fails after that, and goes on when the server is back."""
    create(folder, server)
    found: list[bytes] = []
    with mounted(folder, "-o", options(server, "on_base_error=wait=30s")) as mount:
        raw = mount.raw("vm")
        assert read(raw, 0, 4096) == DATA[:4096]
        server.stop()
        try:
            reader = threading.Thread(target=lambda: found.append(read(raw, MIB, 4096)))
            reader.start()
            wait_until(lambda: mount.status("vm").get("base_outage"))
            outage = mount.status("vm")["base_outage"]
        finally:
            server.start()
        reader.join(30)
        assert found == [DATA[MIB : MIB + 4096]]
        assert outage["since"]
        seen = all_that_is_seen(mount)
        assert not [secret for secret in server.secrets if secret in seen]
    with mounted(folder, "-o", options(server, "on_base_error=wait=1s")) as mount:
        assert read(mount.raw("vm"), 0, 4096) == DATA[:4096]
        server.stop()
        try:
            with pytest.raises(OSError, match="Input/output error"):
                read(mount.raw("vm"), MIB, 4096)
        finally:
            server.start()
        wait_until(lambda: "its server is back" in mount.log)
        assert read(mount.raw("vm"), MIB, 4096) == DATA[MIB : MIB + 4096]


def test_wrong_credentials(folder: Path, server: DiskServer) -> None:
    """What is wrong is said, and nothing is shown."""
    tried = [(server.tls, *wrong) for wrong in server.wrong]
    tried += [(tls_creds, server.section, message) for tls_creds, message in server.wrong_tls]
    for tls_creds, section, message in tried:
        words = access(server, server.credentials(section), tls_creds)
        done = fvdfs("create", folder / "vm.fvd", "--base", server.url, "--base-format", "raw", *words)
        assert done.code, section
        assert re.search(message, done.err), (section, done.err)
        assert not [secret for secret in server.secrets if secret in done.err]
        assert not (folder / "vm.fvd").exists()


def test_the_disk_is_gone_or_another(folder: Path, server: DiskServer) -> None:
    """What was open is not mixed with a larger one, and one that is missing is said to be."""
    create(folder, server)
    server.remove()
    try:
        with mounted(folder, "-o", options(server)) as mount, pytest.raises(OSError):
            read(mount.raw("vm"), 0, 4096)
    finally:
        server.bring_back()
    if not server.changes_while_stopped:
        return
    with mounted(folder, "-o", options(server, "on_base_error=wait=1s")) as mount, mount.raw("vm").open("rb"):
        assert read(mount.raw("vm"), 0, 4096) == DATA[:4096]
        server.stop()
        server.remove()
        server.put(DATA + DATA)
        server.start()
        with pytest.raises(OSError, match="Input/output error"):
            read(mount.raw("vm"), MIB, 4096)
        wait_until(lambda: "is it another one?" in mount.log)
        server.bring_back()
        wait_until(lambda: "its server is back" in mount.log)
        assert read(mount.raw("vm"), MIB, 4096) == DATA[MIB : MIB + 4096]
