"""What a storage daemon is lent to be let in by servers, while it opens an image.

Secrets are read from the files that the user names, and lie in memory of their own (memfd) that the daemon inherits:
they are in no argument, no environment and no log. A key for ssh is lent by an ssh-agent that ends when the daemon is
connected: QEMU takes no key by name. It takes one key of the host, too, and no file of them (`credentials.host_key`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fvdfs.errors import ImageError, Locked, Refused, UsageError
from fvdfs.store import credentials as known
from fvdfs.store.credentials import NOTHING, Credentials, Section
from fvdfs.store.locations import Location, Options
from fvdfs.store.qemu_nodes import Node

_LONGEST = 1 << 20  # bytes of a file with credentials
_PATIENCE = 10.0  # seconds until a program of OpenSSH's has ended
_WITH_PIPE = ("sh", "-c", 'echo "$SSH_AGENT_PID" && exec cat')
"""The command of an agent, which ends with it: it lasts as long as its standard input is open."""


def read_credentials(path: str) -> Credentials:
    """What the file at this absolute path says; nothing where the path is empty. Blocks. Raises UsageError."""
    if not path:
        return Credentials()
    try:
        text = _read(path, others=0o022).decode()
        found = known.parse(text, os.path.dirname(path))
        for section in found.sections:
            for key in known.FILES:
                if section.get(key):
                    _check(section.get(key), key)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror}") from error
    return found


def _check(path: str, key: str) -> None:
    """Raise UsageError, or OSError, unless a file can be used as it is."""
    with open(_handle(path, others=0o077 if key in known.SECRET_FILES else 0), "rb"):
        pass


def _handle(path: str, *, others: int) -> int:
    """A descriptor. `others`: what nobody but the owner may do. Raises UsageError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif status.st_mode & others & 0o044:
        problem = f"others than its owner may read it: chmod 600 {path}"
    elif status.st_mode & others & 0o022:
        problem = f"others than its owner may write it: chmod go-w {path}"
    if problem:
        os.close(descriptor)
        raise UsageError(f"{path}: {problem}")
    return descriptor


def _read(path: str, *, others: int = 0o077) -> bytes:
    """Raises UsageError, OSError."""
    with open(_handle(path, others=others), "rb") as file:
        return file.read(_LONGEST)


def secret_in(path: str) -> bytes:
    """The password in a file: all of it, but a newline at the end. Blocks. Raises UsageError, OSError."""
    data = _read(path)
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data


@dataclass
class Lent:
    """What one daemon is lent. Close it when the daemon is connected."""

    objects: list[Options] = field(default_factory=list)
    """Secrets."""
    descriptors: list[int] = field(default_factory=list)
    """To inherit."""
    environment: dict[str, str] = field(default_factory=dict)
    """To be added to that of this process."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Close the descriptors, and end the agent. Blocks."""
        self._stack.close()

    def secret(self, data: bytes, file_format: str = "raw") -> str:
        """The name by which options of QEMU's refer to a secret."""
        descriptor = os.memfd_create("secret", os.MFD_CLOEXEC)
        self._stack.callback(os.close, descriptor)
        os.write(descriptor, data)
        name = f"lent{len(self.objects)}"
        file = f"/proc/self/fd/{descriptor}"
        self.objects.append({"qom-type": "secret", "id": name, "format": file_format, "file": file})
        self.descriptors.append(descriptor)
        return name

    def agent(self, key: str) -> None:
        """Have an agent with this key alone, besides those that it has already. Raises UsageError, OSError."""
        if "SSH_AUTH_SOCK" not in self.environment:
            self.environment["SSH_AUTH_SOCK"] = self._stack.enter_context(_agent())
        environment = os.environ | self.environment | {"SSH_ASKPASS_REQUIRE": "never"}
        _must(["ssh-add", "-q", key], key, "cannot be used as a key of ssh, which must have no passphrase", environment)


@contextlib.contextmanager
def _agent() -> Iterator[str]:
    """The socket of an ssh-agent that ends at the end, or some seconds after this process."""
    with tempfile.TemporaryDirectory(prefix="fvdfs-agent-") as folder:
        socket = os.path.join(folder, "socket")
        words = [_program("ssh-agent"), "-a", socket, *_WITH_PIPE]
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # the terminal's signals are not for it
        ) as process:
            assert process.stdout is not None
            number = process.stdout.readline().strip()
            if not number.isdigit():
                raise OSError(errno.ECHILD, "ssh-agent cannot be started")
            try:
                yield socket
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGTERM)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UsageError(f"{name} is needed for this key and is not installed: apt install openssh-client")
    return path


