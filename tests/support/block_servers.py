"""Servers of blocks and files (`servers.DiskServer`): iSCSI by tgt, NFS by nfs-ganesha, NBD with TLS by three programs.

They end as at a power cut of the server, but for what its kernel has: by SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from support.mounts import running, wait_until
from support.namespaces import in_mount_namespace
from support.servers import DiskServer, listens_at
from support.tls import make_authority, make_certificate, make_keys

_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/bin"


def _program(name: str) -> str | None:
    return shutil.which(name, path=_SBIN)


class KilledServer(DiskServer):
    """One that ends unasked."""

    keeps_open: ClassVar[bool] = False
    """Whether it looks at its disk only when it starts."""

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        process.kill()
        process.wait()

    @property
    def runs(self) -> bool:
        return listens_at(self.port)

    @property
    def pids(self) -> list[int]:
        """The processes that serve somebody."""
        words = [*self.inside, "ss", "-Htnp", f"sport = :{self.port}"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return [int(number) for number in re.findall(r"pid=(\d+)", said)]

    def _look_again(self) -> None:
        if self.keeps_open and self.runs:
            self.restart()

    def put(self, data: bytes) -> None:
        has_other_size = self.disk.exists() and self.disk.stat().st_size != len(data)
        super().put(data)
        if has_other_size:
            self._look_again()

    def remove(self) -> None:
        super().remove()
        self._look_again()

    def bring_back(self) -> None:
        super().bring_back()
        self._look_again()


class Iscsi(KilledServer):
    """tgt, with CHAP. The disk is thin-provisioned: so tgt says where it has holes, and takes discards."""

    writes = True
    tells_holes = True
    keeps_open = True
    password: str = "top-secret-chap"
    target = "iqn.2026-01.example:disk"

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        self.file("chap", f"{self.password}\n")
        self.file("wrong", "not-the-password\n")
        self.read_only = False
        self.sector = 512

    @classmethod
    def missing(cls) -> str:
        if os.geteuid():
            return "tgt runs as root"
        return "" if _program("tgtd") else "tgt is not installed"

    @property
    def url(self) -> str:
        return f"iscsi://127.0.0.1:{self.port}/{self.target}/1"

    def _section(self, user: str = "fvdfs", password: str = "chap") -> str:
        return f"[iscsi://127.0.0.1:{self.port}/]\nuser = {user}\npassword_file = {password}\n"

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        refused = "does not take our user and password, or wants them: see the credentials"
        return tuple((section, refused) for section in (self._section(password="wrong"), self._section("nobody"), ""))

    @property
    def secrets(self) -> Sequence[str]:
        return (self.password, "not-the-password")

    def admin(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Tell tgt something."""
        control = {"TGT_IPC_SOCKET": str(self.folder / "control")}
        command = ["tgtadm", "-C", "0", "--lld", "iscsi", *words]
        return subprocess.run(command, env=os.environ | control, capture_output=True, text=True, check=False)

    def must(self, *words: str) -> None:
        done = self.admin(*words)
        assert not done.returncode, (words, done.stderr)

    def _launch(self) -> None:
        (self.folder / "control.0").unlink(missing_ok=True)
        environment = os.environ | {"TGT_IPC_SOCKET": str(self.folder / "control")}
        tgtd = _program("tgtd")
        assert tgtd is not None
        self.run(tgtd, "-f", "-C", "0", "--iscsi", f"portal=127.0.0.1:{self.port}", env=environment)
        wait_until(lambda: not self.admin("--op", "show", "--mode", "sys").returncode)
        account = ("--user", "fvdfs", "--password", self.password)
        self.must("--op", "new", "--mode", "target", "--tid", "1", "-T", self.target)
        if self.disk.exists():
            self.add_disk()
        self.must("--op", "new", "--mode", "account", *account)
        self.must("--op", "bind", "--mode", "account", "--tid", "1", "--user", "fvdfs")
        self.must("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def add_disk(self) -> None:
        lun = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
        self.must("--op", "new", *lun, "-b", str(self.disk), "--blocksize", str(self.sector))
        self.must("--op", "update", *lun, "--params", f"thin_provisioning=1,readonly={int(self.read_only)}")


class Nfs(KilledServer):
    """nfs-ganesha with NFSv3, at a host of its own, since the portmapper has one port. Root is squashed there."""

    writes = True
    grows = True
    owner = 1234

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        self.share = folder / "share"
        self.share.mkdir()
        self.share.chmod(0o755)
        (folder / "state").mkdir()
        self.disk = self.share / "disk.raw"
        self._host = contextlib.ExitStack()
        number = port % 60000
        self.here, self.there = (
            f"10.{232 + number // 15000}.{number // 60 % 250}.{number % 60 * 4 + n}" for n in (1, 2)
        )
        # Of mounts, too: ganesha finds the portmapper by a socket in /run.
        alone = "mount -t tmpfs none /run && mkdir /run/rpcbind && exec sleep infinity"
        process = self._host.enter_context(running(*in_mount_namespace("unshare", "--net", "sh", "-c", alone)))
        self._inside = f"/proc/{process.pid}"
        wait_until(lambda: Path(self._inside, "comm").read_text() == "sleep\n")
        name = f"nfs{port}"
        self._ip(f"link add {name} type veth peer name far netns {process.pid}")
        self._ip(f"address add {self.here}/30 dev {name}")
        self._ip(f"link set {name} up")
        for words in ("link set lo up", f"address add {self.there}/30 dev far", "link set far up"):
            subprocess.run([*self.on("ip"), *words.split()], check=True)
        rpcbind = self._host.enter_context(running(*self.on("rpcbind", "-f"), stderr=subprocess.DEVNULL))
        assert rpcbind.poll() is None
        wait_until(lambda: self._listens(111))
        self.configure()

    def configure(self, squash: str = "Root_Squash") -> None:
        self.file(
            "ganesha.conf",
            f"""
            NFS_CORE_PARAM {{ Protocols = 3, 4; Enable_NLM = false; Enable_RQUOTA = false; }}
            NFSV4 {{ Graceless = true; RecoveryRoot = {self.folder}/state; }}
            EXPORT {{
                Export_Id = 1; Path = {self.share}; Pseudo = /share; Access_Type = RW; Squash = {squash};
                SecType = sys; Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}
            }}
            """,
        )

    @staticmethod
    def _ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)

    def on(self, *words: str) -> list[str]:
        """The command line that runs this one at the server."""
        program = _program(words[0])
        assert program is not None
        return ["nsenter", f"--net={self._inside}/ns/net", f"--mount={self._inside}/ns/mnt", program, *words[1:]]

    def _listens(self, port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.there, port)) == 0

    @classmethod
    def missing(cls) -> str:
        if os.geteuid():
            return "nfs-ganesha runs as root"
        missing = next((name for name in ("ganesha.nfsd", "rpcbind", "nsenter", "ip") if not _program(name)), None)
        if missing is None and not any(Path("/usr/lib").glob("*/ganesha/libfsalvfs.so")):
            missing = "nfs-ganesha-vfs"
        return f"{missing} is not installed" if missing else ""

    @property
    def url(self) -> str:
        return f"nfs://{self.there}{self.disk}"

    def _section(self, user: int = owner) -> str:
        return f"[nfs://{self.there}/]\nuser = {user}\ngroup = {user}\n"

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        return (
            (self._section(4321), "the server does not let this user read it: see the credentials"),
            ("", "the server does not let this user read it: see the credentials"),
        )

    def put(self, data: bytes) -> None:
        super().put(data)
        os.chown(self.disk, self.owner, self.owner)
        self.disk.chmod(0o600)

    def _launch(self) -> None:
        words = ("-F", "-f", f"{self.folder}/ganesha.conf", "-L", f"{self.folder}/log", "-p", f"{self.folder}/pid")
        self._process = self.run(*self.on("ganesha.nfsd", *words))
        wait_until(
            lambda: b"mountd" in subprocess.run(self.on("rpcinfo", "-p", "127.0.0.1"), capture_output=True).stdout
        )
        wait_until(lambda: self._listens(2049))

    @property
    def pids(self) -> list[int]:
        return [self._process.pid]

    def cut(self) -> None:
        """Nothing comes through any more."""
        subprocess.run(self.on("ip", "link", "set", "far", "down"), check=True)

    def join(self) -> None:
        subprocess.run(self.on("ip", "link", "set", "far", "up"), check=True)

    def close(self) -> None:
        self._host.close()

    @property
    def runs(self) -> bool:
        return self._listens(2049)


