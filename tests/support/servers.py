"""Servers of disks.

A `DiskServer` is one kind of storage on a server, real, with one raw disk, on this machine. To add one:

1. Derive a class: `__init__` calls the base's (folder, port) and makes what the server needs in `self.folder`.
   `_launch` starts it (`self.run(words…)`, whose process ends with `stop`), and returns when it takes connections.
   `put` and `content` write and read the bytes of its disk behind its back, at the server. `url` and `section` (what
   `-o credentials=FILE` says of it, as lines of a file in `self.folder`) name it; `missing` says what is not there.
2. Say what it can: `writes`, `tells_holes`, `grows`. `wrong` lists credentials that it must not take, each with a
   pattern of the message.
3. Add it to `SERVERS` in tests/servers/test_cells.py: every cell of the table runs on it.

`restart` is `stop` and `start`: what was not stable is lost where the server keeps it in memory.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from support.cables import Network
from support.mounts import running, wait_until
from support.sshd import IS_LOCKED, SSHD
from support.tls import make_authority, make_certificate


def listens(at: Path) -> bool:
    """Whether a server lets clients in at this socket, which is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(at)) == 0


def listens_at(port: int, address: str = "127.0.0.1") -> bool:
    """The same of a port of this machine, or another."""
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


@contextlib.contextmanager
def nbd_server(file: Path, at: Path, *, read_only: bool = True) -> Iterator[str]:
    server = subprocess.Popen(["nbdkit", "-f", *["-r"] * read_only, "-U", at, "file", file])
    try:
        deadline = time.monotonic() + 30
        while not listens(at):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={at}"
    finally:
        server.terminate()
        server.wait()


