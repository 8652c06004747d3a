"""fvdfs next to qcow2, both over the same template on the same real server: Ceph, and nginx by https.

    python tests/bench/servers.py [--only ceph,https] [--rounds N] [--bits N] [--delay US] [--work DIR] [--json FILE]

The server is on a host of its own (a network namespace), behind a link with a rate and a delay; all that it sends is
counted on that link, with what TLS and Ceph's own words take. What is measured:

1. A boot of an emulated guest on a local raw file, on a qcow2 overlay with copy-on-read, on fvdfs with copy-on-read,
   and on fvdfs with a profile of an earlier boot; and what the boots without a profile have the server send.
2. The copy of all of the template, alone: by prefetching, by QEMU's block-stream, by `qemu-img convert`.

Needs root, a machine that is otherwise idle, gcc, nginx-light, openssl, Ceph (tests/ceph.sh installs it), and what
tests/bench/prefetch.py needs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import lab
from bench.prefetch import COPY, QCOW2_COPY, Bench
from bench.report import Report
from support.ceph import POOL, Ceph
from support.hosts import Host, Link, two_hosts
from support.servers import NGINX, listens_at
from support.tls import make_authority, make_certificate

CLONE_NEWNET = 0x40000000  # of linux/sched.h
PORT = 8443


@dataclass(frozen=True)
class Template:
    """A disk on a server."""

    url: str
    """As fvdfs names it."""
    for_qemu: str
    """As QEMU does."""
    allowed: str
    credentials: Path

    @property
    def create(self) -> tuple[str, ...]:
        return ("--credentials", str(self.credentials))

    @property
    def options(self) -> str:
        return f"allow_url={self.allowed},credentials={self.credentials}"


@contextmanager
def ceph(host: Host, folder: Path, disk: Path) -> Iterator[Template]:
    """In a cluster of one OSD."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as name:
        cluster = Ceph(Path(name), host.address, host.on)
        try:
            cluster.make()
            cluster.key_of("fvdfs", folder / "keyring", "profile rbd")
            words = f"user = fvdfs\nkeyring = {folder}/keyring\nconf = {cluster.conf}\n"
            url = cluster.new_image("guest", disk)
            yield Template(url, f"{url}:conf={cluster.conf}", f"rbd:{POOL}/", private(folder, f"[rbd:]\n{words}"))
        finally:
            cluster.end()


