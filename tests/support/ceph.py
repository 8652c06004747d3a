"""A Ceph cluster of one monitor and one OSD, whose disk is a sparse file; with cephx.

`sh tests/ceph.sh` installs it. All of it lies in one folder, listens on 127.0.0.1 and takes about 200 MB of memory.
There is no manager: images need none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from support.mounts import running, wait_until
from support.servers import DiskServer

_MISSING = [name for name in ("ceph", "ceph-mon", "ceph-osd", "rbd") if not shutil.which(name)]
NO_CEPH = (
    f"tests/ceph.sh installs it: {', '.join(_MISSING)}"
    if _MISSING
    else ""
    if os.environ.get("FVDFS_CEPH")
    else "takes minutes: tests/ceph.sh runs it"
)
"""Why none is started here; empty: one is."""
needs_ceph = pytest.mark.skipif(bool(NO_CEPH), reason=NO_CEPH)
POOL = "disks"
READ_ONLY = f"profile rbd-read-only pool={POOL}"
WATCHES = f"allow rwx pool={POOL} object_prefix rbd_header."
"""What a user needs beside `READ_ONLY`: QEMU opens each image to write to it, and so asks to watch it."""
_PATIENCE = 120.0  # seconds
_CONF = """\
[global]
fsid = {fsid}
mon host = v2:{address}:{port}
public addr = {address}
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
run dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
osd data = {folder}/osd
osd memory target = 939524096
osd mon heartbeat interval = 2
bluestore block size = 8589934592
bluestore cache autotune = false
bluestore cache size = 67108864
"""


class Ceph:
    """A running cluster, with a pool for images."""

    def __init__(
        self, folder: Path, address: str = "127.0.0.1", on: Callable[..., list[str]] = lambda *words: [*map(str, words)]
    ) -> None:
        """`folder`: for all that it has. Sockets lie in it, so its path has to be short. `on`: runs programs there."""
        self.folder = folder
        self._address = address
        self._on = on
        self.conf = folder / "ceph.conf"
        self._keyring = folder / "keyring"
        self._daemons = contextlib.ExitStack()
        self._osd: subprocess.Popen[bytes] | None = None
        self._mon: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """Start all of it, from nothing."""
        fsid = str(uuid.uuid4())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.conf.write_text(_CONF.format(fsid=fsid, address=self._address, port=port, folder=self.folder))
        monmap, keyring = self.folder / "monmap", self._keyring
        _key(keyring, "mon.", mon="allow *")
        _key(keyring, "client.admin", mon="allow *", osd="allow *")
        self._say("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:{self._address}:{port}]", monmap)
        self._say("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._mon = self._start("ceph-mon", "-i", "a")
        osd = self.folder / "osd"
        osd.mkdir()
        self._say("ceph-authtool", "--create-keyring", osd / "keyring", "-n", "osd.0", "--gen-key")
        key = self._say("ceph-authtool", osd / "keyring", "-n", "osd.0", "--print-key").strip()
        number = str(uuid.uuid4())
        self.ceph("osd", "new", number, "-i", "-", said=f'{{"cephx_secret": "{key}"}}')
        self._say("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number, "--keyring", osd / "keyring")
        self.start_osd()
        self.ceph("osd", "pool", "create", POOL, "8", "8", "replicated")
        self.ceph("osd", "pool", "application", "enable", POOL, "rbd")

    def end(self) -> None:
        self._daemons.close()

    def _start(self, *command: str | Path) -> subprocess.Popen[bytes]:
        said = self._daemons.enter_context(open(self.folder / f"{command[0]}.said", "ab"))
        words = ["setpriv", "--pdeathsig", "KILL", *self._on(*command, "-f", "-c", self.conf)]  # ends with the tests
        return self._daemons.enter_context(running(*words, stdout=said, stderr=said, start_new_session=True))

    def _say(self, *command: str | Path, said: str = "") -> str:
        """What a program says; it must succeed."""
        words = self._on(*command, *(["-c", self.conf] if command[0] in _WITH_CONF else []))
        done = subprocess.run(words, input=said, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def ceph(self, *words: str | Path, said: str = "") -> str:
        return self._say("ceph", *words, said=said)

    def rbd(self, *words: str | Path) -> str:
        return self._say("rbd", *words)

    def new_image(self, name: str, file: Path) -> str:
        """An image with the content of a file; its URL."""
        self.rbd("import", "--no-progress", "--image-feature", _FEATURES, file, f"{POOL}/{name}")
        return f"rbd:{POOL}/{name}"

    def used(self, name: str) -> int:
        """MiB that an image takes, in whole objects of 4 MiB."""
        found = self.rbd("du", "--format", "json", f"{POOL}/{name}")
        return sum(int(image["used_size"]) for image in json.loads(found)["images"]) >> 20

    def key_of(self, user: str, keyring: Path, osd: str) -> None:
        """Have a user with these capabilities, whose key is in this file, for whoever owns it, alone."""
        keyring.touch(0o600)
        caps = ("mon", "profile rbd", "osd", osd)
        keyring.write_text(self.ceph("auth", "get-or-create", f"client.{user}", *caps))

    def start_osd(self) -> None:
        """Returns when it serves."""
        before = self._up_from()
        self._osd = self._start("ceph-osd", "-i", "0", "--keyring", self.folder / "osd" / "keyring")
        wait_until(lambda: self._up_from() > before, _PATIENCE)

    def _up_from(self) -> int:
        """The epoch since which the OSD is up; 0: it is not."""
        osds = json.loads(self.ceph("osd", "dump", "--format", "json"))["osds"]
        return max((int(osd["up_from"]) for osd in osds if osd["up"]), default=0)

    def read_bytes(self) -> int:
        """What the OSD has sent to clients since it was started."""
        assert self._osd is not None
        asked = subprocess.run(
            ["ceph", "--admin-daemon", self.folder / f"osd.0.{self._osd.pid}.asok", "perf", "dump", "osd"],
            check=True,
            capture_output=True,
        )
        return int(json.loads(asked.stdout)["osd"]["op_r_out_bytes"])

    def restart_osd(self) -> None:
        """Start the OSD where it does not run."""
        assert self._osd is not None
        if self._osd.poll() is not None:
            self.start_osd()

    def new_key(self) -> str:
        return self._say("ceph-authtool", "--gen-print-key").strip()

    def kill_osd(self) -> None:
        """At once, as a power cut would."""
        assert self._osd is not None
        self._osd.kill()
        self._osd.wait()

    def signal_mon(self, number: signal.Signals) -> None:
        assert self._mon is not None
        self._mon.send_signal(number)

    def signal_osd(self, number: signal.Signals) -> None:
        assert self._osd is not None
        self._osd.send_signal(number)


_WITH_CONF = ("ceph", "rbd", "ceph-mon", "ceph-osd")
_FEATURES = "layering,exclusive-lock,object-map,fast-diff,deep-flatten"


def _key(keyring: Path, name: str, **caps: str) -> None:
    words = [word for who, what in caps.items() for word in ("--cap", who, what)]
    create = [] if keyring.exists() else ["--create-keyring"]
    subprocess.run(
        ["ceph-authtool", *create, keyring, "--gen-key", "-n", name, *words], check=True, stdout=subprocess.DEVNULL
    )


@contextlib.contextmanager
def cluster() -> Iterator[Ceph]:
    """A new one."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder:
        made = Ceph(Path(folder))
        try:
            made.make()
            yield made
        finally:
            made.end()


