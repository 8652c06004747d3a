"""Certificates and keys for TLS."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

_CONFIGURATION = """
[req]
distinguished_name = names
[names]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[server]
basicConstraints = CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = IP:127.0.0.1
[client]
basicConstraints = CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
[ca]
default_ca = signing
[signing]
database = index
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = anything
[anything]
commonName = supplied
"""


def make_keys(top: Path) -> Path:
    """Folders: `x509` has certificates of an authority for the server and its clients, `psk` has keys."""
    (top / "psk").mkdir(parents=True)
    key = os.urandom(32).hex()
    (top / "psk" / "keys.psk").write_text(f"qemu:{key}\nalice:{key}\n")
    (top / "x509").mkdir()
    make_authority(top / "x509")
    for role in ("server", "client"):
        make_certificate(top / "x509", role)
    return top


def make_authority(folder: Path) -> None:
    (folder / "configuration").write_text(_CONFIGURATION)
    (folder / "index").touch()
    _make_key(folder, "ca", "-x509", "-extensions", "authority", "-days", "2", "-out", "ca-cert.pem")


def make_certificate(folder: Path, role: str, *, expired: bool = False, address: str = "127.0.0.1") -> None:
    """Of a server at this address, or of a client, by the authority in the folder."""
    (folder / "configuration").write_text(_CONFIGURATION.replace("127.0.0.1", address))
    _make_key(folder, role, "-new", "-out", f"{role}.csr")
    (folder / "index").write_text("")
    dates = []
    for days, option in (-2, "-startdate"), (-1 if expired else 2, "-enddate"):
        dates += [option, (datetime.now(UTC) + timedelta(days)).strftime("%Y%m%d%H%M%SZ")]
    signed = ("-in", f"{role}.csr", "-out", f"{role}-cert.pem", "-cert", "ca-cert.pem", "-keyfile", "ca-key.pem")
    _openssl(folder, "ca", "-batch", "-notext", "-config", "configuration", "-extensions", role, *dates, *signed)


def _make_key(folder: Path, name: str, *words: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}-key.pem")
    _openssl(folder, "req", *key, "-config", "configuration", "-subj", f"/CN={name}", *words)


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(("openssl", *words), cwd=folder, check=True, capture_output=True)
