"""Bases on servers that are spoken to by TLS, with certificates and pre-shared keys, in a mount and by commands."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fvdfs.errors import ImageError, UnsupportedFeature
from fvdfs.store import nbd_tls
from fvdfs.store.locations import Location, parse_location
from fvdfs.store.qemu_nodes import tls_object
from support.mounts import MIB, fvdfs, mounted, must, running, wait_until
from support.tls import make_authority, make_keys

DATA = random.Random(3).randbytes(MIB)


def qemu_nbd(folder: Path, port: int, credentials: Path) -> list[str]:
    kind = "tls-creds-x509,verify-peer=yes" if credentials.name == "x509" else "tls-creds-psk"
    return [
        *("qemu-nbd", "-t", "-r", "-e", "0", "-f", "raw", "-x", "disk", "-b", "127.0.0.1", "-p", str(port)),
        *("--object", f"{kind},id=t,dir={credentials},endpoint=server", "--tls-creds", "t", str(folder / "base")),
    ]


def nbdkit(folder: Path, port: int, credentials: Path) -> list[str]:
    by = f"--tls-certificates={credentials}" if credentials.name == "x509" else f"--tls-psk={credentials}/keys.psk"
    where = ["-i", "127.0.0.1", "-p", str(port), "-e", "disk"]
    return ["nbdkit", "-f", "-r", *where, "--tls=require", by, "file", str(folder / "base")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize(
    ("server", "kind", "user"),
    [(qemu_nbd, "x509", ""), (nbdkit, "x509", ""), (qemu_nbd, "psk", ""), (nbdkit, "psk", "alice@")],
)
def test_a_base_by_tls(
    folder: Path, tmp_path: Path, keys: Path, free_port: int, server: object, kind: str, user: str
) -> None:
    assert callable(server)
    (tmp_path / "base").write_bytes(DATA)
    command: Sequence[str] = server(tmp_path, free_port, keys / kind)
    url = f"nbds://{user}127.0.0.1:{free_port}/disk"
    tls = ("--tls-creds", keys / kind)
    create = ("create", folder / "disk.fvd", "--base", url, "--base-format", "raw", "--copy-on-read")
    with running(*command, stderr=subprocess.DEVNULL):
        wait_until(lambda: fvdfs(*create, *tls).code == 0)
        with mounted(folder, "-o", f"allow_url=nbds://,tls_creds={keys / kind}") as mount:
            assert mount.raw("disk").read_bytes() == DATA
        allowed = ("-o", "allow_url=nbds://")
        for words in (("info", folder / "disk.fvd"), ("map", folder / "disk.fvd")):
            must(*words, *tls, *allowed)
        must("clone", url, "other", "--into", folder, *tls)
        must("convert", folder / "other.fvd", tmp_path / "copy.raw", *tls, *allowed)
        assert (tmp_path / "copy.raw").read_bytes() == DATA


def test_what_keeps_a_server_from_being_read(folder: Path, tmp_path: Path, keys: Path, free_port: int) -> None:
    """No credentials, those of another authority, a name that is not in the certificate, or a server without TLS."""
    (tmp_path / "base").write_bytes(DATA)
    other = tmp_path / "other"
    other.mkdir()
    make_authority(other)
    create = ("create", folder / "disk.fvd", "--base-format", "raw", "--base")
    with running(*nbdkit(tmp_path, free_port, keys / "x509"), stderr=subprocess.DEVNULL):
        good, tls = f"nbds://127.0.0.1:{free_port}/disk", ("--tls-creds", keys / "x509")
        wait_until(lambda: fvdfs(*create, good, *tls).code == 0)
        for url, given, message in (
            (good, (), "name the folder with certificates or keys: --tls-creds DIR"),
            (good, ("--tls-creds", other), "certificate"),
            (good, ("--tls-creds", tmp_path), "has neither ca-cert.pem nor keys.psk"),
            (f"nbds://localhost:{free_port}/disk", tls, "does not match the hostname localhost"),
            (f"nbd://127.0.0.1:{free_port}/disk", (), "TLS"),
        ):
            done = fvdfs(*create, url, *given, "--force")
            assert done.code != 0, url
            assert message in done.err


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("nbds://host:10809/a", "nbds://host/a"),
        ("nbds://alice@host/a", "nbds://alice@host/a"),
        ("nbds+unix:///a?socket=/s", "nbds+unix:///a?socket=/s"),
    ],
)
def test_urls(name: str, url: str) -> None:
    found = parse_location(name)
    assert found.url == url
    user = found.tls_user
    assert user == ("alice" if "alice" in name else "qemu")
    assert found.protocol["tls-creds"] == tls_object("/keys/keys.psk", user)["id"]
    assert found.protocol["tls-hostname"] == ("host" if "host" in name else "localhost")
    assert parse_location(name.replace("nbds", "nbd").replace("alice@", "")).tls_user is None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nbds://a,b@host/", ImageError),
        ("nbds://alice:secret@host/", UnsupportedFeature),
        ("nbd://alice@host/", UnsupportedFeature),
        ("nbds://host/a?tls-certificates=/etc", UnsupportedFeature),
        ("nbds+unix:///a?socket=/s&tls-psk-file=/etc/shadow", ImageError),
        (
            'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"},"tls-creds":"tls-qemu"}',
            UnsupportedFeature,
        ),
    ],
)
def test_urls_that_say_too_much(name: str, error: type[ImageError]) -> None:
    """An image cannot choose the credentials, nor a password."""
    with pytest.raises(error):
        parse_location(name)


async def test_a_daemon_that_cannot_be_started_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that carry a few sectors of a move by TLS."""

    async def connect(_: Location) -> socket.socket:
        return socket.socket(socket.AF_UNIX)

    monkeypatch.setattr(nbd_tls, "connect", connect)
    monkeypatch.setattr(nbd_tls, "bound_to_us", lambda _: ["/nowhere/qemu-storage-daemon"])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError) as kept:
        async with nbd_tls.without_tls(parse_location("nbds://host/vm"), "vm", "/keys", writable=False):
            pass
    assert len(os.listdir("/proc/self/fd")) == before, kept