class Rbd(DiskServer):
    """An RBD image of a cluster of its own; where it is stopped, that is the OSD."""

    writes = True
    grows = True
    changes_while_stopped = False

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, port)
        self._stack = contextlib.ExitStack()
        self._whole = contextlib.ExitStack()
        self.ceph = self._whole.enter_context(cluster())
        self.ceph.key_of("fvdfs", folder / "keyring", f"profile rbd pool={POOL}")
        self.ceph.key_of("weak", folder / "weak", READ_ONLY)
        text = (folder / "keyring").read_text()
        self._key = text.split()[-1]
        self.file("wrong", text.replace(self._key, self.ceph.new_key()))

    @classmethod
    def missing(cls) -> str:
        return NO_CEPH

    @property
    def url(self) -> str:
        return f"rbd:{POOL}/disk"

    def _section(self, user: str = "fvdfs", keyring: str = "keyring") -> str:
        return f"[rbd:{POOL}/]\nuser = {user}\nkeyring = {keyring}\nconf = {self.ceph.conf}\n"

    @property
    def section(self) -> str:
        return self._section()

    @property
    def wrong(self) -> Sequence[tuple[str, str]]:
        return (
            (self._section(keyring="wrong"), "does not take our user and key"),
            (self._section("nobody"), "has no key of client.nobody"),
            (self._section("weak", "weak"), "may not open the image disk: QEMU opens each"),
        )

    @property
    def secrets(self) -> Sequence[str]:
        return (self._key,)

    def put(self, data: bytes) -> None:
        super().put(data)
        if "disk" not in self.ceph.rbd("ls", POOL).split():
            self.ceph.new_image("disk", self.disk)
            return
        there = json.loads(self.ceph.rbd("info", "--format", "json", f"{POOL}/disk"))["size"]
        if there != len(data):
            self.ceph.rbd("resize", "--no-progress", "--allow-shrink", "--size", f"{len(data)}B", f"{POOL}/disk")
        target = f"{self.url}:conf={self.ceph.conf}"
        subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", self.disk, target], check=True)

    def content(self) -> bytes:
        words = ["rbd", "export", "--no-progress", "-c", str(self.ceph.conf), f"{POOL}/disk", "-"]
        return subprocess.run(words, check=True, capture_output=True).stdout

    def remove(self) -> None:
        self.ceph.rbd("rename", f"{POOL}/disk", f"{POOL}/away")

    def bring_back(self) -> None:
        self.ceph.rbd("rename", f"{POOL}/away", f"{POOL}/disk")

    def start(self) -> None:
        self.ceph.restart_osd()

    def stop(self) -> None:
        self.ceph.kill_osd()

    def close(self) -> None:
        self._whole.close()
