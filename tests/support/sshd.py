"""A host that is reached by ssh: an sshd of this machine, for one user, with a key of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounts import running, wait_until

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SHADOW = Path("/etc/shadow")
IS_LOCKED = os.access(SHADOW, os.R_OK) and f"\n{getpass.getuser()}:!" in f"\n{SHADOW.read_text()}"
"""Whether sshd lets this user in by no key either."""
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or IS_LOCKED,
    reason="openssh-server is not installed, or this user's account is locked",
)


@contextlib.contextmanager
def ssh_host(folder: Path, port: int, *, says: str = "") -> Iterator[str]:
    """The words of an ssh that logs in there. `says`: a shell command that each session begins with."""
    assert SSHD is not None
    folder.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    session = folder / "session"
    session.write_text(f'#!/bin/sh\n{says}\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    session.chmod(0o700)
    key = (folder / "user.pub").read_text()
    (folder / "authorized").write_text(f'command="{session}" {key}')
    (folder / "sshd").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin yes\nPasswordAuthentication no\nAuthorizedKeysFile {folder}/authorized\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # else sshd does not start
    with running(SSHD, "-D", "-e", "-f", folder / "sshd", stderr=subprocess.DEVNULL):
        wait_until(lambda: _listens(port))
        how = "-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        yield f"ssh {how} -p {port} -i {folder}/user {getpass.getuser()}@127.0.0.1"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