@contextmanager
def https(host: Host, folder: Path, disk: Path) -> Iterator[Template]:
    """On nginx."""
    assert NGINX is not None
    make_authority(folder)
    configuration = folder / "configuration"
    configuration.write_text(configuration.read_text().replace("127.0.0.1", host.address))
    make_certificate(folder, "server")
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; pid {folder}/pid; worker_processes 1; user root;
        events {{}}
        http {{
            access_log off; sendfile on; keepalive_requests 1000000;
            server {{
                listen {host.address}:{PORT} ssl;
                ssl_certificate {folder}/server-cert.pem;
                ssl_certificate_key {folder}/server-key.pem;
                root {disk.parent};
            }}
        }}
        """
    )
    host.popen(NGINX, "-c", folder / "nginx.conf", "-e", folder / "error.log")
    url = f"https://{host.address}:{PORT}/{disk.name}"
    for_qemu = {"driver": "raw", "file": {"driver": "https", "url": url, "sslverify": "off"}}
    lab.wait_for(lambda: listens_at(PORT, host.address))
    known = private(folder, f"[{url}]\nca = {folder}/ca-cert.pem\n")
    yield Template(url, f"json:{json.dumps(for_qemu)}", url, known)


SERVERS = {"ceph": ceph, "https": https}


def private(folder: Path, text: str) -> Path:
    file = folder / "credentials"
    file.write_text(text)
    file.chmod(0o600)
    return file


@contextmanager
def on(host: Host) -> Iterator[None]:
    """Have this process, and all that it starts, be on this host."""
    with open("/proc/self/ns/net") as before, host.namespace.open() as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@dataclass
class Measurement:
    """One server, and who is measured on it."""

    bench: Bench
    name: str
    link: Link
    template: Template

    def boots(self) -> None:
        local = self.bench.work / "local.raw"
        lab.command("cp", self.bench.guest[0], local)
        self.boot("raw", local)
        self.boot("qcow2", lab.new_overlay(self.bench.work, self.template.for_qemu), QCOW2_COPY)
        recorded = lab.new_images(self.bench.work, [self.template.url], *COPY, *self.template.create)
        with lab.mounted(recorded, f"{self.template.options},record_profile") as (disk,):
            self.boot("fvdfs", disk.path)
        with_profile = ("--prefetch-delay", "1", "--profile", str(recorded / "0.fvd"))
        images = lab.new_images(self.bench.work, [self.template.url], *COPY, *with_profile, *self.template.create)
        with lab.mounted(images, self.template.options) as (disk,):
            self.boot("fvdfs with a profile", disk.path)

    def boot(self, who: str, disk: Path, drive: str = "") -> None:
        before = self.link.bytes()[0]
        whole, reading = self.bench.boot(disk, drive)
        self.add("boot", "s", who, whole)
        self.add("its reads take", "s", who, reading)
        if who in ("qcow2", "fvdfs"):
            self.add("the server sends for it", "MB", who, (self.link.bytes()[0] - before) / 1e6)

    def copies(self) -> None:
        size = self.bench.guest[0].stat().st_blocks * 512
        with lab.qcow2_disks(self.bench.work, [self.template.for_qemu]) as (disk,):
            self.copy("qcow2", disk, size)
        with lab.mounted(
            lab.new_images(self.bench.work, [self.template.url], *self.template.create), self.template.options
        ) as (disk,):
            self.copy("fvdfs", disk, size)
            lab.command("cmp", disk.path, self.bench.guest[0])
        lab.drop_caches()
        began = time.monotonic()
        converted = self.bench.work / "converted.raw"
        lab.command("qemu-img", "convert", "-O", "raw", self.template.for_qemu, converted)
        self.add("all of it is copied at", "MB/s", "qemu-img convert", size / (time.monotonic() - began) / 1e6)
        converted.unlink()

    def copy(self, who: str, disk: lab.Disk, size: int) -> None:
        lab.drop_caches()
        before, began = self.link.bytes()[0], time.monotonic()
        disk.start()
        lab.wait_for(disk.done, 300)
        seconds = time.monotonic() - began
        self.add("all of it is copied at", "MB/s", who, size / seconds / 1e6)
        self.add(
            "the server sends for that, of what the template stores",
            "times",
            who,
            (self.link.bytes()[0] - before) / size,
        )

    def add(self, what: str, unit: str, who: str, value: float) -> None:
        self.bench.report.add(f"{self.name}: {what}", unit, who, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SERVERS), metavar="SERVER,...")
    parser.add_argument("--what", default="boots,copies", metavar="WHAT,...")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bits", type=float, default=1e9, help="a second, of the link")
    parser.add_argument("--delay", type=int, default=500, metavar="US", help="microseconds from one host to the other")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures there, and count those that are there"
    )
    arguments = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print(f"others are at work here (load average {os.getloadavg()[0]}): figures will vary", file=sys.stderr)
    report = Report(arguments.json)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.work, prefix="servers-")))
        far, near, link = stack.enter_context(two_hosts(bits=arguments.bits, delay_us=arguments.delay))
        stack.enter_context(on(near))
        bench = Bench(work, 0, (), report)
        for name in arguments.only.split(",") * arguments.rounds:
            folder = Path(tempfile.mkdtemp(dir=work))
            with SERVERS[name](far, folder, bench.guest[0]) as template:
                measurement = Measurement(bench, name, link, template)
                for what in arguments.what.split(","):
                    getattr(measurement, what)()
    print(report.table())


if __name__ == "__main__":
    main()