class DiskServer:
    """A server with one raw disk; see the head of this module."""

    writes: ClassVar[bool] = False
    """Whether it takes writes."""
    tells_holes: ClassVar[bool] = False
    """Whether it says where its disk has holes."""
    grows: ClassVar[bool] = False
    """Whether its disk can be extended by a client."""
    changes_while_stopped: ClassVar[bool] = True
    """Whether `put` needs no server that runs."""

    def __init__(self, folder: Path, port: int, network: Network | None = None) -> None:
        """`network`: it runs on the host there, and not on this one."""
        folder.mkdir()
        self.address = network.there if network is not None else "127.0.0.1"
        self.inside = network.inside if network is not None else []
        self.folder = folder
        self.port = port
        self.disk = folder / "disk.raw"
        self._stack = contextlib.ExitStack()

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be run here; empty: it can."""
        return ""

    @property
    def url(self) -> str:
        """Of the disk."""
        raise NotImplementedError

    @property
    def section(self) -> str:
        """Lines for a file of credentials in `folder`; empty where it needs none."""
        return ""

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        """Sections that must not let anybody in, each with a pattern of what is said then."""
        return ()

    @property
    def secrets(self) -> Sequence[str]:
        """What must be seen nowhere."""
        return ()

    @property
    def tls(self) -> Path | None:
        """The folder for `tls_creds`, if it needs one."""
        return None

    @property
    def wrong_tls(self) -> Sequence[tuple[Path, str]]:
        """Other folders for `tls_creds` that must not let anybody in, each with a pattern of what is said then."""
        return ()

    def put(self, data: bytes) -> None:
        """Have the disk hold this; it runs, or not."""
        with self.disk.open("r+b" if self.disk.exists() else "wb") as file:
            for at in range(0, len(data), 4096):  # what is zeros is a hole
                part = data[at : at + 4096]
                if part.strip(b"\0"):
                    os.pwrite(file.fileno(), part, at)
            file.truncate(len(data))

    def content(self) -> bytes:
        """What the disk holds, by the server's own word."""
        return self.disk.read_bytes()

    def remove(self) -> None:
        """Take the disk away from the server."""
        self.disk.rename(self.disk.with_suffix(".away"))

    def bring_back(self) -> None:
        """Undo `remove`, whatever took its place."""
        self.disk.with_suffix(".away").rename(self.disk)

    def run(self, *words: str | Path, **how: Any) -> subprocess.Popen[Any]:
        """Start a process that ends with `stop`."""
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | how
        process = self._stack.enter_context(running(*self.inside, *words, **how))
        self._stack.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)

    def _launch(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Returns when it takes connections."""
        self._launch()

    def stop(self) -> None:
        """Returns when it has ended, and its connections with it."""
        self._stack.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Undo what `__init__` did beside its folder."""

    def file(self, name: str, text: str, mode: int = 0o600) -> str:
        """A new file in `folder`; its name."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return name

    def credentials(self, section: str | None = None) -> Path:
        """A file of credentials, with this section, or the right one."""
        return self.folder / self.file("credentials", self.section if section is None else section)


class Ssh(DiskServer):
    """OpenSSH's sftp-server."""

    writes = True
    grows = True

    def __init__(self, folder: Path, port: int, network: Network | None = None) -> None:
        super().__init__(folder, port, network)
        for key in ("host", "user", "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        host = " ".join((folder / "host.pub").read_text().split()[:2])
        other = " ".join((folder / "other.pub").read_text().split()[:2])
        self.file("known_hosts", f"[{self.address}]:{port} {host}\n", 0o644)
        self.file("known_others", f"[{self.address}]:{port} {other}\n", 0o644)
        self.file("known_nobody", f"nowhere {other}\n", 0o644)
        self.file("authorized", (folder / "user.pub").read_text())
        (folder / "sshd").write_text(
            f"ListenAddress {self.address}\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
            f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"AuthorizedKeysFile {folder}/authorized\nSubsystem sftp internal-sftp\n"
        )

    @classmethod
    def missing(cls) -> str:
        if SSHD is None or shutil.which("ssh-agent") is None:
            return "openssh-server is not installed"
        return "this user's account is locked" if IS_LOCKED else ""

    @property
    def url(self) -> str:
        return f"ssh://{self.address}:{self.port}{self.disk}"

    def _section(self, key: str = "user", known_hosts: str = "known_hosts", user: str = "") -> str:
        name = user or getpass.getuser()
        return f"[ssh://{self.address}:{self.port}/]\nuser = {name}\nkey = {key}\nknown_hosts = {known_hosts}\n"

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        return (
            (self._section("other"), "takes none of our keys"),
            (self._section(known_hosts="known_others"), "shows another key than known_hosts has"),
            (self._section(known_hosts="known_nobody"), "has no key of "),
            (self._section(user="nobody"), "takes none of our keys"),
        )

    def _launch(self) -> None:
        assert SSHD is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # else sshd does not start
        self.run(SSHD, "-D", "-e", "-f", self.folder / "sshd", start_new_session=True)
        wait_until(lambda: listens_at(self.port, self.address))

    def stop(self) -> None:
        super().stop()
        # Each connection has a process of its own, which outlives the one that listens.
        for pid in self._sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        wait_until(lambda: not self._sessions())

    def _sessions(self) -> list[int]:
        """Processes that have a connection at its port."""
        words = [*self.inside, "ss", "-Htnp", f"sport = :{self.port}"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return [int(number) for number in re.findall(r"pid=(\d+)", said)]


NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Https(DiskServer):
    """nginx with TLS, a certificate of an authority of its own, and a password; it lets in who has a cookie, too."""

    password = "top-secret-password"
    cookie = "top-secret-cookie"

    def __init__(self, folder: Path, port: int, network: Network | None = None) -> None:
        super().__init__(folder, port, network)
        (folder / "web").mkdir()
        self.disk = folder / "web" / "disk.raw"
        for name in ("tls", "other"):
            (folder / name).mkdir()
            make_authority(folder / name)
        make_certificate(folder / "tls", "server", address=self.address)
        self.file("password", f"{self.password}\n")
        self.file("wrong-password", "wrong\n")
        self.file("cookie", f"key={self.cookie}\n")
        hashed = subprocess.run(
            ["openssl", "passwd", "-apr1", self.password], capture_output=True, text=True, check=True
        ).stdout
        self.file("users", f"reader:{hashed}", 0o644)
        self.elsewhere = f"http://localhost:{port}/disk.raw"
        self.configure()

    def configure(self) -> None:
        """Write its configuration."""
        folder = self.folder
        self.file(
            "nginx.conf",
            f"""
            daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
            {"user root;" if os.geteuid() == 0 else ""}
            events {{}}
            http {{
                access_log {folder}/access.log;
                client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
                uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
                server {{
                    listen {self.address}:{self.port} ssl;
                    ssl_certificate {folder}/tls/server-cert.pem;
                    ssl_certificate_key {folder}/tls/server-key.pem;
                    root {folder}/web;
                    location / {{ auth_basic disks; auth_basic_user_file {folder}/users; }}
                    location /cookie/ {{
                        if ($cookie_key != "{self.cookie}") {{ return 403; }}
                        alias {folder}/web/;
                    }}
                    location /moved/ {{ return 302 https://{self.address}:{self.port}/disk.raw; }}
                    location /away/ {{ return 302 {self.elsewhere}; }}
                }}
            }}
            """,
        )

    @classmethod
    def missing(cls) -> str:
        return "" if NGINX is not None else "nginx-light is not installed"

    @property
    def root(self) -> str:
        """The beginning of all URLs of it."""
        return f"https://{self.address}:{self.port}/"

    @property
    def url(self) -> str:
        return f"{self.root}disk.raw"

    def _section(self, password: str = "password", ca: str = "tls/ca-cert.pem", user: str = "reader") -> str:
        return f"[{self.root}]\nuser = {user}\npassword_file = {password}\nca = {ca}\n"

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        return (
            (self._section("wrong-password"), "401"),
            (self._section(user="nobody"), "401"),
            (f"[{self.root}]\nca = tls/ca-cert.pem\n", "401"),
            (self._section(ca="other/ca-cert.pem"), "certificate"),
            ("", "certificate"),
        )

    @property
    def secrets(self) -> Sequence[str]:
        return (self.password, self.cookie)

    def _launch(self) -> None:
        assert NGINX is not None
        self.run(NGINX, "-c", self.folder / "nginx.conf", "-e", self.folder / "error.log")
        wait_until(lambda: listens_at(self.port, self.address))


class S3(DiskServer):
    """A store like S3, by its own protocol: requests are signed, and the signatures checked."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        self._process: subprocess.Popen[str] | None = None
        self.file("wrong-key", "wrong\n")

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("moto") is not None else "moto is not installed"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/disks/disk%20image.raw"

    def _section(self, secret: str = "secret-key", access: str = "") -> str:
        access = access or self._said("access-key")
        return f"[http://127.0.0.1:{self.port}/disks/]\naccess_key = {access}\nsecret_key_file = {secret}\n"

    def _said(self, name: str) -> str:
        return (self.folder / name).read_text().strip()

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        return ((self._section("wrong-key"), "403"), (self._section(access="AKIAWRONG"), "403"), ("", "403"))

    @property
    def secrets(self) -> Sequence[str]:
        return (self._said("secret-key"),)

    def _launch(self) -> None:
        script = Path(__file__).with_name("s3.py")
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = self.run(sys.executable, script, self.folder, str(self.port), **how)
        self._await()
        if (self.folder / "credentials").exists():  # it has new keys
            self.credentials()

    def _await(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "done\n"

    def _look_again(self) -> None:
        if self._process is not None and self._process.poll() is None:
            assert self._process.stdin is not None
            print("look", file=self._process.stdin, flush=True)
            self._await()

    def put(self, data: bytes) -> None:
        super().put(data)
        self._look_again()

    def remove(self) -> None:
        super().remove()
        self._look_again()

    def bring_back(self) -> None:
        super().bring_back()
        self._look_again()
