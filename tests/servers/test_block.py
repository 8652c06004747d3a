"""What iSCSI, NFS and NBD with TLS have of their own, beside the cells of the table (`test_cells.py`)."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from support.block_servers import Iscsi, KilledServer, Nbdkit, NbdServer, NbdTls, Nfs, Qsd
from support.mounts import MIB, fvdfs, mounted, must, running, wait_until
from support.ports import free_port
from support.servers import DiskServer
from support.tls import make_certificate

SIZE = 4 * MIB
DATA = random.Random(7).randbytes(SIZE)
BLOCK = 4096

S = TypeVar("S", bound=DiskServer)


@contextlib.contextmanager
def started(kind: type[S], folder: Path) -> Iterator[S]:
    if reason := kind.missing():
        pytest.skip(reason)
    with free_port() as port:
        server = kind(folder, port)
        server.put(DATA)
        try:
            server.start()
            yield server
        finally:
            server.stop()
            server.close()


@pytest.fixture(scope="module")
def one_iscsi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iscsi]:
    with started(Iscsi, tmp_path_factory.mktemp("iscsi") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def one_nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nfs]:
    with started(Nfs, tmp_path_factory.mktemp("nfs") / "server") as server:
        yield server


@pytest.fixture
def iscsi(one_iscsi: Iscsi) -> Iscsi:
    one_iscsi.put(DATA)
    return one_iscsi


@pytest.fixture
def nfs(one_nfs: Nfs) -> Nfs:
    one_nfs.put(DATA)
    return one_nfs


@pytest.fixture
def either(request: pytest.FixtureRequest) -> DiskServer:
    server: DiskServer = request.getfixturevalue(request.param)
    return server


def access(server: DiskServer) -> list[str]:
    tls = ["--tls-creds", str(server.tls)] if server.tls is not None else []
    return ["--credentials", str(server.credentials()), *tls]


def options(server: DiskServer, *more: str) -> str:
    return ",".join([f"allow_url={server.url}", f"credentials={server.credentials()}", *more])


def stand_on(folder: Path, server: DiskServer) -> None:
    must("create", folder / "vm.fvd", "--base", server.url, "--base-format", "raw", *access(server))


def keep_at(folder: Path, server: DiskServer) -> None:
    where = ("--data-file", server.url, "--data-format", "raw", "--force")
    must("create", folder / "vm.fvd", str(SIZE), *where, *access(server))


def read(path: Path, number: int) -> bytes:
    """A block, past the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), BLOCK, number * BLOCK)


def block(number: int) -> bytes:
    return DATA[number * BLOCK : (number + 1) * BLOCK]