def _must(words: list[str], path: str, complaint: str, environment: dict[str, str] | None = None) -> str:
    """What a program of OpenSSH's prints. Raises UsageError with the complaint about `path`, where it fails."""
    words[0] = _program(words[0])
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": _PATIENCE}
    done = subprocess.run(words, env=environment, cwd="/", check=False, start_new_session=True, **how)
    if done.returncode:
        raise UsageError(f"{path}: {complaint}")
    return str(done.stdout)


def lend(node: Node, credentials: str) -> tuple[Node, Lent]:
    """The node with what it stands on, and with who we are for its servers. Blocks. Raises ImageError, UsageError.

    `credentials`: the absolute path of the file; empty: there is none.
    """
    lent = Lent()
    try:
        return _lend(node, read_credentials(credentials), lent), lent
    except BaseException as error:
        lent.close()
        if isinstance(error, OSError | subprocess.TimeoutExpired):
            where = getattr(error, "filename", None) or node.location.name
            raise ImageError(str(where), getattr(error, "strerror", None) or str(error)) from error
        raise


def _lend(node: Node, credentials: Credentials, lent: Lent) -> Node:
    location = node.location
    section = section_of(node.location, credentials)
    by_driver = _BY_DRIVER.get(str(location.protocol.get("driver", "")))
    if by_driver is not None:
        location = replace(location, protocol=location.protocol | by_driver(location, section, lent))
    secret = node.secret
    if node.format == "luks":
        place = os.path.abspath(node.path) if node.path else location.url
        if file := credentials.of(place).get("passphrase_file"):
            secret = lent.secret(secret_in(file))
    backing = _lend(node.backing, credentials, lent) if node.backing is not None else None
    data_file = _lend(node.data_file, credentials, lent) if node.data_file is not None else None
    return replace(node, location=location, secret=secret, backing=backing, data_file=data_file)


def section_of(location: Location, credentials: Credentials) -> Section:
    """What is known for its server. Raises Refused where a URL names another user than the one who is known."""
    section = credentials.of(location.url) if location.url else NOTHING
    named, user = location.protocol.get("user"), section.get("user")
    if named is not None and user and named != user:
        raise Refused(location.shown, f"the credentials of [{section.prefix}] are those of {user}, and not of {named}")
    return section


def _of_ssh(location: Location, section: Section, lent: Lent) -> Options:
    found: Options = {}
    if user := section.get("user"):
        found["user"] = user
    if key := section.get("key"):
        lent.agent(key)
    if file := section.get("known_hosts"):
        assert isinstance(location.address, tuple)
        host, port = location.address
        name = host if port == 22 else f"[{host}]:{port}"
        said = _must(["ssh-keygen", "-F", name, "-f", file], file, f"has no key of {name}")
        try:
            shown = base64.b64decode(known.host_key(said), validate=True)
        except binascii.Error:
            shown = b""
        if not shown:
            raise UsageError(f"{file}: has no key of {name} that libssh knows")
        digest = hashlib.sha256(shown).hexdigest()
        found["host-key-check"] = {"mode": "hash", "type": "sha256", "hash": digest}
    return found


def _of_ftp(_location: Location, section: Section, lent: Lent) -> Options:
    found: Options = {}
    if user := section.get("user"):
        found["username"] = user
    if file := section.get("password_file"):
        found["password-secret"] = lent.secret(secret_in(file))
    return found


def _of_iscsi(_location: Location, section: Section, lent: Lent) -> Options:
    found: Options = {}
    if user := section.get("user"):
        found["user"] = user
    if file := section.get("password_file"):
        found["password-secret"] = lent.secret(secret_in(file))
    if initiator := section.get("initiator"):
        found["initiator-name"] = initiator
    return found


def _of_nfs(_location: Location, section: Section, _lent: Lent) -> Options:
    return {key: int(section.get(key)) for key in ("user", "group") if section.get(key)}


def _of_rbd(location: Location, section: Section, lent: Lent) -> Options:
    user = str(location.protocol.get("user", "")) or section.get("user")
    found: Options = {"user": user} if user else {}
    if conf := section.get("conf"):
        found["conf"] = conf
    if keyring := section.get("keyring"):
        try:
            key = known.key_of_keyring(_read(keyring).decode(errors="replace"), user or "admin")
        except ValueError as error:
            raise UsageError(f"{keyring}: {error}") from None
        if not key:
            raise Locked(location.name, f"{keyring} has no key of client.{user or 'admin'}")
        found |= {"key-secret": lent.secret(key.encode(), "base64"), "auth-client-required": ["cephx"]}
    return found


_BY_DRIVER = {
    "ssh": _of_ssh,
    "iscsi": _of_iscsi,
    "nfs": _of_nfs,
    "rbd": _of_rbd,
    **dict.fromkeys(("ftp", "ftps"), _of_ftp),
}
"""By QEMU's driver: what else it is told."""
