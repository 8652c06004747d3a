"""A disk that moves to another host by TLS."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounts import FVDFS, Mount, fvdfs, mounted, must, running, wait_for_log, wait_until
from support.tls import make_authority, make_certificate, make_keys

CONTENT = bytes(range(251)) * 4096


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def source(folder: Path) -> Iterator[Mount]:
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder) as mount:
        with mount.raw("vm").open("r+b") as disk:
            disk.write(CONTENT)
        yield mount


@contextlib.contextmanager
def serving(source: Mount, port: int, *words: str | Path) -> Iterator[str]:
    """Where the disk is given."""
    command = (*FVDFS, "serve", source.raw("vm"), "--listen", f"127.0.0.1:{port}", *words)
    with running(*command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


@pytest.mark.parametrize(("kind", "user"), [("x509", ""), ("psk", "alice@")])
def test_a_disk_moves(source: Mount, tmp_path: Path, keys: Path, free_port: int, kind: str, user: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with serving(source, free_port, "--tls-creds", keys / kind) as url:
        assert url == f"nbds://127.0.0.1:{free_port}/vm"
        url = url.replace("//", f"//{user}")
        must("receive", url, there / "vm.fvd", "--tls-creds", keys / kind)
        with mounted(there, "-o", f"allow_url={url.removesuffix('vm')},tls_creds={keys / kind}") as target:
            assert target.raw("vm").read_bytes()[: len(CONTENT)] == CONTENT
            with target.raw("vm").open("r+b", buffering=0) as disk:
                disk.write(b"written there")
                assert source.status("vm")["move"] in ("moved", "released")
                wait_until(lambda: source.status("vm")["move"] == "released")
            assert target.status("vm")["move"] == "local"
            wait_for_log(target, "copies first what its source used last")
            assert target.raw("vm").read_bytes()[13 : len(CONTENT)] == CONTENT[13:]


def test_a_template_stays_where_it_is(source: Mount, tmp_path: Path, keys: Path, free_port: int) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for folder in (source.folder, there):
        (folder / "template.raw").write_bytes(CONTENT)
    source.umount()
    must("create", source.folder / "vm.fvd", "--force", "--base", "template.raw")
    source.mount()
    with source.raw("vm").open("r+b") as disk:
        disk.write(b"own")
    with serving(source, free_port, "--tls-creds", keys / "x509") as url:
        how = ("--tls-creds", keys / "x509", "--keep-base", "template.raw")
        must("receive", url, there / "vm.fvd", *how)
        with mounted(there, "-o", f"allow_url={url.removesuffix('vm')},tls_creds={keys / 'x509'}") as target:
            must("activate", target.raw("vm"))
            wait_until(lambda: source.status("vm")["move"] == "released")
            assert target.status("vm")["local_bytes"] == 4096
            assert target.raw("vm").read_bytes() == (b"own" + CONTENT[3:]).ljust(target.raw("vm").stat().st_size, b"\0")


def test_what_keeps_hosts_from_each_other(source: Mount, tmp_path: Path, keys: Path, free_port: int) -> None:
    """No credentials, no certificate, those of another authority, old ones, other keys, a side without TLS."""
    other = make_keys(tmp_path / "other")
    nothing, old, bare = tmp_path / "nothing", make_keys(tmp_path / "old") / "x509", tmp_path / "bare"
    for folder in (nothing, bare):
        folder.mkdir()
    for name in ("ca-cert.pem", "ca-key.pem"):
        (old / name).write_bytes((keys / "x509" / name).read_bytes())
    (bare / "ca-cert.pem").write_bytes((keys / "x509" / "ca-cert.pem").read_bytes())
    make_certificate(old, "client", expired=True)
    image = tmp_path / "there.fvd"

    def refused(url: str, credentials: Path | None, words: str) -> None:
        done = fvdfs("receive", url, image, *(("--tls-creds", credentials) if credentials else ()))
        assert done.code in (1, 2)
        assert words in done.err
        assert done.err.count("\n") == 1
        assert not image.exists()

    with serving(source, free_port, "--tls-creds", keys / "x509") as url:
        refused(url, None, "name the folder with certificates or keys: --tls-creds DIR")
        refused(url, nothing, "has neither ca-cert.pem nor keys.psk")
        refused(url, bare, "we have none and it asks for one")
        refused(url, other / "x509", "the server's certificate is not of our ca-cert.pem")
        refused(url, old, "client-cert.pem has expired")
        refused(url, keys / "psk", "the server has certificates, and we have keys")
        refused(url.replace("127.0.0.1", "localhost"), keys / "x509", "does not match the hostname localhost")
        refused(url.replace("nbds:", "nbd:"), None, "write nbds:// for nbd://")
        refused(f"{url}2", keys / "x509", "is no disk that fvdfs serve gives there")
        plain = url.replace("nbds:", "nbd:")
        read = subprocess.run(
            ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", plain], capture_output=True, check=False
        )
        assert b"not permitted before TLS" in read.stderr
    with serving(source, free_port, "--tls-creds", keys / "psk") as url:
        refused(url, other / "psk", "the server does not take our key")
        refused(url, keys / "x509", "has keys where we have certificates")
        refused(url.replace("//", "//bob@"), keys / "psk", "has no key for bob")
    with serving(source, free_port) as url:
        refused(url.replace("nbd:", "nbds:"), keys / "x509", "write nbd:// for nbds://")


def test_what_cannot_be_served(source: Mount, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        done = fvdfs("serve", source.raw("vm"), "--listen", "127.0.0.1", "--tls-creds", tmp_path)
        assert done.code == 2
        assert words in done.err
        assert done.err.count("\n") == 1

    refused("has neither ca-cert.pem nor keys.psk")
    make_authority(tmp_path)
    refused("server-cert.pem: No such file")
    make_certificate(tmp_path, "server", expired=True)
    refused("server-cert.pem has expired")
