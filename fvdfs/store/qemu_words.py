"""What QEMU's storage daemon complains of, in words that say what to do. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

PROGRAM = "qemu-storage-daemon"
WANTS_TLS = "the server speaks TLS only: write nbds:// for nbd://, and name certificates or keys"
_HOST_KEY = "the server shows another key than known_hosts has: is it another server?"
_ARGUMENT = re.compile(rf"{PROGRAM}: (--\S+ (\{{.*\}}|\S+): )?")
_OF_TLS = (
    (r"Our own certificate (\S+) failed validation against (\S+): .*", r"{1} is of another authority than {2}"),
    (r"The (?:client|server) certificate (\S+) has expired", r"{1} has expired"),
    (r"The certificate has expired", "the server's certificate has expired"),
    (r"The certificate is not trusted", "the server's certificate is not of our ca-cert.pem, or has expired"),
    (
        r"The certificate hasn't got a known issuer",
        "the server's certificate is not of our ca-cert.pem",
    ),
    (r"Certificate does not match the hostname (\S+)", "the server's certificate does not match the hostname {1}"),
    (
        r"Cannot read from TLS channel: Software caused connection abort",
        "the server does not take our client-cert.pem, or we have none and it asks for one",
    ),
    (
        r"Failed to read option reply: Unexpected end-of-file",
        "the server has hung up; if by TLS: it does not take our client-cert.pem, or we have none and it asks for one",
    ),
    (r"Insufficient credentials for that request", "the server has certificates, and we have keys"),
    (
        r"TLS connection was non-properly terminated",
        "the server does not take our key, or has keys where we have certificates",
    ),
    (r"Username (\S+) not found in PSK file (\S+)", "{2} has no key for {1}"),
    (r"option 5 \(starttls\)", "the server speaks no TLS: write nbd:// for nbds://"),
    (r"(?i)option \S+ not permitted before TLS|server requires TLS", WANTS_TLS),
    (r"Unable to access credentials (\S+): (.*)", "{1}: {2}"),
)
_OF_RBD = (
    (
        r"error connecting: No such file or directory",
        "no ceph.conf names monitors of Ceph, or no keyring has a key for this user",
    ),
    (r"error opening pool (\S+): No such file or directory", "Ceph has no pool {1}"),
    (r"error opening pool (\S+): Operation not permitted", "this user of Ceph's may not use the pool {1}"),
    (
        r"error reading header from (\S+): No such file or directory",
        "Ceph has no image {1} there, or not this snapshot of it",
    ),
    (
        r"error reading header from (\S+): Operation not permitted",
        "this user of Ceph's may not open the image {1}: QEMU opens each to write to it",
    ),
)


_OF_SERVERS = (
    (r"remote host \S+ key fingerprint .* does not match|host key mismatch|host key does not match", _HOST_KEY),
    (r"no host key was found in known_hosts", "its host is in no known_hosts: name one in the credentials"),
    (r"failed to authenticate using publickey", "the server takes none of our keys for this user"),
    (r"(?i)CHAP|Auth\w+ failure|login.*failed.*auth", "the server does not take our user and password, or wants them"),
    (r"NFS: ACCESS denied. Required access r-", "the server does not let this user read it"),
    (r"NFS: ACCESS denied", "the server does not let this user write it"),
    (r"The requested URL returned error: 401|HTTP.* 401", "the server does not take our user and password (401)"),
    (r"The requested URL returned error: 403|HTTP.* 403", "the server refuses it to us (403)"),
    (r"error connecting: (?:Operation not permitted|Permission denied)", "the server does not take our user and key"),
)
"""What servers say of who we are."""


def of_servers(line: str) -> str:
    """Why a server does not let us in; empty where that is not what a line says."""
    for pattern, words in _OF_SERVERS:
        if re.search(pattern, line):
            return f"{words}: see the credentials ({line})"
    return ""


def complaint(said: str) -> str:
    """The line that says why it has ended, without its arguments; empty where it has said nothing."""
    lines = said.splitlines()
    own = [line for line in lines if line.startswith(f"{PROGRAM}: ")]
    line = [*lines, *own][-1] if lines else ""
    return _ARGUMENT.sub("", line, count=1)


def of_tls(line: str) -> str:
    """What of a line is about TLS, in our words; empty: nothing."""
    return _in_our_words(line, _OF_TLS)


def of_rbd(line: str) -> str:
    """What of a line is about Ceph, in our words; empty: nothing."""
    return _in_our_words(line, _OF_RBD)


def _in_our_words(line: str, known: Iterable[tuple[str, str]]) -> str:
    for pattern, words in known:
        if found := re.search(pattern, line):
            return words.format("", *found.groups())
    return ""