# A process of its own: the servers are started by this one, whose children close all that it has open, and closing
# a disk is a flush. It writes, or flushes, as it is told.
WRITER = """
import os, sys
disk = os.open(sys.argv[1], os.O_RDWR)
for number, word in enumerate(sys.stdin.readline().strip() for _ in range(6)):
    try:
        os.pwrite(disk, bytes([number]) * 4096, 0) if word == "write" else os.fsync(disk)
        print("done", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.mark.parametrize("either", ["iscsi", "nfs"], indirect=True)
def test_what_it_may_have_lost_is_told(folder: Path, either: DiskServer) -> None:
    """A library connects again without a word, and a server's cache is gone then."""
    keep_at(folder, either)
    with mounted(folder, "-o", options(either, "writeback=off")) as mount:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with running(sys.executable, "-c", WRITER, mount.raw("vm"), **pipes) as writer:

            def ask(word: str) -> str:
                assert writer.stdout is not None
                print(word, file=writer.stdin, flush=True)
                return str(writer.stdout.readline().strip())

            assert [ask("write"), ask("flush")] == ["done", "done"]
            either.restart()
            assert [ask("write"), ask("flush"), ask("write")] == ["done", "done", "done"]
            either.restart()
            assert ask("flush") == "Input/output error"
        assert "what was written and not flushed may be lost" in mount.log
        with mount.raw("vm").open("r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), block(3), 0)
            os.fsync(disk.fileno())
    assert either.content()[:BLOCK] == block(3)


# Writes each block and flushes it; opens the disk anew after an error.
ONE_BY_ONE = """
import os, sys
number, disk = 1, -1
while True:
    try:
        disk = os.open(sys.argv[1], os.O_RDWR) if disk < 0 else disk
        os.pwrite(disk, bytes([number % 251]) * 4096, number % 1024 * 4096)
        os.fsync(disk)
        print(number, flush=True)
        number += 1
    except OSError as error:
        if disk >= 0:
            try:
                os.close(disk)
            except OSError:
                pass
        disk = -1
"""


@pytest.mark.parametrize("kind", [Iscsi, Nfs, NbdServer, Nbdkit, Qsd])
def test_a_flush_is_one_at_the_server(folder: Path, tmp_path: Path, kind: type[KilledServer]) -> None:
    """What was flushed before it was killed in the midst of writes is there, and writing goes on when it is back."""
    with started(kind, tmp_path / "server") as server:
        keep_at(folder, server)
        tls = (f"tls_creds={server.tls}",) if server.tls is not None else ()
        with mounted(folder, "-o", options(server, "writeback=off", *tls)) as mount:
            seen = tmp_path / "seen"
            with mount.raw("vm").open("r+b", buffering=0) as disk:
                attached = [word for pid in server.pids for word in ("-p", str(pid))]
                with running("strace", "-f", "-q", "-o", seen, "-e", "fsync,fdatasync", *attached) as strace:
                    wait_until(lambda: all(is_traced(pid, strace.pid) for pid in server.pids))
                    disk.write(DATA)
                    os.fsync(disk.fileno())
                    strace.terminate()
                    strace.wait()
            assert "sync(" in seen.read_text()
            with running(
                sys.executable, "-c", ONE_BY_ONE, mount.raw("vm"), stdout=subprocess.PIPE, text=True
            ) as writer:
                assert writer.stdout is not None
                for _ in range(2):
                    last = [int(writer.stdout.readline()) for _ in range(10)][-1]
                    server.stop()
                    found = server.content()
                    for number in range(1, last + 1):
                        assert found[number * BLOCK : (number + 1) * BLOCK] == bytes([number % 251]) * BLOCK
                    server.start()
                assert [int(writer.stdout.readline()) for _ in range(20)]


def is_traced(process: int, tracer: int) -> bool:
    """With all its threads."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return all(f"TracerPid:\t{tracer}\n" in (thread / "status").read_text() for thread in threads)


@pytest.mark.parametrize("either", ["iscsi", "nfs"], indirect=True)
def test_what_is_discarded(folder: Path, either: DiskServer) -> None:
    """Zeros are written where they are asked for; a server gives back no space, so a discard is refused."""
    keep_at(folder, either)
    with mounted(folder, "-o", options(either)) as mount, mount.raw("vm").open("r+b", buffering=0) as disk:
        disk.write(DATA)
        for how, code in ("--punch-hole", 1), ("--zero-range", 0):
            words = ["fallocate", how, "-o", str(BLOCK), "-l", str(8 * BLOCK), str(mount.raw("vm"))]
            assert subprocess.run(words, capture_output=True, check=False).returncode == code
            os.fsync(disk.fileno())
            assert (either.content() == DATA) is bool(code)
    assert either.content() == DATA[:BLOCK] + bytes(8 * BLOCK) + DATA[9 * BLOCK :]


def test_a_lun_with_large_sectors_and_one_that_is_read_only(folder: Path, iscsi: Iscsi) -> None:
    """Two mounts read it at the same time; parts of sectors are written; a locked one is for `--read-only`."""
    iscsi.sector = BLOCK
    iscsi.restart()
    try:
        for name in ("a", "b"):
            (folder / name).mkdir()
            stand_on(folder / name, iscsi)
        with mounted(folder / "a", "-o", options(iscsi)) as one, mounted(folder / "b", "-o", options(iscsi)) as two:
            assert one.raw("vm").read_bytes() == two.raw("vm").read_bytes() == DATA
        keep_at(folder, iscsi)
        with mounted(folder, "-o", options(iscsi)) as mount, mount.raw("vm").open("r+b", buffering=0) as disk:
            disk.write(DATA)
            os.pwrite(disk.fileno(), b"x" * 512, 3 * 512)
            os.fsync(disk.fileno())
            assert iscsi.content() == DATA[: 3 * 512] + b"x" * 512 + DATA[4 * 512 :]
        iscsi.read_only = True
        iscsi.restart()
        with mounted(folder, "-o", options(iscsi)) as mount:
            with pytest.raises(OSError, match="Input/output error"):
                mount.raw("vm").open("r+b")
            assert "LUN is write protected" in mount.log
        with mounted(folder, "-o", options(iscsi), "--read-only") as mount:
            assert mount.raw("vm").read_bytes() == iscsi.content()
    finally:
        iscsi.sector, iscsi.read_only = 512, False
        iscsi.restart()


def test_a_password_that_is_changed(folder: Path, iscsi: Iscsi) -> None:
    """At the server first: the disk waits, and says why, until the file has the new one."""
    stand_on(folder, iscsi)
    found: list[bytes] = []
    with mounted(folder, "-o", options(iscsi, "on_base_error=wait")) as mount:
        with mount.raw("vm").open("rb"):
            assert read(mount.raw("vm"), 0) == block(0)
            iscsi.password = "another-secret"
            try:
                iscsi.restart()
                reader = threading.Thread(target=lambda: found.append(read(mount.raw("vm"), 300)))
                reader.start()
                wait_until(lambda: "its server is there, but: the server does not take our user" in mount.log)
                assert "does not take our user" in mount.status("vm")["base_outage"]["reason"]
                iscsi.file("chap", "another-secret\n")
                reader.join(30)
            finally:
                del iscsi.password
                iscsi.file("chap", f"{iscsi.password}\n")
                iscsi.restart()
        assert "secret" not in mount.log
    assert found == [block(300)]


def test_a_share_that_may_only_be_read(folder: Path, nfs: Nfs) -> None:
    nfs.disk.chmod(0o444)
    nfs.configure("None")
    nfs.file("credentials", nfs.section)
    try:
        stand_on(folder, nfs)
        where = ("--data-file", nfs.url, "--data-format", "raw", "--force")
        done = fvdfs("create", folder / "data.fvd", str(SIZE), *where, *access(nfs))
        assert done.code
        assert "does not let this user write it: see the credentials" in done.err
    finally:
        nfs.configure()


@pytest.mark.slow
def test_a_share_whose_network_is_cut(folder: Path, nfs: Nfs) -> None:
    """It is noticed, though libnfs waits for TCP; and the disk goes on as soon as the network is back."""
    stand_on(folder, nfs)
    found: list[bytes] = []
    with mounted(folder, "-o", options(nfs, "on_base_error=wait")) as mount, mount.raw("vm").open("rb"):
        assert read(mount.raw("vm"), 0) == block(0)
        nfs.cut()
        try:
            reader = threading.Thread(target=lambda: found.append(read(mount.raw("vm"), 300)))
            reader.start()
            wait_until(lambda: mount.status("vm").get("base_outage"))
            assert "nothing was heard from its server" in mount.log
        finally:
            nfs.join()
        reader.join(30)
        assert found == [block(300)]


@pytest.mark.parametrize("kind", [NbdServer, Qsd])
def test_certificates_that_do_not_fit(folder: Path, tmp_path: Path, kind: type[NbdTls]) -> None:
    """Of another name, none at the client, no TLS, no folder, and one that has expired, with which QEMU is not run."""
    alone = tmp_path / "alone"
    alone.mkdir()

    def refused(message: str, url: str, *words: str) -> None:
        done = fvdfs("create", folder / "vm.fvd", "--base", url, "--base-format", "raw", *words)
        assert done.code, message
        assert message in done.err
        assert not (folder / "vm.fvd").exists()

    with started(kind, tmp_path / "server") as server:
        (alone / "ca-cert.pem").write_bytes((server.keys / "ca-cert.pem").read_bytes())
        with_tls = ("--tls-creds", str(server.keys))
        localhost = server.url.replace("127.0.0.1", "localhost")
        refused("does not match the hostname localhost", localhost, *with_tls)
        refused("client-cert.pem, or we have none and it asks for one", server.url, "--tls-creds", str(alone))
        refused("the server speaks TLS only: write nbds:// for nbd://", server.url.replace("nbds", "nbd"), *with_tls)
        refused("name the folder with certificates or keys: --tls-creds DIR", server.url)
        if kind is NbdServer:
            make_certificate(server.keys, "server", expired=True)
            server.restart()
            refused("is not of our ca-cert.pem, or has expired", server.url, *with_tls)