class NbdTls(KilledServer):
    """An NBD server with TLS: `psk` with pre-shared keys, else with certificates."""

    writes = True
    tells_holes = True
    psk: ClassVar[bool] = False
    program: ClassVar[str]

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        self.keys = make_keys(folder / "keys") / ("psk" if self.psk else "x509")
        (folder / "other").mkdir()
        if self.psk:
            (folder / "other" / "keys.psk").write_text(f"qemu:{os.urandom(32).hex()}\n")
        else:
            make_authority(folder / "other")
            make_certificate(folder / "other", "client")

    @classmethod
    def missing(cls) -> str:
        return "" if _program(cls.program) else f"{cls.program} is not installed"

    @property
    def url(self) -> str:
        return f"nbds://127.0.0.1:{self.port}/disk"

    @property
    def tls(self) -> Path:
        return self.keys

    @property
    def wrong_tls(self) -> Sequence[tuple[Path, str]]:
        return ((self.folder / "other", "does not take our key" if self.psk else "is not of our ca-cert.pem"),)

    @property
    def secrets(self) -> Sequence[str]:
        return [line.partition(":")[2] for line in (self.keys / "keys.psk").read_text().split()] if self.psk else []


class NbdServer(NbdTls):
    """nbd-server, which takes certificates alone."""

    tells_holes = False
    program = "nbd-server"

    def _launch(self) -> None:
        self.file(
            "configuration",
            f"[generic]\nlistenaddr = 127.0.0.1\nport = {self.port}\nforce_tls = true\n"
            f"certfile = {self.keys}/server-cert.pem\nkeyfile = {self.keys}/server-key.pem\n"
            f"cacertfile = {self.keys}/ca-cert.pem\n"
            f"[disk]\nexportname = {self.disk}\nflush = true\nfua = true\ntrim = true\n",
        )
        program = _program("nbd-server")
        assert program is not None
        subprocess.run([program, "-C", self.folder / "configuration", "-p", self.folder / "pid"], check=True)
        wait_until(lambda: self.runs)
        self._stack.callback(self._kill, int((self.folder / "pid").read_text()))

    def _kill(self, leader: int) -> None:
        os.killpg(leader, signal.SIGKILL)  # each connection has a process
        wait_until(lambda: not self.runs)


class Nbdkit(NbdTls):
    """nbdkit, with keys."""

    psk = True
    program = "nbdkit"

    def _launch(self) -> None:
        by = f"--tls-psk={self.keys}/keys.psk"
        where = ("-i", "127.0.0.1", "-p", str(self.port), "-e", "disk", "--tls=require", by)
        self.run("nbdkit", "-f", *where, "file", self.disk)
        wait_until(lambda: self.runs)


class Qsd(NbdTls):
    """qemu-storage-daemon, with certificates."""

    program = "qemu-storage-daemon"

    keeps_open = True

    def _launch(self) -> None:
        kind = "tls-creds-psk" if self.psk else "tls-creds-x509,verify-peer=yes"
        node = {"driver": "file", "filename": str(self.disk), "node-name": "disk", "discard": "unmap"}
        words = ("--blockdev", json.dumps(node), "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on")
        self.run(
            *("qemu-storage-daemon", "--object", f"{kind},id=t,dir={self.keys},endpoint=server"),
            *("--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port},tls-creds=t"),
            *(words if self.disk.exists() else ()),
        )
        wait_until(lambda: self.runs)
